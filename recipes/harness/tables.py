"""The paper's tables and figures as configurations: a YAML file describes each.

It names the recipe, the options that all rows share, the rows with their own options and the numbers that the paper
prints, the columns and the figures. A row may give a list of learning rates and of seeds, see
[`~harness.sweep.Sweep`].
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

import yaml

from .options import RecipeError


@dataclass(frozen=True)
class Row:
    """
    A row of a table.

    Args:
        name (`str`): As the paper prints it.
        group (`str`, *optional*): What stands before it, such as the model; a line of a figure.
        options (`dict`, *optional*): The recipe's options, those that all rows share among them. `learning_rate` and
            `seed` may be lists. `None` for a row that the paper copied from elsewhere and that is not run.
        paper (`dict`, *optional*): The printed numbers by column, in the printed units; empty where they are not
            known. `None` for a row that is not of the paper.
        x (`float`, *optional*): Place on the x axis of the table's figure, where that is no option and no metric.
        folder (`str`, *optional*): The name of the folder with its runs; follows from group and name by default.
    """

    name: str
    group: str | None = None
    options: Mapping[str, Any] | None = None
    paper: Mapping[str, Any] | None = None
    x: float | None = None
    folder: str = ""

    def __post_init__(self):
        object.__setattr__(self, "folder", self.folder or slug(self.label))

    @property
    def label(self) -> str:
        """Name and group; no two rows of a table have the same."""
        return f"{self.group} {self.name}" if self.group else self.name

    def values(self, option: str) -> list[Any]:
        """The values of an option to try; `[None]` leaves it to the recipe."""
        value = self.options.get(option)
        return value if isinstance(value, list) else [value]


@dataclass(frozen=True)
class Table:
    """
    A table of the paper, or the points of a figure.

    Args:
        name (`str`): The name of its file, and of the folder with its results.
        title (`str`): What it shows.
        recipe (`str`): The recipe that makes its rows: `"run_e2e"`.
        columns (`dict`): By metric, the `title` of its column, what it is multiplied with (`scale`), its `format`.
        rows (`list[Row]`): The rows.
        options (`dict`, *optional*): What all rows share.
        tries (`dict`, *optional*): Options that change where a learning rate, or a seed that is not scored, is tried.
        scored_seeds (`int`, *optional*): How many of the seeds are scored; all by default.
        figures (`dict`, *optional*): By name, the figures, see [`harness.figures`].
        notes (`str`, *optional*): Where a reading was chosen, and what else has to be known.
        runs (`str`, *optional*): The table whose folder holds the runs, if not this one's.
    """

    name: str
    title: str
    recipe: str
    columns: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rows: Sequence[Row] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    tries: Mapping[str, Any] = field(default_factory=dict)
    scored_seeds: int | None = None
    figures: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: str = ""
    runs: str = ""


def slug(text: str) -> str:
    """A text as the name of a folder."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def find_table(name: str, folder: str | PathLike) -> Path:
    """
    The file of a table: a path, or a name such as `"table3"` in a folder.

    Raises:
        [`RecipeError`]: If there is none; lists those that there are.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else Path(folder, f"{name}.yaml")
    if not path.is_file():
        raise RecipeError(
            f"There is no table {name!r}. Give a YAML file, or one of: {', '.join(table_names(folder))}."
        )
    return path


def table_names(folder: str | PathLike) -> list[str]:
    """The names of the tables in a folder, table2 before table10."""
    names = [path.stem for path in Path(folder).glob("*.yaml")]
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def load_table(path: str | PathLike) -> Table:
    """
    Read a table. With `base`, the name of another one beside it, it has what that one has except for what it gives
    itself, and its runs are in that one's folder. An entry of its `rows` may then be the label of one of the other's
    rows, or a mapping with `same_as`, such a label, for the same runs under another name.

    Args:
        path (`str` or `os.PathLike`): The YAML file.

    Returns:
        [`Table`]: The table.

    Raises:
        [`RecipeError`]: For a file of another form.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path} has to be a mapping.")
    base = content.pop("base", None)
    inherited = {} if base is None else vars(load_table(path.with_name(f"{base}.yaml")))
    there = {row.label: row for row in inherited.get("rows", ())}
    # An entry that is there and empty is `None`.
    own = content.pop("options", None) or {}
    if not isinstance(own, dict):
        raise RecipeError(f"{path}: options has to be a mapping of names to values.")
    shared = {**inherited.get("options", {}), **own}
    rows = content.pop("rows", list(there))
    values = {**inherited, "runs": path.stem, **content, "options": shared, "name": path.stem}
    unknown = sorted(set(values) - {entry.name for entry in fields(Table)})
    missing = sorted({"title", "recipe"} - set(values))
    if unknown or missing:
        raise RecipeError(f"{path} has unknown entries {unknown} and lacks {missing}.")
    if base is not None:
        values["runs"] = inherited["runs"]
    values["rows"] = [_make_row(row, there, own, shared, path) for row in rows]
    folders = [row.folder for row in values["rows"]]
    if len(set(folders)) < len(folders):
        raise RecipeError(f"{path} has two rows of one name: {folders}.")
    return Table(**values)


