"""The command line: one verb per function; parses, calls, prints, exits.

Nothing heavy is imported until a verb runs, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastreid_vi._console import Console, Quiet, one_line, table, warnings_shown
from fastreid_vi._flags import UsageError, pack_flags, published, take_name, with_flags
from fastreid_vi._parsers import PROGRAM, build_parser
from fastreid_vi._verbs import embed, evaluate, rerank, search

if TYPE_CHECKING:
    from fastreid_vi.config import Recipe

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

# What bad input raises; anything else is a fault of ours, and the line says of which type.
EXPECTED = (UsageError, ValueError, OSError, ImportError)

Verb = Callable[[argparse.Namespace, Console], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments without the program's name; those of the process by default.
    Returns:
        0 done; 1 failed, with one line on standard error that says why; 2 wrong usage; 130 Ctrl-C.
    """
    args, rest = build_parser().parse_known_args(argv)
    if rest and args.verb not in ("train", "data pack"):
        args.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    console = Console(args.json)
    try:
        verb = VERBS[args.verb]
        with warnings_shown(console, PROGRAM):
            return verb(args, console)
    except UsageError as error:
        return _explain(error, args, console, USAGE)
    except KeyboardInterrupt:
        console.note(f"{PROGRAM}: interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        return _explain(error, args, console, getattr(error, "exit_code", FAILED))


def data_synth(args: argparse.Namespace, console: Console) -> int:
    """Draw a stand-in data set."""
    from fastreid_vi.data import synthesize

    with console.progress("drawing") as show:
        synthesize(
            args.root,
            layout=args.layout,
            train_ids=args.train_ids,
            val_ids=args.val_ids,
            test_ids=args.test_ids,
            seed=args.seed,
            height=args.height,
            width=args.width,
            images=tuple(args.images) if args.images else None,
            train_images=tuple(args.train_images) if args.train_images else None,
            workers=args.workers,
            overwrite=args.overwrite,
            progress=show,
        )
    images = sum(path.suffix in (".bmp", ".jpg") for path in args.root.rglob("*"))
    console.say(f"{args.root}: {images} images, seed {args.seed}")
    console.say(f"next: {PROGRAM} data check {args.root}")
    console.result({"root": str(args.root), "images": images, "seed": args.seed})
    return OK


def data_check(args: argparse.Namespace, console: Console) -> int:
    """Hold a folder against the known counts."""
    from fastreid_vi.data.check import check

    with console.progress("reading") as show:
        report = check(
            args.root,
            layout=args.layout,
            against=args.against,
            decode=not args.no_decode,
            progress=show,
        )
    header = ["images", *report.columns, "identities"]
    rows = [
        [split, *map(str, report.images[split]), str(report.identities[split])]
        for split in report.images
    ]
    console.say(table(header, rows))
    count = len(report.findings)
    shown = report.findings if args.all else report.findings[:1]
    for finding in shown:
        console.say(f"{report.root}/{finding.where}: {finding.problem}")
    if count > len(shown):
        console.say(f"and {count - len(shown)} more, shown with --all")
    against = "the official counts" if report.official else "itself (not the official lists)"
    verdict = "good" if report.ok else f"{count} finding{'s' if count > 1 else ''}"
    console.say(
        f"{report.root}: checked against {against}, {report.decoded} images read: {verdict}"
    )
    console.result(report.to_dict())
    return OK if report.ok else FAILED


def data_pack(args: argparse.Namespace, console: Console) -> int:
    """Decode and resize once, or verify what that left."""
    from fastreid_vi import _pack

    return FAILED if not _pack.run(args, console) else OK


def train(args: argparse.Namespace, console: Console) -> int:
    """Train a method by a recipe."""
    recipe, root, run_dir = _training(args)
    from fastreid_vi import methods
    from fastreid_vi import train as training
    from fastreid_vi._evaluate import open_dataset

    dataset = open_dataset(recipe, root)
    split = training.training_split(dataset, recipe)
    training.seed_everything(recipe.run.seed)
    method = methods.from_recipe(recipe, split.num_ids)
    resume = f"{_started_as()} train --resume --run-dir {shlex.quote(str(run_dir))}"
    if training.rank() > 0:
        console = Quiet(console.machine)
    console.note(
        f"{recipe.method} on {root}: {len(split.train)} training images of {split.num_ids} "
        f"identities, {recipe.schedule.epochs} epochs; after an interruption: {resume}"
    )
    result = training.train(
        method,
        recipe,
        dataset,
        run_dir,
        resume=args.resume,
        device=args.device,
        eval_on=args.eval_on,
        resume_hint=resume,
        forecast=True,
    )
    console.say(f"checkpoint: {result.checkpoint}")
    console.say(f"next: {PROGRAM} eval {shlex.quote(str(run_dir))}")
    console.result(
        {
            "run_dir": str(result.run_dir),
            "checkpoint": str(result.checkpoint),
            "epochs": result.epochs,
            "steps": result.steps,
            "best": result.best,
        }
    )
    return OK


def report(args: argparse.Namespace, console: Console) -> int:
    """Write the offline page."""
    from fastreid_vi import _reported
    from fastreid_vi.report import build_report

    names = [run.resolve().name for run in args.run]
    if len(set(names)) < len(names):
        names = [str(run) for run in args.run]
    out = args.out or (args.run[0] if len(args.run) == 1 else args.run[0].parent) / "report.html"
    runs = []
    for run, name in zip(args.run, names, strict=True):
        console.note(f"reading {run}")
        runs.append(_reported.reported_run(run, name, root=args.data_root))
    out.parent.mkdir(parents=True, exist_ok=True)
    page = build_report(runs, out, title=args.title, queries=args.queries, seed=args.seed)
    size = page.stat().st_size
    console.say(f"{page}: {size / 2**20:.1f} MiB, opens without a network")
    console.result({"path": str(page), "bytes": size, "runs": names})
    return OK


def convert(args: argparse.Namespace, console: Console) -> int:
    """Turn official checkpoints into ours and back."""
    from fastreid_vi import _convert

    options = ("method", "to", "num_ids", "base", "step", "recipe", "overwrite")
    try:
        report = _convert.convert(
            args.source, args.out, **{name: getattr(args, name) for name in options}
        )
    except _convert.KeysError as error:
        console.say(error.listing())
        raise
    console.say(_convert.text(report))
    console.result(report.to_dict())
    return OK


def certify(args: argparse.Namespace, console: Console) -> int:
    """Hold every op and method against the golden vectors."""
    from fastreid_vi import _certify

    with console.progress("certifying") as show:
        result = _certify.run(
            golden=args.golden,
            only=args.only or (),
            backends=args.backend or (),
            device=args.device,
            out=args.out,
            progress=show,
        )
    console.say(_certify.text(result))
    if args.out is not None:
        console.say(f"kept in {args.out}")
    console.result(result)
    return OK if result["ok"] else FAILED


def doctor(args: argparse.Namespace, console: Console) -> int:
    """Say what is built, what runs where, and why not."""
    from fastreid_vi import _doctor

    found = _doctor.inspect()
    console.say(_doctor.text(found))
    if args.bench:
        from fastreid_vi import _selfcheck

        bench = found["bench"] = _selfcheck.run()
        found["ok"] = found["ok"] and bench["ok"]
        console.say(f"\n{_selfcheck.text(bench)}")
    console.result(found)
    return OK if found["ok"] else FAILED


def _training(args: argparse.Namespace) -> tuple[Recipe, Path, Path]:
    """Recipe, data root and run folder of `train`; everything that can be wrong without torch."""
    name, flags = take_name(args.rest)
    asked = {"-h", "--help"} & set(flags)
    if asked:
        args.parser.print_help()
    if name is not None and args.recipe is not None:
        raise UsageError("give the name of a recipe or --recipe FILE, not both")
    file, root = args.recipe, args.data_root
    if name is None and file is None:
        if asked:
            raise SystemExit(OK)
        if not args.resume or args.run_dir is None:
            raise UsageError(f"which recipe? {PROGRAM} train --help lists them")
        file = args.run_dir
    if file is not None:
        from fastreid_vi._evaluate import read_record

        record = read_record(file)
        recipe, root = record.recipe, root or record.root
    else:
        try:
            recipe = published(name or "")
        except ValueError as error:
            raise UsageError(one_line(error)) from error
    if root is None and not asked:
        raise UsageError("where is the data set? --data-root DIR")
    flags += ["--model.weights", args.weights] if args.weights is not None else []
    flags += ["--data.skip-broken"] if args.skip_broken else []
    flags += ["--run.skip-nonfinite"] if args.skip_nonfinite else []
    flags += pack_flags(args.pack)
    flags += ["--run.bn", args.bn] if args.bn is not None else []
    recipe = with_flags(recipe, flags, f"{PROGRAM} train RECIPE", args.debug)
    return recipe, root, args.run_dir or Path("runs") / (name or recipe.method)


def _started_as() -> str:
    """The command that starts as many processes as this one has beside it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return PROGRAM
    return f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', '1')} -m fastreid_vi"


def _explain(error: Exception, args: argparse.Namespace, console: Console, code: int) -> int:
    """One line about an error, and the traceback with --debug."""
    if args.debug:
        traceback.print_exception(error)
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    elif isinstance(error, EXPECTED) or hasattr(error, "exit_code"):
        text = one_line(error)
    else:
        text = f"{type(error).__name__}: {one_line(error)} (--debug shows where)"
    console.note(f"{PROGRAM}: error: {text}")
    console.result({"error": text})
    return code


VERBS: dict[str, Verb] = {
    "data synth": data_synth,
    "data check": data_check,
    "data pack": data_pack,
    "train": train,
    "eval": evaluate,
    "embed": embed,
    "search": search,
    "rerank": rerank,
    "report": report,
    "certify": certify,
    "convert": convert,
    "doctor": doctor,
}
"""What runs for each verb of `_parsers`."""
