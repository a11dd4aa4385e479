import json
import logging

import pytest

from harness.demo_data import make_commonsense_demo_data
from hf_sara.tasks.commonsense import TEST_SETS, extract_answer, judge, load_commonsense

DEMO = ("boolq", "piqa", "openbookqa")


@pytest.mark.parametrize(
    ("dataset", "text", "answer"),
    [
        ("boolq", "the correct answer is true, not false", "true"),
        ("boolq", "the correct answer is False", ""),
        ("piqa", "the correct answer is solution2", "solution2"),
        ("piqa", "solution3", ""),
        ("social_i_qa", "answer3", "answer3"),
        ("ARC-Easy", "answer6, then answer5", "answer5"),
        ("ARC-Challenge", "answer12", "answer1"),
        ("openbookqa", "Answer4 or answer1", "answer1"),
        ("hellaswag", "ending5 ending4", "ending4"),
        ("winogrande", "the option1 of option2", "option1"),
        ("winogrande", "option3", ""),
        ("winogrande", "", ""),
    ],
)
def test_the_first_answer_counts_in_the_form_of_its_data_set(dataset, text, answer):
    assert extract_answer(dataset, text) == answer
    assert judge(dataset, text, "answer1") == (answer, answer == "answer1")


def test_an_unknown_data_set_is_an_error():
    with pytest.raises(ValueError, match=r"no commonsense data set 'BoolQ'. Choose from boolq, piqa"):
        extract_answer("BoolQ", "true")
    with pytest.raises(ValueError, match="no commonsense data set 'sst2'"):
        load_commonsense("anywhere", ["sst2"])


def test_the_training_files_at_hand_are_joined_and_the_missing_ones_named(tmp_path, caplog):
    make_commonsense_demo_data(tmp_path)
    with caplog.at_level(logging.WARNING):
        data = load_commonsense(tmp_path, DEMO)
    assert {name: len(part) for name, part in data.items()} == {"train": 600, **dict.fromkeys(DEMO, 40)}
    assert "training files of boolq, piqa, openbookqa" in caplog.text
    assert "missing are those of social_i_qa, hellaswag, winogrande, ARC-Easy, ARC-Challenge" in caplog.text
    rows = [
        row
        for name in DEMO
        for row in json.loads((tmp_path / "commonsense" / name / "train.json").read_text(encoding="utf-8"))
    ]
    key = json.dumps
    assert sorted(data["train"], key=key) == sorted(rows, key=key)
    # Whoever trains on the first records only has some of each, and the same ones every time.
    first = data["train"].select(range(30))["output"]
    assert len({text for text in first if "solution" in text}) > 0 < len({text for text in first if "true" in text})
    assert list(load_commonsense(tmp_path, DEMO)["train"]) == list(data["train"])


def test_the_whole_training_file_goes_before_its_parts(tmp_path, caplog):
    folder = make_commonsense_demo_data(tmp_path) / "commonsense"
    rows = json.loads((folder / "piqa" / "train.json").read_text())[:7]
    (folder / "commonsense_170k.json").write_text(json.dumps(rows))
    with caplog.at_level(logging.WARNING):
        assert list(load_commonsense(tmp_path, ["piqa"])["train"]) == rows
    assert not caplog.text


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither \S+/commonsense_170k.json nor a train.json"):
        load_commonsense(tmp_path)
    make_commonsense_demo_data(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"winogrande/test.json"):
        load_commonsense(tmp_path, ["boolq", "winogrande"])


def test_the_real_data_are_complete_and_every_right_answer_has_the_form_of_its_data_set(reference_data, caplog):
    with caplog.at_level(logging.WARNING):
        data = load_commonsense(reference_data)
    assert {name: len(part) for name, part in data.items()} == {
        "train": 1119 + 2251 + 9427 + 4957,
        "boolq": 3270,
        "piqa": 1838,
        "social_i_qa": 1954,
        "hellaswag": 10042,
        "winogrande": 1267,
        "ARC-Easy": 2376,
        "ARC-Challenge": 1172,
        "openbookqa": 500,
    }
    assert "missing are those of piqa, social_i_qa, hellaswag, winogrande" in caplog.text
    for name in TEST_SETS:
        for row in data[name]:
            assert judge(name, row["output"], row["answer"]) == (row["answer"], True)
