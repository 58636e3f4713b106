"""Embeddings as files: `<side>.safetensors` beside `<side>.json`, read without torch.

The tensors are features, ids, cams, modality, MSER's further spectra and SYSU-MM01's permutations;
the JSON record says what they are of. The tensors' header holds the record's SHA-256, so that parts
of two writes are told from a pair.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from fastreid_vi.evaluation.arrays import Int, to_numpy
from fastreid_vi.evaluation.galleries import Embeddings
from fastreid_vi.evaluation.tensorfile import (
    Array,
    TensorFileError,
    map_arrays,
    pack,
    tensor_names,
    write_whole,
)
from fastreid_vi.version import __version__

FORMAT: Final = "fastreid_vi embeddings"
VERSION: Final = 2  # 1 were features, ids, cams and a record of nothing but paths
_STAMP: Final = "fastreid_vi"
_VECTORS: Final = ("ids", "cams", "modality")
_FACTS: Final = (
    "normalized", "method", "checkpoint", "dataset", "trial", "root", "details",
)  # fmt: skip
_KINDS: Final[Mapping[str, tuple[type, ...]]] = {
    "normalized": (bool,),
    "trial": (int,),
    "details": (dict,),
}


class EmbeddingsError(ValueError):
    """Embeddings cannot be read or written; one line that names the file."""


def save_embeddings(path: str | os.PathLike[str], **sides: Embeddings) -> Path:
    """Write a folder of embeddings.

    Args:
        path: the folder, created where it is missing; sides of other names in it stay.
        sides: "query" and "gallery" where a protocol tests them, any name for a folder of images.
            Features [n, D] are kept in float32, or float16 if they are; `permutations` only for
            the persons and cameras of the side.
    Returns:
        `path`.
    Raises:
        EmbeddingsError: lengths that disagree, no side, a full disk; what was there stays whole.

    >>> import tempfile
    >>> from fastreid_vi.evaluation import Embeddings, load_embeddings, save_embeddings
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = save_embeddings(folder, images=Embeddings([[0.6, 0.8]], [7], paths=["a.jpg"]))
    ...     load_embeddings(folder)["images"].paths
    ('a.jpg',)
    """
    folder = Path(path)
    if not sides:
        raise EmbeddingsError(f"{folder}: expected one side at least, such as query=..., got none")
    for name, side in sides.items():
        try:
            _check(_arrays(side._replace(permutations=None)), side.paths)
            _arrays(side)
        except (TypeError, ValueError) as error:
            raise EmbeddingsError(f"{name}: {error}") from None
    for name, side in sides.items():
        write_side(folder / name, side)
    return folder


def load_embeddings(path: str | os.PathLike[str]) -> dict[str, Embeddings]:
    """Read embeddings; arrays are mapped, so that a gallery may be larger than the memory.

    Args:
        path: a folder that `save_embeddings` wrote, or one side of it, such as DIR/query.
    Returns:
        Side -> embeddings. Files of version 1 lack all but features, ids, cams and paths.
    Raises:
        EmbeddingsError: nothing there; cut off, mixed, of a later version or of something else.
    """
    place = Path(path)
    sides = find_sides(place)
    if not sides:
        if not place.exists():
            raise EmbeddingsError(f"{place}: no such file or folder")
        raise EmbeddingsError(f"{place}: holds no embeddings; fastreid-vi embed writes them")
    return {name: read_side(side) for name, side in sides.items()}


def find_sides(path: Path) -> dict[str, Path]:
    """Side -> its path without suffix; nothing where there are no embeddings.

    Looks at headers only, and takes no weights for embeddings.
    """
    if path.is_dir():
        stems = [file.with_suffix("") for file in sorted(path.glob("*.safetensors"))]
    else:
        stems = [path.with_suffix("") if path.suffix in (".safetensors", ".json") else path]
    return {stem.name: stem for stem in stems if _is_side(stem)}


def _is_side(stem: Path) -> bool:
    """Features and identities, or a pair whose tensors are too damaged to say what they are."""
    names = tensor_names(_tensors(stem))
    if names:
        return {"features", "ids"} <= names
    return _tensors(stem).is_file() and _record(stem).is_file()


def write_side(stem: Path, embeddings: Embeddings) -> None:
    """Write one pair of files, each atomically, the record last.

    Raises:
        EmbeddingsError: a dtype that cannot be kept, a full disk.
    """
    arrays = _arrays(embeddings)
    facts = {name: getattr(embeddings, name) for name in _FACTS}
    paths = None if embeddings.paths is None else [str(path) for path in embeddings.paths]
    record = {
        "format": FORMAT,
        "version": VERSION,
        "images": len(arrays["features"]),
        "dimensions": int(arrays["features"].shape[-1]),
        **facts,
        "spectra": list(embeddings.spectra or ()),
        "written_by": f"fastreid_vi {__version__}",
        "paths": paths,
    }
    try:
        text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False).encode()
        stamp = {"version": VERSION, "record": hashlib.sha256(text).hexdigest()}
        stem.parent.mkdir(parents=True, exist_ok=True)
        write_whole(_tensors(stem), pack(arrays, {_STAMP: json.dumps(stamp)}))
        write_whole(_record(stem), [text])
    except OSError as error:
        reason = error.strerror or error
        raise EmbeddingsError(f"cannot write embeddings {stem}: {reason}") from error
    except (TypeError, ValueError) as error:
        raise EmbeddingsError(f"cannot write embeddings {stem}: {error}") from None


def read_side(stem: Path) -> Embeddings:
    """Read one pair of files, of this version or of version 1.

    Raises:
        EmbeddingsError: see `load_embeddings`.
    """
    try:
        text = _record(stem).read_bytes()
        record = json.loads(text)
        arrays, metadata = map_arrays(_tensors(stem))
        if not isinstance(record, dict) or not _named(record.get("paths", 0)):
            raise ValueError(f"{stem.name}.json is not a record of embeddings")
        if _STAMP in metadata or "format" in record:
            _check_stamp(stem.name, text, record, metadata)
        _check(arrays, record["paths"])
        return _embeddings(arrays, record)
    except OSError as error:
        reason = f"{Path(error.filename or stem).name}: {error.strerror}"
        raise EmbeddingsError(f"cannot read embeddings {stem}: {reason}") from error
    except TensorFileError as error:
        reason = f"{stem.name}.safetensors: {error}"
        raise EmbeddingsError(f"cannot read embeddings {stem}: {reason}") from None
    except json.JSONDecodeError:
        reason = f"{stem.name}.json is not JSON, or cut off"
        raise EmbeddingsError(f"cannot read embeddings {stem}: {reason}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise EmbeddingsError(f"cannot read embeddings {stem}: {error}") from None


def _named(paths: Any) -> bool:
    return paths is None or (isinstance(paths, list) and all(isinstance(p, str) for p in paths))


def _check_stamp(
    name: str, text: bytes, record: dict[str, Any], metadata: Mapping[str, str]
) -> None:
    if record.get("format") != FORMAT:
        raise ValueError(f"{name}.json is of another format, {record.get('format')!r}")
    version = record.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise ValueError(
            f"{name}.json is of version {version!r}, this release reads up to {VERSION}"
        )
    try:
        expected = json.loads(metadata[_STAMP])["record"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{name}.safetensors does not belong to {name}.json: no stamp in its header"
        ) from None
    if hashlib.sha256(text).hexdigest() != expected:
        raise ValueError(
            f"{name}.safetensors and {name}.json are of two writes, or one was changed; embed again"
        )


def _arrays(side: Embeddings) -> dict[str, Array]:
    """What goes into the tensor file."""
    features = to_numpy("features", side.features)
    kept = np.float16 if features.dtype == np.float16 else np.float32
    arrays = {"features": features.astype(kept, copy=False)}
    for name in _VECTORS:
        value = getattr(side, name)
        if value is not None:
            vector = to_numpy(name, value)
            if vector.dtype.kind not in "iu" and vector.size:
                raise TypeError(f"{name}: expected integers, got {vector.dtype}")
            arrays[name] = vector.astype(np.int64, copy=False)
    for name, value in (side.spectra or {}).items():
        arrays[f"spectra.{name}"] = to_numpy(f"spectra.{name}", value).astype(kept, copy=False)
    if side.permutations is not None and not isinstance(side.permutations, str):
        arrays |= _packed(side)
    return arrays


def _packed(side: Embeddings) -> dict[str, Array]:
    """The side's permutations: folders [F, 3] of camera, pid, m, and all numbers in one row."""
    cams, ids = (to_numpy(name, getattr(side, name)) for name in ("cams", "ids"))
    seen = np.unique(np.stack([cams, ids], axis=1), axis=0).tolist() if len(ids) else []
    folders, tables = [], []
    for camera, pid in seen:
        if (camera, pid) in side.permutations:
            name = f"permutations of camera {camera}, pid {pid}"
            table = to_numpy(name, side.permutations[camera, pid])
            if table.ndim != 2 or table.dtype.kind not in "iu":
                raise ValueError(f"{name}: expected integers [trials, m], got {table.shape}")
            folders.append([camera, pid, table.shape[1]])
            tables.append(table)
    trials = {len(table) for table in tables}
    if len(trials) > 1:
        raise ValueError(f"permutations: expected as many trials everywhere, got {sorted(trials)}")
    flat = [table.astype(np.int64).reshape(-1) for table in tables]
    return {
        "permutations.folders": np.array(folders, np.int64).reshape(-1, 3),
        "permutations.trials": np.array(sorted(trials), np.int64),
        "permutations.numbers": np.concatenate(flat) if flat else np.zeros(0, np.int64),
    }


