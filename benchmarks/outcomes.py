"""A pytest plugin: one JSON line per finished test, so that a run that is cut keeps its results.

pytest -p benchmarks.outcomes        with FASTREID_VI_BENCH_ROWS=FILE
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest


class Outcomes:
    """Appends outcomes; of processes that share the tests only the first one writes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, name: str, **row: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"name": name, **row}) + "\n")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.config.option.collectonly:
            for item in session.items:
                self.write(item.nodeid, outcome="planned")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write(report.nodeid, outcome="failed", message=str(report.longrepr)[-1500:])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        row: dict[str, Any] = {"outcome": report.outcome, "seconds": round(report.duration, 3)}
        if not report.passed:
            row["message"] = str(report.longrepr)[-1500:]
        self.write(report.nodeid, **row)


def pytest_configure(config: pytest.Config) -> None:
    """Nothing without the file, nor in a worker of pytest-xdist."""
    path = os.environ.get("FASTREID_VI_BENCH_ROWS")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(Path(path)), "fastreid-vi-outcomes")
