"""Leading singular vectors of a weight, in a canonical form.

The singular vectors of a weight are not unique. Each may be multiplied by -1, and where several singular values are
equal, their vectors may be replaced by others that span the same space. `canonical_rotation` always makes the same
choice, which depends on the weight alone. So another machine, another number of threads or another library for linear
algebra (LAPACK) arrives at the same factors. `sketch` summarises factors in eight numbers, so that a later computation
can be compared with an earlier one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ._lapack import leading_eigenpairs
from .cache import read_entry, write_entry
from .devices import computed
from .spectrum import (
    Spectrum,
    check_threshold,
    check_weight,
    error_bound,
    exact_spectrum,
    load_spectrum,
    save_spectrum,
    weight_digest,
    widened,
)

# Eigenvalues that differ by less than this share of the largest one belong to one cluster, because their vectors are
# determined only up to a rotation.
CLUSTER_GAP = 1e-9
# If the ratio of squared singular values is smaller than this, a vector from the Gram matrix is no longer accurate.
GRAM_FLOOR = 1e-8
SKETCH_SIZE = 4


@dataclass(frozen=True)
class Factors:
    """
    Leading singular vectors of a weight W of shape (d_in, d_out).

    Args:
        U (`torch.Tensor` of shape `(d_in, k)`): Left singular vectors.
        Vh (`torch.Tensor` of shape `(k, d_out)`): Right singular vectors.
        clusters (`list[tuple[int, int]]`): Ranges [start, stop) of vectors that share one singular value, so that a
            rotation fixes them together. The last may reach beyond k. Of other vectors, only the sign is fixed.
    """

    U: torch.Tensor
    Vh: torch.Tensor
    clusters: list[tuple[int, int]]

    @property
    def k(self) -> int:
        return self.Vh.shape[0]

    def to(self, dtype: torch.dtype) -> "Factors":
        """The same vectors in another dtype."""
        return Factors(self.U.to(dtype), self.Vh.to(dtype), self.clusters)


def find_factors(
    weight: torch.Tensor,
    threshold: float | None = None,
    k: int | None = None,
    clusters: Sequence[tuple[int, int]] | None = None,
    site: str = "weight",
    digest: str | None = None,
    use_cache: bool = True,
) -> Factors:
    """
    The leading singular vectors of a weight, in canonical form, computed in float64.

    Args:
        weight (`torch.Tensor` of shape `(d_in, d_out)`): Any floating-point dtype, on any device.
        threshold (`float`, *optional*): The threshold from which the number of vectors follows by the rank rule.
        k (`int`, *optional*): The number of vectors, if it is known. Then no threshold is needed.
        clusters (`Sequence[tuple[int, int]]`, *optional*): The clusters that were found when the adapter was made. If
            they are left out, they are found here.
        site (`str`, *optional*): Name for error messages.
        digest (`str`, *optional*): The weight's digest for the cache, if the caller has it already.
        use_cache (`bool`, *optional*, defaults to `True`): Whether vectors come from the cache and go to it.

    Returns:
        [`Factors`]: The vectors, in float32, or in float64 for a float64 weight.

    Raises:
        `ValueError`: For a weight that is empty, zero or not finite, or a threshold out of range.
    """
    check_weight(weight, site)
    digest, spectrum = digest or weight_digest(weight), None
    if k is None:
        if threshold is None:
            raise ValueError(f"{site}: give a threshold or k, which say how many singular vectors are wanted.")
        check_threshold(threshold, site)
        spectrum = load_spectrum(digest, weight) if use_cache else None
        k = None if spectrum is None else spectrum.rank(threshold)
    factors = load_factors(digest, k, weight, spectrum) if use_cache and k is not None else None
    if factors is not None and (clusters is None or list(clusters) == factors.clusters):
        return factors
    factors = _factorise(weight, k, threshold, clusters, digest)
    if use_cache:
        save_factors(digest, factors)
    return factors


def _factorise(
    weight: torch.Tensor,
    k: int | None,
    threshold: float | None,
    clusters: Sequence[tuple[int, int]] | None,
    digest: str,
) -> Factors:
    dtype = torch.promote_types(weight.dtype, torch.float32)
    transposed = weight.shape[0] < weight.shape[1]
    # `choose` sets those of these two that are not given.
    count, fixed_together = k or 0, list(clusters or ())

    def choose(squares: np.ndarray, matrix: torch.Tensor) -> int:
        """The number of vectors to compute: k, or more if the last cluster reaches beyond k."""
        nonlocal count, fixed_together
        eigenvalues = torch.from_numpy(squares).clamp_min(0.0)
        if k is None and threshold is not None:
            spectrum = Spectrum(eigenvalues.sqrt(), error_bound(torch.float64, weight.shape, float(eigenvalues[0])))
            decided = spectrum.rank(threshold)
            if decided is None:
                spectrum = exact_spectrum(matrix)
                decided = spectrum.count(threshold)
            save_spectrum(digest, spectrum)
            count = decided
        if clusters is None:
            fixed_together = _find_clusters(eigenvalues, count)
        return max([count, *(stop for _, stop in fixed_together)])

    def canonical_vectors(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wide = widened(matrix)
        tall = wide.t() if transposed else wide
        vectors = top_vectors(tall.double(), lambda squares: choose(squares, wide))
        left, right = _canonical(*vectors, fixed_together)
        return left[:count].to(dtype).cpu(), right[:count].to(dtype).cpu()

    left, right = computed(canonical_vectors, weight)
    U, Vh = (right.t(), left) if transposed else (left.t(), right)
    return Factors(U.contiguous(), Vh.contiguous(), fixed_together)


def top_vectors(tall: torch.Tensor, choose: Callable[[np.ndarray], int]) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Leading singular vectors of a matrix with at least as many rows as columns.

    Args:
        tall (`torch.Tensor` of shape `(m, n)`): float64, m >= n.
        choose (`Callable`): Gets the n squared singular values in descending order and returns the number of vectors.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: left vectors (count, m) and right vectors (count, n), as rows.
    """
    squares, right = (_eigenpairs_on_cpu if tall.device.type == "cpu" else _eigenpairs)(tall, choose)
    count = right.shape[0]
    if squares[count - 1] < GRAM_FLOOR * squares[0]:
        left, _, right = torch.linalg.svd(tall, full_matrices=False)
        return left[:, :count].t(), right[:count]
    # The product is computed in float64, because dividing by a small singular value multiplies its error.
    sigma = torch.from_numpy(np.sqrt(squares[:count])).to(tall.device)
    return (right @ tall.t()) / sigma[:, None], right


