"""From nothing to a result table: draw a data set, train two methods, evaluate, report.

`make demo` runs this. Every step is a `fastreid-vi` command, printed before it runs; paste one to
change it. A second run keeps the data set and trains anew.
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

METHODS = ("baseline", "mpanet")
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder (runs/demo)")
    return demo(parser.parse_args().out)


def demo(out: Path) -> int:
    """Run every step below `out`; returns the exit code."""
    start = time.monotonic()
    precision = "bf16" if has_bfloat16() else "fp32"
    try:
        draw(out / "data")
        for method in METHODS:
            shutil.rmtree(out / method, ignore_errors=True)
            flags = [*TRAIN, "--run.precision", precision, *EPOCHS[precision]]
            root = ["--data-root", out / "data", "--run-dir", out / method]
            command("train", f"{method}-sysu", *root, *flags)
            command("eval", out / method)
        title = "fastreid-vi demo: baseline and MPANet on a drawn data set"
        runs = [out / method for method in METHODS]
        command("report", *runs, "--out", out / "report.html", "--title", title)
    except subprocess.CalledProcessError as error:
        return int(error.returncode)
    except KeyboardInterrupt:
        return 130
    tests = {
        method: json.loads((out / method / "result.json").read_text())["test"] for method in METHODS
    }
    write(out / "results.json", results(tests))
    print(f"\n{table(tests)}\n")
    print(f"{out / 'report.html'} shows curves, rank lists and pattern maps;")
    print(f"{out / 'results.json'} has the numbers. {(time.monotonic() - start) / 60:.1f} minutes.")
    return 0


def draw(root: Path) -> None:
    """Draw the data set, unless it is there already, made the same way."""
    record = root / "exp" / "synthetic.json"
    if record.is_file():
        made = json.loads(record.read_text())
        if all(made.get(name) == value for name, value in SYNTH.items()):
            print(f"{root}: kept from an earlier run", flush=True)
            return
    flags: list[Any] = ["--overwrite"]
    for name, value in SYNTH.items():
        flags += [f"--{name.replace('_', '-')}", *(value if isinstance(value, list) else [value])]
    command("data", "synth", root, *flags)


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


def results(tests: dict[str, Any]) -> dict[str, Any]:
    """What results.json holds: fractions; of chance the rank-1 alone."""
    settings = tests[METHODS[0]]["settings"]
    found: dict[str, Any] = {"chance": {name: s["chance"]["R1"] for name, s in settings.items()}}
    for method, test in tests.items():
        found[method] = {
            name: {metric: s["mean"][metric] for metric in METRICS}
            for name, s in test["settings"].items()
        }
    return found


def table(tests: dict[str, Any]) -> str:
    """Both methods and chance side by side, percent."""
    columns = [*METHODS, "chance"]
    lines = [f"{'%, mean ± std of ten trials':<29}" + "".join(f"{name:>16}" for name in columns)]
    for setting in tests[METHODS[0]]["settings"]:
        mode, shots = setting.split("/")
        for metric in METRICS:
            label = f"{mode}-search, {shots} shot{'' if shots == '1' else 's'}, {metric}"
            found = [tests[method]["settings"][setting] for method in METHODS]
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
