"""Every launcher of fastreid_vi.nvrtc, run for real: the contract of its op, and for each call the
same launches and the same bits as the host code of the .cu.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cuda.nvrtc import EmulatedRuntime, NvrtcRoom
from tests.ops import test_pool


@pytest.fixture(scope="session")
def launchers(build_folder: Path) -> EmulatedRuntime:
    return EmulatedRuntime(build_folder / "nvrtc")


class TestGemPool(NvrtcRoom, test_pool.TestGemPool):
    pass
