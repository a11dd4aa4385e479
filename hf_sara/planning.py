"""Ranks and parameter counts for a threshold, and the threshold for a budget of parameters."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .arguments import SaraArguments, allowed_parameters
from .methods import Measured, Method
from .methods.base import Shapes
from .parallel import for_each
from .parts import Part, find_parts
from .parts import count as count_part
from .patterns import is_of_update
from .sites import PlannedSite, Site
from .spectrum import Spectrum, find_rank, find_spectrum
from .targets import find_sites

WeightOf = Callable[[Site], torch.Tensor]

# A threshold that is found for a budget is a multiple of 1 / STEPS, so that the search is one over whole numbers.
STEPS = 10**9


@dataclass(frozen=True)
class AdapterSpec:
    """
    The definition of an adapter, without its tensors.

    Args:
        args ([`SaraArguments`]): The adapter's arguments.
        threshold (`float`): The threshold in force: the given one, the default, or the one of a budget.
        sites (`list[PlannedSite]`): The sites, each with its rank k.
        parts (`list[ModulePart or TokenPart]`): What is trained beside the updates of the sites.
    """

    args: SaraArguments
    threshold: float
    sites: list[PlannedSite]
    parts: list[Part]

    @property
    def method(self) -> Method:
        """The method, with the adapter's options."""
        return self.args.resolved_method()

    @property
    def trained_parameters(self) -> int:
        """
        Number of trained parameters: k (d_in + d_out + 1) per site for SARA, m k + k + m + d_out for Mo-SARA, and
        those of the parts.
        """
        return sum(self.count(site) for site in self.sites) + sum(map(count_part, self.parts))

    def count(self, site: PlannedSite) -> int:
        """Trained parameters of one site."""
        return self.method.count(site.shape, site.k)

    def trained_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all trained tensors: `"<site>.<tensor>"`, and those of the parts by their own names."""
        shapes = self._shapes(self.method.trained_shapes)
        return {**shapes, **{name: shape for part in self.parts for name, shape in part.trained_shapes().items()}}

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors that an adapter saves: those that train, and the buffers of its parts."""
        buffers = {name: shape for part in self.parts for name, shape in part.buffer_shapes().items()}
        return {**self.trained_shapes(), **buffers}

    def saved_factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the frozen factors that are saved too. There are none if seeds are saved instead."""
        return self._shapes(self.method.frozen_shapes) if self.method.saves_factors else {}

    def _shapes(self, of_site: Callable[[tuple[int, int], int], Shapes]) -> Shapes:
        return {
            f"{site.name}.{name}": shape for site in self.sites for name, shape in of_site(site.shape, site.k).items()
        }


@dataclass(frozen=True)
class Plan(AdapterSpec):
    """
    The plan of an adapter: its sites with their ranks, and their numbers of parameters.

    Args:
        args ([`SaraArguments`]): The arguments that the plan is made for.
        threshold (`float`): The threshold in force: the given one, the default, or the one of a budget.
        sites (`list[PlannedSite]`): The sites, each with its rank k.
        parts (`list[ModulePart or TokenPart]`): What is trained beside the updates of the sites.
        base_parameters (`int`): Parameters of the base model.
    """

    base_parameters: int

    @property
    def share(self) -> float:
        """Trained parameters divided by base plus trained parameters, as in the paper's tables."""
        return self.trained_parameters / (self.base_parameters + self.trained_parameters)

    def table(self) -> str:
        """A table of the sites with their shapes, ranks and parameters, and one line that sums them up."""
        width = max(len(row.name) for row in (*self.sites, *self.parts))
        lines = [f"{'site':<{width}}  {'d_in':>6} {'d_out':>6} {'k':>5} {'trained':>10}"]
        for site in self.sites:
            d_in, d_out = site.shape
            lines.append(f"{site.name:<{width}}  {d_in:>6} {d_out:>6} {site.k:>5} {self.count(site):>10,}")
        lines += [f"{part.name:<{width}}  {part.title:>19} {count_part(part):>10,}" for part in self.parts]
        return "\n".join([*lines, str(self)])

    def __str__(self) -> str:
        ranks = [site.k for site in self.sites]
        beside = "".join(f", {part.name} ({part.title})" for part in self.parts)
        return (
            f"{self.args.method}: threshold {self.threshold:.6g}, {len(self.sites)} sites, k {min(ranks)} to "
            f"{max(ranks)} (mean {sum(ranks) / len(ranks):.1f}){beside}, "
            f"{self.trained_parameters:,} trained parameters ({100 * self.share:.4g} % of the model)"
        )


