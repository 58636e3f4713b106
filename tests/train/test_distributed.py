"""Several processes give what one gives on the joined batch, and survive the death of one."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing, nn

from fastreid_vi.layers import DistributionAdapter
from fastreid_vi.train.batchnorm import JoinedBatchNorm, synchronise
from fastreid_vi.train.checkpoint import load_safetensors
from fastreid_vi.train.distributed import Team, leave, own_device
from fastreid_vi.train.errors import StoppedElsewhere, TrainError
from tests.train.crew import finish, launch, recipe_of, run

CPU = torch.device("cpu")
METHODS = ("baseline", "mpanet", "mcja", "aligngan")  # LbA pairs the persons of a process
FINAL = Path("checkpoints/last/model.safetensors")


def curve(run_dir: Path) -> list[dict[str, float]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [r["terms"] for r in map(json.loads, lines) if r["kind"] == "step"]


@pytest.fixture(scope="module")
def two(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two processes in float64, batch statistics of both together."""
    folder = tmp_path_factory.mktemp("two")
    finish(launch(",".join(METHODS), tree, folder, "double", "bn=sync"))
    return folder


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_are_one(tree: Path, tmp_path: Path, two: Path, name: str) -> None:
    """Every term of every step within 1e-6, the weights after the epoch within 1e-5.

    Rounding (1e-16) grows about tenfold in a step: training is chaotic. In float32 the first two
    steps agree within 3e-5 and nothing can be said of the tenth.
    """
    run(tree, tmp_path / "one", recipe_of(name), double=True)
    alone, together = curve(tmp_path / "one"), curve(two / name)
    assert len(alone) == len(together) > 1
    for step, (one, other) in enumerate(zip(alone, together, strict=True)):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-9), step
    weights, _ = load_safetensors(tmp_path / "one" / FINAL)
    found, _ = load_safetensors(two / name / FINAL)
    assert list(found) == list(weights)
    for key, tensor in weights.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-8, msg=key)


def test_a_killed_worker_resumes(tree: Path, tmp_path: Path) -> None:
    for folder, flags, restarts in (("whole", (), 0), ("parts", ("dies=1,4",), 1)):
        (tmp_path / folder).mkdir()
        finish(launch("small", tree, tmp_path / folder, *flags, restarts=restarts))
    assert (tmp_path / "parts" / "died").exists()
    whole, parts = tmp_path / "whole" / "small", tmp_path / "parts" / "small"
    assert curve(parts) == curve(whole)
    assert (parts / FINAL).read_bytes() == (whole / FINAL).read_bytes()


def test_all_stop_on_the_signal_of_one(tree: Path, tmp_path: Path) -> None:
    said = finish(launch("small", tree, tmp_path, "signals=1,3"), code=1)
    assert "rank 0: stopped by SIGTERM after step 3; checkpoint" in said
    assert "rank 1: stopped by SIGTERM after step 3; checkpoint" in said
    last = tmp_path / "small" / "checkpoints" / "last"
    assert last.resolve().name == "step-00000003"
    state = torch.load(last / "state.pt", weights_only=True)
    streams = [state["random"]["torch"], *(other["torch"] for other in state["others"])]
    assert len(streams) == 2
    assert not torch.equal(*streams)


