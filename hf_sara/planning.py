"""Ranks and parameter counts for a threshold or a budget of parameters."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .arguments import SaraArguments
from .base_model import open_model
from .budget import resolve_threshold
from .errors import one_line
from .factors import Factors
from .figures import finish, new_figure
from .linears import compute_dtype
from .methods import Measured, Method
from .methods.base import Shapes
from .parts import Part, find_parts
from .parts import count as count_part
from .patterns import is_of_update
from .seeds import Seed
from .sites import PlannedSite, Site, sites_by_kind
from .spectrum import check_weight, find_rank, weight_digest
from .spread import agreed, with_values_of_others
from .targets import find_sites
from .weights import Weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

# A table for people is not wider than this, so that terminals do not break its lines.
WIDEST_TABLE = 119
LONGEST_NAME = 60
# With threshold or budget, these arguments decide which ranks there are.
DECIDE_RANKS = ("target_modules", "exclude_modules", "layers", "modules_to_save", "trainable_token_indices")
# The number of modules beside the sites that a summary names.
MOST_NAMED = 5


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

    @property
    def limit(self) -> str | None:
        """Why no adapter of this kind can be merged or exported; `None` if it can."""
        try:
            self.method.refuse_merge()
            self.method.refuse_export()
        except ValueError as error:
            return str(error)
        return None

    def rank_table(self) -> tuple[list[str], list[list[str]]]:
        """The ranks, with a row per layer and a column per kind of site. Several sites may share a cell."""
        kinds = sites_by_kind(self.sites)
        cells: dict[int | None, dict[str, list[str]]] = {}
        for kind, sites in kinds.items():
            for site in sites:
                cells.setdefault(site.layer, {}).setdefault(kind, []).append(str(site.k))
        rows = [
            ["-" if layer is None else str(layer), *(" ".join(cells[layer].get(kind, ())) for kind in kinds)]
            for layer in sorted(cells, key=lambda layer: -1 if layer is None else layer)
        ]
        return ["layer", *kinds], rows

    def table(self) -> str:
        """
        A text for people: one line that sums the adapter up, the ranks with a row per layer and a column per kind of
        site, and the trained parameters of each kind.
        """
        lines = [str(self)] if self.limit is None else [str(self), one_line(self.limit)]
        return "\n".join([*lines, *_text_of_ranks(*self.rank_table()), "", *self._totals()])

    def _totals(self) -> list[str]:
        rows = [["kind", "sites", "d_in x d_out", "k", "trained"]]
        for kind, sites in sites_by_kind(self.sites).items():
            shapes = sorted({site.shape for site in sites})
            shape = " x ".join(map(str, shapes[0])) if len(shapes) == 1 else f"{len(shapes)} shapes"
            total = sum(map(self.count, sites))
            rows.append([kind, f"{len(sites):,}", shape, _range([site.k for site in sites]), f"{total:,}"])
        rows += [[part.name, "", part.title, "", f"{count_part(part):,}"] for part in self.parts]
        return text_table(rows)

    def plot(self, path: str | os.PathLike | None = None) -> "Figure":
        """
        Draw the rank of each site over the layers, with a line per kind of site.

        Args:
            path (`str` or `os.PathLike`, *optional*): Image file to write; its ending gives the format.

        Returns:
            `matplotlib.figure.Figure`: The figure.

        Raises:
            `ImportError`: If matplotlib is not installed.
        """
        kinds = sites_by_kind(self.sites)
        # The legend has a line for each kind.
        figure = new_figure(8, max(3.5, 0.3 + 0.2 * len(kinds)), dpi=110)
        axes = figure.subplots()
        for kind, sites in kinds.items():
            axes.plot([site.layer or 0 for site in sites], [site.k for site in sites], marker="o", ms=3, label=kind)
        axes.set(xlabel="layer", ylabel="rank k", title=f"Ranks at threshold {self.threshold:.4g}")
        axis: Any
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_major_locator().set_params(integer=True)
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside right upper", fontsize="small")
        return finish(figure, path)

    def __str__(self) -> str:
        ranks = [site.k for site in self.sites]
        named = [f", {one_line(part.name, LONGEST_NAME)} ({part.title})" for part in self.parts]
        more = f", and {len(named) - MOST_NAMED} other modules" if len(named) > MOST_NAMED else ""
        return (
            f"{self.args.method}: threshold {self.threshold:.6g}, {len(self.sites):,} sites, k {_range(ranks)} "
            f"(mean {sum(ranks) / len(ranks):.1f}){''.join(named[:MOST_NAMED])}{more}, "
            f"{self.trained_parameters:,} trained parameters"
        )


def _range(ranks: Sequence[int]) -> str:
    low, high = min(ranks), max(ranks)
    return f"{low}" if low == high else f"{low} to {high}"


def _text_of_ranks(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of the table of ranks. Columns for which a line has no room stand in another table below."""
    lines: list[str] = []
    start = 1
    while start < len(names):
        stop, width = start, len(names[0])
        while stop < len(names):
            widest = max(len(row[stop]) for row in [names, *rows])
            width += 2 + min(widest, LONGEST_NAME)
            if width > WIDEST_TABLE and stop > start:
                break
            stop += 1
        kept = [[row[0], *row[start:stop]] for row in rows if any(row[start:stop])]
        lines += ["", *text_table([[names[0], *names[start:stop]], *kept])]
        start = stop
    return lines


