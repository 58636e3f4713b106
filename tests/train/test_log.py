"""metrics.jsonl on a good and on a full disk, and what a person sees."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from fastreid_vi.train.errors import CheckpointError, TrainError
from fastreid_vi.train.log import Bar, Metrics, Plain, Silent, make_screen, sentence
from fastreid_vi.train.stop import StopRequest
from fastreid_vi.train.terms import Clock
from tests.train.small import recipe, run


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_beyond_the_checkpoint_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    metrics.write({"step": 1})
    kept = metrics.flush()
    metrics.write({"step": 2})
    metrics.close()
    with path.open("ab") as file:
        file.write(b'{"step": 3, "hal')  # killed while writing
    metrics = Metrics(path, kept)
    metrics.write({"step": 20})
    assert metrics.flush() == path.stat().st_size
    metrics.close()
    assert lines(path) == [{"step": 1}, {"step": 20}]


def test_a_file_that_lost_lines(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(CheckpointError, match="needs its first 100 bytes, found 3"):
        Metrics(tmp_path / "metrics.jsonl", 100)


def test_a_full_disk_keeps_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    metrics.write({"step": 1})
    real = metrics._file

    class Full:
        """Takes a part of the line, then refuses the rest, as a full disk does."""

        room = 5

        def write(self, data: bytes) -> int:
            if not self.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            taken, self.room = self.room, 0
            return real.write(data[:taken])

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    metrics._file = Full()  # type: ignore[assignment]
    with pytest.raises(TrainError, match=r"cannot write .*metrics\.jsonl: No space left on device"):
        metrics.write({"step": 2})
    assert lines(path) == [{"step": 1}]


def test_not_a_number_is_never_written(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="JSON"):
        metrics.write({"total": float("nan")})
    assert metrics.flush() == 0


def test_sentences() -> None:
    epoch = {
        "kind": "epoch", "epoch": 3, "step": 27, "lr": 3.5e-4, "terms": {"id": 1.25, "total": 2.5},
        "images_per_second": 812.34, "seconds": 12.4,
    }  # fmt: skip
    assert sentence(epoch) == (
        "epoch 3: id 1.2500 total 2.5000 | lr 0.00035, step 27, 812.3 images/s, 12 s"
    )
    scored = {"kind": "eval", "epoch": 3, "split": "validation", "metrics": {"R1": 0.5}}
    assert sentence(scored) == "epoch 3: validation: R1 50.00"


def test_plain_lines(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tree, tmp_path / "run", display="plain")
    out, err = capsys.readouterr()
    assert not out
    said = err.splitlines()
    assert [line.split(":")[0] for line in said[:-1]] == [f"epoch {e}" for e in (1, 1, 2, 2, 3, 3)]
    assert "finished; best epoch" in said[-1]
    run(tree, tmp_path / "run", display="plain", resume=True)
    assert "resumed after step 27" in capsys.readouterr().err


def test_the_bar(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tree, tmp_path / "run", display="bar")
    err = capsys.readouterr().err
    for epoch in (1, 2, 3):
        assert f"epoch {epoch}: id" in err


def test_choosing_a_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(make_screen("none", 3)) is Silent
    assert type(make_screen("auto", 3)) is Plain  # not a terminal
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    screen = make_screen("auto", 3)
    screen.close()
    assert isinstance(screen, Bar)
    with pytest.raises(ValueError, match='display: expected "auto"'):
        make_screen("loud", 3)  # type: ignore[arg-type]


def test_clock_counts_from_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("fastreid_vi.train.terms.time.perf_counter", lambda: now[0])
    clock = Clock()
    clock.images, now[0] = 30, 104.0
    assert (clock.seconds, clock.rate) == (4.0, 7.5)
    clock.restart()
    assert (clock.seconds, clock.images) == (0.0, 0)


def test_stop_request_is_only_a_note() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert stop.signum is None
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.signum == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_steps_between_records(tree: Path, tmp_path: Path) -> None:
    run(tree, tmp_path / "run", recipe(log_every=10))
    steps = [r["step"] for r in lines(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "step"]
    assert steps == [10, 20]
