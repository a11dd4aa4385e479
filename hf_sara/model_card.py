"""The model card of an adapter: generated, with the text that a person wrote around the generated part kept.

A card is YAML metadata and Markdown. The generated Markdown stands between two marks; what is outside of them belongs
to the people who write there, and so do metadata that this module does not set.
"""

import importlib.util
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from . import storage
from .arguments import SaraArguments
from .sites import sites_by_kind

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from .adapter import SaraAdapter

CARD_FILE = "README.md"
PLOT_FILE = "ranks.png"
BEGIN = "<!-- hf_sara: generated from here, written anew at every save -->"
END = "<!-- hf_sara: generated up to here -->"
MAX_LOG_ROWS = 30

METHODS = {
    "sara": (
        "SARA",
        "a low-rank update `U diag(S) Vh` beside each weight, its rank read from the weight's singular values.",
        "The update is a plain low-rank product; it can be merged, or exported to PEFT's LoRA format.",
    ),
    "mo_sara": (
        "Mo-SARA",
        "trained vectors of singular values, mixed per token by a router, between a weight's frozen singular vectors.",
        "With more than one head the update depends on the token, so it cannot be merged into the weights.",
    ),
}
PIPELINES = {
    "CausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ConditionalGeneration": "text-generation",
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
    "QuestionAnswering": "question-answering",
    "MaskedLM": "fill-mask",
    "ImageClassification": "image-classification",
}
# Arguments of a training that say where and how it was run, not what it computed, or could hold a secret.
UNINTERESTING = re.compile(
    "output_dir|logging_|report_to|run_name|disable_tqdm|hub_|push_to_hub|log_|save_|dataloader_|project|trackio"
    "|local_rank|resume|do_|skip_memory|use_cpu|eval_|load_best|accelerator_config|deepspeed|fsdp|ddp_|debug"
    # Masked, whatever their value.
    "|.*_token$"
)


@dataclass
class Training:
    """
    What a training leaves for its card.

    Args:
        hyperparameters (`dict[str, Any]`): Settings that differ from their defaults.
        log (`list[dict[str, float]]`): Rows of a Trainer's `log_history`.
        seconds (`float`): Duration.
        datasets (`list[str]`): Names of the data.
    """

    hyperparameters: dict[str, Any] = field(default_factory=dict)
    log: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    datasets: list[str] = field(default_factory=list)


def non_default(args: "TrainingArguments") -> dict[str, Any]:
    """The training arguments that differ from their defaults and that a reader of the card cares about."""
    # The declared defaults, not a new instance: making one is refused where the defaults do not suit this machine, and
    # resets the state that Accelerate keeps for a training that goes on.
    default = {
        item.name: item.default if item.default_factory is MISSING else item.default_factory() for item in fields(args)
    }
    values = args.to_dict()
    if args.max_steps > 0:
        # The steps count, and the epochs are nothing that was done.
        del values["num_train_epochs"]
    return {
        name: value
        for name, value in values.items()
        # Some that are declared None become False, or an empty list.
        if (default[name] or None) != (value or None) and not UNINTERESTING.match(name) and not name.startswith("_")
    }


