"""Ranks and routers over the layers of a model: the data, and the figures that the paper draws of them."""

import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import stats
from torch import nn
from torch.utils.hooks import RemovableHandle

from .adapter import SaraAdapter
from .arguments import SaraArguments, parse_layers
from .base_model import open_model
from .carrier import unwrap
from .figures import finish, new_panels
from .planning import Plan, plan
from .sites import AnySite, PlannedSite, Site, sites_by_kind
from .spectrum import check_threshold, find_spectrum
from .spread import with_values_of_others
from .targets import find_sites

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The largest number of layers whose numbers stand at the side of a heat map. More of them would overlap.
MAX_LAYER_LABELS = 16
# The distance between two numbers on an axis is one of these factors times a power of ten.
STEPS = (1, 2, 5, 10)


def _rows(sites: Sequence[AnySite]) -> dict[str, list[AnySite]]:
    """`sites_by_kind` of sites to compare by layers, which have to be in one."""
    outside = [site.name for site in sites if site.layer is None]
    if outside:
        raise ValueError(f"{outside[0]} is in no numbered layer. Leave it out of target_modules to compare layers.")
    return sites_by_kind(sites)


def _layers(row: Sequence[Site]) -> list[int]:
    """The layers of sites that `_rows` has checked."""
    return [site.layer for site in row if site.layer is not None]


@dataclass
class RankCurves:
    """
    Ranks over the layers, by threshold, per kind of site. `RankCurves(**curves.to_dict())` makes an equal object.

    Args:
        thresholds (`list[float]`): The thresholds.
        layers (`dict[str, list[int]]`): Per kind, the layers that have such a site, counted from 0 as in the model.
        ranks (`dict[str, np.ndarray]`): Per kind, the ranks k, of shape (thresholds, layers).
    """

    thresholds: list[float]
    layers: dict[str, list[int]]
    ranks: dict[str, np.ndarray]

    def __post_init__(self):
        self.ranks = {kind: np.asarray(k) for kind, k in self.ranks.items()}

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {**asdict(self), "ranks": {kind: k.tolist() for kind, k in self.ranks.items()}}

    def mean_ranks(self, threshold: float) -> dict[int, float]:
        """The mean k of each layer's sites at one of the thresholds."""
        if threshold not in self.thresholds:
            raise ValueError(f"threshold={threshold} is none of the curves' thresholds {self.thresholds}.")
        row = self.thresholds.index(threshold)
        found: dict[int, list[int]] = defaultdict(list)
        for kind, layers in self.layers.items():
            for layer, k in zip(layers, self.ranks[kind][row].tolist(), strict=True):
                found[layer].append(k)
        return {layer: sum(ranks) / len(ranks) for layer, ranks in sorted(found.items())}


