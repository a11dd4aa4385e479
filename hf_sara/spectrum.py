"""Singular values of a weight, and the rank rule.

A rank needs singular values only, and they follow from the eigenvalues of the smaller Gram matrix. This matrix holds
squares, so the small values lose accuracy, and in float32 all of them do. So each spectrum has a bound on its error,
and a rank is taken from the cheapest spectrum that decides it beyond doubt. From cheap to accurate, a spectrum comes
from the Gram matrix in float32, from the Gram matrix in float64, or from a decomposition in float64.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from .cache import read_entry, write_entry
from .devices import computed, exact_in_float32, fast_in_float64, has_float64

# Sums that differ by less than this share count as equal, because float64 sums of thousands of terms have errors of
# about this size.
TIE = 1e-12
# A Gram matrix in float32 saves time only if the smaller side of the weight has at least this length.
FLOAT32_FROM = 1024

Found = TypeVar("Found")


def check_threshold(threshold: float, site: str | None = None) -> None:
    """Raise a `ValueError` unless 0 < threshold <= 1. It names the site if one is given."""
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0.0 < threshold <= 1.0:
        where = "" if site is None else f"{site}: "
        raise ValueError(f"{where}threshold={threshold!r} has to be a number with 0 < threshold <= 1.")


def rank_for_threshold(singular_values: torch.Tensor | Sequence[float], threshold: float) -> int:
    """
    The rank rule (Algorithm 1 of the paper): the smallest count of leading singular values whose sum reaches
    `threshold * sum(all singular values)`. The sums are plain ones, not sums of squares, and are computed in float64.

    Args:
        singular_values (`torch.Tensor` of shape `(n,)`): Singular values in any order, all finite and not negative.
        threshold (`float`): With 0 < threshold <= 1.

    Returns:
        `int`: k with 1 <= k <= n.

    Raises:
        `ValueError`: For a threshold out of range, and for values that are empty, all zero, negative or not finite.
    """
    check_threshold(threshold)
    values = torch.as_tensor(singular_values).detach().to("cpu", torch.float64).flatten()
    if values.numel() == 0:
        raise ValueError("There are no singular values: the weight is empty.")
    if not torch.isfinite(values).all() or (values < 0).any():
        raise ValueError("The singular values have to be finite and not negative.")
    if not values.any():
        raise ValueError("All singular values are zero: the weight is zero, and no rank follows from it.")
    return Spectrum(values.sort(descending=True).values).count(threshold)


@dataclass(frozen=True)
class Spectrum:
    """
    The singular values of a weight.

    Args:
        values (`torch.Tensor` of shape `(n,)`): Singular values in descending order, float64, on the CPU.
        radius (`float`, *optional*, defaults to 0.0): Bound on the error of each squared value.
    """

    values: torch.Tensor
    radius: float = 0.0

    def count(self, threshold: float) -> int:
        """The rank by the rank rule, as if the values had no error."""
        sums = self.values.cumsum(0)
        target = threshold * sums[-1] * (1.0 - TIE)
        return min(int((sums < target).sum()) + 1, self.values.numel())

    def rank(self, threshold: float) -> int | None:
        """The rank by the rank rule, or `None` if the error bound leaves it in doubt."""
        k = self.count(threshold)
        if self.radius == 0.0:
            return k
        squares = self.values.square()
        low = (squares - self.radius).clamp_min(0.0).sqrt()
        high = (squares + self.radius).sqrt()
        slack = TIE * float(self.values.sum())

        def surplus(count: int, head: torch.Tensor, tail: torch.Tensor) -> float:
            # This is the sum of the first `count` values minus threshold * the sum of all values. The values of `head`
            # and of `tail` are bounds from opposite sides, so that the result is a bound too.
            return float((1.0 - threshold) * head[:count].sum() - threshold * tail[count:].sum())

        enough = surplus(k, low, high) >= -slack
        one_less_is_not = k == 1 or surplus(k - 1, high, low) < -slack
        return k if enough and one_less_is_not else None


def check_weight(weight: torch.Tensor, site: str) -> None:
    """Raise a `ValueError` that names the site if the weight is empty, zero, or has values that are not finite."""
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"{site}: the weight of shape {tuple(weight.shape)} is empty or not a matrix.")
    low, high = (float(end) for end in weight.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        bad = int((~torch.isfinite(weight)).sum())
        raise ValueError(f"{site}: the weight has {bad} values that are NaN or infinite. Is the checkpoint damaged?")
    if low == high == 0.0:
        raise ValueError(f"{site}: the weight is all zero, so it has no singular directions. Leave this module out.")


def weight_digest(weight: torch.Tensor) -> str:
    """
    SHA-256 (hexadecimal) of a weight's values. bfloat16 and float16 are widened to float32 first, which changes no
    value. So a checkpoint and its exact upcast have the same factors and the same digest. A rounded copy has others.

    Args:
        weight (`torch.Tensor` of shape `(d_in, d_out)`): A site's weight.
    """
    stored = weight.detach().t().cpu()
    wide = stored.to(torch.promote_types(stored.dtype, torch.float32)).contiguous()
    digest = hashlib.sha256(f"{wide.dtype}{tuple(wide.shape)}".encode())
    digest.update(wide.numpy().data.cast("B"))
    return digest.hexdigest()


def find_rank(weight: torch.Tensor, threshold: float, site: str = "weight", digest: str | None = None) -> int:
    """
    Rank of a weight for a threshold, by the rank rule, from the cheapest spectrum that decides it.

    Args:
        weight (`torch.Tensor` of shape `(d_in, d_out)`): Any floating-point dtype, on any device.
        threshold (`float`): With 0 < threshold <= 1.
        site (`str`, *optional*): Name for error messages.
        digest (`str`, *optional*): The weight's digest for the cache, if the caller has it already.

    Returns:
        `int`: k with 1 <= k <= min(d_in, d_out).

    Raises:
        `ValueError`: For a weight that is empty, zero or not finite, or a threshold out of range.
    """
    check_threshold(threshold, site)
    return _climb(weight, site, digest, lambda spectrum: spectrum.rank(threshold))


def find_spectrum(
    weight: torch.Tensor, site: str = "weight", digest: str | None = None, thresholds: Sequence[float] = ()
) -> Spectrum:
    """The singular values of a weight, from the cache or the cheapest way that decides the ranks at `thresholds`."""

    def decided(spectrum: Spectrum) -> Spectrum | None:
        return None if any(spectrum.rank(threshold) is None for threshold in thresholds) else spectrum

    return _climb(weight, site, digest, decided)


def _climb(weight: torch.Tensor, site: str, digest: str | None, use: Callable[[Spectrum], Found | None]) -> Found:
    """Offer spectra to `use`, from the cheapest to the most accurate, until it returns something."""
    check_weight(weight, site)
    digest = digest or weight_digest(weight)
    spectrum = load_spectrum(digest, weight)
    result = None if spectrum is None else use(spectrum)
    if result is not None:
        return result
    device = weight.device if has_float64(weight.device) else torch.device("cpu")
    in_float32 = min(weight.shape) >= FLOAT32_FROM and not fast_in_float64(device) and exact_in_float32(device)
    dtypes = (torch.float32, torch.float64) if in_float32 else (torch.float64,)
    for compute in (
        *(lambda matrix, dtype=dtype: _gram_spectrum(widened(matrix), dtype) for dtype in dtypes),
        lambda matrix: exact_spectrum(widened(matrix)),
    ):
        candidate = computed(compute, weight)
        if spectrum is not None and candidate.radius >= spectrum.radius > 0.0:
            continue
        result = use(candidate)
        if result is not None:
            save_spectrum(digest, candidate)
            return result
    raise AssertionError("An exact spectrum decides every rank.")


def widened(weight: torch.Tensor) -> torch.Tensor:
    """
    The weight in at least float32, on a device that has float64. If float32 could not hold its squares, it is divided
    by a power of two, so that its largest value is about 1. This changes neither ranks nor singular vectors.
    """
    here = weight.detach() if has_float64(weight.device) else weight.detach().cpu()
    wide = here.to(torch.promote_types(weight.dtype, torch.float32))
    largest = float(torch.stack(wide.aminmax()).abs().max())
    if 1e-10 < largest < 1e10:
        return wide
    return wide.double() / 2.0 ** math.floor(math.log2(largest))


def doubled(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float64: on its own device, or on the CPU if that has no float64."""
    return (tensor if has_float64(tensor.device) else tensor.cpu()).double()