def _eigenpairs_on_cpu(tall: torch.Tensor, choose: Callable[[np.ndarray], int]) -> tuple[np.ndarray, torch.Tensor]:
    """All eigenvalues of the Gram matrix, and its leading eigenvectors as rows, by LAPACK's steps."""
    matrix = tall.numpy()
    # numpy computes the product of a matrix with its own transpose with half the work.
    squares, vectors = leading_eigenpairs(np.ascontiguousarray(matrix.T @ matrix), choose)
    return squares, torch.from_numpy(vectors)


def _eigenpairs(tall: torch.Tensor, choose: Callable[[np.ndarray], int]) -> tuple[np.ndarray, torch.Tensor]:
    """The same on any device. A GPU finds all eigenvectors in little more time than a part of them."""
    ascending, vectors = torch.linalg.eigh(tall.t() @ tall)
    squares = ascending.flip(0).cpu().numpy()
    return squares, vectors[:, -choose(squares) :].flip(1).t()


def _find_clusters(eigenvalues: torch.Tensor, k: int) -> list[tuple[int, int]]:
    """Ranges of at least two leading eigenvalues with gaps below CLUSTER_GAP, which begin in the first k."""
    close = ((eigenvalues[:-1] - eigenvalues[1:]) <= CLUSTER_GAP * eigenvalues[0]).tolist()
    clusters, start = [], 0
    while start < k:
        stop = start + 1
        while stop <= len(close) and close[stop - 1]:
            stop += 1
        if stop - start > 1:
            clusters.append((start, stop))
        start = stop
    return clusters


def probe(rows: int, columns: int, salt: int = 0) -> torch.Tensor:
    """A float64 matrix (rows, columns) of +-1 from the bits of an integer hash. It is the same on every machine."""
    index = torch.arange(rows * columns, dtype=torch.int64) + (salt << 40)
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        # splitmix64's finalizer in wrapping int64 arithmetic; the mask makes the right shift a logical one.
        index = (index ^ ((index >> shift) & ((1 << (64 - shift)) - 1))) * factor
    bits = (index >> 62) & 1
    return (1 - 2 * bits).to(torch.float64).view(rows, columns)


