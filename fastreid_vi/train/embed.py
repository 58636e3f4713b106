"""Images to embeddings, and embeddings to files and back."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from fastreid_vi.config import Batch, Precision
from fastreid_vi.data.images import ImageList
from fastreid_vi.evaluation import Embeddings, EmbeddingsError
from fastreid_vi.evaluation.embeddings import read_side, write_side
from fastreid_vi.methods.base import Method
from fastreid_vi.train.errors import TrainError
from fastreid_vi.train.step import autocast, compute_dtype, move


def embed_all(
    method: Method,
    loader: Iterable[Batch],
    images: ImageList,
    *,
    device: torch.device,
    precision: Precision = "auto",
    channels_last: bool = True,
) -> Embeddings:
    """Embed every image of a list, in its order, as `method.embed` gives it (not normalised here).

    Args:
        method: on `device`; its mode and its gradients are left alone.
        loader: batches of `images` in order, such as `data.loader.eval_loader` gives.
        images: identities, cameras and paths of the rows.
        device: where the method lives.
        precision: as in `RunConfig`.
        channels_last: memory format of the images.
    Returns:
        Float32 features [n, D] with the list's ids, cams, paths and modality.
    Raises:
        TrainError: the loader gave another number of images, or a feature is not finite.
    """
    dtype = compute_dtype(precision, device)
    parts = []
    with torch.inference_mode(), autocast(device, dtype):
        for batch in loader:
            moved = move(batch, device, channels_last)
            # Kept on the device: a copy per batch would wait for it.
            parts.append(method.embed(moved.images, moved.modality).float())
    features = (
        torch.cat(parts).cpu().numpy() if parts else np.empty((0, method.embed_dim), np.float32)
    )
    if len(features) != len(images):
        raise TrainError(f"loader: expected {len(images)} images, got {len(features)}")
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        first = images.paths[int(np.argmin(finite))]
        raise TrainError(
            f"{(~finite).sum()} of {len(images)} embeddings are not finite, first {first}"
        )
    return Embeddings(features, images.pids, images.cams, images.paths, images.modality)


def save_embeddings(path: Path, embeddings: Embeddings) -> None:
    """Write `<path>.safetensors` and `<path>.json`: one side of `evaluation.save_embeddings`.

    Raises:
        TrainError: they cannot be written.
    """
    try:
        write_side(path, embeddings)
    except EmbeddingsError as error:
        raise TrainError(str(error)) from error


def load_embeddings(path: Path) -> Embeddings:
    """Inverse of `save_embeddings`; reads what earlier releases wrote, too.

    Raises:
        TrainError: missing, damaged, or not of that form.
    """
    try:
        return read_side(path)
    except EmbeddingsError as error:
        raise TrainError(str(error)) from error
