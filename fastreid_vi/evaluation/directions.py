"""Which modality searches which, told by the folders in the paths of the images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, TypeAlias

from fastreid_vi.evaluation.arrays import choice
from fastreid_vi.evaluation.galleries import Embeddings

Direction = Literal["ir_to_vis", "vis_to_ir"]
Side: TypeAlias = Literal["visible", "infrared"]

DIRECTION_NAMES: Final[dict[str, str]] = {
    "ir_to_vis": "infrared to visible",
    "vis_to_ir": "visible to infrared",
    "vis_to_ir/released": "visible to infrared, as released",
}
# Folder -> modality, in the layouts of RegDB and LLCM.
FOLDERS: Final[Mapping[str, Side]] = {
    "Visible": "visible",
    "Thermal": "infrared",
    "vis": "visible",
    "nir": "infrared",
    "test_vis": "visible",
    "test_nir": "infrared",
}
_OTHER: Final[dict[str, Side]] = {"visible": "infrared", "infrared": "visible"}


def side_of(path: str) -> Side | None:
    """The modality of an image by the innermost folder that tells it; None if none does."""
    folders = path.replace("\\", "/").split("/")[:-1]
    return next((FOLDERS[folder] for folder in reversed(folders) if folder in FOLDERS), None)


def check_direction(
    query: Embeddings, gallery: Embeddings, direction: Direction | None
) -> Direction | None:
    """The direction of a search, checked against every path.

    Args:
        query, gallery: images; without paths, or with paths that do not tell, they fit anything.
        direction: as asked for; None takes the one that the paths tell.
    Returns:
        The direction; None if neither the caller nor the paths know it.
    Raises:
        ValueError: an unknown direction, query or gallery of the wrong modality, or of both.
    """
    if direction is not None:
        choice("direction", direction, Direction)
    searching = _side("query", query, _query_side(direction), direction)
    other = _OTHER[searching] if searching is not None else None
    searched = _side("gallery", gallery, other, direction)
    if searching is None and searched is not None:
        searching = _OTHER[searched]
    if searching is None:
        return direction
    return "vis_to_ir" if searching == "visible" else "ir_to_vis"


def _query_side(direction: Direction | None) -> Side | None:
    if direction is None:
        return None
    return "visible" if direction == "vis_to_ir" else "infrared"


def _side(
    name: str, images: Embeddings, expected: Side | None, direction: Direction | None
) -> Side | None:
    """The modality of all images, which must be `expected` where that is known."""
    if images.paths is not None and len(images.paths) != len(images.ids):
        raise ValueError(f"{name}.paths: expected {len(images.ids)} paths, got {len(images.paths)}")
    for path in images.paths if images.paths is not None else ():
        found = side_of(str(path))
        if found is None:
            continue
        if expected is None:
            expected = found
        if found != expected:
            asked = f", as direction {direction!r} asks" if direction is not None else ""
            raise ValueError(f"{name}: expected {expected} images{asked}, got {path} ({found})")
    return expected
