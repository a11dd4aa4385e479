"""Numerics: singular values, the rank rule, leading singular vectors, and their cache.

Ranks need singular values only, and those follow from the eigenvalues of the smaller Gram matrix. Squaring costs
accuracy at the small end, and float32 costs some everywhere, so each spectrum carries a bound on its error, and a rank
is taken from the cheapest spectrum that decides it beyond doubt: float32 Gram, float64 Gram, float64 singular values.

Frozen factors are the leading singular vectors, which are unique only up to a sign, and inside a cluster of equal
singular values only up to a rotation. `canonical_rotation` fixes both by a convention that depends on the spanned
subspace alone, so that another LAPACK, thread count or machine arrives at the same factors.
"""

import hashlib
import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from threadpoolctl import threadpool_limits
from transformers.utils.logging import tqdm

from ._lapack import leading_eigenpairs
from .arguments import check_threshold

logger = logging.getLogger(__name__)

# Sums that differ by less than this share are equal: float64 sums of thousands of terms cannot tell them apart.
TIE = 1e-12
# float32 pays only where matrices are large.
FLOAT32_FROM = 1024
# Eigenvalues closer than this share of the largest one belong to one cluster: their vectors are not determined.
CLUSTER_GAP = 1e-9
# Below this ratio of squared singular values a vector from the Gram matrix is no longer accurate.
GRAM_FLOOR = 1e-8
# Bumped when cached values would no longer be what this module computes.
CACHE_VERSION = 2

Item = TypeVar("Item")
Result = TypeVar("Result")


def rank_for_threshold(singular_values: torch.Tensor | Sequence[float], threshold: float) -> int:
    """
    The rank rule (Algorithm 1 of the paper): the smallest count of leading singular values whose sum reaches
    `threshold * sum(all singular values)`. Plain sums, not sums of squares, in float64.

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
        """The rank rule, taking the values as they are."""
        sums = self.values.cumsum(0)
        target = threshold * sums[-1] * (1.0 - TIE)
        return min(int((sums < target).sum()) + 1, self.values.numel())

    def rank(self, threshold: float) -> int | None:
        """The rank rule where the error bound leaves no doubt about it, else `None`."""
        k = self.count(threshold)
        if self.radius == 0.0:
            return k
        squares = self.values.square()
        low = (squares - self.radius).clamp_min(0.0).sqrt()
        high = (squares + self.radius).sqrt()
        slack = TIE * float(self.values.sum())

        def surplus(count: int, head: torch.Tensor, tail: torch.Tensor) -> float:
            # sum of the first `count` - threshold * sum of all, with the two parts bounded from opposite sides
            return float((1.0 - threshold) * head[:count].sum() - threshold * tail[count:].sum())

        enough = surplus(k, low, high) >= -slack
        one_less_is_not = k == 1 or surplus(k - 1, high, low) < -slack
        return k if enough and one_less_is_not else None


@dataclass(frozen=True)
class Factors:
    """
    Leading singular vectors of a weight W of shape (d_in, d_out).

    Args:
        U (`torch.Tensor` of shape `(d_in, k)`): Left singular vectors.
        Vh (`torch.Tensor` of shape `(k, d_out)`): Right singular vectors.
        clusters (`list[tuple[int, int]]`): Ranges [start, stop) of vectors that share one singular value and are
            fixed together; the last may reach beyond k. Vectors outside of them are fixed by their sign.
    """

    U: torch.Tensor
    Vh: torch.Tensor
    clusters: list[tuple[int, int]]

    @property
    def k(self) -> int:
        return self.Vh.shape[0]


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
    value: a checkpoint and its exact upcast have the same factors and the same digest, a rounded copy has not.

    Args:
        weight (`torch.Tensor` of shape `(d_in, d_out)`): A site's weight.
    """
    stored = weight.detach().t().cpu()
    wide = stored.to(torch.promote_types(stored.dtype, torch.float32)).contiguous()
    digest = hashlib.sha256(f"{wide.dtype}{tuple(wide.shape)}".encode())
    digest.update(memoryview(wide.numpy()).cast("B"))
    return digest.hexdigest()


