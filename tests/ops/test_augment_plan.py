"""What `sample_plan` draws is what was published: chi-square tests against plain loops."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from fastreid_vi.augment import KINDS, Plan, batch_plan, plain_plan, sample_plan, view_plan
from fastreid_vi.config import INFRARED, VISIBLE, Batch, DataConfig
from fastreid_vi.methods import recipe
from tests.ops.augment_cases import any_plan, pictures

SLOTS = 24000
LIKELY = 1e-3  # a right distribution fails one time in a thousand; seeds are fixed


def config_of(method: str, **change: object) -> DataConfig:
    return dataclasses.replace(recipe(method, "sysu").data, **change)  # type: ignore[arg-type]


@cache
def drawn(method: str, axes: str = "official", seed: int = 1) -> Plan:
    """Many slots of visible images, a batch at a time."""
    generator = torch.Generator().manual_seed(seed)
    config = config_of(method, cutmix_axes=axes)
    plans = [sample_plan(600, config, generator) for _ in range(SLOTS // 600)]
    columns = [None if parts[0] is None else torch.cat(parts) for parts in zip(*plans, strict=True)]
    return Plan._make(columns)


def fits(counts: np.ndarray | Tensor, expected: list[float]) -> float:
    """Probability of counts this far from the expected shares, or further."""
    observed = np.asarray(counts, dtype=float)
    shares = np.asarray(expected, dtype=float)
    return float(stats.chisquare(observed, shares / shares.sum() * observed.sum()).pvalue)


def alike(a: np.ndarray, b: np.ndarray, bins: int = 12) -> float:
    """Probability that two samples of one law differ this much or more."""
    edges = np.unique(np.quantile(np.concatenate([a, b]), np.linspace(0, 1, bins + 1)))
    edges[-1] += 1
    table = np.stack([np.histogram(sample, edges)[0] for sample in (a, b)])
    table = table[:, table.sum(axis=0) > 0]
    return float(stats.chi2_contingency(table).pvalue)


def published_boxes(
    area: tuple[float, float], limits: tuple[int, int], size: tuple[int, int], seed: int
) -> Iterator[tuple[int, int, int, int]]:
    """The published procedure, draw by draw: at most ten tries at a box below the limits."""
    rng = random.Random(seed)
    while True:
        for _ in range(10):
            pixels = size[0] * size[1] * rng.uniform(*area)
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(3.3)))
            height, width = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
            if height < limits[0] and width < limits[1]:
                top = rng.randint(0, limits[0] - height)
                left = rng.randint(0, limits[1] - width)
                yield top, left, height, width
                break


def some(boxes: Iterator[tuple[int, int, int, int]], count: int = SLOTS) -> np.ndarray:
    return np.array([next(boxes) for _ in range(count)])


def boxes_are(found: np.ndarray, wanted: np.ndarray) -> list[float]:
    """Of every side, of the area and of the aspect."""
    both = [(boxes[:, 2] * boxes[:, 3], boxes[:, 2] / boxes[:, 3]) for boxes in (found, wanted)]
    places = [alike(found[:, i], wanted[:, i]) for i in range(4)]
    return places + [alike(a, b) for a, b in zip(*both, strict=True)]


class TestDistributions:
    def test_one_of_four_changes_acts_half_the_time(self) -> None:
        counts = drawn("mcja").kind.bincount(minlength=len(KINDS))
        assert fits(counts[:5], [4, 1, 1, 1, 1]) > LIKELY
        assert counts[5:].sum() == 0
        assert fits(counts[:5], [3, 1, 1, 1, 1]) < 1e-9

    @pytest.mark.parametrize("method", ["mcja", "mpanet", "lba", "aligngan"])
    def test_flips(self, method: str) -> None:
        assert fits(drawn(method).flip.long().bincount(minlength=2), [1, 1]) > LIKELY

    @pytest.mark.parametrize("method", ["mcja", "mpanet"])
    def test_crops_are_uniform_in_both_directions(self, method: str) -> None:
        plan = drawn(method)
        for offsets in (plan.top, plan.left):
            counts = (offsets + 10).bincount()
            assert len(counts) == 21
            assert fits(counts, [1] * 21) > LIKELY
        together = torch.bincount((plan.top + 10) // 3 * 7 + (plan.left + 10) // 3)
        assert fits(together, [1] * 49) > LIKELY

    @pytest.mark.parametrize("method", ["lba", "aligngan"])
    def test_recipes_that_do_not_crop_or_erase(self, method: str) -> None:
        plan = drawn(method)
        assert not plan.top.any()
        assert not plan.left.any()
        assert not plan.erase.any()
        assert not plan.kind.any()

    @pytest.mark.parametrize(("method", "area"), [("mcja", (0.02, 0.30)), ("mpanet", (0.02, 0.33))])
    def test_erased_boxes(self, method: str, area: tuple[float, float]) -> None:
        config, plan = config_of(method), drawn(method)
        erased = plan.erase[:, 2] > 0
        assert fits(erased.long().bincount(minlength=2), [1, 1]) > LIKELY
        size = config.height, config.width
        wanted = some(published_boxes(area, size, size, 3))
        assert min(boxes_are(plan.erase[erased].numpy(), wanted)) > LIKELY
        other = some(published_boxes((0.02, 0.40), size, size, 3))
        assert min(boxes_are(plan.erase[erased].numpy(), other)) < 1e-9

    @pytest.mark.parametrize("axes", ["official", "fixed"])
    def test_cutmix_boxes_and_planes(self, axes: str) -> None:
        """Q1: the official code takes (width, height) for (height, width)."""
        plan = drawn("mcja", axes)
        acts = plan.kind == KINDS.index("cutmix")
        limits = {"official": (192, 384), "fixed": (384, 192)}
        found = plan.boxes[acts].numpy()
        ways = {k: some(published_boxes((0.02, 0.33), v, (384, 192), 4)) for k, v in limits.items()}
        assert min(boxes_are(found, ways.pop(axes))) > LIKELY
        assert min(boxes_are(found, *ways.values())) < 1e-9
        outside, inside = plan.planes[acts].T
        assert not (outside == inside).any()
        assert fits(torch.bincount(3 * outside + inside)[[1, 2, 3, 5, 6, 7]], [1] * 6) > LIKELY

    def test_hues(self) -> None:
        plan = drawn("mcja")
        hue = plan.hue[plan.kind == KINDS.index("hue")]
        # Fractions are cut off: 0 stands for twice the length of any other number.
        counts = ((hue + 50) % 256).bincount(minlength=101)
        assert len(counts) == 101
        assert fits(counts, [2 if step == 50 else 1 for step in range(101)]) > LIKELY

    def test_weights(self) -> None:
        plan = drawn("mcja")
        weights = plan.weights[plan.kind == KINDS.index("gray")].numpy()
        raw = np.random.default_rng(5).random((SLOTS, 3))
        wanted = raw / raw.sum(axis=1, keepdims=True)
        assert min(alike(weights[:, i], wanted[:, i]) for i in range(3)) > LIKELY
        assert np.abs(weights.sum(axis=1) - 1).max() < 1e-15
        uniform = np.random.default_rng(5).dirichlet([1, 1, 1], SLOTS)
        assert alike(weights[:, 0], uniform[:, 0]) < 1e-9

    def test_jitter(self) -> None:
        plan = drawn("mcja")
        acts = plan.kind == KINDS.index("jitter")
        assert fits(plan.channel[acts].bincount(minlength=3), [1, 1, 1]) > LIKELY
        tenths = (plan.factor[acts] * 10).long()
        assert fits(tenths.bincount(minlength=10), [1] * 10) > LIKELY

    def test_choices_do_not_depend_on_each_other(self) -> None:
        plan = drawn("mcja")
        erased = plan.erase[:, 2] > 0
        columns = [plan.kind, plan.flip, plan.top > 0, plan.left > 0, erased, plan.kind.roll(1)]
        for i, a in enumerate(columns):
            for b in columns[:i]:
                values = torch.stack([a.long(), b.long()])
                table = np.zeros(tuple(int(v) + 1 for v in values.amax(1)))
                np.add.at(table, tuple(values.numpy()), 1)
                assert stats.chi2_contingency(table).pvalue > LIKELY / 10


class TestSampling:
    CONFIG = config_of("mcja")

    def sample(self, batch: object, seed: int = 1) -> Plan:
        generator = torch.Generator().manual_seed(seed)
        return sample_plan(batch, self.CONFIG, generator)  # type: ignore[arg-type]

    def test_infrared_images_keep_their_channels(self) -> None:
        modality = torch.tensor([VISIBLE, INFRARED]).repeat(500)
        plan, visible = self.sample(modality), self.sample(1000)
        assert not plan.kind[1::2].any()
        assert torch.equal(plan.kind[::2], visible.kind[::2])
        assert visible.kind[1::2].any()
        for name in ("flip", "top", "left", "erase", "source"):
            assert torch.equal(getattr(plan, name), getattr(visible, name))
        batch = Batch(torch.zeros(1000, 1), modality, modality, modality)
        assert torch.equal(self.sample(batch).kind, plan.kind)

    def test_the_generator_decides(self) -> None:
        one, again, other = self.sample(50), self.sample(50), self.sample(50, seed=2)
        assert torch.equal(one.top, again.top)
        assert not torch.equal(one.top, other.top)
        # A slot does not know how many there are.
        assert torch.equal(self.sample(9).top, one.top[:9])
        generator = torch.Generator().manual_seed(1)
        first, second = (sample_plan(50, self.CONFIG, generator) for _ in range(2))
        assert torch.equal(first.top, one.top)
        assert not torch.equal(second.top, one.top)

    def test_a_recipe_or_its_data(self) -> None:
        whole = sample_plan(20, recipe("mcja", "sysu"), torch.Generator().manual_seed(1))
        assert torch.equal(whole.top, self.sample(20).top)

    def test_bad_batches(self) -> None:
        for batch, error, message in (
            ("4", TypeError, "batch: expected a count, modalities"),
            (True, TypeError, "batch: expected a count"),
            (-1, ValueError, "batch: expected a count >= 0, got -1"),
            (torch.zeros(3), TypeError, "batch: expected modalities in int64, got torch.float32"),
            (torch.zeros(3, 1).long(), ValueError, r"expected modalities \[B\], got shape \[3, 1"),
        ):
            with pytest.raises(error, match=message):
                self.sample(batch)
        assert self.sample(0).source.shape == (0,)


class TestPlans:
    def test_shares_are_parts_of_the_whole(self) -> None:
        config = config_of("mcja", channel_mix=0.5)
        modality = np.arange(16) % 2
        at = {"rows": 16, "seed": 2, "epoch": 5, "batch": 3}
        whole = batch_plan(np.arange(16) + 100, modality, config, **at)
        slots = np.array([3, 9, 0])
        part = batch_plan(slots + 100, modality[slots], config, slots=slots, **at)
        for name, column in part._asdict().items():
            want = getattr(whole.rows(torch.from_numpy(slots)), name)
            assert torch.equal(column, want), name
        assert torch.equal(part.levels, whole.levels)

    def test_lengths_are_checked(self) -> None:
        config, at = config_of("mcja"), {"rows": 4, "seed": 1, "epoch": 1, "batch": 0}
        with pytest.raises(ValueError, match="source: expected 4 rows, as many as draws, got 3"):
            batch_plan(np.arange(3), np.zeros(4, dtype=np.int64), config, **at)
        with pytest.raises(ValueError, match="modality: expected 4 entries, got 3"):
            batch_plan(np.arange(4), np.zeros(3, dtype=np.int64), config, **at)

    @pytest.mark.parametrize("mix", [False, True])
    def test_a_plan_is_carried_in_one_piece(self, mix: bool) -> None:
        """To "meta", which every machine has; there and back where there is a GPU."""
        plan = any_plan(7, pictures(3, 5, 4), mix=mix)
        for name, column in plan.to("meta")._asdict().items():
            mine = getattr(plan, name)
            assert (column is None) == (mine is None)
            if mine is not None:
                assert (column.dtype, column.shape) == (mine.dtype, mine.shape)
                assert column.device.type == "meta"
        assert plan.to("cpu") is plan
        if torch.cuda.is_available():
            back = plan.to("cuda").to("cpu")
            for mine, theirs in zip(plan, back, strict=True):
                assert mine is theirs is None or torch.equal(mine, theirs)

    def test_views(self) -> None:
        source = torch.tensor([4, 2])
        assert view_plan(source).kind.tolist() == [0, 0]
        blue = view_plan(source, "b", flip=True, visible=torch.tensor([False, True]))
        assert blue.kind.tolist() == [0, KINDS.index("channel")]
        assert blue.channel.tolist() == [2, 2]
        assert blue.flip.all()
        assert view_plan(source, "avg").kind.tolist() == [KINDS.index("average")] * 2
        with pytest.raises(ValueError, match=r"view: expected one of 'original', .* got 'red'"):
            view_plan(source, "red")  # type: ignore[arg-type]
        assert plain_plan(source).source is source
