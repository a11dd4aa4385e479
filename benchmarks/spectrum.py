"""Time of ranks and of frozen factors for four 4096 x 4096 matrices, beside `torch.linalg.svd` on the same matrices.

All contenders run in one process and take turns, in random order; the table has medians. Ranks and factors are checked
against the SVD: k has to be the same, and the factors have to agree within 1e-6 up to sign.

    python benchmarks/spectrum.py [--size 4096] [--matrices 4] [--rounds 3]
"""

import argparse
import os
import tempfile

import torch
from _common import interleave, keep_memory, table

from hf_sara.factors import find_factors
from hf_sara.parallel import for_each
from hf_sara.spectrum import find_rank, rank_for_threshold

SARA, MO_SARA = 0.012, 0.5


def make_matrix(size: int, seed: int) -> torch.Tensor:
    """Random bf16 weights with a decaying spectrum, as pretrained projections have: noise plus a low-rank part."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(size, size, generator=generator) / size**0.5
    rank = size // 32
    left, right = (torch.randn(size, rank, generator=generator) / size**0.5 for _ in range(2))
    strong = left * torch.linspace(8.0, 0.5, rank)
    return (0.02 * (noise + strong @ right.t())).to(torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--matrices", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    keep_memory()
    matrices = [make_matrix(options.size, seed) for seed in range(options.matrices)]
    results: dict[str, list] = {}

    def svd() -> None:
        results["svd"] = [torch.linalg.svd(matrix.float(), full_matrices=False) for matrix in matrices]

    def ranks() -> None:
        results["ranks"] = for_each(lambda matrix: find_rank(matrix, SARA), matrices, "ranks")

    def factors() -> None:
        results["factors"] = for_each(lambda matrix: find_factors(matrix, threshold=MO_SARA), matrices, "factors")

    def without_cache(work):
        def run() -> None:
            with tempfile.TemporaryDirectory() as folder:
                os.environ["HF_SARA_CACHE"] = folder
                work()

        return run

    with tempfile.TemporaryDirectory() as folder:

        def from_cache(work):
            def run() -> None:
                os.environ["HF_SARA_CACHE"] = folder
                work()

            return run

        from_cache(ranks)()
        from_cache(factors)()
        contenders = {
            "torch.linalg.svd": svd,
            f"ranks at {SARA}": without_cache(ranks),
            f"factors at {MO_SARA}": without_cache(factors),
            "ranks from cache": from_cache(ranks),
            "factors from cache": from_cache(factors),
        }
        seconds = interleave(contenders, options.rounds, warmup=0)
    print(f"{options.matrices} matrices of {options.size} x {options.size}, {torch.get_num_threads()} threads")
    print(table(seconds, "torch.linalg.svd"))

    expected = [rank_for_threshold(values, SARA) for _, values, _ in results["svd"]]
    print(f"ranks: {results['ranks']}, by the SVD: {expected}")
    assert results["ranks"] == expected
    # The factors are compared with a float64 SVD, because that in float32 is less accurate than they are.
    exact = torch.linalg.svd(matrices[0].double(), full_matrices=False)
    found, k = results["factors"][0], results["factors"][0].k
    assert k == rank_for_threshold(exact[1], MO_SARA)
    U, Vh = exact[0][:, :k], exact[2][:k]
    signs = (U * found.U).sum(0).sign()
    error = max(float((U * signs - found.U).abs().max()), float((Vh * signs[:, None] - found.Vh).abs().max()))
    print(f"factors of the first matrix: k {k}, largest difference to float64's {error:.2e}")
    assert error <= 1e-6


if __name__ == "__main__":
    main()
