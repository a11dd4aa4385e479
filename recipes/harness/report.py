"""The project's page of results."""

import json
import re
import shutil
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from hf_sara.files import write_file

from .figures import CAPTIONS
from .options import RecipeError
from .results import RESULTS_FILE, render_head, render_scores, render_table
from .run_folder import write_json
from .sweep import RECORDS

BEGIN = "<!-- {}: written by recipes/run_paper.py from here -->"
END = "<!-- {}: written by recipes/run_paper.py up to here -->"
HEADER = """# Results

This page has the results of the recipes. Each part between two marks is generated from the runs; the text around them
is written by hand.
"""


def write_report(output_dir: str | PathLike, docs: str | PathLike) -> Path:
    """
    Write all results of a folder into the project's documentation: docs/results/NAME.json, docs/results/NAME.md with
    all tables and figures, and a part of docs/results.md for each table, with its scores. The text that people wrote
    around these parts stays.

    Args:
        output_dir (`str` or `os.PathLike`): The folder of all tables.
        docs (`str` or `os.PathLike`): The folder of the documentation.

    Returns:
        `Path`: The page.

    Raises:
        [`~harness.options.RecipeError`]: If there are no results, or if an earlier report has runs of a table
            that these results lack.
    """
    files = sorted(Path(output_dir).glob(f"*/{RESULTS_FILE}"))
    if not files:
        raise RecipeError(f"There are no results in {output_dir}. Run a table first.")
    page, folder = Path(docs, "results.md"), Path(docs, "results")
    folder.mkdir(parents=True, exist_ok=True)
    text = page.read_text(encoding="utf-8") if page.is_file() else HEADER
    for file in files:
        results = json.loads(file.read_text(encoding="utf-8"))
        name = results["name"]
        _check_nothing_is_lost(folder / f"{name}.json", results)
        write_json(folder / f"{name}.json", results)
        for path in [*file.parent.glob("*.png"), *file.parent.glob("*.json")]:
            if path.name != RESULTS_FILE:
                shutil.copyfile(path, folder / f"{name}-{path.name}")
        write_file(folder / f"{name}.md", _render_page(results, _images(results, folder)).encode())
        text = _put(text, name, _render_part(results))
    write_file(page, text.encode())
    return page


def _check_nothing_is_lost(path: Path, results: Mapping[str, Any]) -> None:
    """Raise a [`~harness.options.RecipeError`] if an earlier report has runs that the results do not have."""
    before = json.loads(path.read_text(encoding="utf-8"))[RECORDS] if path.is_file() else []
    there = [record["options"] for record in results[RECORDS]]
    lost = sum(record["options"] not in there for record in before)
    if lost:
        raise RecipeError(
            f"{path} has {lost} runs that {results['name']} does not have here. Run the table once more with --known "
            f"{path.parent}, which takes them over; or delete the file, if they are not the table's any more."
        )


def _render_part(results: Mapping[str, Any]) -> str:
    name = results["name"]
    rest = f"Times, memory, learning rates and figures: [all of this table](results/{name}.md)."
    return "\n\n".join([render_head(results, "##"), render_scores(results), rest])


def _render_page(results: Mapping[str, Any], images: Mapping[str, str]) -> str:
    name = results["name"]
    parts = [render_head(results), render_table(results).strip()]
    for image, caption in images.items():
        parts += [f"![{caption}]({image})", f"*{caption}*"]
    # Runs of baselines name the version of PEFT too. A list of versions that is part of another one is left out.
    fullest = [one for one in results["versions"] if not any(one.items() < two.items() for two in results["versions"])]
    packages = [", ".join(f"{name} {version}" for name, version in found.items()) for found in fullest]
    ran = [f"On {'; '.join(results['hardware'])}."] if results["hardware"] else []
    ran += [f"With {'; '.join(packages)}."] if packages else []
    parts.append(" ".join([*ran, f"Every run: [{name}.json]({name}.json). Back to [Results](../results.md)."]))
    return "\n\n".join(parts) + "\n"


def _images(results: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """The captions of a table's images by their file names. Runs of another machine may have drawn some of them."""
    captions = {}
    for figure, spec in results["figures"].items():
        caption = f"{results['title']}: {CAPTIONS[spec['kind']].format(**spec)}"
        stem = f"{results['name']}-{figure}"
        for path in [*folder.glob(f"{stem}.png"), *sorted(folder.glob(f"{stem}-*.png"))]:
            # If a figure has several images, each has a name of its own behind that of the figure.
            rest = path.stem.removeprefix(stem).strip("-")
            captions[path.name] = f"{caption} ({rest})." if rest else f"{caption}."
    return captions


def _put(text: str, name: str, part: str) -> str:
    """Put a part between its marks in the text, or at the end if the text has no such marks."""
    begin, end = BEGIN.format(name), END.format(name)
    block = f"{begin}\n\n{part}\n\n{end}"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if pattern.search(text):
        return pattern.sub(lambda _: block, text, count=1)
    return f"{text.rstrip()}\n\n{block}\n"
