"""Soft ranks, and MCJA's cross-modality retrieval loss built on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastreid_vi import _checks
from fastreid_vi._dispatch import register
from fastreid_vi.ops._shared import accumulator

NORM_FLOOR = 1e-8
"""Norms are bounded below by this in the cosine of the retrieval loss."""


def soft_rank(values: Tensor, *, strength: float = 1.0, descending: bool = False) -> Tensor:
    """Soft ranks of each row: the projection of values / strength onto the permutahedron.

    r = argmin over mu in P(1..n) of |mu - values / strength|^2 / 2

    Ranks ascend with the values (descend with `descending`); for strength -> 0 they are the hard
    ranks 1..n, for strength -> infinity all tend to (n + 1)/2. Equal values get equal ranks. Where
    max - min <= strength n/2 the ranks are exactly (values - mean)/strength + (n + 1)/2; other rows
    are sorted and their violators pooled, with float64 sums. The gradient is exact: within a block
    of pooled entries the upstream gradient minus its mean, over the strength.

    Args:
        values: [..., n], floating; the last axis is ranked.
        strength: of the regularisation, > 0, in units of the values.
        descending: the largest value gets rank 1.
    Returns:
        [..., n], dtype of `values`.
    Raises:
        TypeError: `values` is not floating.
        ValueError: `values` is a scalar, or `strength` <= 0.
        NonFiniteError: a row holds NaN or infinity (a ValueError; on CUDA tensors only with
            FASTREID_VI_CHECK_VALUES=1, else the ranks of that row are NaN).

    >>> import torch
    >>> soft_rank(torch.tensor([30.0, 10.0, 20.0]), strength=0.1).tolist()
    [3.0, 1.0, 2.0]

    Spec: mcja 3.4. Golden: mcja/soft_rank. Backends: cpu, cuda.
    """
    if not isinstance(values, Tensor):
        raise TypeError(f"values: expected a tensor [..., n], got {type(values).__name__}")
    if values.dtype not in _checks.FLOATS:
        raise TypeError(f"values: expected a floating tensor, got {_checks.described(values)}")
    if values.dim() == 0:
        raise ValueError(f"values: expected shape [..., n], got {_checks.described(values)}")
    _checks.above("strength", strength, 0)
    if values.shape[-1] == 0:
        return values.clone()
    rows = values.reshape(-1, values.shape[-1])
    ranks: Tensor = _soft_rank(rows, strength, bool(descending))[0]
    return ranks.reshape(values.shape)


def cross_modality_retrieval_loss(
    embeddings: Tensor, labels: Tensor, modalities: Tensor, *, strength: float = 0.5
) -> Tensor:
    """MCJA's CMR loss: the soft ranks of the other modality, matches at 1 and mismatches at n.

    For each modality as queries, the gallery being all n rows of the other one:
    r_i = soft_rank((1 - cos(e_i, e_j)) / 2),  T_ij = 1 where the labels match, else n
    L_m = mean over kept queries i and all j of |r_ij - T_ij|

    Queries without a match, and queries that match the whole gallery, are left out. The loss is the
    mean over the directions that keep a query; none, or a single modality, gives zero with a graph
    and zero gradients. Gradients reach queries and gallery. For n > 2 / strength the loss is linear
    in the cosines and is computed without them.

    Args:
        embeddings: [B, D], floating, D >= 1.
        labels: [B], int64.
        modalities: [B], int64; 0 is visible, every other value infrared.
        strength: of the soft rank, > 0.
    Returns:
        float32 scalar (float64 for float64).
    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or value.
        NonFiniteError: a NaN or infinity in the embeddings leaves no loss (a ValueError; on CUDA
            tensors only with FASTREID_VI_CHECK_VALUES=1, else the loss is NaN).

    >>> import torch
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    >>> labels, modalities = torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1])
    >>> round(cross_modality_retrieval_loss(x, labels, modalities).item(), 3)
    0.0

    Spec: mcja 3.3. Golden: mcja/cmr. Backends: cpu, cuda.
    """
    _checks.embeddings("embeddings", embeddings)
    _checks.labels_of("labels", labels, embeddings.shape[0], embeddings.device)
    _checks.labels_of("modalities", modalities, embeddings.shape[0], embeddings.device)
    _checks.above("strength", strength, 0)
    loss: Tensor = _retrieval(embeddings, labels, modalities, strength)
    return loss


# Reference: soft rank.


def _pool(row: list[float]) -> list[tuple[int, float]]:
    """Non-increasing isotonic regression, pooling adjacent violators: first, mean of each block."""
    blocks: list[tuple[int, float, int]] = []  # first member, sum, count
    for k, y in enumerate(row):
        first, total, count = k, y, 1
        while blocks and blocks[-1][1] / blocks[-1][2] <= total / count:
            first, earlier, more = blocks.pop()
            total, count = earlier + total, more + count
        blocks.append((first, total, count))
    return [(first, total / count) for first, total, count in blocks]


def _soft_rank_reference(
    values: Tensor, strength: float, descending: bool
) -> tuple[Tensor, Tensor]:
    """Ranks [R, n], and for each entry where its block begins in sorted order [R, n] int32.

    Rows that cannot be ranked (NaN, infinity) have block -1.
    """
    size = values.shape[1]
    theta = values.double() / (-strength if descending else strength)
    ranks = theta - theta.mean(1, keepdim=True) + (size + 1) / 2  # one block
    starts = torch.zeros_like(values, dtype=torch.int32)
    finite = values.isfinite().all(1)
    ranks[~finite], starts[~finite] = float("nan"), -1
    several = finite & (theta.amax(1) - theta.amin(1) > size / 2)
    weights = torch.arange(size, 0, -1, dtype=torch.float64, device=values.device)
    for row in several.nonzero()[:, 0].tolist():
        s, order = theta[row].sort(descending=True)
        blocks = _pool((s - weights).tolist())
        first = torch.tensor([b[0] for b in blocks], dtype=torch.int32, device=values.device)
        mean = torch.tensor([b[1] for b in blocks], dtype=torch.float64, device=values.device)
        lengths = torch.diff(first.long(), append=first.new_tensor([size]).long())
        ranks[row, order] = s - mean.repeat_interleave(lengths)
        starts[row, order] = first.repeat_interleave(lengths)
    return ranks.to(values.dtype), starts


def _soft_rank_backward_reference(
    grad: Tensor, blocks: Tensor, strength: float, descending: bool
) -> Tensor:
    g = grad.to(accumulator(grad.dtype))
    ranked = blocks >= 0
    index = blocks.clamp_min(0).long()
    total = torch.zeros_like(g).scatter_add_(1, index, g)
    count = torch.zeros_like(g).scatter_add_(1, index, torch.ones_like(g))
    centred = g - (total / count.clamp_min(1)).gather(1, index)
    result = torch.where(ranked, centred, float("nan")) / (-strength if descending else strength)
    return result.to(grad.dtype)


# Reference: retrieval loss.


def _directions(
    embeddings: Tensor, labels: Tensor, modalities: Tensor, strength: float
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Rows of kept queries, rows of the gallery, ranks minus targets, blocks; up to two of them."""
    visible = modalities == 0
    kept_directions = []
    for queries, gallery in ((visible, ~visible), (~visible, visible)):
        q, g = queries.nonzero()[:, 0], gallery.nonzero()[:, 0]
        match = labels[q][:, None] == labels[g][None, :]
        kept = match.any(1) & ~match.all(1)
        if not bool(kept.any()):
            continue
        q, match = q[kept], match[kept]
        unit = embeddings / _norm(embeddings)
        distance = (1.0 - unit[q] @ unit[g].t()) / 2.0
        ranks, blocks = _soft_rank_reference(distance, strength, False)
        target = torch.where(match, 1.0, float(len(g))).to(ranks.dtype)
        kept_directions.append((q, g, ranks - target, blocks))
    return kept_directions