def rank_curves(
    model: nn.Module | str | os.PathLike | Plan,
    thresholds: Sequence[float] | None = None,
    args: SaraArguments | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> RankCurves:
    """
    Find the rank k of every site at each of several thresholds. These are the data of the paper's Figures 2 and 8.

    Args:
        model ([`~transformers.PreTrainedModel`], `str`, `os.PathLike` or [`Plan`]): A model with its weights loaded,
            or the folder or Hub id of a model in safetensors files, from which one matrix at a time is read. A plan
            has its ranks already, at its own threshold, so nothing else is given with it.
        thresholds (`Sequence[float]`, *optional*): Thresholds with 0 < threshold <= 1. Each matrix is factorised once
            for all of them, and its singular values are kept in the cache. If they are left out, the threshold is that
            of `args`, whose `parameter_budget` is solved.
        args ([`SaraArguments`], *optional*): `target_modules`, `exclude_modules` and `layers` choose the sites. They
            default to the query and value projections of all layers. A `threshold` is read only if `thresholds` is
            left out.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        token (`str`, *optional*): Access token for private repositories.

    Returns:
        [`RankCurves`]: One curve per threshold and kind of site.

    Raises:
        `FileNotFoundError`: If there is no such folder or repository, or it has no safetensors files.
        `ValueError`: For thresholds out of range or beside a budget or a plan, sites that do not exist or are in no
            layer, and weights without a rank.
    """
    if isinstance(model, Plan):
        if thresholds is not None or args is not None:
            raise ValueError(
                f"A plan has ranks at its own threshold {model.threshold:.6g} only, so thresholds and args cannot be "
                "given with it. Give the model in place of the plan."
            )
        return _curves([model.threshold], _rows(model.sites), {site: [site.k] for site in model.sites})
    model = unwrap(model) if isinstance(model, nn.Module) else model
    if thresholds is None and args is not None:
        return rank_curves(plan(model, args, revision, token))
    thresholds = [] if thresholds is None else [float(threshold) for threshold in thresholds]
    if not thresholds:
        raise ValueError(
            "thresholds is empty. Give at least one, such as [0.1, 0.5, 0.9], or args without thresholds."
        )
    for threshold in thresholds:
        check_threshold(threshold)
    args = args or SaraArguments()
    if args.parameter_budget is not None:
        raise ValueError(
            f"thresholds={thresholds} and parameter_budget={args.parameter_budget!r} exclude each other: the budget "
            "solves the threshold. Give one of them."
        )
    with with_values_of_others(model, f"ranks {args}") if isinstance(model, nn.Module) else nullcontext():
        base, weights = open_model(model, revision, token)
        sites = find_sites(base, args)

        def ranks(site: Site, weight: torch.Tensor) -> list[int]:
            # It is accurate enough to decide the ranks at these thresholds beyond doubt.
            spectrum = find_spectrum(weight, site.name, thresholds=thresholds)
            return [spectrum.count(threshold) for threshold in thresholds]

        found = weights.for_each(ranks, sites, "Singular values")
    return _curves(thresholds, _rows(sites), dict(zip(sites, found, strict=True)))


def _curves(
    thresholds: list[float], kinds: Mapping[str, Sequence[AnySite]], ranks: Mapping[AnySite, list[int]]
) -> RankCurves:
    return RankCurves(
        thresholds,
        {kind: _layers(row) for kind, row in kinds.items()},
        {kind: np.array([ranks[site] for site in row]).T for kind, row in kinds.items()},
    )


@dataclass
class Routing:
    """
    A router's gates over the layers, per kind of site. `Routing(**routing.to_dict())` makes an equal object.

    Args:
        layers (`dict[str, list[int]]`): Per kind, the layers that have such a site, counted from 0 as in the model.
        gates (`dict[str, np.ndarray]`): Per kind, the mean gates, of shape (layers, heads). Each row sums to 1.
    """

    layers: dict[str, list[int]]
    gates: dict[str, np.ndarray]

    def __post_init__(self):
        self.gates = {kind: np.asarray(gates) for kind, gates in self.gates.items()}

    @property
    def highest(self) -> float:
        """The largest of the gates."""
        return max(float(gates.max()) for gates in self.gates.values())

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {**asdict(self), "gates": {kind: gates.tolist() for kind, gates in self.gates.items()}}


@torch.no_grad()
def routing(model: nn.Module, batch: Mapping[str, Any], adapter_name: str | None = None) -> Routing:
    """
    Measure how the router of a Mo-SARA adapter mixes its heads. One forward pass in evaluation mode gives the gates,
    which are averaged over batch and length, without padding. These are the data of the paper's Figure 7 and appendix
    D. The model is left as it was.

    Args:
        model ([`~transformers.PreTrainedModel`]): A model that carries a Mo-SARA adapter with several heads.
        batch (`Mapping[str, Any]`): The model's inputs, on its device. Positions where `attention_mask`, of shape
            (batch, length), is 0 are padding. Without a mask, all positions count.
        adapter_name (`str`, *optional*): Name of the adapter, if the model carries several. Defaults to the first.

    Returns:
        [`Routing`]: Per kind of site, a row per layer and a column per head.

    Raises:
        `ValueError`: If the model has no such adapter, the adapter has no router, or the mask does not fit the inputs.
    """
    model = unwrap(model)
    adapter = _routed_adapter(model, adapter_name)
    kinds = _rows(adapter.sites)
    mask = batch.get("attention_mask")
    kept = None if mask is None else mask.flatten().bool()
    totals: dict[PlannedSite, torch.Tensor] = {}
    counts: dict[PlannedSite, int] = defaultdict(int)

    def watch(site: PlannedSite) -> RemovableHandle:
        delta: Any = adapter.delta(site)

        def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs[0].shape[-1] != site.shape[0]:
                raise ValueError(f"{site.name} gets a part of its input. Measure this without tensor parallelism.")
            gates = delta.gates(inputs[0]).flatten(0, -2)
            if mask is not None and kept is not None:
                if len(kept) != len(gates):
                    raise ValueError(
                        f"attention_mask of shape {tuple(mask.shape)} does not fit the {len(gates)} positions that "
                        f"{site.name} sees. Give the mask of the inputs, of shape (batch, length)."
                    )
                gates = gates[kept.to(gates.device)]
            totals[site] = totals.get(site, 0.0) + gates.cpu().double().sum(0)
            counts[site] += len(gates)

        return model.get_submodule(site.module).register_forward_pre_hook(before)

    modes = [(module, module.training) for module in model.modules()]
    hooks = [watch(site) for site in adapter.sites]
    try:
        model.eval()(**batch)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    unused = [site.name for site in adapter.sites if not counts[site]]
    if unused:
        raise ValueError(f"{unused[0]} saw no token of this batch, so its router has no mean.")
    return Routing(
        {kind: _layers(row) for kind, row in kinds.items()},
        {kind: np.stack([(totals[site] / counts[site]).numpy() for site in row]) for kind, row in kinds.items()},
    )


def _routed_adapter(model: Any, name: str | None) -> SaraAdapter:
    adapter = SaraAdapter.of(model, name)
    if adapter is None:
        wanted = "adapter" if name is None else f"adapter {name!r}"
        raise ValueError(f"The model carries no {wanted}. Attach or load a Mo-SARA adapter first.")
    method = adapter.spec.method
    if method.router_heads is None:
        raise ValueError(
            f"The adapter {adapter.name!r} is {method.title}, which has no router; only Mo-SARA's has gates."
        )
    if method.router_heads == 1:
        raise ValueError(f"The adapter {adapter.name!r} has one head, so it has no router: its only gate is 1.")
    if model.config.is_encoder_decoder:
        # One attention_mask cannot describe the padding of both the encoder and the decoder.
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; routing reads models with one sequence.")
    return adapter


@dataclass
class Correlation:
    """
    The correlation of ranks with scores of groups of layers.

    Args:
        groups (`list[str]`): The groups of layers, such as `"0-7"`.
        ranks (`list[float]`): Mean k of each group.
        scores (`list[float]`): Score of each group.
        pearson (`float`, *optional*): Pearson's r; `None` where ranks or scores are all the same.
        spearman (`float`, *optional*): Spearman's rho, which is Pearson's r of the positions in order; `None` where
            `pearson` is.
    """

    groups: list[str]
    ranks: list[float]
    scores: list[float]
    pearson: float | None
    spearman: float | None

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)


