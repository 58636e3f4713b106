"""The judge: which protocol scores which data set, and what it refuses before training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from fastreid_vi.data import LLCM, ImageList, RegDB, SysuMM01
from fastreid_vi.evaluation import evaluate_llcm, evaluate_regdb
from fastreid_vi.train import TrainError, embed_all
from fastreid_vi.train.validate import Judge, best_of
from tests.data.listed import write_llcm, write_regdb
from tests.train.small import Small, recipe


def of(dataset: str):
    chosen = recipe()
    return dataclasses.replace(chosen, dataset=dataset, data=dataclasses.replace(chosen.data))


@pytest.mark.parametrize("name", ["regdb", "llcm"])
def test_the_test_split_is_scored_by_its_protocol(name: str, tmp_path: Path) -> None:
    from fastreid_vi.data import eval_loader

    data = RegDB(write_regdb(tmp_path)) if name == "regdb" else LLCM(write_llcm(tmp_path))
    torch.manual_seed(0)
    method, device = Small(3).eval(), torch.device("cpu")
    found = Judge(data, None, of(name), "test").score(method, device)
    sides = [
        embed_all(method, eval_loader(i, of(name).data, batch_size=4), i, device=device)
        for i in (data.query, data.gallery)
    ]
    if name == "regdb":  # as MPANet and MCJA do
        means = [evaluate_regdb(*pair).mean for pair in (sides, sides[::-1])]
    else:
        means = [evaluate_llcm(*sides).mean]
    assert found.pop("mAP") == pytest.approx(np.mean([mean.mAP for mean in means]), abs=1e-12)
    assert found.pop("mINP") == pytest.approx(np.mean([mean.mINP for mean in means]), abs=1e-12)
    cmc = np.mean([mean.cmc for mean in means], axis=0)
    assert found == pytest.approx({f"R{k}": cmc[k - 1] for k in (1, 5, 10, 20)})


def test_held_out_persons_of_each_layout(tmp_path: Path) -> None:
    for data, name in (
        (RegDB(write_regdb(tmp_path / "r")), "regdb"),
        (LLCM(write_llcm(tmp_path / "l")), "llcm"),
    ):
        held = data.train.select(np.isin(data.train.pids, np.unique(data.train.pids)[:2]))
        judge = Judge(data, held, of(name), "validation")
        assert 0 < judge.score(Small(3).eval(), torch.device("cpu"))["R1"] <= 1


def test_persons_whom_no_query_can_find_are_refused_before_training(tmp_path: Path) -> None:
    data = LLCM(write_llcm(tmp_path))
    # Person 12 by day and by night, camera 9 alone: the camera rule leaves no match.
    chosen = (data.train.pids == 12) & (data.train.cams == 9)
    with pytest.raises(TrainError, match="validation: cannot be scored: no valid query"):
        Judge(data, data.train.select(chosen), of("llcm"), "validation")


def test_what_a_judge_needs(tree: Path) -> None:
    data = SysuMM01(tree)
    visible: ImageList = data.train.select(data.train.modality == 0)
    with pytest.raises(TrainError, match="lack a modality"):
        Judge(data, visible, recipe(), "validation")
    with pytest.raises(ValueError, match="eval_on: expected"):
        Judge(data, None, recipe(), "train")  # type: ignore[arg-type]
    del data.permutations
    with pytest.raises(TrainError, match="needs permutations"):
        Judge(data, None, recipe(), "test")
    assert not Judge(data, None, recipe(), "validation").due(3)


def test_best_prefers_rank_one_then_precision_then_late() -> None:
    def at(epoch: int, r1: float, precision: float) -> dict:
        return {"epoch": epoch, "metrics": {"R1": r1, "mAP": precision}}

    evaluations = [at(1, 0.5, 0.4), at(2, 0.6, 0.3), at(3, 0.6, 0.35), at(4, 0.6, 0.35)]
    assert best_of(evaluations) is evaluations[-1]
    assert best_of(evaluations[:3]) is evaluations[2]
    assert best_of([]) is None
