"""Ranks and parameter counts for a threshold, and the threshold for a budget of parameters."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from .arguments import SaraArguments, parse_budget
from .deltas import Delta, count_trained
from .sites import Site, find_sites
from .spectrum import Spectrum, find_rank, find_spectrum, for_each

WeightOf = Callable[[Site], torch.Tensor]

# A solved threshold is a multiple of one part in so many.
STEPS = 10**9


@dataclass(frozen=True)
class Plan:
    """
    What an adapter would be: its sites with their ranks, and what they cost.

    Args:
        args ([`SaraArguments`]): The arguments it is for.
        threshold (`float`): The threshold in force: given, the method's default, or solved for a budget.
        sites (`list[Site]`): The sites, each with its rank k.
        base_parameters (`int`): Parameters of the base model.
    """

    args: SaraArguments
    threshold: float
    sites: list[Site]
    base_parameters: int

    @property
    def trained_parameters(self) -> int:
        """Number of trained parameters: k (d_in + d_out + 1) per site for SARA, m k + k + m + d_out for Mo-SARA."""
        return sum(self.count(site) for site in self.sites)

    def count(self, site: Site) -> int:
        """Trained parameters of one site."""
        return count_trained(self.args, site.shape, site.k)

    @property
    def share(self) -> float:
        """Trained parameters divided by base plus trained parameters, as in the paper's tables."""
        return self.trained_parameters / (self.base_parameters + self.trained_parameters)

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
        args ([`SaraArguments`]): What to plan for. With a `parameter_budget` the threshold is solved.

    Returns:
        [`Plan`]: Sites with ranks, the threshold in force, and counts.

    Raises:
        `ValueError`: For sites that do not exist, weights without a rank, and budgets that not even k = 1 meets.
    """
    return plan_sites(find_sites(model, args), args, count_base(model), lambda site: site.weight(model))


def plan_sites(sites: Sequence[Site], args: SaraArguments, base: int, weight_of: WeightOf) -> Plan:
    """A plan for sites whose weights come from anywhere: `weight_of` gives one, of shape (d_in, d_out), at a time."""
    threshold = args.resolved_threshold()
    if args.parameter_budget is not None:
        threshold = solve_threshold(sites, args, base, weight_of)
    ranks = for_each(lambda site: find_rank(weight_of(site), threshold, site.name), sites, "Singular values")
    return Plan(args, threshold, [replace(site, k=k) for site, k in zip(sites, ranks, strict=True)], base)


def count_base(model: nn.Module) -> int:
    """Parameters of the base model, without any attached update."""
    ours = {id(p) for module in model.modules() if isinstance(module, Delta) for p in module.parameters()}
    # ZeRO stage 3 keeps the size of what it has spread over the processes.
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if id(p) not in ours)


def solve_threshold(sites: Sequence[Site], args: SaraArguments, base: int, weight_of: WeightOf) -> float:
    """The largest threshold (to 9 digits) whose adapter stays within `args.parameter_budget`."""
    share, budget = parse_budget(args.parameter_budget)
    if share is not None:
        # trained / (base + trained) <= share
        budget = int(share * base / (1.0 - share))
    least = sum(count_trained(args, site.shape, 1) for site in sites)
    if least > budget:
        raise ValueError(
            f"parameter_budget={args.parameter_budget!r} allows {budget:,} trained parameters, but k = 1 at each of "
            f"the {len(sites)} sites already has {least:,}. Raise it, or choose fewer target_modules or layers."
        )
    spectra = for_each(lambda site: find_spectrum(weight_of(site), site.name), sites, "Singular values")

    def cost(threshold: float) -> int:
        counts = (spectrum.count(threshold) for spectrum in spectra)
        return sum(count_trained(args, site.shape, k) for site, k in zip(sites, counts, strict=True))

    while True:
        # Bisection over multiples of 1e-9: the cost is a rising staircase of the threshold.
        low, high = 1, STEPS + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if cost(middle / STEPS) <= budget else (low, middle)
        # Spectra carry errors. Where one leaves a rank in doubt on either side of the step, take a better one.
        around = [step / STEPS for step in (low, high) if step <= STEPS]
        doubtful = [i for i, found in enumerate(spectra) if any(found.rank(edge) is None for edge in around)]
        if not doubtful:
            return low / STEPS

        def better(index: int, around: Sequence[float] = around) -> Spectrum:
            return find_spectrum(weight_of(sites[index]), sites[index].name, thresholds=around)

        for index, spectrum in zip(doubtful, for_each(better, doubtful, "Singular values"), strict=True):
            spectra[index] = spectrum