def _make_row(
    row: str | dict[str, Any], there: Mapping[str, Row], own: Mapping[str, Any], shared: Mapping[str, Any], path: Path
) -> Row:
    row = {"same_as": row} if isinstance(row, str) else row
    if not isinstance(row, dict) or not isinstance(row.get("options") or {}, dict):
        raise RecipeError(f"{path}: the row {row} and its options have to be mappings of names to values.")
    if "same_as" in row:
        label = row["same_as"]
        if label not in there:
            raise RecipeError(f"{path}: there is no row {label!r} in its base, only {list(there)}.")
        found = there[label]
        values = {**vars(found), **{key: value for key, value in row.items() if key != "same_as"}}
        options = None if found.options is None else {**found.options, **own, **(row.get("options") or {})}
        values["options"] = options
    else:
        values = {**row, "options": None if row.get("options") is None else {**shared, **row["options"]}}
    unknown = sorted(set(values) - {entry.name for entry in fields(Row)})
    if unknown or "name" not in values:
        raise RecipeError(f"{path}: the row {row} has unknown entries {unknown}, or no name.")
    made = Row(**values)
    rates = made.values("learning_rate") if made.options else []
    if not all(rate is None or isinstance(rate, float) for rate in rates):
        # YAML takes 1e-3 for a text; 1.0e-3 is a number.
        raise RecipeError(f"{path}: learning_rate {rates} of {made.label} has to be numbers like 0.001 or 1.0e-3.")
    return made


def select_rows(table: Table, names: Sequence[str] | None = None) -> list[Row]:
    """
    Rows of a table that are to be run.

    Args:
        table ([`Table`]): The table.
        names (`Sequence[str]`, *optional*): Labels, or names alone (then all rows of that name), in any spelling of
            case and punctuation. Defaults to all rows.

    Raises:
        [`RecipeError`]: If a name fits none.
    """
    rows = [row for row in table.rows if row.options is not None]
    if names is None:
        return rows
    wanted = {slug(name) for name in names}
    unknown = wanted - {slug(name) for row in rows for name in (row.label, row.name)}
    if unknown:
        labels = "; ".join(row.label for row in rows)
        raise RecipeError(f"{table.name} has no row {', '.join(sorted(unknown))} to run. It has: {labels}.")
    return [row for row in rows if wanted & {slug(row.label), slug(row.name)}]


def override(table: Table, given: Mapping[str, Any]) -> Table:
    """The table with options that win over its own and those of all its rows."""
    rows = [row if row.options is None else replace(row, options={**row.options, **given}) for row in table.rows]
    return replace(table, rows=rows, options={**table.options, **given})
