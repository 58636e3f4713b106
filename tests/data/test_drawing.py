"""What the drawn pictures may tell: identity in shape and texture, never infrared from colour."""

from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fastreid_vi.data.drawing.camera import CAMERAS, INFRARED_CAMERAS, draw_walk
from fastreid_vi.data.drawing.fabric import MATERIALS, draw_fabric
from fastreid_vi.data.drawing.pedestrian import Person, draw_person
from fastreid_vi.data.drawing.scene import photograph


def picture(person: Person, cam: int, *, height: int = 64, width: int = 32) -> np.ndarray:
    walk = draw_walk(np.random.default_rng(5), CAMERAS[cam])
    rng = np.random.default_rng(6)
    return photograph(person, cam, walk, 0, rng, seed=0, height=height, width=width)


class TestPictures:
    """Identity shows in shape, texture and reflectance; colour says nothing about infrared."""

    def test_infrared_does_not_see_colour(self) -> None:
        person = draw_person(np.random.default_rng(3))
        other = draw_person(np.random.default_rng(4))
        dyed = tuple(
            dataclasses.replace(mine, colours=theirs.colours)
            for mine, theirs in zip(person.fabrics, other.fabrics, strict=True)
        )
        changed = dataclasses.replace(person, fabrics=dyed)
        for cam in CAMERAS:
            same = np.array_equal(picture(person, cam), picture(changed, cam))
            assert same == (cam in INFRARED_CAMERAS), cam

    def test_visible_cameras_do_not_see_infrared_reflectance(self) -> None:
        person = draw_person(np.random.default_rng(3))
        coated = tuple(
            dataclasses.replace(f, reflectances=tuple(0.9 - 0.8 * r for r in f.reflectances))
            for f in person.fabrics
        )
        changed = dataclasses.replace(person, fabrics=coated)
        for cam in CAMERAS:
            same = np.array_equal(picture(person, cam), picture(changed, cam))
            assert same == (cam not in INFRARED_CAMERAS), cam

    def test_colour_and_reflectance_are_uncorrelated(self) -> None:
        rng = np.random.default_rng(0)
        drawn = [draw_fabric(rng, {"plain": 1}, tuple(MATERIALS), length=0.6) for _ in range(2000)]
        reflectance = np.array([f.reflectances for f in drawn])
        for weights in ((0.3, 0.6, 0.1), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
            tone = np.array([f.colours for f in drawn]) @ np.array(weights)
            for dye in range(3):
                r = np.corrcoef(tone[:, dye], reflectance[:, dye])[0, 1]
                assert abs(r) < 0.1  # four standard errors are 0.09
        contrast = np.diff(np.array([f.colours for f in drawn])[:, :2, 1])[:, 0]
        assert abs(np.corrcoef(contrast, np.diff(reflectance[:, :2])[:, 0])[0, 1]) < 0.1

    def test_material_decides_the_infrared_brightness(self) -> None:
        rng = np.random.default_rng(0)
        means = {
            name: np.mean(
                [
                    draw_fabric(rng, {"plain": 1}, (name,), length=0.6).reflectances[0]
                    for _ in range(200)
                ]
            )
            for name in MATERIALS
        }
        assert means["leather"] < 0.25 < 0.4 < means["cotton"]

    def test_people_differ_in_shape_alone(self) -> None:
        """With the same fabrics on everybody, infrared pictures still tell people apart."""
        people = [draw_person(np.random.default_rng(k)) for k in range(6)]
        dressed = [dataclasses.replace(p, fabrics=people[0].fabrics) for p in people]
        shots = [picture(p, 3).astype(float) for p in dressed]
        for k, one in enumerate(shots):
            for other in shots[k + 1 :]:
                assert np.abs(one - other).mean() > 4

    def test_most_people_are_unlike_in_what_they_wear(self) -> None:
        people = [draw_person(np.random.default_rng(k)) for k in range(200)]
        for trait in ("hair", "hat", "glasses", "bag", "top", "sleeves", "bottom", "arms"):
            counts = np.unique([getattr(p, trait) for p in people], return_counts=True)[1]
            assert len(counts) >= 3, trait
            assert counts.max() < 0.75 * len(people), trait
        assert len({p.fabrics[3].pattern for p in people}) >= 12

    def test_the_person_fills_the_middle(self) -> None:
        """The figure changes the middle of the picture, not its upper corners."""
        changed = np.zeros((64, 32))
        for k in range(20):
            person = draw_person(np.random.default_rng(k))
            dark = tuple(
                dataclasses.replace(f, colours=((0.0, 0.0, 0.0),) * 3, gloss=0.0)
                for f in person.fabrics
            )
            black = picture(dataclasses.replace(person, fabrics=dark), 4)
            white = tuple(
                dataclasses.replace(f, colours=((1.0, 1.0, 1.0),) * 3, gloss=0.0)
                for f in person.fabrics
            )
            bright = picture(dataclasses.replace(person, fabrics=white), 4)
            changed += (np.abs(bright.astype(int) - black).max(2) > 40) / 20
        assert changed[20:32, 13:19].min() > 0.9
        assert changed[:16, :4].max() < 0.2
        assert 0.1 < changed.mean() < 0.45

    @given(st.integers(16, 90), st.integers(16, 90), st.sampled_from(sorted(CAMERAS)))
    @settings(max_examples=12, deadline=None)
    def test_any_size(self, height: int, width: int, cam: int) -> None:
        shot = picture(draw_person(np.random.default_rng(1)), cam, height=height, width=width)
        assert shot.shape == (height, width, 3)
        assert shot.dtype == np.uint8
        assert shot.std() > 5

    def test_cameras_do_not_look_alike(self) -> None:
        person = draw_person(np.random.default_rng(2))
        shots = [picture(person, cam).astype(float) for cam in CAMERAS]
        for k, one in enumerate(shots):
            for other in shots[k + 1 :]:
                assert np.abs(one - other).mean() > 8
