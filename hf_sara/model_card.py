"""The model card of an adapter: its metadata, its tables and its figures."""

import functools
import importlib.util
import json
import logging
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from .arguments import SaraArguments
from .card_metadata import accepted, is_repo
from .card_text import BEGIN, cells, decode, duration, fenced, inline, join_card, listed, number
from .figures import new_figure, png_of
from .files import write_file
from .manifest import Manifest
from .own_tokenizer import has_own_tokenizer
from .parts import count
from .planning import AdapterSpec
from .publishing import published, published_log
from .repos import hub_id
from .sites import PlannedSite
from .storage import size_on_disk

CARD_FILE = "README.md"
RANKS_FILE = "ranks.png"
LOSS_FILE = "sara_loss.png"
PROJECT_URL = "https://pypi.org/project/hf-sara/"
MAX_LOG_ROWS = 30

logger = logging.getLogger(__name__)

PIPELINES = {
    "CausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ConditionalGeneration": "text-generation",
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
    "QuestionAnswering": "question-answering",
    "MaskedLM": "fill-mask",
    "ImageClassification": "image-classification",
    "AudioClassification": "audio-classification",
    "VideoClassification": "video-classification",
}
# A card names the versions of these packages, as far as they are installed, because results may depend on them.
FRAMEWORKS = ("hf_sara", "transformers", "torch", "accelerate", "datasets", "tokenizers", "safetensors", "peft", "trl")


@dataclass
class Training:
    """
    The facts about a training that its card shows.

    Args:
        hyperparameters (`dict[str, Any]`): Settings that differ from their defaults.
        log (`list[dict[str, float]]`): Rows of a Trainer's `log_history`.
        seconds (`float`): Duration.
        datasets (`list[str]`): Names of the data.
        left_out (`int`): How many settings are not shown, because they may hold a path or a secret.
        others (`int`): How many other adapters the same run trained.
    """

    hyperparameters: dict[str, Any] = field(default_factory=dict)
    log: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    datasets: list[str] = field(default_factory=list)
    left_out: int = 0
    others: int = 0

    def losses(self) -> list[tuple[int, float]]:
        """The step and the training loss of each row that has one."""
        return [(int(row["step"]), float(row["loss"])) for row in self.log if "loss" in row and "step" in row]


@dataclass(frozen=True)
class Sample:
    """
    One input of the task, and the output of the trained model for it.

    Args:
        prompt (`str`): The input.
        output (`str`): The output.
    """

    prompt: str
    output: str


def has_generated_card(folder: str | os.PathLike) -> bool:
    """Whether a folder has a card with a generated part, which describes one adapter and no other."""
    path = Path(folder, CARD_FILE)
    return path.is_file() and BEGIN in decode(path.read_bytes())


def write_card(
    folder: str | os.PathLike,
    manifest: Manifest,
    base_parameters: int,
    *,
    training: Training | None = None,
    **card: Any,
) -> None:
    """
    Draw the figures of an adapter's card into its folder, and write the card beside them. The text that people wrote
    on a card in the folder is kept.

    Args:
        folder (`str` or `os.PathLike`): The folder of the adapter's files.
        manifest ([`~hf_sara.manifest.Manifest`]): The adapter.
        base_parameters (`int`): Parameters of the base model.
        training ([`Training`], *optional*): The facts about the training.
        card: Passed on to [`make_card`].
    """
    folder = Path(folder)
    figures = {}
    if importlib.util.find_spec("matplotlib") is not None:
        figures[RANKS_FILE] = _draw_ranks(manifest.threshold, tuple(manifest.sites))
        # Fewer than two points make no curve.
        if training is not None and len(training.losses()) > 1:
            figures[LOSS_FILE] = _draw_loss(tuple(training.losses()))
    for name, picture in figures.items():
        write_file(folder / name, picture)
    if LOSS_FILE not in figures:
        # A curve of an earlier training is not this adapter's.
        (folder / LOSS_FILE).unlink(missing_ok=True)
    path = folder / CARD_FILE
    text = make_card(
        manifest,
        base_parameters,
        training=training,
        size=size_on_disk(folder),
        own_tokenizer=has_own_tokenizer(folder, manifest.base),
        figures=list(figures),
        existing=decode(path.read_bytes()) if path.is_file() else None,
        **card,
    )
    write_file(path, text.encode())


