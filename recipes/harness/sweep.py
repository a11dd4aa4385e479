"""The runs of a table, each in a process of its own.

A row may give lists of learning rates and of seeds. Each combination that is run has a folder of its own. First, every
learning rate is run with the first seed, for its evaluation loss alone. Then the best one is run with every seed. A
file beside the folder remembers that a run is finished, so a sweep goes on where it stopped. On another machine, it
goes on from the results of a report.
"""

import importlib.util
import json
import logging
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path, PureWindowsPath
from types import ModuleType
from typing import Any

import yaml
from transformers.utils.logging import tqdm

from hf_sara.files import write_file

from .base_models import SMOLLM2
from .options import RecipeError, given_options, parse_arguments
from .run_folder import write_json
from .tables import Row, Table

logger = logging.getLogger(__name__)

# The options of a row that may be lists.
TRIED = ("learning_rate", "seed")
# The options that may be folders of this machine.
LOCAL = ("data_dir", "model_name_or_path")
# The metric that decides between learning rates. The lowest value is the best.
CRITERION = "eval_loss"
# In the JSON file of a table's results, the key of the records of all its runs.
RECORDS = "runs"


# ---- recipes ----


def load_recipe(path: str | PathLike) -> ModuleType:
    """Import a recipe. Its `arguments()` returns what [`~harness.options.parse_arguments`] takes first."""
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"There is no recipe {path}.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_overrides(module: ModuleType, argv: Sequence[str]) -> dict[str, Any]:
    """
    Read options of a recipe from a command line.

    Raises:
        [`RecipeError`]: If the recipe does not have one of them.
    """
    given, unknown = given_options(module.arguments()[0], argv)
    if unknown or "config" in given:
        wrong = " ".join(unknown or ["--config"])
        raise RecipeError(f"{wrong}: no option of run_paper or of the recipe {module.__name__}.")
    for name in LOCAL:
        value = given.get(name)
        if isinstance(value, str) and value != SMOLLM2 and os.path.isdir(os.path.expanduser(value)):
            # The absolute path is the same however the folder is spelled, and wherever the next call is made.
            given[name] = os.path.abspath(os.path.expanduser(value))
    # Choices are parsed to enumerations, which YAML does not know.
    return json.loads(json.dumps(given))


def parse_options(module: ModuleType, options: Mapping[str, Any]) -> tuple[Any, ...]:
    """
    Parse options as the recipe does; returns the instances of its dataclasses. Of a list of learning rates or seeds,
    the first one is taken.

    Raises:
        `ValueError`: If the recipe refuses the options.
    """
    first = {name: options[name][0] for name in TRIED if isinstance(options.get(name), list)}
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "options.yaml")
        config.write_text(_to_yaml({**options, **first}), encoding="utf-8")
        return parse_arguments(*module.arguments(), ["--config", str(config)])


def check_rows(rows: Sequence[Row], module: ModuleType) -> None:
    """Parse the options of rows before hours of running. A [`RecipeError`] names the row whose options are wrong."""
    for row in rows:
        try:
            parse_options(module, row.options)
        except ValueError as error:
            raise RecipeError(f"{row.label}: {error}") from error


# ---- runs ----


