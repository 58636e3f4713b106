"""`certify`: passes as it is, fails when a room or a method is wrong, says what is missing."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastreid_vi import certify, ops
from fastreid_vi._dispatch import OPS
from fastreid_vi.certify.cases import Want, compare, exact, forward, narrow, run
from fastreid_vi.certify.runner import CHOSEN, Selection
from tests.conftest import GOLDEN

CPU = Selection(devices=("cpu",))
GOLD = certify.find(GOLDEN)
CASES = [case for family in certify.FAMILIES for case in family(GOLD)]
PROCEDURES = [procedure for part in certify.PROCEDURES for procedure in part()]


def say(call, *argv: object) -> Any:
    return call("certify", "--golden", GOLDEN, "--device", "cpu", *argv)


def result(call, *argv: object) -> tuple[int, dict[str, Any]]:
    said = say(call, "--json", *argv)
    return said.code, json.loads(said.out)


# As it is.


def test_a_few_ops_as_a_table_and_as_json(call, tmp_path: Path) -> None:
    out = tmp_path / "certificate.json"
    said = say(call, "--only", "gem_pool", "mutual_mean", "--out", out)
    assert said.code == 0, said.out
    rows = [line.split() for line in said.out.splitlines()]
    assert ["gem_pool", "cpu", "on", "cpu", "3"] in [row[:5] for row in rows]
    assert ["mpanet", "chosen", "on", "cpu", "1"] in [row[:5] for row in rows]
    assert said.out.splitlines()[-2].endswith("all right")
    found = json.loads(out.read_text())
    assert found["ok"]
    assert not found["failed"]
    assert found["versions"]["torch"] == torch.__version__
    assert {row["name"] for row in found["rows"]} == {"gem_pool", "mpanet"}
    row = next(r for r in found["rows"] if r["name"] == "gem_pool")
    assert {check["kind"] for check in row["checks"]} == {"forward", "gradient"}
    assert all(0 <= c["error"] <= c["tolerance"] for c in row["checks"])
    assert str(tmp_path) not in out.read_text()


@pytest.mark.parametrize("room", ["reference", "cpu"])
def test_every_op_case(room: str) -> None:
    """The cases that `certify` runs are tests here as well."""
    for dtype in (torch.float32, torch.float64):
        with certify_backend(room):
            for case in CASES:
                checks = list(run(case, dtype, "cpu"))
                assert checks, case.name
                assert all(c.ok for c in checks), (case.name, [c for c in checks if not c.ok])


def certify_backend(room: str) -> Any:
    from fastreid_vi import backend

    return backend(room)


FAST = [p for p in PROCEDURES if not p.name.startswith(("aligngan/steps", "aligngan/embedder"))]


@pytest.mark.parametrize("procedure", FAST, ids=lambda p: p.name)
def test_every_procedure(procedure: certify.Procedure) -> None:
    for task in certify.runner.procedure_tasks([procedure], GOLD, CPU):
        row = task.run()
        assert row.ok or row.skipped, row.why()


def test_everything_is_covered() -> None:
    # Steps of the evaluator on a device, which has golden vectors as a whole.
    steps = {"rank_rows", "merge_top_k", "pair_scores", "row_norms"}
    steps |= {"rerank_neighbors", "rerank_average", "rerank_fuse"}
    public = {name for name in OPS if not name.endswith("_backward")} - steps
    assert {case.op for case in CASES} == public
    owners = {procedure.owner for procedure in PROCEDURES}
    evaluator = {"rank_metrics", "k_reciprocal_rerank", "multi_spectral_rerank"}
    assert owners == evaluator | {"baseline", "mpanet", "lba", "mcja", "aligngan"}
    for owner in ("mpanet", "lba", "mcja", "aligngan"):
        named = " ".join(p.name for p in PROCEDURES if p.owner == owner)
        assert "sampler" in named
        assert "layout" in named or "entries and parameters" in named
    names = [(p.owner, p.name) for p in PROCEDURES] + [(c.op, c.name) for c in CASES]
    assert len(set(names)) == len(names)


def test_gradients_are_asked_for_wherever_an_op_has_them() -> None:
    # Detached; no golden gradient; not differentiable.
    without = {"feature_mask", "pairwise_distance", "augment", "random_erase"}
    assert {c.op for c in CASES if c.gradients} == {c.op for c in CASES} - without


# Broken on purpose.


def off(function: Any, factor: float) -> Any:
    def wrong(*args: Any) -> Any:
        found = function(*args)
        if isinstance(found, Tensor):
            return found * factor
        return (found[0] * factor, *found[1:])

    return wrong


@pytest.mark.parametrize("factor", [1 + 1e-4, 0.5, float("nan")])
@pytest.mark.parametrize(
    ("name", "kind"), [("gem_pool", "forward"), ("gem_pool_backward", "gradient")]
)
def test_a_broken_room_fails(
    call, monkeypatch: pytest.MonkeyPatch, name: str, kind: str, factor: float
) -> None:
    op = OPS[name]
    monkeypatch.setitem(op._found, "cpu", off(op.room("cpu"), 1 + (factor - 1) * 10))
    code, found = result(call, "--only", "gem_pool", "map_separation_loss")
    assert code == 1
    assert not found["ok"]
    assert found["failed"]
    assert all(line["what"].startswith("gem_pool: ") for line in found["failed"])
    assert all("(cpu on cpu" in line["what"] for line in found["failed"])
    assert all(f"({kind})" in line["why"] for line in found["failed"])
    said = say(call, "--only", "gem_pool")
    assert said.code == 1
    assert "FAILED: gem_pool: " in said.out
    assert "failed" in said.out.splitlines()[-1]


def test_a_room_that_raises_fails(call, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("segment\nviolated")

    monkeypatch.setitem(OPS["soft_rank"]._found, "reference", broken)
    code, found = result(call, "--only", "soft_rank")
    assert code == 1
    assert {line["why"] for line in found["failed"]} == {"RuntimeError: segment violated"}


def test_a_broken_method_fails(call, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastreid_vi.methods.mpanet import model

    monkeypatch.setattr(model.MPANet, "after_step", lambda self: None)
    monkeypatch.setattr(model.MPANet, "update_means", lambda self: None)
    code, found = result(call, "--only", "mpanet/train_forward")
    assert code == 1
    assert all(line["what"].startswith("mpanet: ") for line in found["failed"])


def test_a_broken_sampler_and_ranking_fail(call, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastreid_vi.data.sampler import PairedIdentity
    from fastreid_vi.evaluation import positions

    drawn, ranked = PairedIdentity.plan, positions._reference
    monkeypatch.setattr(PairedIdentity, "plan", lambda self: drawn(self)[:, ::-1])
    code, found = result(call, "--only", "lba/sampler")
    assert code == 1
    assert [line["what"].split(" (")[0] for line in found["failed"]] == [
        "lba: lba/sampler_schedule, sampler"
    ]

    def late(*args: Any) -> Any:
        found = ranked(*args)
        return found._replace(last=found.last + 1)

    monkeypatch.setattr(positions, "_reference", late)
    code, found = result(call, "--only", "eval_market")
    assert code == 1
    assert {line["what"] for line in found["failed"]} == {
        "rank_metrics: eval/eval_market (reference on cpu, -)"
    }


def test_a_room_that_did_not_run_fails(call, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in CASES if c.op == "gem_pool")
    idle = dataclasses.replace(
        case,
        call=lambda x: {"y": x.pow(3).mean((2, 3)).pow(1 / 3)},
        gradients={},
        cotangents={},
    )
    tasks = certify.runner.op_tasks([lambda golden: iter([idle])], GOLD, CPU)
    rows = [task.run() for task in tasks]
    assert {row.backend for row in rows} >= {"reference", "cpu"}
    assert all(row.fault == f"the {row.backend} room did not run" for row in rows)


def test_products_are_in_full_precision_meanwhile_only() -> None:
    settings: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before, seen = [setting.fp32_precision for setting in settings], []

    def look(golden: Any, dtype: torch.dtype, device: str) -> Any:
        seen.append([setting.fp32_precision for setting in settings])
        yield compare("it", "forward", [1.0], exact([1.0]), dtype)

    procedure = certify.Procedure(owner="look", name="look", run=look)
    rows = [t.run() for t in certify.runner.procedure_tasks([procedure], GOLD, CPU)]
    assert all(row.ok for row in rows)
    assert seen == [["ieee", "ieee"]] * 2
    assert [setting.fp32_precision for setting in settings] == before


def test_a_case_that_compares_nothing_fails() -> None:
    case = dataclasses.replace(CASES[0], results={}, gradients={}, cotangents={})
    tasks = certify.runner.op_tasks([lambda golden: iter([case])], GOLD, CPU)
    assert not any(task.run().ok for task in tasks)


# What is missing.


def test_no_golden_vectors(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for argv in (("--golden", tmp_path), ()):
        monkeypatch.setenv("FASTREID_VI_GOLDEN", str(tmp_path))
        said = call("certify", *argv)
        assert said.code == 1
        assert f"none in {tmp_path}; they are tests/golden of the source" in said.complaint
        assert "--golden or FASTREID_VI_GOLDEN" in said.complaint
    monkeypatch.setenv("FASTREID_VI_GOLDEN", str(GOLDEN))
    assert call("certify", "--only", "feature_mask", "--device", "cpu").code == 0


def test_an_installation_without_its_source(
    call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FASTREID_VI_GOLDEN", raising=False)
    monkeypatch.setattr(certify.vectors, "__file__", str(tmp_path / "a" / "b" / "vectors.py"))
    said = call("certify")
    assert said.code == 1
    assert said.complaint.startswith(
        "golden vectors: this is not a checkout; they are tests/golden"
    )


def test_a_missing_or_damaged_file_is_named(call, tmp_path: Path) -> None:
    folder = tmp_path / "golden"
    shutil.copytree(GOLDEN, folder)
    (folder / "lba" / "gem.npz").write_bytes(b"PK\x03\x04 and no more")
    said = call("certify", "--golden", folder, "--only", "gem_pool")
    assert said.code == 1
    assert f"cannot be read: {folder / 'lba' / 'gem.npz'}" in said.complaint
    (folder / "lba" / "gem.npz").unlink()
    said = call("certify", "--golden", folder, "--only", "gem_pool")
    assert said.complaint == f"golden vectors are missing: {folder / 'lba' / 'gem.npz'}"


@pytest.mark.parametrize(
    ("argv", "needle"),
    [
        (["--only", "nothing_like_it"], "nothing to certify: no case has that name"),
        (["--backend", "fpga"], "--backend: expected one of reference, cpu"),
        (["--out", "/no/such/place/c.json"], "--out: /no/such/place: no such folder"),
    ],
)
def test_wrong_requests(call, argv: list[str], needle: str) -> None:
    said = say(call, *argv)
    assert said.code == 1
    assert needle in said.complaint


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_here(call) -> None:
    said = call("certify", "--golden", GOLDEN, "--device", "cuda")
    assert said.code == 1
    assert said.complaint == "--device: expected cpu, got 'cuda'"


def test_a_room_that_is_not_built_is_skipped(call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPS["gem_pool"]._found, "cpu", "the C++ extension _C was not built")
    code, found = result(call, "--only", "gem_pool")
    assert (code, found["failed"]) == (0, [])
    assert found["skipped"] == ["gem_pool in cpu: the C++ extension _C was not built"]
    said = say(call, "--only", "gem_pool", "--backend", "cpu")
    assert said.code == 1
    assert said.complaint == "nothing to certify: the C++ extension _C was not built"


def test_a_backend_that_is_forced_from_outside(call) -> None:
    with certify_backend("reference"):
        code, found = result(call, "--only", "gem_pool", "mutual_mean")
    assert code == 0
    assert {row["backend"] for row in found["rows"]} == {"reference"}


def test_one_room_alone(call) -> None:
    code, found = result(call, "--only", "gem_pool", "mutual_mean", "--backend", "reference")
    assert code == 0
    assert {row["backend"] for row in found["rows"]} == {"reference"}
    assert CHOSEN not in {row["backend"] for row in found["rows"]}


# Comparisons.


@pytest.mark.parametrize(
    ("got", "want", "ok"),
    [
        ([1.0, 2.0], forward([1.0, 2.0]), True),
        ([1.0, 2.0 + 1e-8], forward([1.0, 2.0]), False),
        ([1.0, 2.0 + 1e-8], narrow([1.0, 2.0], 1e-6), True),
        ([1.0], forward([1.0, 2.0]), False),
        ([float("nan"), 2.0], forward([1.0, 2.0]), False),
        ([1.0, 2.0], forward([float("nan"), 2.0]), False),
        ([float("nan"), 2.0], forward([float("nan"), 2.0]), True),
        ([float("inf"), 2.0], forward([1.0, 2.0]), False),
        ([float("inf"), 2.0], forward([float("inf"), 2.0]), True),
        ([float("-inf"), 2.0], forward([float("inf"), 2.0]), False),
        ([0.0, 0.0], forward([0.0, 0.0]), True),
        ([0.0, 1e-8], forward([0.0, 0.0]), False),
        ([3, 4], exact([3, 4]), True),
        ([3, 5], exact([3, 4]), False),
        (["a", "b"], exact(["a", "b"]), True),
        (["a", "c"], exact(["a", "b"]), False),
        ([1.5], Want([1.0], 1.0, 1.0, 0.25), False),
        ([], forward(np.zeros(0)), True),
    ],
)
def test_compare(got: Any, want: Want, ok: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check = compare("it", "forward", np.asarray(got), want, torch.float64)
    assert check.ok is ok


def test_fill_values_are_those_of_the_readme() -> None:
    from fastreid_vi.certify.fill import filled

    k = np.arange(6)
    wanted = 2.0 * (((31 * k**2 + 7919 * k + 104729 * 3) % 10007) / 10007 - 0.5)
    assert filled((2, 3), 3, 2.0).flatten().tolist() == wanted.astype(np.float32).tolist()
    assert ops.gem_pool(filled((1, 1, 2, 2), 0, 1.0).abs()).isfinite().all()
