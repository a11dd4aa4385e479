"""The threshold that a budget of parameters gives."""

import logging
from collections.abc import Sequence

import torch

from .arguments import SaraArguments, allowed_parameters
from .parts import Part
from .parts import count as count_part
from .sites import Site
from .spectrum import Spectrum, find_spectrum
from .weights import Weights

logger = logging.getLogger(__name__)

# A threshold that is found for a budget is a multiple of 1 / STEPS, so that the search is one over whole numbers.
STEPS = 10**9


def resolve_threshold(
    sites: Sequence[Site], parts: Sequence[Part], args: SaraArguments, base: int, weights: Weights
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
    found = solve_threshold(sites, args, allowed - beside, weights)
    if found >= 1.0:
        logger.warning(
            "parameter_budget=%s limits nothing: even threshold 1, with all ranks full, needs fewer parameters. Full "
            "ranks cost time, so give a smaller budget, or a threshold.",
            args.parameter_budget,
        )
    return found


def solve_threshold(sites: Sequence[Site], args: SaraArguments, budget: int, weights: Weights) -> float:
    """The largest threshold (to 9 digits) whose updates have no more parameters than the budget."""
    method = args.resolved_method()
    least = sum(method.count(site.shape, 1) for site in sites)
    if least > budget:
        raise ValueError(
            f"parameter_budget={args.parameter_budget!r} allows {budget:,} parameters of updates, but k = 1 at each "
            f"of the {len(sites)} sites already has {least:,}. Raise it, or choose fewer target_modules or layers."
        )
    title = "Singular values"
    spectra = weights.for_each(lambda site, weight: find_spectrum(weight, site.name), sites, title)

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

        def better(site: Site, weight: torch.Tensor, around: Sequence[float] = around) -> Spectrum:
            return find_spectrum(weight, site.name, thresholds=around)

        for index, spectrum in zip(
            doubtful, weights.for_each(better, [sites[index] for index in doubtful], title), strict=True
        ):
            spectra[index] = spectrum
