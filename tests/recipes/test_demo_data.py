import csv
import json
import re

import pytest

from harness.demo_data import (
    OWN_DATA_SIZES,
    PRICE_RANGES,
    SIZES,
    make_commonsense_demo_data,
    make_demo_data,
    make_label_demo_data,
    make_math_demo_data,
    make_prompt_demo_data,
)
from hf_sara.tasks import commonsense, math
from hf_sara.tasks.e2e import group_by_mr, load_e2e


def test_the_demo_data_have_the_layout_and_the_sizes_that_they_claim(tmp_path):
    data = load_e2e(make_demo_data(tmp_path / "new" / "folder"))
    groups = {split: group_by_mr(part) for split, part in data.items()}
    assert [len(group) for group in groups.values()] == list(SIZES.values())
    assert all(len(texts) == 3 and len(set(texts)) == 3 for group in groups.values() for texts in group.values())
    # No test input stands in the training data.
    assert not set(groups["train"]) & (set(groups["validation"]) | set(groups["test"]))


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    one, same, other = (make_demo_data(tmp_path / str(i), seed=seed) for i, seed in enumerate((0, 0, 1)))
    for name in SIZES:
        assert (one / name).read_bytes() == (same / name).read_bytes() != (other / name).read_bytes()


def test_every_text_tells_the_facts(tmp_path):
    data = load_e2e(make_demo_data(tmp_path))
    for mr, texts in group_by_mr(data["train"]).items():
        facts = dict(part.split(" : ") for part in mr.split(" | "))
        for text in texts:
            assert facts["name"] in text
            assert re.match(r"[A-Z]", text)
            assert text.endswith(" .")
            assert "  " not in text
            for key in ("food", "near"):
                assert facts.get(key, "") in text


# ---- data in the forms that people have ----


def test_the_prompts_ask_for_what_the_completions_tell(tmp_path):
    folder, prompts = make_prompt_demo_data(tmp_path), {}
    for split, size in OWN_DATA_SIZES.items():
        records = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        prompts[split] = {record["prompt"] for record in records}
        assert len(prompts[split]) == len(records) == size
        for record in records:
            assert record["prompt"].startswith("Describe this place.\nname : ")
            assert record["prompt"].split("name : ")[1].split(" | ")[0] in record["completion"]
    assert not prompts["train"] & prompts["validation"]


def test_the_labels_are_the_price_ranges_of_the_texts(tmp_path):
    folder = make_label_demo_data(tmp_path)
    told = {
        "cheap": "low prices|less than £ 15",
        "moderate": "average prices",
        "expensive": "high prices|more than £ 40",
    }
    assert set(told) == set(PRICE_RANGES.values())
    for split, size in OWN_DATA_SIZES.items():
        with open(folder / f"{split}.csv", encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
        assert len(rows) == size
        assert {row["label"] for row in rows} == set(told)
        assert all(re.search(told[row["label"]], row["text"]) for row in rows)


@pytest.mark.parametrize("make", [make_prompt_demo_data, make_label_demo_data])
def test_a_seed_decides_the_bytes(make, tmp_path):
    one, same, other = (make(tmp_path / str(i), seed=seed) for i, seed in enumerate((0, 0, 1)))
    for path in one.iterdir():
        assert path.read_bytes() == (same / path.name).read_bytes() != (other / path.name).read_bytes()


# ---- math and commonsense ----


@pytest.mark.parametrize("make", [make_math_demo_data, make_commonsense_demo_data])
def test_the_same_seed_gives_the_same_questions(make, tmp_path):
    one, same, other = (make(tmp_path / str(i), seed=seed) for i, seed in enumerate((0, 0, 1)))
    files = sorted(path.relative_to(one) for path in one.rglob("*.json"))
    assert len(files) in (4, 6)
    for name in files:
        assert (one / name).read_bytes() == (same / name).read_bytes() != (other / name).read_bytes()


@pytest.mark.parametrize(
    ("make", "task", "load"),
    [
        (make_math_demo_data, math, lambda folder: math.load_math(folder, ["AddSub", "MultiArith", "AQuA"])),
        (
            make_commonsense_demo_data,
            commonsense,
            lambda folder: commonsense.load_commonsense(folder, ["boolq", "piqa", "openbookqa"]),
        ),
    ],
)
def test_every_output_is_judged_right_and_no_test_question_is_trained_on(make, task, load, tmp_path):
    data = load(make(tmp_path))
    trained = set(data.pop("train")["instruction"])
    assert len(trained) == 600
    for name, part in data.items():
        assert len(part) == len(set(part["instruction"])) == 40
        assert not trained & set(part["instruction"])
        # More than one answer occurs, and what stands in the question does not give it away.
        assert len(set(part["answer"])) > 1
        for row in part:
            assert task.judge(name, row["output"].strip(), row["answer"])[1], row


def test_the_problems_add_up(tmp_path):
    data = math.load_math(make_math_demo_data(tmp_path), ["AddSub", "MultiArith", "AQuA"])
    for part in data.values():
        for row in part:
            first, sign, second, result = re.search(r"(\d+) ([+*-]) (\d+) = (\d+)", row["output"]).groups()
            assert {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[sign](int(first), int(second)) == int(result)
            if row["answer"] in set("ABCDE"):
                assert f"({row['answer']}) {result}" in re.split(" (?=\\([B-E]\\))|: ", row["instruction"])
            else:
                assert float(row["answer"]) == int(result)
