"""`eval RUN RUN ...`: the mean over RegDB's trials, from saved embeddings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fastreid_vi.evaluation import Embeddings, evaluate_regdb, save_embeddings


def sides(trial: int) -> dict[str, Embeddings]:
    generator = np.random.default_rng(trial)
    ids = np.arange(12) // 2
    centres = generator.normal(size=(6, 8))

    def side(modality: int) -> Embeddings:
        features = centres[ids] + generator.normal(size=(12, 8))
        return Embeddings(
            features.astype(np.float32),
            ids,
            modality=np.full(12, modality),
            method="lba",
            dataset="regdb",
            trial=trial,
        )

    return {"query": side(1), "gallery": side(0)}


@pytest.fixture
def saved(tmp_path: Path) -> list[Path]:
    folders = [tmp_path / f"trial{t}" for t in (1, 2, 3)]
    for trial, folder in enumerate(folders, 1):
        save_embeddings(folder, **sides(trial))
    return folders


def test_mean_over_trials(call, saved: list[Path]) -> None:
    said = call("eval", *saved, "--json")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    alone = [evaluate_regdb(sides(t)["query"], sides(t)["gallery"]).mean for t in (1, 2, 3)]
    assert [r["protocol"] for r in found["runs"]] == [f"regdb-trial-{t}" for t in (1, 2, 3)]
    setting = found["mean"]["settings"]["ir_to_vis"]
    for name, values in (
        ("mAP", [m.mAP for m in alone]),
        ("R1", [m.cmc[0] for m in alone]),
        ("mINP", [m.mINP for m in alone]),
    ):
        np.testing.assert_allclose(setting["mean"][name], np.mean(values), rtol=1e-12)
        np.testing.assert_allclose(setting["std"][name], np.std(values), rtol=1e-9)
    assert np.std([m.mAP for m in alone]) > 0
    assert setting["reranked"]["mean"]["mAP"] != setting["mean"]["mAP"]


def test_the_table_for_people(call, saved: list[Path]) -> None:
    said = call("eval", *saved, "--rerank", "none")
    assert said.code == 0, said.err
    heading = "lba, mean ± std over 3 runs, %: regdb-trial-1, regdb-trial-2, regdb-trial-3"
    table = said.out[said.out.index(heading) :].splitlines()
    assert len(table) == 6
    alone = [evaluate_regdb(sides(t)["gallery"], sides(t)["query"]).mean.mAP for t in (1, 2, 3)]
    assert f"{100 * np.mean(alone):.2f} ± {100 * np.std(alone):.2f}" in table[2]


@pytest.mark.parametrize("change", [{"method": "mcja"}, {"dataset": "llcm", "trial": None}])
def test_runs_of_two_kinds_have_no_mean(call, saved: list[Path], change: dict) -> None:
    cams = {"cams": np.ones(12, int), "paths": [f"{i:02}.jpg" for i in range(12)]}
    other = {name: side._replace(**change, **cams) for name, side in sides(4).items()}
    other["gallery"] = other["gallery"]._replace(cams=cams["cams"] + 1)
    save_embeddings(saved[0].parent / "other", **other)
    said = call("eval", saved[0], saved[0].parent / "other", "--rerank", "none")
    assert said.code == 1
    assert "a mean over runs: of one" in said.err


def test_one_folder_cannot_keep_several(call, saved: list[Path], tmp_path: Path) -> None:
    said = call("eval", *saved, "--out", tmp_path / "out")
    assert said.code == 2
    assert "--out: one folder cannot keep the results of several runs" in said.err
