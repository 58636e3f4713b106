"""Images to embeddings, and embeddings to files and back."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as parse
from safetensors.numpy import save as serialize

from fastreid_vi.config import Batch, Precision
from fastreid_vi.data.images import ImageList
from fastreid_vi.evaluation import Embeddings
from fastreid_vi.methods.base import Method
from fastreid_vi.train import files
from fastreid_vi.train.checkpoint import first_line
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
        Float32 features [n, D] with the list's ids, cams and paths.
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
    return Embeddings(features, images.pids, images.cams, images.paths)


def save_embeddings(path: Path, embeddings: Embeddings) -> None:
    """Write `<path>.safetensors` (features, ids, cams) and `<path>.json` (paths), each atomically.

    Raises:
        TrainError: they cannot be written.
    """
    arrays: dict[str, NDArray[Any]] = {
        "features": np.ascontiguousarray(embeddings.features, dtype=np.float32),
        "ids": np.ascontiguousarray(embeddings.ids, dtype=np.int64),
        "cams": np.ascontiguousarray(embeddings.cams, dtype=np.int64),
    }
    paths = [str(p) for p in embeddings.paths] if embeddings.paths is not None else None
    path.parent.mkdir(parents=True, exist_ok=True)
    files.replace_file(_data(path), [serialize(arrays)])
    files.write_json(_names(path), {"paths": paths})


def load_embeddings(path: Path) -> Embeddings:
    """Inverse of `save_embeddings`.

    Raises:
        TrainError: missing, damaged, or not of that form.
    """
    try:
        arrays = parse(_data(path).read_bytes())
        paths = json.loads(_names(path).read_text())["paths"]
        features, ids, cams = (arrays[name] for name in ("features", "ids", "cams"))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise TrainError(f"cannot read embeddings {path}: {first_line(error)}") from error
    lengths = {len(features), len(ids), len(cams), len(ids if paths is None else paths)}
    if features.ndim != 2 or len(lengths) != 1:
        raise TrainError(
            f"{path}: features, ids, cams and paths disagree: lengths {sorted(lengths)}"
        )
    return Embeddings(features, ids, cams, None if paths is None else tuple(paths))


def _data(path: Path) -> Path:
    return path.with_name(path.name + ".safetensors")


def _names(path: Path) -> Path:
    return path.with_name(path.name + ".json")
