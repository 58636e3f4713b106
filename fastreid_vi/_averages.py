"""The mean over several evaluated runs: RegDB's ten trials, or one recipe with several seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastreid_vi import _score
from fastreid_vi.evaluation import average_evaluations


def averaged(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and deviation over runs of what `_score.score` found of each, JSON-ready.

    Raises:
        ScoreError: runs of several methods, protocols or re-rankings.
    """
    first = results[0]
    for name in ("method", "protocol"):
        # RegDB's protocol names the trial: the trials are what is averaged.
        kinds = [str(result[name]).split("-trial-")[0] for result in results]
        if other := next((kind for kind in kinds if kind != kinds[0]), None):
            raise _score.ScoreError(f"a mean over runs: of one {name}, got {kinds[0]} and {other}")
    if any(_procedure(result) != _procedure(first) for result in results):
        raise _score.ScoreError("a mean over runs: re-ranked in one way, got several: --rerank")
    settings = {}
    for setting, found in first["settings"].items():
        parts = [result["settings"][setting] for result in results]
        settings[setting] = {**_mean(parts), "chance": _mean([p["chance"] for p in parts])["mean"]}
        if "reranked" in found:
            settings[setting]["reranked"] = _mean([part["reranked"] for part in parts])
    more = {"rerank": first["rerank"]} if "rerank" in first else {}
    return {
        "method": first["method"],
        "protocol": ", ".join(dict.fromkeys(result["protocol"] for result in results)),
        "trials": len(results),
        "runs": [result["checkpoint"]["path"] for result in results],
        "settings": settings,
        **more,
    }


def text(result: Mapping[str, Any]) -> str:
    """The averaged table for people."""
    lines = [
        f"{result['method']}, mean ± std over {result['trials']} runs, %: {result['protocol']}",
        _score.table_text(dict(result)),
    ]
    if "rerank" in result:
        lines.append(_score.reranked_text(dict(result)))
    return "\n".join(lines)


def _procedure(result: Mapping[str, Any]) -> dict[str, Any]:
    facts = dict(result.get("rerank", {}))
    facts.pop("memory_bytes", None)
    return facts


def _mean(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of evaluations, or of bare metrics, as JSON."""
    whole = [part if "mean" in part else {"mean": part, "std": part} for part in parts]
    found = average_evaluations([_score.evaluation_of(dict(part)) for part in whole])
    return {
        "mean": _score.plain(found.mean),
        "std": _score.plain(found.std),
        "trials": [dict(part["mean"]) for part in whole],
    }
