"""The samplers of MCJA, AlignGAN and MPANet's alternatives: golden replays, laws, shares."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastreid_vi.config import INFRARED, VISIBLE
from fastreid_vi.data import DataError, make_sampler
from fastreid_vi.data.sampler import ALIASES, SAMPLERS, IdentitySampler, Uniform
from fastreid_vi.data.streams import draw_images, shuffled
from tests.conftest import golden
from tests.data.test_samplers import data_sets, flat, infrared, samplers

PAIRED = ("paired_identity", "identity_uniform", "cross_modality_identity", "uniform")


def shared(name: str, **change) -> IdentitySampler:
    """A sampler on the data set of eval/samplers, replaying it."""
    vectors = golden("eval/samplers")
    arguments = {
        "identities": int(vectors["P"]), "images": int(vectors["K"]),
        "seed": int(vectors["np_seed"]), "replay": True, **change,
    }  # fmt: skip
    return make_sampler(name, vectors["ids"], infrared(vectors["cams"]), **arguments)


class TestGolden:
    @pytest.mark.parametrize(
        ("name", "vector"),
        [
            ("norm_triplet", "mpanet_norm_triplet"),
            ("norm_triplet", "mcja_norm_triplet"),
            ("identity_uniform", "mpanet_identity_uniform"),
            ("cross_modality_identity", "mcja_cross_modality_identity"),
            ("identity_cross_modality", "mcja_identity_cross_modality"),
            ("random", "mpanet_random"),
            ("cross_modality_random", "mcja_cross_modality_random"),
        ],
    )
    def test_replays(self, name, vector):
        vectors, sampler = golden("eval/samplers"), shared(name)
        for epoch, suffix in ((1, ""), (2, "_epoch2"), (1, "")):
            sampler.set_epoch(epoch)
            expected = vectors[vector + suffix]
            # The released loaders leave an incomplete last batch out.
            whole = len(expected) // 32 * 32
            assert len(sampler) == whole // 32
            rows = expected[:whole]
            if sampler.name == "random":
                # One sequence of half batches: the last pair of halves may be shorter.
                assert 0 < len(expected) - whole < 32
            np.testing.assert_array_equal(flat(sampler), rows)
        assert sampler.name == ALIASES.get(name, name)

    def test_second_epoch_alone(self):
        for name in ("norm_triplet", "random", "cross_modality_identity"):
            whole, alone = shared(name), shared(name)
            for epoch in (1, 2):
                whole.set_epoch(epoch)
                expected = whole.plan()
            alone.set_epoch(2)
            np.testing.assert_array_equal(alone.plan(), expected)

    @pytest.mark.parametrize("case", ["a", "short"])
    def test_norm_triplet_of_mcja(self, case):
        vectors = golden("mcja/sampler_metrics")
        ids, (p, k) = vectors[f"{case}__ids"], vectors[f"{case}__PK"].tolist()
        for modality in (np.zeros_like(ids), np.arange(len(ids)) % 2):  # blind to it
            sampler = make_sampler(
                "norm_triplet", ids, modality, identities=p, images=k,
                seed=int(vectors[f"{case}__seed"]), replay=True,
            )  # fmt: skip
            for epoch in (1, 2):
                sampler.set_epoch(epoch)
                np.testing.assert_array_equal(flat(sampler), vectors[f"{case}__epoch{epoch - 1}"])

    @pytest.mark.parametrize("half", [1, 2, 23])
    def test_uniform(self, half):
        vectors = golden("eval/samplers")
        first, second = vectors["agw_color_labels"], vectors["agw_thermal_labels"]
        sampler = Uniform(
            np.concatenate([first, second]),
            np.repeat([VISIBLE, INFRARED], [len(first), len(second)]),
            identities=half, images=16, seed=int(vectors["np_seed"]), replay=True,
            seeds=vectors["align_seeds"].tolist(),
        )  # fmt: skip
        rows = flat(sampler).reshape(-1, 2, half * 8)
        whole = 23 // half * half * 8
        np.testing.assert_array_equal(rows[:, 0].ravel(), vectors["align_iter_rgb"][:whole])
        np.testing.assert_array_equal(
            rows[:, 1].ravel() - len(first), vectors["align_iter_ir"][:whole]
        )

    @pytest.mark.parametrize("modality", ["rgb", "ir"])
    def test_a_pass_of_one_modality_of_aligngan(self, modality):
        vectors = golden("aligngan/sampler_evaluation")
        labels, seeds = vectors[f"a__{modality}_pids"], vectors["a__seeds"].tolist()
        members = {int(c): np.flatnonzero(labels == c) for c in np.unique(labels)}
        random = np.random.RandomState(int(vectors["a__np_seed"]))
        drawn = [
            draw_images(random, members, shuffled(members, seeds, number), int(vectors["a__k"]))
            for number in range(3)  # the first at construction
        ]
        for number in (0, 1):
            expected = vectors[f"a__{modality}_pass{number}"]
            np.testing.assert_array_equal(drawn[number + 1].ravel(), expected)

    def test_lengths_on_the_real_counts(self):
        vectors = golden("eval/sysu_real_counts")
        trained = np.concatenate([vectors["train_id"], vectors["val_id"]])
        counts = vectors["counts"][:, trained - 1]
        labels = np.concatenate([np.repeat(np.arange(395), row) for row in counts])
        modality = np.repeat([0, 0, 1, 0, 0, 1], counts.sum(axis=1))

        def length(name, p, k, **more):
            return len(make_sampler(name, labels, modality, identities=p, images=k, seed=1, **more))

        assert 240 <= length("norm_triplet", 8, 16) <= 246
        assert length("uniform", 18, 8) == 21
        assert length("uniform", 4, 8) == 98
        assert length("uniform", 18, 8, pixel_identities=4, batches=100) == 100
        assert length("identity_uniform", 16, 8) == 24
        assert length("random", 16, 8) == 347

    def test_norm_triplet_on_the_counts_of_regdb(self):
        labels, modality = np.repeat(np.arange(206), 20), np.tile([0, 1], 2060)
        sampler = make_sampler("norm_triplet", labels, modality, identities=4, images=32, seed=1)
        assert len(sampler) == 51


class TestLaws:
    @settings(max_examples=40, deadline=None)
    @given(samplers("norm_triplet"), st.integers(1, 4))
    def test_norm_triplet(self, sampler, epoch):
        sampler.set_epoch(epoch)
        p, k = sampler.identities, sampler.images
        sizes, seen = Counter(sampler.labels.tolist()), Counter(flat(sampler).tolist())
        for batch in sampler.plan():
            labels = sampler.labels[batch].reshape(p, k)
            assert (labels == labels[:, :1]).all()
            assert len(set(labels[:, 0].tolist())) == p
        for image, times in seen.items():
            if sizes[int(sampler.labels[image])] >= k:
                assert times == 1
        assert sampler.paired == 0

    def test_norm_triplet_takes_identities_of_one_modality(self):
        sampler = make_sampler(
            "norm_triplet", np.repeat([0, 1, 2], 4), np.repeat([0, 1, 0], 4),
            identities=3, images=4, seed=0,
        )  # fmt: skip
        (batch,) = sampler
        assert sorted(batch) == list(range(12))

    @settings(max_examples=60, deadline=None)
    @given(st.sampled_from(PAIRED).flatmap(samplers), st.integers(1, 3))
    def test_the_promise_of_paired_batches(self, sampler, epoch):
        sampler.set_epoch(epoch)
        p, k = sampler.identities, sampler.images // 2
        assert sampler.paired in (0, k)
        if not sampler.paired:
            assert sampler.name == "cross_modality_identity"
            assert sampler.replay
            return
        rows = np.array(list(sampler)).reshape(-1, 2, p, k)
        assert len(rows) == len(sampler) > 0
        assert (sampler.modality[rows] == np.array([VISIBLE, INFRARED])[:, None, None]).all()
        labels = sampler.labels[rows]
        assert (labels == labels[:, :1, :, :1]).all()
        assert all(len(set(batch[0, :, 0].tolist())) == p for batch in labels)

    @settings(max_examples=60, deadline=None)
    @given(
        st.sampled_from(("identity_uniform", "cross_modality_identity", "uniform")).flatmap(
            samplers
        )
    )
    def test_without_replacement_where_there_are_enough(self, sampler):
        assume(sampler.paired)  # a straddling batch may hold an identity twice
        k = sampler.images // 2
        members = Counter(zip(sampler.labels.tolist(), sampler.modality.tolist(), strict=True))
        for batch in sampler:
            drawn = Counter(batch)
            for image in batch:
                enough = members[int(sampler.labels[image]), int(sampler.modality[image])] >= k
                assert drawn[image] == 1 or not enough

    @settings(max_examples=40, deadline=None)
    @given(samplers("identity_uniform"))
    def test_identity_uniform_shows_every_identity_once(self, sampler):
        classes, p = len(np.unique(sampler.labels)), sampler.identities
        assert len(sampler) == classes // p
        labels = sampler.labels[sampler.plan()[:, :: sampler.images // 2]]
        assert len(set(labels[:, :p].ravel().tolist())) == classes // p * p

    @settings(max_examples=60, deadline=None)
    @given(data_sets(), st.integers(0, 99), st.booleans(), st.data())
    def test_random(self, data, seed, replay, draw):
        labels, modality = data
        counts = np.bincount(modality)
        p = draw.draw(st.integers(1, int(counts.max())))
        sampler = make_sampler(
            "random", labels, modality, identities=p, images=2, seed=seed, replay=replay
        )
        batches = np.array(list(sampler))
        assert len(batches) == len(sampler) == counts.max() // p
        for half, m in ((batches[:, :p], VISIBLE), (batches[:, p:], INFRARED)):
            assert (modality[half] == m).all()
            times = Counter(half.ravel().tolist())
            # Repeated in whole permutations: no image is more than one or two ahead.
            assert max(times.values()) <= -(-half.size // counts[m]) + 1
            if counts[m] == counts.max():
                assert max(times.values()) == 1
        assert sampler.paired == 0

    @pytest.mark.parametrize("longer", [VISIBLE, INFRARED])
    def test_random_repeats_either_modality(self, longer):
        modality = np.repeat([longer, 1 - longer], [40, 7])
        labels = np.zeros(47, dtype=int)
        sampler = make_sampler("random", labels, modality, identities=4, images=2, seed=0)
        times = Counter(flat(sampler).tolist())
        assert len(sampler) == 10
        assert [times[i] for i in range(40)] == [1] * 40
        short = [times[i] for i in range(40, 47)]
        assert sum(short) == 40
        assert set(short) == {5, 6}

    @settings(max_examples=40, deadline=None)
    @given(st.sampled_from(sorted({*SAMPLERS} - {"uniform"})).flatmap(samplers), st.integers(1, 40))
    def test_batches_of_an_epoch(self, sampler, batches):
        one = make_sampler(
            sampler.name, sampler.labels, sampler.modality, identities=sampler.identities,
            images=sampler.images, seed=sampler.seed, replay=sampler.replay, batches=batches,
        )  # fmt: skip
        assert len(one) == len(list(one)) == batches
        common = min(batches, len(sampler))
        np.testing.assert_array_equal(one.plan()[:common], sampler.plan()[:common])


class TestUniform:
    def sampler(self, classes=11, *, p=3, pixel=2, images=4, seed=1, **change):
        random = np.random.default_rng(4)
        labels = np.repeat(np.arange(classes), 9)
        modality = np.tile([0, 1, 0, 1, 0, 0, 1, 0, 1], classes)
        order = random.permutation(len(labels))
        return make_sampler(
            "uniform", labels[order], modality[order], identities=p, images=images, seed=seed,
            pixel_identities=pixel, **change,
        )  # fmt: skip

    @pytest.mark.parametrize("replay", [False, True])
    def test_rows(self, replay):
        sampler = self.sampler(batches=7, replay=replay)
        assert sampler.paired == 2
        for batch in sampler:
            assert len(batch) == 2 * 3 * 2 + 2 * 2 * 2
            labels, modality = sampler.labels[batch], sampler.modality[batch]
            for first, count in ((0, 3), (12, 2)):
                part = labels[first : first + 4 * count].reshape(2, count, 2)
                assert (part == part[:1, :, :1]).all()
                assert len(set(part[0, :, 0].tolist())) == count
            expected = np.repeat([0, 1, 0, 1], [6, 6, 4, 4])
            np.testing.assert_array_equal(modality, expected)

    @pytest.mark.parametrize("replay", [False, True])
    def test_streams_go_on_through_the_epochs(self, replay):
        short, long = (
            self.sampler(batches=4, replay=replay),
            self.sampler(batches=20, replay=replay),
        )
        pieces = []
        for epoch in range(1, 6):
            short.set_epoch(epoch)
            pieces.append(short.plan())
        np.testing.assert_array_equal(np.concatenate(pieces), long.plan())
        # A pass of the features is 3 batches, of the pixels 5: all identities but the last group.
        labels = long.labels[long.plan()]
        for number in range(6):
            seen = labels[3 * number : 3 * number + 3, 0:6:2].ravel().tolist()
            assert len(set(seen)) == len(seen) == 9
        for number in range(4):
            seen = labels[5 * number : 5 * number + 5, 12:16:2].ravel().tolist()
            assert len(set(seen)) == len(seen) == 10
        # Any epoch alone, and going back.
        alone = self.sampler(batches=4, replay=replay)
        for epoch in (4, 2, 5):
            alone.set_epoch(epoch)
            np.testing.assert_array_equal(alone.plan(), pieces[epoch - 1])

    def test_the_first_stream_is_the_same_with_and_without_pixels(self):
        with_pixels, without = self.sampler(batches=9), self.sampler(pixel=0, batches=9)
        np.testing.assert_array_equal(with_pixels.plan()[:, :12], without.plan())

    def test_the_streams_are_independent(self):
        plan = self.sampler(p=3, pixel=3, batches=9).plan()
        assert (plan[:, :12] != plan[:, 12:]).any(axis=1).all()

    def test_default_length_is_a_pass_of_the_features(self):
        assert len(self.sampler()) == 3
        assert len(self.sampler(p=11, pixel=1)) == 1

    def test_seeds(self):
        labels, modality = np.repeat(np.arange(4), 4), np.tile([0, 1], 8)
        arguments = {"identities": 2, "images": 2, "seed": 1}
        with pytest.raises(ValueError, match="seeds: expected at least one, and with replay only"):
            Uniform(labels, modality, **arguments, seeds=[1])
        with pytest.raises(ValueError, match="seeds"):
            Uniform(labels, modality, **arguments, replay=True, seeds=[])
        # The list starts over.
        sampler = Uniform(labels, modality, **arguments, replay=True, seeds=[7], batches=8)
        order = sampler.labels[sampler.plan()[:, :2]].reshape(4, 4)
        assert (order == order[0]).all()

    def test_a_foreign_state_is_refused(self):
        sampler = self.sampler(batches=7)
        for change in ({"batches": 8}, {"pixel": 1}, {"pixel": 0}):
            other = self.sampler(**{"batches": 7, **change})
            with pytest.raises(ValueError, match=r"sampler state: (batches|pixel_identities)"):
                other.load_state_dict(sampler.state_dict())

    def test_an_older_state_is_taken(self):
        sampler = self.sampler(pixel=0)
        state = sampler.state_dict()
        for name in ("batches", "pixel_identities"):
            del state[name]
        sampler.load_state_dict({**state, "batch": 1})
        assert sampler.cursor == 1


class TestRefusals:
    def test_pixels_are_for_uniform(self):
        with pytest.raises(ValueError, match=r"only the sampler uniform .* got 2 for norm_triplet"):
            make_sampler(
                "norm_triplet", [0, 0], [0, 1], identities=1, images=2, seed=0, pixel_identities=2
            )

    @pytest.mark.parametrize("name", ["batches", "pixel_identities"])
    def test_negative(self, name):
        with pytest.raises(ValueError, match=f"{name}: expected 0 or more, got -1"):
            make_sampler("uniform", [0, 0], [0, 1], identities=1, images=2, seed=0, **{name: -1})

    def test_too_few_identities_for_the_pixels(self):
        with pytest.raises(DataError, match="3 identities cannot be drawn from 2 training"):
            make_sampler(
                "uniform", [0, 0, 1, 1], [0, 1, 0, 1], identities=1, images=2, seed=0,
                pixel_identities=3,
            )  # fmt: skip

    def test_too_few_images_for_random(self):
        with pytest.raises(
            DataError, match=r"batch of 6 \+ 6 images .* from 2 visible and 5 infrared images"
        ):
            make_sampler("random", [0] * 7, [0, 0, 1, 1, 1, 1, 1], identities=3, images=4, seed=0)
        with pytest.raises(DataError, match="from 0 visible and 0 infrared"):
            make_sampler("random", [], [], identities=1, images=2, seed=0)
