"""Where singular values and vectors are computed. Another way to compute stands for another device."""

import logging

import pytest
import torch
from conftest import make_model, sara_arguments

from hf_sara import devices, factors, plan, spectrum
from hf_sara.devices import computed, exact_in_float32, fast_in_float64, place_for, sent
from hf_sara.factors import find_factors
from hf_sara.spectrum import find_rank


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0]


def weight_of(number: int) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """A weight, and its clusters. Every other one has equal singular values, also among those that are wanted last."""
    generator = torch.Generator().manual_seed(number)
    d_in, d_out = (int(size) for size in torch.randint(12, 90, (2,), generator=generator))
    n = min(d_in, d_out)
    values = torch.linspace(3, 1, n, dtype=torch.float64) + 0.2 * torch.rand(n, generator=generator).sort().values
    clusters = [(1, 4), (6, 8), (9, 12)] if number % 2 else []
    for start, stop in clusters:
        values[start:stop] = values[start]
    values = values.sort(descending=True).values
    left, right = orthonormal(d_in, n, generator), orthonormal(d_out, n, generator)
    return (left * values) @ right.t(), clusters


def by_eigh(monkeypatch):
    """What runs on a GPU: the library's eigenvectors of the Gram matrix."""
    monkeypatch.setattr(factors, "_eigenpairs_on_cpu", factors._eigenpairs)


def by_gesvd(monkeypatch):
    def top_vectors(tall, choose):
        left, values, right = torch.linalg.svd(tall, full_matrices=False, driver=None)
        count = choose(values.square().numpy())
        return left[:, :count].t(), right[:count]

    monkeypatch.setattr(factors, "top_vectors", top_vectors)


@pytest.mark.parametrize("route", [by_eigh, by_gesvd])
def test_factors_of_fifty_weights_are_those_of_another_route(route, monkeypatch):
    weights = [weight_of(number) for number in range(50)]
    found = [find_factors(weight, k=10, use_cache=False) for weight, _ in weights]
    route(monkeypatch)
    for (weight, clusters), here in zip(weights, found, strict=True):
        there = find_factors(weight, k=10, use_cache=False)
        assert here.clusters == there.clusters == clusters
        torch.testing.assert_close(there.U, here.U, rtol=0, atol=1e-9)
        torch.testing.assert_close(there.Vh, here.Vh, rtol=0, atol=1e-9)


def test_the_rank_of_the_other_route_is_the_same(monkeypatch):
    weights = [weight_of(number)[0] for number in range(20)]
    found = [find_factors(weight, threshold=0.4, use_cache=False).k for weight in weights]
    by_eigh(monkeypatch)
    assert [find_factors(weight, threshold=0.4, use_cache=False).k for weight in weights] == found


# ---- where ----


