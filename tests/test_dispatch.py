from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import fastreid_vi
from fastreid_vi import _backend, _dispatch, ops
from fastreid_vi._dispatch import OPS, native_missing

X = torch.rand(2, 3, 4, 4)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
        timeout=120,
    )


def test_the_compiled_room_is_here_and_comes_first() -> None:
    assert native_missing is None
    assert OPS["gem_pool"].choose(X, 3.0, 1e-12) == "cpu"
    young = _dispatch.Op("not_yet", "pool", OPS["gem_pool"].reference, (), OPS["gem_pool"].refuses)
    assert young.choose(X, 3.0, 1e-12) == "reference"


def test_an_override_is_obeyed_and_ends() -> None:
    with fastreid_vi.backend("reference"):
        assert OPS["gem_pool"].choose(X, 3.0, 1e-12) == "reference"
        with fastreid_vi.backend("triton"):
            assert OPS["gem_pool"].choose(X, 3.0, 1e-12) == "triton"
        assert _backend.forced() == "reference"
    assert _backend.forced() is None


def test_a_room_that_cannot_run_says_why() -> None:
    with fastreid_vi.backend("cuda"), pytest.raises(RuntimeError, match=r"gem_pool.*cpu tensors"):
        ops.gem_pool(X)


def test_an_op_without_the_room_keeps_its_order() -> None:
    with fastreid_vi.backend("cuda"):
        ops.pairwise_distance(X[0, 0])


def test_unknown_backend() -> None:
    with (
        pytest.raises(ValueError, match="backend: expected one of reference, cpu"),
        fastreid_vi.backend("tpu"),
    ):
        pass
    failed = run("import fastreid_vi", FASTREID_VI_BACKEND="tpu")
    assert failed.returncode != 0
    assert "FASTREID_VI_BACKEND: expected one of" in failed.stderr


def test_environment_variable() -> None:
    code = (
        "import torch; from fastreid_vi import ops; from fastreid_vi._dispatch import OPS\n"
        "print(OPS['gem_pool'].choose(torch.ones(1, 1, 1, 1), 3.0, 0.0))"
    )
    assert run(code, FASTREID_VI_BACKEND="reference").stdout.strip() == "reference"


def test_the_table_lists_every_op_and_gives_reasons() -> None:
    table = fastreid_vi.backends()
    assert table["gem_pool"]["reference"] == table["gem_pool"]["cpu"] == "built"
    assert table["soft_rank"]["triton"] == "soft_rank has no triton room"
    assert {"reference", "cpu", "triton", "cuda"} == set(table["pattern_pool"])


def test_an_extension_older_than_the_op() -> None:
    entry = OPS["gem_pool"]
    young = _dispatch.Op("not_yet", "pool", entry.reference, ("cpu",), entry.refuses)
    assert young.room("cpu") == "the C++ extension was built without cpu code for not_yet"


def test_without_the_extension_the_reference_runs() -> None:
    code = """
import importlib.util, torch
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "fastreid_vi._C" else find(name, *a)
from fastreid_vi import ops, backends
from fastreid_vi._dispatch import OPS
print(OPS["gem_pool"].choose(torch.ones(1, 1, 1, 1), 3.0, 0.0), "|", backends()["gem_pool"]["cpu"])
"""
    done = run(code)
    assert done.stdout.strip() == "reference | the C++ extension _C was not built", done.stderr


def test_without_triton_the_table_says_so() -> None:
    code = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else find(name, *a)
import fastreid_vi
print(fastreid_vi.backends()["gem_pool"]["triton"])
"""
    assert run(code).stdout.strip() == "Triton is not installed"


def test_light_imports_do_not_load_torch() -> None:
    for module in (
        "fastreid_vi",
        "fastreid_vi.evaluation",
        "fastreid_vi.config",
        "fastreid_vi.methods",
    ):
        done = run(f"import sys, {module}; print('torch' in sys.modules)")
        assert done.stdout.strip() == "False", (module, done.stderr)


def test_autocast_runs_losses_in_float32() -> None:
    x = torch.randn(8, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.pairwise_distance(x.bfloat16()).dtype == torch.float32
        assert (
            ops.center_cluster_loss(x.bfloat16(), torch.arange(8) % 2).loss.dtype == torch.float32
        )
