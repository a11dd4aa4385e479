"""The mixin that lets a trainer train all adapters of a bank at once, each from its own rows of each batch.

The rows of a batch do not see each other, so the gradient of an adapter is that of its own rows. `row_weights` lets
each row count as it would alone. The gradients of each adapter are clipped alone, and an adapter that no row of a
batch has does not take a step.
"""

import logging
import os
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers.training_args import OptimizerNames

from .. import storage
from ..adapter_files import AdapterFiles
from ..arguments import SaraArguments
from ..bank import AdapterBank
from ..carrier import unwrap
from ..errors import AdapterError
from ..planning import AdapterSpec, Plan
from ..row_names import BASE, adapter_rows, rows_of
from .adapter_trainer import AdapterTrainerMixin, read_like, restore_task
from .row_weights import RowWeights

logger = logging.getLogger(__name__)

# The column of a dataset that says which adapter a row trains.
COLUMN = "adapter_name"
# These optimizers treat each number alone, so that it makes no difference that an adapter is one row of numbers.
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")


class NamedRows:
    """
    A collator that keeps the column `adapter_name`, as a tensor of the bytes of the names, since others would refuse
    texts, and some ways to hand batches over know tensors only.

    Args:
        collator (`Callable`): The collator of the other columns.
    """

    def __init__(self, collator: Any):
        self.collator = collator

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Any:
        """The batch of the examples, with the name of the adapter of each."""
        names = [example.get(COLUMN) for example in examples]
        missing = sum(not isinstance(name, str) for name in names)
        if missing:
            raise ValueError(
                f"{missing} of {len(names)} rows have no text in the column {COLUMN!r}, which names the adapter of "
                "each row."
            )
        batch = self.collator(
            [{key: value for key, value in example.items() if key != COLUMN} for example in examples]
        )
        if not isinstance(batch, MutableMapping):
            raise ValueError(
                f"The collator makes a {type(batch).__name__} of the rows, and not tensors by name. A trainer that "
                "makes its batches later cannot train a bank."
            )
        coded = [torch.tensor(list(str(name).encode()), dtype=torch.uint8) for name in names]
        batch[COLUMN] = pad_sequence(coded, batch_first=True)
        return batch


def refuse_unknown(known: Sequence[str], names: Iterable[Any]) -> None:
    """Raise a `ValueError` if one of the values of the column is not the name of an adapter."""
    unknown = sorted(map(repr, set(names) - set(known)))
    if unknown:
        raise ValueError(
            f"The column {COLUMN!r} of the dataset has {', '.join(unknown[:5])}{' ...' if len(unknown) > 5 else ''}, "
            f"and the bank has the adapters {', '.join(known[:5])}{' ...' if len(known) > 5 else ''}. Each row needs "
            "the name of one of these."
        )


def refuse_data(title: str, data: Any, names: Sequence[str]) -> set[str] | None:
    """The names that data have. Raise a `ValueError` if they lack the column, or have another name."""
    columns, unique = getattr(data, "column_names", None), getattr(data, "unique", None)
    if columns and COLUMN not in columns:
        raise ValueError(
            f"The {title} data have the columns {', '.join(columns)}, and a bank needs the column {COLUMN!r}, "
            "which names the adapter of each row."
        )
    if not columns or unique is None:
        return None
    there = set(unique(COLUMN))
    refuse_unknown(names, there)
    return there