def _norm(rows: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return norm.clamp_min(NORM_FLOOR)


def _retrieval_reference(
    embeddings: Tensor, labels: Tensor, modalities: Tensor, strength: float
) -> Tensor:
    x = embeddings.to(accumulator(embeddings.dtype))
    directions = _directions(x, labels, modalities, strength)
    losses = [error.abs().mean() for _, _, error, _ in directions]
    return torch.stack(losses).mean() if losses else x.new_zeros(())


def _retrieval_backward_reference(
    grad: Tensor, embeddings: Tensor, labels: Tensor, modalities: Tensor, strength: float
) -> Tensor:
    x = embeddings.to(grad.dtype)
    directions = _directions(x, labels, modalities, strength)
    norm = _norm(x)
    unit = x / norm
    d_unit = torch.zeros_like(x)
    for q, g, error, blocks in directions:
        slope = error.sign() * (grad / (error.numel() * len(directions)))
        d_cosine = _soft_rank_backward_reference(slope, blocks, strength, False) / -2.0
        d_unit.index_add_(0, q, d_cosine @ unit[g]).index_add_(0, g, d_cosine.t() @ unit[q])
    along = torch.where(norm > NORM_FLOOR, (d_unit * unit).sum(1, keepdim=True), 0.0)
    return ((d_unit - unit * along) / norm).to(embeddings.dtype)


# Value checks, fakes and gradients.


def _soft_rank_verify(result: tuple[Tensor, Tensor], values: Tensor, *_: Any) -> None:
    unranked = result[1][:, 0] < 0
    if bool(unranked.any()):
        row = int(unranked.to(torch.uint8).argmax())
        value = values[row][~values[row].isfinite()][0].item()
        raise _checks.NonFiniteError(f"values: expected finite numbers, got {value} in row {row}")


def _retrieval_verify(result: Tensor, embeddings: Tensor, *_: Any) -> None:
    _checks.explain_nan(result, "embeddings", embeddings)


def _soft_rank_fake(values: Tensor, strength: float, descending: bool) -> tuple[Tensor, Tensor]:
    return values.new_empty(values.shape), values.new_empty(values.shape, dtype=torch.int32)


def _soft_rank_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, ctx.strength, ctx.descending = inputs
    ctx.save_for_backward(output[1])


def _soft_rank_gradient(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    (blocks,) = ctx.saved_tensors
    gradient = _soft_rank_backward(grad.contiguous(), blocks, ctx.strength, ctx.descending)
    return gradient, None, None


def _retrieval_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    embeddings, labels, modalities, ctx.strength = inputs
    ctx.save_for_backward(embeddings, labels, modalities)


def _retrieval_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _retrieval_backward(grad, *ctx.saved_tensors, ctx.strength), None, None, None


# What the CUDA rooms hold in shared memory, on every device that they are compiled for.
LONGEST_ROW = 8192
LARGEST_BATCH = 16384
LONGEST_GALLERY = 4096


def _soft_rank_refuses(backend: str, values: Tensor, *_: Any) -> str | None:
    if backend == "cuda" and values.shape[1] > LONGEST_ROW:
        return f"rows of {values.shape[1]} entries, it ranks up to {LONGEST_ROW}"
    return None


def _retrieval_refuses(backend: str, *args: Any) -> str | None:
    """Galleries beyond 2 / strength take the closed form, which needs no row in memory."""
    embeddings, strength = next(a for a in args if isinstance(a, Tensor) and a.dim() == 2), args[-1]
    if backend != "cuda":
        return None
    if embeddings.shape[0] > LARGEST_BATCH:
        return f"a batch of {embeddings.shape[0]} rows, it takes up to {LARGEST_BATCH}"
    if min(embeddings.shape[0], 2.0 / strength) > LONGEST_GALLERY:
        return f"galleries to rank may pass {LONGEST_GALLERY} rows at strength {strength:g}"
    return None


# Registration.

_soft_rank = register(
    "soft_rank",
    "(Tensor values, float strength, bool descending) -> (Tensor, Tensor)",
    reference=_soft_rank_reference,
    fake=_soft_rank_fake,
    backends=("cpu", "cuda"),
    refuses=_soft_rank_refuses,
    verify=_soft_rank_verify,
    setup_context=_soft_rank_save,
    backward=_soft_rank_gradient,
    autocast=torch.float32,
    rows=(0,),
)
_soft_rank_backward = register(
    "soft_rank_backward",
    "(Tensor grad, Tensor blocks, float strength, bool descending) -> Tensor",
    reference=_soft_rank_backward_reference,
    fake=lambda grad, *_: grad.new_empty(grad.shape),
    backends=("cpu", "cuda"),
    refuses=_soft_rank_refuses,
    rows=(0, 1),
)
_retrieval = register(
    "cross_modality_retrieval_loss",
    "(Tensor embeddings, Tensor labels, Tensor modalities, float strength) -> Tensor",
    reference=_retrieval_reference,
    fake=lambda embeddings, *_: embeddings.new_empty((), dtype=accumulator(embeddings.dtype)),
    backends=("cpu", "cuda"),
    refuses=_retrieval_refuses,
    verify=_retrieval_verify,
    setup_context=_retrieval_save,
    backward=_retrieval_gradient,
    autocast=torch.float32,
)
_retrieval_backward = register(
    "cross_modality_retrieval_loss_backward",
    "(Tensor grad, Tensor embeddings, Tensor labels, Tensor modalities, float strength) -> Tensor",
    reference=_retrieval_backward_reference,
    fake=lambda grad, embeddings, *_: embeddings.new_empty(embeddings.shape),
    backends=("cpu", "cuda"),
    refuses=_retrieval_refuses,
)
