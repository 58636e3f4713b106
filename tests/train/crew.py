"""A training run of several processes; as a script, what torchrun starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from fastreid_vi import methods
from fastreid_vi.config import Batch, OptimConfig, RunConfig, ScheduleConfig
from fastreid_vi.data import SysuMM01
from fastreid_vi.train import Interrupted, StoppedElsewhere, seed_everything, train, training_split
from fastreid_vi.train.distributed import leave
from fastreid_vi.train.step import Stepper
from tests.train import small

ROOT = Path(__file__).parents[2]


def recipe_of(name: str, **run: Any) -> Any:
    """A published recipe, small enough for seconds on a core; or the one of the small method."""
    if name == "small":
        chosen = small.recipe(log_every=1, **run)
        return replace(chosen, data=replace(chosen.data, identities=4))
    published = methods.recipe(name, "sysu")
    pixel, iterations, model = 0, 0, {}
    if name == "aligngan":  # all five phases at once, nothing drawn while training
        pixel, iterations = 4, 2
        model = {"conv_dim": 8, "residual_blocks": 1, "dropout": 0.0, "pixel_images": 16}
        model |= {"feature_warmup_epochs": 0, "pixel_warmup_epochs": 0}
    chosen = replace(
        published,
        data=replace(
            published.data, height=64, width=32, pad=2, identities=4, images=4, workers=0,
            validation=0, pixel_identities=pixel,
        ),
        optim=OptimConfig(name="sgd", lr=1e-3),
        schedule=ScheduleConfig(epochs=1, iterations=iterations),
        run=RunConfig(**{"log_every": 1, "precision": "fp32", **run}),
        model=replace(published.model, depth=18, weights="none", **model),
    )  # fmt: skip
    return chosen


def in_double(method: Any) -> Any:
    """The method in float64: training is chaotic, in float32 rounding shows after a few steps."""
    part = method.phase_batch
    last: list[Tensor] = [torch.empty(0)] * 2  # AlignGAN knows a batch by its images

    def phase_batch(batch: Batch, phase: str) -> Batch:
        if last[0] is not batch.images:
            last[:] = batch.images, batch.images.double()
        return part(batch._replace(images=last[1]), phase)

    method.phase_batch = phase_batch
    return method.double()


def run(root: Path, run_dir: Path, chosen: Any, *, double: bool = False, **options: Any) -> Any:
    """Train a published method as the command line does."""
    dataset = SysuMM01(root)
    options = {"device": "cpu", "display": "none", **options}
    if chosen.method == "small":
        return train(small.build(dataset, chosen), chosen, dataset, run_dir, **options)
    seed_everything(chosen.run.seed)
    method = methods.from_recipe(chosen, training_split(dataset, chosen).num_ids)
    method = in_double(method) if double else method
    return train(method, chosen, dataset, run_dir, **options)


def launch(*words: object, processes: int = 2, restarts: int = 0) -> subprocess.Popen[str]:
    """torchrun on this machine, in a process group of its own, with a free port."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc-per-node={processes}", f"--max-restarts={restarts}"),
        *("--monitor-interval=0.1", "-m", "tests.train.crew", *map(str, words)),
    ]
    environment = {n: v for n, v in os.environ.items() if n not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        command, cwd=ROOT, env={**environment, "OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    try:
        out, err = process.communicate(timeout=180)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code, err
    return out + err


def before_step(at: int, work: Callable[[], None]) -> None:
    """Do something in this process before its step number `at`."""
    make, calls = Stepper.__call__, 0

    def counted(self: Any, *batches: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            work()
        return make(self, *batches)

    Stepper.__call__ = counted  # type: ignore[method-assign]


def die(mark: Path) -> None:
    """Leave no trace but `mark`; live on if it is there."""
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def main(names: str, root: str, folder: str, *flags: str) -> int:
    """Runs `folder`/NAME, one after the other; flags "double", "bn=sync", "dies=RANK,STEP", ..."""
    settings = dict(flag.split("=") for flag in flags if "=" in flag)
    rank = int(os.environ["RANK"])
    for name, work in (
        ("dies", lambda: die(Path(folder) / "died")),
        ("signals", lambda: signal.raise_signal(signal.SIGTERM)),
    ):
        who, at = map(int, settings.get(name, "-1,0").split(","))
        if rank == who:
            before_step(at, work)
    if "," in names:  # a process group that the caller owns
        dist.init_process_group("gloo")
    try:
        for name in names.split(","):
            chosen = recipe_of(name, bn=settings.get("bn", "local"), checkpoint_steps=2)
            identities = int(settings.get("identities", 4))
            chosen = replace(chosen, data=replace(chosen.data, identities=identities))
            run(Path(root), Path(folder) / name, chosen, double="double" in flags)
    except (Interrupted, StoppedElsewhere) as error:
        print(f"rank {rank}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    leave(main(*sys.argv[1:]))
