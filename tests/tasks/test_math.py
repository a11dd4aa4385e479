import json
import math

import pytest

from harness.demo_data import make_math_demo_data
from hf_sara.tasks.math import TEST_SETS, extract_letter, extract_number, judge, load_math

DEMO = ("AddSub", "MultiArith", "AQuA")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("A: 3 and 4 make 7. The answer is 7.", 7.0),
        ("The answer is 1,234,567.50 dollars", 1234567.5),
        ("from 10 to -3", -3.0),
        ("a range of 5-7", -7.0),
        ("12.", 12.0),
        (".5", 5.0),
        ("1.2.3", 3.0),
        ("none at all", math.inf),
        ("", math.inf),
    ],
)
def test_the_last_number_counts(text, number):
    assert extract_number(text) == number


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is (C).", "C"),
        ("Rationale: it is (E), not (D).", "E"),
        # As in the original: a letter anywhere.
        ("Because of that, (D)", "B"),
        ("the answer is (f)", ""),
        ("", ""),
    ],
)
def test_the_first_capital_letter_from_a_to_e_counts(text, letter):
    assert extract_letter(text) == letter


@pytest.mark.parametrize(
    ("test_set", "response", "answer", "expected"),
    [
        ("gsm8k", "The answer is 480.0005", "480", (480.0005, True)),
        ("gsm8k", "The answer is 480.002", "480.0", (480.002, False)),
        ("gsm8k", "no idea", "480.0", (None, False)),
        ("AQuA", "(B) 12", "B", ("B", True)),
        ("AQuA", "(C) 12", "B", ("C", False)),
        ("AQuA", "12", "B", ("", False)),
        # More digits than a float holds.
        ("SVAMP", "9" * 400, "3", (None, False)),
    ],
)
def test_numbers_are_right_within_a_thousandth_and_letters_when_they_are_the_same(
    test_set, response, answer, expected
):
    found = judge(test_set, response, answer)
    assert found == expected
    json.dumps(found, allow_nan=False)


def test_the_layout_of_a_folder_is_read(tmp_path):
    data = load_math(make_math_demo_data(tmp_path), DEMO)
    assert {name: len(part) for name, part in data.items()} == {"train": 600, **dict.fromkeys(DEMO, 40)}
    assert list(load_math(tmp_path, ["AQuA"])) == ["train", "AQuA"]
    with pytest.raises(FileNotFoundError, match=r"math/test/SVAMP.json, \S+gsm8k.json"):
        load_math(tmp_path, ["SVAMP", "gsm8k", "AddSub"])


@pytest.mark.parametrize("answer", ["12a", "", "inf", "nan"])
def test_an_answer_that_is_no_number_is_an_error_with_its_record(answer, tmp_path):
    path = make_math_demo_data(tmp_path) / "math" / "test" / "AddSub.json"
    rows = json.loads(path.read_text())
    rows[2]["answer"] = answer
    path.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"AddSub.json, record 3: the answer"):
        load_math(tmp_path, DEMO)


# ---- beside the original data and code's outputs ----


def test_the_real_data_are_complete(reference_data):
    data = load_math(reference_data)
    counts = {"SVAMP": 200, "AQuA": 51, "AddSub": 79, "MultiArith": 110, "SingleEq": 102, "gsm8k": 264}
    assert {name: len(part) for name, part in data.items()} == {"train": 3260, **counts}
    assert set(counts) == set(TEST_SETS)
    assert all(not text for part in data.values() for text in part["input"])
    rows = json.loads((reference_data / "math" / "train.json").read_text())
    assert list(data["train"]) == rows


def test_extraction_equals_the_original_on_all_rationales(reference_data):
    rows = [json.loads(line) for line in (reference_data / "golden" / "extract_math.jsonl").open(encoding="utf-8")]
    assert len(rows) == 4076
    for row in rows:
        expected = row["pred"]
        found = (extract_letter if row["dataset"] == "AQuA" else extract_number)(row["text"])
        assert found == (math.inf if expected in (None, "inf", "Infinity") else expected)
        assert judge(row["dataset"], row["text"], row["answer"])[1] == row["correct"]


def test_of_the_training_rationales_2488_reach_the_right_answer(reference_data):
    rows = load_math(reference_data, [])["train"]
    right = 0
    for row in rows:
        is_letter = row["answer"] in set("ABCDE")
        right += judge("AQuA" if is_letter else "gsm8k", row["output"], row["answer"])[1]
    assert right == 2488