def make_card(
    manifest: Manifest,
    base_parameters: int,
    *,
    size: int = 0,
    own_tokenizer: bool = False,
    figures: Sequence[str] = (),
    repo_id: str | None = None,
    title: str | None = None,
    base_model: str | None = None,
    language: str | Sequence[str] | None = None,
    license: str | None = None,
    tags: str | Sequence[str] = (),
    datasets: str | Sequence[str] = (),
    results: Sequence[EvalResult] = (),
    training: Training | None = None,
    sample: Sample | None = None,
    existing: str | None = None,
) -> str:
    """
    The text of an adapter's model card.

    Args:
        manifest ([`~hf_sara.manifest.Manifest`]): The adapter.
        base_parameters (`int`): Parameters of the base model, for the share that is trained.
        size (`int`, *optional*): Bytes of the adapter's files; 0 if it is not saved.
        own_tokenizer (`bool`, *optional*): Whether a tokenizer that is not the base's lies beside the card.
        figures (`Sequence[str]`, *optional*): Which of `RANKS_FILE` and `LOSS_FILE` lie beside the card.
        repo_id (`str`, *optional*): The repository from which the snippet loads the adapter.
        title (`str`, *optional*): Heading; defaults to the name of the repository.
        base_model (`str`, *optional*): Hub id of the base; defaults to the recorded one, if that has a Hub id.
        language (`str` or `Sequence[str]`, *optional*): Language codes.
        license (`str`, *optional*): License identifier.
        tags (`str` or `Sequence[str]`, *optional*): Tags besides hf_sara's own.
        datasets (`str` or `Sequence[str]`, *optional*): Names of the data; Hub ids go to the metadata too.
        results (`Sequence[EvalResult]`, *optional*): Evaluation results for the metadata and the table.
        training ([`Training`], *optional*): The facts about the training.
        sample ([`Sample`], *optional*): An input of the task for the snippet, and its output.
        existing (`str`, *optional*): An earlier card. The text and the metadata that people wrote on it are kept.

    Returns:
        `str`: The card.
    """
    method = manifest.method
    base = base_model or manifest.base.model_id
    if base is not None and not is_repo(base):
        logger.warning("The card does not name the base model %s, because it is not a name on the Hub.", base)
        base = None
    title = published(str(title or (repo_id or f"{method.title} adapter").rsplit("/", 1)[-1]))
    pipeline = pipeline_of(manifest.base.class_name)
    given = [*listed(datasets), *(training.datasets if training else [])]
    datasets = published(given)
    results = [replace(result, **published(vars(result))) for result in results]
    index, metrics = _reported(title, results)
    metadata = {
        "base_model": base,
        "base_model_relation": "adapter" if base else None,
        "library_name": "hf_sara",
        "license": published(license),
        "language": published(listed(language)),
        # A file of this machine has lost its path, and what is left of it is no name on the Hub.
        "datasets": [name for name in datasets if name in given and is_repo(name) and hub_id(name)],
        "metrics": metrics,
        "pipeline_tag": pipeline,
        "tags": ["hf_sara", manifest.args.method, *published(listed(tags))],
        "model-index": index,
    }
    metadata = {key: value for key, value in metadata.items() if value}
    ranks = [site.k for site in manifest.sites]
    trained = manifest.trained_parameters
    log_columns, log_rows = _log_table(published_log(training.log) if training else [])
    rank_columns, rank_rows = manifest.rank_table()
    body = _render(
        title=inline(title),
        method_name=method.title,
        method_text=method.summary,
        project_url=PROJECT_URL,
        base_text=f"[{base}](https://huggingface.co/{base})" if base else "a base model of your own",
        threshold=f"{manifest.threshold:.6g}",
        site_count=len(ranks),
        k_range=f"{min(ranks)} to {max(ranks)} (mean {sum(ranks) / len(ranks):.1f})",
        beside=[f"{inline(part.name)}: {part.title}, {count(part):,} parameters" for part in manifest.parts],
        trained=f"{trained:,}",
        share=f"{100 * trained / (base_parameters + trained):.4g}",
        size=f"{size:,} bytes" if size else "not saved yet",
        arguments=cells(_shown_arguments(manifest.args)),
        results=[
            tuple(map(inline, (r.dataset_name, r.metric_name or r.metric_type, number(r.metric_value))))
            for r in results
        ],
        snippet=snippet(
            repo_id or "path/to/this/adapter", base, pipeline, sample.prompt if sample else None, own_tokenizer
        ),
        sample_output=fenced(sample.output) if sample else None,
        ranks_figure=RANKS_FILE if RANKS_FILE in figures else None,
        loss_figure=LOSS_FILE if LOSS_FILE in figures else None,
        rank_columns=list(map(inline, rank_columns)),
        rank_rows=rank_rows,
        training=training,
        datasets=[inline(name) for name in datasets],
        hyperparameters=cells(published(training.hyperparameters) if training else {}),
        log_columns=log_columns,
        log_rows=log_rows,
        duration=duration(training.seconds if training else 0.0),
        hardware=inline(hardware()),
        versions=inline(", ".join(f"{key} {value}" for key, value in framework_versions().items())),
        base_limit="It works on the base model that it was trained on"
        + (
            ", and is checked against it when it is loaded."
            if method.has_factors
            else ". When it is loaded, the shapes are compared, and not the values of the weights."
        ),
        method_limit=method.limit,
    )
    return join_card(metadata, body, existing)


