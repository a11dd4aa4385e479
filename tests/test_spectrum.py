import logging
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import rotated_lapack
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_sara import cache, factors, spectrum
from hf_sara.factors import (
    Factors,
    are_leading_vectors,
    canonical_rotation,
    find_factors,
    probe,
    sketch,
    sketches_agree,
)
from hf_sara.parallel import for_each
from hf_sara.spectrum import Spectrum, find_rank, find_spectrum, rank_for_threshold, weight_digest
from hf_sara.tensor_files import tensors_digest


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_SARA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0]


def with_values(d_in: int, d_out: int, values, seed: int = 0) -> torch.Tensor:
    """A float64 weight with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.as_tensor(values, dtype=torch.float64)
    left, right = (orthonormal(size, len(values), generator) for size in (d_in, d_out))
    return (left * values) @ right.t()


def reference_rank(weight: torch.Tensor, threshold: float) -> int:
    """Algorithm 1 as it reads, in numpy: full float64 decomposition, running sums, equal up to 1e-12."""
    return reference_count(np.linalg.svd(weight.double().numpy())[1], threshold)


def reference_count(values: np.ndarray, threshold: float) -> int:
    running = 0.0
    for k, value in enumerate(values, start=1):
        running += value
        if running >= threshold * values.sum() * (1 - 1e-12):
            return k
    return len(values)


def random_weight(number: int) -> torch.Tensor:
    """200 weights: square, wide, tall; of full rank, of low rank, with repeated and with fast-decaying values."""
    generator = torch.Generator().manual_seed(number)
    d_in, d_out = (int(torch.randint(2, 40, (), generator=generator)) for _ in range(2))
    d_out = d_in if number % 3 == 0 else d_out
    n = min(d_in, d_out)
    kind = number % 4
    if kind == 0:
        return torch.randn(d_in, d_out, generator=generator)
    if kind == 1:
        return with_values(d_in, d_out, torch.rand(max(1, n // 2), generator=generator), number)
    if kind == 2:
        return with_values(d_in, d_out, torch.randint(1, 4, (n,), generator=generator), number)
    return with_values(d_in, d_out, torch.logspace(0, -6, n), number)


THRESHOLDS = (1e-4, 0.01, 0.1, 1 / 3, 0.5, 0.77, 0.99, 0.999999)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("float32_from", [10**6, 2])
def test_the_ranks_are_those_of_the_reference(monkeypatch, float32_from):
    # The second run goes through the float32 rung for every weight: the ranks have to stay the same.
    monkeypatch.setattr(spectrum, "FLOAT32_FROM", float32_from)
    for number in range(200):
        weight = random_weight(number)
        values = np.linalg.svd(weight.double().numpy())[1]
        for threshold in THRESHOLDS:
            expected = reference_count(values, threshold)
            assert rank_for_threshold(values, threshold) == expected, (number, threshold)
            assert find_rank(weight, threshold) == expected, (number, threshold)


def test_threshold_one_takes_the_values_that_count():
    assert find_rank(with_values(12, 9, [3, 2, 1]), 1.0) == 3
    assert find_rank(torch.randn(12, 9, generator=torch.Generator().manual_seed(0)), 1.0) == 9


def test_a_rank_on_the_very_step_is_that_of_the_smaller_k():
    # A tie: the first two of four equal values are exactly half of the sum.
    assert rank_for_threshold([1.0, 1.0, 1.0, 1.0], 0.5) == 2
    assert find_rank(torch.eye(4), 0.5) == 2
    assert rank_for_threshold([0.1] * 10, 0.3) == 3  # 0.1 + 0.1 + 0.1 > 0.3 > 0.1 * 3 in binary
    assert rank_for_threshold([1.0, 4.0, 2.0], 0.5) == 1  # any order
    assert rank_for_threshold(torch.ones(10**5, dtype=torch.bfloat16), 0.5) == 50000  # sums in float64


@pytest.mark.parametrize(
    ("values", "message"),
    [([], "empty"), ([0.0, 0.0], "zero"), ([1.0, -1.0], "not negative"), ([float("nan")], "finite")],
)
def test_singular_values_without_a_rank_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        rank_for_threshold(values, 0.5)


def test_the_certificate_refuses_what_float32_cannot_decide(monkeypatch):
    monkeypatch.setattr(spectrum, "FLOAT32_FROM", 2)
    computed = []
    compute = spectrum._gram_spectrum
    monkeypatch.setattr(
        spectrum, "_gram_spectrum", lambda weight, dtype: computed.append(dtype) or compute(weight, dtype)
    )
    # The threshold is 1e-7 beyond a step: closer than float32 knows the sums.
    weight = with_values(48, 40, torch.linspace(2, 1, 40))
    values = np.linalg.svd(weight.numpy())[1]
    step = values[:10].sum() / values.sum()
    assert find_rank(weight, step * (1 + 1e-7)) == 11
    assert computed == [torch.float32, torch.float64]
    # Between two steps float32 is enough, and on a step that float64 cannot tell either the singular values decide.
    computed.clear()
    other = with_values(48, 40, torch.linspace(2, 1, 40), seed=1)
    assert find_rank(other, step + 0.01) == 11
    assert computed == [torch.float32]
    computed.clear()
    assert find_rank(weight, step) == reference_count(values, step)
    assert float32_is_wrong(weight, values)


def float32_is_wrong(weight: torch.Tensor, values: np.ndarray) -> bool:
    """Taken as it is, the float32 spectrum gives wrong ranks at some of these steps: the certificate is needed."""
    found = spectrum._gram_spectrum(weight, torch.float32)
    steps = (values.cumsum() / values.sum())[:-1]
    edges = [float(step) * (1 + side) for step in steps for side in (-1e-9, 1e-9)]
    wrong = [edge for edge in edges if found.count(edge) != reference_count(values, edge)]
    # ... and each wrong one is refused.
    assert all(found.rank(edge) is None for edge in wrong)
    return bool(wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["random", "all positive", "low rank", "clustered", "decaying", "one large"])
def test_the_error_radius_bounds_the_error_with_a_margin(dtype, kind):
    generator = torch.Generator().manual_seed(0)
    for d_in, d_out in ((200, 200), (64, 300), (300, 30)):
        n = min(d_in, d_out)
        weight = {
            "random": lambda d_in=d_in, d_out=d_out: torch.randn(d_in, d_out, generator=generator).double(),
            "all positive": lambda d_in=d_in, d_out=d_out: torch.rand(d_in, d_out, generator=generator).double(),
            "low rank": lambda d_in=d_in, d_out=d_out, n=n: with_values(d_in, d_out, torch.rand(n // 8) + 1),
            "clustered": lambda d_in=d_in, d_out=d_out, n=n: with_values(d_in, d_out, torch.arange(n) // 7 + 1),
            "decaying": lambda d_in=d_in, d_out=d_out, n=n: with_values(d_in, d_out, torch.logspace(0, -9, n)),
            "one large": lambda d_in=d_in, d_out=d_out, n=n: with_values(d_in, d_out, [1000.0] + [1.0] * (n - 1)),
        }[kind]()
        # The reference has to be of the same bits: rounding a weight to float32 moves its singular values.
        weight = weight.to(dtype)
        exact = torch.linalg.svdvals(weight.double()).square()
        found = spectrum._gram_spectrum(weight, dtype)
        error = float((found.values.square() - exact).abs().max())
        assert error * 5 < found.radius
        # It is a bound, not a blank cheque.
        assert found.radius < 500 * torch.finfo(dtype).eps * float(exact[0])


def test_ranks_do_not_depend_on_the_scale_of_a_weight():
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    expected = reference_rank(weight, 0.4)
    for scale in (2.0**-83, 2.0**83, 2.0**-130):  # about 1e-25, 1e25, and beyond float32's normal numbers squared
        assert find_rank((weight.double() * scale).to(torch.float64), 0.4) == expected
    assert find_rank(weight * 1e-25, 0.4) == expected
    assert find_rank(weight * 1e25, 0.4) == expected
    factors = find_factors(weight * 2.0**83, threshold=0.4)
    assert torch.allclose(factors.U, find_factors(weight, threshold=0.4).U, atol=1e-6)
    assert torch.isfinite(factors.Vh).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_taken_bit_by_bit(dtype):
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)).to(dtype)
    for threshold in THRESHOLDS:
        assert find_rank(weight, threshold) == reference_rank(weight.float(), threshold)
    assert torch.equal(find_factors(weight, k=5).U, find_factors(weight.float(), k=5).U)
    assert spectrum.weight_digest(weight) == spectrum.weight_digest(weight.float())
    assert spectrum.weight_digest(weight) != spectrum.weight_digest(weight.double())


@pytest.mark.parametrize("find", [find_rank, find_factors])
@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.tensor([[1.0, float("nan")]]), "1 values that are NaN or infinite"),
        (torch.tensor([[1.0, float("-inf")], [float("inf"), 0.0]]), "2 values that are NaN or infinite"),
        (torch.zeros(3, 4), "all zero"),
        (torch.zeros(0, 4), "empty"),
        (torch.zeros(4), "not a matrix"),
    ],
)
def test_a_weight_without_a_rank_is_an_error_that_names_the_site(find, weight, message):
    with pytest.raises(ValueError, match=f"layers.7.q_proj: .*{message}"):
        find(weight, threshold=0.5, site="layers.7.q_proj")


@pytest.mark.parametrize("find", [find_rank, find_factors])
@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.1, float("nan"), float("inf"), "0.5"])
def test_a_threshold_out_of_range_is_an_error_that_names_the_site(find, threshold):
    with pytest.raises(ValueError, match=r"layers\.7\.q_proj: threshold"):
        find(torch.eye(3), threshold=threshold, site="layers.7.q_proj")


# ---- factors ----


def assert_orthonormal(factors: Factors, tolerance: float = 1e-6) -> None:
    eye = torch.eye(factors.k, dtype=torch.float64)
    assert torch.allclose(factors.U.double().t() @ factors.U.double(), eye, atol=tolerance)
    assert torch.allclose(factors.Vh.double() @ factors.Vh.double().t(), eye, atol=tolerance)


@pytest.mark.parametrize("shape", [(40, 40), (60, 25), (25, 60), (1, 7), (7, 1), (2, 2)])
@pytest.mark.parametrize("decay", [1.0, 1e-3])
def test_factors_are_the_leading_singular_vectors(shape, decay):
    n = min(shape)
    values = torch.logspace(0, float(np.log10(decay)), n) * torch.linspace(2, 1, n)
    weight = with_values(*shape, values).float()
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    for k in {1, max(1, n // 2), n}:
        found = find_factors(weight, k=k)
        assert found.U.dtype == torch.float32
        assert (found.U.shape, found.Vh.shape) == ((shape[0], k), (k, shape[1]))
        signs = (found.Vh.double() * Vh[:k]).sum(1).sign()
        # One sign flips both vectors of a pair.
        assert torch.allclose(found.U.double(), U[:, :k] * signs, atol=1e-6)
        assert torch.allclose(found.Vh.double(), Vh[:k] * signs[:, None], atol=1e-6)
        assert torch.allclose((found.U.double() * S[:k]) @ found.Vh.double(), (U[:, :k] * S[:k]) @ Vh[:k], atol=1e-5)
        assert_orthonormal(found)
        # The sign is a convention, not LAPACK's choice: the shorter side's projection on the probe is positive.
        shorter = found.Vh if shape[0] >= shape[1] else found.U.t()
        assert (shorter.double() @ probe(n, 1) > 0).all()


def test_factors_by_threshold_have_the_rank_of_the_rule():
    for number in range(0, 60, 3):
        weight = random_weight(number)
        assert find_factors(weight, threshold=0.6).k == find_rank(weight, 0.6)


def test_factors_of_a_float64_weight_are_float64():
    weight = with_values(30, 20, torch.linspace(2, 1, 20))
    found = find_factors(weight, k=6)
    assert found.U.dtype == torch.float64
    assert_orthonormal(found, 1e-13)


@pytest.mark.parametrize("shape", [(50, 30), (30, 50)])
@pytest.mark.parametrize("values", ["decaying", "low rank", "low rank in float32"])
def test_factors_stay_orthonormal_where_the_gram_matrix_cannot_give_them(shape, values, monkeypatch):
    weight = {
        "decaying": with_values(*shape, torch.logspace(0, -9, 30)),
        "low rank": with_values(*shape, torch.linspace(2, 1, 7)),
        "low rank in float32": with_values(*shape, torch.linspace(2, 1, 7)).float(),
    }[values]
    decompositions = []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: decompositions.append(a[0].shape) or svd(*a, **k))
    found = find_factors(weight, k=30)
    assert (50, 30) in decompositions
    assert_orthonormal(found)
    # What stands clear of the tail is still each its own vector.
    _, _, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    assert torch.allclose((found.Vh[:7].double() * Vh[:7]).sum(1).abs(), torch.ones(7, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (30, 30)])
@pytest.mark.parametrize("k", [9, 6, 5, 4])  # after, at the end of, and inside of the cluster of 3 to 6
def test_a_cluster_has_one_canonical_basis_whichever_lapack_returns(shape, k, monkeypatch):
    values = [9.0, 8.0, 7.0, 5.0, 5.0, 5.0, 3.0, 3.0, *torch.linspace(2, 1, 12).tolist()]
    weight = with_values(*shape, values)
    found = find_factors(weight, k=k)
    assert found.clusters == [(3, 6), (6, 8)][: 2 if k > 6 else 1]
    assert_orthonormal(found, 1e-12)
    for seed in range(5):
        monkeypatch.setenv("HF_SARA_CACHE", str(cache.cache_folder() / "other"))
        monkeypatch.setattr(factors, "leading_eigenpairs", rotated_lapack([(3, 6), (6, 8)], seed))
        again = find_factors(weight, k=k)
        monkeypatch.undo()
        # Factors of the same bits would mean that the freedom was not used.
        assert not torch.equal(again.U, found.U)
        assert torch.allclose(again.U, found.U, atol=1e-12)
        assert torch.allclose(again.Vh, found.Vh, atol=1e-12)
        assert sketches_agree(sketch(again), sketch(found), k)


def test_the_canonical_rotation_depends_on_the_subspace_alone():
    generator = torch.Generator().manual_seed(0)
    block, rotation = orthonormal(20, 4, generator), orthonormal(4, 4, generator)
    columns = probe(20, 4)
    one = block @ canonical_rotation(block, columns)
    other = (block @ rotation) @ canonical_rotation(block @ rotation, columns)
    assert torch.allclose(one, other, atol=1e-12)
    projected = one.t() @ columns
    assert torch.allclose(projected, projected.t(), atol=1e-12)
    assert (torch.linalg.eigvalsh(projected) > 0).all()


def test_the_probe_is_a_fixed_hash():
    # Literal values: adapters in the world were saved with this very probe.
    assert probe(4, 4).int().tolist() == PROBE
    assert probe(2, 6, salt=3).int().tolist() == PROBE_SALTED
    assert abs(float(probe(100, 100).mean())) < 0.05
    assert set(probe(50, 50).unique().tolist()) == {-1.0, 1.0}


PROBE = [[1, -1, -1, 1], [1, 1, -1, 1], [-1, 1, 1, 1], [1, -1, 1, 1]]
PROBE_SALTED = [[1, 1, -1, -1, -1, -1], [1, -1, 1, 1, -1, -1]]


def test_a_sketch_tells_every_change_apart():
    found = find_factors(with_values(40, 30, torch.linspace(2, 1, 30)).float(), k=12)
    fixed = sketch(found)
    assert fixed.shape == (8,)
    assert fixed.dtype == torch.float32

    def agrees(U, Vh):
        return sketches_agree(sketch(Factors(U, Vh, [])), fixed, 12)

    assert agrees(found.U.clone(), found.Vh.clone())
    for i in range(12):
        sign = torch.ones(12)
        sign[i] = -1
        assert not agrees(found.U * sign, found.Vh * sign[:, None])
        assert not agrees(found.U, found.Vh * sign[:, None])
    swap = torch.tensor([1, 0, *range(2, 12)])
    assert not agrees(found.U[:, swap], found.Vh[swap])
    angle = torch.tensor(1e-3)
    turn = torch.eye(12)
    turn[4:6, 4:6] = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
    assert not agrees(found.U @ turn, turn.t() @ found.Vh)


# ---- the cache ----


def test_what_the_cache_returns_is_what_was_computed(monkeypatch, empty_cache):
    weight = with_values(30, 20, [4.0, 3.0, 3.0, *torch.linspace(2, 1, 10).tolist()]).float()
    fresh, rank = find_factors(weight, threshold=0.4), find_rank(weight, 0.7)
    assert any(empty_cache.rglob("*.safetensors"))
    assert not any(empty_cache.rglob("*.tmp"))
    monkeypatch.setattr(factors, "_factorise", None)
    monkeypatch.setattr(spectrum, "_gram_spectrum", None)
    cached = find_factors(weight, threshold=0.4)
    assert torch.equal(cached.U, fresh.U)
    assert torch.equal(cached.Vh, fresh.Vh)
    assert cached.clusters == fresh.clusters
    assert find_rank(weight, 0.7) == rank
    # Another k is another file.
    with pytest.raises(TypeError):
        find_factors(weight, k=cached.k + 1)


def test_a_cached_spectrum_that_does_not_decide_is_replaced(monkeypatch):
    monkeypatch.setattr(spectrum, "FLOAT32_FROM", 2)
    weight = with_values(48, 40, torch.linspace(2, 1, 40))
    values = np.linalg.svd(weight.numpy())[1]
    coarse = find_spectrum(weight)
    close = float(values[:10].sum() / values.sum()) * (1 + 1e-7)
    assert coarse.rank(close) is None
    assert find_rank(weight, close) == 11
    assert find_spectrum(weight).radius < coarse.radius
    # And the finer one is never given up for a coarser one.
    assert find_rank(weight, 0.5) == reference_count(values, 0.5)
    assert find_spectrum(weight).radius < coarse.radius


@pytest.mark.parametrize("damage", ["truncated", "empty", "noise"])
def test_a_damaged_cache_file_is_computed_again(damage, empty_cache, caplog):
    weight = torch.randn(20, 10, generator=torch.Generator().manual_seed(0))
    fresh = find_factors(weight, threshold=0.5)
    for path in empty_cache.rglob("*.safetensors"):
        content = path.read_bytes()
        path.write_bytes({"truncated": content[:-20], "empty": b"", "noise": b"\xff" * len(content)}[damage])
    with caplog.at_level(logging.WARNING, logger="hf_sara"):
        again = find_factors(weight, threshold=0.5)
    assert "is wrong or cannot be read" in caplog.text
    assert torch.equal(again.U, fresh.U)
    # The damaged file was replaced.
    caplog.clear()
    find_factors(weight, threshold=0.5)
    assert not caplog.records


def poisoned(how, content):
    """What somebody, or a damaged disk, may have left in the place of an entry."""
    tensors = {name: value.clone() for name, value in content.items()}
    first = next(iter(tensors))
    if how == "random":
        tensors = {name: torch.randn_like(value) for name, value in tensors.items()}
    elif how == "permuted":
        tensors = {n: v.flip(1 if n == "U" else 0).contiguous() for n, v in tensors.items()}
    elif how == "signs":
        tensors = {name: -value for name, value in tensors.items()}
    elif how == "not finite":
        tensors[first].view(-1)[0] = float("nan")
    elif how == "another dtype":
        tensors = {name: value.to(torch.float16) for name, value in tensors.items()}
    elif how == "another shape":
        tensors = {name: torch.cat([value, value]) for name, value in tensors.items()}
    else:
        tensors = {"other": torch.zeros(2)}
    return tensors


HOW = ("random", "permuted", "signs", "not finite", "another dtype", "another shape", "other names")


@pytest.mark.parametrize("digest", [True, False])
@pytest.mark.parametrize("how", HOW)
def test_a_poisoned_cache_is_not_believed(how, digest, empty_cache, caplog):
    weight = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    fresh, rank = find_factors(weight, threshold=0.5), find_rank(weight, 0.5)
    entries = {path: load_file(path) for path in empty_cache.rglob("*.safetensors")}
    assert len(entries) == 2
    for path, content in entries.items():
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        changed = poisoned(how, content)
        # With a digest, the entry was made on purpose.
        metadata["digest"] = tensors_digest(changed) if digest else metadata["digest"]
        save_file(changed, path, metadata=metadata)
    with caplog.at_level(logging.WARNING, logger="hf_sara"):
        again = find_factors(weight, threshold=0.5)
    assert "it is computed again" in caplog.text
    assert torch.equal(again.U, fresh.U)
    assert torch.equal(again.Vh, fresh.Vh)
    assert find_rank(weight, 0.5) == rank
    # What was wrong is replaced.
    caplog.clear()
    find_factors(weight, threshold=0.5)
    assert not caplog.records


def test_entries_of_another_matrix_are_not_believed(empty_cache, caplog):
    one, other = (torch.randn(20, 12, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    fresh = {id(weight): find_factors(weight, threshold=0.5) for weight in (one, other)}
    names = {id(weight): weight_digest(weight) for weight in (one, other)}
    for path in list(empty_cache.rglob(f"{names[id(other)]}*")):
        name = names[id(one)]
        target = path.parent.parent / name[:2] / path.name.replace(names[id(other)], name)
        target.write_bytes(path.read_bytes())
    with caplog.at_level(logging.WARNING, logger="hf_sara"):
        again = find_factors(one, threshold=0.5)
    assert "another matrix" in caplog.text
    assert torch.equal(again.U, fresh[id(one)].U)


@pytest.mark.parametrize("shape", [(64, 40), (40, 64), (33, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_was_computed_is_believed(shape, dtype, empty_cache, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_sara"):
        for scale in (1.0, 1e-3, 1e12):
            drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            weight = (scale * drawn).to(dtype)
            for threshold in (0.05, 0.6, 1.0):
                fresh = find_factors(weight, threshold=threshold)
                again = find_factors(weight, threshold=threshold)
                assert torch.equal(again.Vh, fresh.Vh)
    assert not caplog.records


def test_vectors_that_are_not_the_leading_ones_are_not_believed():
    weight = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    whole = find_factors(weight, k=12)
    spectrum = find_spectrum(weight)
    leading, later = (Factors(whole.U[:, part], whole.Vh[part], []) for part in (slice(0, 4), slice(1, 5)))
    assert are_leading_vectors(leading, weight, spectrum)
    assert not are_leading_vectors(later, weight, spectrum)


def test_clusters_that_a_file_pretends_are_not_believed():
    """In a cluster the signs are free, so it has to be one."""
    weight = with_values(30, 20, [4.0, 3.0, 3.0, *torch.linspace(2, 1, 10).tolist()])
    right = find_factors(weight, k=5)
    assert right.clusters == [(1, 3)]
    assert are_leading_vectors(right, weight)
    signs = torch.tensor([-1.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    assert not are_leading_vectors(Factors(right.U * signs, right.Vh * signs[:, None], [(0, 3)]), weight)
    # Another basis of a cluster that is one.
    swapped = [0, 2, 1, 3, 4]
    assert not are_leading_vectors(Factors(right.U[:, swapped], right.Vh[swapped], [(1, 3)]), weight)


def test_only_the_caches_own_files_are_its_files(empty_cache):
    find_factors(torch.randn(20, 12, generator=torch.Generator().manual_seed(0)), threshold=0.5)
    own = set(empty_cache.rglob("*.safetensors"))
    folder = next(iter(own)).parent
    left_over = folder / "hf_sara-abcd1234.tmp"
    left_over.write_bytes(b"")
    for mine in (empty_cache / "model.safetensors", folder / "model.safetensors", empty_cache / "v3" / "x.tmp"):
        mine.write_bytes(b"mine")
    (folder / f"{next(iter(own)).name[:64]}.k1.safetensors").symlink_to(empty_cache / "model.safetensors")
    assert set(cache.cache_files()) == {*own, left_over}


def test_a_cache_that_cannot_be_written_costs_a_warning_only(monkeypatch, tmp_path, caplog):
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    monkeypatch.setenv("HF_SARA_CACHE", str(blocker))
    weight = torch.randn(20, 10, generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.WARNING, logger="hf_sara"):
        assert find_factors(weight, threshold=0.5).k == find_rank(weight, 0.5) == reference_rank(weight, 0.5)
    assert "Set HF_SARA_CACHE to a writable folder" in caplog.text


def test_a_write_that_is_cut_off_leaves_no_file(monkeypatch, empty_cache):
    def refuse(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    find_rank(torch.eye(5), 0.5)
    assert not [path for path in empty_cache.rglob("*") if path.is_file()]


def test_an_entry_that_was_read_is_not_kept_open(empty_cache):
    """A file that is mapped into memory can be neither replaced nor deleted on Windows."""
    weight = torch.randn(20, 10, generator=torch.Generator().manual_seed(0))
    find_factors(weight, threshold=0.5)
    held = find_factors(weight, threshold=0.5)
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("The system does not tell what is mapped.")
    assert str(empty_cache) not in maps.read_text()
    assert held.k > 0


def test_a_file_in_use_stays_when_the_cache_is_cleared(empty_cache, monkeypatch):
    find_rank(torch.eye(5), 0.5)
    (file,) = cache.cache_files()

    def refuse(*_, **__):
        raise PermissionError(13, "it is used by another process")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        assert cache.clear_cache() == [file]
    assert cache.clear_cache() == []
    assert not file.exists()


def test_an_apple_gpu_leaves_float64_to_the_cpu():
    on_gpu = SimpleNamespace(device=torch.device("mps"), cpu=lambda: torch.ones(2))
    assert spectrum.doubled(on_gpu).dtype == torch.float64
    assert spectrum.doubled(torch.ones(2, device="meta")).device.type == "meta"


# ---- side by side ----


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_for_each_keeps_the_order_and_the_number_of_threads(threads):
    seen = []
    results = for_each(lambda item: seen.append(torch.get_num_threads()) or item**2, range(20), "squares")
    assert results == [item**2 for item in range(20)]
    assert set(seen) == {1}
    assert torch.get_num_threads() == threads
    assert for_each(lambda item: item, [], "nothing") == []


def test_for_each_passes_errors_on_and_restores_the_number_of_threads(threads):
    done = []

    def work(item):
        if item == 2:
            raise ValueError("the third one")
        done.append(item)

    with pytest.raises(ValueError, match="the third one"):
        for_each(work, range(10_000), "work")
    assert torch.get_num_threads() == threads
    assert len(done) < 9_999  # it does not go on


def test_a_spectrum_without_error_decides_every_rank():
    values = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    for threshold in (0.1, 0.5, 5 / 6, 1.0):
        assert Spectrum(values).rank(threshold) == Spectrum(values).count(threshold)
    # An error as large as the values decides nothing but what no error could change.
    assert Spectrum(values, radius=9.0).rank(0.5) is None


def test_an_error_of_lapack_is_an_error_here():
    with pytest.raises(np.linalg.LinAlgError, match=r"LAPACK.s dsterf failed"):
        factors.leading_eigenpairs(np.full((4, 4), np.nan), lambda squares: 2)
