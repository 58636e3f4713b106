"""The training loop: epochs, steps, records, evaluations, checkpoints; resumes to the same bits.

A step moves every active player once. It takes `RunConfig.accumulate` consecutive batches of the
epoch, the last step of an epoch those that are left; steps are counted from 1 over the whole run,
those left out by `skip_nonfinite` included, and a checkpoint stands between two steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch

from fastreid_vi.config import Batch, Recipe
from fastreid_vi.data.images import DataError
from fastreid_vi.data.loader import train_loader
from fastreid_vi.data.sampler import make_sampler
from fastreid_vi.methods.base import Method
from fastreid_vi.train import checkpoint, distributed, nonfinite
from fastreid_vi.train.batchnorm import synchronise
from fastreid_vi.train.distributed import Team
from fastreid_vi.train.errors import (
    Interrupted,
    NonFiniteLoss,
    Origin,
    StoppedElsewhere,
    TrainError,
)
from fastreid_vi.train.forecast import describe, spare_memory
from fastreid_vi.train.keeper import Keeper, TrainResult
from fastreid_vi.train.log import Display, Log, Mute, RunLog, make_screen
from fastreid_vi.train.optim import lr_at
from fastreid_vi.train.record import NAME, RunRecord, open_run, surroundings
from fastreid_vi.train.state import Progress, seed_everything, stream_seed
from fastreid_vi.train.step import SkippedStep, Stepper, deterministic
from fastreid_vi.train.stop import StopRequest
from fastreid_vi.train.terms import Clock, Terms
from fastreid_vi.train.validate import EvalOn, Judge, TrainingData, training_split


def train(
    method: Method,
    recipe: Recipe,
    dataset: TrainingData,
    run_dir: str | Path,
    *,
    resume: bool = False,
    device: torch.device | str | None = None,
    eval_on: EvalOn = "validation",
    display: Display = "auto",
    resume_hint: str = "train(..., resume=True)",
    forecast: bool = False,
) -> TrainResult:
    """Train a method by its recipe and leave a run folder.

    The folder holds run.json, metrics.jsonl, checkpoints/, best.json and, at the end, result.json.
    A run that was stopped or killed at any moment and resumed gives the same weights and losses,
    bit for bit, on the same software, device, thread and process count.

    Started by torchrun in several processes, each takes its share of every batch and process 0
    writes, evaluates and speaks; all must see the run folder. After a restart by torchrun the run
    goes on from its last checkpoint.

    Args:
        method: made for `training_split(dataset, recipe).num_ids` identities, after
            `seed_everything(recipe.run.seed)`.
        recipe: the whole run.
        dataset: where images come from.
        run_dir: created; must not hold a run unless `resume`.
        resume: continue from the last checkpoint, or from the start when none was reached.
        device: CUDA where there is one, else CPU, unless named.
        eval_on: split that chooses the best epoch; "test" only when asked for by name.
        display: "auto", "bar", "plain" or "none", on standard error.
        resume_hint: told to a person who interrupts the run.
        forecast: say first how much memory a step will take, and what to lower where that is more
            than there is.
    Returns:
        Where the result is.
    Raises:
        TrainError: bad run folder, another recipe than the one resumed, a loss that is not finite.
        CheckpointError: a checkpoint cannot be written or does not fit.
        Interrupted: Ctrl-C or SIGTERM; a good checkpoint was written.
        DataError: images or identities that cannot be used.
    """
    with distributed.team(device) as team, deterministic(), StopRequest() as stop:
        run = _Run(method, recipe, dataset, Path(run_dir), team, eval_on, forecast=forecast)
        run.open(resume, display, stop, resume_hint)
        try:
            while run.progress.epoch <= recipe.schedule.epochs:
                run.epoch()
            return run.finish()
        except torch.OutOfMemoryError as error:
            raise TrainError(run.out_of_memory()) from error
        except NonFiniteLoss as error:
            run.keep_batch(error)
            raise
        except RuntimeError as error:
            # The signal also ended the loader's processes, in the middle of a step: go back to the
            # last checkpoint instead of saving half a step.
            if isinstance(error, TrainError):
                raise
            if stop.explains(error) and stop.signum is not None:
                raise run.interrupted(stop.signum) from error
            if distributed.is_lost_peer(error):
                raise StoppedElsewhere("another process of this run is gone") from error
            raise
        finally:
            run.log.close()


class _Run:
    """One run: the method with its optimisers, the batches, the judge, and where they stand."""

    log: Log
    stop: StopRequest
    batch: int
    window_clock: Clock
    epoch_clock: Clock

    def __init__(
        self,
        method: Method,
        recipe: Recipe,
        dataset: TrainingData,
        run_dir: Path,
        team: Team,
        eval_on: EvalOn,
        *,
        forecast: bool,
    ) -> None:
        split = training_split(dataset, recipe)
        if method.num_ids != split.num_ids:
            raise TrainError(
                f"method: made for {method.num_ids} identities, "
                f"the training split has {split.num_ids}"
            )
        run, data, images = recipe.run, recipe.data, split.train
        self.method, self.recipe, self.run_dir = method, recipe, run_dir
        self.team, self.device = team, team.device
        self.root = dataset.root
        self.judge = Judge(dataset, split.validation, recipe, eval_on, device=team.device)
        self.sampler = make_sampler(
            data.sampler,
            images.labels,
            images.modality,
            identities=data.identities,
            images=data.images,
            seed=run.seed,
            pids=images.pids,
            pixel_identities=data.pixel_identities,
            batches=recipe.schedule.iterations,
        )
        if team.world > 1:
            self.sampler.shard(team.rank, team.world)
        self.notes: list[str] = []
        sizes = {"rows": len(self.sampler.slots), "paired": self.sampler.paired}
        if forecast and team.leads:
            self.notes = describe(method, recipe, team.device, **sizes)
        choose = data.packed and data.resident == "auto"
        spare = spare_memory(method, recipe, team.device, **sizes) if choose else 0
        if team.world > 1 and run.bn == "sync":
            synchronise(method, team.device)
        self.loader = train_loader(
            images, self.sampler, data, seed=run.seed, device=team.device, spare=spare
        )
        if data.packed:
            self.notes.append(f"images: {self.loader.place}")
        players = dict.fromkeys(map(method.player, method.phases))
        self.optim = {player: recipe.optim_of(player) for player in players}
        self.stepper = Stepper(
            method,
            self.optim,
            team.device,
            precision=run.precision,
            channels_last=run.channels_last,
            compiled=run.compile,
            skip_nonfinite=run.skip_nonfinite,
            team=team,
        )
        self.progress = Progress()
        self.keeper = Keeper(run_dir, recipe, method, self.sampler, self.stepper, self.judge, team)

    def open(self, resume: bool, display: Display, stop: StopRequest, hint: str) -> None:
        """Create or reopen the run folder and take up where its last checkpoint stands."""
        record = RunRecord(
            recipe=self.recipe,
            num_ids=self.method.num_ids,
            root=self.root,
            eval_on=self.judge.split,
            versions=surroundings(self.device, self.stepper.dtype, self.team.world),
        )
        # Decided by one process: the others look when it has made the folder.
        resume = self.team.first(lambda: resume or _started(self.run_dir))
        notes = self.team.first(lambda: open_run(self.run_dir, record, resume))
        seed_everything(stream_seed(self.recipe.run.seed, self.team.rank))
        if resume:
            self.progress = self.keeper.restore() or self.progress
        self.team.share(self.method)
        here = self.progress
        self.stop, self._hint = stop, hint
        self.terms = Terms(here.window, here.whole)
        self.log = self.team.first(lambda: self._open_log(display), tell=False) or Mute()
        if resume:
            where = f"after step {here.step}" if here.step else "from the start: no checkpoint yet"
            notes.append(f"{self.run_dir}: resumed {where}")
        for note in [*notes, *self.notes]:
            self.log.screen.line(note)

    def _open_log(self, display: Display) -> RunLog:
        here, screen = self.progress, make_screen(display, self.recipe.schedule.epochs)
        log = RunLog(self.run_dir, screen, length=here.metrics_bytes, step=here.step)
        checkpoint.discard_unfinished(self.run_dir / "checkpoints", here.step)
        return log

    def epoch(self) -> None:
        """Run what is left of the current epoch, then evaluate and save if they are due."""
        here, run = self.progress, self.recipe.run
        self._begin_epoch()
        length = len(self.sampler)
        size = run.accumulate
        self.log.screen.begin_epoch(here.epoch, -(-length // size), -(-self.batch // size))
        for group in self._groups(size):
            self._step(group)
            if here.step % run.log_every == 0:
                self._record_step()
            due = run.checkpoint_steps and here.step % run.checkpoint_steps == 0
            if due and self.batch < length:
                self._save()
        self._end_epoch()

    def _step(self, group: list[Batch]) -> None:
        here = self.progress
        origin = Origin(here.step + 1, here.epoch, self.batch, len(group), {})
        images = sum(len(batch.labels) for batch in group) * self.team.world
        try:
            terms = self.stepper(*group)
        except SkippedStep as skipped:
            here.skipped += 1
            why = nonfinite.sentence(origin.step, skipped.terms)
            self.log.screen.line(f"{why}; left out, {here.skipped} so far")
            terms = {}
        except NonFiniteLoss as error:
            message = f"step {origin.step}: {error}"
            raise NonFiniteLoss(message, origin) from error
        here.step, self.batch = origin.step, self.batch + len(group)
        if terms:
            self.terms.add(origin, terms)
        self.window_clock.images += images
        self.epoch_clock.images += images
        self.log.screen.step(self.terms.last)

    def _begin_epoch(self) -> None:
        epoch = self.progress.epoch
        self.method.train()
        self.method.begin_epoch(epoch)
        schedule = self.recipe.schedule
        self.lrs = {name: lr_at(epoch, optim, schedule) for name, optim in self.optim.items()}
        self.stepper.set_lr(self.lrs)
        self.sampler.set_epoch(epoch)  # an epoch that is under way keeps its cursor
        self.batch = self.sampler.cursor
        self.window_clock, self.epoch_clock = Clock(), Clock()

    def _groups(self, size: int) -> Iterator[list[Batch]]:
        """The batches of the epoch in groups; between two of them a stop takes effect."""
        batches = iter(self.loader)
        while True:
            group: list[Batch] = []
            failure = None
            try:
                if self.stop.signum is None:
                    group = list(itertools.islice(batches, size))
                    self.stop.ignore_children()
            except Exception as error:
                # A signal to the whole process group ends the loader's processes before ours.
                failure = None if self.stop.explains(error) else error
            signum = self.team.agreed(self.stop.signum, failed=failure is not None)
            if failure is not None:
                raise failure
            if signum is not None:
                self._halt(signum)
            if not group:
                return
            yield group

    def _record_step(self) -> None:
        self.terms.read()
        self._write("step", self.progress.window.take(), images_per_second=self.window_clock.rate)
        self.window_clock.restart()

    def _write(self, kind: str, terms: dict[str, float], **more: float) -> None:
        here = self.progress
        record: dict[str, Any] = {"kind": kind, "epoch": here.epoch, "step": here.step}
        record["lr"] = self.lrs[self.method.player(self.method.active_phases[0])]
        if len(self.lrs) > 1:
            record["lrs"] = self.lrs
        self.log.write({**record, "terms": terms, **more})

    def _end_epoch(self) -> None:
        here, run, clock = self.progress, self.recipe.run, self.epoch_clock
        self.terms.read()
        if not here.whole.counts and here.skipped:
            raise TrainError(f"epoch {here.epoch}: no step was finite, {here.skipped} left out")
        rate, seconds = clock.rate, round(clock.seconds, 3)
        self._write("epoch", here.whole.take(), images_per_second=rate, seconds=seconds)
        self._join_buffers()
        evaluated = self.judge.due(here.epoch)
        if evaluated:
            metrics = self.team.first(lambda: self.judge.score(self.method, self.device))
            evaluation = {"epoch": here.epoch, "step": here.step, "metrics": metrics}
            self.log.write({"kind": "eval", "split": self.judge.split, **evaluation})
            here.evaluations.append(evaluation)
        finished = here.epoch == self.recipe.schedule.epochs
        due = finished or evaluated or here.epoch % run.checkpoint_every == 0
        here.epoch += 1
        self.sampler.set_epoch(here.epoch)
        self.batch = 0
        if due:
            self._save()
        signum = self.team.agreed(self.stop.signum)
        if signum is not None and not finished:
            self._halt(signum)

    def _join_buffers(self) -> None:
        if self.recipe.run.bn == "sync":
            self.team.average_buffers(self.method)

    def _save(self) -> None:
        self.terms.read()
        self._join_buffers()
        self.progress.metrics_bytes = self.log.flush()
        self.keeper.save(self.progress, self.batch)

    def _halt(self, signum: int) -> NoReturn:
        if not self.keeper.holds(self.progress, self.batch):
            self._save()
        raise self.interrupted(signum)

    def interrupted(self, signum: int) -> Interrupted:
        """The exception that ends a run on a signal."""
        return Interrupted(signum, self.progress.step, self.keeper.last, self._hint)

    def out_of_memory(self) -> str:
        """One line for a device that is too small."""
        data = self.recipe.data
        batch = f"{data.identities} x {data.images} images of {data.height} x {data.width}"
        return (
            f"{self.device} is out of memory in step {self.progress.step + 1} with {batch}: lower "
            "data.identities, data.images or the image size; last checkpoint: "
            f"{self.keeper.last or 'none'}"
        )

    def keep_batch(self, error: NonFiniteLoss) -> None:
        """Leave the batches that gave a loss without a value in the run folder."""
        if error.origin is None:
            return
        try:
            folder = nonfinite.keep(self.run_dir, self.loader, error.origin, self.team.rank)
        except (TrainError, DataError) as fault:
            self.log.screen.line(f"the batch of that step could not be kept: {fault}")
        else:
            self.log.screen.line(f"{folder}: the batch of step {error.origin.step}")

    def finish(self) -> TrainResult:
        """Write best.json and result.json; a finished run that is resumed only does this again."""
        result = self.keeper.finish(self.progress)
        line = f"best epoch {result.best['epoch']} ({result.best['chosen']})"
        self.log.screen.line(f"{self.run_dir}: finished; {line}")
        return result


def _started(run_dir: Path) -> bool:
    """Whether torchrun starts this run again."""
    return distributed.restarted() and (run_dir / NAME).is_file()
