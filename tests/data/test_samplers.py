from __future__ import annotations

import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastreid_vi.config import INFRARED, VISIBLE
from fastreid_vi.data import DataError, IdentityRandom, PairedIdentity, make_sampler
from fastreid_vi.data.sampler import SAMPLERS, IdentitySampler
from tests.conftest import golden

every = pytest.mark.parametrize("name", sorted(SAMPLERS))
aware = pytest.mark.parametrize("name", sorted(n for n, s in SAMPLERS.items() if s.both_modalities))


def flat(sampler: IdentitySampler) -> np.ndarray:
    return np.concatenate([np.asarray(batch) for batch in sampler])


def infrared(cams: np.ndarray) -> np.ndarray:
    return np.isin(cams, (3, 6)).astype(np.int64)


@st.composite
def data_sets(draw, smallest: int = 1):
    """Labels and modalities in any order, every identity with `smallest` or more of each."""
    sizes = draw(
        st.lists(
            st.tuples(st.integers(smallest, 14), st.integers(smallest, 14)), min_size=1, max_size=9
        )
    )
    pairs = [
        (label, modality)
        for label, size in enumerate(sizes)
        for modality, count in zip((VISIBLE, INFRARED), size, strict=True)
        for _ in range(count)
    ]
    order = np.random.default_rng(draw(st.integers(0, 99))).permutation(len(pairs))
    labels, modality = np.array(pairs, dtype=np.int64)[order].T
    return labels, modality


@st.composite
def samplers(draw, name: str, *, replay: bool | None = None) -> IdentitySampler:
    labels, modality = draw(data_sets())
    return make_sampler(
        name,
        labels,
        modality,
        identities=draw(st.integers(1, len(np.unique(labels)))),
        images=draw(st.sampled_from((2, 4, 8, 10))),
        seed=draw(st.integers(0, 2**31)),
        replay=draw(st.booleans()) if replay is None else replay,
    )


any_sampler = st.sampled_from(sorted(SAMPLERS)).flatmap(samplers)
MIXED = ("norm_triplet", "random", "cross_modality_identity")


class TestGolden:
    def test_identity_random(self):
        vectors = golden("eval/samplers")
        sampler = IdentityRandom(
            vectors["ids"],
            infrared(vectors["cams"]),
            identities=int(vectors["P"]),
            images=int(vectors["K"]),
            seed=int(vectors["np_seed"]),
            replay=True,
        )
        for epoch, suffix in ((1, ""), (2, "_epoch2"), (1, "")):
            sampler.set_epoch(epoch)
            indices = flat(sampler)
            for name in ("mpanet_identity_random", "mcja_identity_cross_modality"):
                np.testing.assert_array_equal(indices, vectors[name + suffix])
            assert len(sampler) * 32 == len(indices)
        sampler.set_epoch(2)
        assert len(sampler) * 32 == vectors["mpanet_identity_random_len_after"]

    def test_second_epoch_alone(self):
        vectors = golden("eval/samplers")
        sampler = IdentityRandom(
            vectors["ids"], infrared(vectors["cams"]), identities=4, images=8,
            seed=int(vectors["np_seed"]), replay=True,
        )  # fmt: skip
        sampler.set_epoch(2)
        np.testing.assert_array_equal(flat(sampler), vectors["mpanet_identity_random_epoch2"])

    def test_identity_random_of_mpanet(self):
        vectors = golden("mpanet/sampler_schedule")
        sampler = make_sampler(
            "identity_random",
            vectors["ids"],
            infrared(vectors["cam_ids"]),
            identities=int(vectors["p_size"]),
            images=int(vectors["k_size"]),
            seed=int(vectors["numpy_seed"]),
            replay=True,
        )
        np.testing.assert_array_equal(flat(sampler), vectors["indices"])
        assert len(sampler) * 12 == vectors["length_after"]

    @pytest.mark.parametrize(
        ("file", "visible", "thermal", "identities", "half", "seed"),
        [
            ("eval/samplers", "agw_color_labels", "agw_thermal_labels", "agw_batch",
             "agw_num_pos", "np_seed"),
            ("lba/sampler_schedule", "color_label", "thermal_label", "ids_per_batch",
             "num_pos", "numpy_seed"),
        ],
    )  # fmt: skip
    def test_paired_identity(self, file, visible, thermal, identities, half, seed):
        vectors = golden(file)
        prefix = "agw_" if "agw" in visible else ""
        first, second = vectors[visible], vectors[thermal]
        labels = np.concatenate([first, second])
        modality = np.repeat([VISIBLE, INFRARED], [len(first), len(second)])
        p, k = int(vectors[identities]), int(vectors[half])
        sampler = PairedIdentity(
            labels, modality, identities=p, images=2 * k, seed=int(vectors[seed]), replay=True
        )
        rows = flat(sampler).reshape(-1, 2, p * k)
        np.testing.assert_array_equal(rows[:, 0].ravel(), vectors[f"{prefix}index1"])
        np.testing.assert_array_equal(rows[:, 1].ravel() - len(first), vectors[f"{prefix}index2"])

    def test_lengths_on_the_real_counts(self):
        vectors = golden("eval/sysu_real_counts")
        trained = np.concatenate([vectors["train_id"], vectors["val_id"]])
        counts = vectors["counts"][:, trained - 1]
        labels = np.concatenate([np.repeat(np.arange(395), row) for row in counts])
        modality = np.repeat([0, 0, 1, 0, 0, 1], counts.sum(axis=1))
        paired = PairedIdentity(labels, modality, identities=8, images=8, seed=1)
        assert len(paired) == 696
        random = IdentityRandom(labels, modality, identities=16, images=8, seed=1)
        for epoch in (1, 2, 3):
            random.set_epoch(epoch)
            assert 180 <= len(random) <= 183


