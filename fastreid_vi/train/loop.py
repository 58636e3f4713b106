"""The training loop: epochs, steps, records, evaluations, checkpoints; resumes to the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from fastreid_vi.config import Batch, Recipe
from fastreid_vi.data.loader import train_loader
from fastreid_vi.data.sampler import make_sampler
from fastreid_vi.methods.base import Method
from fastreid_vi.train import checkpoint, files
from fastreid_vi.train.errors import CheckpointError, Interrupted, TrainError
from fastreid_vi.train.log import Display, RunLog, make_screen
from fastreid_vi.train.optim import lr_at
from fastreid_vi.train.record import RunRecord, open_run, surroundings
from fastreid_vi.train.state import (
    Progress,
    random_states,
    restore_random_states,
    seed_everything,
)
from fastreid_vi.train.step import Stepper, choose_device, deterministic
from fastreid_vi.train.stop import StopRequest
from fastreid_vi.train.terms import Clock, Terms
from fastreid_vi.train.validate import EvalOn, Judge, TrainingData, training_split


class TrainResult(NamedTuple):
    """What a finished run leaves."""

    run_dir: Path
    checkpoint: Path
    """Folder of the chosen epoch."""
    epochs: int
    steps: int
    best: dict[str, Any]
    """best.json: epoch, metrics and how it was chosen."""


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
) -> TrainResult:
    """Train a method by its recipe and leave a run folder.

    The folder holds run.json, metrics.jsonl, checkpoints/, best.json and, at the end, result.json.
    A run that was stopped or killed at any moment and resumed gives the same weights and losses,
    bit for bit, on the same software, device and thread count.

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
    Returns:
        Where the result is.
    Raises:
        TrainError: bad run folder, another recipe than the one resumed, a loss that is not finite.
        CheckpointError: a checkpoint cannot be written or does not fit.
        Interrupted: Ctrl-C or SIGTERM; a good checkpoint was written.
        DataError: images or identities that cannot be used.
    """
    place = choose_device(device)
    with deterministic(), StopRequest() as stop:
        run = _Run(method, recipe, dataset, Path(run_dir), place, eval_on)
        run.open(resume, display, stop, resume_hint)
        try:
            while run.progress.epoch <= recipe.schedule.epochs:
                run.epoch()
            return run.finish()
        except torch.OutOfMemoryError as error:
            raise TrainError(run.out_of_memory()) from error
        except RuntimeError as error:
            # The signal also ended the loader's processes, in the middle of a step: go back to the
            # last checkpoint instead of saving half a step.
            if stop.signum is None or isinstance(error, TrainError):
                raise
            raise run.interrupted(stop.signum) from error
        finally:
            run.log.close()


class _Run:
    """One run: the method with its optimisers, the batches, the judge, and where they stand."""

    log: RunLog
    stop: StopRequest

    def __init__(
        self,
        method: Method,
        recipe: Recipe,
        dataset: TrainingData,
        run_dir: Path,
        device: torch.device,
        eval_on: EvalOn,
    ) -> None:
        split = training_split(dataset, recipe)
        if method.num_ids != split.num_ids:
            raise TrainError(
                f"method: made for {method.num_ids} identities, "
                f"the training split has {split.num_ids}"
            )
        run, data, images = recipe.run, recipe.data, split.train
        self.method, self.recipe, self.run_dir, self.device = method, recipe, run_dir, device
        self.root, self.folder = dataset.root, run_dir / "checkpoints"
        self.judge = Judge(dataset, split.validation, recipe, eval_on)
        self.sampler = make_sampler(
            data.sampler,
            images.labels,
            images.modality,
            identities=data.identities,
            images=data.images,
            seed=run.seed,
            pids=images.pids,
        )
        self.loader = train_loader(images, self.sampler, data, seed=run.seed)
        self.stepper = Stepper(
            method, recipe.optim, device, precision=run.precision, channels_last=run.channels_last
        )
        self.progress = Progress()
        self.last: Path | None = None

    def open(self, resume: bool, display: Display, stop: StopRequest, hint: str) -> None:
        """Create or reopen the run folder and take up where its last checkpoint stands."""
        record = RunRecord(
            recipe=self.recipe,
            num_ids=self.method.num_ids,
            root=self.root,
            eval_on=self.judge.split,
            versions=surroundings(self.device, self.stepper.dtype),
        )
        notes = open_run(self.run_dir, record, resume)
        seed_everything(self.recipe.run.seed)
        self.last = checkpoint.last(self.folder) if resume else None
        if self.last is not None:
            self._restore(checkpoint.load(self.last))
        here = self.progress
        self.stop, self._hint = stop, hint
        self.terms = Terms(here.window, here.whole)
        screen = make_screen(display, self.recipe.schedule.epochs)
        self.log = RunLog(self.run_dir, screen, length=here.metrics_bytes, step=here.step)
        checkpoint.discard_unfinished(self.folder, here.step)
        if resume:
            where = f"after step {here.step}" if self.last else "from the start: no checkpoint yet"
            notes.append(f"{self.run_dir}: resumed {where}")
        for note in notes:
            screen.line(note)

    def _restore(self, saved: checkpoint.Checkpoint) -> None:
        num_ids = self.method.num_ids
        checkpoint.expect(saved.header, saved.path, method=self.recipe.method, num_ids=num_ids)
        checkpoint.fill(self.method, saved.weights, saved.path)
        try:
            self.progress = Progress.from_json(saved.counters["progress"])
            self.sampler.load_state_dict(saved.counters["sampler"])
            self.stepper.load_state_dict(saved.tensors["stepper"])
            restore_random_states(saved.tensors["random"], self.device)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{saved.path}: does not fit this run: {error}") from error

    def epoch(self) -> None:
        """Run what is left of the current epoch, then evaluate and save if they are due."""
        here, run = self.progress, self.recipe.run
        self._begin_epoch()
        length = len(self.sampler)
        self.log.screen.begin_epoch(here.epoch, length, self.batch)
        for batch in self._batches():
            terms = self.stepper(batch)
            here.step += 1
            self.batch += 1
            self.terms.add(here.step, terms)
            self.window_clock.images += len(batch.labels)
            self.epoch_clock.images += len(batch.labels)
            self.log.screen.step(self.terms.last)
            if here.step % run.log_every == 0:
                self._record_step()
            if self.stop.signum is not None:
                self._halt(self.stop.signum)
            due = run.checkpoint_steps and here.step % run.checkpoint_steps == 0
            if due and self.batch < length:
                self._save()
        self._end_epoch()

    def _begin_epoch(self) -> None:
        epoch = self.progress.epoch
        self.method.train()
        self.method.begin_epoch(epoch)
        self.lr = lr_at(epoch, self.recipe.optim, self.recipe.schedule)
        self.stepper.set_lr(self.lr)
        self.sampler.set_epoch(epoch)  # an epoch that is under way keeps its cursor
        self.batch = self.sampler.cursor
        self.window_clock, self.epoch_clock = Clock(), Clock()

    def _batches(self) -> Iterator[Batch]:
        batches = iter(self.loader)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except Exception:
                # A signal to the whole process group ends the loader's processes before ours.
                if self.stop.signum is None:
                    raise
                self._halt(self.stop.signum)
            yield batch

    def _record_step(self) -> None:
        self.terms.read()
        self._write("step", self.progress.window.take(), images_per_second=self.window_clock.rate)
        self.window_clock.restart()

    def _write(self, kind: str, terms: dict[str, float], **more: float) -> None:
        here = self.progress
        record = {"kind": kind, "epoch": here.epoch, "step": here.step, "lr": self.lr}
        self.log.write({**record, "terms": terms, **more})

    def _end_epoch(self) -> None:
        here, run, clock = self.progress, self.recipe.run, self.epoch_clock
        self.terms.read()
        rate, seconds = clock.rate, round(clock.seconds, 3)
        self._write("epoch", here.whole.take(), images_per_second=rate, seconds=seconds)
        evaluated = self.judge.due(here.epoch)
        if evaluated:
            metrics = self.judge.score(self.method, self.device)
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
        if self.stop.signum is not None and not finished:
            self._halt(self.stop.signum, saved=due)

    def _save(self) -> None:
        self.terms.read()
        here = self.progress
        here.metrics_bytes = self.log.flush()
        header = checkpoint.Header(
            self.recipe.method, self.method.num_ids, here.epoch - 1, here.step
        )
        tensors = {"stepper": self.stepper.state_dict(), "random": random_states(self.device)}
        # A signal may have stopped the loader with a batch in its hands: count those trained on.
        cursor = {**self.sampler.state_dict(), "batch": self.batch}
        counters = {"progress": here.to_json(), "sampler": cursor}
        weights = self.method.state_dict()
        try:
            self.last = checkpoint.save(self.folder, header, weights, tensors, counters)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; last good one: {self.last or 'none'}") from error
        if here.evaluations:
            self._name_best()
        checkpoint.prune(self.folder, self.recipe.run.keep)

    def _name_best(self) -> dict[str, Any]:
        here = self.progress
        best = self.judge.verdict(here.evaluations, here.epoch - 1, here.step)
        checkpoint.point_best(self.folder, best["step"])
        files.write_json(self.run_dir / "best.json", best)
        return best

    def _halt(self, signum: int, *, saved: bool = False) -> NoReturn:
        if not saved:
            self._save()
        raise self.interrupted(signum)

    def interrupted(self, signum: int) -> Interrupted:
        """The exception that ends a run on a signal."""
        return Interrupted(signum, self.progress.step, self.last, self._hint)

    def out_of_memory(self) -> str:
        """One line for a device that is too small."""
        data = self.recipe.data
        batch = f"{data.identities} x {data.images} images of {data.height} x {data.width}"
        return (
            f"{self.device} is out of memory in step {self.progress.step + 1} with {batch}: lower "
            "data.identities, data.images or the image size; last checkpoint: "
            f"{self.last or 'none'}"
        )

    def finish(self) -> TrainResult:
        """Write best.json and result.json; a finished run that is resumed only does this again."""
        here, best = self.progress, self._name_best()
        chosen = self.folder / (self.folder / "best").readlink()
        values = {
            "epochs": here.epoch - 1,
            "steps": here.step,
            "checkpoint": str(chosen.relative_to(self.run_dir)),
            "best": {name: best[name] for name in ("epoch", "step", "metrics", "chosen")},
            "last": here.evaluations[-1]["metrics"] if here.evaluations else None,
        }
        files.write_json(self.run_dir / "result.json", values)
        line = f"best epoch {best['epoch']} ({best['chosen']})"
        self.log.screen.line(f"{self.run_dir}: finished; {line}")
        return TrainResult(self.run_dir, chosen, here.epoch - 1, here.step, best)
