"""What the benchmarks share: a quiet allocator, interleaved runs, and medians of paired ratios."""

import ctypes
import random
import statistics
import sys
import time
from collections.abc import Callable


def keep_memory() -> None:
    """
    Tell glibc to keep freed memory. By default large tensors are mapped anew, or the heap is trimmed behind them, and
    their pages are cleared at first touch, which costs more than an adapter and falls on whoever comes after a larger
    model.
    """
    if sys.platform == "linux":
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_threshold = -1, -3
        # 32 MB is the largest threshold that glibc takes.
        assert mallopt(mmap_threshold, 2**25) == 1
        assert mallopt(trim_threshold, 2**31 - 1) == 1


def interleave(contenders: dict[str, Callable[[], None]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Run every contender once per round, in random order; seconds per contender and round."""
    seconds = {name: [] for name in contenders}
    for round_index in range(warmup + rounds):
        for name in random.sample(list(contenders), len(contenders)):
            start = time.perf_counter()
            contenders[name]()
            if round_index >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def table(
    seconds: dict[str, list[float]], reference: str, extra: dict[str, str] | None = None, cycle: int | None = None
) -> str:
    """
    A Markdown table: median seconds, and the median of the ratios to the reference within each round.

    Args:
        seconds (`dict[str, list[float]]`): What [`interleave`] returned.
        reference (`str`): The contender to compare with.
        extra (`dict[str, str]`, *optional*): A remark per contender.
        cycle (`int`, *optional*): Rounds after which the same work comes again. Then one more column compares the
            quickest times that each piece of work took, since a neighbour on the machine only ever adds time. It takes
            many visits to each.
    """
    heads = ["contender", "median s", f"ratio to {reference} (median of rounds)", "middle half"]
    if cycle:
        quickest = {name: sum(min(times[start::cycle]) for start in range(cycle)) for name, times in seconds.items()}
        heads.append("ratio of the quickest")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, times in seconds.items():
        ratios = sorted(a / b for a, b in zip(times, seconds[reference], strict=True))
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        label = name + (f" ({extra[name]})" if extra and name in extra else "")
        cells = [
            label,
            f"{statistics.median(times):.4f}",
            f"{statistics.median(ratios):.4f}",
            f"{low:.3f} to {high:.3f}",
        ]
        if cycle:
            cells.append(f"{quickest[name] / quickest[reference]:.4f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
