"""Scoring a method while it trains, and saying which epoch was the best and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch

from fastreid_vi.config import INFRARED, VISIBLE, Recipe
from fastreid_vi.data.images import ImageList
from fastreid_vi.data.loader import eval_loader
from fastreid_vi.evaluation import (
    Embeddings,
    RankMetrics,
    evaluate_llcm,
    evaluate_sysu,
    regdb_table,
)
from fastreid_vi.methods.base import Method
from fastreid_vi.train.embed import embed_all
from fastreid_vi.train.errors import TrainError
from fastreid_vi.train.state import undisturbed

EvalOn = Literal["validation", "test"]
_RANKS = (1, 5, 10, 20)
_TRIALS = 10
# What an evaluation during training measures, in words.
_PROTOCOLS = {
    "sysu": f"infrared queries, visible gallery, all-search, single-shot, {_TRIALS} galleries",
    "regdb": "mean of both directions, all images of the gallery",
    "llcm": "infrared queries, visible gallery, one image of each person and camera, "
    f"{_TRIALS} galleries",
}


class TrainingData(Protocol):
    """What training needs of a data set; `data.SysuMM01`, `RegDB` and `LLCM` are.

    The test split of SYSU-MM01 also needs `permutations`: (camera, pid) -> image numbers that each
    trial takes.
    """

    @property
    def root(self) -> Path:
        """Folder of the data set."""

    @property
    def train(self) -> ImageList:
        """Labelled training images."""

    @property
    def query(self) -> ImageList:
        """Test queries."""

    @property
    def gallery(self) -> ImageList:
        """Test gallery pool."""

    def hold_out(self, n: int, seed: int) -> tuple[ImageList, ImageList]:
        """Split `n` training identities off."""


class TrainingSplit(NamedTuple):
    """Images to train on, and those of the held-out identities."""

    train: ImageList
    validation: ImageList | None

    @property
    def num_ids(self) -> int:
        """Class count: what `methods.create` needs."""
        return len(np.unique(self.train.labels))


def training_split(dataset: TrainingData, recipe: Recipe) -> TrainingSplit:
    """The split that `train` uses: `data.validation` identities held out, drawn by the run's seed.

    Raises:
        DataError: fewer identities than that.
    """
    if recipe.data.validation == 0:
        return TrainingSplit(dataset.train, None)
    return TrainingSplit(*dataset.hold_out(recipe.data.validation, recipe.run.seed))


class Judge:
    """Scores a method by its data set's protocol.

    Infrared queries search visible galleries. SYSU-MM01: all-search, single-shot, ten galleries,
    drawn with the seeds 0..9 on the validation split, by the data set's permutations on the test
    split. LLCM: ten galleries. RegDB: the mean of both directions, as MPANet and MCJA choose.

    Args:
        dataset: the data set that is trained on.
        validation: images of held-out identities, or None.
        recipe: the run.
        eval_on: "validation", or "test" when that was asked for by name.
        device: where the method will be, for images that come from a pack.
    Raises:
        TrainError: the validation split lacks a modality, the test split its permutations, or no
            query has a match.
    """

    def __init__(
        self,
        dataset: TrainingData,
        validation: ImageList | None,
        recipe: Recipe,
        eval_on: EvalOn,
        *,
        device: torch.device | None = None,
    ) -> None:
        self.split, self._recipe = eval_on, recipe
        self._permutations: Any = "random"
        lists: list[ImageList] = []
        if eval_on == "test":
            lists = [dataset.query, dataset.gallery]
            self._permutations = getattr(dataset, "permutations", None)
            if self._permutations is None and recipe.dataset == "sysu":
                raise TrainError("dataset: the test split of SYSU-MM01 needs permutations")
        elif eval_on != "validation":
            raise ValueError(f'eval_on: expected "validation" or "test", got {eval_on!r}')
        elif validation is not None:
            lists = [validation.select(validation.modality == m) for m in (INFRARED, VISIBLE)]
            if not all(map(len, lists)):
                raise TrainError("validation: the held-out identities lack a modality")
        if lists:
            self._refuse_unscorable(lists)
        size = recipe.data.identities * recipe.data.images
        # Made once: a loader may keep its decoded images.
        self._loaders = [
            (eval_loader(i, recipe.data, batch_size=size, device=device), i) for i in lists
        ]

    def _refuse_unscorable(self, lists: list[ImageList]) -> None:
        """Score zeros: a split without a valid query must not be found out after an epoch."""
        blank = [Embeddings(np.zeros((len(i), 1)), i.pids, i.cams, i.paths) for i in lists]
        try:
            self._evaluate(*blank)
        except ValueError as error:
            raise TrainError(f"{self.split}: cannot be scored: {error}") from error

    def due(self, epoch: int) -> bool:
        """Whether `epoch` ends with an evaluation: every `eval_every` epochs and after the last."""
        if not self._loaders:
            return False
        every = self._recipe.run.eval_every
        return epoch == self._recipe.schedule.epochs or (every > 0 and epoch % every == 0)

    def score(self, method: Method, device: torch.device) -> dict[str, float]:
        """R1, R5, R10, R20, mAP and mINP as fractions; no generator moves."""
        run = self._recipe.run
        with undisturbed(device):
            query, gallery = (
                embed_all(
                    method,
                    loader,
                    images,
                    device=device,
                    precision=run.precision,
                    channels_last=run.channels_last,
                )
                for loader, images in self._loaders
            )
        means = self._evaluate(query, gallery)
        ranks = {f"R{k}": float(np.mean([m.cmc[k - 1] for m in means])) for k in _RANKS}
        precision, penalty = (np.mean([getattr(m, n) for m in means]) for n in ("mAP", "mINP"))
        return {**ranks, "mAP": float(precision), "mINP": float(penalty)}

    def _evaluate(self, query: Embeddings, gallery: Embeddings) -> list[RankMetrics]:
        """Of each direction that counts."""
        if self._recipe.dataset == "regdb":
            return [evaluation.mean for evaluation in regdb_table(query, gallery).values()]
        if self._recipe.dataset == "llcm":
            return [evaluate_llcm(query, gallery, trials=_TRIALS, direction="ir_to_vis").mean]
        found = evaluate_sysu(
            query, gallery, self._permutations, mode="all", shots=1, trials=_TRIALS
        )
        return [found.mean]

    def verdict(self, evaluations: list[dict[str, Any]], epoch: int, step: int) -> dict[str, Any]:
        """best.json: the best evaluated epoch, or the last one, and how it was chosen.

        Args:
            evaluations: `epoch`, `step` and `metrics` of each evaluation so far.
            epoch: last finished epoch.
            step: steps so far.
        """
        best = best_of(evaluations)
        if best is None:
            chosen = (
                "the last epoch: no validation split (data.validation = 0), nothing was evaluated"
            )
            return {
                "epoch": epoch,
                "step": step,
                "metrics": None,
                "chosen": chosen,
                "evaluations": [],
            }
        if self.split == "test":
            where = "the TEST split, as asked: its figures are not an unbiased estimate"
        else:
            where = f"{self._recipe.data.validation} training identities held out for validation"
        chosen = (
            f"highest R1, then mAP, then the later epoch, of {len(evaluations)} evaluated; "
            f"{_PROTOCOLS[self._recipe.dataset]}; on {where}"
        )
        return {**best, "chosen": chosen, "evaluations": evaluations}


def best_of(evaluations: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Highest R1, then mAP, then the later epoch: it has learnt longer and at a lower rate."""
    return max(
        evaluations,
        key=lambda e: (e["metrics"]["R1"], e["metrics"]["mAP"], e["epoch"]),
        default=None,
    )
