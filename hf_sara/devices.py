"""The device on which singular values and vectors of a weight are computed: where it lies, or a GPU that is there.

The error bounds decide ranks, and the canonical form decides vectors, so the answers are those of the CPU. A device
without float64 (MPS), or one whose memory is full, leaves the work to the CPU.
"""

import logging
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import TypeVar

import torch

logger = logging.getLogger(__name__)

Found = TypeVar("Found")
# Sending a smaller weight to a GPU takes longer than the CPU's factorisation.
SENT_FROM = 1024
# The compute capabilities of NVIDIA's GPUs for data centers, in which float64 has half the speed of float32. In all
# others it has a small part of it.
FAST_IN_FLOAT64 = ((6, 0), (7, 0), (8, 0), (9, 0), (10, 0))
# What the libraries of a GPU say if they have no memory or fail, and torch has no error of its own for it.
FAILURES = ("out of memory", "cublas", "cusolver")

_locks: dict[torch.device, threading.Lock] = defaultdict(threading.Lock)


def has_float64(device: torch.device) -> bool:
    """Whether a device can compute in float64, with the functions of linear algebra that are needed."""
    return device.type in ("cpu", "cuda", "meta")


def fast_in_float64(device: torch.device) -> bool:
    """Whether float64 costs about as little as float32, so that nothing is tried in float32 first."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in FAST_IN_FLOAT64


def exact_in_float32(device: torch.device) -> bool:
    """Whether products in float32 have its precision. Settings of torch can let a device round more coarsely."""
    backend = getattr(torch.backends.mkldnn, "matmul", None) if device.type == "cpu" else torch.backends.cuda.matmul
    precision = getattr(backend, "fp32_precision", None)
    if precision is None:
        # So it is asked before torch 2.9. Later versions raise an error here if the new setting was made.
        return torch.get_float32_matmul_precision() == "highest"
    return precision in ("ieee", "none")


def place_for(weight: torch.Tensor, device: torch.device | str | None = None) -> torch.device:
    """
    Where to compute with a weight.

    Args:
        weight (`torch.Tensor` of shape `(d_in, d_out)`): A site's weight.
        device (`torch.device` or `str`, *optional*): Where the user wants it. Defaults to where the weight lies, or
            to a GPU for a large weight on the CPU.
    """
    if device is not None:
        return torch.device(device)
    if weight.device.type == "cpu" and min(weight.shape) >= SENT_FROM and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return weight.device


def sent(weight: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A weight on a device, or where it is if the memory there is full."""
    try:
        return weight.to(device)
    except RuntimeError as error:
        _log_failure(error, weight, device)
        return weight


def check_device(device: torch.device | str | None) -> None:
    """Raise a `ValueError` unless a device exists here."""
    if device is None:
        return
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        here = "cpu, cuda" if torch.cuda.is_available() else "cpu"
        raise ValueError(f"device={str(device)!r} is not one of this machine ({here}): {error}") from error


def computed(compute: Callable[[torch.Tensor], Found], weight: torch.Tensor) -> Found:
    """
    The result of a function of a matrix. On a GPU, one matrix at a time is worked on, and if its memory is full or its
    library fails, the CPU does it.
    """
    if weight.device.type == "cpu":
        return compute(weight)
    with _locks[weight.device]:
        try:
            return compute(weight)
        except RuntimeError as error:
            _log_failure(error, weight, weight.device)
    return compute(weight.cpu())


def _log_failure(error: RuntimeError, weight: torch.Tensor, device: torch.device) -> None:
    """Say why the CPU takes over, or raise the error again if it is none of the device's."""
    known = isinstance(error, (torch.OutOfMemoryError, torch.linalg.LinAlgError))
    if not known and not any(failure in str(error).lower() for failure in FAILURES):
        raise error
    reason = str(error).partition("\n")[0]
    logger.warning("The CPU factorises a matrix of shape %s, because %s: %s", tuple(weight.shape), device, reason)
