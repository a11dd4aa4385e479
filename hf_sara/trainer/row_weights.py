"""How much each row of a batch counts for its adapter, so that it counts as in a training of this adapter alone.

The loss of a batch is a mean over all of its labels, and that of an adapter alone would be a mean over the labels of
its own rows. So the gradient of each row is multiplied by the ratio of the two numbers of labels.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch


class RowWeights:
    """
    The weights of the rows, for a trainer.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer, whose loss is looked at.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        # How many labels each adapter has in the batches of a step, counted as Trainer counts those of all.
        self._counts: dict[str, float] = {}
        # Whether the loss of a batch is divided by that number; `None` until a first batch has shown it.
        self._divided: bool | None = None
        self._are_apart = False

    def count(self, batches: Sequence[tuple[Sequence[str], Mapping[str, Any]]], device: torch.device) -> None:
        """Count the labels of each adapter in the batches of a step, each with the names of its rows."""
        names = list(dict.fromkeys(name for rows, _ in batches for name in rows))
        counts: list[Any] = []
        for name in names:
            own = [
                _select(batch, [i for i, row in enumerate(rows) if row == name], len(rows)) for rows, batch in batches
            ]
            counts.append(self.trainer._get_num_items_in_batch(own, device))
        self._counts = dict(zip(names, torch.stack(counts).tolist(), strict=True))

    def weights(self, model: Any, inputs: Mapping[str, Any], names: Sequence[str], num_items: Any) -> list[float]:
        """
        The weight of each row.

        Args:
            model (`nn.Module`): The model as the trainer has it.
            inputs (`Mapping[str, Any]`): A batch.
            names (`Sequence[str]`): The adapter of each row.
            num_items (`torch.Tensor`, *optional*): How many labels Trainer counts in all batches of the step.

        Raises:
            `ValueError`: If the loss is not a mean of what each row has.
        """
        if self._divided is None or not self._are_apart:
            self._look_at_loss(model, inputs, len(names))
        if self._divided:
            return [_ratio(float(num_items), self._counts[name]) for name in names]
        labels = self._labels_of_rows(inputs, len(names))
        own: dict[str, float] = defaultdict(float)
        for name, count in zip(names, labels, strict=True):
            own[name] += count
        return [_ratio(sum(labels), own[name]) for name in names]

    def _labels_of_rows(self, inputs: Mapping[str, Any], rows: int) -> list[float]:
        """How many labels each row has of which the loss is the mean, if it is not divided by Trainer's number."""
        labels = inputs.get("labels")
        if not isinstance(labels, torch.Tensor) or labels.dim() < 2 or labels.is_floating_point():
            return [1.0] * rows
        shifted = self.trainer._loss_shifts_labels
        return (labels[..., 1:] if shifted else labels).ne(-100).flatten(1).sum(1).tolist()

    @torch.no_grad()
    def _look_at_loss(self, model: Any, inputs: Mapping[str, Any], rows: int) -> None:
        """
        Find out with a first batch how the loss is a mean: over as many labels as Trainer counts in all batches of a
        step, or over the labels of each batch. Raise a `ValueError` if it is neither.
        """
        trainer = self.trainer
        inputs = _with_uneven_labels(trainer._prepare_inputs(dict(inputs)))
        groups = [list(range(rows)), [0], list(range(1, rows))][: 3 if rows > 1 else 1]
        parts = [_select(inputs, group, rows) for group in groups]
        counts: list[Any] = [trainer._get_num_items_in_batch([part], trainer.args.device) for part in parts]

        def loss_of(part: dict[str, Any], items: Any) -> float:
            with trainer.compute_loss_context_manager():
                return float(trainer.compute_loss(model, dict(part), num_items_in_batch=items))

        training = model.training
        model.eval()
        try:
            with torch.random.fork_rng():
                losses = [loss_of(part, items) for part, items in zip(parts, counts, strict=True)]
                half = None if counts[0] is None else loss_of(parts[0], 2 * counts[0])
        finally:
            model.train(training)
        self._divided = half is not None and _close(half, losses[0] / 2)
        if rows == 1:
            return
        labels = self._labels_of_rows(inputs, rows)
        own = [sum(labels[row] for row in group) for group in groups]
        sizes = [float(count) for count in counts] if self._divided else own
        whole, one, other = (loss * size for loss, size in zip(losses, sizes, strict=True))
        self._are_apart = _close(whole, one + other)
        if not self._are_apart:
            raise ValueError(
                f"The loss of {type(trainer).__name__} with {type(trainer.bank.model).__name__} is not the mean of "
                f"those of the labels: it is {losses[0]:.6g} for a batch, and {losses[1]:.6g} and {losses[2]:.6g} for "
                f"two parts of it with {sizes[1]:g} and {sizes[2]:g} of its {sizes[0]:g} labels. So its rows cannot "
                "train adapters of their own. Train each adapter alone."
            )


def _select(inputs: Mapping[str, Any], rows: Sequence[int], size: int) -> dict[str, Any]:
    """Some rows of the inputs of a model."""

    def part(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dim() and len(value) == size:
            return value[torch.tensor(rows, dtype=torch.long, device=value.device)]
        return [value[row] for row in rows] if isinstance(value, list) and len(value) == size else value

    return {key: part(value) for key, value in inputs.items()}


def _with_uneven_labels(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with fewer labels in the first row, so that means over different numbers have different values."""
    labels = inputs.get("labels")
    if isinstance(labels, torch.Tensor) and labels.dim() > 1 and not labels.is_floating_point():
        labels = labels.clone()
        labels[0, labels.shape[1] // 2 + 1 :] = -100
        labels[1:, :1] = -100
        return {**inputs, "labels": labels}
    return inputs


def _ratio(all_items: float, own_items: float) -> float:
    """An adapter without any item has no gradient."""
    return all_items / own_items if own_items else 0.0


def _close(one: float, other: float) -> bool:
    return abs(one - other) <= 0.02 * max(abs(one), abs(other))
