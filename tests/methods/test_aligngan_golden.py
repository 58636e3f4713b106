"""AlignGAN against the released code's numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastreid_vi import ops
from fastreid_vi.config import INFRARED, VISIBLE, Batch
from fastreid_vi.evaluation import rank_metrics
from fastreid_vi.methods import recipe
from fastreid_vi.methods.aligngan import AlignGAN, AlignGANOptions, losses
from fastreid_vi.methods.aligngan.discriminator import Discriminator, JointDiscriminator
from fastreid_vi.methods.aligngan.embedder import Embedded, Embedder
from fastreid_vi.methods.aligngan.generator import Generator, GeneratorNorm
from fastreid_vi.methods.aligngan.losses import Side
from fastreid_vi.methods.base import Losses
from tests.conftest import golden
from tests.methods.aligngan_cases import JOINT, WARMUP, PooledConv, backward, build

KINDS = [torch.float32, torch.float64]


def tensor(array: Any, kind: torch.dtype = torch.float64) -> Tensor:
    return torch.from_numpy(np.asarray(array, dtype=np.float64)).to(kind)


def close(actual: Tensor | None, expected: Any, tolerance: float) -> None:
    """Largest error against the largest value."""
    assert actual is not None
    want = tensor(expected)
    got = actual.detach().double()
    assert got.shape == want.shape
    scale = max(float(want.abs().max()), 1e-12)
    assert float((got - want).abs().max()) <= tolerance * scale


def case(arrays: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    prefix = f"{name}__"
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def filled(shape: Iterable[int], s: int, scale: float) -> Tensor:
    """The README's H(shape, s, scale)."""
    shape = tuple(shape)
    k = np.arange(int(np.prod(shape)), dtype=np.int64)
    values = scale * (((31 * k * k + 7919 * k + 104729 * s) % 10007) / 10007 - 0.5)
    return torch.from_numpy(values.astype(np.float32).reshape(shape)).double()


def check_gradients(network: nn.Module, v: dict[str, np.ndarray], tolerance: float) -> int:
    """Gradients in full, by norm, by first elements; how many were there."""
    counted = 0
    for field, expected in v.items():
        kind, _, name = field.partition("__")
        if kind not in ("g", "gnorm", "gfirst16"):
            continue
        gradient = network.get_parameter(name).grad
        assert gradient is not None, name
        if kind == "gnorm":
            norm = float(gradient.double().norm())
            assert norm == pytest.approx(float(expected), rel=tolerance), name
        elif kind == "gfirst16":
            first = tensor(expected) - gradient.double().flatten()[:16]
            assert float(first.abs().max()) <= tolerance * float(gradient.abs().max()), name
        else:
            close(gradient, expected, tolerance)
        counted += 1
    return counted


# Networks.


