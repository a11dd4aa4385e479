import json

import pytest
import torch
from conftest import make_model, make_tokenizer, sara_arguments, train
from datasets import Dataset

from harness import instruct_task
from hf_sara import SaraAdapter
from hf_sara.tasks import instruct

I16 = " " * 16


def record(instruction="How many?", input="", output="Three, so the answer is 3.", answer="3"):
    return {"instruction": instruction, "input": input, "output": output, "answer": answer}


def records(*rows) -> Dataset:
    return Dataset.from_list(list(rows) or [record(), record("How many more of them are there?", output="8")])


@pytest.fixture
def model():
    """A tiny Llama whose responses differ with its adapter, and its tokenizer."""
    tokenizer = make_tokenizer([instruct.make_prompt("How many?", training=True) + "The answer is 3."] * 3)
    model = make_model("llama", vocab_size=len(tokenizer), max_position_embeddings=512, eos_token_id=0)
    # What real checkpoints bring along must not turn sampling on.
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9, max_length=20)
    train(SaraAdapter.attach(model, sara_arguments(dropout=0.5)))
    return model.train(), tokenizer


def judge(response, right):
    return response[:2], response[:2] == right


QUESTIONS = [record(f"How many{'?' * (i % 4 + 1)} {i}", answer="aa") for i in range(5)]
SETTINGS = {"batch_size": 2, "max_new_tokens": 6}


def test_responses_are_those_of_plain_beam_search_one_at_a_time(model, tmp_path):
    model, tokenizer = model
    rows = instruct_task.answer(model, tokenizer, records(*QUESTIONS), tmp_path / "a.jsonl", judge, **SETTINGS)
    assert model.training
    model.eval()
    for index, (row, question) in enumerate(zip(rows, QUESTIONS, strict=True)):
        inputs = tokenizer(instruct.make_prompt(question["instruction"]), return_tensors="pt")
        output = model.generate(**inputs, num_beams=4, do_sample=False, max_new_tokens=6, pad_token_id=0)
        response = tokenizer.decode(output[0]).split("### Response:")[1].split("<|endoftext|>")[0].strip()
        assert row == {
            "index": index,
            "instruction": question["instruction"],
            "response": response,
            "prediction": response[:2],
            "answer": "aa",
            "correct": response[:2] == "aa",
        }
    assert [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()] == rows
    with model.sara_adapter.disabled():
        base = instruct_task.answer(model, tokenizer, records(*QUESTIONS), tmp_path / "b.jsonl", judge, **SETTINGS)
    assert [row["response"] for row in base] != [row["response"] for row in rows]


def test_a_response_ends_where_the_next_prompt_would_begin(model, tmp_path, monkeypatch):
    model, tokenizer = model
    tail = f"  3 of them \n\n{I16}### Response:\n 4 ### Response: 5"

    def generate(input_ids, attention_mask, generation_config):
        assert (generation_config.num_beams, generation_config.do_sample) == (4, False)
        assert generation_config.max_new_tokens == 256
        ids = torch.tensor([[*tokenizer(tail)["input_ids"], tokenizer.eos_token_id]])
        return torch.cat([input_ids, ids.expand(len(input_ids), -1)], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    rows = instruct_task.answer(model, tokenizer, records(*QUESTIONS), tmp_path / "a.jsonl", judge)
    assert {row["response"] for row in rows} == {"3 of them"}


def test_an_interrupted_evaluation_goes_on_and_ends_with_the_same_files(model, tmp_path, monkeypatch):
    model, tokenizer = model
    sets = {"one": records(*QUESTIONS), "two": records(*QUESTIONS[:3])}

    def judge_set(name, response, right):
        return name, name == "two" or response.endswith("?")

    def run(folder):
        return instruct_task.answer_test_sets(model, tokenizer, sets, tmp_path / folder, judge_set, **SETTINGS)

    whole = run("whole")
    generate, calls = model.generate, []

    def crash(**kwargs):
        calls.append(kwargs)
        if len(calls) in (2, 6):
            raise KeyboardInterrupt
        return generate(**kwargs)

    monkeypatch.setattr(model, "generate", crash)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run("parts")
    path = tmp_path / "parts" / "two.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    assert run("parts") == whole
    # Of five batches, two were interrupted and one was cut off by hand.
    assert len(calls) == 8
    for name in sets:
        assert (tmp_path / "parts" / f"{name}.jsonl").read_bytes() == (
            tmp_path / "whole" / f"{name}.jsonl"
        ).read_bytes()


def test_the_average_is_that_of_the_test_sets_not_of_the_questions(model, tmp_path):
    model, tokenizer = model
    sets = {"one": records(*QUESTIONS[:4]), "two": records(*QUESTIONS[:1])}
    seen = []

    def judge_set(name, response, right):
        seen.append((name, right))
        return None, name == "two" or seen.count((name, right)) == 1

    scores = instruct_task.answer_test_sets(model, tokenizer, sets, tmp_path, judge_set, **SETTINGS)
    assert scores == {"one": 0.25, "two": 1.0, "average": 0.625}
    assert seen == [("one", "aa")] * 4 + [("two", "aa")]