class BankTrainerMixin(AdapterTrainerMixin):
    """
    The part of [`SaraTrainerMixin`] that trains a bank. Without a bank, all is as in [`AdapterTrainerMixin`].
    """

    def __init__(
        self,
        model=None,
        args=None,
        *positional,
        sara_args: SaraArguments | None = None,
        adapter_name: str | None = None,
        bank: AdapterBank | None = None,
        plan: Plan | str | os.PathLike | None = None,
        published_arguments: Sequence[str] = (),
        **kwargs,
    ):
        self.bank = bank
        kwargs |= {"sara_args": sara_args, "adapter_name": adapter_name, "plan": plan}
        kwargs["published_arguments"] = published_arguments
        self._sara_rows = RowWeights(self)
        if bank is None:
            super().__init__(model, args, *positional, **kwargs)
            return
        if positional:
            raise ValueError("With a bank, give all arguments but model and args by name.")
        was_training = bool(bank.trained())
        try:
            self._refuse_with_bank(model, args, kwargs)
            super().__init__(model, args, **kwargs)
            self._refuse_after_init()
        except BaseException:
            if not was_training:
                bank.end_training()
            raise
        self.data_collator = NamedRows(self.data_collator)

    # ---- what cannot work ----

    def _refuse_with_bank(self, model: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        assert self.bank is not None
        unused = [
            name
            for name in ("sara_args", "adapter_name", "plan", "model_init", "optimizer_cls_and_kwargs", "ref_model")
            if kwargs.get(name) is not None
        ]
        if any(part is not None for part in kwargs.get("optimizers", ())):
            unused.append("optimizers")
        if unused:
            raise ValueError(
                f"{', '.join(unused)} cannot be given together with bank. The adapters of the bank have their "
                "arguments, and the optimizer is that of optim in TrainingArguments."
            )
        if not isinstance(model, nn.Module) or unwrap(model) is not self.bank.model:
            raise ValueError("The bank is on another model. Give the trainer the model of the bank: model=bank.model.")
        if args is not None and args.push_to_hub:
            raise ValueError(
                "push_to_hub=True would push all adapters of the bank to one repository, from which none can be "
                "loaded. Push each one after the training: bank[name].push_to_hub(repo_id)."
            )

    def _refuse_after_init(self) -> None:
        assert self.bank is not None
        if self.args.world_size > 1 or self.args.n_gpu > 1 or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                f"A bank trains in one process on one device, without FSDP and DeepSpeed. Here are "
                f"{max(self.args.world_size, self.args.n_gpu)}. Start one process, and let it see one GPU "
                "(CUDA_VISIBLE_DEVICES=0), or train each adapter alone."
            )
        self._refuse_training()
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"evaluation": self.eval_dataset}
        there = refuse_data("training", self.train_dataset, self.bank.names)
        for title, data in sets.items():
            refuse_data(title, data, [*self.bank.names, BASE])
        idle = [] if there is None else [name for name in self.bank.names if name not in there]
        if idle:
            logger.warning(
                "%d adapters of the bank have no row in the training data, and do not train: %s%s",
                *(len(idle), ", ".join(idle[:5]), " ..." if len(idle) > 5 else ""),
            )

    def _refuse_training(self) -> None:
        """Raise a `ValueError` if the adapters that the bank has now cannot train, or cannot be saved."""
        assert self.bank is not None
        self.bank.refuse_unfit_names(self.bank.names)
        if len(self.bank.names) > 1:
            self._sara_rows.refuse_labels(self.label_names)
            if (name := OptimizerNames(self.args.optim).value) not in OPTIMIZERS:
                raise ValueError(
                    f"optim={name!r} may look at the shapes of tensors or at several of them, so adapters would not "
                    f"train in a bank as each does alone. Choose one of {', '.join(OPTIMIZERS)}."
                )

    # ---- what is trained ----

    def choose_adapter(self, model: Any) -> Any:
        """The adapter of a model that this trainer trains. A bank has several, so it is a `ValueError` then."""
        if self.bank is not None:
            raise ValueError(
                "This trainer trains a bank, and no single adapter: trainer.bank[name] is one of them. A trainer that "
                "compares a policy with a reference model cannot train a bank."
            )
        return super().choose_adapter(model)

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained tensors by name."""
        return super().trained() if self.bank is None else self.bank.trained()

    def _attach(self, model: Any) -> None:
        if self.bank is None:
            super()._attach(model)
        else:
            self.bank.train_alone()

    def _train_alone(self) -> None:
        if self.bank is None:
            return super()._train_alone()
        self._refuse_training()
        trained = set(map(id, self.bank.train_alone().values()))
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        if groups and not trained.issubset(id(tensor) for group in groups for tensor in group["params"]):
            # They are of an earlier training of the bank.
            self.optimizer = self.lr_scheduler = None
        return None

    def _rest(self) -> None:
        if self.bank is None:
            return super()._rest()
        idle = self.bank.rest()
        if idle:
            logger.warning(
                "The model did not use the modules of %d sites while the bank trained, so the updates there add "
                "nothing: %s%s. If it never will, leave them out with exclude_modules.",
                *(len(idle), ", ".join(site.name for site in idle[:5]), " ..." if len(idle) > 5 else ""),
            )
        return None

    def _check_before_training(self) -> None:
        if self.bank is None:
            return super()._check_before_training()
        # The model has its device by now.
        self.bank.train_alone()
        return self._saved_adapters("")[0][1].refuse_others()

    def _sara_spec(self) -> AdapterSpec:
        return super()._sara_spec() if self.bank is None else self.bank.spec

    # ---- files ----

    def _saved_adapters(self, folder: str) -> list[tuple[str, AdapterFiles]]:
        if self.bank is None:
            return super()._saved_adapters(folder)
        return [(os.path.join(folder, name), self.bank[name]) for name in self.bank.names]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if self.bank is None:
            return super()._save(output_dir, state_dict)
        self.bank.refuse_unfit_names(self.bank.names)
        folder = str(self.args.output_dir if output_dir is None else output_dir)
        failed: AdapterError | None = None
        for path, adapter in self._saved_adapters(folder):
            manifest = adapter.manifest(adapter.untrained_sites())
            try:
                storage.write(path, manifest, adapter.state_dict(), adapter.saved_factors())
            except AdapterError as error:
                # Those of the others are saved all the same.
                failed = failed or AdapterError(f"The adapter {os.path.basename(path)!r} cannot be saved: {error}")
        if failed is not None:
            raise failed
        return self._write_beside(folder)

    def _load_tensors(self, folder: str, what: str) -> None:
        if self.bank is None:
            return super()._load_tensors(folder, what)
        found = storage.adapters_in(folder)
        others = sorted(set(found) ^ set(self.bank.names))
        if others:
            raise ValueError(
                f"The {what} {folder!r} belongs to another bank. Only one of the two has the adapters "
                f"{', '.join(others[:5])}{' ...' if len(others) > 5 else ''}."
            )
        saved = {
            name: read_like(self.bank.spec_of(name), path, f"The adapter {name!r} of the {what} {folder!r}")
            for name, path in found.items()
        }
        for one in saved.values():
            restore_task(self._sara_base, one)
        return self.bank.load_state(
            {name: one.tensors for name, one in saved.items()}, {name: one.untrained for name, one in saved.items()}
        )

    # ---- rows ----

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        if self.bank is not None and COLUMN not in columns:
            columns.append(COLUMN)

    def _take_names(self, inputs: Any) -> tuple[list[str], dict[str, Any]]:
        """The adapter of each row, and the inputs of the model."""
        assert self.bank is not None
        if COLUMN not in inputs:
            raise ValueError(f"The batch has no {COLUMN!r}, so its rows have no adapter.")
        others = {key: value for key, value in inputs.items() if key != COLUMN}
        names = [bytes(row).rstrip(b"\0").decode() for row in inputs[COLUMN].tolist()]
        rows = rows_of((), others)
        if rows is not None and rows != len(names):
            raise ValueError(
                f"The batch has {len(names)} examples, and the model would get {rows} rows. A bank needs one row for "
                "each example: no packing, no padding_free, and no pairs of texts in the place of one."
            )
        return names, others

    def prediction_step(self, model, inputs, *args, **kwargs):
        if self.bank is None:
            return super().prediction_step(model, inputs, *args, **kwargs)
        names, inputs = self._take_names(inputs)
        # A search has several rows for each row of the batch.
        exact = not getattr(self.args, "predict_with_generate", False)
        with adapter_rows(self.bank.model, names), self.bank.batch.as_it_is(exact):
            return super().prediction_step(model, inputs, *args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.bank is not None and num_items is not None and len(self.bank.names) > 1:
            self._sara_rows.count([self._take_names(batch) for batch in batches], device)
        return batches, num_items

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.bank is None:
            return super().training_step(model, inputs, num_items_in_batch)
        names, inputs = self._take_names(inputs)
        refuse_unknown(self.bank.names, names)
        weights = [1.0] * len(names)
        if len(self.bank.names) > 1:
            weights = self._sara_rows.weights(model, inputs, names, num_items_in_batch)
        with self.bank.training_rows(names, weights):
            return super().training_step(model, inputs, num_items_in_batch)

    def _clip_grad_norm(self, model):
        if self.bank is None or len(self.bank.trained()) < 2 or len(self.bank.names) < 2:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        grads = [tensor.grad for tensor in self.bank.trained().values() if tensor.grad is not None]
        norms = torch.stack(torch._foreach_norm(grads))
        # This is what torch.nn.utils.clip_grad_norm_ does, for each adapter alone.
        factors = (self.args.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(grads, list(factors.unbind()))
        return norms.mean()
