"""What a run keeps: its checkpoints, which of them is the best, and the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from fastreid_vi.config import Recipe
from fastreid_vi.data.sampler import IdentitySampler
from fastreid_vi.methods.base import Method
from fastreid_vi.train import checkpoint, files
from fastreid_vi.train.distributed import Team
from fastreid_vi.train.errors import CheckpointError
from fastreid_vi.train.state import Progress, random_states, restore_random_states
from fastreid_vi.train.step import Stepper
from fastreid_vi.train.validate import Judge


class TrainResult(NamedTuple):
    """What a finished run leaves."""

    run_dir: Path
    checkpoint: Path
    """Folder of the chosen epoch."""
    epochs: int
    steps: int
    best: dict[str, Any]
    """best.json: epoch, metrics and how it was chosen."""


class Keeper:
    """Saves and restores everything that decides how a run goes on.

    Process 0 writes; the random states of the others are part of what it writes. Without `bn` =
    "sync" buffers such as running statistics are those of process 0.
    """

    def __init__(
        self,
        run_dir: Path,
        recipe: Recipe,
        method: Method,
        sampler: IdentitySampler,
        stepper: Stepper,
        judge: Judge,
        team: Team,
    ) -> None:
        self._run_dir, self._folder = run_dir, run_dir / "checkpoints"
        self._recipe, self._method, self._sampler = recipe, method, sampler
        self._stepper, self._judge, self._team = stepper, judge, team
        self._held: tuple[int, int, int] | None = None
        self.last: Path | None = None
        """The newest checkpoint."""

    def restore(self) -> Progress | None:
        """Take up where the last checkpoint stands; None where there is none yet.

        Raises:
            CheckpointError: it is damaged, or of another method, recipe or data set.
        """
        self.last = checkpoint.last(self._folder)
        if self.last is None:
            return None
        saved, num_ids = checkpoint.load(self.last), self._method.num_ids
        checkpoint.expect(saved.header, saved.path, method=self._recipe.method, num_ids=num_ids)
        checkpoint.fill(self._method, saved.weights, saved.path)
        try:
            progress = Progress.from_json(saved.counters["progress"])
            self._sampler.load_state_dict(saved.counters["sampler"])
            self._stepper.load_state_dict(saved.tensors["stepper"])
            streams = [saved.tensors["random"], *saved.tensors.get("others", [])]
            if self._team.rank < len(streams):  # more processes than before draw afresh
                restore_random_states(streams[self._team.rank], self._team.device)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{saved.path}: does not fit this run: {error}") from error
        return progress

    def holds(self, progress: Progress, batch: int) -> bool:
        """Whether the newest checkpoint stands exactly here."""
        return self._held == (progress.epoch, progress.step, batch)

    def save(self, progress: Progress, batch: int) -> None:
        """Write a checkpoint, remove old ones; every process must call this.

        Args:
            progress: where the run stands.
            batch: batches of its epoch that were trained on. A signal may have stopped the loader
                with others in its hands.
        Raises:
            CheckpointError: it cannot be written; names the last good one.
        """
        random, *others = self._team.gathered(random_states(self._team.device))
        # `_write` sees the states of all processes on process 0, the only one that runs it.
        streams = {"random": random, **({"others": others} if others else {})}
        self.last = self._team.first(lambda: self._write(progress, batch, streams))
        self._held = progress.epoch, progress.step, batch

    def _write(self, here: Progress, batch: int, streams: dict[str, Any]) -> Path:
        header = checkpoint.Header(
            self._recipe.method, self._method.num_ids, here.epoch - 1, here.step
        )
        tensors = {"stepper": self._stepper.state_dict(), **streams}
        cursor = {**self._sampler.state_dict(), "batch": batch}
        counters = {"progress": here.to_json(), "sampler": cursor}
        weights = self._method.state_dict()
        try:
            written = checkpoint.save(self._folder, header, weights, tensors, counters)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; last good one: {self.last or 'none'}") from error
        if here.evaluations:
            self._name_best(here)
        checkpoint.prune(self._folder, self._recipe.run.keep)
        return written

    def _name_best(self, here: Progress) -> dict[str, Any]:
        best = self._judge.verdict(here.evaluations, here.epoch - 1, here.step)
        checkpoint.point_best(self._folder, best["step"])
        files.write_json(self._run_dir / "best.json", best)
        return best

    def finish(self, progress: Progress) -> TrainResult:
        """Write best.json and result.json."""
        return self._team.first(lambda: self._finish(progress))

    def _finish(self, here: Progress) -> TrainResult:
        best = self._name_best(here)
        chosen = self._folder / (self._folder / "best").readlink()
        values = {
            "epochs": here.epoch - 1,
            "steps": here.step,
            "checkpoint": str(chosen.relative_to(self._run_dir)),
            "best": {name: best[name] for name in ("epoch", "step", "metrics", "chosen")},
            "last": here.evaluations[-1]["metrics"] if here.evaluations else None,
        }
        files.write_json(self._run_dir / "result.json", values)
        return TrainResult(self._run_dir, chosen, here.epoch - 1, here.step, best)
