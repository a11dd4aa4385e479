"""Many adapters on one model, of which each row of a batch has its own."""

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils.logging import tqdm

from . import hub, storage
from .adapter_files import AdapterFiles
from .arguments import SaraArguments
from .bank_training import TrainableBank
from .carrier import adapters_on, banks_on, unwrap
from .contents import factors_of, warn_of_random
from .freezing import refuse_others
from .kinds import Entry, Kind, read_entry, refuse_parts
from .plan_file import with_arguments
from .planning import AdapterSpec, Plan, factors_and_seeds, measure
from .row_names import BASE
from .sites import PlannedSite
from .spread import send_to_all, with_values_of_others, works_together
from .tensor_files import tensors_digest

# So many adapters are read at the same time.
READERS = 8


class AdapterBank(TrainableBank):
    """
    Many adapters of one base, side by side. Each row of a batch is computed with its own adapter:
    `model.generate(**inputs, adapter_names=["legal", "__base__", "medical"])`. Without `adapter_names`, the model is
    the base. [`SaraTrainer`] trains all of them at once: `SaraTrainer(model=model, bank=bank, ...)`.

    A batch costs what a batch of one adapter costs, and an adapter costs its own bytes, because adapters of one base
    and threshold have the same shapes, and for Mo-SARA the same frozen factors. Adapters that are not alike get a bank
    of their own on the same model, and a batch may have adapters of several banks.

    Use [`AdapterBank.load`] for saved adapters and [`AdapterBank.attach`] for new ones. `bank["legal"]` is one of
    them, and can be saved and pushed as any adapter.

    Attributes:
        model ([`~transformers.PreTrainedModel`]): The model.
        spec ([`AdapterSpec`]): What all adapters of the bank have in common: method, sites and ranks.
        seeds (`dict[str, Seed]`): For Mo-SARA, the seeds that identify the frozen factors of each site.
    """

    _kind: Kind

    @classmethod
    def load(
        cls,
        model: nn.Module,
        adapters: Mapping[str, str | PathLike] | str | PathLike,
        capacity: int | None = None,
        **access: Any,
    ) -> "AdapterBank":
        """
        Load adapters onto a base that is already in memory. They are read side by side, and each is checked as
        [`SaraAdapter.load`] checks it. For Mo-SARA, the frozen factors are computed and verified once for all.

        Args:
            model ([`~transformers.PreTrainedModel`]): The base model of the adapters.
            adapters (`Mapping[str, str or os.PathLike]`, `str` or `os.PathLike`): By name, the folder or the Hub id of
                each adapter. Or a folder that has a folder for each adapter, as [`AdapterBank.save_pretrained`] and a
                training write it; its name is that of the adapter.
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
        if not isinstance(adapters, Mapping):
            adapters = storage.adapters_in(adapters)
        _check_names(model, adapters)
        first = next(iter(adapters))
        head = storage.read(hub.fetch_adapter(adapters[first], **access)).named_for(model)
        kind = Kind.of(head, head.factors_sha256)

        def read(name: str) -> Entry:
            entry = read_entry(model, name, adapters[name], access)
            kind.refuse_other(entry.kind, name, first)
            return entry

        with ThreadPoolExecutor(READERS) as pool:
            results = pool.map(read, adapters)
            entries = list(tqdm(results, desc="Adapters", total=len(adapters), unit="adapter", delay=1.0))
        head.warn_of_another_base(model)
        with with_values_of_others(model, f"load a bank with {first}"):
            spec = AdapterSpec(head.args, head.threshold, head.sites_on(model), [])
            factors = head.factors_on(model, spec.sites)
            bank = cls(model, spec, head.seeds, factors, capacity or len(adapters))
        bank._kind = kind
        for name, entry in zip(adapters, entries, strict=True):
            bank._enter(name, entry)
        return bank

    @classmethod
    def attach(
        cls,
        model: nn.Module,
        args: SaraArguments | None = None,
        names: Sequence[str] = (),
        plan: Plan | str | PathLike | None = None,
    ) -> "AdapterBank":
        """
        Make new adapters, to be trained in one run. Each has a random start of its own; that of the first one is what
        [`SaraAdapter.attach`] would give it.

        Args:
            model ([`~transformers.PreTrainedModel`]): The base model, with its weights loaded.
            args ([`SaraArguments`], *optional*): The arguments of all adapters; defaults to SARA at threshold 0.01.
            names (`Sequence[str]`): Their names.
            plan ([`Plan`], `str` or `os.PathLike`, *optional*): See [`SaraAdapter.attach`].

        Returns:
            [`AdapterBank`]: The bank.

        Raises:
            `ValueError`: If there is no name, or one is taken or not allowed, `args` ask for heads or rows of tokens,
                which cannot be another one in each row of a batch, or the ranks cannot be found. The model is then
                left as it was.
        """
        planned, args = with_arguments(plan, args)
        model = unwrap(model)
        _check_names(model, names)
        with with_values_of_others(model, f"attach a bank with {args}"):
            found, measured = measure(model, args, planned)
            refuse_parts(found.parts, "A new adapter of the bank")
            factors, seeds = factors_and_seeds(measured)
            warn_of_random(model, [], "An adapter of a bank does not train them, so train them on the base before.")
            spec = AdapterSpec(args, found.threshold, found.sites, [])
            bank = cls(model, spec, seeds, factors, len(names))
            starts = [bank._random_row(anew=place > 0) for place in range(len(names))]
            if works_together(model):
                send_to_all(starts)
        for name, row in zip(names, starts, strict=True):
            bank._put(name, spec, row, frozenset(site.name for site in spec.sites))
        own = bank[names[0]].saved_factors()
        bank._kind = Kind.of(bank[names[0]].manifest(), tensors_digest(own) if own else None)
        return bank

    def _random_row(self, anew: bool) -> torch.Tensor:
        """The numbers with which a new adapter starts. The updates have some since they were made."""
        state = {}
        for site in self.spec.sites:
            delta = self._update(site).delta
            if anew:
                delta.reset_parameters(self.spec.args)
            state.update({f"{site.name}.{name}": tensor.detach().cpu() for name, tensor in delta.trained().items()})
        return self._row_of(state, [])

    def add(self, name: str, folder_or_repo_id: str | PathLike, **access: Any) -> None:
        """
        Add an adapter, also while the model runs.

        Args:
            name (`str`): Its name in the bank.
            folder_or_repo_id (`str` or `os.PathLike`): Its folder or Hub id.
            access: See [`AdapterBank.load`].

        Raises:
            `FileNotFoundError`: If the adapter, or one of its files, is missing.
            `ValueError`: If the name is taken or not allowed, or a trainer has the bank.
            [`AdapterError`]: If the adapter is damaged, or not alike. The bank is then left as it was.
        """
        _check_names(self.model, [name])
        entry = read_entry(self.model, name, folder_or_repo_id, access)
        self._kind.refuse_other(entry.kind, name, next(iter(self.names), "the first one"))
        self._enter(name, entry)

    def _enter(self, name: str, entry: Entry) -> None:
        own = AdapterSpec(entry.args, entry.threshold, self.spec.sites, [])
        untrained = frozenset(site.name for site in entry.untrained)
        self._put(name, own, self._row_of(entry.tensors, entry.untrained), untrained)

    # ---- one of them ----

    def __getitem__(self, name: str) -> "BankedAdapter":
        self._slot(name)
        return BankedAdapter(self, name)

    def save_pretrained(self, folder: str | PathLike, names: Sequence[str] | str | None = None) -> None:
        """
        Write adapters, each as a plain adapter into a folder of its name. [`AdapterBank.load`] loads the folder again.

        Args:
            folder (`str` or `os.PathLike`): The folder to write to.
            names (`Sequence[str]` or `str`, *optional*): Which ones. Defaults to all.

        Raises:
            `ValueError`: If a name is that of no adapter, or cannot be the name of a folder. Nothing is written then.
        """
        names = self.names if names is None else [names] if isinstance(names, str) else list(names)
        self.refuse_unfit_names(names)
        if names:
            # This looks at the whole model, so it is done once for all.
            self[names[0]].refuse_others()
        for name in tqdm(names, desc="Adapters", unit="adapter", delay=1.0):
            self[name].write_files(Path(folder, name))

    def refuse_unfit_names(self, names: Sequence[str]) -> None:
        """Raise a `ValueError` if a name is that of no adapter, or cannot be the name of a folder."""
        for name in names:
            self._slot(name)
            # Beside them, a training has folders and files of its own, whose names have a dot or begin so.
            if not re.fullmatch(r"(?!checkpoint-|global_step|runs$|logs$)[\w-]{1,200}", name):
                raise ValueError(
                    f"The adapter {name!r} cannot be saved in a folder of its name. A name for a folder has letters, "
                    "digits, '_' and '-', and does not begin with 'checkpoint-' or 'global_step'. Save it alone: "
                    "bank[name].save_pretrained(folder)."
                )


class BankedAdapter(AdapterFiles):
    """
    One adapter of a bank: `bank["legal"]`.

    Args:
        bank ([`AdapterBank`]): The bank.
        name (`str`): The name of the adapter.
    """

    def __init__(self, bank: AdapterBank, name: str):
        self.bank, self.name = bank, name
        self.model, self.spec, self.seeds = bank.model, bank.spec_of(name), bank.seeds

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Copies of the trained tensors on the CPU, named as in [`SaraAdapter.trained`]."""
        return self.bank.state(self.name)

    def saved_factors(self) -> dict[str, torch.Tensor]:
        """The frozen factors that are saved with the adapter. There are none if seeds are saved instead."""
        if not self.spec.method.saves_factors:
            return {}
        return factors_of(self.spec, ((site, self.bank._update(site).delta) for site in self.spec.sites))

    def untrained_sites(self) -> list[PlannedSite]:
        """The sites whose updates took no part in the training, although others did."""
        untrained = self.bank._untrained[self.name]
        return [site for site in self.spec.sites if site.name in untrained and len(untrained) < len(self.spec.sites)]

    def refuse_others(self) -> None:
        """Raise a `ValueError` if a parameter trains beside the bank, so that it would be lost."""
        if self.bank.is_training():
            refuse_others(self.model, f"the adapter {self.name!r}")

    def warn_of_idle(self, sites: Sequence[PlannedSite]) -> None:
        """The trainer says it once for all."""

    def __repr__(self) -> str:
        return f"BankedAdapter(name={self.name!r}, {self.spec})"


def _check_names(model: nn.Module, names: Sequence[str] | Mapping[str, Any]) -> None:
    """Raise a `ValueError` unless new adapters of a bank can have these names."""
    if isinstance(names, str) or not names:
        raise ValueError(f"A bank needs the names of at least one adapter, and got {names!r}.")
    taken = {name for bank in banks_on(model) for name in bank.names} | set(adapters_on(model))
    for name in names:
        if not isinstance(name, str) or not name or name == BASE:
            raise ValueError(f"The adapter name {name!r} is not one that an adapter can have. Give another text.")
        if name in taken:
            raise ValueError(f"The model already has an adapter {name!r}. Remove it, or choose another name.")
        if not isinstance(names, Mapping):
            taken.add(name)
