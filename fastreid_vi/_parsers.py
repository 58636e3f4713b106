"""The command line's verbs and arguments; `cli` runs them.

A verb is a line in `build_parser`, a function that adds its arguments, and a line in `cli.VERBS`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastreid_vi.version import __version__

PROGRAM = "fastreid-vi"

LAYOUTS = ["sysu", "regdb", "llcm"]

EVAL_ON = (
    "identities that choose the best epoch: held-out training ones, or those of the test, which "
    "makes the table look better than it is"
)

NORM = "batch statistics of each process alone or of all together, under torchrun (local)"

PACK = 'take images from this pack ("agw": AGW\'s arrays in DIR; "none": read the files)'

EVALUATED = "run, checkpoint or weights file, or saved embeddings; of several, the mean as well"

RERANK = "auto: as the method's authors do on this data set, k-reciprocal for the others"

EMBED_LAYOUT = "folder: every image below FOLDER; else the test images (auto: by its folders)"

SPECTRA = "also single channels of visible images, for mser (for methods that are tested so)"

IMAGES = "fewest and most images of a person in a camera (2 14; regdb 10 10, llcm 2 5)"


def build_parser() -> argparse.ArgumentParser:
    """Every verb with its arguments; `args.verb` names the one that was chosen."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Visible-infrared person re-identification: data, training, evaluation.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    data = verbs.add_parser("data", help="draw a stand-in data set; check a folder; pack it")
    kinds = data.add_subparsers(title="verbs", metavar="VERB", required=True)
    _add_synth(_verb(kinds, "data synth", "draw a stand-in data set of image files"))
    _add_check(_verb(kinds, "data check", "hold a folder against the known counts"))
    _add_pack(kinds)
    _add_train(verbs)
    _add_eval(_verb(verbs, "eval", "print the official protocol's table of a run or embeddings"))
    _add_embed(_verb(verbs, "embed", "turn images into embeddings"))
    _add_search(_verb(verbs, "search", "find the nearest images of a saved gallery"))
    _add_rerank(_verb(verbs, "rerank", "write re-ranked distances of saved embeddings"))
    _add_report(_verb(verbs, "report", "write one offline HTML page about runs"))
    _add_certify(_verb(verbs, "certify", "hold every op and method against the golden vectors"))
    _add_convert(_verb(verbs, "convert", "turn official checkpoints into ours and back"))
    _add_doctor(_verb(verbs, "doctor", "say what is built, what runs where, and why not"))
    return parser


def _verb(verbs: Any, name: str, about: str, **options: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name.split()[-1],
        help=about,
        description=f"{about[0].upper()}{about[1:]}.",
        allow_abbrev=False,
        **options,
    )
    parser.add_argument("--json", action="store_true", help="JSON on standard output")
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    parser.set_defaults(verb=name, parser=parser)
    return parser