@pytest.mark.parametrize("kind", KINDS)
def test_instance_norm_of_the_generators(kind: torch.dtype) -> None:
    v = case(golden("aligngan/instance_norm"), "a")
    norm = GeneratorNorm(len(v["w"]), "running", "none").to(kind)
    state = {"weight": "w", "bias": "bias", "running_mean": "rm0", "running_var": "rv0"}
    norm.load_state_dict({k: tensor(v[f], kind) for k, f in state.items()}, strict=False)
    close(norm(tensor(v["x1"], kind)), v["train_y1"], 1e-5)
    norm(tensor(v["x2"], kind))
    close(norm.running_mean, v["rm2"], 1e-6)
    close(norm.running_var, v["rv2"], 1e-6)
    assert int(norm.num_batches_tracked) == int(v["num_batches_tracked"]) == 0
    close(norm.eval()(tensor(v["x1"], kind)), v["eval_y1"], 1e-5)
    norm.in_eval = "instance"  # as in training, but nothing moves
    close(norm(tensor(v["x1"], kind)), v["train_y1"], 1e-5)
    close(norm.running_mean, v["rm2"], 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_generator(kind: torch.dtype) -> None:
    v = case(golden("aligngan/generator"), "a")
    conv_dim, blocks = v["w__model.0.weight"].shape[0], 2
    network = Generator(conv_dim, blocks).to(kind)
    own = {k[3:]: tensor(a, kind) for k, a in v.items() if k[:3] in ("w__", "b__")}
    counters = {k: b for k, b in network.state_dict().items() if k.endswith("tracked")}
    network.load_state_dict({**own, **counters})
    x = tensor(v["x"], kind).requires_grad_()
    with torch.no_grad():
        close(network.eval()(x), v["y_eval_initial_buffers"], 1e-5)
    y = network.train()(x)
    y.backward(tensor(v["gout"], kind))
    close(y, v["y_train"], 1e-5)
    close(x.grad, v["gx_train"], 1e-4)
    assert check_gradients(network, v, 1e-4) > 20
    for name in (k for k in v if k.startswith("b1__")):
        close(network.state_dict()[name[4:]], v[name], 1e-5)
    with torch.no_grad():
        close(network.eval()(x), v["y_eval_updated_buffers"], 1e-5)


def load(network: nn.Module, v: dict[str, np.ndarray], kind: torch.dtype) -> None:
    """Weights of a discriminator; biases that nothing uses may be absent."""
    given = {k[3:]: tensor(a, kind) for k, a in v.items() if k.startswith("w__")}
    missing = network.load_state_dict(given, strict=False)
    assert not missing.unexpected_keys
    assert all(not network.get_parameter(k).requires_grad for k in missing.missing_keys)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_discriminator(kind: torch.dtype) -> None:
    v = case(golden("aligngan/discriminators"), "plain")
    network = Discriminator(v["w__model.0.weight"].shape[0], layers=3).to(kind)
    load(network, v, kind)
    x = tensor(v["x"], kind).requires_grad_()
    y = network(x)
    y.backward(tensor(v["gout"], kind))
    assert x.grad is not None
    close(y, v["y"], 1e-5)
    close(x.grad[:, :, ::3, ::3], v["gx_stride3"], 1e-4)
    assert float(x.grad.norm()) == pytest.approx(float(v["gx_norm"]), rel=1e-4)
    assert check_gradients(network, v, 1e-4) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_joint_discriminator(kind: torch.dtype) -> None:
    v = case(golden("aligngan/discriminators"), "cond")
    network = JointDiscriminator(v["features"].shape[1], int(v["conv_dim"])).to(kind)
    load(network, v, kind)
    low = tensor(v["image_low_u8"], kind) / 127.5 - 1
    x = low.repeat_interleave(4, 2).repeat_interleave(4, 3).requires_grad_()
    features = tensor(v["features"], kind).requires_grad_()
    y = network(x, features)
    y.backward(tensor(v["gout"], kind))
    assert x.grad is not None
    assert features.grad is not None
    close(y, v["y"], 1e-5)
    close(x.grad[:, :, ::5, ::5], v["gx_stride5"], 1e-4)
    assert float(x.grad.norm()) == pytest.approx(float(v["gx_norm"]), rel=1e-4)
    close(features.grad[:, ::16], v["gf_stride16"], 1e-4)
    assert float(features.grad.norm()) == pytest.approx(float(v["gf_norm"]), rel=1e-4)
    assert check_gradients(network, v, 1e-4) == 9


def fill_embedder(network: nn.Module, s: int) -> None:
    for q, (name, p) in enumerate(network.named_parameters()):
        if p.dim() > 1:
            value = filled(p.shape, s + q, 4 / np.sqrt(p.shape[1]))
        elif name.endswith("bottle.1.weight"):
            value = 1 + filled(p.shape, s + q, 0.5)
        else:
            value = filled(p.shape, s + q, 0.2)
        p.data.copy_(value)


@pytest.mark.parametrize("kind", KINDS)
def test_embedder(kind: torch.dtype) -> None:
    v = golden("aligngan/embedder")
    classes, rows, height, width, s = (int(n) for n in v["cfg_ncls_B_fh_fw_seed"])
    network = Embedder(classes, 2048, 256, dropout=0.0).to(kind)
    assert [n for n, _ in network.named_parameters()] == list(v["param_names_in_order"])
    fill_embedder(network, s)
    features = filled((rows, 2048, height, width), s + 50, 4).relu().to(kind)
    close(features.flatten()[:8], v["features_check_first8"], 1e-6)
    assert float(features.double().sum()) == pytest.approx(float(v["features_check_sum"]), rel=1e-9)
    out = network(features)
    close(out.logits, v["train_nodropout_logits"], 1e-5)
    close(out.embedding, v["train_embedding"], 1e-5)
    close(out.pooled[:, ::16], v["pooled_stride16"], 1e-5)
    norm = network.get_submodule("classifier0.bottle.1")
    close(norm.running_mean, v["bn_running_mean_after"], 1e-5)
    close(norm.running_var, v["bn_running_var_after"], 1e-5)
    out = network.eval()(features)
    close(out.logits, v["eval_logits"], 1e-5)
    close(out.embedding, v["eval_embedding"], 1e-5)


@pytest.mark.parametrize("name", ["full", "odd"])
def test_encoder_input(name: str) -> None:
    v = case(golden("aligngan/resize_norm"), name)
    seen: list[Tensor] = []

    class Looks(PooledConv):
        def forward(self, images: Tensor, modality: Tensor | None = None) -> Tensor:
            seen.append(images)
            return super().forward(images)

    network = AlignGAN(3, AlignGANOptions(conv_dim=2), backbone=Looks(4)).double()
    images = ((tensor(v["u8"]) / 255 - 0.5) / 0.5).requires_grad_()
    network.encode(images)
    (y,) = seen
    assert tuple(y.shape[2:]) == (384, 192)
    close(
        y[:, :, torch.from_numpy(v["y_rows"])][..., torch.from_numpy(v["y_cols"])], v["y_sub"], 5e-5
    )
    close(y[..., :7, :7], v["y_corner"], 5e-5)
    close(y[..., -7:, -7:], v["y_corner_end"], 5e-5)
    close(y.sum((2, 3)), v["y_sum"], 1e-4)
    u0, u1, u2 = (int(u) for u in v["upstream_coeffs"])
    c, i, j = np.indices(tuple(y.shape[1:]))
    upstream = tensor((((u0 * i + u1 * j + u2 * c) % 17) - 8) / 8)
    y.backward(upstream.expand_as(y))
    assert images.grad is not None
    close(images.grad[:, :, ::3, ::3], v["gx_sub"], 2e-4)
    close(images.grad[..., :5, :5], v["gx_corner"], 2e-4)


# Losses.

TRIPLETS = ["cross", "same", "soft_rank_1_2", "p18k4", "no_positive", "no_negative"]


def side(embedding: Tensor, labels: Tensor) -> Side:
    return Side(Embedded(embedding, embedding, embedding), labels)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TRIPLETS)