def _gram(matrix: torch.Tensor) -> torch.Tensor:
    """The Gram matrix of the smaller side. Only its lower triangle is computed; the rest is zero."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.t()
    n = tall.shape[1]
    gram = tall.new_zeros(n, n)
    step = max(256, -(-n // 4))
    for start in range(0, n, step):
        stop = min(start + step, n)
        gram[start:, start:stop] = tall[:, start:].t() @ tall[:, start:stop]
    return gram


def error_bound(dtype: torch.dtype, shape: Sequence[int], largest: float) -> float:
    """
    Bound on the error of an eigenvalue of the Gram matrix. Rounding errors of a product of length m grow like sqrt(m)
    (Higham and Mary, 2019). Those of the reduction to tridiagonal form, which are larger, grow in the same way. The
    factor 16 is seven times the largest one that was observed (on random square float32 weights of size 256 to 3072).
    """
    return 16.0 * torch.finfo(dtype).eps * math.sqrt(max(shape)) * largest


def _gram_spectrum(weight: torch.Tensor, dtype: torch.dtype) -> Spectrum:
    eigenvalues = torch.linalg.eigvalsh(_gram(weight.to(dtype))).double().flip(0).clamp_min(0.0)
    return Spectrum(eigenvalues.sqrt().cpu(), error_bound(dtype, weight.shape, float(eigenvalues[0])))


def exact_spectrum(weight: torch.Tensor) -> Spectrum:
    return Spectrum(torch.linalg.svdvals(weight.double()).cpu())


def load_spectrum(digest: str, weight: torch.Tensor) -> Spectrum | None:
    """A spectrum from the cache, or `None` where the cache has none that the weight can have."""

    def check(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> Spectrum:
        spectrum = Spectrum(tensors["values"], float(metadata["radius"]))
        values, n = spectrum.values, min(weight.shape)
        if values.dtype != torch.float64 or values.shape != (n,) or not math.isfinite(spectrum.radius):
            raise ValueError(f"its values are {values.dtype} of shape {tuple(values.shape)}")
        if not bool((values[1:] <= values[:-1]).all()) or not bool((values >= 0).all()) or spectrum.radius < 0:
            raise ValueError("its values are no singular values")
        # The squares of the singular values and those of the entries of a matrix have the same sum.
        norm = computed(lambda matrix: torch.linalg.vector_norm(widened(matrix), dtype=torch.float64), weight)
        whole = float(norm) ** 2
        if not abs(float(values.square().sum()) - whole) <= n * spectrum.radius + 1e-6 * whole:
            raise ValueError("its values belong to another matrix")
        return spectrum

    return read_entry(f"{digest}.spectrum", check)


def save_spectrum(digest: str, spectrum: Spectrum) -> None:
    """Write a spectrum to the cache."""
    write_entry(f"{digest}.spectrum", {"values": spectrum.values.contiguous()}, {"radius": repr(spectrum.radius)})