class TestLaws:
    @settings(max_examples=60, deadline=None)
    @given(st.sampled_from(sorted({*SAMPLERS} - {*MIXED})).flatmap(samplers), st.integers(1, 5))
    def test_identities_and_images_of_a_batch(self, sampler, epoch):
        sampler.set_epoch(epoch)
        p, k = sampler.identities, sampler.images
        batches = list(sampler)
        assert len(batches) == len(sampler) > 0
        for batch in batches:
            assert len(batch) == p * k
            assert all(isinstance(i, int) and 0 <= i < len(sampler.labels) for i in batch)
            labels, modality = sampler.labels[batch], sampler.modality[batch]
            assert set(Counter(labels.tolist()).values()) == {k}
            for m in (VISIBLE, INFRARED):
                per_identity = Counter(labels[modality == m].tolist())
                assert len(per_identity) == p
                assert set(per_identity.values()) == {k // 2}

    @settings(max_examples=30, deadline=None)
    @given(samplers("paired_identity"))
    def test_layout_of_paired_identity(self, sampler):
        half = sampler.identities * sampler.images // 2
        visible, thermal = np.split(np.array(list(sampler)), [half], axis=1)
        assert (sampler.modality[visible] == VISIBLE).all()
        assert (sampler.modality[thermal] == INFRARED).all()
        np.testing.assert_array_equal(sampler.labels[visible], sampler.labels[thermal])
        larger = max(np.bincount(sampler.modality))
        assert len(sampler) == larger // half + 1

    @settings(max_examples=30, deadline=None)
    @given(samplers("identity_random"))
    def test_layout_of_identity_random(self, sampler):
        batches = np.array(list(sampler))
        np.testing.assert_array_equal(
            sampler.modality[batches], np.tile([INFRARED, VISIBLE], batches.shape[1] // 2)[None]
            .repeat(len(batches), 0),
        )  # fmt: skip
        labels = sampler.labels[batches].reshape(len(batches), sampler.identities, -1)
        assert (labels == labels[:, :, :1]).all()

    @settings(max_examples=40, deadline=None)
    @given(data_sets(smallest=5), st.integers(0, 9), st.booleans())
    def test_identity_random_repeats_no_image(self, data, seed, replay):
        labels, modality = data
        sampler = IdentityRandom(
            labels, modality, identities=1, images=10, seed=seed, replay=replay
        )
        indices = flat(sampler)
        assert len(set(indices.tolist())) == len(indices)
        # With one identity a batch, every chunk is used.
        expected = sum(
            min(np.bincount(modality[labels == label], minlength=2)) * 2 // 10
            for label in np.unique(labels)
        )
        assert len(sampler) == expected

    @pytest.mark.parametrize("replay", [False, True])
    @pytest.mark.parametrize("short", [VISIBLE, INFRARED])
    def test_identity_random_resamples_a_short_modality(self, short, replay):
        labels = np.repeat([0, 1], [8, 12])
        modality = np.array([short] + [1 - short] * 7 + [0, 1] * 6)
        sampler = IdentityRandom(labels, modality, identities=2, images=8, seed=1, replay=replay)
        (batch,) = list(sampler)
        assert batch.count(0) == 4  # the only image of its modality, K/2 times
        rest = [i for i in batch if sampler.labels[i] == 0 and i != 0]
        assert len(set(rest)) == 4

    @settings(max_examples=30, deadline=None)
    @given(any_sampler, st.lists(st.integers(1, 6), max_size=5))
    def test_an_epoch_depends_on_seed_and_number_only(self, sampler, visited):
        fresh = make_sampler(
            sampler.name, sampler.labels, sampler.modality, identities=sampler.identities,
            images=sampler.images, seed=sampler.seed, replay=sampler.replay,
        )  # fmt: skip
        for epoch in visited:
            sampler.set_epoch(epoch)
            len(sampler)
        for s in (sampler, fresh):
            s.set_epoch(4)
        np.testing.assert_array_equal(sampler.plan(), fresh.plan())

    @every
    @pytest.mark.parametrize("replay", [False, True])
    def test_epochs_and_seeds_differ(self, name, replay):
        labels, modality = np.repeat(np.arange(12), 12), np.tile([0, 1], 72)
        plans = []
        for seed in (1, 2):
            sampler = make_sampler(
                name, labels, modality, identities=4, images=4, seed=seed, replay=replay
            )
            for epoch in (1, 2):
                sampler.set_epoch(epoch)
                plans.append(tuple(flat(sampler)))
        assert len(set(plans)) == 4

    @every
    def test_the_global_generator_is_left_alone(self, name):
        np.random.seed(3)
        before = np.random.get_state()[1].copy()
        list(make_sampler(name, [0, 0, 1, 1], [0, 1, 0, 1], identities=2, images=2, seed=1))
        np.testing.assert_array_equal(np.random.get_state()[1], before)

    @every
    def test_every_identity_is_drawn(self, name):
        labels, modality = np.repeat(np.arange(20), 10), np.tile([0, 1], 100)
        sampler = make_sampler(name, labels, modality, identities=5, images=4, seed=0)
        seen = set()
        for epoch in range(1, 6):
            sampler.set_epoch(epoch)
            seen |= set(labels[flat(sampler)].tolist())
        assert seen == set(range(20))


class TestCursor:
    @settings(max_examples=40, deadline=None)
    @given(any_sampler, st.integers(1, 4), st.data())
    def test_resume_in_mid_epoch(self, sampler, epoch, data):
        sampler.set_epoch(epoch)
        whole = sampler.plan().tolist()
        stop = data.draw(st.integers(0, len(whole)))
        assert list(islice(sampler, stop)) == whole[:stop]
        state = json.loads(json.dumps(sampler.state_dict()))
        resumed = make_sampler(
            sampler.name, sampler.labels, sampler.modality, identities=sampler.identities,
            images=sampler.images, seed=sampler.seed, replay=sampler.replay,
        )  # fmt: skip
        resumed.load_state_dict(state)
        resumed.set_epoch(epoch)  # as a training loop does; the cursor stays
        assert (resumed.epoch, resumed.cursor) == (epoch, stop)
        assert list(resumed) == whole[stop:]
        assert len(resumed) == len(whole)

    @every
    def test_a_finished_epoch_starts_over_and_the_next_one_from_zero(self, name):
        sampler = make_sampler(
            name, np.repeat(np.arange(4), 8), np.tile([0, 1], 16), identities=2, images=4, seed=0
        )
        first = list(sampler)
        assert sampler.state_dict()["batch"] == len(first)
        assert list(sampler) == first
        sampler.set_epoch(2)
        assert sampler.cursor == 0
        second = list(sampler)
        assert second != first
        sampler.set_epoch(2)
        assert list(sampler) == second

    @every
    def test_a_saved_finished_epoch_yields_nothing_more(self, name):
        labels, modality = np.repeat(np.arange(4), 8), np.tile([0, 1], 16)
        sampler = make_sampler(name, labels, modality, identities=2, images=4, seed=0)
        list(sampler)
        resumed = make_sampler(name, labels, modality, identities=2, images=4, seed=0)
        resumed.load_state_dict(sampler.state_dict())
        assert list(resumed) == []
        resumed.set_epoch(2)
        assert len(list(resumed)) == len(resumed)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"seed": 2}, "seed: expected 1, got 2"),
            ({"sampler": "paired_identity"}, "sampler: expected 'identity_random'"),
            ({"identities": 3}, "identities"),
            ({"images": 2}, "images"),
            ({"replay": True}, "replay"),
            ({"data": 0}, "data"),
            ({"epoch": 0}, "no such cursor"),
            ({"batch": 10_000}, "batch 10000 is beyond"),
        ],
    )
    def test_a_foreign_state_is_refused(self, change, message):
        sampler = IdentityRandom(
            np.repeat(np.arange(4), 8), np.tile([0, 1], 16), identities=2, images=4, seed=1
        )
        with pytest.raises(ValueError, match=message):
            sampler.load_state_dict({**sampler.state_dict(), **change})


