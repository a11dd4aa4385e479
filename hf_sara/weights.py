"""The weights of a model's sites, one at a time, and the work on them, which processes can share."""

import pickle
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from transformers.utils.logging import tqdm

from .devices import check_device, place_for, sent
from .parallel import for_each
from .sites import AnySite, Site
from .spread import works_together

Result = TypeVar("Result")


class Weights:
    """
    The weights of a model's sites.

    Args:
        read (`Callable`): Returns the weight W of a site, of shape (d_in, d_out).
        together (`bool`, *optional*, defaults to `False`):
            Whether no process holds the weights whole, so that all processes have to read each of them together.
        device (`torch.device` or `str`, *optional*): Where to work on them, see [`~hf_sara.devices.place_for`].
    """

    def __init__(
        self,
        read: Callable[[Site], torch.Tensor],
        together: bool = False,
        device: torch.device | str | None = None,
    ):
        check_device(device)
        self._read = read
        self.together = together
        self.device = device

    @classmethod
    def of(cls, model: nn.Module, device: torch.device | str | None = None) -> "Weights":
        """The weights of a model in memory."""
        return cls(lambda site: site.weight(model), works_together(model), device)

    def _placed(self, weight: torch.Tensor) -> torch.Tensor:
        return sent(weight, place_for(weight, self.device))

    def for_each(
        self, work: Callable[[AnySite, torch.Tensor], Result], sites: Sequence[AnySite], title: str
    ) -> list[Result]:
        """
        Call a function with each site and its weight, several sites side by side. If the weights are spread over
        processes, each process does a part of the work, and all of them get all results. A process then holds one
        weight that it works on, and one that it passes on.

        Args:
            work (`Callable`): The function. An error in it ends the work, in every process.
            sites (`Sequence[Site]`): The sites.
            title (`str`): Text of the progress bar.

        Returns:
            `list`: The results, in the order of the sites.
        """
        if not self.together:
            # Beside a matrix that a GPU works on, the next one is made ready.
            to_gpu = self.device is None or torch.device(self.device).type == "cuda"
            workers = 2 if torch.cuda.is_available() and to_gpu else None
            return for_each(lambda site: work(site, self._placed(self._read(site))), sites, title, workers)
        found: list[Result] = []
        rank, size = dist.get_rank(), dist.get_world_size()
        with tqdm(desc=title, total=len(sites), unit="matrix", delay=1.0, disable=rank > 0) as bar:
            for start in range(0, len(sites), size):
                shared = sites[start : start + size]
                own = None
                for index, site in enumerate(shared):
                    weight = self._read(site)
                    own = weight if index == rank else own
                    del weight
                found += _exchange(work, shared, None if own is None else self._placed(own))
                bar.update(len(shared))
        return found


def _exchange(
    work: Callable[[AnySite, torch.Tensor], Result], sites: Sequence[AnySite], own: torch.Tensor | None
) -> list[Result]:
    """The results of the work on sites, one in each process, or the first error in it."""
    rank = dist.get_rank()
    outcome: tuple[bool, Any] = (True, None)
    if own is not None:
        try:
            outcome = (True, work(sites[rank], own))
        except Exception as error:
            # The other processes have to learn of it, or they would wait for this one.
            outcome = (False, error)
    found = []
    for source in range(len(sites)):
        box = [_sendable(*outcome) if rank == source else None]
        dist.broadcast_object_list(box, src=source)
        found.append(cast(tuple[bool, Any], outcome if rank == source else box[0]))
    failed = next((error for done, error in found if not done), None)
    if failed is not None:
        raise failed
    return [result for _, result in found]


def _sendable(done: bool, result: Any) -> tuple[bool, Any]:
    """An outcome that can be pickled. Some errors cannot."""
    if not done:
        try:
            pickle.loads(pickle.dumps(result))
        except Exception:
            return False, RuntimeError(f"{type(result).__name__}: {result}")
    return done, result
