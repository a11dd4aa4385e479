import json
import math
import os

import pytest

from hf_sara.tasks import e2e_metrics
from hf_sara.tasks.e2e_metrics import E2EMetrics

PREDICTIONS = ["Aromi is a cheap pub .", "There is a coffee shop near the river .", ""]
REFERENCES = [
    ["Aromi is a cheap pub near the river .", "A cheap pub is Aromi ."],
    ["There is a coffee shop near the river ."],
    ["The Mill is a diner .", "A diner : The Mill .", "Eat at The Mill ."],
]


@pytest.mark.slow
def test_perfect_predictions_score_one_with_no_java_on_the_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    # A line break in a text does not make it two.
    predictions = [group[0].replace(" is ", "\nis ") for group in REFERENCES]
    scores = E2EMetrics().compute(predictions=predictions, references=REFERENCES)
    assert list(scores) == ["bleu", "nist", "meteor", "rouge_l", "cider"]
    assert (scores["bleu"], scores["meteor"], scores["rouge_l"]) == pytest.approx((1.0, 1.0, 1.0))
    assert scores["cider"] > 4.0
    assert scores["nist"] > 3.0
    assert os.environ["PATH"] == str(tmp_path)


@pytest.mark.slow
def test_an_empty_prediction_counts():
    scores = E2EMetrics().compute(predictions=PREDICTIONS, references=REFERENCES)
    assert all(math.isfinite(score) and score > 0.0 for score in scores.values())
    assert scores["rouge_l"] < 0.7


def test_nist_by_hand():
    # Two references "a b" and "a c": 4 words, "a" twice, the others once.
    assert e2e_metrics.nist(["a b"], [["a b", "a c"]]) == pytest.approx(
        # unigrams: log2(4/2) + log2(4/1) over 2; bigrams: log2(2/1) over 1.
        (1.0 + 2.0) / 2 + 1.0
    )
    # Half as long as the references: "a" alone, and the brevity penalty.
    penalty = math.exp(math.log(0.5) / math.log(1.5) ** 2 * math.log(0.5) ** 2)
    assert e2e_metrics.nist(["A"], [["a b", "a c"]]) == pytest.approx(1.0 * penalty)
    # A repeated word counts as often as one reference has it.
    assert e2e_metrics.nist(["a a a"], [["a b", "a c"]]) == pytest.approx(1.0 / 3)


def test_bleu_takes_different_numbers_of_references():
    assert 0.0 < e2e_metrics.bleu(PREDICTIONS, REFERENCES) < 1.0
    assert e2e_metrics.bleu([""], [["a"]]) == 0.0


@pytest.mark.parametrize("references", [[["a"], []], [["a"]]])
def test_an_input_without_references_is_an_error(references):
    with pytest.raises(ValueError, match=r"1 has no reference|Mismatch"):
        E2EMetrics().compute(predictions=["a", "b"], references=references)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) for name in ("example", "tgen", "ukp_seed1")]
)
def test_the_scores_equal_the_official_script(reference_data, name):
    case = json.loads((reference_data / "e2e_metrics" / f"{name}.json").read_text())
    scores = E2EMetrics().compute(predictions=case["predictions"], references=case["references"])
    assert scores == pytest.approx(case["scores"], rel=0, abs=1e-6)
