"""Every published method goes through the loop, stops, resumes and is loaded again."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastreid_vi import methods
from fastreid_vi.config import RunConfig, ScheduleConfig
from fastreid_vi.data import SysuMM01, eval_loader
from fastreid_vi.train import (
    Interrupted,
    embed_all,
    load_weights,
    read_run,
    seed_everything,
    train,
    training_split,
)

STOPS = {"aligngan": 9}


def small(name: str) -> Any:
    published = methods.recipe(name, "sysu")
    pixel, iterations, model = 0, 0, {}
    if name == "aligngan":  # an epoch of feature warm-up, then one of all phases
        pixel, iterations = 2, 3
        model = {"conv_dim": 8, "residual_blocks": 1, "pixel_images": 8}
        model |= {"feature_warmup_epochs": 1, "pixel_warmup_epochs": 0}
    return replace(
        published,
        data=replace(
            published.data, height=64, width=32, pad=2, identities=3, images=4, workers=0,
            validation=3, pixel_identities=pixel,
        ),
        schedule=ScheduleConfig(epochs=2, milestones=(1,), iterations=iterations),
        run=RunConfig(eval_every=2, log_every=3),
        model=replace(published.model, depth=18, weights="none", **model),
    )  # fmt: skip


def build(dataset: SysuMM01, recipe: Any) -> Any:
    seed_everything(recipe.run.seed)
    return methods.from_recipe(recipe, training_split(dataset, recipe).num_ids)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", methods.METHODS)
def test_stop_resume_load(tree: Path, tmp_path: Path, name: str, device: str) -> None:
    dataset, recipe = SysuMM01(tree), small(name)
    method = build(dataset, recipe)
    train(method, recipe, dataset, tmp_path / "whole", device=device, display="none")

    again = build(dataset, recipe)
    hook, calls = again.after_step, []

    def after_step() -> None:
        hook()
        calls.append(1)
        if len(calls) == STOPS.get(name, 6):  # hooks of all phases
            signal.raise_signal(signal.SIGINT)

    again.after_step = after_step
    with pytest.raises(Interrupted, match=r"after step [56]"):
        train(again, recipe, dataset, tmp_path / "parts", device=device, display="none")
    seed_everything(99)  # a resumed run must not depend on how its method was made
    other = methods.from_recipe(recipe, method.num_ids)
    options: dict[str, Any] = {"device": device, "display": "none", "resume": True}
    result = train(other, recipe, dataset, tmp_path / "parts", **options)

    for key, tensor in method.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key]), key
    final = "checkpoints/last/model.safetensors"
    parts, whole = (tmp_path / run / final for run in ("parts", "whole"))
    assert parts.read_bytes() == whole.read_bytes()
    lines = (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()
    assert all(np.isfinite(json.loads(line).get("terms", {}).get("total", 0)) for line in lines)

    record = read_run(tmp_path / "parts", lambda method, _: methods.recipe_type(method))
    assert record.recipe == recipe
    loaded = methods.from_recipe(record.recipe, record.num_ids)
    load_weights(loaded, result.run_dir, method=name, num_ids=record.num_ids)
    loaded.to(device, memory_format=torch.channels_last)
    loader = eval_loader(dataset.query, recipe.data, batch_size=16)
    found = [
        embed_all(m, loader, dataset.query, device=torch.device(device)).features
        for m in (loaded, other)
    ]
    np.testing.assert_array_equal(found[0], found[1])
