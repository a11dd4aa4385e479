"""Strict reading of safetensors files: they have exactly the expected names, shapes and dtypes, and finite values."""

import hashlib
import struct
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes

from .errors import AdapterError

# The dtypes that a weight, or a trained tensor, may have, and safetensors' names for them.
SAFETENSORS_DTYPES = {"float32": "F32", "float64": "F64", "bfloat16": "BF16", "float16": "F16"}
# The dtypes that a buffer may have besides.
BUFFER_DTYPES = {**SAFETENSORS_DTYPES, "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8"}
BUFFER_DTYPES["bool"] = "BOOL"
# A header holds a config of 8 MB at most, whose quotes are escaped in it, and about 150 bytes for each tensor.
MAX_HEADER_BYTES = 32 * 2**20

Shapes = Mapping[str, tuple[int, ...]]


def to_bytes(tensors: Mapping[str, torch.Tensor], key: str = "format", text: str = "pt") -> bytes:
    """
    The content of a safetensors file, with one text in its header. With several ones, their order would vary, and the
    same adapter would have other bytes at each save.
    """
    return safetensors_bytes(dict(tensors), metadata={key: text})


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 (hexadecimal) of the names, dtypes, shapes and bytes of tensors, whatever their order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class TensorFile:
    """
    A safetensors file that stays open, so that everything that is read from it is of one moment, also if another
    process puts a new file in its place meanwhile.

    Args:
        path (`Path`): The file.

    Attributes:
        metadata (`dict[str, str]`): The texts in its header.

    Raises:
        [`AdapterError`]: If it is not a safetensors file. Its header is bounded before it is read.
    """

    def __init__(self, path: Path):
        self.path = path
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
        if length > MAX_HEADER_BYTES:
            raise AdapterError(f"{path} is damaged: its header claims to have {length:,} bytes.")
        try:
            self._file: Any = safe_open(path, framework="pt")
            self.metadata: dict[str, str] = self._file.metadata() or {}
        except SafetensorError as error:
            raise AdapterError(f"{path} is damaged: {error}.") from error

    def check(self, shapes: Shapes, dtypes: Mapping[str, Collection[str]]) -> None:
        """
        Check the names, shapes and dtypes of all of the file's tensors, without reading them.

        Args:
            shapes (`Mapping[str, tuple[int, ...]]`): The shape of each tensor by its name.
            dtypes (`Mapping[str, Collection[str]]`): The dtypes that each may have.

        Raises:
            [`AdapterError`]: If a tensor is missing, unexpected, misshaped or of another dtype.
        """
        keys = list(self._file.keys())
        _check_names(keys, shapes, self.path)
        for key in keys:
            part = self._file.get_slice(key)
            _check_shape(key, tuple(part.get_shape()), shapes[key])
            allowed = sorted(BUFFER_DTYPES[dtype] for dtype in dtypes[key])
            if part.get_dtype() not in allowed:
                raise AdapterError(f"{key}: the file has dtype {part.get_dtype()}, expected {allowed}.")

    def read(self, shapes: Shapes) -> dict[str, torch.Tensor]:
        """Read tensors whose names and shapes [`TensorFile.check`] has compared, and check their values."""
        try:
            tensors = {key: self._file.get_tensor(key) for key in shapes}
        except SafetensorError as error:
            raise AdapterError(f"{self.path} is damaged: {error}.") from error
        check_tensors(tensors, shapes)
        return tensors


def check_tensors(tensors: Mapping[str, torch.Tensor], shapes: Shapes) -> None:
    """
    Check that tensors have the expected names and shapes, and finite values.

    Raises:
        [`AdapterError`]: If a tensor is missing, unexpected, misshaped, empty or not finite. The message names it.
    """
    _check_names(tensors, shapes, None)
    for name, tensor in tensors.items():
        _check_shape(name, tuple(tensor.shape), shapes[name])
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{name}: the tensor has NaN or infinite values. Did the training diverge?")


def _check_names(names: Iterable[str], shapes: Shapes, path: Path | None) -> None:
    where = "" if path is None else f" in {path}"
    present = dict.fromkeys(names)
    missing = [name for name in shapes if name not in present]
    unexpected = [name for name in present if name not in shapes]
    if missing or unexpected:
        raise AdapterError(
            f"The tensors{where} are not those of the adapter. "
            f"Missing: {', '.join(missing[:5]) or 'none'}; unexpected: {', '.join(unexpected[:5]) or 'none'}."
        )


def _check_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != tuple(expected):
        empty = "is empty" if 0 in shape else f"has the shape {shape}"
        raise AdapterError(f"{name}: the tensor {empty}, expected {tuple(expected)}.")
