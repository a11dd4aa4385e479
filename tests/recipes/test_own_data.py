"""The labels, the splits and the scores of one's own data."""

from types import SimpleNamespace

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from harness import own_data
from harness.options import RecipeError
from harness.own_data_settings import OwnDataArguments


def labelled(train, other=None, feature=None) -> DatasetDict:
    features = Features({"text": Value("string"), "kind": feature}) if feature else None
    parts = {"train": train, **({"eval": other} if other else {})}
    return DatasetDict(
        {
            split: Dataset.from_dict({"text": list(map(str, kinds)), "kind": kinds}, features)
            for split, kinds in parts.items()
        }
    )


@pytest.mark.parametrize(
    ("train", "feature", "names", "numbers"),
    [
        (["pub", "cafe", "pub"], None, ["cafe", "pub"], [1, 0, 1]),
        ([10, 9, 2], None, ["2", "9", "10"], [2, 1, 0]),
        ([True, False], None, ["False", "True"], [1, 0]),
        # Class labels keep the order of their names, also of one that no record has.
        ([2, 0], ClassLabel(names=["z", "y", "a"]), ["z", "y", "a"], [2, 0]),
    ],
)
def test_labels_get_numbers(train, feature, names, numbers):
    encoded, found = own_data.encode_labels(labelled(train, train[:1], feature), "kind")
    assert found == names
    assert list(encoded["train"]["labels"]) == numbers
    assert list(encoded["eval"]["labels"]) == numbers[:1]
    assert encoded["train"].column_names == ["text", "labels"]


def test_splits_may_count_the_same_labels_in_another_order():
    data = labelled([0, 1], feature=ClassLabel(names=["cat", "dog"]))
    data["eval"] = labelled([0, 1], feature=ClassLabel(names=["dog", "cat"]))["train"]
    assert list(own_data.encode_labels(data, "kind")[0]["eval"]["labels"]) == [1, 0]


@pytest.mark.parametrize(
    ("train", "other", "feature", "message"),
    [
        (["a", "b"], ["a", "c"], None, "eval data have the labels c, which .* Those are a, b"),
        (["a", None], None, None, "1 of the 2 records of the train data have no label in 'kind'"),
        ([0, 1], [-1, -1], ClassLabel(names=["a", "b"]), "2 of the 2 records of the eval data have no label"),
        ([0.5, 1.0], None, None, "Labels are class labels, texts or whole numbers"),
    ],
)
def test_labels_that_are_missing_or_unknown_are_an_error(train, other, feature, message):
    with pytest.raises(RecipeError, match=message):
        own_data.encode_labels(labelled(train, other, feature), "kind")


def test_a_share_is_held_out_where_there_is_no_split_for_it():
    options = OwnDataArguments(model_name_or_path="a", dataset="b", eval_share=0.25, max_train_samples=5)
    data = own_data.hold_out(labelled(list(range(12))), options, seed=3)
    assert (len(data["train"]), len(data["eval"])) == (5, 3)
    assert not set(data["train"]["kind"]) & set(data["eval"]["kind"])
    again = own_data.hold_out(labelled(list(range(12))), options, seed=3)
    assert list(again["train"]["kind"]) == list(data["train"]["kind"])
    # Sorted data are mixed before some of them are left out.
    assert list(data["train"]["kind"]) != sorted(data["train"]["kind"])


def test_the_columns_are_those_of_one_form():
    data = DatasetDict(
        {
            "train": Dataset.from_dict({"text": ["a"], "label": ["b"]}),
            "eval": Dataset.from_dict(
                {"text": [None], "label": ["b"]}, Features({k: Value("string") for k in ("text", "label")})
            ),
        }
    )
    own_data.require_columns(DatasetDict({"train": data["train"]}), ("prompt",), ("text", "label"))
    with pytest.raises(RecipeError, match="'text' of the eval data is empty in 1 records"):
        own_data.require_columns(data, ("text", "label"))
    with pytest.raises(RecipeError, match=r"eval data have the columns label, and need prompt or text\+label"):
        own_data.require_columns(
            DatasetDict({"train": data["train"], "eval": data["eval"].remove_columns("text")}),
            ("prompt",),
            ("text", "label"),
        )


@pytest.mark.parametrize(
    ("given", "expected"), [(None, None), ("true", True), ("True", True), (True, True), ("runs/a", "runs/a")]
)
def test_true_is_the_last_checkpoint(given, expected):
    assert own_data.checkpoint(SimpleNamespace(resume_from_checkpoint=given)) == expected


def test_macro_f1_by_hand():
    # Label 0: 2 hits of 3 guesses and 2 right ones; label 1: 1 of 1 and 3; label 2: guessed once, never right.
    guessed, right = np.array([0, 0, 0, 1, 2]), np.array([0, 0, 1, 1, 1])
    assert own_data.macro_f1(guessed, right) == pytest.approx((4 / 5 + 2 / 4 + 0) / 3)


def test_macro_f1_is_that_of_sklearn():
    metrics = pytest.importorskip("sklearn.metrics")
    chance = np.random.default_rng(0)
    for labels in (2, 3, 7):
        guessed, right = chance.integers(labels, size=(2, 20))
        assert own_data.macro_f1(guessed, right) == pytest.approx(metrics.f1_score(right, guessed, average="macro"))
