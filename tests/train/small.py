"""A method and a data set that train in a second; as a script, training runs to be killed."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastreid_vi.config import (
    Batch,
    DataConfig,
    OptimConfig,
    Recipe,
    RunConfig,
    ScheduleConfig,
)
from fastreid_vi.data import Permutations, SysuMM01
from fastreid_vi.methods.base import Losses, Method
from fastreid_vi.train import Interrupted, seed_everything, train, training_split

CAMERAS = {1: 2, 2: 2, 3: 3, 4: 2, 5: 2, 6: 3}  # camera -> images of a person


class Small(Method):
    """Convolution, batch norm, dropout, classifier: weights, buffers and random draws."""

    def __init__(self, num_ids: int, width: int = 8) -> None:
        super().__init__()
        self.num_ids, self.embed_dim = num_ids, width
        self.backbone = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(width, num_ids)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.epochs: list[int] = []

    def _pooled(self, images: Tensor) -> Tensor:
        return self.backbone(images).float().mean(dim=(2, 3))

    def test_features(self, images: Tensor, modality: Tensor) -> Tensor:
        return self._pooled(images)

    def training_step(self, batch: Batch, phase: str = "main") -> Losses:
        self.check_batch(batch, phase)
        logits = self.classifier(self.dropout(self._pooled(batch.images)))
        identity = nn.functional.cross_entropy(logits.float(), batch.labels)
        size = logits.float().square().mean()
        return Losses({"id": identity, "size": size.detach()}, identity + 0.01 * size)

    def begin_epoch(self, epoch: int) -> None:
        super().begin_epoch(epoch)
        self.epochs.append(epoch)

    def after_step(self) -> None:
        self.steps += 1


@dataclass(frozen=True, kw_only=True)
class SmallOptions:
    width: int = 8


@dataclass(frozen=True, kw_only=True)
class SmallRecipe(Recipe):
    model: SmallOptions = field(default_factory=SmallOptions)


def recipe(**run: Any) -> SmallRecipe:
    data = DataConfig(
        height=24, width=12, identities=3, images=4, sampler="identity_random",
        pad=2, erase=0.5, workers=0, validation=3,
    )  # fmt: skip
    return SmallRecipe(
        method="small",
        dataset="sysu",
        data=data,
        optim=OptimConfig(lr=0.01, clip_norm=5.0),
        schedule=ScheduleConfig(epochs=3, milestones=(2,)),
        run=RunConfig(**{"eval_every": 1, "log_every": 2, **run}),
    )


def write_tree(root: Path, train: int = 12, test: int = 4) -> Path:
    """A data set in SYSU-MM01's layout, 24 x 12 pixels, a colour per person."""
    draw = np.random.default_rng(7)
    pids = [2 * i + 3 for i in range(train + test)]
    lists = {"train": pids[: train - 2], "val": pids[train - 2 : train], "test": pids[train:]}
    (root / "exp").mkdir(parents=True)
    for name, ids in lists.items():
        (root / "exp" / f"{name}_id.txt").write_text(",".join(f"{pid}" for pid in ids) + "\n")
    for pid in pids:
        colours = draw.integers(0, 200, (2, 3))
        for cam, count in CAMERAS.items():
            colour = colours[int(cam in (3, 6))] // 2 + colours[0] // 2
            folder = root / f"cam{cam}" / f"{pid:04d}"
            folder.mkdir(parents=True)
            for number in range(1, count + 1):
                noise = draw.integers(0, 56, (24, 12, 3))
                Image.fromarray((colour + noise).astype(np.uint8)).save(
                    folder / f"{number:04d}.jpg"
                )
    values = {
        (cam, pid): np.stack([draw.permutation(count) + 1 for _ in range(10)])
        for pid in pids
        for cam, count in CAMERAS.items()
    }
    Permutations(values).to_mat(root / "exp" / "rand_perm_cam.mat")
    return root


def build(dataset: SysuMM01, chosen: SmallRecipe) -> Small:
    seed_everything(chosen.run.seed)
    return Small(training_split(dataset, chosen).num_ids, chosen.model.width)


def run(root: Path, run_dir: Path, chosen: SmallRecipe | None = None, **options: Any) -> Any:
    """Train the small method as the command line would."""
    chosen = chosen or recipe()
    dataset = SysuMM01(root)
    options = {"device": "cpu", "display": "none", **options}
    return train(build(dataset, chosen), chosen, dataset, run_dir, **options)


def chosen_by(flags: tuple[str, ...]) -> SmallRecipe:
    chosen = recipe(checkpoint_steps=2)
    if "workers" in flags:
        chosen = replace(chosen, data=replace(chosen.data, workers=2))
    if "endless" in flags:
        chosen = replace(chosen, schedule=replace(chosen.schedule, epochs=10_000))
    return chosen


def one_run(root: Path, run_dir: Path, *flags: str) -> int:
    try:
        run(root, run_dir, chosen_by(flags), resume="resume" in flags, resume_hint="--resume")
    except Interrupted as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def chain(root: Path, run_dir: Path, *flags: str) -> int:
    """Run and resume in child processes that die by SIGKILL, one later than the other.

    Number n dies before its n-th disk operation, or at a random moment of its first n * 50 ms.
    """
    one_run(root, run_dir.with_name("warm"), *flags)  # imports and caches, once for all children
    dice = random.Random(5)
    for n in range(1, 1000):
        if (child := os.fork()) == 0:
            if "moments" not in flags:
                die_before_operation(n)
            resume = ("resume",) if run_dir.is_dir() else ()
            os._exit(one_run(root, run_dir, *flags, *resume))
        if "moments" in flags:
            time.sleep(dice.uniform(0, 0.05 * n))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status):
            print(n - 1, "kills")
            return os.waitstatus_to_exitcode(status)
    return 1


def die_before_operation(n: int) -> None:
    left = n

    def counted(real: Any) -> Any:
        def operation(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return operation

    for name in ("fsync", "mkdir", "rename", "replace", "symlink", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    command, root, run_dir, *flags = sys.argv[1:]
    sys.exit({"run": one_run, "chain": chain}[command](Path(root), Path(run_dir), *flags))
