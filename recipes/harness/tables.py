"""The paper's tables and figures as configurations. A YAML file describes each of them.

The file names the recipe, the options that all rows share, the rows with their own options and the numbers that the
paper prints, the columns, and the figures. A row may give lists of learning rates and of seeds, see
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
        name (`str`): The name of the row, as the paper prints it.
        group (`str`, *optional*): What stands before the name, such as the model. In a figure, the rows of a group are
            a line.
        options (`dict`, *optional*): The options of the recipe, including those that all rows share. `learning_rate`
            and `seed` may be lists. `None` for a row that the paper copied from elsewhere and that is not run.
        paper (`dict`, *optional*): The numbers that the paper prints, by column and in the printed units. It is empty
            if they are not known, and `None` for a row that is not the paper's.
        x (`float`, *optional*): The place on the x axis of the table's figure, if that is no option and no metric.
        folder (`str`, *optional*): The name of the folder with the runs. By default it follows from group and name.
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
        """The group and the name. No two rows of a table have the same label."""
        return f"{self.group} {self.name}" if self.group else self.name

    def values(self, option: str) -> list[Any]:
        """The values of an option that are run. `[None]` leaves the value to the recipe."""
        value = self.options.get(option)
        return value if isinstance(value, list) else [value]


@dataclass(frozen=True)
class Table:
    """
    A table of the paper, or the points of a figure.

    Args:
        name (`str`): The name of the file, and of the folder with the results.
        title (`str`): What the table shows.
        recipe (`str`): The recipe that runs the rows: `"run_e2e"`.
        columns (`dict`): By metric, the `title` of the column, the number that its values are multiplied with
            (`scale`) and their `format`.
        rows (`list[Row]`): The rows.
        options (`dict`, *optional*): The options that all rows share.
        tries (`dict`, *optional*): Options of the runs that are not scored: those that only try a learning rate, and
            those of the other seeds.
        scored_seeds (`int`, *optional*): How many of the seeds are scored. By default all of them are.
        figures (`dict`, *optional*): The figures by their names, see [`harness.figures`].
        notes (`str`, *optional*): How the paper was read where it can be read in several ways, and what else a reader
            has to know.
        also (`list[str]`, *optional*): Other names by which the table is found: those of the figures that it draws.
        owner (`str`, *optional*): The table whose folder holds the runs, if that is not this table.
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
    also: Sequence[str] = ()
    owner: str = ""


def slug(text: str) -> str:
    """Make the name of a folder out of a text."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def find_table(name: str, folder: str | PathLike) -> Path:
    """
    Find the file of a table.

    Args:
        name (`str`): A path, or a name in the folder: `"table3"`, or `"figure3"` for the table that draws it.
        folder (`str` or `os.PathLike`): The folder of the tables.

    Raises:
        [`RecipeError`]: If there is no such table; the message lists those that there are.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else Path(folder, f"{name}.yaml")
    if path.is_file():
        return path
    tables = {
        other: Path(folder, f"{table}.yaml") for table in table_names(folder) for other in names_of(folder, table)
    }
    if name not in tables:
        raise RecipeError(f"There is no table {name!r}. Give a YAML file, or one of: {', '.join(tables)}.")
    return tables[name]


def table_names(folder: str | PathLike) -> list[str]:
    """The names of the tables in a folder. table2 stands before table10."""
    names = [path.stem for path in Path(folder).glob("*.yaml")]
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def names_of(folder: str | PathLike, name: str) -> list[str]:
    """The names by which a table is found: that of its file, then those in `also`, if the file can be read."""
    try:
        content = yaml.safe_load(Path(folder, f"{name}.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return [name]
    return [name, *(content.get("also", ()) if isinstance(content, dict) else ())]


def load_table(path: str | PathLike) -> Table:
    """
    Read a table. If the file has `base`, the name of another table in the same folder, the table has all entries of
    that one but those that it gives itself, and its runs are in the folder of that one. An entry of `rows` may then be
    the label of a row of the base, or a mapping whose `same_as` is such a label, for the same runs under another name.

    Args:
        path (`str` or `os.PathLike`): The YAML file.

    Returns:
        [`Table`]: The table.

    Raises:
        [`RecipeError`]: If the file has another form.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path} has to be a mapping.")
    base = content.pop("base", None)
    inherited = {} if base is None else dict(vars(load_table(path.with_name(f"{base}.yaml"))))
    inherited.pop("also", None)
    there = {row.label: row for row in inherited.get("rows", ())}
    # YAML reads an empty entry as `None`.
    own = content.pop("options", None) or {}
    if not isinstance(own, dict):
        raise RecipeError(f"{path}: options has to be a mapping of names to values.")
    shared = {**inherited.get("options", {}), **own}
    rows = content.pop("rows", list(there))
    values = {**inherited, "owner": path.stem, **content, "options": shared, "name": path.stem}
    unknown = sorted(set(values) - {entry.name for entry in fields(Table)})
    missing = sorted({"title", "recipe"} - set(values))
    if unknown or missing:
        raise RecipeError(f"{path} has unknown entries {unknown} and lacks {missing}.")
    if base is not None:
        values["owner"] = inherited["owner"]
    if not isinstance(values.get("also", []), list):
        raise RecipeError(f"{path}: also has to be a list of names.")
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
        # YAML reads 1e-3 as a text and 1.0e-3 as a number.
        raise RecipeError(f"{path}: learning_rate {rates} of {made.label} has to be numbers like 0.001 or 1.0e-3.")
    return made


def select_rows(table: Table, names: Sequence[str] | None = None) -> list[Row]:
    """
    Choose the rows of a table that are to be run.

    Args:
        table ([`Table`]): The table.
        names (`Sequence[str]`, *optional*): Labels, or names, which choose all rows of that name. Case and punctuation
            do not matter. Defaults to all rows.

    Raises:
        [`RecipeError`]: If no row has one of the names.
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
    """The same table with these options, which win over its own and over those of all its rows."""
    rows = [row if row.options is None else replace(row, options={**row.options, **given}) for row in table.rows]
    return replace(table, rows=rows, options={**table.options, **given})