def _unpacked(arrays: Mapping[str, Array]) -> dict[tuple[int, int], Int] | None:
    if "permutations.folders" not in arrays:
        return None
    folders, numbers = arrays["permutations.folders"], arrays["permutations.numbers"]
    if not len(folders):
        return {}
    trials = int(arrays["permutations.trials"][0])
    ends = np.cumsum(folders[:, 2]) * trials
    if ends[-1] != len(numbers):
        raise ValueError(f"permutations: expected {ends[-1]} numbers, got {len(numbers)}")
    tables = np.split(numbers, ends[:-1])
    return {
        (camera, pid): table.reshape(trials, m)
        for (camera, pid, m), table in zip(folders.tolist(), tables, strict=True)
    }


def _check(arrays: Mapping[str, Array], paths: Any) -> None:
    """Shapes, dtypes and lengths."""
    features = arrays["features"]
    if features.ndim != 2 or features.dtype.kind != "f":
        raise ValueError(
            f"features: expected real numbers [n, D], got {features.dtype} {list(features.shape)}"
        )
    vectors = {name: arrays[name] for name in _VECTORS if name in arrays}
    for name, vector in vectors.items():
        if vector.ndim != 1 or vector.dtype != np.int64:
            raise ValueError(f"{name}: expected integers [n], got {vector.dtype} {vector.shape}")
    lengths = {len(features), *map(len, vectors.values())}
    if paths is not None:
        lengths.add(len(paths))
    if len(lengths) != 1:
        raise ValueError(
            f"{', '.join(['features', *vectors, 'paths'])} disagree: lengths {sorted(lengths)}"
        )
    if "modality" in vectors and not np.isin(vectors["modality"], (0, 1)).all():
        raise ValueError("modality: expected 0 (visible) or 1 (infrared) in every place")
    for name, array in arrays.items():
        if name.startswith("spectra.") and array.shape != features.shape:
            raise ValueError(f"{name}: expected {list(features.shape)}, got {list(array.shape)}")


def _embeddings(arrays: dict[str, Array], record: Mapping[str, Any]) -> Embeddings:
    facts = {name: record.get(name) for name in _FACTS}
    for name, value in facts.items():
        if value is not None and not isinstance(value, _KINDS.get(name, (str,))):
            raise ValueError(f"{name}: unexpected {value!r} in the record")
    spectra = {
        name.partition(".")[2]: array
        for name, array in arrays.items()
        if name.startswith("spectra.")
    }
    order = record.get("spectra", [])
    if sorted(order) != sorted(spectra):
        raise ValueError(f"spectra: expected {order}, got {sorted(spectra)}")
    paths = record["paths"]
    return Embeddings(
        arrays["features"],
        arrays["ids"],
        arrays.get("cams"),
        None if paths is None else tuple(paths),
        arrays.get("modality"),
        spectra={name: spectra[name] for name in order} or None,
        permutations=_unpacked(arrays),
        **facts,
    )


def _tensors(stem: Path) -> Path:
    return stem.with_name(stem.name + ".safetensors")


def _record(stem: Path) -> Path:
    return stem.with_name(stem.name + ".json")