def rank_correlation(
    ranks: RankCurves | Mapping[int, float], scores: Mapping[str | int, float], threshold: float | None = None
) -> Correlation:
    """
    Correlate the ranks with scores of layers, such as the accuracies of the paper's Figure 3, for which each of the
    groups 0-7, 8-15, 16-23 and 24-31 is trained alone.

    Args:
        ranks ([`RankCurves`] or `Mapping[int, float]`): k per layer. Curves are averaged over the sites of a layer.
        scores (`Mapping[str | int, float]`): Score per layer or group of layers: `{"0-7": 0.42, "8-15": 0.45, ...}`.
        threshold (`float`, *optional*): The threshold of the curves to take, if they have several.

    Returns:
        [`Correlation`]: The mean k and the score of each group, and how they correlate.

    Raises:
        `ValueError`: For layers without a rank, fewer than three groups, and a threshold that the curves lack.
    """
    if isinstance(ranks, RankCurves):
        if threshold is None and len(ranks.thresholds) > 1:
            raise ValueError(f"The curves have the thresholds {ranks.thresholds}. Choose one of them.")
        ranks = ranks.mean_ranks(ranks.thresholds[0] if threshold is None else threshold)
    if len(scores) < 3:
        raise ValueError(f"There are {len(scores)} scores, but fewer than three say nothing about a correlation.")
    means = []
    for group in scores:
        layers = parse_layers(str(group))
        missing = sorted(layers - set(ranks))
        if missing:
            raise ValueError(f"scores has {group!r}, but there is no rank for the layers {missing}.")
        means.append(sum(ranks[layer] for layer in layers) / len(layers))
    values = [float(score) for score in scores.values()]
    varied = len(set(means)) > 1 and len(set(values)) > 1
    pearson, spearman = (
        float(test(means, values).statistic) if varied else None for test in (stats.pearsonr, stats.spearmanr)
    )
    return Correlation([str(group) for group in scores], means, values, pearson, spearman)


