"""`SaraAdapter`: make an adapter on a model, or load one, save it and share it."""

import logging
from os import PathLike
from typing import Any, cast

from torch import nn

from . import hub, storage
from .adapter_files import AdapterFiles
from .arguments import SaraArguments
from .attached import AttachedUpdates
from .carrier import adapters_on, check_name, unwrap
from .contents import warn_of_random
from .factors import Factors
from .plan_file import with_arguments
from .planning import AdapterSpec, Plan, count_base, factors_and_seeds, measure
from .seeds import Seed
from .spread import agreed, with_values_of_others

logger = logging.getLogger(__name__)


class SaraAdapter(AttachedUpdates, AdapterFiles):
    """
    A SARA or Mo-SARA adapter on a model. The model stays the object that it was: every update is a child module `sara`
    of the linear that it adapts, and one forward hook per linear adds it. The handle is also `model.sara_adapter`.

    Use [`SaraAdapter.attach`] for a new adapter and [`SaraAdapter.load`] for a saved one.

    Attributes:
        model ([`~transformers.PreTrainedModel`]): The adapted model.
        args ([`SaraArguments`]): The adapter's arguments.
        name (`str`): The adapter's name on this model.
        threshold (`float`): The threshold in force.
        sites (`list[PlannedSite]`): The adapted weights, each with `.name`, `.shape` (d_in, d_out) and `.k`.
        seeds (`dict[str, Seed]`): For Mo-SARA, the seeds that identify the frozen factors of each site.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: AdapterSpec,
        factors: dict[str, Factors] | None = None,
        seeds: dict[str, Seed] | None = None,
        name: str = "default",
    ):
        plan = Plan(spec.args, spec.threshold, spec.sites, spec.parts, count_base(model))
        super().__init__(model, spec, {} if factors is None else factors, name)
        self.seeds = seeds or {}
        logger.info("Attached %s", plan)

    # ---- making an adapter ----

    @classmethod
    def attach(
        cls,
        model: nn.Module,
        args: SaraArguments | None = None,
        name: str = "default",
        plan: Plan | str | PathLike | None = None,
    ) -> "SaraAdapter":
        """
        Attach a new adapter and freeze the base.

        Args:
            model ([`~transformers.PreTrainedModel`]): The base model, with its weights loaded.
            args ([`SaraArguments`], *optional*): The adapter's arguments; defaults to SARA at threshold 0.01.
            name (`str`, *optional*, defaults to `"default"`): The adapter's name on this model.
            plan ([`Plan`], `str` or `os.PathLike`, *optional*): What [`plan`] found for this model, or the file that
                [`save_plan`] wrote. Its ranks are taken and not computed. `args` are those of the plan if they are
                left out, and must not ask for other ranks.

        Returns:
            [`SaraAdapter`]: The handle; the model itself is changed in place and keeps its class.

        Raises:
            `ValueError`: If the name is taken, a module does not exist, a weight has no rank, or the plan is one of
                other arguments, or of another model. The model is then left as it was.
        """
        planned, args = with_arguments(plan, args)
        model = unwrap(model)
        check_name(model, name)
        with with_values_of_others(model, f"attach {args}"):
            plan, measured = measure(model, args, planned)
            factors, seeds = factors_and_seeds(measured)
            warn_of_random(model, plan.parts, "Name their modules in modules_to_save to train them.")
            return cls(model, plan, factors, seeds, name)

    @classmethod
    def load(
        cls, model: nn.Module, folder_or_repo_id: str | PathLike, name: str = "default", **access: Any
    ) -> "SaraAdapter":
        """
        Attach a saved adapter to a base that is already in memory. Everything is checked before the model is changed.

        Args:
            model ([`~transformers.PreTrainedModel`]): The base model that the adapter was trained on.
            folder_or_repo_id (`str` or `os.PathLike`): Folder that [`SaraAdapter.save_pretrained`] wrote, or a Hub id.
            name (`str`, *optional*, defaults to `"default"`): The adapter's name on this model.
            access: `revision`, `token`, `cache_dir` and `local_files_only`, as in [`~hf_sara.hub.fetch_adapter`].

        Returns:
            [`SaraAdapter`]: The handle. Its tensors can be trained further.

        Raises:
            `FileNotFoundError`: If the folder, the repository or one of its files is missing.
            `OSError`: If the download failed.
            [`AdapterError`]: If a file is damaged, a tensor is missing, unexpected, misshaped, empty or not finite, or
                the base is not the one that the adapter was trained on.
        """
        # A name that is taken is refused before anything is downloaded.
        model = unwrap(model)
        check_name(model, name)
        with with_values_of_others(model, "load"):
            with agreed(model):
                saved = storage.read(hub.fetch_adapter(folder_or_repo_id, **access))
            return cls.from_saved(model, saved, name)

    @classmethod
    def from_saved(cls, model: nn.Module, saved: storage.SavedAdapter, name: str = "default") -> "SaraAdapter":
        """Attach an adapter whose config has been read. This is [`SaraAdapter.load`] without its first step."""
        model = unwrap(model)
        check_name(model, name)
        saved = saved.named_for(model)
        with with_values_of_others(model, f"load {saved.tensors_sha256}"):
            with agreed(model):
                sites, parts = saved.sites_on(model), saved.parts_on(model)
                tensors = saved.tensors
            factors = saved.factors_on(model, sites)
            saved.warn_of_another_base(model)
            adapter = cls(model, AdapterSpec(saved.args, saved.threshold, sites, parts), factors, saved.seeds, name)
        try:
            adapter.load_state_dict(tensors, saved.untrained)
            adapter.rest(saved.untrained_sites())
        except BaseException:
            adapter.detach()
            raise
        return adapter

    @classmethod
    def of(cls, model: nn.Module, name: str | None = None) -> "SaraAdapter | None":
        """The adapter of that name on a model (the first one, if no name is given), or `None`."""
        adapters = cast(dict[str, SaraAdapter], adapters_on(model))
        return next(iter(adapters.values()), None) if name is None else adapters.get(name)

    # ---- description ----

    def plan(self) -> Plan:
        """Sites, ranks and counts of this adapter."""
        return Plan(self.args, self.threshold, self.sites, self.parts, count_base(self.model))

    def summary(self) -> str:
        """A text for people, see [`Plan.table`]: one line that sums the adapter up, its ranks, and its parameters."""
        return self.plan().table()

    def __repr__(self) -> str:
        return f"SaraAdapter(name={self.name!r}, {self.plan()})"


def adapter_of(model_or_adapter: nn.Module | SaraAdapter) -> SaraAdapter:
    """The adapter itself, or the only one that a model carries. A model with none or several is a `ValueError`."""
    if isinstance(model_or_adapter, SaraAdapter):
        return model_or_adapter
    adapters = cast(dict[str, SaraAdapter], adapters_on(model_or_adapter))
    if not adapters:
        raise ValueError(f"This {type(model_or_adapter).__name__} carries no SARA adapter. Attach or load one first.")
    if len(adapters) > 1:
        raise ValueError(
            f"The model carries the adapters {', '.join(adapters)}. Pass the one that is meant: "
            "SaraAdapter.of(model, name)."
        )
    return next(iter(adapters.values()))
