"""From nothing to a result table: draw a data set, train methods, evaluate, report.

`make demo` runs this, `make demo METHODS="lba mcja"` with other methods. Every step is a
`fastreid-vi` command, printed before it runs; paste one to change it. A second run keeps the data
set and the rows of methods that it does not train anew.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

METHODS = ("baseline", "mpanet")  # trained unless others are named
METRICS = ("R1", "mAP", "mINP")
# Many people with few pictures each: that is what a network without ImageNet weights learns from.
SYNTH = {
    "train_ids": 260,
    "val_ids": 12,
    "test_ids": 30,
    "seed": 20,
    "height": 128,
    "width": 64,
    "images": [2, 12],
    "train_images": [2, 4],
}
# The published recipes fine-tune ImageNet weights for a day on a GPU. From scratch, in minutes and
# on two cores, the same losses need a small network, a higher rate for Adam and images whose colour
# and polarity say nothing (data.channel-mix). Both methods get the same recipe.
TRAIN = [
    *("--weights", "none", "--model.depth", "18", "--run.seed", "1"),
    *("--data.height", "96", "--data.width", "48", "--data.pad", "5"),
    *("--data.sampler", "identity_random", "--data.identities", "8", "--data.images", "8"),
    *("--data.channel-mix", "0.6", "--data.erase", "0.3", "--data.resize", "bilinear"),
    *("--data.cache", "--data.workers", "0", "--data.validation", "0"),
    *("--optim.name", "adam", "--optim.lr", "7e-4", "--optim.backbone-lr-scale", "1"),
    *("--schedule.gamma", "0.2", "--schedule.warmup-epochs", "1", "--run.eval-every", "0"),
]
# bfloat16 is worth a third more epochs where the processor computes in it.
EPOCHS = {
    "bf16": ("--schedule.epochs", "30", "--schedule.milestones", "22", "27"),
    "fp32": ("--schedule.epochs", "18", "--schedule.milestones", "13", "16"),
}
# What a method needs besides: the last of two equal flags counts.
SPECIAL: dict[str, list[str]] = {
    "baseline": [],
    "mpanet": [],
    # A pass of this sampler has three times the batches of an epoch of the others, each dearer.
    "lba": ["--data.sampler", "paired_identity", "--schedule.iterations", "28"],
    # At the published strength the ranks are affine: too little moves in minutes.
    "mcja": ["--model.cmr-strength", "0.05"],
    # No stage A: many identities a batch teach an encoder from scratch, infrared ones alone do not.
    # A hard-mined cosine triplet makes it collapse at full weight. Running statistics of so few
    # steps are not what the generators trained with.
    "aligngan": [
        *("--data.sampler", "uniform", "--data.identities", "32", "--data.images", "2"),
        *("--data.pixel-identities", "8", "--model.pixel-images", "16"),
        *("--model.conv-dim", "16", "--model.residual-blocks", "2", "--model.dropout", "0"),
        *("--model.encoder-size", "96", "48", "--model.in-eval", "instance"),
        *("--model.feature-triplet-weight", "0.2", "--model.margin", "0.3"),
        *("--model.soft-bh", "0", "4", "--model.feature-warmup-epochs", "0"),
        *("--model.pixel-warmup-epochs", "4", "--optim.lr", "1e-3", "--pixel-optim.lr", "1e-3"),
        *("--schedule.iterations", "28", "--schedule.warmup-epochs", "6"),
        *("--schedule.epochs", "46", "--schedule.milestones", "38", "43"),
    ],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder (runs/demo)")
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=", ".join(SPECIAL))
    args = parser.parse_args()
    if unknown := [name for name in args.methods if name not in SPECIAL]:
        parser.error(f"methods: expected some of {', '.join(SPECIAL)}, got {unknown[0]!r}")
    return demo(args.out, tuple(dict.fromkeys(args.methods)) or METHODS)


def demo(out: Path, methods: tuple[str, ...] = METHODS) -> int:
    """Run every step below `out`; returns the exit code."""
    start = time.monotonic()
    precision = "bf16" if has_bfloat16() else "fp32"
    try:
        if draw(out / "data"):  # results on other pictures do not compare
            (out / "results.json").unlink(missing_ok=True)
        for method in methods:
            shutil.rmtree(out / method, ignore_errors=True)
            root = ["--data-root", out / "data", "--run-dir", out / method]
            command("train", f"{method}-sysu", *root, *flags(method, precision))
            command("eval", out / method)
            add_row(out / "results.json", method, read_test(out / method))
        tests = {name: read_test(out / name) for name in SPECIAL if known(out, name)}
        title = "fastreid-vi demo: visible-infrared re-identification on a drawn data set"
        runs = [out / name for name in tests]
        command("report", *runs, "--out", out / "report.html", "--title", title)
    except subprocess.CalledProcessError as error:
        return int(error.returncode)
    except KeyboardInterrupt:
        return 130
    print(f"\n{table(tests)}\n")
    print(f"{out / 'report.html'} shows curves, rank lists and pattern maps;")
    print(f"{out / 'results.json'} has the numbers. {(time.monotonic() - start) / 60:.1f} minutes.")
    return 0


def flags(method: str, precision: str) -> list[str]:
    """The recipe flags of a method on this machine."""
    return [*TRAIN, "--run.precision", precision, *EPOCHS[precision], *SPECIAL[method]]


def draw(root: Path) -> bool:
    """Draw the data set, unless it is there already, made the same way: whether it was drawn."""
    record = root / "exp" / "synthetic.json"
    if record.is_file():
        made = json.loads(record.read_text())
        if all(made.get(name) == value for name, value in SYNTH.items()):
            print(f"{root}: kept from an earlier run", flush=True)
            return False
    words: list[Any] = ["--overwrite"]
    for name, value in SYNTH.items():
        words += [f"--{name.replace('_', '-')}", *(value if isinstance(value, list) else [value])]
    command("data", "synth", root, *words)
    return True


def has_bfloat16() -> bool:
    """Whether the device computes in bfloat16 faster than in float32."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and "avx512_bf16" in cpuinfo.read_text()