class TestRefusals:
    @aware
    @settings(max_examples=20, deadline=None)
    @given(data=data_sets(), lost=st.sampled_from((VISIBLE, INFRARED)), pick=st.integers(0, 99))
    def test_identity_without_a_modality(self, name, data, lost, pick):
        labels, modality = data
        label = pick % (labels.max() + 1)
        keep = ~((labels == label) & (modality == lost))
        assume((labels[keep] == label).any())
        word = "visible" if lost == VISIBLE else "infrared"
        with pytest.raises(DataError, match=f"identity {label + 300:04d} has no {word} image"):
            make_sampler(
                name, labels[keep], modality[keep], identities=1, images=2, seed=0,
                pids=labels[keep] + 300,
            )  # fmt: skip

    @pytest.mark.parametrize("name", sorted({*SAMPLERS} - {"random"}))
    def test_more_identities_than_there_are(self, name):
        with pytest.raises(DataError, match="5 identities cannot be drawn from 2 training"):
            make_sampler(name, [0, 0, 1, 1], [0, 1, 0, 1], identities=5, images=2, seed=0)
        with pytest.raises(DataError, match="from 0 training"):
            make_sampler(name, [], [], identities=1, images=2, seed=0)

    @every
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"modality": [0, 1]}, r"modality: expected shape \[4\], got \[2\]"),
            ({"pids": [0, 1]}, r"pids: expected shape \[4\], got \[2\]"),
            ({"modality": [0, 1, 2, 1]}, "modality: expected 0 or 1"),
            ({"labels": [-1, -1, 0, 0]}, "labels: expected training labels"),
            ({"images": 3}, "even K"),
            ({"images": 0}, "even K"),
            ({"identities": 0}, "P >= 1"),
            ({"seed": -1}, "seed"),
        ],
    )
    def test_bad_arguments(self, name, change, message):
        arguments = {
            "labels": [0, 0, 1, 1], "modality": [0, 1, 0, 1], "identities": 2, "images": 2,
            "seed": 0,
        }  # fmt: skip
        with pytest.raises(ValueError, match=message):
            make_sampler(name, **{**arguments, **change})

    def test_unknown_name_and_epoch(self):
        with pytest.raises(ValueError, match="sampler: expected one of"):
            make_sampler("triplet", [0, 0], [0, 1], identities=1, images=2, seed=0)
        sampler = make_sampler("paired_identity", [0, 0], [0, 1], identities=1, images=2, seed=0)
        with pytest.raises(ValueError, match="epoch: expected 1 or more"):
            sampler.set_epoch(0)
