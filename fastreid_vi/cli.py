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
from typing import TYPE_CHECKING, Any

from fastreid_vi._console import Console, one_line, table, warnings_shown
from fastreid_vi._flags import UsageError, published, take_name, with_flags
from fastreid_vi.version import __version__

if TYPE_CHECKING:
    from fastreid_vi.config import Recipe

PROGRAM = "fastreid-vi"
OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

EVAL_ON = (
    "identities that choose the best epoch: held-out training ones, or those of the test, which "
    "makes the table look better than it is"
)

IMAGES = "fewest and most images of a person in a camera (2 14)"
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
    args, rest = _parser().parse_known_args(argv)
    if rest and args.verb is not train:
        args.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    console = Console(args.json)
    try:
        verb: Verb = args.verb
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
            images=tuple(args.images),
            train_images=tuple(args.train_images) if args.train_images else None,
            workers=args.workers,
            overwrite=args.overwrite,
            progress=show,
        )
    images = sum(1 for _ in args.root.rglob("*.jpg"))
    console.say(f"{args.root}: {images} images, seed {args.seed}")
    console.say(f"next: {PROGRAM} data check {args.root}")
    console.result({"root": str(args.root), "images": images, "seed": args.seed})
    return OK


def data_check(args: argparse.Namespace, console: Console) -> int:
    """Hold a folder against the known counts."""
    from fastreid_vi.data import check_sysu

    with console.progress("reading") as show:
        report = check_sysu(
            args.root, against=args.against, decode=not args.no_decode, progress=show
        )
    header = ["images", *(f"cam{cam}" for cam in range(1, 7)), "identities"]
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
    resume = f"{PROGRAM} train --resume --run-dir {shlex.quote(str(run_dir))}"
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


def evaluate(args: argparse.Namespace, console: Console) -> int:
    """Print the protocol's table."""
    from fastreid_vi import _evaluate

    target = _evaluate.open_target(args.run, recipe=args.recipe, root=args.data_root)
    dataset = _evaluate.open_dataset(target.recipe, target.root)
    query, gallery, checkpoint = _evaluate.embed(
        target, dataset, device=args.device, progress=console.progress
    )
    result = {
        **_evaluate.score(query, gallery, dataset.permutations),
        "method": target.recipe.method,
        "data_root": str(target.root),
        "checkpoint": checkpoint,
    }
    folder = args.out or target.folder
    if folder is not None:
        _evaluate.keep(folder, query, gallery, result)
    console.say(_evaluate.heading(result))
    console.say(_evaluate.table_text(result))
    if folder is not None:
        console.say(f"kept in {folder}: result.json, embeddings/")
    console.result(result)
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


def doctor(args: argparse.Namespace, console: Console) -> int:
    """Say what is built, what runs where, and why not."""
    from fastreid_vi import _doctor

    found = _doctor.inspect()
    console.say(_doctor.text(found))
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
    recipe = with_flags(recipe, flags, f"{PROGRAM} train RECIPE", args.debug)
    return recipe, root, args.run_dir or Path("runs") / (name or recipe.method)


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Visible-infrared person re-identification: data, training, evaluation.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    data = verbs.add_parser("data", help="draw a stand-in data set; check a folder")
    kinds = data.add_subparsers(title="verbs", metavar="VERB", required=True)
    _add_synth(_verb(kinds, "synth", data_synth, "draw a stand-in data set of image files"))
    _add_check(_verb(kinds, "check", data_check, "hold a folder against the known counts"))
    _add_train(verbs)
    _add_eval(_verb(verbs, "eval", evaluate, "print a run's table under the official protocol"))
    _add_report(_verb(verbs, "report", report, "write one offline HTML page about runs"))
    _verb(verbs, "doctor", doctor, "say what is built, what runs where, and why not")
    return parser