def canonical_rotation(block: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """
    The rotation that brings a basis of a subspace to its canonical form, in which block^T columns is symmetric and
    positive. For a single vector, the rotation is a sign. The canonical form depends on the subspace alone, and not on
    the basis that is given.

    Args:
        block (`torch.Tensor` of shape `(d, c)`): Orthonormal basis of the subspace.
        columns (`torch.Tensor` of shape `(d, c)`): Columns of the fixed probe.

    Returns:
        `torch.Tensor` of shape `(c, c)`: Orthogonal; `block @ rotation` is canonical.
    """
    left, _, right = torch.linalg.svd(block.t() @ columns)
    return left @ right


def _canonical(
    left: torch.Tensor, right: torch.Tensor, clusters: Sequence[tuple[int, int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bring pairs of singular vectors, as rows, to canonical form: by a sign each, and by one rotation per cluster."""
    signs = torch.where(right @ probe(right.shape[1], 1).to(right.device) < 0, -1.0, 1.0)
    left, right = left * signs, right * signs
    for start, stop in clusters:
        columns = probe(right.shape[1], stop - start, salt=1).to(right.device)
        rotation = canonical_rotation(right[start:stop].t(), columns).t()
        left[start:stop], right[start:stop] = rotation @ left[start:stop], rotation @ right[start:stop]
    return left, right


def sketch(factors: Factors) -> torch.Tensor:
    """
    A summary of factors that changes with every sign flip, rotation or swap: 4 numbers for U and 4 for Vh, each a
    projection of the whole matrix by fixed vectors of +-1 on both sides.

    Returns:
        `torch.Tensor` of shape `(8,)`, float32: Numbers of the order of sqrt(k).
    """
    U, Vh = factors.U.double(), factors.Vh.double()
    rows = probe(factors.k, SKETCH_SIZE, salt=2)
    left = ((probe(U.shape[0], SKETCH_SIZE, salt=3).t() @ U) * rows.t()).sum(1)
    right = ((Vh @ probe(Vh.shape[1], SKETCH_SIZE, salt=4)) * rows).sum(0)
    return torch.cat([left, right]).float()


def sketches_agree(one: torch.Tensor, other: torch.Tensor, k: int) -> bool:
    """Whether two sketches belong to the same factors. They do not if a single vector differs by an angle of 1e-3."""
    return bool(((one - other).abs() <= 1e-5 * max(1.0, math.sqrt(k))).all())


def load_factors(digest: str, k: int, weight: torch.Tensor, spectrum: Spectrum | None = None) -> Factors | None:
    """Factors from the cache, or `None` where the cache has none that are those of the weight."""

    def check(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> Factors:
        ends = [int(number) for number in metadata["clusters"].split()]
        factors = Factors(tensors["U"], tensors["Vh"], list(zip(ends[::2], ends[1::2], strict=True)))
        dtype = torch.promote_types(weight.dtype, torch.float32)
        shapes = {"U": (weight.shape[0], k), "Vh": (k, weight.shape[1])}
        for name, shape in shapes.items():
            if tensors[name].shape != shape or tensors[name].dtype != dtype:
                raise ValueError(f"its {name} is {tensors[name].dtype} of shape {tuple(tensors[name].shape)}")
        if any(not 0 <= start < min(stop, k) or stop > min(weight.shape) for start, stop in factors.clusters):
            raise ValueError(f"its clusters {factors.clusters} are not ranges of its vectors")
        if not are_leading_vectors(factors, weight, spectrum):
            raise ValueError("its vectors are not the leading singular vectors of the weight")
        return factors

    return read_entry(f"{digest}.k{k}", check)


def are_leading_vectors(factors: Factors, weight: torch.Tensor, spectrum: Spectrum | None = None) -> bool:
    """
    Whether factors are singular vectors of a weight, in order and in canonical form. Products with fixed vectors of
    +-1 decide this, at a small part of what the factors cost. With a spectrum, they have to be the leading ones.
    """
    return computed(lambda matrix: _lead(factors, matrix, spectrum), weight)


def _lead(factors: Factors, weight: torch.Tensor, spectrum: Spectrum | None) -> bool:
    W = widened(weight).double()
    U, Vh = factors.U.to(W.device).double(), factors.Vh.to(W.device).double()
    r, other = (probe(factors.k, 1, salt=salt).to(W.device) for salt in (5, 6))
    sigma = U.t() @ (W @ (Vh.t() @ r)) / r
    largest = float(sigma.abs().max())
    tolerance = (1e-5 if factors.U.dtype == torch.float32 else 1e-9) * math.sqrt(factors.k)
    errors = [
        (U.t() @ (U @ r) - r).abs().max(),
        (Vh @ (Vh.t() @ r) - r).abs().max(),
        (W @ (Vh.t() @ other) - U @ (sigma * other)).abs().max() / largest,
        (W.t() @ (U @ other) - Vh.t() @ (sigma * other)).abs().max() / largest,
        (sigma - sigma.cummin(0).values).max() / largest,
        -sigma.min() / largest,
    ]
    if spectrum is not None:
        errors.append((sigma[:, 0].cpu() - spectrum.values[: factors.k]).abs().max() / largest)
    # Vectors whose values differ are no cluster, which would excuse their signs.
    squares = (sigma[:, 0] / largest).square()
    together = all(squares[start] - squares[start:stop].min() <= 1e-5 for start, stop in factors.clusters)
    return all(float(error) <= tolerance for error in errors) and together and _are_canonical(factors)


def _are_canonical(factors: Factors) -> bool:
    """
    Whether the signs of the vectors that stand alone, and the bases of whole clusters, are those of the convention.
    The basis of a cluster that reaches beyond the vectors cannot be checked.
    """
    right = (factors.Vh if factors.U.shape[0] >= factors.Vh.shape[1] else factors.U.t()).double()
    alone = torch.ones(factors.k, dtype=torch.bool)
    for start, stop in factors.clusters:
        alone[start:stop] = False
        if stop <= factors.k:
            product = right[start:stop] @ probe(right.shape[1], stop - start, salt=1)
            least = -1e-4 * float(product.abs().max())
            if (product - product.t()).abs().max() > -least or torch.linalg.eigvalsh(product).min() < least:
                return False
    return bool((right @ probe(right.shape[1], 1) >= -1e-6)[alone, 0].all())


def save_factors(digest: str, factors: Factors) -> None:
    """Write factors to the cache."""
    ends = " ".join(str(end) for cluster in factors.clusters for end in cluster)
    write_entry(f"{digest}.k{factors.k}", {"U": factors.U, "Vh": factors.Vh}, {"clusters": ends})
