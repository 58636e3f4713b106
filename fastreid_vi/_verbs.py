"""The verbs about embeddings: `eval`, `embed`, `search`, `rerank`. Imports wait until one runs."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from fastreid_vi._console import Console
from fastreid_vi._parsers import PROGRAM

OK = 0


def evaluate(args: argparse.Namespace, console: Console) -> int:
    """Print the protocol's table of every run, and their mean."""
    from fastreid_vi import _averages

    if len(args.run) > 1 and args.out is not None:
        args.parser.error("--out: one folder cannot keep the results of several runs")
    results = [
        _evaluate_one(argparse.Namespace(**{**vars(args), "run": run}), console) for run in args.run
    ]
    if len(results) == 1:
        console.result(results[0])
        return OK
    mean = _averages.averaged(results)
    console.say(_averages.text(mean))
    console.result({"mean": mean, "runs": results})
    return OK


def _evaluate_one(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    from fastreid_vi import _rerank, _score
    from fastreid_vi.evaluation.embeddings import find_sides

    if find_sides(args.run):
        query, gallery = _score.open_saved(args.run, data_root=args.data_root, trial=args.trial)
        about, folder = _score.about(args.run, gallery), args.out
    else:
        from fastreid_vi._evaluate import embed_run

        query, gallery, about, folder = embed_run(args, console)
    reranking = _rerank.choose(args.rerank, query, gallery, changes=_rerank.changes_of(args))
    result = {**_score.score(query, gallery), **about}
    console.say(_score.heading(result))
    console.say(_score.table_text(result))
    if folder is not None:
        _score.keep(folder, query, gallery, result)
    if reranking is not None:
        console.note(f"re-ranking takes at most {_rerank.size_text(reranking.memory)} of memory")
        with console.waiting("re-ranking galleries") as show:
            result = _score.add_reranked(result, query, gallery, reranking, show)
        console.say(reranking.text())
        console.say(_score.reranked_text(result))
        if folder is not None:
            _score.keep_result(folder, result)
    if folder is not None:
        console.say(f"kept in {folder}: result.json, embeddings/")
    return result


def embed(args: argparse.Namespace, console: Console) -> int:
    """Turn images into embeddings."""
    from fastreid_vi import _embed

    names = ("out", "recipe", "layout", "modality", "trial", "spectra", "batch_size", "device")
    options = {name: getattr(args, name) for name in (*names, "overwrite")}
    made = _embed.embed(args.run, args.folder, **options, console=console)
    console.say(_embed.text(made))
    words = ["search", "QUERY"] if made["layout"] == "folder" else ["eval"]
    console.say(f"next: {PROGRAM} {' '.join(words)} {shlex.quote(str(args.out))}")
    console.result(made)
    return OK


def search(args: argparse.Namespace, console: Console) -> int:
    """Find the nearest images of a saved gallery."""
    from fastreid_vi import _neighbors, _search

    names = ("k", "metric", "run", "recipe", "modality", "device", "latency", "out")
    options = {name: getattr(args, name) for name in names}
    found, about = _search.search(args.query, args.gallery, **options, console=console)
    console.say(_neighbors.text(found, args.metric))
    console.say(_search.text(about))
    if args.out is not None:
        console.say(f"kept in {args.out}")
    if console.machine:
        console.result({**about, "queries": _neighbors.listing(found)})
    return OK


def rerank(args: argparse.Namespace, console: Console) -> int:
    """Write re-ranked distances of saved embeddings."""
    from fastreid_vi import _rerank

    about, name = _rerank.rerank(
        args.embeddings,
        asked=args.rerank,
        changes=_rerank.changes_of(args),
        direction=args.direction,
        setting=args.setting,
        trial=args.gallery_trial,
        k=args.k,
        out=args.out,
        ranking=args.ranking,
        console=console,
    )
    console.say(name)
    sizes = f"{about['query_images']} queries x {about['gallery_images']} images"
    kept = " and ".join(str(about[name]) for name in ("out", "ranking") if name in about)
    console.say(f"{sizes} in {about['seconds']:.1f} s; kept in {kept}")
    console.result(about)
    return OK