def _verb(verbs: Any, name: str, call: Verb, about: str, **options: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=about,
        description=f"{about[0].upper()}{about[1:]}.",
        allow_abbrev=False,
        **options,
    )
    parser.add_argument("--json", action="store_true", help="JSON on standard output")
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    parser.set_defaults(verb=call, parser=parser)
    return parser


def _add_synth(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("root", type=Path, metavar="DIR", help="folder to create")
    add("--layout", choices=["sysu"], default="sysu", help="SYSU-MM01's folders and files")
    add("--train-ids", type=_count, default=60, metavar="N", help="training identities (60)")
    add("--val-ids", type=_count, default=12, metavar="N", help="identities of the val list (12)")
    add("--test-ids", type=_count, default=30, metavar="N", help="test identities (30)")
    add("--seed", type=int, default=0, help="same seed, same files (0)")
    add("--height", type=_count, default=128, metavar="PX", help="image height (128)")
    add("--width", type=_count, default=64, metavar="PX", help="image width (64)")
    add("--images", type=_count, nargs=2, default=(2, 14), metavar=("MIN", "MAX"), help=IMAGES)
    add(
        "--train-images",
        type=_count,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="the same for training identities (as --images)",
    )
    add("--workers", type=_count, metavar="N", help="processes (one per core)")
    add("--overwrite", action="store_true", help="replace an earlier stand-in")


def _add_check(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("root", type=Path, metavar="DIR", help="data set in SYSU-MM01's layout")
    add(
        "--against",
        choices=["auto", "official", "itself"],
        default="auto",
        help="the real data set's counts, or only whether its parts agree (auto: by its lists)",
    )
    add("--no-decode", action="store_true", help="do not read the images")
    add("--all", action="store_true", help="show every finding, not only the first")


def _add_train(verbs: Any) -> None:
    parser = _verb(
        verbs,
        "train",
        train,
        "train a method by a recipe",
        add_help=False,
        usage=f"{PROGRAM} train RECIPE --data-root DIR [--run-dir DIR] [options] [recipe flags]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_recipes(),
    )
    add = parser.add_argument
    add("--data-root", type=Path, metavar="DIR", help="data set")
    add("--run-dir", type=Path, metavar="DIR", help="run folder to create (runs/RECIPE)")
    add("--recipe", type=Path, metavar="FILE", help="repeat the run of this run.json")
    add("--resume", action="store_true", help="continue the run in --run-dir to the same bits")
    add("--weights", metavar="W", help='"imagenet", "none" or a file: short for --model.weights')
    add("--skip-broken", action="store_true", help="leave unreadable images out, with a count")
    add("--eval-on", choices=["validation", "test"], default="validation", help=EVAL_ON)
    add("--device", metavar="D", help="cpu, cuda, cuda:1; by default CUDA where there is one")


def _recipes() -> str:
    from fastreid_vi.methods import RECIPES

    return (
        f"recipes: {', '.join(RECIPES)}\n\n"
        f"{PROGRAM} train RECIPE --help lists the recipe flags, such as\n"
        "--optim.lr 1e-3 --schedule.epochs 10 --model.depth 18 --data.height 288"
    )


def _add_eval(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run folder, checkpoint folder or weights file")
    add("--data-root", type=Path, metavar="DIR", help="data set, if not the one of the run")
    add("--recipe", metavar="R", help="run.json or recipe name, for weights outside a run folder")
    add("--out", type=Path, metavar="DIR", help="where result and embeddings go (the run folder)")
    add("--device", metavar="D", help="cpu, cuda, cuda:1; by default CUDA where there is one")


def _add_report(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", type=Path, nargs="+", metavar="RUN", help="evaluated run folders, side by side")
    add("--out", type=Path, metavar="FILE", help="the page (RUN/report.html, or beside the runs)")
    add("--data-root", type=Path, metavar="DIR", help="data set, if not the one of the runs")
    add("--title", default="fastreid-vi report", help="heading of the page")
    add("--queries", type=_count, default=3, metavar="N", help="rank lists of each kind (3)")
    add("--seed", type=int, default=0, help="breaks ties among queries (0)")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)
