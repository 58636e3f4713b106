"""Safetensors files of NumPy arrays, mapped instead of read: a gallery may exceed the memory."""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

DTYPES: Final[Mapping[str, str]] = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U8": "|u1",
    "BOOL": "|b1",
}
_NAMES: Final = {text: name for name, text in DTYPES.items()}
METADATA: Final = "__metadata__"
LONGEST_HEADER: Final = 100_000_000  # of the format


class TensorFileError(ValueError):
    """Not a whole safetensors file; one line that says why."""


def pack(arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """The file, part by part, without a copy of contiguous arrays.

    Args:
        arrays: name -> array of one of the dtypes of `DTYPES`.
        metadata: text by name.
    Raises:
        ValueError: another dtype.
    """
    header: dict[str, Any] = {METADATA: dict(metadata)}
    # Wide items first: every array stays aligned.
    ordered = sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize)
    end = 0
    for name, array in ordered:
        kind = _NAMES.get(array.dtype.newbyteorder("<").str)
        if kind is None:
            raise ValueError(f"{name}: expected one of {', '.join(DTYPES)}, got {array.dtype}")
        start, end = end, end + array.nbytes
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, array in ordered:
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        yield np.ascontiguousarray(little).reshape(-1).view(np.uint8).data


def tensor_names(path: Path) -> set[str]:
    """Names of the arrays in a file, from its header alone; empty for another kind of file."""
    try:
        with open(path, "rb") as file:
            return set(_header(file.read(8), file.read, os.fstat(file.fileno()).st_size)) - {
                METADATA
            }
    except (OSError, TensorFileError):
        return set()


def map_arrays(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Arrays and metadata of a file.

    Returns:
        name -> array in memory that the system loads when it is read; writing into it changes
        nothing on the disk.
    Raises:
        OSError: it cannot be opened.
        TensorFileError: cut off, too long, or no such file at all.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        header = _header(file.read(8), file.read, size)
        begin, metadata = file.tell(), header.pop(METADATA, {})
        places = _places(header, size - begin)
        try:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError:  # no room for private pages of a huge file
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    arrays = {}
    for name, (dtype, shape, start) in places.items():
        count = math.prod(shape)
        flat = np.frombuffer(mapped, dtype, count, begin + start) if count else np.empty(0, dtype)
        arrays[name] = flat.reshape(shape)
    return arrays, metadata


def _places(
    header: Mapping[str, Any], size: int
) -> dict[str, tuple[np.dtype[Any], tuple[int, ...], int]]:
    """Dtype, shape and offset of every array; they must fill `size` bytes without a gap."""
    places, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = np.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"])
        start, stop = entry["data_offsets"]
        if start != end or stop - start != math.prod(shape) * dtype.itemsize:
            raise TensorFileError(f"{name} is not where the header says")
        places[name], end = (dtype, shape, start), stop
    if end != size:
        raise TensorFileError(f"expected {end} bytes of arrays, got {size}: cut off or mixed")
    return places


def write_whole(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write under another name and rename: the old file or the new one, no mixture.

    Raises:
        OSError: it cannot be written; an earlier file stays.
    """
    temporary = path.with_name(f".writing-{path.name}")
    try:
        with open(temporary, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _header(first: bytes, read: Any, size: int) -> dict[str, Any]:
    length = int.from_bytes(first, "little")
    if len(first) < 8 or not 2 <= length <= min(LONGEST_HEADER, size - 8):
        raise TensorFileError("not a safetensors file, or cut off")
    try:
        header = json.loads(read(length))
    except ValueError:
        raise TensorFileError("not a safetensors file") from None
    if not isinstance(header, dict) or not all(
        isinstance(entry, dict) and (name == METADATA or _sound(entry))
        for name, entry in header.items()
    ):
        raise TensorFileError("not a safetensors file that NumPy can read")
    return header


def _sound(entry: dict[str, Any]) -> bool:
    numbers = [*entry.get("shape", [None]), *entry.get("data_offsets", [None])]
    whole = all(isinstance(n, int) and n >= 0 for n in numbers)
    return whole and len(entry["data_offsets"]) == 2 and entry.get("dtype") in DTYPES
