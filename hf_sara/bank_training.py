"""A bank that trains: each adapter has a gradient of its own, from its own rows of each batch."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .bank_table import BankTable
from .carrier import banks_on
from .contents import hold_base
from .freezing import freeze_base, let_others_rest, let_train, thaw_base
from .linears import compute_device
from .planning import AdapterSpec
from .sites import PlannedSite


class TrainableBank(BankTable):
    """
    A bank whose adapters can train. Each is one parameter, its row of the table, so that an optimizer keeps a state of
    its own for each, and leaves an adapter alone that no row of a batch has. A single adapter trains as one without a
    bank does: its tensors are the parameters.
    """

    # The adapters that train, in the order of their parameters.
    _training: tuple[str, ...] = ()

    def train_alone(self) -> dict[str, nn.Parameter]:
        """
        Let the adapters of this bank train, and nothing else of the model. [`SaraTrainer`] calls this.

        Returns:
            `dict[str, torch.nn.Parameter]`: What trains: by name, the numbers of each adapter; of a single adapter,
            its tensors, named as in [`SaraAdapter.trained`].

        Raises:
            `ValueError`: If there is no adapter, or the adapters have different dropouts.
        """
        self._refuse_to_train()
        if not self._training:
            freeze_base(self.model)
        let_others_rest(self.model, self)
        if self._training != tuple(sorted(self.names)):
            self._training = tuple(sorted(self.names))
            for site in self.spec.sites:
                self._update(site).usage.learning = False
            if len(self._training) > 1:
                self._holder.rows = nn.ParameterList([nn.Parameter(row) for row in self._rows()])
        self._bind()
        hold_base(self.model)
        return self.trained()

    def _refuse_to_train(self) -> None:
        if not any(bank is self for bank in banks_on(self.model)):
            raise ValueError("The bank was detached from its model. Load its adapters again to train them.")
        if not self.names:
            raise ValueError("The bank has no adapter, so there is nothing to train.")
        dropouts = {self._own[name][0].dropout for name in self.names}
        if len(dropouts) > 1:
            raise ValueError(
                f"The adapters of the bank have the dropouts {sorted(dropouts)}, and a batch can have one. Train "
                "those of each dropout in a bank of their own."
            )

    def trained(self) -> dict[str, nn.Parameter]:
        """What trains, see [`AdapterBank.train_alone`]. It is empty before the first training."""
        if self._is_alone():
            return {
                f"{site.name}.{name}": tensor
                for site in self.spec.sites
                for name, tensor in self._update(site).delta.trained().items()
            }
        return dict(zip(self._training, self._holder.rows.parameters(), strict=True)) if self._training else {}

    def is_training(self) -> bool:
        """Whether a trainer has the bank."""
        return bool(self._training)

    @property
    def _holder(self) -> Any:
        # It is the first update, so that the parameters are those of an update of the model.
        return self._update(self.spec.sites[0])

    def _is_alone(self) -> bool:
        return len(self._training) == 1

    def _rows(self) -> list[torch.Tensor]:
        return [self._table[self._slots[name]] for name in self._training]

    @torch.no_grad()
    def _bind(self) -> None:
        """Let what trains have the numbers of the table, on the device of the model."""
        module = self.spec.sites[0].linear(self.model)
        self._table = self._table.to(compute_device(module))
        if self._is_alone():
            state = self._tensors_of(self._table[self._slots[self._training[0]]])
            for name, tensor in self.trained().items():
                tensor.copy_(state[name])
            for site in self.spec.sites:
                self._update(site).delta.follow_weight(site.linear(self.model))
        elif self._training:
            # These are views, so the table changes with them.
            for parameter, row in zip(self._holder.rows.parameters(), self._rows(), strict=True):
                parameter.data = row
        let_train(self, True)

    @torch.no_grad()
    def _numbers(self) -> torch.Tensor:
        if self._is_alone():
            tensors = [tensor.reshape(-1) for tensor in self.trained().values()]
            self._table[self._slots[self._training[0]]] = torch.cat(tensors).to(self._table)
        elif self._training:
            for parameter, row in zip(self._holder.rows.parameters(), self._rows(), strict=True):
                if parameter.data_ptr() != row.data_ptr():
                    # The model was copied or moved, and the table with it.
                    row.copy_(parameter)
        return self._table

    def _row(self, name: str) -> torch.Tensor:
        slot = self._slot(name)
        if self._training and not self._is_alone():
            # A look at this one alone: there may be thousands.
            return self._holder.rows[self._training.index(name)].detach().to(self._table.dtype)
        return self._numbers()[slot]

    def load_state(self, states: Mapping[str, Mapping[str, torch.Tensor]], untrained: Mapping[str, frozenset]) -> None:
        """Give adapters the tensors of [`AdapterBank.state`]."""
        for name, tensors in states.items():
            self._table[self._slot(name)] = self._row_of(tensors, []).to(self._table)
            self._untrained[name] = untrained[name]
        self._bind()

    def remove(self, name: str) -> None:
        self._refuse_change("removed")
        super().remove(name)

    def _put(self, name: str, own: AdapterSpec, row: torch.Tensor, untrained: frozenset[str]) -> None:
        self._refuse_change("added")
        super()._put(name, own, row, untrained)

    def _refuse_change(self, done: str) -> None:
        if self._training:
            raise ValueError(f"No adapter can be {done} while a trainer has the bank. Call bank.end_training() first.")

    def end_training(self) -> None:
        """Let adapters come and go again. What was trainable before the training is trainable again."""
        if not self._training:
            return
        self._numbers()
        for tensor in self.trained().values():
            tensor.requires_grad_(False)
        self._holder.rows = None
        self._training = ()
        hold_base(self.model)
        thaw_base(self.model)

    def detach(self) -> None:
        """Remove the bank from the model. What was trainable before a training of the bank is trainable again."""
        self.end_training()
        super().detach()

    # ---- steps ----

    @contextlib.contextmanager
    def training_rows(self, names: Sequence[str], weights: Sequence[float]) -> Iterator[None]:
        """
        Let each row of a batch train its adapter within a `with` block, which the backward pass has to be in too. The
        gradient of each row counts with its weight. A single adapter has no use for weights.
        """
        with self._running:
            if self._is_alone():
                self.batch.begin_alone()
            else:
                trained = self.trained()
                rows: dict[str, list[tuple[int, float]]] = {}
                for row, name in enumerate(names):
                    rows.setdefault(name, []).append((row, weights[row]))
                own = [trained[name] for name in rows]
                self.batch.begin(_RowsOfBatch.apply(list(rows.values()), *own))
            try:
                with self.batch.as_it_is():
                    yield
            finally:
                self.batch.end()
        for name in dict.fromkeys(names):
            if self._untrained[name]:
                used = {site.name for site in self.spec.sites if self._update(site).usage.learning}
                self._untrained[name] -= used

    @contextlib.contextmanager
    def _with_rows(self, names: Sequence[str]) -> Iterator[None]:
        if not self._is_alone() or set(names) != set(self._training):
            with super()._with_rows(names):
                yield
            return
        with self._running:
            self.batch.begin_alone()
            try:
                yield
            finally:
                self.batch.end()

    def rest(self) -> list[PlannedSite]:
        """Let the sites that took no part in the training of any adapter add nothing. Returns them."""
        self._numbers()
        idle = frozenset(site.name for site in self.spec.sites)
        for name in self._training:
            idle &= self._untrained[name]
        sites = [site for site in self.spec.sites if site.name in idle] if len(idle) < len(self.spec.sites) else []
        for row in self._rows():
            self._silence(row, sites)
        self._bind()
        return sites


class _RowsOfBatch(torch.autograd.Function):
    """
    The numbers of the adapter of each row, of shape (rows, numbers). `places` has, for each adapter, its rows and
    their weights. The gradient of an adapter is a sum over its own rows alone: that of another one may not be finite.
    """

    @staticmethod
    def forward(ctx, places, *adapters):
        ctx.places = places
        order = {row: index for index, own in enumerate(places) for row, _ in own}
        index = torch.tensor([order[row] for row in range(len(order))], device=adapters[0].device)
        return torch.stack(adapters).index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        # The sums are made in the order of the rows, so that they have the same bits each time.
        return None, *(sum(weight * grad[row] for row, weight in own) for own in ctx.places)
