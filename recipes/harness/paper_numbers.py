"""The page of what the paper prints: its tables, which of their rows await a run, and the arithmetic of its shares."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from hf_sara.files import write_file

from . import tables
from .results import DASH, markdown_table
from .sweep import load_recipe, parse_options
from .tables import Row, Table

PAGE = "paper_numbers.md"
# Of each base: its layers, the width of its states, how many linears of a layer series adapters adapt, its parameters,
# and the outputs of the modules that PEFT adapts for query and value.
BASES = {
    "huggyllama/llama-7b": (32, 4096, 3, 6_738_415_616, (4096, 4096)),
    "huggyllama/llama-13b": (40, 5120, 3, 13_015_864_320, (5120, 5120)),
    "EleutherAI/gpt-j-6b": (28, 4096, 2, 6_050_882_784, (4096, 4096)),
    "openai-community/gpt2-medium": (24, 1024, 2, 354_823_168, (3072,)),
}
HEADER = """# What the paper prints

This page is written by `python recipes/run_paper.py --report docs`. It has every number that the paper prints in its
tables 1 to 4 and 8 to 12, as the configurations in `recipes/paper` hold them. The runs of this project are on the page
[Results](results.md).

A row that "awaits a run" is a command away: `python recipes/run_paper.py table1 --rows SARA`. It takes the paper's
model and data, and a GPU. A row that is "printed only" is of a model that cannot be trained.
"""
SHARES = """## The arithmetic of the shares

The share of a row is that of its trained parameters in base plus trained ones. A formula gives it from the settings
and the shapes of the base. The ranks of SARA and Mo-SARA follow from the weights, so the other way round, the printed
number gives the mean rank that it stands for.
"""


def write_page(docs: str | PathLike, folder: str | PathLike) -> Path:
    """
    Write the page.

    Args:
        docs (`str` or `os.PathLike`): The folder of the documentation.
        folder (`str` or `os.PathLike`): The folder of the tables' configurations.

    Returns:
        `Path`: The page.
    """
    there = [tables.load_table(Path(folder, f"{name}.yaml")) for name in tables.table_names(folder)]
    printed = [table for table in there if table.name.startswith("table")]
    parts = [HEADER, *map(render_printed, printed), SHARES, render_shares(printed)]
    page = Path(docs, PAGE)
    page.parent.mkdir(parents=True, exist_ok=True)
    write_file(page, ("\n".join(part.strip() + "\n" for part in parts)).encode())
    return page


def render_printed(table: Table) -> str:
    """A table as the paper prints it, and for each row whether it can be run."""
    rows = [row for row in table.rows if row.paper]
    columns = {name: column for name, column in table.columns.items() if any(name in row.paper for row in rows)}
    grouped = any(row.group for row in rows)
    head = [*[""] * (2 if grouped else 1), *(column["title"] for column in columns.values()), "here"]
    lines = [
        [
            *([row.group or "", row.name] if grouped else [row.name]),
            *(str(row.paper.get(name, DASH)) for name in columns),
            "printed only" if row.options is None else "awaits a run",
        ]
        for row in rows
    ]
    return "\n\n".join(
        part for part in (f"## {table.title}", table.notes.strip(), markdown_table(head, lines)) if part
    )


def render_shares(printed: list[Table]) -> str:
    """The printed shares and numbers of parameters beside those of the formulas."""
    head = ["table", "row", "printed", "by formula", "difference", "mean k"]
    lines = []
    for table in printed:
        module = load_recipe(Path(__file__).parents[1] / f"{table.recipe}.py")
        for row in table.rows:
            found = None if row.options is None else compare(row, *parse_options(module, row.options)[:2])
            if found is not None:
                lines.append([table.name.removeprefix("table"), row.label, *found])
    return markdown_table(head, lines)


def compare(row: Row, options: Any, method: Any) -> list[str] | None:
    """
    The printed number of a row, that of a formula, and their difference; for SARA and Mo-SARA the mean rank that the
    printed number stands for. `None` if the paper prints none, or no formula is known for the base.
    """
    paper: Mapping[str, Any] = row.paper or {}
    base = BASES.get(options.model_name_or_path)
    text = str(paper.get("share", paper.get("trained_parameters", "")))
    if base is None or not text:
        return None
    size = base[3]
    millions = text.endswith("M")
    printed = float(text.removesuffix("M"))
    trained = printed * 1e6 if millions else size * printed / (100 - printed)
    if method.method in ("sara", "mo_sara"):
        return [text if millions else f"{text} %", "", "", f"{mean_rank(trained, base, method):.1f}"]
    count = count_of(base, method)
    formula = count / 1e6 if millions else 100 * count / (count if method.method == "full" else size + count)
    unit = "M" if millions else " %"
    return [f"{printed:g}{unit}", f"{formula:.3g}{unit}", f"{100 * (formula / printed - 1):+.1f} %", ""]


def mean_rank(trained: float, base: tuple, method: Any) -> float:
    """The mean rank of query and value that gives so many trained parameters."""
    layers, width, *_ = base
    sites = 2 * layers
    if method.method == "sara":
        return trained / (sites * (2 * width + (1 if method.singular_values else 0)))
    heads = method.num_heads
    beside = (heads if heads > 1 else 0) + (0 if method.v_position == "none" else width)
    return (trained / sites - beside) / (heads + (1 if heads > 1 else 0))


def count_of(base: tuple, method: Any) -> int:
    """The trained parameters of a baseline, by its formula."""
    layers, width, linears, size, outputs = base
    name, r = method.method, method.lora_r
    if name == "full":
        return size
    if name == "prefix":
        return method.num_virtual_tokens * 2 * layers * width
    if name == "series_adapter":
        return layers * linears * 2 * width * method.bottleneck_size
    if name == "parallel_adapter":
        return layers * 3 * 2 * width * method.bottleneck_size
    if name in ("adapter_l", "adapter_h"):
        one = 2 * width * method.bottleneck_size + method.bottleneck_size + width
        return layers * (one + 2 * width if name == "adapter_l" else 2 * one)
    if name == "vera":
        return layers * sum(method.vera_r + d_out for d_out in outputs)
    if name == "adalora":
        # It begins with a larger rank, and this is what is left.
        return layers * sum(r * (width + d_out + 1) for d_out in outputs)
    return layers * sum(r * (width + d_out) + (d_out if name == "dora" else 0) for d_out in outputs)
