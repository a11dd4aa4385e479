"""Independent factorisations side by side."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits
from transformers.utils.logging import tqdm

Item = TypeVar("Item")
Result = TypeVar("Result")


def for_each(
    work: Callable[[Item], Result], items: Sequence[Item], title: str, workers: int | None = None
) -> list[Result]:
    """
    Run independent factorisations side by side, one thread each, with a progress bar. A second thread makes a single
    factorisation hardly faster, but two factorisations side by side take little longer than one.

    Args:
        work (`Callable`): The function to call with each item. An error in it ends the run.
        items (`Sequence`): The items.
        title (`str`): Text of the progress bar.
        workers (`int`, *optional*): How many run side by side. Defaults to the number of threads.

    Returns:
        `list`: The results, in the order of the items.
    """
    threads = torch.get_num_threads()
    workers = max(1, min(workers or threads, len(items)))
    per_worker = max(1, threads // workers)

    def start() -> None:
        # OpenMP's thread count belongs to each thread, so every worker sets its own.
        torch.set_num_threads(per_worker)

    try:
        with threadpool_limits(per_worker, user_api="blas"), ThreadPoolExecutor(workers, initializer=start) as pool:
            results = pool.map(work, items)
            return list(tqdm(results, desc=title, total=len(items), unit="matrix", delay=1.0))
    finally:
        torch.set_num_threads(threads)
