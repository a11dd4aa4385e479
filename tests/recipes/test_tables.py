import pytest
import yaml
from recipe_scripts import FAKE
from sweeps import SMALL, write

from harness import tables
from harness.options import RecipeError
from harness.sweep import Sweep
from harness.tables import load_table


def test_rows_have_the_tables_options_and_their_own(tmp_path):
    table = load_table(write(tmp_path, options={"size": 2, "layers": "0-1"}))
    a, b, printed = table.rows
    assert a.options == {"size": 2, "layers": "0-1", "learning_rate": [0.1, 0.01, 0.001], "seed": [3, 4, 5]}
    assert b.options == {"size": 4, "layers": "0-1"}
    assert printed.options is None
    assert [row.label for row in tables.select_rows(table)] == ["A", "big B"]
    assert (table.name, table.owner) == ("small", "small")
    changed = tables.override(table, {"size": 9})
    assert [row.options and row.options["size"] for row in changed.rows] == [9, 9, None]


def test_a_table_on_another_one_shares_its_runs(tmp_path):
    write(tmp_path, options={"layers": "0-1"})
    rows = [
        "big B",
        {"same_as": "big B", "name": "again", "group": None, "x": 3},
        {"name": "C", "options": {"size": 2}},
    ]
    # Two names of one run are an error: its row would stand there twice.
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({"base": "small", "rows": rows}))
    with pytest.raises(RecipeError, match="two rows of one name"):
        load_table(tmp_path / "other.yaml")
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({"base": "small", "title": "Other", "rows": rows[1:]}))
    table = load_table(tmp_path / "other.yaml")
    again, new = table.rows
    assert (table.name, table.owner, table.title, table.columns) == ("other", "small", "Other", SMALL["columns"])
    assert (again.label, again.x, again.folder) == ("again", 3, "big-b")
    assert again.options == {"size": 4, "layers": "0-1"}
    assert (new.folder, new.options) == ("c", {"size": 2, "layers": "0-1"})
    # And one on that one.
    (tmp_path / "third.yaml").write_text("base: other\nrows: [C]\n")
    third = load_table(tmp_path / "third.yaml")
    assert (third.owner, [row.label for row in third.rows]) == ("small", ["C"])
    first, second = (Sweep(table, "out", FAKE) for table in (load_table(tmp_path / "small.yaml"), table))
    assert next(first.runs_of(first.table.rows[1])) == next(second.runs_of(again))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": [{"name": "A", "option": {}}]}, r"unknown entries \['option'\]"),
        ({"rows": [{"options": {}}]}, "no name"),
        ({"rows": ["A"]}, r"no row 'A' in its base, only \[\]"),
        ({"rows": [{"name": "A"}, {"name": "a"}]}, "two rows of one name"),
        ({"rows": [{"name": "A", "options": {"learning_rate": ["1e-3"]}}]}, r"numbers like 0.001 or 1.0e-3"),
        ({"column": {}}, r"unknown entries \['column'\] and lacks \[\]"),
        ({"options": ["size"]}, "options has to be a mapping"),
        ({"rows": [3]}, "the row 3 and its options have to be mappings"),
        ({"rows": [{"name": "A", "options": ["size"]}]}, "have to be mappings"),
    ],
)
def test_a_table_of_another_form_is_an_error(changes, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        load_table(write(tmp_path, **changes))


def test_files_that_are_no_table_are_an_error(tmp_path):
    (tmp_path / "list.yaml").write_text("- 3\n")
    (tmp_path / "broken.yaml").write_text("a: [\n")
    (tmp_path / "empty.yaml").write_text("rows: []\n")
    for name, message in (
        ("list", "mapping"),
        ("broken", "cannot be read"),
        ("empty", r"lacks \['recipe', 'title'\]"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_table(tmp_path / f"{name}.yaml")
    with pytest.raises(RecipeError, match=r"no table 'table5'.*one of: broken, empty, list"):
        tables.find_table("table5", tmp_path)
    assert tables.find_table("list", tmp_path) == tables.find_table(str(tmp_path / "list.yaml"), "elsewhere")


def test_rows_are_chosen_by_label_or_name(tmp_path):
    table = load_table(write(tmp_path))
    assert [row.label for row in tables.select_rows(table, ["BIG-b"])] == ["big B"]
    assert [row.label for row in tables.select_rows(table, ["b", "a"])] == ["A", "big B"]
    with pytest.raises(RecipeError, match=r"no row c, printed to run. It has: A; big B"):
        tables.select_rows(table, ["printed", "C", "A"])


def test_tables_are_listed_by_their_numbers(tmp_path):
    for name in ("table10", "table2", "figure3", "table1"):
        write(tmp_path, name)
    assert tables.table_names(tmp_path) == ["figure3", "table1", "table2", "table10"]


def test_a_table_is_found_by_the_names_of_its_figures(tmp_path):
    write(tmp_path, "table8", also=["figure3", "figure4"])
    (tmp_path / "other.yaml").write_text("base: table8\n")
    for name in ("table8", "figure3", "figure4"):
        assert tables.find_table(name, tmp_path) == tmp_path / "table8.yaml"
    # The figures are not those of a table that is based on it.
    assert (load_table(tmp_path / "table8.yaml").also, load_table(tmp_path / "other.yaml").also) == (
        ["figure3", "figure4"],
        (),
    )
    with pytest.raises(RecipeError, match=r"no table 'figure5'.*one of: other, table8, figure3, figure4"):
        tables.find_table("figure5", tmp_path)
    with pytest.raises(RecipeError, match="also has to be a list"):
        load_table(write(tmp_path, also="figure3"))