def plan(model: nn.Module, args: SaraArguments) -> Plan:
    """
    Plan an adapter without attaching it.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base model, with its weights loaded.
        args ([`SaraArguments`]): The arguments to plan for. A `parameter_budget` decides the threshold.

    Returns:
        [`Plan`]: Sites with ranks, the threshold in force, and counts.

    Raises:
        `ValueError`: For sites that do not exist, weights without a rank, and budgets too small even for k = 1.
    """
    return plan_with(model, args, lambda site: site.weight(model))


def plan_with(model: nn.Module, args: SaraArguments, weight_of: WeightOf) -> Plan:
    """The plan of [`plan`] for a model whose weights may be elsewhere: `weight_of` returns a site's, (d_in, d_out)."""
    sites, base = find_sites(model, args), count_base(model)
    parts = find_parts(model, args, sites)
    threshold = resolve_threshold(sites, parts, args, base, weight_of)
    ranks = for_each(lambda site: find_rank(weight_of(site), threshold, site.name), sites, "Singular values")
    return Plan(args, threshold, list(map(PlannedSite.of, sites, ranks)), parts, base)


def measure(model: nn.Module, args: SaraArguments) -> tuple[Plan, dict[str, Measured]]:
    """
    Make the plan of [`plan`], and find for each site all that the method takes from its weight, frozen factors
    included. Attaching needs both, and one decomposition gives the rank and the factors of a site.
    """
    sites, base, method = find_sites(model, args), count_base(model), args.resolved_method()
    parts = find_parts(model, args, sites)
    threshold = resolve_threshold(sites, parts, args, base, lambda site: site.weight(model))
    title = "Singular vectors" if method.has_factors else "Singular values"
    found = for_each(lambda site: method.measure(site.weight(model), threshold, site.name), sites, title)
    planned = [PlannedSite.of(site, measured.k) for site, measured in zip(sites, found, strict=True)]
    return Plan(args, threshold, planned, parts, base), {s.name: m for s, m in zip(sites, found, strict=True)}


def resolve_threshold(
    sites: Sequence[Site], parts: Sequence[Part], args: SaraArguments, base: int, weight_of: WeightOf
) -> float:
    """The threshold in force: the given one, the method's default, or the one that a budget of parameters gives."""
    if args.parameter_budget is None:
        return args.resolved_threshold()
    beside = sum(map(count_part, parts))
    allowed = allowed_parameters(args.parameter_budget, base)
    if parts and beside >= allowed:
        raise ValueError(
            f"parameter_budget={args.parameter_budget!r} allows {allowed:,} trained parameters, and "
            f"{', '.join(part.name for part in parts)} alone has {beside:,}. Raise it, or change modules_to_save and "
            "trainable_token_indices."
        )
    return solve_threshold(sites, args, allowed - beside, weight_of)


def count_base(model: nn.Module) -> int:
    """Parameters of the base model, without any attached update."""
    own = {n: p for n, p in model.named_parameters() if not is_of_update(n)}
    # accelerate gives every module that shares a weight an empty one of its own, if it offloads them.
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    counted = (p for n, p in own.items() if not (p.is_meta and tied.get(n) in own))
    # ZeRO stage 3 spreads a parameter over the processes and keeps its whole size as `ds_numel`.
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in counted)


def solve_threshold(sites: Sequence[Site], args: SaraArguments, budget: int, weight_of: WeightOf) -> float:
    """The largest threshold (to 9 digits) whose updates have no more parameters than the budget."""
    method = args.resolved_method()
    least = sum(method.count(site.shape, 1) for site in sites)
    if least > budget:
        raise ValueError(
            f"parameter_budget={args.parameter_budget!r} allows {budget:,} parameters of updates, but k = 1 at each "
            f"of the {len(sites)} sites already has {least:,}. Raise it, or choose fewer target_modules or layers."
        )
    spectra = for_each(lambda site: find_spectrum(weight_of(site), site.name), sites, "Singular values")

    def cost(threshold: float) -> int:
        counts = (spectrum.count(threshold) for spectrum in spectra)
        return sum(method.count(site.shape, k) for site, k in zip(sites, counts, strict=True))

    while True:
        # This is a bisection over the multiples of 1 / STEPS, since the cost never falls when the threshold rises.
        low, high = 1, STEPS + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if cost(middle / STEPS) <= budget else (low, middle)
        # Spectra have errors. One that leaves a rank in doubt, at `low` or at `high`, is replaced by a better one.
        around = [step / STEPS for step in (low, high) if step <= STEPS]
        doubtful = [i for i, found in enumerate(spectra) if any(found.rank(edge) is None for edge in around)]
        if not doubtful:
            return low / STEPS

        def better(index: int, around: Sequence[float] = around) -> Spectrum:
            return find_spectrum(weight_of(sites[index]), sites[index].name, thresholds=around)

        for index, spectrum in zip(doubtful, for_each(better, doubtful, "Singular values"), strict=True):
            spectra[index] = spectrum
