"""A pytest plugin: fastreid_vi._retrieval is the library that an environment variable names.

FASTREID_VI_RETRIEVAL=/path/to/_retrieval.so python -m pytest -p tests.evaluation.preloaded ...
"""

from __future__ import annotations

import importlib.util
import os
import sys

LIBRARY = "FASTREID_VI_RETRIEVAL"
NAME = "fastreid_vi._retrieval"


def pytest_configure() -> None:
    spec = importlib.util.spec_from_file_location(NAME, os.environ[LIBRARY])
    assert spec is not None
    assert spec.loader is not None
    sys.modules[NAME] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[NAME])
