"""Many adapters on one model, of which each row of a batch has its own."""

import contextlib
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from typing import Any, cast

import torch
from torch import nn
from transformers.utils.logging import tqdm

from . import hub, storage
from .carrier import adapters_on, banks_on, set_banks, unwrap
from .contents import insert_delta, remove_delta
from .kinds import Entry, Kind, read_entry, refuse_sites
from .linears import compute_device, compute_dtype
from .methods import Delta
from .planning import AdapterSpec
from .row_names import BASE, let_take_names, let_take_no_names
from .rows import BankDelta, Batch, places
from .sites import PlannedSite
from .spread import with_values_of_others

# So many adapters are read at the same time.
READERS = 8


class AdapterBank:
    """
    Many adapters of one base, loaded side by side. Each row of a batch is computed with its own adapter:
    `model.generate(**inputs, adapter_names=["legal", "__base__", "medical"])`. Without `adapter_names`, the model is
    the base.

    A batch costs what a batch of one adapter costs, and an adapter costs its own bytes, because adapters of one base
    and threshold have the same shapes, and for Mo-SARA the same frozen factors. Adapters that are not alike get a bank
    of their own on the same model, and a batch may have adapters of several banks.

    Use [`AdapterBank.load`] to make one.

    Attributes:
        model ([`~transformers.PreTrainedModel`]): The model.
        spec ([`AdapterSpec`]): What all adapters of the bank have in common: method, sites and ranks.
    """

    def __init__(self, model: nn.Module, first: storage.SavedAdapter, capacity: int):
        self.model = model
        self.spec = AdapterSpec(first.args, first.threshold, first.sites_on(model), [])
        self.batch = Batch()
        self._kind = Kind.of(first)
        self._make_locks()
        # The first row of the table is that of the base.
        self._slots: dict[str, int] = {BASE: 0}
        self._key = f"bank{1 + max((int(bank._key[4:]) for bank in banks_on(model)), default=-1)}"
        refuse_sites(model, self.spec.sites)
        factors = first.factors_on(model, self.spec.sites)
        try:
            width = self._insert(factors)
        except BaseException:
            self._remove()
            raise
        self._table = torch.zeros(1 + capacity, width)
        set_banks(model, [*banks_on(model), self])
        let_take_names(model)

    def _make_locks(self) -> None:
        # One is held while the table changes, and the other one while a batch runs.
        self._changing, self._running = threading.Lock(), threading.RLock()

    def _insert(self, factors: dict[str, Any]) -> int:
        """Put the updates on the linears. Returns the length of a row of the table."""
        self._starts: dict[str, int] = {}
        start = 0
        for site in self.spec.sites:
            module = site.linear(self.model)
            delta = self.spec.method.make_delta(site, self.model, factors.pop(site.name, None))
            if type(delta).update_of_rows is Delta.update_of_rows:
                raise ValueError(f"{self.spec.method.title} does not support an AdapterBank, so load one adapter.")
            self._starts[site.name] = start
            insert_delta(module, self._key_of(site), cast(Delta, BankDelta(delta, self.batch, start)))
            start += self.spec.count(site)
        return start

    def _key_of(self, site: PlannedSite) -> str:
        return f"{self._key}:{site.label}" if site.label else self._key

    def __getstate__(self) -> dict[str, Any]:
        # A lock can be neither copied nor pickled.
        return {name: value for name, value in vars(self).items() if name not in ("_changing", "_running")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._make_locks()

    # ---- the adapters ----

    @classmethod
    def load(
        cls, model: nn.Module, adapters: Mapping[str, str | PathLike], capacity: int | None = None, **access: Any
    ) -> "AdapterBank":
        """
        Load adapters onto a base that is already in memory. They are read side by side, and each is checked as
        [`SaraAdapter.load`] checks it. For Mo-SARA, the frozen factors are computed and verified once for all.

        Args:
            model ([`~transformers.PreTrainedModel`]): The base model of the adapters.
            adapters (`Mapping[str, str or os.PathLike]`): By name, the folder or the Hub id of each adapter.
            capacity (`int`, *optional*): For how many adapters to take memory. Defaults to the number of adapters; it
                grows when more are added.
            access: `revision`, `token`, `cache_dir` and `local_files_only`, as in [`~hf_sara.hub.fetch_adapter`].

        Returns:
            [`AdapterBank`]: The bank. The model itself keeps its class.

        Raises:
            `FileNotFoundError`: If the folder, the repository or one of the files of an adapter is missing.
            `ValueError`: If a name is taken or not allowed, or there are no adapters.
            [`AdapterError`]: If an adapter is damaged, or is not alike. The error has its name.
        """
        model = unwrap(model)
        if not adapters:
            raise ValueError("A bank needs at least one adapter.")
        for name in adapters:
            _check_name(model, name)
        first = next(iter(adapters))
        head = storage.read(hub.fetch_adapter(adapters[first], **access)).named_for(model)
        kind = Kind.of(head)

        def read(name: str) -> Entry:
            entry = read_entry(model, name, adapters[name], access)
            kind.refuse_other(entry.kind, name, first)
            return entry

        with ThreadPoolExecutor(READERS) as pool:
            results = pool.map(read, adapters)
            entries = list(tqdm(results, desc="Adapters", total=len(adapters), unit="adapter", delay=1.0))
        head.warn_of_another_base(model)
        with with_values_of_others(model, f"load a bank with {first}"):
            bank = cls(model, head, capacity or len(adapters))
        for name, entry in zip(adapters, entries, strict=True):
            bank._put(name, entry)
        return bank

    def add(self, name: str, folder_or_repo_id: str | PathLike, **access: Any) -> None:
        """
        Add an adapter, also while the model runs.

        Args:
            name (`str`): Its name in the bank.
            folder_or_repo_id (`str` or `os.PathLike`): Its folder or Hub id.
            access: See [`AdapterBank.load`].

        Raises:
            `FileNotFoundError`: If the adapter, or one of its files, is missing.
            `ValueError`: If the name is taken or not allowed.
            [`AdapterError`]: If the adapter is damaged, or not alike. The bank is then left as it was.
        """
        _check_name(self.model, name)
        entry = read_entry(self.model, name, folder_or_repo_id, access)
        self._kind.refuse_other(entry.kind, name, next(iter(self.names), "the first one"))
        self._put(name, entry)

    def remove(self, name: str) -> None:
        """Remove an adapter, also while the model runs. A batch that has begun keeps it to its end."""
        with self._changing:
            self._slot(name)
            del self._slots[name]

    @property
    def names(self) -> list[str]:
        """The names of the adapters, in the order in which they came."""
        return [name for name in self._slots if name != BASE]

    @property
    def nbytes(self) -> int:
        """The bytes that the adapters take, apart from the frozen factors that they share."""
        return self._table.nbytes

    def state(self, name: str) -> dict[str, torch.Tensor]:
        """Copies of the trained tensors of an adapter on the CPU, named as in [`SaraAdapter.trained`]."""
        row = self._table[self._slot(name)]
        return {
            f"{site.name}.{key}": row[start : start + math.prod(shape)].view(shape).clone()
            for site in self.spec.sites
            for key, (start, shape) in self._places(site).items()
        }

    def detach(self) -> None:
        """Remove the bank from the model."""
        self._remove()
        left = [bank for bank in banks_on(self.model) if bank is not self]
        set_banks(self.model, left)
        if not left:
            let_take_no_names(self.model)

    def _remove(self) -> None:
        for site in self.spec.sites:
            module: Any = site.linear(self.model)
            if self._key_of(site) in getattr(module, "sara", {}):
                remove_delta(module, self._key_of(site))

    def __repr__(self) -> str:
        return f"AdapterBank({len(self.names):,} adapters, {self.nbytes:,} bytes, {self.spec})"

    def _places(self, site: PlannedSite) -> Any:
        return places(self.spec.method.trained_shapes(site.shape, site.k), self._starts[site.name])

    def _slot(self, name: str) -> int:
        if name not in self._slots or name == BASE:
            known = ", ".join(self.names[:5]) + (" ..." if len(self.names) > 5 else "")
            raise ValueError(f"The bank has no adapter {name!r}. It has: {known or 'none'}.")
        return self._slots[name]

    def _put(self, name: str, entry: Entry) -> None:
        row = torch.zeros(self._table.shape[1])
        for site in self.spec.sites:
            for key, (start, shape) in self._places(site).items():
                row[start : start + math.prod(shape)] = entry.tensors[f"{site.name}.{key}"].flatten()
        for site in entry.untrained:
            # They add nothing, see `SaraAdapter.rest`. All tensors of a site may be zero here, since none trains.
            start = self._starts[site.name]
            row[start : start + self.spec.count(site)] = 0.0
        with self._changing:
            taken = set(self._slots.values())
            slot = next((index for index in range(len(self._table)) if index not in taken), len(self._table))
            if slot == len(self._table):
                more = max(1, len(self._table) // 2)
                self._table = torch.cat([self._table, self._table.new_zeros(more, self._table.shape[1])])
            self._table[slot] = row
            self._slots[name] = slot

    # ---- the batch ----

    @contextlib.contextmanager
    def _with_rows(self, names: Sequence[str]) -> Iterator[None]:
        """Let each row of the next batches have its adapter, within a `with` block."""
        with self._running:
            with self._changing:
                slots = [self._slots.get(name, 0) for name in names]
                # These are copies, so that the batch does not see what changes meanwhile.
                table = self._table.index_select(0, torch.tensor(slots)) if any(slots) else None
            if table is None:
                yield
                return
            module = self.spec.sites[0].linear(self.model)
            self.batch.begin(table.to(compute_device(module), compute_dtype(module, self.model)))
            try:
                yield
            finally:
                self.batch.end()


def _check_name(model: nn.Module, name: str) -> None:
    """Raise a `ValueError` unless a new adapter of a bank can have the name."""
    if not isinstance(name, str) or not name or name == BASE:
        raise ValueError(f"The adapter name {name!r} is not one that an adapter can have. Give another text.")
    if any(name in bank._slots for bank in banks_on(model)) or name in adapters_on(model):
        raise ValueError(f"The model already has an adapter {name!r}. Remove it, or choose another name.")