def find_rank(weight: torch.Tensor, threshold: float, site: str = "weight", digest: str | None = None) -> int:
    """
    Rank of a weight for a threshold, by the rank rule, from the cheapest spectrum that decides it.

    Args:
        weight (`torch.Tensor` of shape `(d_in, d_out)`): Any floating-point dtype, on any device.
        threshold (`float`): With 0 < threshold <= 1.
        site (`str`, *optional*): Name for error messages.
        digest (`str`, *optional*): The weight's digest where the caller has it, for the cache.

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
    """The singular values of a weight, in the cheapest way that decides the ranks for `thresholds`; cached."""

    def decided(spectrum: Spectrum) -> Spectrum | None:
        return None if any(spectrum.rank(threshold) is None for threshold in thresholds) else spectrum

    return _climb(weight, site, digest, decided)


def _climb(weight: torch.Tensor, site: str, digest: str | None, use: Callable[[Spectrum], Any]) -> Any:
    """Offer spectra to `use`, from the cheapest to the most accurate, until it returns something."""
    check_weight(weight, site)
    digest = digest or weight_digest(weight)
    spectrum = load_spectrum(digest)
    result = None if spectrum is None else use(spectrum)
    if result is not None:
        return result
    weight = _widened(weight)
    dtypes = (torch.float32, torch.float64) if min(weight.shape) >= FLOAT32_FROM else (torch.float64,)
    for compute in (*(lambda dtype=dtype: _gram_spectrum(weight, dtype) for dtype in dtypes), lambda: _exact(weight)):
        candidate = compute()
        if spectrum is not None and candidate.radius >= spectrum.radius > 0.0:
            continue
        result = use(candidate)
        if result is not None:
            save_spectrum(digest, candidate)
            return result
    raise AssertionError("An exact spectrum decides every rank.")


def _widened(weight: torch.Tensor) -> torch.Tensor:
    """
    The weight on the CPU in at least float32. Weights whose squares float32 could not hold are brought to order 1 by a
    power of two: that changes neither ranks nor singular vectors.
    """
    wide = weight.detach().cpu().to(torch.promote_types(weight.dtype, torch.float32))
    largest = float(torch.stack(wide.aminmax()).abs().max())
    if 1e-10 < largest < 1e10:
        return wide
    return wide.double() / 2.0 ** math.floor(math.log2(largest))


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


def _radius(dtype: torch.dtype, shape: tuple[int, int], largest: float) -> float:
    """
    Bound on the error of an eigenvalue of the Gram matrix. Rounding errors of a product of length m add up like
    sqrt(m) (Higham and Mary, 2019) and those of the reduction to tridiagonal form, the larger part, alike; the factor
    16 is a margin of seven over the worst that is observed (random square float32 weights of 256 to 3072).
    """
    return 16.0 * torch.finfo(dtype).eps * math.sqrt(max(shape)) * largest


def _gram_spectrum(weight: torch.Tensor, dtype: torch.dtype) -> Spectrum:
    eigenvalues = torch.linalg.eigvalsh(_gram(weight.to(dtype))).double().flip(0).clamp_min(0.0)
    return Spectrum(eigenvalues.sqrt(), _radius(dtype, weight.shape, float(eigenvalues[0])))


def _exact(weight: torch.Tensor) -> Spectrum:
    return Spectrum(torch.linalg.svdvals(weight.double()))


def find_factors(
    weight: torch.Tensor,
    threshold: float | None = None,
    k: int | None = None,
    clusters: Sequence[tuple[int, int]] | None = None,
    site: str = "weight",
    digest: str | None = None,
) -> Factors:
    """
    The leading singular vectors of a weight, in canonical form, computed in float64.

    Args:
        weight (`torch.Tensor` of shape `(d_in, d_out)`): Any floating-point dtype, on any device.
        threshold (`float`, *optional*): Gives the number of vectors by the rank rule.
        k (`int`, *optional*): Gives it outright.
        clusters (`Sequence[tuple[int, int]]`, *optional*): Clusters found when the adapter was made. Left out, they
            are found here.
        site (`str`, *optional*): Name for error messages.
        digest (`str`, *optional*): The weight's digest where the caller has it, for the cache.

    Returns:
        [`Factors`]: In float32, or in float64 for a float64 weight.

    Raises:
        `ValueError`: For a weight that is empty, zero or not finite, or a threshold out of range.
    """
    check_weight(weight, site)
    digest = digest or weight_digest(weight)
    if k is None:
        check_threshold(threshold, site)
        spectrum = load_spectrum(digest)
        k = None if spectrum is None else spectrum.rank(threshold)
    factors = None if k is None else load_factors(digest, k)
    if factors is not None and (clusters is None or list(clusters) == factors.clusters):
        return factors
    factors = _factorise(weight, threshold, k, clusters, digest)
    save_factors(digest, factors)
    return factors


def _factorise(
    weight: torch.Tensor,
    threshold: float | None,
    k: int | None,
    clusters: Sequence[tuple[int, int]] | None,
    digest: str,
) -> Factors:
    dtype = torch.promote_types(weight.dtype, torch.float32)
    wide = _widened(weight)
    transposed = wide.shape[0] < wide.shape[1]
    tall = wide.t() if transposed else wide

    def choose(squares: np.ndarray) -> int:
        """How many vectors to compute: k, and on to the end of the cluster that k stands in."""
        nonlocal k, clusters
        eigenvalues = torch.from_numpy(squares).clamp_min(0.0)
        spectrum = Spectrum(eigenvalues.sqrt(), _radius(torch.float64, wide.shape, float(eigenvalues[0])))
        if k is None:
            k = spectrum.rank(threshold)
            if k is None:
                spectrum = _exact(tall)
                k = spectrum.count(threshold)
            save_spectrum(digest, spectrum)
        if clusters is None:
            clusters = _find_clusters(eigenvalues, k)
        return max([k, *(stop for _, stop in clusters)])

    left, right = (side[:k].to(dtype) for side in _canonical(*top_vectors(tall.double(), choose), clusters))
    U, Vh = (right.t(), left) if transposed else (left.t(), right)
    return Factors(U.contiguous(), Vh.contiguous(), [tuple(cluster) for cluster in clusters])


def top_vectors(tall: torch.Tensor, choose: Callable[[np.ndarray], int]) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Leading singular vectors of a matrix with at least as many rows as columns.

    Args:
        tall (`torch.Tensor` of shape `(m, n)`): float64, m >= n.
        choose (`Callable`): Gets the n squared singular values in descending order, returns how many vectors.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: left vectors (count, m) and right vectors (count, n), as rows.
    """
    matrix = tall.numpy()
    # numpy computes a matrix times its own transpose in half the work.
    squares, vectors = leading_eigenpairs(np.ascontiguousarray(matrix.T @ matrix), choose)
    count = vectors.shape[0]
    if squares[count - 1] < GRAM_FLOOR * squares[0]:
        left, _, right = torch.linalg.svd(tall, full_matrices=False)
        return left[:, :count].t(), right[:count]
    # In float64, since dividing by a small singular value multiplies the product's error.
    right = torch.from_numpy(vectors)
    return (right @ tall.t()) / torch.from_numpy(np.sqrt(squares[:count]))[:, None], right


