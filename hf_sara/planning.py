"""Ranks and parameter counts for a threshold, and the threshold for a budget of parameters."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .arguments import SaraArguments, allowed_parameters
from .methods import Delta, Measured, Method
from .methods.base import Shapes
from .parallel import for_each
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
    """

    args: SaraArguments
    threshold: float
    sites: list[PlannedSite]

    @property
    def method(self) -> Method:
        """The method, with the adapter's options."""
        return self.args.resolved_method()

    @property
    def trained_parameters(self) -> int:
        """Number of trained parameters: k (d_in + d_out + 1) per site for SARA, m k + k + m + d_out for Mo-SARA."""
        return sum(self.count(site) for site in self.sites)

    def count(self, site: PlannedSite) -> int:
        """Trained parameters of one site."""
        return self.method.count(site.shape, site.k)

    def trained_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all trained tensors: `"<site>.<tensor>"`."""
        return self._shapes(self.method.trained_shapes)

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
        base_parameters (`int`): Parameters of the base model.
    """

    base_parameters: int

    @property
    def share(self) -> float:
        """Trained parameters divided by base plus trained parameters, as in the paper's tables."""
        return self.trained_parameters / (self.base_parameters + self.trained_parameters)

    def table(self) -> str:
        """A table of the sites with their shapes, ranks and parameters, and one line that sums them up."""
        width = max(len(site.name) for site in self.sites)
        lines = [f"{'site':<{width}}  {'d_in':>6} {'d_out':>6} {'k':>5} {'trained':>10}"]
        for site in self.sites:
            d_in, d_out = site.shape
            lines.append(f"{site.name:<{width}}  {d_in:>6} {d_out:>6} {site.k:>5} {self.count(site):>10,}")
        return "\n".join([*lines, str(self)])

    def __str__(self) -> str:
        ranks = [site.k for site in self.sites]
        return (
            f"{self.args.method}: threshold {self.threshold:.6g}, {len(self.sites)} sites, k {min(ranks)} to "
            f"{max(ranks)} (mean {sum(ranks) / len(ranks):.1f}), {self.trained_parameters:,} trained parameters "
            f"({100 * self.share:.4g} % of the model)"
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
    return plan_sites(find_sites(model, args), args, count_base(model), lambda site: site.weight(model))


def plan_sites(sites: Sequence[Site], args: SaraArguments, base: int, weight_of: WeightOf) -> Plan:
    """A plan for sites whose weights may come from anywhere: `weight_of` returns that of a site, (d_in, d_out)."""
    threshold = resolve_threshold(sites, args, base, weight_of)
    ranks = for_each(lambda site: find_rank(weight_of(site), threshold, site.name), sites, "Singular values")
    return Plan(args, threshold, list(map(PlannedSite.of, sites, ranks)), base)


def measure(model: nn.Module, args: SaraArguments) -> tuple[Plan, dict[str, Measured]]:
    """
    Make the plan of [`plan`], and find for each site all that the method takes from its weight, frozen factors
    included. Attaching needs both, and one decomposition gives the rank and the factors of a site.
    """
    sites, base, method = find_sites(model, args), count_base(model), args.resolved_method()
    threshold = resolve_threshold(sites, args, base, lambda site: site.weight(model))
    title = "Singular vectors" if method.has_factors else "Singular values"
    found = for_each(lambda site: method.measure(site.weight(model), threshold, site.name), sites, title)
    planned = [PlannedSite.of(site, measured.k) for site, measured in zip(sites, found, strict=True)]
    return Plan(args, threshold, planned, base), {s.name: m for s, m in zip(sites, found, strict=True)}


def resolve_threshold(sites: Sequence[Site], args: SaraArguments, base: int, weight_of: WeightOf) -> float:
    """The threshold in force: the given one, the method's default, or the one that a budget of parameters gives."""
    if args.parameter_budget is None:
        return args.resolved_threshold()
    return solve_threshold(sites, args, args.parameter_budget, base, weight_of)


def count_base(model: nn.Module) -> int:
    """Parameters of the base model, without any attached update."""
    ours = {id(p) for module in model.modules() if isinstance(module, Delta) for p in module.parameters()}
    # ZeRO stage 3 spreads a parameter over the processes and keeps its whole size as `ds_numel`.
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if id(p) not in ours)


def solve_threshold(
    sites: Sequence[Site], args: SaraArguments, parameter_budget: str, base: int, weight_of: WeightOf
) -> float:
    """The largest threshold (to 9 digits) whose adapter stays within the budget."""
    method = args.resolved_method()
    budget = allowed_parameters(parameter_budget, base)
    least = sum(method.count(site.shape, 1) for site in sites)
    if least > budget:
        raise ValueError(
            f"parameter_budget={parameter_budget!r} allows {budget:,} trained parameters, but k = 1 at each of "
            f"the {len(sites)} sites already has {least:,}. Raise it, or choose fewer target_modules or layers."
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