def test_triplet(name: str, kind: torch.dtype) -> None:
    v = case(golden("aligngan/triplet"), name)
    soft = tuple(int(k) for k in v["soft_bh"])
    assert soft == ((1, 2) if name == "soft_rank_1_2" else (0, 0))
    first = tensor(v["emb1"], kind).requires_grad_()
    second = tensor(v["emb2"], kind).requires_grad_()
    anchors = side(first, torch.from_numpy(v["l1"]))
    candidates = None if v["same_tensor"] else side(second, torch.from_numpy(v["l2"]))
    loss = losses.batch_hard(anchors, candidates, margin=float(v["margin"]), soft_bh=soft)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(v["loss"]), rel=1e-5, abs=1e-7)
    close(first.grad, v["g1"], 1e-4)
    if candidates is not None:
        close(second.grad, v["g2"], 1e-4)


def test_plain_and_fused_triplet_agree() -> None:
    v = case(golden("aligngan/triplet"), "cross")
    results = []
    for soft in ((0, 0), (0, 1)):
        x = tensor(v["emb1"]).requires_grad_()
        anchors, candidates = (side(a, torch.from_numpy(v["l1"])) for a in (x, tensor(v["emb2"])))
        loss = losses.batch_hard(anchors, candidates, soft_bh=soft)
        loss.backward()
        results.append(float(loss.detach()))
    assert results[0] > results[1]  # the second hardest negative is easier
    assert losses.batch_hard(anchors, candidates, soft_bh=(99, 0)).item() == 0.0


@pytest.mark.parametrize("layout", ["aligned", "misaligned"])
def test_pixel_triplet_terms(layout: str) -> None:
    v = case(golden("aligngan/triplet"), "pixel_terms")
    aligned = layout == "aligned"
    visible = torch.from_numpy(v["rgb_pids"])
    infrared = visible if aligned else torch.from_numpy(v["ir_pids"])
    fake, real = side(tensor(v["fake"]), visible), side(tensor(v["real"]), infrared)
    first = losses.batch_hard(fake, real)
    assert float(first) == pytest.approx(float(v[f"{layout}_1"]), rel=1e-5)
    second = losses.batch_hard(real, fake)
    assert float(second) == pytest.approx(float(v[f"{layout}_2_feature_stage"]), rel=1e-5)
    one = torch.zeros(12, 7)
    way = losses.Translation(*[torch.zeros(1)] * 5)
    for labels, key in (("correct", "feature_stage"), ("official", "pixel_stage")):
        options = AlignGANOptions(pixel_triplet_labels=labels)
        sides = (Side(s.out._replace(logits=one), s.labels) for s in (fake, real))
        found = losses.generator_losses(way, way, *sides, options).terms["triplet"]
        expected = float(v[f"{layout}_1"]) + float(v[f"{layout}_2_{key}"])
        assert float(found) == pytest.approx(expected, rel=1e-5)


