"""AlignGAN's networks alone (generator, both discriminators, embedder) and its triplets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastreid_vi.certify.cases import Check, Procedure, Want, compare
from fastreid_vi.certify.fill import fill_embedder, filled
from fastreid_vi.certify.vectors import Array, Golden
from fastreid_vi.methods.aligngan.discriminator import Discriminator, JointDiscriminator
from fastreid_vi.methods.aligngan.embedder import Embedded, Embedder
from fastreid_vi.methods.aligngan.generator import Generator
from fastreid_vi.methods.aligngan.losses import Side, batch_hard

_OUT, _GRAD = 1e-5, 1e-4
_TRIPLETS = ("cross", "same", "soft_rank_1_2", "p18k4", "no_positive", "no_negative")


def procedures() -> Iterator[Procedure]:
    """One procedure for every network; the files hold float32 results."""
    for name, run in (
        ("generator", _generator),
        ("discriminators plain", _plain),
        ("discriminators cond", _joint),
        ("embedder", _embedder),
        ("triplet, all forms", _triplets),
    ):
        yield Procedure(owner="aligngan", name=f"aligngan/{name}", run=run)


def _out(value: Any) -> Want:
    return Want(value, _OUT, _OUT)


def _grad(value: Any) -> Want:
    return Want(value, _GRAD, _GRAD)


def _tensor(value: Any, device: str, dtype: torch.dtype) -> Tensor:
    return torch.as_tensor(value).to(device, dtype)


def _load(network: nn.Module, v: Mapping[str, Array], prefixes: tuple[str, ...]) -> None:
    """Weights as far as the file has them: biases in front of a norm are left out."""
    state = network.state_dict()
    for key, value in v.items():
        prefix, _, name = key.partition("__")
        if prefix in prefixes:
            state[name].copy_(torch.from_numpy(value))


def _parameters(network: nn.Module, v: Mapping[str, Array], dtype: torch.dtype) -> Iterator[Check]:
    for key, value in v.items():
        kind, _, name = key.partition("__")
        if kind in ("g", "gnorm"):
            grad = network.get_parameter(name).grad
            assert grad is not None  # it is in the file, so it has one
            got = grad.norm() if kind == "gnorm" else grad
            yield compare(f"{kind} of {name}", "gradient", got, _grad(value), dtype)


def _generator(golden: Golden, dtype: torch.dtype, device: str) -> Iterator[Check]:
    v = golden.case("aligngan/generator", "a")
    conv_dim, blocks = (int(n) for n in v["conv_dim_layer_num"])
    network = Generator(conv_dim, blocks)
    _load(network, v, ("w", "b"))
    network.to(device, dtype)
    x = _tensor(v["x"], device, dtype).requires_grad_()
    with torch.no_grad():
        first = network.eval()(x)
    yield compare("evaluation before", "forward", first, _out(v["y_eval_initial_buffers"]), dtype)
    y = network.train()(x)
    y.backward(_tensor(v["gout"], device, dtype))
    yield compare("training", "forward", y, _out(v["y_train"]), dtype)
    yield compare("gradient of x", "gradient", x.grad, _grad(v["gx_train"]), dtype)
    yield from _parameters(network, v, dtype)
    state = network.state_dict()
    for key in (k for k in v if k.startswith("b1__")):
        yield compare(f"{key[4:]} after", "forward", state[key[4:]], _out(v[key]), dtype)
    with torch.no_grad():
        last = network.eval()(x)
    yield compare("evaluation after", "forward", last, _out(v["y_eval_updated_buffers"]), dtype)


def _plain(golden: Golden, dtype: torch.dtype, device: str) -> Iterator[Check]:
    v = golden.case("aligngan/discriminators", "plain")
    conv_dim = v["w__model.0.weight"].shape[0]
    layers = sum(key.startswith("w__model.") and key.endswith(".weight") for key in v) - 1
    network = Discriminator(conv_dim, layers=layers)
    _load(network, v, ("w",))
    network.to(device, dtype)
    x = _tensor(v["x"], device, dtype).requires_grad_()
    y = network(x)
    y.backward(_tensor(v["gout"], device, dtype))
    assert x.grad is not None
    yield compare("scores", "forward", y, _out(v["y"]), dtype)
    yield compare(
        "gradient of x", "gradient", x.grad[:, :, ::3, ::3], _grad(v["gx_stride3"]), dtype
    )
    yield compare("its norm", "gradient", x.grad.norm(), _grad(v["gx_norm"]), dtype)
    yield from _parameters(network, v, dtype)


def _joint(golden: Golden, dtype: torch.dtype, device: str) -> Iterator[Check]:
    v = golden.case("aligngan/discriminators", "cond")
    network = JointDiscriminator(v["features"].shape[1], int(v["conv_dim"]))
    _load(network, v, ("w",))
    network.to(device, dtype)
    low = _tensor(v["image_low_u8"], device, dtype) / 127.5 - 1
    x = low.repeat_interleave(4, 2).repeat_interleave(4, 3).requires_grad_()
    features = _tensor(v["features"], device, dtype).requires_grad_()
    y = network(x, features)
    y.backward(_tensor(v["gout"], device, dtype))
    assert x.grad is not None
    assert features.grad is not None
    yield compare("scores", "forward", y, _out(v["y"]), dtype)
    for name, grad, part, key in (
        ("x", x.grad, x.grad[:, :, ::5, ::5], "gx_stride5"),
        ("features", features.grad, features.grad[:, ::16], "gf_stride16"),
    ):
        yield compare(f"gradient of {name}", "gradient", part, _grad(v[key]), dtype)
        norm = _grad(v[f"{key[:2]}_norm"])
        yield compare(f"norm of that of {name}", "gradient", grad.norm(), norm, dtype)
    yield from _parameters(network, v, dtype)


def _embedder(golden: Golden, dtype: torch.dtype, device: str) -> Iterator[Check]:
    v = golden.load("aligngan/embedder")
    classes, rows, height, width, s = (int(n) for n in v["cfg_ncls_B_fh_fw_seed"])
    network = Embedder(classes, 2048, 256, dropout=0.0)
    names = [name for name, _ in network.named_parameters()]
    yield compare("names", "forward", names, Want(v["param_names_in_order"], 0.0, 0.0), dtype)
    fill_embedder(network, s)
    network.to(device, dtype)
    features = torch.relu(filled((rows, 2048, height, width), s + 50, 4)).to(device, dtype)
    first = features.flatten()[:8]
    yield compare("fill", "forward", first, Want(v["features_check_first8"], 1e-6, 1e-6), dtype)
    out = network(features)
    norm = network.get_submodule("classifier0.bottle.1")
    found = {
        "train_nodropout_logits": out.logits,
        "train_embedding": out.embedding,
        "pooled_stride16": out.pooled[:, ::16],
        "bn_running_mean_after": norm.get_buffer("running_mean"),
        "bn_running_var_after": norm.get_buffer("running_var"),
    }
    for name, got in found.items():
        yield compare(name, "forward", got, _out(v[name]), dtype)
    out = network.eval()(features)
    for name, got in (("eval_logits", out.logits), ("eval_embedding", out.embedding)):
        yield compare(name, "forward", got, _out(v[name]), dtype)


def _side(embedding: Tensor, labels: Tensor) -> Side:
    return Side(Embedded(embedding, embedding, embedding), labels)


def _triplets(golden: Golden, dtype: torch.dtype, device: str) -> Iterator[Check]:
    """Also the k-th hardest, and the terms of the pixel stage with either order of labels."""
    for name in _TRIPLETS:
        v = golden.case("aligngan/triplet", name)
        first, second = (
            _tensor(v[key], device, dtype).requires_grad_() for key in ("emb1", "emb2")
        )
        labels, others = (torch.from_numpy(v[key]).to(device) for key in ("l1", "l2"))
        candidates = None if v["same_tensor"] else _side(second, others)
        soft = int(v["soft_bh"][0]), int(v["soft_bh"][1])
        loss = batch_hard(_side(first, labels), candidates, margin=float(v["margin"]), soft_bh=soft)
        loss.backward()  # type: ignore[no-untyped-call]
        yield compare(name, "forward", loss, Want(v["loss"], _OUT, _OUT, 1.0), dtype)
        for key, leaf in (("g1", first), ("g2", second)):
            if key == "g1" or candidates is not None:
                scale = max(float(np.abs(v[key]).max()), 1e-2)
                want = Want(v[key], _GRAD, _GRAD, scale)
                yield compare(f"{name} {key}", "gradient", leaf.grad, want, dtype)
    v = golden.case("aligngan/triplet", "pixel_terms")
    fake, real = (_tensor(v[key], device, dtype) for key in ("fake", "real"))
    visible, rolled = (torch.from_numpy(v[key]).to(device) for key in ("rgb_pids", "ir_pids"))
    for layout, infrared in (("aligned", visible), ("misaligned", rolled)):
        made, seen = _side(fake, visible), _side(real, infrared)
        found = {
            f"{layout}_1": batch_hard(made, seen),
            f"{layout}_2_feature_stage": batch_hard(seen, made),
            f"{layout}_2_pixel_stage": batch_hard(_side(real, visible), _side(fake, infrared)),
        }
        for key, loss in found.items():
            yield compare(key, "forward", loss, _out(v[key]), dtype)