def plot_rank_curves(curves: RankCurves, path: str | os.PathLike | None = None, title: str | None = None) -> "Figure":
    """
    Draw k over the layers, a panel per kind of site and a line per threshold, as in the paper's Figures 2 and 8.

    Args:
        curves ([`RankCurves`]): The curves to draw.
        path (`str` or `os.PathLike`, *optional*): Image file to write; its ending gives the format.
        title (`str`, *optional*): Title above the panels.

    Returns:
        `matplotlib.figure.Figure`: The figure.

    Raises:
        `ImportError`: If matplotlib is not installed.
    """
    figure, panels = new_panels(list(curves.ranks), width=4.6, height=4.2)
    from matplotlib import colormaps

    # Thresholds have an order, so their colours have one too. The map's lightest colours are left out, because they
    # are hard to see on white.
    order = np.argsort(curves.thresholds)
    colours = colormaps["viridis"](np.linspace(0.0, 0.9, len(order)))
    for kind, axes in panels.items():
        lines = [
            axes.plot(curves.layers[kind], curves.ranks[kind][row], "o-", ms=3, color=colour, clip_on=False)[0]
            for row, colour in zip(order, colours, strict=True)
        ]
        axes.set(title=kind, xlabel="layer", ylabel="rank k")
        _rank_axes(axes)
    # The legend lists the lines from the top down, as they lie in the panels.
    labels = [f"{curves.thresholds[row]:g}" for row in order]
    figure.legend(lines[::-1], labels[::-1], title="threshold", loc="outside center right")  # type: ignore[call-overload]  # matplotlib lacks "outside"
    return finish(figure, path, title)


def plot_routing(
    routing: Routing,
    path: str | os.PathLike | None = None,
    title: str | None = None,
    highest: float | None = None,
) -> "Figure":
    """
    Draw the gates as heat maps, a panel per kind of site on one colour scale from 0, with a row per layer and a column
    per head, as in the paper's Figure 7 and appendix D.

    Args:
        routing ([`Routing`]): The gates to draw.
        path (`str` or `os.PathLike`, *optional*): Image file to write; its ending gives the format.
        title (`str`, *optional*): Title above the panels.
        highest (`float`, *optional*): The upper end of the colour scale, for figures that share one. Defaults to the
            largest gate.

    Returns:
        `matplotlib.figure.Figure`: The figure.

    Raises:
        `ImportError`: If matplotlib is not installed.
    """
    longest = max(len(layers) for layers in routing.layers.values())
    figure, panels = new_panels(list(routing.gates), width=3.4, height=2.2 + 0.13 * longest)
    highest = routing.highest if highest is None else highest
    for kind, axes in panels.items():
        layers, gates = routing.layers[kind], routing.gates[kind]
        image = axes.imshow(gates, vmin=0.0, vmax=highest, cmap="viridis", aspect="auto", interpolation="nearest")
        labelled = range(0, len(layers), math.ceil(len(layers) / MAX_LAYER_LABELS))
        axes.set_yticks(labelled, [str(layers[row]) for row in labelled])
        axes.set_xticks(range(gates.shape[1]))
        axes.set(title=kind, xlabel="head", ylabel="layer")
    figure.colorbar(image, ax=list(panels.values()), label="gate, mean over tokens")
    return finish(figure, path, title)


def plot_correlation(
    correlation: Correlation, ylabel: str, path: str | os.PathLike | None = None, title: str | None = None
) -> "Figure":
    """
    Draw the score of each group of layers over its mean k, with the correlations above.

    Args:
        correlation ([`Correlation`]): The correlation to draw.
        ylabel (`str`): Name of the score, with its unit: `"accuracy (%)"`.
        path (`str` or `os.PathLike`, *optional*): Image file to write; its ending gives the format.
        title (`str`, *optional*): Title.

    Returns:
        `matplotlib.figure.Figure`: The figure.

    Raises:
        `ImportError`: If matplotlib is not installed.
    """
    figure, panels = new_panels([""], width=6.4, height=4.2)
    axes = panels[""]
    axes.plot(correlation.ranks, correlation.scores, "o")
    points = sorted(zip(correlation.ranks, correlation.scores, correlation.groups, strict=True))
    for index, (k, score, group) in enumerate(points):
        # The names stand above and below the points in turn, so that those of neighbours do not overlap.
        axes.annotate(group, (k, score), xytext=(0, -16 if index % 2 else 6), textcoords="offset points", ha="center")
    axes.margins(0.12)
    pearson, spearman = (
        "undefined" if value is None else f"{value:.2f}" for value in (correlation.pearson, correlation.spearman)
    )
    found = f"Pearson r = {pearson}, Spearman rho = {spearman} (n = {len(points)})"
    axes.set(title=found, xlabel="mean rank k", ylabel=ylabel)
    axes.ticklabel_format(useOffset=False)
    axes.grid(alpha=0.3)
    return finish(figure, path, title)


def _rank_axes(axes: "Axes") -> None:
    """Number the axes by whole layers and whole ranks. The 0 at the bottom has no number, because k is at least 1."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=STEPS))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, steps=STEPS, prune="lower"))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