@pytest.fixture
def gpu(monkeypatch):
    """torch says that it has a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


def test_large_weights_go_to_a_gpu(gpu):
    assert place_for(torch.zeros(1024, 1024)) == torch.device("cuda", 0)
    assert place_for(torch.zeros(1023, 4096)) == torch.device("cpu")
    assert place_for(torch.zeros(1024, 1024), "cpu") == torch.device("cpu")
    assert place_for(torch.zeros(2, 2, device="meta")) == torch.device("meta")
    assert place_for(torch.zeros(2, 2), "cuda") == torch.device("cuda")


def test_without_a_gpu_all_stays(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert place_for(torch.zeros(2048, 2048)) == torch.device("cpu")


def test_float32_is_tried_where_it_saves_time_and_is_exact(monkeypatch):
    cuda = torch.device("cuda", 0)
    for capability, fast in {(9, 0): True, (8, 0): True, (8, 6): False, (8, 9): False, (12, 0): False}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert fast_in_float64(cuda) == fast
    assert not fast_in_float64(torch.device("cpu"))
    assert exact_in_float32(cuda)
    assert exact_in_float32(torch.device("cpu"))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert not exact_in_float32(cuda)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch has one setting for all.")
def test_settings_of_one_backend_are_respected():
    """After them, torch refuses to say what the setting of all backends is."""
    for backend, device in ((torch.backends.cuda.matmul, "cuda"), (torch.backends.mkldnn.matmul, "cpu")):
        before = backend.fp32_precision
        try:
            backend.fp32_precision = "tf32"
            assert not exact_in_float32(torch.device(device))
        finally:
            backend.fp32_precision = before
        assert exact_in_float32(torch.device(device))


@pytest.mark.parametrize("fast", [True, False])
def test_the_spectra_that_are_tried(fast, monkeypatch):
    tried = []
    gram = spectrum._gram_spectrum
    monkeypatch.setattr(spectrum, "fast_in_float64", lambda device: fast)
    monkeypatch.setattr(spectrum, "FLOAT32_FROM", 16)
    monkeypatch.setattr(spectrum, "_gram_spectrum", lambda w, dtype: tried.append(dtype) or gram(w, dtype))
    find_rank(torch.randn(40, 30, generator=torch.Generator().manual_seed(8)), 0.5)
    assert tried == [torch.float64] if fast else [torch.float32]


class OnGpu:
    """A matrix on a GPU, as far as `computed` looks at it."""

    device, shape = torch.device("cuda", 0), (3, 2)

    def cpu(self):
        return torch.ones(3, 2)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("full\nof it"),
        torch.linalg.LinAlgError("no convergence"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`"),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_the_cpu_takes_over_what_a_gpu_cannot_do(error, caplog):
    def compute(matrix):
        if isinstance(matrix, OnGpu):
            raise error
        return float(matrix.sum())

    with caplog.at_level(logging.WARNING):
        assert computed(compute, OnGpu()) == 6.0
    assert f"The CPU factorises a matrix of shape (3, 2), because cuda:0: {str(error).splitlines()[0]}" in caplog.text
    # The GPU is free for the next one.
    assert not devices._locks[OnGpu.device].locked()


def test_an_error_of_another_kind_is_no_reason_for_the_cpu():
    def compute(matrix):
        raise RuntimeError("a mistake")

    with pytest.raises(RuntimeError, match="a mistake"):
        computed(compute, OnGpu())
    assert not devices._locks[OnGpu.device].locked()


def test_a_weight_that_a_full_gpu_cannot_take_stays(caplog):
    class Weight:
        shape = (3, 2)

        def to(self, device):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    weight = Weight()
    with caplog.at_level(logging.WARNING):
        assert sent(weight, torch.device("cuda", 0)) is weight
    assert "shape (3, 2), because cuda:0: CUDA out of memory" in caplog.text


def test_nothing_is_made_of_a_weight_where_a_full_gpu_would_end_all(monkeypatch, tmp_path):
    """A copy in float32 is a part of what the CPU takes over."""
    monkeypatch.setenv("HF_SARA_CACHE", str(tmp_path))
    seen = []

    def note(compute, weight):
        seen.append(weight.dtype)
        return compute(weight)

    monkeypatch.setattr(spectrum, "computed", note)
    monkeypatch.setattr(factors, "computed", note)
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(8)).bfloat16()
    for _ in range(2):
        # The second time, what the cache has is compared with the weight.
        find_rank(weight, 0.5)
        find_factors(weight, threshold=0.5)
    assert len(seen) >= 5
    assert set(seen) == {torch.bfloat16}


def test_a_gpu_works_on_one_matrix_at_a_time():
    held = []
    computed(lambda matrix: held.append(devices._locks[matrix.device].locked()), OnGpu())
    assert held == [True]


def test_a_device_that_is_not_there_is_refused():
    for device in ("cuda:7", "no device"):
        with pytest.raises(ValueError, match=f"device='{device}' is not one of this machine"):
            plan(make_model(), sara_arguments(), device=device)


def test_the_plan_on_a_named_device_is_the_same():
    assert plan(make_model(), sara_arguments(), device="cpu") == plan(make_model(), sara_arguments())
