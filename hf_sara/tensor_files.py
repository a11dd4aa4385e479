"""Strict reading of safetensors files: they have exactly the expected names, shapes and dtypes, and finite values."""

import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes

from .errors import AdapterError
from .files import file_digest

# The dtypes that a weight, or a saved tensor, may have, and safetensors' names for them.
SAFETENSORS_DTYPES = {"float32": "F32", "float64": "F64", "bfloat16": "BF16", "float16": "F16"}
# A tensor takes about 150 bytes in the header of its file, so this is more than enough.
MAX_HEADER_BYTES_PER_TENSOR = 1024


def to_bytes(tensors: dict[str, torch.Tensor]) -> bytes:
    """The content of a safetensors file."""
    return safetensors_bytes(tensors, metadata={"format": "pt"})


def read_tensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtypes: Collection[str], sha256: str
) -> dict[str, torch.Tensor]:
    """
    Read the tensors of a file, after checking everything that can be checked without reading them.

    Args:
        path (`Path`): The file.
        shapes (`Mapping[str, tuple[int, ...]]`): The name and the shape of each tensor.
        dtypes (`Collection[str]`): The dtypes that the tensors may have.
        sha256 (`str`): The digest that the file has to have.

    Raises:
        `FileNotFoundError`: If there is no such file.
        [`AdapterError`]: If the file is damaged, or has other tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"The adapter is incomplete: {path} is missing.")
    size, limit = path.stat().st_size, most_bytes(shapes, dtypes)
    if size > limit:
        raise AdapterError(f"{path} is damaged: it has {size:,} bytes, the tensors of the config {limit:,} at most.")
    allowed = {SAFETENSORS_DTYPES[dtype] for dtype in dtypes}
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            _check_names(keys, shapes, path)
            for key in keys:
                part = file.get_slice(key)
                _check_shape(key, tuple(part.get_shape()), shapes[key])
                if part.get_dtype() not in allowed:
                    raise AdapterError(f"{key}: the file has dtype {part.get_dtype()}, expected {sorted(allowed)}.")
            if file_digest(path) != sha256:
                raise AdapterError(
                    f"{path} is damaged: its SHA-256 is not the one that sara_config.json gives. One of the two was "
                    "changed, or belongs to another adapter."
                )
            tensors = {key: file.get_tensor(key) for key in keys}
    except SafetensorError as error:
        raise AdapterError(f"{path} is damaged: {error}.") from error
    check_tensors(tensors, shapes)
    return tensors


def most_bytes(shapes: Mapping[str, tuple[int, ...]], dtypes: Collection[str]) -> int:
    """
    An upper bound on the bytes of a file with these tensors. A larger file is neither opened nor digested, because its
    header may claim to be gigabytes long, and a file without content may be as long as a disk.
    """
    widest = max(getattr(torch, dtype).itemsize for dtype in dtypes)
    return widest * sum(map(math.prod, shapes.values())) + MAX_HEADER_BYTES_PER_TENSOR * (1 + len(shapes))


def check_tensors(tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
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


def _check_names(names: Iterable[str], shapes: Mapping[str, tuple[int, ...]], path: Path | None) -> None:
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
