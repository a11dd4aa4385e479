"""Draws the evaluation loss by learning rate and method, from the record of 738 steps on a GPU.

python benchmarks/learning_rates.py
"""

import json
from pathlib import Path

from hf_sara.figures import finish, new_figure

FOLDER = Path(__file__).parents[1] / "docs" / "results" / "gpu"
# A run that learned nothing would hide the others.
HIGHEST = 1.45


def main() -> None:
    runs = json.loads((FOLDER / "e2e_738_steps.json").read_text(encoding="utf-8"))
    figure = new_figure(8, 4, dpi=110)
    axes = figure.subplots()
    above = []
    for name in dict.fromkeys(run["method"] for run in runs):
        points = sorted((run["learning_rate"], run["eval_loss"]) for run in runs if run["method"] == name)
        axes.plot(*zip(*(point for point in points if point[1] <= HIGHEST), strict=True), marker="o", ms=4, label=name)
        above += [f"{name} at {rate:g}: {loss:.2f}" for rate, loss in points if loss > HIGHEST]
    axes.set(xscale="log", xlabel="learning rate", ylabel="evaluation loss")
    axes.set_title(f"After 738 steps of E2E (above the figure: {', '.join(above)})", fontsize="medium")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    finish(figure, FOLDER / "e2e_738_steps.png")


if __name__ == "__main__":
    main()
