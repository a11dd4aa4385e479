"""How much each row of a batch counts for its adapter, so that it counts as in a training of this adapter alone.

The loss of a batch is a mean over all of its labels, and that of an adapter alone would be a mean over the labels of
its own rows. So the gradient of each row is multiplied by the ratio of the two numbers of labels.
"""

import copy
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
        if self._divided is False:
            # The loss is not divided by such a number.
            return
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
        if self._divided is None or (not self._are_apart and len(names) > 1):
            self._look_at_loss(model, inputs, len(names))
        if self._divided:
            return [_ratio(float(num_items), self._counts[name]) for name in names]
        labels = self._labels_of_rows(inputs, len(names))
        own: dict[str, float] = defaultdict(float)
        for name, count in zip(names, labels, strict=True):
            own[name] += count
        return [_ratio(sum(labels), own[name]) for name in names]

    def refuse_labels(self, names: Sequence[str]) -> None:
        """Raise a `ValueError` if the loss of a model with these labels is a sum of several means."""
        if list(names) not in (["labels"], ["start_positions", "end_positions"]):
            raise ValueError(
                f"{type(self.trainer.bank.model).__name__} has the labels {', '.join(names) or 'none'}, of which a "
                "loss cannot be split into those of rows. Train each adapter alone."
            )

    def _labels_of_rows(self, inputs: Mapping[str, Any], rows: int) -> list[float]:
        """How many labels each row has of which the loss is the mean, if it is not divided by Trainer's number."""
        if "start_positions" in inputs:
            ends = [inputs[name].reshape(rows, -1)[:, 0] for name in ("start_positions", "end_positions")]
            # The answers that lie behind the end of a text are ignored.
            length = inputs["input_ids"].shape[1]
            valid = [((end >= 0) & (end < length)).tolist() for end in ends]
            if valid[0] != valid[1]:
                raise ValueError(
                    "An answer of the batch begins inside of its text and ends behind it, so it has half a label. Cut "
                    "both ends in the same way."
                )
            return [float(one) for one in valid[0]]
        labels = inputs.get("labels")
        if not isinstance(labels, torch.Tensor):
            raise ValueError(
                f"The batch has labels of the type {type(labels).__name__}, which cannot be counted for each row. "
                "Train each adapter alone."
            )
        if labels.is_floating_point():
            return [1.0] * rows
        # Earlier versions of Trainer say so of a model with an encoder and a decoder, whose loss does not shift them.
        decoder = not getattr(self.trainer.bank.model.config, "is_encoder_decoder", False)
        shifted = self.trainer._loss_shifts_labels and decoder and labels.dim() > 1
        return (labels[..., 1:] if shifted else labels).ne(-100).reshape(rows, -1).sum(1).tolist()

    @torch.no_grad()
    def _look_at_loss(self, model: Any, inputs: Mapping[str, Any], rows: int) -> None:
        """
        Find out with a first batch how the loss is a mean: over as many labels as Trainer counts in all batches of a
        step, or over the labels of each batch. Raise a `ValueError` if it is neither.
        """
        trainer = self.trainer
        training, metrics = model.training, copy.deepcopy(getattr(trainer, "_metrics", None))
        model.eval()
        try:
            with torch.random.fork_rng():
                self._compare_losses(model, trainer._prepare_inputs(dict(inputs)), rows)
        finally:
            model.train(training)
            if metrics is not None:
                # TRL's trainers note what they compute for their log.
                trainer._metrics = metrics

    def _compare_losses(self, model: Any, inputs: dict[str, Any], rows: int) -> None:
        trainer = self.trainer

        def loss_of(part: dict[str, Any], times: int = 1) -> tuple[float, Any]:
            items = trainer._get_num_items_in_batch([part], trainer.args.device)
            items = None if items is None else times * items
            with trainer.compute_loss_context_manager():
                loss, outputs = trainer.compute_loss(model, dict(part), True, num_items_in_batch=items)
            return float(loss), outputs

        _, outputs = loss_of(inputs)
        if isinstance(outputs, Mapping) and outputs.get("aux_loss") is not None:
            raise ValueError(
                "The model adds a loss of its router, in which all rows of a batch have a part. Switch it off: "
                "model.config.output_router_logits = False."
            )
        first = max(1, rows // 3)
        inputs = _with_other_labels(inputs, outputs, first)
        groups = [range(rows), range(first), range(first, rows)][: 3 if rows > 1 else 1]
        parts = [_select(inputs, group, rows) for group in groups]
        losses = [loss_of(part)[0] for part in parts]
        counts: list[Any] = [trainer._get_num_items_in_batch([part], trainer.args.device) for part in parts]
        # Half precision rounds a loss by up to a percent.
        half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
        limit = 0.02 if half or trainer.args.fp16 or trainer.args.bf16 else 1e-3
        self._divided = counts[0] is not None and _close(loss_of(parts[0], 2)[0], losses[0] / 2, limit)
        if rows == 1:
            return
        labels = self._labels_of_rows(inputs, rows)
        own = [sum(labels[row] for row in group) for group in groups]
        sizes = [float(count) for count in counts] if self._divided else own
        whole, one, other = (loss * size for loss, size in zip(losses, sizes, strict=True))
        self._are_apart = _close(whole, one + other, limit)
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


def _with_other_labels(inputs: dict[str, Any], outputs: Any, first: int) -> dict[str, Any]:
    """
    The inputs with other labels, so that means over different sets of labels have different values: the first rows
    have likely labels, and fewer of them, and the others have unlikely ones.
    """
    changed = dict(inputs)
    for place, name in enumerate(("start_positions", "end_positions")):
        if name in inputs:
            changed[name] = torch.full_like(inputs[name], inputs["input_ids"].shape[1] - 1 - place)
            changed[name][:first] = place
    labels = inputs.get("labels")
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    if not isinstance(labels, torch.Tensor):
        return changed
    changed["labels"] = labels = labels.clone()
    if labels.is_floating_point():
        labels[:first], labels[first:] = 0.0, 1.0
        return changed
    if isinstance(logits, torch.Tensor) and logits.shape[-1] > 1:
        likely = logits.float().reshape(-1, logits.shape[-1]).mean(0)
        labels[:first], labels[first:] = int(likely.argmax()), int(likely.argmin())
    if labels.dim() > 1:
        labels[:first, labels.shape[1] // 2 + 1 :] = -100
        if labels.shape[1] > 2:
            labels[first:, :1] = -100
    return changed


def _ratio(all_items: float, own_items: float) -> float:
    """An adapter without any item has no gradient."""
    return all_items / own_items if own_items else 0.0


def _close(one: float, other: float, limit: float) -> bool:
    return abs(one - other) <= limit * max(abs(one), abs(other))
