"""The index of RegDB: ten halvings of its persons, each with four lists."""

from __future__ import annotations

import os
import re
from pathlib import Path

from fastreid_vi.config import INFRARED, VISIBLE
from fastreid_vi.data.images import DataError
from fastreid_vi.data.index import Index
from fastreid_vi.data.lists import (
    LabelOrder,
    Line,
    ListOrder,
    Row,
    check_orders,
    ordered,
    read_list,
    refuse_shared,
    require_folders,
    training_labels,
)

TRIALS = 10
# Modality -> name in the lists, folder, camera number of the released code.
SIDES = {VISIBLE: ("visible", "Visible", 2), INFRARED: ("thermal", "Thermal", 3)}

_IMAGE = re.compile(r".*_([0-9]+)_[0-9]+\.[a-z]+", re.IGNORECASE)


class RegDB(Index):
    """RegDB, or any data set with its layout, in one of its ten trials.

    Args:
        root: folder with `Visible`, `Thermal` and `idx`.
        trial: which halving of the persons, 1 to 10. A full result trains a model on each.
        label_order: "sorted" numbers the training pids ascending (MPANet, MCJA); "file" takes the
            labels of the lists (AGW, LbA).
        image_order: "path" sorts the paths as text, so that Thermal precedes Visible and person 10
            follows person 1 (MPANet, MCJA); "file" keeps the lists, visible first (AGW, LbA);
            "identity" by pid and image with the modalities kept apart, visible first.
        skip_broken: read every image and leave the unreadable ones out, with a warning that counts
            them; otherwise the first batch that needs one stops with its name.
    Attributes:
        trial: as given.
        train: labelled training images, cameras 2 (visible) and 3 (thermal); `query`: thermal test
            images; `gallery`: visible test images; `num_ids`: training labels. The other direction
            of the test exchanges query and gallery.
    Raises:
        DataError: no such trial, a missing folder or list, a line that names no image, a person in
            both halves; the message names the first offender.
    Spec: datasets 2.
    """

    name = "regdb"

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        trial: int = 1,
        label_order: LabelOrder = "sorted",
        image_order: ListOrder = "path",
        skip_broken: bool = False,
    ) -> None:
        check_orders(label_order, image_order)
        check_trial(trial)
        self.root, self.trial = Path(root), trial
        require_folders(self.root, [folder for _, folder, _ in SIDES.values()], "RegDB")
        train, test = (read_trial(self.root, trial, split) for split in ("train", "test"))
        refuse_shared(
            [line for lines in train.values() for line in lines],
            [line.pid for lines in test.values() for line in lines],
            self.root,
            f"a training and a test list of trial {trial}",
        )
        by_name = {list_name("train", m, trial): lines for m, lines in train.items()}
        labels = training_labels(by_name, label_order, self.root)
        self.num_ids = len(labels)
        rows = [row for modality, lines in train.items() for row in _rows(lines, modality)]
        self.train = ordered(self.root, rows, image_order, labels)
        self.query, self.gallery = (
            ordered(self.root, _rows(test[m], m), image_order) for m in (INFRARED, VISIBLE)
        )
        if skip_broken:
            self._leave_out_broken()


def check_trial(trial: int) -> None:
    """Raise a DataError unless it is one of the ten."""
    if isinstance(trial, bool) or not isinstance(trial, int) or not 1 <= trial <= TRIALS:
        raise DataError(f"trial: expected 1 to {TRIALS}, got {trial!r}")


def list_name(split: str, modality: int, trial: int) -> str:
    """ "train_visible_1" and the like."""
    return f"{split}_{SIDES[modality][0]}_{trial}"


def read_trial(root: Path, trial: int, split: str) -> dict[int, list[Line]]:
    """Modality -> lines of its list.

    Raises:
        DataError: see `lists.read_list`.
    """
    return {
        modality: read_list(root, list_name(split, modality, trial), folder)
        for modality, (_, folder, _) in SIDES.items()
    }


def _rows(lines: list[Line], modality: int) -> list[Row]:
    rows = []
    for line in lines:
        match = _IMAGE.fullmatch(line.path)
        number = int(match[1]) if match else 0
        rows.append(Row(modality, SIDES[modality][2], line.pid, number, line.path))
    return rows