def without_paths(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, with the bare names of local files and folders instead of their paths."""

    def shorten(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        # This class knows the paths of all systems, and another machine may have made a report.
        path = PureWindowsPath(value)
        return path.name if path.is_absolute() or value.startswith(("/", "\\", ".", "~")) else value

    return {name: shorten(value) for name, value in options.items()}


def read_records(folder: str | PathLike) -> list[dict[str, Any]]:
    """
    Read the records of all runs in an earlier report, which another machine may have made.

    Args:
        folder (`str` or `os.PathLike`): The folder `results` of the report.

    Returns:
        `list[dict]`: Per run, the name of the `recipe`, the `options` as [`without_paths`] gives them, and the
        `metrics`.

    Raises:
        [`RecipeError`]: If the folder holds no results.
    """
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("*.json"))]
    # The folder also holds the data of the figures, which have no records.
    tables = [result[RECORDS] for result in results if RECORDS in result]
    if not tables:
        raise RecipeError(f"There are no results in {folder}. Give the folder results that --report wrote.")
    return [record for records in tables for record in records]


@dataclass(frozen=True)
class Run:
    """
    One call of the recipe.

    Args:
        folder (`Path`): The folder of the run. The files beside it begin with its name: NAME.yaml has the options,
            NAME.log what the run prints. NAME.tried.json and NAME.scored.json have the record of the finished run, and
            NAME.error.json the error of a failed one.
        options (`dict`): The options of the recipe, without the folder.
        scored (`bool`): Whether the run is scored. A run that is not scored is only tried for its evaluation loss.
        known (`dict`, *optional*): The metrics of the run, if it was finished elsewhere.
    """

    folder: Path
    options: Mapping[str, Any]
    scored: bool
    known: Mapping[str, Any] | None = None

    def beside(self, ending: str) -> Path:
        """The path of a file beside the folder."""
        return self.folder.with_name(f"{self.folder.name}.{ending}")

    @property
    def record(self) -> Path:
        """The file that has the options and the metrics once the run is finished."""
        return self.beside("scored.json" if self.scored else "tried.json")

    def metrics(self) -> dict[str, Any] | None:
        """The metrics, if the run was finished with exactly these options, in this folder or elsewhere."""
        here = self.metrics_here()
        return dict(self.known) if here is None and self.known is not None else here

    def metrics_here(self) -> dict[str, Any] | None:
        """The metrics, if the run was finished with exactly these options in this folder."""
        for path in (self.record, self.beside("tried.json")):
            if path.is_file():
                record = json.loads(path.read_text(encoding="utf-8"))
                if record["options"] == self.options:
                    return record["metrics"]
        return None

    def error(self) -> str | None:
        """The error of the last call with exactly these options, if that failed."""
        path = self.beside("error.json")
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return record["error"] if record.get("options") == self.options else None


class RunError(Exception):
    """A run ended with an error. The message says which."""


class Sweep:
    """
    The runs of a table in a folder.

    Args:
        table ([`Table`]): The table.
        output_dir (`str` or `os.PathLike`): The folder of all tables.
        script (`str` or `os.PathLike`): The recipe.
        known (`Sequence[dict]`, *optional*): The records of runs that were finished elsewhere, from [`read_records`].
    """

    def __init__(
        self,
        table: Table,
        output_dir: str | PathLike,
        script: str | PathLike,
        known: Sequence[Mapping[str, Any]] = (),
    ):
        self.table = table
        self.script = Path(script)
        self.known = known
        self.folder = Path(output_dir, table.name)
        self.run_folder = Path(output_dir, table.owner, "runs")

    # ---- what there is to run ----

    def runs_of(self, row: Row) -> Iterator[Run]:
        """
        The runs of a row in their order. The best learning rate is known once all of them are tried, so the iteration
        ends after the tries if one of these is not finished at that time.
        """
        rates, seeds = row.values("learning_rate"), row.values("seed")
        if len(rates) > 1:
            yield from (self._run(row, rate, seeds[0], scored=False) for rate in rates)
        rate = self.best_rate(row)
        if rate is None and len(rates) > 1:
            return
        for index, seed in enumerate(seeds):
            yield self._run(row, rate, seed, scored=index < (self.table.scored_seeds or len(seeds)))

    def count(self, row: Row) -> int:
        """The number of all runs of a row."""
        rates = row.values("learning_rate")
        return (len(rates) if len(rates) > 1 else 0) + len(row.values("seed"))

    def best_rate(self, row: Row) -> float | None:
        """The learning rate with the lowest evaluation loss; `None` until all are tried, or if none has a loss."""
        rates = row.values("learning_rate")
        if len(rates) == 1:
            return rates[0]
        tries = self.tries(row)
        if None in tries.values():
            return None
        losses = {rate: metrics.get(CRITERION) for rate, metrics in tries.items()}
        # The loss of a training that diverged is not a number, and `None` in the JSON of a report.
        finite = {rate: loss for rate, loss in losses.items() if loss is not None and math.isfinite(loss)}
        return min(finite, key=finite.get, default=None)

    def tries(self, row: Row) -> dict[float, dict[str, Any] | None]:
        """The metrics of each learning rate that is tried; `None` for a try that is not finished."""
        rates, seed = row.values("learning_rate"), row.values("seed")[0]
        return {rate: self._run(row, rate, seed, scored=False).metrics() for rate in rates} if len(rates) > 1 else {}

    def seeds(self, row: Row) -> dict[int | None, dict[str, Any]]:
        """The metrics of each seed at the best learning rate, without the runs that are not finished."""
        rest = list(self.runs_of(row))[len(self.tries(row)) :]
        found = {run.options.get("seed"): run.metrics() for run in rest}
        return {seed: metrics for seed, metrics in found.items() if metrics}

    def is_complete(self, row: Row) -> bool:
        """Whether all runs of a row are finished."""
        runs = list(self.runs_of(row))
        return len(runs) == self.count(row) and all(run.metrics() is not None for run in runs)

    def error(self, row: Row) -> str | None:
        """Why a row is not complete; `None` if it is complete, or if the only reason is that runs are left."""
        for run in self.runs_of(row):
            if run.metrics() is None and run.error() is not None:
                return run.error()
        tries = self.tries(row).values()
        if not tries or None in tries or self.best_rate(row) is not None:
            return None
        if not any(CRITERION in metrics for metrics in tries):
            return "Its runs have no evaluation loss to choose a learning rate by. Hold out data for it: val_set_size."
        return "The training diverged at each of its learning rates. Try smaller ones."

    def _run(self, row: Row, rate: float | None, seed: int | None, scored: bool) -> Run:
        own = {name: value for name, value in zip(TRIED, (rate, seed), strict=True) if value is not None}
        name = "_".join(f"{option}-{value}" for option, value in own.items()) or "run"
        options = {**row.options, **own, **({} if scored else self.table.tries)}
        shortened = without_paths(options)
        same = {"recipe": self.table.recipe, "options": shortened}
        known = next((record["metrics"] for record in self.known if same.items() <= record.items()), None)
        return Run(self.run_folder / row.folder / name, options, scored, known)

    # ---- running ----

    def run(self, rows: Sequence[Row], deadline: float = math.inf) -> Iterator[Row]:
        """
        Run what is not finished, row by row. After a run that fails, the next one is run; see [`error`].

        Args:
            rows (`Sequence[Row]`): Rows of the table.
            deadline (`float`, *optional*): No run begins after this time, in seconds of `time.monotonic()`.

        Yields:
            [`Row`]: Each row, after its last run of this call.
        """
        with tqdm(total=sum(map(self.count, rows)), desc=self.table.name, unit="run") as progress:
            for row in rows:
                for run in self.runs_of(row):
                    if run.metrics() is None:
                        if time.monotonic() >= deadline:
                            continue
                        progress.set_postfix_str(f"{row.label}: {run.folder.name}")
                        try:
                            self.start(run)
                        except RunError as error:
                            write_json(run.beside("error.json"), {"options": run.options, "error": str(error)})
                            logger.error("%s failed: %s Its log: %s", row.label, error, run.beside("log"))
                    progress.update()
                yield row

    def start(self, run: Run) -> None:
        """
        Call the recipe in a process of its own, and write the record of the run.

        Raises:
            [`RunError`]: If the process ends with an error, or is killed.
        """
        config, log = run.beside("yaml"), run.beside("log")
        config.parent.mkdir(parents=True, exist_ok=True)
        run.beside("error.json").unlink(missing_ok=True)
        # The model card is named after the row.
        card = {"hub_model_id": f"{self.run_folder.parent.name}-{run.folder.parent.name}"}
        write_file(config, _to_yaml({**card, **run.options, "output_dir": str(run.folder)}).encode())
        with open(log, "ab") as file:
            begin = file.tell()
            command = [sys.executable, str(self.script), "--config", str(config)]
            # The log is UTF-8 everywhere. Windows would choose a code page, which lacks most characters.
            environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
            code = subprocess.run(command, env=environment, **streams).returncode
        if code:
            raise RunError(_what_went_wrong(code, log.read_bytes()[begin:].decode(errors="replace")))
        metrics = json.loads((run.folder / "metrics.json").read_text(encoding="utf-8"))
        tried = replace(run, options={**run.options, **self.table.tries}, scored=False).metrics_here() or {}
        for name in {"peak_memory_bytes", "peak_cuda_bytes"} & set(metrics) & set(tried):
            # A run that was tried before is scored in this process, but was trained in an earlier one.
            metrics[name] = max(metrics[name], tried[name])
        write_json(run.record, {"options": run.options, "metrics": metrics})


def _what_went_wrong(code: int, output: str) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        memory = " (of the system, when it has no memory left?)" if name == "SIGKILL" else ""
        return f"killed by {name}{memory}."
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {code}."


def _to_yaml(options: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True)
