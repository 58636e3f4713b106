"""Bootstrap intervals: against binomial quantiles and a plain loop, coverage, laws, bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from fastreid_vi.evaluation import (
    Evaluation,
    PerQuery,
    RankMetrics,
    bootstrap,
    bootstrap_interval,
    evaluate_sysu,
    rank_metrics,
)
from tests.evaluation.conftest import Data

law = settings(deadline=None, max_examples=30)


def metrics(first: Any, AP: Any = None, INP: Any = None) -> RankMetrics:
    """Queries with the first match at `first`, 0 for an invalid one."""
    first = np.asarray(first)
    valid = first > 0
    inverse = np.where(valid, 1 / np.maximum(first, 1), np.nan)
    AP = inverse if AP is None else np.where(valid, AP, np.nan)
    INP = inverse if INP is None else np.where(valid, INP, np.nan)
    detail = PerQuery(AP, INP, first, first, first, valid.astype(np.int64))
    cmc = np.array([(first[valid] <= k).mean() for k in range(1, 21)])
    return RankMetrics(cmc, AP[valid].mean(), INP[valid].mean(), valid, detail)


def drawn(seed: int, queries: int, invalid: float = 0.0) -> RankMetrics:
    generator = np.random.default_rng(seed)
    first = generator.integers(1, 4, queries)
    first[generator.random(queries) < invalid] = 0
    first[0] = 2
    return metrics(first, generator.random(queries), generator.random(queries))


def plainly(
    trials: list[RankMetrics], units: list[np.ndarray], samples: int, seed: int
) -> np.ndarray:
    """The definition as a loop over samples, units and trials: [samples, 3]."""
    bits = np.random.PCG64(np.random.SeedSequence([seed, 0]))
    figures = []
    for _ in range(samples):
        raw = bits.random_raw(len(units))
        rows = np.concatenate([units[int((int(r) >> 11) * 2.0**-53 * len(units))] for r in raw])
        means = []
        for trial in trials:
            detail = trial.per_query
            assert detail is not None
            kept = rows[trial.valid[rows]]
            if len(kept):
                right = (detail.first_image[kept] == 1).mean()
                means.append([right, detail.AP[kept].mean(), detail.INP[kept].mean()])
        figures.append(np.mean(means, axis=0))
    return np.array(figures)


@law
@given(
    st.integers(0, 1000), st.integers(1, 3), st.integers(2, 12), st.floats(0, 0.6), st.booleans()
)
def test_plain_loop(seed: int, count: int, queries: int, invalid: float, persons: bool) -> None:
    trials = [drawn(seed + t, queries, invalid) for t in range(count)]
    valid = np.flatnonzero(np.any([trial.valid for trial in trials], axis=0))
    ids = np.random.default_rng(seed).integers(-3, 3, queries)
    units = [np.array([i]) for i in valid]
    if persons:
        units = [np.array([i for i in valid if ids[i] == y]) for y in np.unique(ids[valid])]
    expected = plainly(trials, units, 60, seed)
    found = bootstrap_interval(
        trials, identities=ids if persons else None, level=0.8, samples=60, seed=seed
    )
    low, high = np.quantile(expected, [0.1, 0.9], axis=0)
    for name, a, b in zip(found._fields, low, high, strict=True):
        interval = getattr(found, name)
        assert (interval.low, interval.high) == pytest.approx((a, b), abs=1e-9)
    estimates = np.mean([[t.cmc[0], t.mAP, t.mINP] for t in trials], axis=0)
    assert [part.estimate for part in found] == pytest.approx(estimates.tolist(), abs=1e-15)


@pytest.mark.parametrize(("queries", "right"), [(50, 43), (400, 80)])
def test_binomial_quantiles(queries: int, right: int) -> None:
    """The resampled R1 of independent queries is a binomial share."""
    first = np.r_[np.ones(right, int), np.full(queries - right, 3)]
    for level in (0.5, 0.9, 0.99):
        found = bootstrap_interval(metrics(first), level=level, samples=40000).R1
        tails = np.array([(1 - level) / 2, (1 + level) / 2])
        exact = binom.ppf(tails, queries, right / queries) / queries
        assert (found.low, found.high) == pytest.approx(tuple(exact), abs=1.01 / queries)
        assert found.estimate == right / queries


def test_coverage_and_persons() -> None:
    """Queries of one person are alike: only the interval over persons holds what it says."""
    generator = np.random.default_rng(5)
    persons, images, rounds, share = 60, 12, 150, 0.7
    ids = np.repeat(np.arange(persons), images)
    inside = np.zeros((2, rounds))
    for k in range(rounds):
        of_person = np.where(generator.random(persons) < share, 1, 2)
        result = metrics(of_person[ids])
        for kind, names in enumerate((None, ids)):
            found = bootstrap_interval(result, identities=names, level=0.9, samples=400, seed=k).R1
            inside[kind, k] = found.low <= share <= found.high
    queries, whole = inside.mean(axis=1)
    assert 0.83 <= whole <= 0.97
    assert queries < 0.5
    independent = np.zeros(rounds)
    for k in range(rounds):
        first = np.where(generator.random(300) < share, 1, 2)
        found = bootstrap_interval(metrics(first), level=0.9, samples=400, seed=k).R1
        independent[k] = found.low <= share <= found.high
    assert 0.83 <= independent.mean() <= 0.97


@law
@given(st.integers(0, 99), st.integers(1, 20))
def test_invalid_queries_change_no_bit(seed: int, more: int) -> None:
    result = drawn(seed, 15)
    detail = result.per_query
    assert detail is not None
    at = np.random.default_rng(seed).integers(0, 15, more)
    wider = metrics(
        *(np.insert(part, at, 0) for part in (detail.first_image, detail.AP, detail.INP))
    )
    assert bootstrap_interval(wider, seed=seed) == bootstrap_interval(result, seed=seed)


@law
@given(st.integers(0, 99), st.integers(2, 5))
def test_laws(seed: int, copies: int) -> None:
    result = drawn(seed, 20, 0.2)
    found = bootstrap_interval(result, samples=300)
    wide = bootstrap_interval(result, samples=300, level=0.99)
    for a, b in zip(found, wide, strict=True):
        assert 0 <= b.low <= a.low <= a.high <= b.high <= 1
    # A person of one query each is a query; a query written twice is a person.
    assert bootstrap_interval(result, samples=300, identities=np.arange(20)) == found
    detail = result.per_query
    assert detail is not None
    again = metrics(
        *(np.repeat(part, copies) for part in (detail.first_image, detail.AP, detail.INP))
    )
    same = bootstrap_interval(again, samples=300, identities=np.repeat(np.arange(20), copies))
    np.testing.assert_allclose(same, found, rtol=0, atol=1e-9)
    # One trial several times is that trial.
    np.testing.assert_allclose(
        bootstrap_interval([result] * copies, samples=300), found, rtol=0, atol=1e-12
    )


def test_equal_queries_leave_no_doubt() -> None:
    for part in bootstrap_interval(metrics(np.full(30, 4))):
        assert part.low == pytest.approx(part.estimate, abs=1e-12)
        assert part.high == pytest.approx(part.estimate, abs=1e-12)


def test_blocks_and_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = [drawn(seed, 40, 0.1) for seed in range(3)]
    whole = bootstrap_interval(trials)
    assert bootstrap_interval(trials) == whole
    assert bootstrap_interval(trials, seed=1) != whole
    monkeypatch.setattr(bootstrap, "BLOCK_BYTES", 8 * 40 * 7)
    assert bootstrap_interval(trials) == whole


def test_the_draws_are_for_ever() -> None:
    """Bits of a seed, so that a published interval can be computed again."""
    found = bootstrap_interval(metrics([1, 2, 1, 3, 1, 1, 2, 5]), samples=200, seed=7)
    expected = [[0.125, 0.5, 0.75], [0.499791666666, 0.691666666667, 0.875]]
    np.testing.assert_allclose(found[:2], expected, rtol=0, atol=1e-9)


def test_trials_of_different_queries() -> None:
    """RegDB's splits: every trial draws by itself, and their doubts average out."""
    trials = [drawn(seed, 100 + 10 * seed) for seed in range(8)]
    with pytest.raises(ValueError, match=r"trial 1 has 110 queries, trial 0 has 100; .*=False"):
        bootstrap_interval(trials)
    found = bootstrap_interval(trials, same_queries=False)
    alone = [bootstrap_interval(trial).R1 for trial in trials]
    width = np.sqrt(np.sum([(one.high - one.low) ** 2 for one in alone])) / len(trials)
    assert found.R1.high - found.R1.low == pytest.approx(width, rel=0.15)
    assert found.R1.estimate == pytest.approx(np.mean([one.estimate for one in alone]))
    # Draws of different trials have nothing in common, whatever their queries look like.
    shared = bootstrap_interval([trials[0]] * 9).mAP
    apart = bootstrap_interval([trials[0]] * 9, same_queries=False).mAP
    assert apart.high - apart.low == pytest.approx((shared.high - shared.low) / 3, rel=0.15)
    ids = [np.arange(len(trial.valid)) // 5 for trial in trials]
    persons = bootstrap_interval(trials, same_queries=False, identities=ids)
    assert persons.R1.estimate == found.R1.estimate
    assert persons != found


def test_of_a_protocol(data: Data) -> None:
    evaluation = evaluate_sysu(*data, mode="indoor", per_query=True)
    assert all(trial.per_query is not None for trial in evaluation.trials)
    found = bootstrap_interval(evaluation)
    for part, mean in zip(
        found,
        (evaluation.mean.cmc[0], evaluation.mean.mAP, evaluation.mean.mINP),
        strict=True,
    ):
        assert part.low < mean < part.high
        assert part.estimate == pytest.approx(mean, abs=1e-15)
    assert bootstrap_interval(evaluation.trials) == found
    persons = bootstrap_interval(evaluation, identities=data[0].ids)
    assert persons.mAP.high - persons.mAP.low > found.mAP.high - found.mAP.low


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"level": 0}, ValueError, "level: expected more than 0 and less than 1, got 0"),
        ({"level": 95}, ValueError, "level: expected more than 0 and less than 1, got 95"),
        ({"level": "95 %"}, TypeError, "level: expected a number, got str"),
        ({"samples": 0}, ValueError, "samples: expected >= 1, got 0"),
        ({"samples": 10.0}, TypeError, "samples: expected an integer, got float"),
        ({"seed": -1}, ValueError, "seed: expected a whole number >= 0, got -1"),
        ({"identities": [1, 2]}, ValueError, r"identities: .* shape \[4\], got int64 \[2\]"),
        ({"identities": ["a"] * 4}, TypeError, "identities: expected integers"),
        (
            {"identities": np.arange(4), "same_queries": False},
            ValueError,
            "identities: expected one array for each of 1 trials, got 4",
        ),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bootstrap_interval(metrics([1, 2, 3, 1]), **options)


def test_bad_results() -> None:
    plain = rank_metrics([[0.0, 1.0]], [1], [1, 2], protocol="regdb")
    with pytest.raises(ValueError, match="trial 0 lacks per_query; evaluate with per_query=True"):
        bootstrap_interval(plain)
    good = metrics([1, 2])
    with pytest.raises(ValueError, match="trial 1 lacks per_query"):
        bootstrap_interval(Evaluation(plain, plain, [good, plain]))
    with pytest.raises(ValueError, match="results: expected one trial at least, got none"):
        bootstrap_interval([])
    with pytest.raises(TypeError, match="results: expected RankMetrics, got str"):
        bootstrap_interval(["x"])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"results: expected an Evaluation .* got NoneType"):
        bootstrap_interval(None)  # type: ignore[arg-type]