def _add_synth(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("root", type=Path, metavar="DIR", help="folder to create")
    add("--layout", choices=LAYOUTS, default="sysu", help="whose folders and files (sysu)")
    add("--train-ids", type=_count, metavar="N", help="training identities (60)")
    add("--val-ids", type=_count, metavar="N", help="identities of the val list, sysu only (12)")
    add("--test-ids", type=_count, metavar="N", help="test identities (30; regdb 60)")
    add("--seed", type=int, default=0, help="same seed, same files (0)")
    add("--height", type=_count, default=128, metavar="PX", help="image height (128)")
    add("--width", type=_count, default=64, metavar="PX", help="image width (64)")
    add("--images", type=_count, nargs=2, metavar=("MIN", "MAX"), help=IMAGES)
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
    add("root", type=Path, metavar="DIR", help="data set laid out as SYSU-MM01, RegDB or LLCM")
    add("--layout", choices=["auto", *LAYOUTS], default="auto", help="whose (auto: by the folders)")
    add(
        "--against",
        choices=["auto", "official", "itself"],
        default="auto",
        help="the real data set's counts, or only whether its parts agree (auto: by its lists)",
    )
    add("--no-decode", action="store_true", help="do not read the images")
    add("--all", action="store_true", help="show every finding, not only the first")


def _add_pack(kinds: Any) -> None:
    parser = _verb(
        kinds,
        "data pack",
        "decode and resize the images of a data set once, for fast loading",
        usage=f"{PROGRAM} data pack DIR --out PACK --recipe R [options] [recipe flags]\n"
        f"       {PROGRAM} data pack --check PACK",
    )
    add = parser.add_argument
    add("root", type=Path, nargs="?", metavar="DIR", help="data set")
    add("--out", type=Path, metavar="PACK", help="folder to create; run again, it continues")
    add("--recipe", metavar="R", help="recipe name or run.json: size, filter, splits, labels")
    add("--workers", type=_count, metavar="N", help="decoding threads (one per core)")
    add("--shard-mib", type=_count, default=1024, metavar="N", help="largest file, MiB (1024)")
    add("--skip-broken", action="store_true", help="leave unreadable images out, with a count")
    add("--overwrite", action="store_true", help="replace another pack")
    add("--check", type=Path, metavar="PACK", help="compare every image with its checksum")


def _add_train(verbs: Any) -> None:
    parser = _verb(
        verbs,
        "train",
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
    add("--skip-nonfinite", action="store_true", help="leave a step out whose loss is not finite")
    add("--pack", metavar="PACK", help=PACK)
    add("--bn", choices=["local", "sync"], help=NORM)
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
    add("run", type=Path, nargs="+", metavar="RUN", help=EVALUATED)
    add("--data-root", type=Path, metavar="DIR", help="data set, if not the one of the run")
    add("--recipe", metavar="R", help="run.json or recipe name, for weights outside a run folder")
    add("--trial", type=_count, metavar="N", help="trial of RegDB, 1 to 10: that of the run")
    add("--pack", metavar="PACK", help=f"{PACK}: that of the run")
    add("--out", type=Path, metavar="DIR", help="where result and embeddings go (the run folder)")
    add("--device", metavar="D", help="cpu, cuda, cuda:1; by default CUDA where there is one")
    _add_reranking(parser, "auto", "none")


def _add_reranking(parser: argparse.ArgumentParser, default: str, *others: str) -> None:
    add = parser.add_argument
    add("--rerank", choices=["auto", *others, "k-reciprocal", "mser"], default=default, help=RERANK)
    add("--k1", type=_count, metavar="N", help="length of the neighbour lists")
    add("--k2", type=_count, metavar="N", help="neighbours in query expansion")
    add("--weight", type=_share, metavar="W", help="share of the plain distance, 0 to 1")
    add("--neighbors", choices=["all", "queries"], help="who may be a neighbour")


def _add_embed(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run folder, checkpoint folder or weights file")
    add("folder", type=Path, metavar="FOLDER", help="images at any depth, or an official layout")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the embeddings")
    add("--recipe", metavar="R", help="run.json or recipe name, for weights outside a run folder")
    add("--layout", choices=["auto", "folder", *LAYOUTS], default="auto", help=EMBED_LAYOUT)
    add("--modality", choices=["visible", "infrared"], help="of the images of a plain folder")
    add("--trial", type=_count, metavar="N", help="trial of RegDB, 1 to 10: that of the run")
    add("--spectra", action=argparse.BooleanOptionalAction, help=SPECTRA)
    add("--batch-size", type=_count, metavar="N", help="images in a batch (as in training)")
    add("--device", metavar="D", help="cpu, cuda, cuda:1; by default CUDA where there is one")
    add("--overwrite", action="store_true", help="replace the embeddings in DIR")


def _add_search(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("query", type=Path, metavar="QUERY", help="saved embeddings, a folder of images, an image")
    add("gallery", type=Path, metavar="GALLERY", help="saved embeddings")
    add("-k", type=_count, default=10, metavar="K", help="neighbours of a query (10)")
    add("--metric", choices=["cosine", "inner", "euclidean"], default="cosine", help="(cosine)")
    add("--run", type=Path, metavar="RUN", help="network for images (the gallery's own)")
    add("--recipe", metavar="R", help="run.json or recipe name, for weights outside a run folder")
    add("--modality", choices=["visible", "infrared"], help="of images in plain folders")
    add("--device", metavar="D", help="cpu, cuda, cuda:1; by default CUDA where there is one")
    add("--latency", action="store_true", help="also time single queries")
    add("--out", type=Path, metavar="FILE", help="keep all: .json, .csv or .safetensors")


def _add_rerank(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("embeddings", type=Path, metavar="DIR", help="saved embeddings of queries and gallery")
    add("--out", type=Path, metavar="FILE", help="distances: .npy, or .safetensors with identities")
    add("--ranking", type=Path, metavar="FILE", help="nearest images: .json, .csv, .safetensors")
    add("-k", type=_count, default=20, metavar="K", help="images of a query in --ranking (20)")
    add("--direction", choices=["ir_to_vis", "vis_to_ir"], default="ir_to_vis", help="(ir_to_vis)")
    add(
        "--setting", metavar="S", help="all/1, all/10, indoor/1, indoor/10; drawn (LLCM): a gallery"
    )
    add("--gallery-trial", type=_count, default=1, metavar="N", help="which of its ten (1)")
    _add_reranking(parser, "auto")


def _add_report(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", type=Path, nargs="+", metavar="RUN", help="evaluated run folders, side by side")
    add("--out", type=Path, metavar="FILE", help="the page (RUN/report.html, or beside the runs)")
    add("--data-root", type=Path, metavar="DIR", help="data set, if not the one of the runs")
    add("--title", default="fastreid-vi report", help="heading of the page")
    add("--queries", type=_count, default=3, metavar="N", help="rank lists of each kind (3)")
    add("--seed", type=int, default=0, help="breaks ties among queries (0)")


def _add_convert(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", type=Path, metavar="IN", help="official file or folder; ours: weights or a run")
    add("out", type=Path, metavar="OUT", help="what to write; a folder for AlignGAN's eight files")
    add("--method", metavar="M", help="whose checkpoint it is (found out from its keys)")
    add("--to", choices=["ours", "official"], help="the form to write (the other one)")
    add("--num-ids", type=_count, metavar="N", help="training identities it must have")
    add("--base", type=Path, metavar="FILE", help="official file for keys that we do not have")
    add("--step", type=_number, metavar="N", help="AlignGAN: step of its files (the newest)")
    add("--recipe", metavar="R", help="run.json or recipe name the shapes must fit (the method's)")
    add("--overwrite", action="store_true", help="replace OUT")


def _add_certify(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--golden", type=Path, metavar="DIR", help="golden vectors (tests/golden of a checkout)")
    add("--out", type=Path, metavar="FILE", help="JSON to write")
    add("--only", nargs="+", metavar="NAME", help="ops, methods or parts of their names")
    add("--backend", nargs="+", metavar="B", help="rooms to try (all that are built)")
    add("--device", metavar="D", help="cpu or cuda (both where there is a GPU)")


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    about = "also check every op and time it beside plain PyTorch, about ten seconds"
    parser.add_argument("--bench", action="store_true", help=about)


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")
    return value