def make_card(
    adapter: "SaraAdapter",
    *,
    folder: str | os.PathLike | None = None,
    repo_id: str | None = None,
    title: str | None = None,
    base_model: str | None = None,
    language: str | Sequence[str] | None = None,
    license: str | None = None,
    tags: str | Sequence[str] = (),
    datasets: str | Sequence[str] = (),
    results: Sequence[EvalResult] = (),
    training: Training | None = None,
    existing: str | None = None,
) -> str:
    """
    The text of an adapter's model card.

    Args:
        adapter ([`SaraAdapter`]): The adapter.
        folder (`str` or `os.PathLike`, *optional*): Where its files are: gives the size, and receives the plot of
        ranks
            if matplotlib is installed.
        repo_id (`str`, *optional*): Where it will be, for the snippet.
        title (`str`, *optional*): Heading; defaults to the name of the repository.
        base_model (`str`, *optional*): Hub id of the base; defaults to the recorded one, where that is a Hub id.
        language (`str` or `Sequence[str]`, *optional*): Language codes.
        license (`str`, *optional*): License identifier.
        tags (`str` or `Sequence[str]`, *optional*): Tags besides hf_sara's own.
        datasets (`str` or `Sequence[str]`, *optional*): Names of the data; Hub ids go to the metadata too.
        results (`Sequence[EvalResult]`, *optional*): Evaluation results for the metadata and the table.
        training ([`Training`], *optional*): How it was trained.
        existing (`str`, *optional*): An earlier card, whose text and metadata by people are kept.

    Returns:
        `str`: The card.
    """
    name, method_text, method_limit = METHODS[adapter.args.method]
    base = base_model or storage.describe_base(adapter.model)["model_id"]
    title = title or (repo_id or f"{name} adapter").rsplit("/", 1)[-1]
    pipeline = pipeline_of(storage.class_of(adapter.model).__name__)
    datasets = [*_listed(datasets), *(training.datasets if training else [])]
    data = ModelCardData(
        base_model=base,
        library_name="hf_sara",
        tags=["hf_sara", adapter.args.method, *_listed(tags), *_listed(getattr(adapter.model, "model_tags", None))],
        pipeline_tag=pipeline,
        license=license,
        language=list(_listed(language)) or None,
        datasets=[name for name in datasets if storage.hub_id(name)] or None,
        metrics=sorted({result.metric_type for result in results}) or None,
        eval_results=list(results) or None,
        model_name=title if results else None,
    )
    metadata = {key: value for key, value in data.to_dict().items() if value is not None}
    if base is not None:
        metadata["base_model_relation"] = "adapter"
    plan = adapter.plan()
    ranks = [site.k for site in adapter.sites]
    size = storage.size_on_disk(folder) if folder is not None else 0
    has_plot = folder is not None and plot_ranks(adapter, Path(folder, PLOT_FILE))
    hyperparameters = training.hyperparameters if training else {}
    columns, rows = _log_table(training.log if training else [])
    body = _render(
        title=_inline(title),
        method_name=name,
        method_text=method_text,
        base_text=f"[{base}](https://huggingface.co/{base})" if base else "a base model of your own",
        threshold=f"{adapter.threshold:.6g}",
        site_count=len(ranks),
        k_range=f"{min(ranks)} to {max(ranks)} (mean {sum(ranks) / len(ranks):.1f})",
        trained=f"{plan.trained_parameters:,}",
        share=f"{100 * plan.share:.4g}",
        size=f"{size:,} bytes" if size else "not saved yet",
        arguments=_cells(_non_default_arguments(adapter.args)),
        results=[
            tuple(map(_inline, (r.dataset_name, r.metric_name or r.metric_type, _number(r.metric_value))))
            for r in results
        ],
        snippet=snippet(repo_id or "path/to/this/adapter", base, pipeline),
        plot=PLOT_FILE if has_plot else None,
        **_rank_table(adapter),
        training=training,
        datasets=[_inline(name) for name in datasets],
        hyperparameters=_cells(hyperparameters),
        log_columns=columns,
        log_rows=rows,
        duration=_duration(training.seconds if training else 0.0),
        hardware=_inline(hardware()),
        versions=_inline(", ".join(f"{key} {value}" for key, value in storage.versions().items())),
        base_limit=(
            "It works on the base model that it was trained on, and is checked against it when it is loaded."
            if adapter.args.method == "mo_sara"
            else "It works on the base model that it was trained on."
        ),
        method_limit=method_limit,
    )
    return _join(metadata, body, existing)


def pipeline_of(class_name: str) -> str | None:
    """The Hub's task for a model class, or `None`."""
    return next((task for ending, task in PIPELINES.items() if class_name.endswith(ending)), None)


def snippet(repo_id: str, base: str | None, pipeline: str | None) -> str:
    """Code that loads and uses an adapter; a test runs it."""
    own = "" if base else ', base_model="path/to/the/base"'
    source = base or "path/to/the/base"
    lines = ["from hf_sara import from_hub", "", f'model = from_hub("{repo_id}"{own})']
    if pipeline == "text-generation":
        lines[0] = "from transformers import AutoTokenizer\n\nfrom hf_sara import from_hub"
        lines += [
            f'tokenizer = AutoTokenizer.from_pretrained("{source}")',
            'inputs = tokenizer("Once upon a time", return_tensors="pt").to(model.device)',
            "output = model.generate(**inputs, max_new_tokens=20)",
            "print(tokenizer.decode(output[0], skip_special_tokens=True))",
        ]
    return "\n".join(lines)


def hardware() -> str:
    """What this machine computes with."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' * (threads > 1)} of {os.cpu_count()} CPU cores ({_processor()})"


def _processor() -> str:
    """The processor's name where the system tells it, or its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