# One iteration of every stage.

NETWORKS = {
    "G_rgb2ir": ("visible_to_infrared", 100),
    "G_ir2rgb": ("infrared_to_visible", 200),
    "D_rgb": ("visible_discriminator", 300),
    "D_rgb_warmup": ("visible_warmup_discriminator", 400),
    "D_ir_warmup": ("infrared_warmup_discriminator", 500),
    "D_ir": ("infrared_discriminator", 600),
    "encoder": ("backbone", 700),
    "embeder": ("embedder", 800),
}


def released(v: dict[str, np.ndarray]) -> AlignGAN:
    """The golden file's networks in float64."""
    *_, classes, s = (int(n) for n in v["cfg_P_K_ncls_seed"])
    options = AlignGANOptions(
        conv_dim=2,
        residual_blocks=1,
        dropout=0.0,
        pixel_images=0,
        pixel_triplet_labels="official",
    )
    network = AlignGAN(classes, options, backbone=PooledConv()).double()
    for name, offset in NETWORKS.values():
        part = network.get_submodule(name)
        if name == "embedder":
            fill_embedder(part, s + offset)
            continue
        norms = {id(m.weight) for m in part.modules() if isinstance(m, GeneratorNorm)}
        for q, p in enumerate(part.parameters()):
            scale = 3 / np.sqrt(np.prod(p.shape[1:])) if p.dim() > 1 else 0.3
            value = filled(p.shape, s + offset + q, scale)
            if id(p) in norms:
                value = 1 + filled(p.shape, s + offset + q, 0.5)
            p.data.copy_(value)
    return network


def golden_batch(v: dict[str, np.ndarray], infrared_pids: str = "pids") -> Batch:
    def images(name: str) -> Tensor:
        low = torch.from_numpy((v[name].astype(np.float64) / 127.5 - 1).astype(np.float32)).double()
        return low.expand(-1, 3, -1, -1).repeat_interleave(8, 2).repeat_interleave(8, 3)

    labels = np.concatenate([v["pids"], v[infrared_pids]])
    modality = torch.tensor([VISIBLE, INFRARED]).repeat_interleave(len(v["pids"]))
    stacked = torch.cat([images("rgb_low_u8"), images("ir_low_u8")])
    k = int(v["cfg_P_K_ncls_seed"][1])
    return Batch(stacked, torch.from_numpy(labels), modality, modality, k)


class Calls:
    """Records the values of a criterion in the order of its calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: dict[str, list[float]] = {}
        for name in ("adversarial", "distance", "identity", "batch_hard"):
            monkeypatch.setattr(losses, name, self._recording(name, getattr(losses, name)))

    def _recording(self, name: str, function: Any) -> Any:
        def record(*args: Any, **options: Any) -> Tensor:
            value: Tensor = function(*args, **options)
            self.found.setdefault(name, []).append(float(value.detach()))
            return value

        return record

    def check(self, v: dict[str, np.ndarray]) -> None:
        names = {"mse": "adversarial", "cls": "identity", "tri": "batch_hard"}
        for theirs, ours in names.items():
            assert self.found[ours] == pytest.approx(list(v[f"calls_{theirs}"]), rel=1e-6)
        if "calls_cycle" in v:  # ours: cycle and mapping of one direction, then of the other
            ir, rgb_again, rgb, ir_again = self.found["distance"]
            assert [rgb, ir] == pytest.approx(list(v["calls_cycle"]), rel=1e-6)
            assert [rgb_again, ir_again] == pytest.approx(list(v["calls_identity"]), rel=1e-6)


def gradients_of(v: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """Fields of one network, under our parameter names."""
    found = {}
    for field, array in v.items():
        kind, _, rest = field.partition("__")
        owner, _, parameter = rest.partition("__")
        if owner == name and kind.startswith("g"):
            renamed = f"conv.{parameter[2:]}" if name == "encoder" else parameter
            found[f"{kind}__{renamed}"] = array
    return found


def check_networks(network: AlignGAN, v: dict[str, np.ndarray], names: Iterable[str]) -> None:
    """Sums over whole planes cancel: up to 6e-6 remain of the released code's rounding."""
    for name in names:
        fields = gradients_of(v, name)
        assert check_gradients(network.get_submodule(NETWORKS[name][0]), fields, 1e-5) > 2, name


