"""`torch.load` for files of strangers: tensors, numbers, text and their containers, nothing else.

NumPy's scalars and arrays, which released checkpoints keep their metrics in, are read as stand-ins:
nothing of NumPy is built from the file.
"""

from __future__ import annotations

import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final

import torch

from fastreid_vi.train.checkpoint import first_line
from fastreid_vi.train.errors import CheckpointError

_REFUSED = re.compile(r"GLOBAL (\S+)")
_REASON = re.compile(r"WeightsUnpickler error:\s*(.+)")
_PROTOCOL = 2  # the newest one that PyTorch reads without running code


def load_plain(path: Path) -> Any:
    """What `torch.save` wrote, as long as it is plain data.

    Raises:
        CheckpointError: missing, damaged, or it names something to load or call.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with torch.serialization.safe_globals(_stand_ins()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about protocols; the error says it better
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"{path}: {_why(path, error)}") from error


def _why(path: Path, error: Exception) -> str:
    text = str(error)
    refused = _REFUSED.search(text)
    protocol, names = _contents(path)
    named = refused[1] if refused else next(iter(names - _known()), None)
    if named is not None:
        return (
            f"refused: it wants to load or run {named!r}; only tensors, numbers, text and their "
            "containers are read"
        )
    if protocol > _PROTOCOL:
        return (
            f"written with pickle protocol {protocol}, which cannot be read safely; write it again "
            f"with torch.save(..., pickle_protocol={_PROTOCOL})"
        )
    reason = _REASON.search(text)
    said = reason[1] if reason else first_line(error).split(". This ")[0]
    return f"not a PyTorch checkpoint, or damaged: {said}"


def _known() -> set[str]:
    """Names that a checkpoint may use; the others are what it is refused for."""
    mine = {name for _, name in _stand_ins()}
    return mine | set(torch._weights_only_unpickler._get_allowed_globals())


def _contents(path: Path) -> tuple[int, set[str]]:
    """Pickle protocol and the names in a file, read from its opcodes without running them."""
    protocol, names = 0, set()
    top: str | None = None  # of the stack, where it is text
    last, memo = ["", ""], dict[int, str | None]()
    try:
        for opcode, arg in _opcodes(path):
            if opcode in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
                memo[len(memo) if arg is None else arg] = top
                continue
            if opcode == "PROTO":
                protocol = max(protocol, arg)
                memo.clear()
            elif opcode == "GLOBAL":
                names.add(arg.replace(" ", "."))
            elif opcode == "STACK_GLOBAL":
                names.add(".".join(last))
            top = memo.get(arg) if opcode in ("BINGET", "LONG_BINGET") else arg
            if isinstance(top, str):
                last = [last[1], top]
    except Exception:  # damaged: what was found so far
        return protocol, names
    return protocol, names


def _opcodes(path: Path) -> Iterator[tuple[str, Any]]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith("data.pkl"):
                    with archive.open(name) as file:
                        yield from _of_pickle(file)
        return
    with open(path, "rb") as file:
        while True:  # the older format: several pickles, then the tensors
            yield from _of_pickle(file)


def _of_pickle(file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    for opcode, arg, _ in pickletools.genops(file):
        yield opcode.name, arg


# Stand-ins for what NumPy's pickles name. They keep nothing but a scalar's number: building real
# dtypes and arrays from a file's own words would trust those words about memory.


class _DType:
    """numpy.dtype: remembers its code ("f8")."""

    def __init__(self, code: Any = "", *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        pass


class _Array:
    """numpy.ndarray: keeps nothing."""

    def __setstate__(self, state: Any) -> None:
        pass


_CODES: Final = {
    "f8": "<d", "f4": "<f", "f2": "<e", "i8": "<q", "i4": "<i", "i2": "<h", "i1": "<b",
    "u8": "<Q", "u4": "<I", "u2": "<H", "u1": "<B", "b1": "<?",
}  # fmt: skip


def _scalar(dtype: Any = None, data: Any = b"", *_: Any) -> float | int | None:
    code = _CODES.get(str(getattr(dtype, "code", "")))
    if code is None or not isinstance(data, bytes) or len(data) != struct.calcsize(code):
        return None
    number: float | int = struct.unpack(code, data)[0]
    return number


def _array(*_: Any) -> _Array:
    return _Array()


def _stand_ins() -> list[Any]:
    return [
        (_DType, "numpy.dtype"),
        (_Array, "numpy.ndarray"),
        *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
        *((_array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
        *((_array, f"numpy.{core}.numeric._frombuffer") for core in ("core", "_core")),
    ]