def _reported(title: str, results: Sequence[EvalResult]) -> tuple[list[dict[str, Any]], list[str]]:
    """The `model-index` of the results that the Hub accepts, and the types of their metrics."""
    found = []
    for result in results:
        try:
            # NumPy and PyTorch have numbers of their own, and the Hub has none that is infinite or not a number.
            value = getattr(result.metric_value, "item", lambda value=result.metric_value: value)()
            value = str(value) if isinstance(value, float) and not math.isfinite(value) else value
            entry = replace(result, metric_value=value)
            if accepted("model-index", eval_results_to_model_index(title, [entry])):
                found.append(entry)
        except (TypeError, ValueError, RuntimeError):
            # A value of a wrong type, which the next lines count.
            continue
    if len(found) < len(results):
        logger.warning("%d results are not in the card's metadata: the Hub refuses them.", len(results) - len(found))
    if not found:
        return [], []
    return eval_results_to_model_index(title, found), sorted({result.metric_type for result in found})


def pipeline_of(class_name: str) -> str | None:
    """The Hub's task for a model class, or `None`."""
    return next((task for ending, task in PIPELINES.items() if class_name.endswith(ending)), None)


def snippet(
    repo_id: str, base: str | None, pipeline: str | None, prompt: str | None = None, own_tokenizer: bool = False
) -> str:
    """Code that loads an adapter and uses it on a prompt. A test runs this code."""
    own = "" if base else ', base_model="path/to/the/base"'
    source = repo_id if own_tokenizer else base or "path/to/the/base"
    lines = ["from hf_sara import from_hub", "", f"model = from_hub({_quoted(repo_id)}{own})"]
    if pipeline in ("text-generation", "text-classification"):
        lines[0] = "from transformers import AutoTokenizer\n\nfrom hf_sara import from_hub"
        text = "Once upon a time" if prompt is None else prompt
        lines += [
            f"tokenizer = AutoTokenizer.from_pretrained({_quoted(source)})",
            f"prompt = {_quoted(text)}",
            'inputs = tokenizer(prompt, return_tensors="pt").to(model.device)',
        ]
    if pipeline == "text-generation":
        lines += [
            f"output = model.generate(**inputs, max_new_tokens={20 if prompt is None else 64})",
            "print(tokenizer.decode(output[0], skip_special_tokens=True))",
        ]
    if pipeline == "text-classification":
        lines.append("print(model.config.id2label[int(model(**inputs).logits.argmax())])")
    return "\n".join(lines)


def _quoted(text: str) -> str:
    """A text as Python code in double quotes. It holds no line break and no backquote, which could end the block."""
    return json.dumps(text, ensure_ascii=False).replace("`", "\\u0060")


def hardware() -> str:
    """The GPUs or the processor cores of this machine."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' * (threads > 1)} of {os.cpu_count()} CPU cores ({_processor()})"


def _processor() -> str:
    """The processor's name if the system tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


def framework_versions() -> dict[str, str]:
    """The versions of the packages that take part in a training, as far as they are installed, and of Python."""
    found = {}
    for name in FRAMEWORKS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {**found, "python": platform.python_version()}


# To draw takes longer than all the rest of a card, and adapters that were trained together have the same figures.


@functools.lru_cache(maxsize=1)
def _draw_ranks(threshold: float, sites: tuple[PlannedSite, ...]) -> bytes:
    """The PNG file of the ranks."""
    return png_of(AdapterSpec(SaraArguments(), threshold, list(sites), []).plot())


@functools.lru_cache(maxsize=1)
def _draw_loss(losses: tuple[tuple[int, float], ...]) -> bytes:
    """The PNG file of the training loss over the steps."""
    figure = new_figure(8, 3.5, dpi=110)
    axes = figure.subplots()
    axes.plot(*zip(*losses, strict=True))
    axes.set(xlabel="step", ylabel="training loss", title="Training loss")
    axis: Any = axes.xaxis
    axis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    return png_of(figure)


def _log_table(log: Sequence[Mapping[str, float]]) -> tuple[list[str], list[list[str]]]:
    """Losses and evaluation metrics by step, thinned to MAX_LOG_ROWS rows. Entries of one step share a row."""
    skip = re.compile(
        "epoch|step|.*(runtime|per_second|flos)$|grad_norm|learning_rate|train_loss|num_input|.*preparation_time"
    )
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
        [str(step), *(inline(number(steps[step][name])) if name in steps[step] else "" for name in names)]
        for step in chosen
    ]
    return ["step", *map(inline, names)], rows


def _shown_arguments(args: SaraArguments) -> dict[str, Any]:
    """The arguments that differ from their defaults, and those that a method always shows."""
    default, values = SaraArguments(method=args.method).to_dict(), args.to_dict()
    always = args.resolved_method().shown_options
    # The card has rows of its own for these two.
    own_rows = ("method", "threshold")
    differing = {key: value for key, value in values.items() if key not in own_rows and default[key] != value}
    return {**{name: values[name] for name in (*always, "dropout")}, **differing}


def _render(**values: Any) -> str:
    return _template().render(**values)


@functools.cache
def _template() -> Any:
    # This is imported here, because only cards need it.
    import jinja2

    template = resources.files("hf_sara").joinpath("templates/model_card.md").read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(template)