def text_table(rows: Sequence[Sequence[object]]) -> list[str]:
    """The lines of a table for people: names on the left, numbers on the right. Long names are shortened."""
    cells = [[one_line(cell, LONGEST_NAME) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


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
        digests (`dict[str, str]`, *optional*): By site, the digest of its weight, which tells whether another base has
            the same one. [`plan`] finds them.
    """

    base_parameters: int
    digests: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def share(self) -> float:
        """Trained parameters divided by base plus trained parameters, as in the paper's tables."""
        return self.trained_parameters / (self.base_parameters + self.trained_parameters)

    def rank_pattern(self) -> dict[str, int]:
        """
        The ranks as PEFT's `LoraConfig` takes them, by the name of each module, so that a plain LoRA has the ranks of
        SARA: `LoraConfig(target_modules=list(ranks), rank_pattern=ranks)`.

        Raises:
            `ValueError`: If a site is a part of a module, as q of a module for q, k and v, which LoRA adapts as a
                whole.
        """
        part = next((site.name for site in self.sites if site.slice is not None), None)
        if part is not None:
            raise ValueError(
                f"{part} is a part of its module, and PEFT's LoRA adapts a module as a whole, with one rank. Choose "
                "other target_modules."
            )
        return {site.module: site.k for site in self.sites}

    def __str__(self) -> str:
        limit = "" if self.limit is None else "; it can be neither merged nor exported"
        if self.args.parameter_budget is not None and self.threshold >= 1.0:
            limit += f"; the budget of {self.args.parameter_budget} limits nothing, all ranks are full"
        return f"{super().__str__()} ({100 * self.share:.4g} % of the model){limit}"


def plan(
    model: nn.Module | str | os.PathLike,
    args: SaraArguments,
    revision: str | None = None,
    token: str | None = None,
    device: torch.device | str | None = None,
) -> Plan:
    """
    Plan an adapter without attaching it.

    Args:
        model ([`~transformers.PreTrainedModel`], `str` or `os.PathLike`): The base model with its weights loaded, or
            the folder or Hub id of a model in safetensors files, from which one matrix at a time is read.
        args ([`SaraArguments`]): The arguments to plan for. A `parameter_budget` decides the threshold.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        token (`str`, *optional*): Access token for private repositories.
        device (`torch.device` or `str`, *optional*): Where to compute the singular values. Defaults to where a weight
            lies, or to a GPU that is there for large weights on the CPU.

    Returns:
        [`Plan`]: Sites with ranks, the threshold in force, and counts.

    Raises:
        `FileNotFoundError`: If there is no such folder or repository, or it has no safetensors files.
        `ValueError`: For sites that do not exist, weights without a rank, and budgets too small even for k = 1.
    """
    if isinstance(model, nn.Module):
        with with_values_of_others(model, f"plan {args}"):
            return _plan(model, Weights.of(model, device), args)
    return _plan(*open_model(model, revision, token, device), args)


def _plan(base: nn.Module, weights: Weights, args: SaraArguments) -> Plan:
    sites, parts, size = _chosen(base, args)
    threshold = resolve_threshold(sites, parts, args, size, weights)

    def look(site: Site, weight: torch.Tensor) -> tuple[int, str]:
        check_weight(weight, site.name)
        digest = weight_digest(weight)
        return find_rank(weight, threshold, site.name, digest), digest

    found = weights.for_each(look, sites, "Singular values")
    planned = [PlannedSite.of(site, k) for site, (k, _) in zip(sites, found, strict=True)]
    digests = {site.name: digest for site, (_, digest) in zip(sites, found, strict=True)}
    return Plan(args, threshold, planned, parts, size, digests)


def _chosen(model: nn.Module, args: SaraArguments) -> tuple[list[Site], list[Part], int]:
    """The sites and parts that arguments choose, and the size of the base."""
    with agreed(model):
        sites = find_sites(model, args)
        return sites, find_parts(model, args, sites), count_base(model)


def measure(model: nn.Module, args: SaraArguments, planned: Plan | None = None) -> tuple[Plan, dict[str, Measured]]:
    """
    Make the plan of [`plan`], and find for each site all that the method takes from its weight, frozen factors
    included. Attaching needs both, and one decomposition gives the rank and the factors of a site. If the plan was
    made before, no rank is computed, and it is checked that the model is the plan's.
    """
    if planned is not None:
        return _follow(model, args, planned)
    sites, parts, base = _chosen(model, args)
    method, weights = args.resolved_method(), Weights.of(model)
    threshold = resolve_threshold(sites, parts, args, base, weights)

    def look(site: Site, weight: torch.Tensor) -> Measured:
        return method.measure(weight, threshold, site.name).to(compute_dtype(site.linear(model), model))

    title = "Singular vectors" if method.has_factors else "Singular values"
    found = weights.for_each(look, sites, title)
    ranked = [PlannedSite.of(site, measured.k) for site, measured in zip(sites, found, strict=True)]
    return Plan(args, threshold, ranked, parts, base), {s.name: m for s, m in zip(sites, found, strict=True)}


def factors_and_seeds(measured: dict[str, Measured]) -> tuple[dict[str, Factors], dict[str, Seed]]:
    """The frozen factors and seeds by site of what [`measure`] found, which it empties: no memory is held twice."""
    factors, seeds = {}, {}
    for site in list(measured):
        found = measured.pop(site)
        if found.factors is not None:
            factors[site] = found.factors
        if found.seed is not None:
            seeds[site] = found.seed
    return factors, seeds


def _follow(model: nn.Module, args: SaraArguments, plan: Plan) -> tuple[Plan, dict[str, Measured]]:
    """
    A plan of a model for arguments that ask for the same ranks, with what their method takes from each weight. The
    model has to be the one of the plan.
    """
    _refuse_other_ranks(args, plan)
    (sites, parts, _), method = _chosen(model, args), args.resolved_method()
    there, wanted = ([(site.name, site.shape, site.slice) for site in found] for found in (sites, plan.sites))
    if there != wanted or parts != plan.parts:
        # Their order is that of the modules, which is not part of what a plan says.
        other = sorted({str(entry) for entry in (*there, *parts)} ^ {str(entry) for entry in (*wanted, *plan.parts)})
        names = f", first of all in {other[0]}" if other else " in their order"
        raise ValueError(
            f"The plan is not one of this {type(model).__name__}. Of its {len(plan.sites)} sites and what trains "
            f"beside them, {len(other)} differ{names}. Make the plan of this model."
        )

    def look(site: PlannedSite, weight: torch.Tensor) -> Measured:
        check_weight(weight, site.name)
        digest = weight_digest(weight)
        if digest != plan.digests.get(site.name):
            raise ValueError(
                f"{site.name}: this model's weight is not the one that the plan was made of (its SHA-256 differs). "
                "Load the model of the plan, in a dtype that changes no value, or make a plan of this one."
            )
        measured = method.measure(weight, plan.threshold, site.name, site.k, digest)
        return measured.to(compute_dtype(site.linear(model), model))

    title = "Singular vectors" if method.has_factors else "Weights"
    found = Weights.of(model).for_each(look, plan.sites, title)
    followed = Plan(args, plan.threshold, plan.sites, parts, plan.base_parameters, plan.digests)
    return followed, {site.name: m for site, m in zip(plan.sites, found, strict=True)}


def _refuse_other_ranks(args: SaraArguments, plan: Plan) -> None:
    """Raise an error if arguments ask for other sites, parts or ranks than those of a plan."""
    given, planned = args.to_dict(), plan.args.to_dict()
    other = [name for name in DECIDE_RANKS if given[name] != planned[name]]
    if args.parameter_budget is None and args.resolved_threshold() != plan.threshold:
        given["threshold"], planned["threshold"] = args.resolved_threshold(), plan.threshold
        other.append("threshold")
    elif args.parameter_budget not in (None, plan.args.parameter_budget):
        other.append("parameter_budget")
    if other:
        said = ", ".join(f"{name}={given[name]!r} (the plan has {planned[name]!r})" for name in other)
        raise ValueError(f"The arguments ask for other ranks than the plan: {said}. Make a plan with them.")


def count_base(model: nn.Module) -> int:
    """Parameters of the base model, without any attached update."""
    own = {n: p for n, p in model.named_parameters() if not is_of_update(n)}
    # accelerate gives every module that shares a weight an empty one of its own, if it offloads them.
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    counted = (p for n, p in own.items() if not (p.is_meta and tied.get(n) in own))
    # ZeRO stage 3 spreads a parameter over the processes and keeps its whole size as `ds_numel`.
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in counted)
