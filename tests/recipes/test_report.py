import json
import re

import pytest
from sweeps import finished_sweep

from harness import report, results
from harness.options import RecipeError
from harness.run_folder import write_json
from harness.sweep import Sweep


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Sweep:
    return finished_sweep(tmp_path_factory.mktemp("sweep"))


def test_the_page_of_results_has_every_table_and_keeps_what_people_wrote(done, tmp_path):
    output = done.folder.parent
    results.write_results(done, {"data_dir": "/somewhere/e2e"})
    (done.folder / "ranks.json").write_text("{}")
    (done.folder / "rates.png").write_bytes(b"an image")
    other = results.collect(done, {})
    (output / "later").mkdir(exist_ok=True)
    (output / "later" / "results.json").write_text(json.dumps({**other, "name": "later", "title": "Later"}))

    page = report.write_report(output, tmp_path / "docs")
    assert page == tmp_path / "docs" / "results.md"
    text = page.read_text()
    assert text.startswith("# Results\n")
    assert re.findall("^## .*", text, re.M) == ["## Later", "## A table"]
    for part in (
        "What one has to know.",
        "run_paper.py small --data_dir e2e\n",
        "| big | B | 4,000 | 4.00 | 54.0 | 1 |",
    ):
        assert part in text
    assert "[all of this table](results/small.md)" in text
    own = (tmp_path / "docs" / "results" / "small.md").read_text()
    assert own.startswith("# A table\n")
    assert "| big | B | 4,000 | 4.00 | 54.0 | 1 |" in own
    caption = "A table: the evaluation loss of every learning rate that was tried, with the first seed."
    assert f"![{caption}](small-rates.png)\n\n*{caption}*" in own
    assert "learning rate: evaluation loss" in own
    assert "learning rate: evaluation loss" not in text
    assert "On a machine. With torch 1.0. Every run: [small.json](small.json)." in own
    files = {path.name: path.read_bytes() for path in (tmp_path / "docs" / "results").iterdir()}
    assert set(files) == {"later.json", "later.md", "small.json", "small.md", "small-ranks.json", "small-rates.png"}
    assert files["small-rates.png"] == b"an image"
    assert json.loads(files["small.json"])["rows"] == other["rows"]
    assert b"/somewhere" not in b"".join(files.values())
    assert "/somewhere" not in text

    # A report that has runs which are not here is kept.
    fuller = json.loads(files["small.json"])
    fuller["runs"].append({"recipe": "fake_recipe", "options": {"size": 9}, "metrics": {}})
    write_json(tmp_path / "docs" / "results" / "small.json", fuller)
    with pytest.raises(RecipeError, match=r"has 1 runs that small does not have here.*--known"):
        report.write_report(output, tmp_path / "docs")
    write_json(tmp_path / "docs" / "results" / "small.json", json.loads(files["small.json"]))
    # Another table's images, and those of a figure that is no longer drawn, are none of the table's.
    for image in ("small-two-rates.png", "small-old.png"):
        (tmp_path / "docs" / "results" / image).write_bytes(b"an image")
    report.write_report(output, tmp_path / "docs")
    assert page.read_text() == text

    # A person reorders and writes; the next report only replaces the parts.
    first, second = (
        re.search(f"<!-- {name}: .*?<!-- {name}: [^>]*>", text, re.S).group() for name in ("small", "later")
    )
    page.write_text(f"# Ours\n\n{first.replace('54.0', '0.0')}\n\nB wins.\n\n{second}\n\nThe end.\n")
    report.write_report(output, tmp_path / "docs")
    assert page.read_text() == f"# Ours\n\n{first}\n\nB wins.\n\n{second}\n\nThe end.\n"


def test_without_results_there_is_nothing_to_report(tmp_path):
    with pytest.raises(RecipeError, match="no results in"):
        report.write_report(tmp_path, tmp_path / "docs")
    assert not (tmp_path / "docs").exists()