def plot_ranks(adapter: "SaraAdapter", path: Path) -> bool:
    """Draw the rank of each site over the layers into a PNG file; `False` where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    # Without pyplot, so that no window system and no global state is touched.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), dpi=110, layout="constrained")
    axes = figure.subplots()
    for kind, sites in sites_by_kind(adapter.sites).items():
        axes.plot([site.layer or 0 for site in sites], [site.k for site in sites], marker="o", ms=3, label=kind)
    axes.set(xlabel="layer", ylabel="rank k", title=f"Ranks at threshold {adapter.threshold:.4g}")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, metadata={"Software": None})
    return True


def _rank_table(adapter: "SaraAdapter") -> dict[str, Any]:
    """A row per layer and a column per kind of site. Several sites in one cell stand side by side."""
    kinds = sites_by_kind(adapter.sites)
    layers = sorted({site.layer for site in adapter.sites}, key=lambda layer: (layer is None, layer))
    rows = [
        ["-" if layer is None else layer]
        + [" ".join(str(site.k) for site in sites if site.layer == layer) for sites in kinds.values()]
        for layer in layers
    ]
    return {"rank_columns": ["layer", *map(_inline, kinds)], "rank_rows": rows}


def _log_table(log: Sequence[Mapping[str, float]]) -> tuple[list[str], list[list[str]]]:
    """Losses and evaluation metrics by step, thinned to MAX_LOG_ROWS rows; rows of one step become one."""
    skip = re.compile("epoch|step|.*(runtime|per_second|flos)$|grad_norm|learning_rate|train_loss|num_input")
    steps: dict[int, dict[str, float]] = {}
    for row in log:
        values = {key: value for key, value in row.items() if not skip.match(key)}
        if values:
            steps.setdefault(int(row.get("step", 0)), {}).update(values)
    names = list(dict.fromkeys(key for values in steps.values() for key in values))
    chosen = sorted(steps)
    if len(chosen) > MAX_LOG_ROWS:
        chosen = [chosen[round(i * (len(chosen) - 1) / (MAX_LOG_ROWS - 1))] for i in range(MAX_LOG_ROWS)]
    rows = [
        [str(step), *(_number(steps[step][name]) if name in steps[step] else "" for name in names)] for step in chosen
    ]
    return ["step", *map(_inline, names)], rows


def _non_default_arguments(args: SaraArguments) -> dict[str, Any]:
    default = SaraArguments(method=args.method).to_dict()
    shown = ("method", "threshold")
    values = {key: value for key, value in args.to_dict().items() if key not in shown and default[key] != value}
    # The number of heads is what a reader of a Mo-SARA card looks for.
    return {**({"num_heads": args.num_heads} if args.method == "mo_sara" else {}), **values}


def _render(**values: Any) -> str:
    import jinja2

    template = resources.files("hf_sara").joinpath("templates/model_card.md").read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(template).render(**values)


def _join(metadata: dict[str, Any], body: str, existing: str | None) -> str:
    """Metadata and generated text, around which the text and the metadata of an existing card are kept."""
    before, after, theirs = "", "", {}
    if existing:
        card = ModelCard(existing, ignore_metadata_errors=True)
        theirs = card.data.to_dict()
        before, after = own_text(card.text)
    tags = list(dict.fromkeys([*_listed(theirs.get("tags")), *metadata["tags"]]))
    kept = {key: value for key, value in theirs.items() if value is not None and key not in metadata}
    data = ModelCardData(**{**kept, **metadata, "tags": tags}, ignore_metadata_errors=True)
    parts = [part for part in (before, f"{BEGIN}\n\n{body.strip()}\n\n{END}", after) if part]
    return f"---\n{data.to_yaml().strip()}\n---\n\n" + "\n\n".join(parts) + "\n"


def take_over(card: str, other: str) -> str:
    """A card with what people wrote on another version of it, where nobody wrote on this one."""
    mine = ModelCard(card, ignore_metadata_errors=True)
    if any(own_text(mine.text)):
        return card
    generated = mine.text.split(BEGIN, 1)[-1].split(END, 1)[0]
    metadata = {key: value for key, value in mine.data.to_dict().items() if value is not None}
    return _join({"tags": [], **metadata}, generated, other)


def own_text(text: str) -> tuple[str, str]:
    """What people wrote before and after the generated part of a card's Markdown."""
    if BEGIN in text and END in text[text.index(BEGIN) :]:
        before, rest = text.split(BEGIN, 1)
        return before.strip(), rest.split(END, 1)[1].strip()
    return text.strip(), ""


def _listed(value: str | Sequence[str] | None) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


def _inline(value: Any) -> str:
    """Text that cannot leave its table cell or line, whatever characters it has."""
    text = " ".join(str(value).split())
    text = text.replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([|`*_\[\]])", r"\\\1", text)


def _cells(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(_inline(name), _inline(_number(value))) for name, value in values.items()]


def _number(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
