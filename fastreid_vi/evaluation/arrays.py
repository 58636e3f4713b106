"""At the border: NumPy, torch, CuPy and DLPack arrays become checked NumPy arrays, and go back."""

from __future__ import annotations

import sys
from typing import Any, Final, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

Int: TypeAlias = npt.NDArray[np.int64]
Dense: TypeAlias = npt.NDArray[np.int32]
Real: TypeAlias = npt.NDArray[np.floating[Any]]
Double: TypeAlias = npt.NDArray[np.float64]
Mask: TypeAlias = npt.NDArray[np.bool_]

# DLPack's numbers for CUDA memory, managed memory included.
CUDA_MEMORY: Final = (2, 13)


def described(array: npt.NDArray[Any]) -> str:
    """Dtype and shape, for a message."""
    return f"{array.dtype} {list(array.shape)}"


def to_numpy(name: str, value: Any) -> npt.NDArray[Any]:
    """Any array or nested list as a NumPy array, without a copy where its memory allows it."""
    if isinstance(value, np.ndarray):
        return value
    torch = sys.modules.get("torch")  # a tensor exists only if someone has imported torch
    if torch is not None and isinstance(value, torch.Tensor):
        tensor = value.detach().cpu()
        # NumPy has no bfloat16; float32 holds each of its values.
        return np.asarray((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy())
    if hasattr(value, "__cuda_array_interface__") and hasattr(value, "get"):
        return np.asarray(value.get())
    if hasattr(value, "__dlpack__") and not hasattr(value, "__array__"):
        return np.from_dlpack(value)
    try:
        return np.asarray(value)
    except ValueError as error:
        raise ValueError(
            f"{name}: expected an array, got {type(value).__name__} ({error})"
        ) from None


def on_device(value: Any) -> bool:
    """Whether an array lies in the memory of a CUDA device: a torch tensor, CuPy, DLPack."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return bool(value.is_cuda)
    where = getattr(value, "__dlpack_device__", None)
    return where is not None and next(iter(where())) in CUDA_MEMORY


def like(reference: Any, array: npt.NDArray[Any]) -> Any:
    """A NumPy result as the kind of array the caller works with.

    Args:
        reference: the caller's first array; it decides.
        array: any shape and dtype that the kind knows.
    Returns:
        A tensor on the device of a torch tensor, a CuPy array on the device of a CuPy array; for
        anything else `array` itself.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(reference, torch.Tensor):
        # `order`: a tensor has no negative strides.
        return torch.from_numpy(np.asarray(array, order="C")).to(reference.device)
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(reference, cupy.ndarray):
        with reference.device:
            return cupy.asarray(array)
    return array


def check_real(name: str, array: npt.NDArray[Any], shape: str) -> None:
    """Refuse what is no matrix of real numbers."""
    if array.dtype.kind not in "fiu" or array.dtype.itemsize > 8:
        raise TypeError(f"{name}: expected real numbers {shape}, got {described(array)}")
    if array.ndim != 2:
        raise ValueError(f"{name}: expected shape {shape}, got {described(array)}")


def real_matrix(name: str, value: Any, shape: str) -> Real:
    """A matrix: half precisions as float32, integers as float64, strides as they are."""
    array = to_numpy(name, value)
    check_real(name, array, shape)
    single = array.dtype.kind == "f" and array.dtype.itemsize <= 4
    array = array.astype(np.float32 if single else np.float64, copy=False)
    whole = all(stride % array.itemsize == 0 for stride in array.strides)
    return array if whole and array.flags.aligned else array.copy()


def integers(name: str, value: Any, length: int) -> Int:
    """A vector of integers as int64."""
    array = to_numpy(name, value)
    if array.size == 0 and array.ndim == 1 and length == 0:
        return np.zeros(0, np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers of shape [{length}], got {described(array)}")
    if array.shape != (length,):
        raise ValueError(f"{name}: expected integers of shape [{length}], got {described(array)}")
    if array.dtype == np.uint64 and array.max(initial=0) > np.iinfo(np.int64).max:
        raise ValueError(f"{name}: expected values below 2**63, got {array.max()}")
    return array.astype(np.int64, copy=False)


def dense(values: Int, table: Int) -> Dense:
    """Position of each value in a sorted table of distinct ones; -1 where it is not there."""
    at = np.searchsorted(table, values)
    at[at == len(table)] = 0
    return np.where(table[at] == values, at, -1).astype(np.int32)


def at_least_one(name: str, value: Any) -> None:
    """A whole number, 1 or more."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected >= 1, got {value}")


def choice(name: str, value: str, allowed: object) -> str:
    """One of the values of a `Literal`."""
    if value not in get_args(allowed):
        raise ValueError(
            f"{name}: expected one of {', '.join(map(repr, get_args(allowed)))}, got {value!r}"
        )
    return value
