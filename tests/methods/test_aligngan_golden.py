"""AlignGAN against the released code's numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastreid_vi import ops
from fastreid_vi.certify.fill import fill_embedder, filled
from fastreid_vi.certify.networks import PooledConv
from fastreid_vi.evaluation import rank_metrics
from fastreid_vi.methods.aligngan import AlignGAN, AlignGANOptions, losses
from fastreid_vi.methods.aligngan.discriminator import Discriminator, JointDiscriminator
from fastreid_vi.methods.aligngan.embedder import Embedded, Embedder
from fastreid_vi.methods.aligngan.generator import Generator, GeneratorNorm
from fastreid_vi.methods.aligngan.losses import Side
from tests.conftest import golden
from tests.methods.aligngan_golden import (
    case,
    check_gradients,
    close,
    tensor,
)

KINDS = [torch.float32, torch.float64]


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


# Evaluation.


@pytest.mark.parametrize("name", ["single", "multi"])
def test_evaluation_counts_as_the_released_one(name: str) -> None:
    v = case(golden("aligngan/sampler_evaluation"), name)
    probe, gallery = (F.normalize(tensor(v[n])) for n in ("probe", "gallery"))
    distance = ops.pairwise_distance(probe, gallery, metric="cosine").numpy()
    found = rank_metrics(distance, v["probe_ids"], v["gallery_ids"], camera_rule="none")
    assert found.cmc[: len(v["cmc"])] == pytest.approx(v["cmc"], abs=1e-9)
    assert found.mAP == pytest.approx(float(v["mAP"]), abs=1e-9)