class Two:
    """Runs a function in two gloo processes and hands their results over."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, work: Any) -> list[Any]:
        multiprocessing.spawn(_one_of_two, (str(self.folder), work), nprocs=2)
        return [torch.load(self.folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def _one_of_two(rank: int, folder: str, work: Any) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.save(work(rank), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
    leave(0)


@pytest.fixture
def in_two(tmp_path: Path) -> Two:
    return Two(tmp_path)


def images() -> torch.Tensor:
    return torch.randn(6, 5, 4, 3, generator=torch.Generator().manual_seed(1)) * 3 + 2


def network(momentum: float | None = 0.1) -> nn.Module:
    torch.manual_seed(0)
    wide = nn.BatchNorm2d(5, momentum=momentum)
    nn.init.normal_(wide.weight)
    return nn.Sequential(nn.Conv2d(5, 5, 3, padding=1), wide, nn.ReLU(), nn.Flatten(),
                         nn.Linear(60, 4), nn.BatchNorm1d(4))  # fmt: skip


def _trained(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    inputs = images.clone().requires_grad_()
    network(inputs).square().sin().mean().backward()
    assert inputs.grad is not None
    return inputs.grad


def _half(rank: int) -> Any:
    model, team = network().double(), Team(CPU)
    synchronise(model, CPU)
    inputs = images().double()[slice(3 * rank, 3 * rank + 3)]
    grad = _trained(model, inputs)
    team.average_gradients(list(model.parameters()))
    return grad, [p.grad for p in model.parameters()], model.state_dict()


def test_batch_norm_of_two_processes(in_two: Two) -> None:
    (first, grads, state), (second, *_, others) = in_two(_half)
    model = network().double()
    whole = _trained(model, images().double())
    # The loss is the mean over processes: each sees twice the gradient of the joined mean.
    torch.testing.assert_close(torch.cat([first, second]) / 2, whole)
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(grad, parameter.grad)
    assert list(state) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(state[name], tensor)
        assert torch.equal(others[name], state[name]), name


def _uneven(rank: int) -> Any:
    norm = network()[1].double()
    joined = nn.Sequential(norm)
    synchronise(joined, CPU)
    inputs = images().double()[slice(0, 2) if rank == 0 else slice(2, 6)]
    outputs = joined(inputs)
    joined.eval()
    return outputs.detach(), joined(inputs).detach(), joined.state_dict()


def test_batch_norm_of_unequal_shares(in_two: Two) -> None:
    (first, evaluated, state), (second, *_) = in_two(_uneven)
    norm = network()[1].double()
    torch.testing.assert_close(torch.cat([first, second]), norm(images().double()))
    for name, tensor in norm.state_dict().items():
        torch.testing.assert_close(state[f"0.{name}"], tensor)
    torch.testing.assert_close(evaluated, norm.eval()(images().double()[:2]))


def test_converted_norms_keep_their_names_and_tensors() -> None:
    model = network(momentum=None)
    before = dict(model.named_parameters()) | dict(model.named_buffers())
    model.eval()
    model[5].bias.requires_grad_(False)
    synchronise(model, CPU)
    assert sum(isinstance(m, JoinedBatchNorm) for m in model.modules()) == 2
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert not model[5].training
    assert not model[5].bias.requires_grad


def test_an_adapter_in_parts_is_the_fused_one() -> None:
    torch.manual_seed(2)
    fused = DistributionAdapter(6).double()
    nn.init.normal_(fused.norm_bn.weight)
    nn.init.normal_(fused.ca_bn.weight)
    parts = copy.deepcopy(fused)
    synchronise(parts, CPU)
    assert isinstance(parts.norm_bn, JoinedBatchNorm)
    features = torch.randn(5, 6, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(_trained(parts, features), _trained(fused, features))
    for name, parameter in fused.named_parameters():
        torch.testing.assert_close(parts.get_parameter(name).grad, parameter.grad)
    for name, buffer in fused.named_buffers():
        torch.testing.assert_close(parts.get_buffer(name), buffer)


def _agreements(rank: int) -> Any:
    team = Team(CPU)
    found: dict[str, Any] = {
        "signal": [team.agreed(None), team.agreed(15 if rank else None), team.agreed(2 + rank)],
        "any": [team.any(False), team.any(rank == 1)],
        "first": team.first(lambda: f"from {rank}"),
        "silent": team.first(lambda: open(__file__).readline(), tell=False) is None,  # noqa: SIM115
        "gathered": team.gathered(rank),
    }
    terms = {"a": torch.tensor(1.0 + rank), "b": torch.tensor(5, dtype=torch.float64)}
    found["mean"] = team.mean(terms)
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(4)]
    parameters[0].grad = torch.tensor([1.0, 2.0]) * (1 + rank)
    if rank == 1:
        parameters[2].grad = torch.ones(2)
    parameters[3].grad = torch.full((2,), float(rank))
    team.average_gradients(parameters)
    found["grads"] = [None if p.grad is None else p.grad.tolist() for p in parameters]
    module = nn.Linear(2, 2)
    nn.init.constant_(module.weight, float(rank))
    team.share(module)
    found["shared"] = module.weight.tolist()
    for name, work in (
        ("failed", lambda: team.agreed(None, failed=rank == 1)),
        ("first failed", lambda: team.first(lambda: 1 // rank)),
    ):
        try:
            found[name] = work()
        except (StoppedElsewhere, ZeroDivisionError) as error:
            found[name] = type(error).__name__
    return found


def test_what_processes_agree_on(in_two: Two) -> None:
    first, second = in_two(_agreements)
    for found in (first, second):
        assert found["signal"] == [None, 15, 3]
        assert found["any"] == [False, True]
        assert found["first"] == "from 0"
        assert found["mean"] == {"a": 1.5, "b": 5.0}
        assert found["mean"]["b"].dtype == torch.float64
        assert found["grads"] == [[1.5, 3.0], None, [0.5, 0.5], [0.5, 0.5]]
        assert found["shared"] == [[0.0, 0.0], [0.0, 0.0]]
    assert [first["silent"], second["silent"]] == [False, True]
    assert [first["gathered"], second["gathered"]] == [[0, 1], [1]]
    assert first["failed"] == "StoppedElsewhere"
    assert [first["first failed"], second["first failed"]] == [
        "ZeroDivisionError", "StoppedElsewhere",
    ]  # fmt: skip


def test_a_numbered_device_for_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainError, match="expected cuda without a number under torchrun"):
        own_device("cuda:1")
    assert own_device("cpu") == CPU


def test_identities_that_cannot_be_shared(tree: Path, tmp_path: Path) -> None:
    said = finish(launch("small", tree, tmp_path, "identities=3"), code=1)
    assert "identities: expected a multiple of the 2 processes, got 3" in said
    assert not (tmp_path / "small").exists()