def _find_clusters(eigenvalues: torch.Tensor, k: int) -> list[tuple[int, int]]:
    """Ranges of at least two leading eigenvalues with gaps below CLUSTER_GAP, as far as they touch the first k."""
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
    """A fixed matrix of +-1, float64 of shape (rows, columns): bits of an integer hash, the same on every machine."""
    index = torch.arange(rows * columns, dtype=torch.int64) + (salt << 40)
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        # splitmix64's finalizer in wrapping int64 arithmetic; the mask makes the right shift a logical one.
        index = (index ^ ((index >> shift) & ((1 << (64 - shift)) - 1))) * factor
    bits = (index >> 62) & 1
    return (1 - 2 * bits).to(torch.float64).view(rows, columns)


def canonical_rotation(block: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """
    The rotation that brings a basis of a subspace to its canonical form: block^T columns becomes symmetric and
    positive. For one vector that is its sign. It depends on the subspace alone, not on the basis it came with.

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
    """Pairs of singular vectors, as rows, in canonical form: by sign, and per cluster by one rotation of both."""
    signs = torch.where(right @ probe(right.shape[1], 1) < 0, -1.0, 1.0)
    left, right = left * signs, right * signs
    for start, stop in clusters:
        rotation = canonical_rotation(right[start:stop].t(), probe(right.shape[1], stop - start, salt=1)).t()
        left[start:stop], right[start:stop] = rotation @ left[start:stop], rotation @ right[start:stop]
    return left, right


SKETCH_SIZE = 4


def sketch(factors: Factors) -> torch.Tensor:
    """
    A summary of factors that changes with every sign flip, rotation or swap: 4 numbers for U and 4 for Vh, each a
    projection of the whole matrix by fixed vectors of +-1 on both sides.

    Returns:
        `torch.Tensor` of shape `(8,)`, float32: Of the order sqrt(k).
    """
    U, Vh = factors.U.double(), factors.Vh.double()
    rows = probe(factors.k, SKETCH_SIZE, salt=2)
    left = ((probe(U.shape[0], SKETCH_SIZE, salt=3).t() @ U) * rows.t()).sum(1)
    right = ((Vh @ probe(Vh.shape[1], SKETCH_SIZE, salt=4)) * rows).sum(0)
    return torch.cat([left, right]).float()


def sketches_agree(one: torch.Tensor, other: torch.Tensor, k: int) -> bool:
    """Whether two sketches belong to the same factors. One vector off by an angle of 1e-3 is told apart."""
    return bool(((one - other).abs() <= 1e-5 * max(1.0, math.sqrt(k))).all())


def for_each(work: Callable[[Item], Result], items: Sequence[Item], title: str) -> list[Result]:
    """
    Run independent factorisations side by side, one thread each, with a progress bar. A factorisation gains little
    from a second thread, two of them gain nearly twice.

    Args:
        work (`Callable`): Called with each item; an error ends the run.
        items (`Sequence`): The items.
        title (`str`): What the progress bar says.

    Returns:
        `list`: The results, in the order of the items.
    """
    threads = torch.get_num_threads()
    workers = max(1, min(threads, len(items)))
    per_worker = max(1, threads // workers)

    def start() -> None:
        # OpenMP's thread count belongs to each thread, so every worker sets its own.
        torch.set_num_threads(per_worker)

    try:
        with threadpool_limits(per_worker, user_api="blas"), ThreadPoolExecutor(workers, initializer=start) as pool:
            return list(_progress(pool.map(work, items), title, len(items)))
    finally:
        torch.set_num_threads(threads)


def _progress(results: Iterable[Result], title: str, total: int) -> Iterable[Result]:
    return tqdm(results, desc=title, total=total, unit="matrix", delay=1.0)


# The cache: one small file per spectrum, one per set of factors, named by the digest of the weight they belong to. It
# is an optimisation only: what cannot be read or written is computed again.


def cache_folder() -> Path:
    """Where spectra and factors are kept: `$HF_SARA_CACHE`, else `hf_sara` in Hugging Face's own cache folder."""
    return Path(os.environ.get("HF_SARA_CACHE") or Path(HF_HOME) / "hf_sara").expanduser()


def load_spectrum(digest: str) -> Spectrum | None:
    """A spectrum from the cache, or `None`."""
    found = _read(f"{digest}.spectrum")
    return None if found is None else Spectrum(found[0]["values"], float(found[1]["radius"]))


def save_spectrum(digest: str, spectrum: Spectrum) -> None:
    """Keep a spectrum in the cache."""
    _write(f"{digest}.spectrum", {"values": spectrum.values.contiguous()}, {"radius": repr(spectrum.radius)})


def load_factors(digest: str, k: int) -> Factors | None:
    """Factors from the cache, or `None`."""
    found = _read(f"{digest}.k{k}")
    if found is None:
        return None
    ends = [int(number) for number in found[1]["clusters"].split()]
    return Factors(found[0]["U"], found[0]["Vh"], list(zip(ends[::2], ends[1::2], strict=True)))


def save_factors(digest: str, factors: Factors) -> None:
    """Keep factors in the cache."""
    ends = " ".join(str(end) for cluster in factors.clusters for end in cluster)
    _write(f"{digest}.k{factors.k}", {"U": factors.U, "Vh": factors.Vh}, {"clusters": ends})


def _cache_path(name: str) -> Path:
    return cache_folder() / f"v{CACHE_VERSION}" / name[:2] / f"{name}.safetensors"


def _read(name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
    path = _cache_path(name)
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in list(file.keys())}, file.metadata()
    except (OSError, SafetensorError) as error:
        logger.warning("The cached file %s cannot be read (%s); it is computed again.", path, error)
        return None


def _write(name: str, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    path = _cache_path(name)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        os.close(handle)
        save_file(tensors, temporary, metadata=metadata)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        logger.warning("Could not keep %s in the cache (%s). Set HF_SARA_CACHE to a writable folder.", path, error)
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