def test_feature_warmup(monkeypatch: pytest.MonkeyPatch) -> None:
    v = golden("aligngan/steps")
    network, batch, calls = released(v), golden_batch(v), Calls(monkeypatch)
    stage = case(v, "warm_feature")
    found = backward(network, batch._replace(paired=0), "feature_warmup")
    for theirs, ours in (("cls", "identity"), ("tri", "batch_hard")):
        assert calls.found[ours] == pytest.approx(list(stage[f"calls_{theirs}"]), rel=1e-6)
    assert 100 * float(found.terms["accuracy"]) == pytest.approx(float(stage["returned"][0]))
    check_networks(network, stage, ("encoder", "embeder"))
    build(recipe("aligngan", "sysu").optim, network, "feature_warmup").step()
    bias = network.get_parameter("backbone.conv.bias")[:32]
    close(bias, stage["encoder_bias_after_sgd_first32"], 1e-6)


@pytest.mark.parametrize("which", ["warm_pixel", "joint_pixel", "joint_pixel_rolled_ir_pids"])
def test_pixel_iteration(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    v = golden("aligngan/steps")
    rolled = "pids_rolled" if which.endswith("pids") else "pids"
    network, batch, calls = released(v), golden_batch(v, rolled), Calls(monkeypatch)
    stage = case(v, which)
    pixel, plain = recipe("aligngan", "sysu").optim_of("generators"), which == "joint_pixel"
    phases = WARMUP if which == "warm_pixel" else JOINT[1:]
    totals, norms = [], {}
    for phase in phases:
        found: Losses = backward(network, batch, phase)
        totals.append(float(found.total.detach()))
        if phase.startswith("generators"):
            terms = found.terms
            if plain:
                norms = {
                    field: network.get_submodule("visible_to_infrared").state_dict()[key].clone()
                    for field, key in buffers(stage)
                }
            if which != "joint_pixel_rolled_ir_pids":
                check_networks(network, stage, ("G_rgb2ir", "G_ir2rgb"))
        elif "rolled" not in which:
            check_networks(network, stage, (phase.capitalize(),))  # "d_rgb" is D_rgb
        build(pixel, network, phase).step()
    calls.check(stage)
    expected = [float(x) for x in stage["returned"]]
    shown = [float(terms[n].detach()) for n in ("gan", "cycle", "mapping")]
    assert shown == pytest.approx(expected[:3], rel=1e-5)
    assert totals[1] + totals[2] == pytest.approx(expected[3], rel=1e-5)
    others = [float(terms[n].detach()) for n in ("triplet", "identity")]
    assert others == pytest.approx(expected[4:], rel=1e-5)
    for field, value in norms.items():
        close(value, stage[field], 1e-6)
    if plain:
        weight = network.get_parameter("visible_to_infrared.model.0.weight")
        close(weight, stage["G_rgb2ir_conv0_after_adam"], 1e-6)


def buffers(stage: dict[str, np.ndarray]) -> list[tuple[str, str]]:
    """Fields of G's running statistics, and their keys."""
    fields = [f for f in stage if f.startswith("G_rgb2ir_model") and "running" in f]
    assert len(fields) == 4
    names = [f.removeprefix("G_rgb2ir_").removesuffix("_after") for f in fields]
    return [(f, n.replace("_running", ".running")) for f, n in zip(fields, names, strict=True)]


def test_joint_feature_step(monkeypatch: pytest.MonkeyPatch) -> None:
    v = golden("aligngan/steps")
    network, batch, calls = released(v), golden_batch(v), Calls(monkeypatch)
    stage = case(v, "joint_feature")
    found = backward(network, batch, "feature")
    calls.check(stage)
    check_networks(network, stage, ("encoder", "embeder"))
    fake, real = (100 * float(found.terms[f"accuracy_{n}"]) for n in ("fake", "real"))
    assert [fake, real] == pytest.approx(list(stage["returned"][:2]), rel=1e-5)


# Evaluation.


@pytest.mark.parametrize("name", ["single", "multi"])
def test_evaluation_counts_as_the_released_one(name: str) -> None:
    v = case(golden("aligngan/sampler_evaluation"), name)
    probe, gallery = (F.normalize(tensor(v[n])) for n in ("probe", "gallery"))
    distance = ops.pairwise_distance(probe, gallery, metric="cosine").numpy()
    found = rank_metrics(distance, v["probe_ids"], v["gallery_ids"], camera_rule="none")
    assert found.cmc[: len(v["cmc"])] == pytest.approx(v["cmc"], abs=1e-9)
    assert found.mAP == pytest.approx(float(v["mAP"]), abs=1e-9)