def command(*words: Any) -> None:
    """Print a command as one would type it, and run it."""
    typed = [str(word) for word in words]
    print(f"\n$ fastreid-vi {shlex.join(typed)}", flush=True)
    subprocess.run([sys.executable, "-m", "fastreid_vi", *typed], check=True)


def read_test(run: Path) -> dict[str, Any]:
    """What `fastreid-vi eval` found."""
    test: dict[str, Any] = json.loads((run / "result.json").read_text())["test"]
    return test


def known(out: Path, method: str) -> bool:
    """Whether results.json has the row of a method, and its run is there to be shown."""
    rows = json.loads((out / "results.json").read_text())
    return method in rows and (out / method / "result.json").is_file()


def add_row(path: Path, method: str, test: dict[str, Any]) -> None:
    """Add a method to results.json, or replace its row: fractions; of chance the rank-1 alone."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    settings = test["settings"]
    found["chance"] = {name: s["chance"]["R1"] for name, s in settings.items()}
    found[method] = {
        name: {metric: s["mean"][metric] for metric in METRICS} for name, s in settings.items()
    }
    write(path, {name: found[name] for name in ("chance", *SPECIAL) if name in found})


def table(tests: dict[str, Any]) -> str:
    """All methods and chance side by side, percent."""
    columns = [*tests, "chance"]
    first = next(iter(tests.values()))
    lines = [f"{'%, mean ± std of ten trials':<29}" + "".join(f"{name:>16}" for name in columns)]
    for setting in first["settings"]:
        mode, shots = setting.split("/")
        for metric in METRICS:
            label = f"{mode}-search, {shots} shot{'' if shots == '1' else 's'}, {metric}"
            found = [test["settings"][setting] for test in tests.values()]
            cells = [f"{100 * s['mean'][metric]:.1f} ± {100 * s['std'][metric]:.1f}" for s in found]
            cells.append(f"{100 * found[0]['chance'][metric]:.1f}")
            lines.append(f"{label:<29}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def write(path: Path, values: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(values, indent=2) + "\n")
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
