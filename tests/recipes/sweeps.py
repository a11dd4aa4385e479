"""Small sweeps of the fake recipe, for the tests."""

from pathlib import Path

import yaml
from recipe_scripts import FAKE

from harness import tables
from harness.sweep import Sweep
from harness.tables import load_table

SMALL = {
    "title": "A table",
    "recipe": "fake_recipe",
    "tries": {"max_test": 0},
    "scored_seeds": 1,
    "columns": {"score": {"title": "score", "scale": 100, "format": ".1f"}},
    "rows": [
        {"name": "A", "options": {"learning_rate": [0.1, 0.01, 0.001], "seed": [3, 4, 5]}, "paper": {"score": 77.7}},
        {"group": "big", "name": "B", "options": {"size": 4}, "paper": {}},
        {"name": "printed", "paper": {"score": 11}},
    ],
}
COLUMNS = {
    "trained_parameters": {"title": "parameters", "format": ",.0f"},
    "eval_loss": {"title": "loss", "format": ".2f"},
    **SMALL["columns"],
}


def write(folder, name="small", **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}, sort_keys=False))
    return path


def make_sweep(tmp_path, known=(), **changes) -> Sweep:
    return Sweep(load_table(write(tmp_path / "tables", **changes)), tmp_path / "out", FAKE, known)


def run(sweep, **kwargs) -> list[str]:
    return [row.label for row in sweep.run(tables.select_rows(sweep.table), **kwargs)]


def errors(sweep) -> dict[str, str]:
    """By row, why it is not complete."""
    return {row.label: error for row in tables.select_rows(sweep.table) if (error := sweep.error(row))}


def calls(sweep) -> list[str]:
    file = sweep.run_folder / "calls.txt"
    lines = file.read_text().splitlines() if file.is_file() else []
    file.unlink(missing_ok=True)
    return lines


def finished_sweep(folder) -> Sweep:
    """A finished sweep of the fake recipe, with a figure."""
    figures = {"rates": {"kind": "tries"}}
    sweep = make_sweep(folder, columns=COLUMNS, notes="What one has to know.", figures=figures)
    run(sweep)
    return sweep
