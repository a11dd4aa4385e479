import json

import pytest
from sweeps import finished_sweep, make_sweep

from harness import results, tables
from harness.run_folder import write_json
from harness.sweep import Sweep


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Sweep:
    return finished_sweep(tmp_path_factory.mktemp("sweep"))


def test_results_hold_every_run_beside_the_papers_numbers(done):
    found = results.collect(done, {})
    a, b, printed = found["rows"]
    assert [row["state"] for row in found["rows"]] == ["complete", "complete", "printed"]
    assert [entry["learning_rate"] for entry in a["tries"]] == [0.1, 0.01, 0.001]
    assert a["learning_rate"] == 0.01
    assert [entry["seed"] for entry in a["seeds"]] == [3, 4, 5]
    assert a["options"]["learning_rate"] == [0.1, 0.01, 0.001]
    assert results.seed_values(a, "score") == [0.81]
    assert results.seed_values(a, "eval_loss") == pytest.approx([1.03, 1.04, 1.05])
    assert (a["paper"], b["paper"], printed["paper"]) == ({"score": 77.7}, {}, {"score": 11})
    assert (b["group"], b["tries"], b["error"]) == ("big", [], None)
    # What the runs ran on, each once.
    assert found["hardware"] == ["a machine"]
    assert found["versions"] == [{"torch": "1.0"}]


def test_the_table_stands_beside_the_papers(done):
    assert results.render_table(results.collect(done, {})) == (
        "|  |  | parameters | loss | score | seeds |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "|  | A | 1,000 | 1.04 ± 0.01 | 81.0 | 3 |\n"
        "|  | A (paper) | - | - | 77.7 | - |\n"
        "| big | B | 4,000 | 4.00 | 54.0 | 1 |\n"
        "| big | B (paper) | - | - | - | - |\n"
        "|  | printed (paper) | - | - | 11 | - |\n"
        "\n"
        # The parameters are a column already, and this recipe says no more of its costs.
        "|  |  | memory (GB) |\n"
        "| --- | --- | --- |\n"
        "|  | A | 3.00 |\n"
        "| big | B | 2.00 |\n"
        "\n"
        "|  |  | learning rate: evaluation loss | learning rate: evaluation loss | learning rate: evaluation loss |\n"
        "| --- | --- | --- | --- | --- |\n"
        "|  | A | 0.1: 2.030 | **0.01: 1.030** | 0.001: 2.030 |\n"
    )


def test_a_table_says_what_is_missing(tmp_path):
    switch = tmp_path / "switch"
    switch.write_text("raise")
    rows = [
        {"name": "A", "options": {"breaks": str(switch)}},
        {"name": "B", "options": {"learning_rate": [2.0, 0.1]}},
        {"name": "C", "options": {}},
    ]
    sweep = make_sweep(tmp_path, rows=rows)
    for _ in sweep.run(sweep.table.rows[:2]):
        pass
    # B's scored run is lost.
    next(sweep.run_folder.glob("b/*.scored.json")).unlink()
    found = results.write_results(sweep, {})
    assert (sweep.folder / "table.md").read_text() == (
        "# A table\n"
        "\n"
        "```bash\n"
        "python recipes/run_paper.py small\n"
        "```\n"
        "\n"
        "|  | score |\n"
        "| --- | --- |\n"
        "| A | - |\n"
        "| B | - |\n"
        "| C | - |\n"
        "\n"
        "|  | learning rate: evaluation loss | learning rate: evaluation loss |\n"
        "| --- | --- | --- |\n"
        "| B | 2: - | **0.1: 2.000** |\n"
        "\n"
        "Not finished yet: B; C.\n"
        "\n"
        "Failed: A: ValueError: it is broken\n"
    )
    assert found["rows"][0]["error"] == "ValueError: it is broken"
    # Of a file, its name alone.
    (failed,) = sweep.runs_of(sweep.table.rows[0])
    error = f"No '{tmp_path}/x.txt', see https://a/b"
    write_json(failed.beside("error.json"), {"options": failed.options, "error": error})
    assert results.collect(sweep, {})["rows"][0]["error"] == "No 'x.txt', see https://a/b"
    # A loss that is no number is none in JSON.
    assert "NaN" not in (sweep.folder / "results.json").read_text()
    assert json.loads((sweep.folder / "results.json").read_text()) == found


def test_the_command_and_the_options_have_no_path_of_the_machine(tmp_path):
    given = {"data_dir": str(tmp_path / "data"), "model_name_or_path": "org/model", "size": 3, "names": ["a", "b"]}
    sweep = make_sweep(tmp_path)
    sweep.table = tables.override(sweep.table, given)
    found = results.collect(sweep, given)
    assert found["command"] == (
        "python recipes/run_paper.py small --data_dir data --model_name_or_path org/model --size 3 --names a b"
    )
    assert found["rows"][0]["options"]["data_dir"] == "data"
    assert found["rows"][0]["options"]["model_name_or_path"] == "org/model"
    assert str(tmp_path) not in json.dumps(found)


def test_a_deviation_that_rounds_to_zero_is_none():
    assert results._cell([1864.0, 1864.2], {"format": ",.0f"}) == "1,864"
    assert results._cell([0.5, 0.52], {"format": ".2f"}) == "0.51 ± 0.01"
    assert results._cell([0.5], {"format": ".2f"}) == "0.50"
