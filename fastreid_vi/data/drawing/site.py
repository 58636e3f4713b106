"""Where the stand-in cameras of the three data sets hang, and what each of them sees."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from fastreid_vi.config import INFRARED, VISIBLE
from fastreid_vi.data.drawing.backdrop import PLACES
from fastreid_vi.data.drawing.camera import CAMERAS, INDOOR_CAMERAS, INFRARED_CAMERAS, Camera


@dataclass(frozen=True, kw_only=True)
class Site:
    """A camera in its place."""

    camera: Camera
    infrared: bool
    indoor: bool
    place: str
    """Kind of backdrop, one of `PLACES`."""
    layout: int
    """Seeds the backdrop: sites of one layout and place share it."""
    softness: float
    """Blur of the backdrop, share of the height."""

    def turned(self) -> Site:
        """The same site with people walking away from the camera."""
        headings = tuple((angle + math.pi, weight) for angle, weight in self.camera.headings)
        return replace(self, camera=replace(self.camera, headings=headings))


def _sysu(number: int) -> Site:
    place = PLACES[number]
    return Site(
        camera=CAMERAS[number],
        infrared=number in INFRARED_CAMERAS,
        indoor=number in INDOOR_CAMERAS,
        place=place,
        layout=list(PLACES.values()).index(place),
        softness=0.012 + 0.012 * (number % 3),
    )


SYSU_SITES = {number: _sysu(number) for number in CAMERAS}

# A visible and a thermal lens side by side; the thermal image is soft and noisy.
_REGDB = replace(SYSU_SITES[4], layout=50)
_THERMAL = replace(CAMERAS[4], exposure=1.1, contrast=1.3, blur=0.004, noise=0.009)
REGDB_SITES = {
    VISIBLE: _REGDB,
    INFRARED: replace(_REGDB, camera=_THERMAL, infrared=True),
}


def _llcm(number: int, modality: int) -> Site:
    """Low light: dark, grainy pictures by day, a lamp by night; the same camera in one place."""
    base = SYSU_SITES[(1, 4, 2, 5)[number % 4]]
    gain = (0.62, 0.9, 0.74)[number % 3]
    night = modality == INFRARED
    camera = replace(
        base.camera,
        exposure=base.camera.exposure * (math.sqrt(gain) if night else gain),
        contrast=base.camera.contrast * (0.92, 1.0, 1.1)[number // 3 % 3],
        noise=base.camera.noise * (1.6 if night else 2.2),
    )
    return replace(base, camera=camera, infrared=night, layout=60 + number)


# (modality, camera); by night camera 3 is off.
LLCM_SITES = {
    (modality, number): _llcm(number, modality)
    for modality in (VISIBLE, INFRARED)
    for number in range(1, 10)
    if (modality, number) != (INFRARED, 3)
}
