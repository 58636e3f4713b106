"""How far R1, mAP and mINP would move with other queries: percentile intervals by resampling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from fastreid_vi.evaluation.arrays import Double, Int, at_least_one, integers
from fastreid_vi.evaluation.protocols import Evaluation
from fastreid_vi.evaluation.ranking import PerQuery, RankMetrics

NAMES: Final = ("R1", "mAP", "mINP")
# Bytes of the table of draws in memory at one time.
BLOCK_BYTES: Final = 2**24


class Interval(NamedTuple):
    """Limits, and the figure of the queries as they are."""

    low: float
    estimate: float
    high: float


class Intervals(NamedTuple):
    """Fractions in [0, 1]."""

    R1: Interval
    mAP: Interval
    mINP: Interval


def bootstrap_interval(
    results: Evaluation | RankMetrics | Sequence[RankMetrics],
    *,
    identities: Any = None,
    level: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
    same_queries: bool = True,
) -> Intervals:
    """Percentile bootstrap intervals of R1, mAP and mINP over queries.

    A sample draws as many queries as there are, with replacement. With w_i the times query i was
    drawn and V_t the valid queries of trial t, its figure is what the protocol reports, the mean
    over trials of

        sum_{i in V_t} w_i x_ti / sum_{i in V_t} w_i,    x: first match at position 1, AP or INP

    and the limits are the (1 - level) / 2 and (1 + level) / 2 quantiles over the samples, linearly
    interpolated. Queries that are valid in no trial are not drawn, so they change nothing; a trial
    that a sample leaves without a valid query does not enter the sample's mean.

    The interval answers for the choice of query images only: galleries and the trained model stay.
    Queries of one person are not independent; with `identities` whole persons are drawn, each with
    all queries, which gives the wider and more honest interval.

    Args:
        results: of `evaluate_*` or `rank_metrics` with `per_query=True`, or the trials of one.
        identities: [Q] identities of the queries, to draw persons instead of single queries; with
            `same_queries=False` one such array per trial.
        level: share of the samples between the limits, above 0 and below 1.
        samples: how many.
        seed: of the draws; equal seeds give equal bits on every machine and thread count.
        same_queries: the trials rank the same queries (SYSU-MM01, LLCM), so that a sample draws
            once for all of them. False draws for each trial by itself: RegDB's ten splits.
    Returns:
        `Intervals(R1, mAP, mINP)`, each `Interval(low, estimate, high)`.
    Raises:
        TypeError, ValueError: results without `per_query`, trials of different queries, or the
            argument that does not fit, by name.
    Spec: evaluation, 1 and 3.3.

    >>> from fastreid_vi.evaluation import rank_metrics
    >>> found = rank_metrics([[0, 1], [0, 1]], [7, 8], [7, 8], protocol="regdb", per_query=True)
    >>> bootstrap_interval(found).R1
    Interval(low=0.0, estimate=0.5, high=1.0)
    """
    at_least_one("samples", samples)
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed: expected a whole number >= 0, got {seed!r}")
    if not isinstance(level, float | int | np.floating):
        raise TypeError(f"level: expected a number, got {type(level).__name__}")
    if not 0 < level < 1:
        raise ValueError(f"level: expected more than 0 and less than 1, got {level}")
    trials = _trials(results)
    groups = _groups(trials, identities, same_queries)
    means = np.zeros((samples, len(NAMES)))
    entered = np.zeros((samples, 1))
    for stream, table in enumerate(groups):
        first = 0
        for weights in _draws(len(table), samples, seed, stream):
            sums = weights @ table  # exact, see _table
            block = slice(first, first + len(weights))
            for trial in np.split(sums, sums.shape[1] // (1 + len(NAMES)), axis=1):
                count = trial[:, :1]
                means[block] += np.divide(
                    trial[:, 1:], count, out=np.zeros_like(trial[:, 1:]), where=count > 0
                )
                entered[block] += count > 0
            first = block.stop
    means /= entered
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    figures = np.array([(trial.cmc[0], trial.mAP, trial.mINP) for trial in trials])
    estimates = [float(column.mean()) for column in figures.T]
    return Intervals(*map(Interval, low.tolist(), estimates, high.tolist()))


def _trials(results: Evaluation | RankMetrics | Sequence[RankMetrics]) -> list[RankMetrics]:
    if isinstance(results, RankMetrics):
        return [results]
    if isinstance(results, Evaluation):
        return results.trials
    if isinstance(results, list | tuple):
        return [*results]
    raise TypeError(f"results: expected an Evaluation or RankMetrics, got {type(results).__name__}")


def _groups(trials: list[RankMetrics], identities: Any, same_queries: bool) -> list[Double]:
    """Tables of the trials that share their draws: of all, or of each by itself."""
    if not trials:
        raise ValueError("results: expected one trial at least, got none")
    details = [_detail(trial, t) for t, trial in enumerate(trials)]
    if same_queries:
        count = len(details[0].AP)
        for t, detail in enumerate(details):
            if len(detail.AP) != count:
                raise ValueError(
                    f"results: trial {t} has {len(detail.AP)} queries, trial 0 has {count}; trials "
                    "of different queries need same_queries=False"
                )
        names = None if identities is None else integers("identities", identities, count)
        return [_group(details, names)]
    if identities is not None and len(identities) != len(trials):
        raise ValueError(
            f"identities: expected one array for each of {len(trials)} trials, got "
            f"{len(identities)}"
        )
    return [
        _group(
            [detail],
            None
            if identities is None
            else integers(f"identities[{t}]", identities[t], len(detail.AP)),
        )
        for t, detail in enumerate(details)
    ]


def _detail(trial: RankMetrics, index: int) -> PerQuery:
    if not isinstance(trial, RankMetrics):
        raise TypeError(f"results: expected RankMetrics, got {type(trial).__name__}")
    if trial.per_query is None:
        raise ValueError(f"results: trial {index} lacks per_query; evaluate with per_query=True")
    return trial.per_query


def _group(details: list[PerQuery], identities: Int | None) -> Double:
    """What each unit brings: [units, trials x (valid, R1, AP, INP)], sums over its queries."""
    valid = np.stack([detail.num_pos > 0 for detail in details], axis=1)  # [Q, T]
    drawn = np.flatnonzero(valid.any(axis=1))
    if not len(drawn):
        raise ValueError(f"results: no valid query among {len(valid)}")
    columns = []
    for t, detail in enumerate(details):
        columns += [valid[:, t], detail.first_image == 1, detail.AP, detail.INP]
    table = np.stack(columns, axis=1).astype(np.float64)[drawn]
    table[np.isnan(table)] = 0  # of invalid queries
    names = np.arange(len(drawn)) if identities is None else identities[drawn]
    _, unit, size = np.unique(names, return_inverse=True, return_counts=True)
    # Whole multiples of a power of two: no sum of drawn units needs more than 53 bits, so sums are
    # exact in any order, and no library or number of threads changes a bit.
    bits = 52 - int(len(size) * size.max()).bit_length()
    np.rint(np.ldexp(table, bits), out=table)
    table = np.stack(
        [np.bincount(unit, weights=column, minlength=len(size)) for column in table.T], axis=1
    )
    return np.asarray(np.ldexp(table, -bits))


def _draws(units: int, samples: int, seed: int, stream: int) -> Iterator[Double]:
    """How often each sample draws each unit, [block, units], `samples` rows in all."""
    # Raw bits: NumPy promises never to change them, unlike what its generators make of them.
    bits = np.random.PCG64(np.random.SeedSequence([seed, stream]))
    block = max(1, BLOCK_BYTES // (8 * units))
    for begin in range(0, samples, block):
        rows = min(block, samples - begin)
        raw = np.asarray(bits.random_raw(rows * units), np.uint64).reshape(rows, units)
        chosen = ((raw >> np.uint64(11)) * 2.0**-53 * units).astype(np.int64)
        chosen += np.arange(rows)[:, None] * units
        counts = np.bincount(chosen.ravel(), minlength=rows * units)
        yield counts.reshape(rows, units).astype(np.float64)
