"""Strict reading of safetensors files: they have exactly the expected names, shapes and dtypes, and finite values."""

import hashlib
import math
import os
import struct
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from safetensors.torch import save as safetensors_bytes

from .errors import AdapterError
from .records import check_fields, check_shape, parse_json

# The dtypes that a weight, or a trained tensor, may have, and safetensors' names for them.
SAFETENSORS_DTYPES = {"float32": "F32", "float64": "F64", "bfloat16": "BF16", "float16": "F16"}
# The dtypes that a buffer may have besides.
BUFFER_DTYPES = {**SAFETENSORS_DTYPES, "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8"}
BUFFER_DTYPES["bool"] = "BOOL"
WIDTHS = {short: getattr(torch, name).itemsize for name, short in BUFFER_DTYPES.items()}
ENTRY_FIELDS = {"dtype": str, "shape": list[int], "data_offsets": list[int]}
# This is enough for a quarter of a million tensors, or for a config whose quotes are escaped in it.
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


@dataclass(frozen=True)
class Entry:
    """The place of a tensor in a file, as the file's header gives it: dtype, shape and range of bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(file: IO[bytes], name: str) -> tuple[dict[str, Entry], dict[str, str]]:
    """
    The tensors of an open safetensors file, and the texts in its header. Nothing else is read.

    Raises:
        `ValueError`: If it is not a safetensors file, or its header is larger than any can be.
    """
    (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"{name} is damaged: its header claims to have {length:,} bytes.")
    if length < 2:
        raise ValueError(f"{name} is damaged: it is not a safetensors file.")
    try:
        header = parse_json(file.read(length), MAX_HEADER_BYTES)
        metadata = header.pop("__metadata__", {})
        check_fields("the header", {"__metadata__": metadata}, {"__metadata__": dict[str, str]})
        entries = {}
        for key, record in header.items():
            check_fields(f"the record of {key!r}", record, ENTRY_FIELDS)
            check_shape(repr(key), record["shape"])
            if len(record["data_offsets"]) != 2:
                raise ValueError(f"{key!r} has no two data_offsets")
            start, stop = record["data_offsets"]
            entry = Entry(record["dtype"], tuple(record["shape"]), 8 + length + start, 8 + length + stop)
            width = WIDTHS.get(entry.dtype)
            if not 0 <= start <= stop or (width is not None and stop - start != width * math.prod(entry.shape)):
                raise ValueError(f"{key} has {stop - start} bytes, which its shape {entry.shape} does not have")
            entries[key] = entry
    except ValueError as error:
        raise ValueError(f"{name} is damaged: {error}.") from error
    return entries, metadata


class TensorFile:
    """
    A safetensors file that stays open, so that everything that is read from it is of one moment, also if another
    process puts a new file in its place meanwhile.

    Args:
        path (`Path`): The file.

    Attributes:
        metadata (`dict[str, str]`): The texts in its header.
        size (`int`): Its size in bytes.

    Raises:
        [`AdapterError`]: If it is not a safetensors file. Only its header is read.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = open(path, "rb")  # noqa: SIM115
        self.size = os.fstat(self._file.fileno()).st_size
        try:
            self.entries, self.metadata = read_header(self._file, str(path))
        except ValueError as error:
            raise AdapterError(str(error)) from error
        end = self._file.tell()
        for entry in sorted(self.entries.values(), key=lambda entry: (entry.start, entry.stop)):
            if entry.start != end:
                raise AdapterError(f"{path} is damaged: its tensors overlap, or have holes between them.")
            end = entry.stop
        if end != self.size:
            raise AdapterError(f"{path} is damaged: it has {self.size:,} bytes, and its header describes {end:,}.")

    def __del__(self):
        # There is no file if it could not be opened.
        if hasattr(self, "_file"):
            self._file.close()

    def content(self) -> bytes:
        """The whole file."""
        self._file.seek(0)
        return self._file.read()

    def digest(self) -> str:
        """SHA-256 (hexadecimal) of the whole file."""
        self._file.seek(0)
        return hashlib.file_digest(self._file, "sha256").hexdigest()

    def check(self, shapes: Shapes, dtypes: Mapping[str, Collection[str]]) -> None:
        """
        Check the names, shapes and dtypes of all of the file's tensors, without reading them.

        Args:
            shapes (`Mapping[str, tuple[int, ...]]`): The shape of each tensor by its name.
            dtypes (`Mapping[str, Collection[str]]`): The dtypes that each may have.

        Raises:
            [`AdapterError`]: If a tensor is missing, unexpected, misshaped or of another dtype.
        """
        _check_names(self.entries, shapes, self.path)
        for key, entry in self.entries.items():
            _check_shape(key, entry.shape, shapes[key])
            allowed = sorted(BUFFER_DTYPES[dtype] for dtype in dtypes[key])
            if entry.dtype not in allowed:
                raise AdapterError(f"{key}: the file has dtype {entry.dtype}, expected {allowed}.")

    def read(self, shapes: Shapes) -> dict[str, torch.Tensor]:
        """Read tensors whose names and shapes [`TensorFile.check`] has compared, and check their values."""
        tensors = {key: self._read(self.entries[key]) for key in shapes}
        check_tensors(tensors, shapes)
        return tensors

    def _read(self, entry: Entry) -> torch.Tensor:
        dtype = getattr(torch, next(name for name, short in BUFFER_DTYPES.items() if short == entry.dtype))
        if entry.start == entry.stop:
            return torch.empty(entry.shape, dtype=dtype)
        self._file.seek(entry.start)
        return torch.frombuffer(bytearray(self._file.read(entry.stop - entry.start)), dtype=dtype).view(entry.shape)


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
