import json
from itertools import pairwise

import pytest
from conftest import make_tokenizer
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

from hf_sara.tasks import instruct

I16 = " " * 16
TASK = "Below is an instruction that describes a task"
REQUEST = "Write a response that appropriately completes the request."


def record(instruction="How many?", input="", output="Three, so the answer is 3.", answer="3"):
    return {"instruction": instruction, "input": input, "output": output, "answer": answer}


def records(*rows) -> Dataset:
    return Dataset.from_list(list(rows) or [record(), record("How many more of them are there?", output="8")])


def tokenizer_with_bos():
    """As LLaMA's: <unk> is 0, a BOS goes in front of every text."""
    tokenizer = make_tokenizer([instruct.make_prompt("How many?", training=True) + "The answer is 3."] * 3)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


# ---- data ----


def test_records_are_lists_or_lines_of_strings_that_stay_strings(tmp_path):
    rows = [record(answer="4.0"), record("Café\u2028?", answer="007", output="\n2020-01-02")]
    # Not a pattern.
    tmp_path = tmp_path / "[1]*"
    tmp_path.mkdir()
    (tmp_path / "list.json").write_text(json.dumps(rows))
    (tmp_path / "extra.json").write_text(json.dumps([{**row, "more": [1]} for row in rows]))
    files = {"one": str(tmp_path / "list.json"), "ARC-Easy": str(tmp_path / "extra.json")}
    data = instruct.load_records(files)
    assert list(data) == ["one", "ARC-Easy"]
    assert list(data["one"]) == list(data["ARC-Easy"]) == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not a JSON list"),
        ("[", "not a JSON list"),
        ("[]", "not a JSON list"),
        (json.dumps([{**record(), "answer": 3}]), "'answer' has to be a string"),
        (json.dumps([{**record(), "answer": ["3"]}]), "'answer' has to be a string"),
        (json.dumps([{"instruction": "", "output": "", "answer": ""}]), "'input' has to be a string"),
        (json.dumps([record(), {"instruction": "", "input": "", "output": ""}]), "record 2 has no 'answer'"),
    ],
)
def test_a_file_of_another_form_is_an_error_that_names_it(content, message, tmp_path):
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(ValueError, match=f"data.json.*{message}"):
        instruct.load_records({"train": str(tmp_path / "data.json")})


def test_all_missing_files_are_named(tmp_path):
    (tmp_path / "there.json").write_text(json.dumps([record()]))
    files = {name: str(tmp_path / f"{name}.json") for name in ("there", "one", "two")}
    with pytest.raises(FileNotFoundError, match=r"no \S+/one.json, \S+/two.json"):
        instruct.load_records(files)


# ---- prompt ----


def test_the_four_prompts_differ_in_their_white_space():
    assert instruct.make_prompt("I", training=True) == (
        f"{TASK}. {REQUEST}  \n\n{I16}### Instruction:\n{I16}I\n{I16}\n{I16}### Response:\n{I16}"
    )
    assert instruct.make_prompt("I") == (
        f"{TASK}. {REQUEST} \n\n{I16}### Instruction:\n{I16}I\n\n{I16}### Response:\n{I16}"
    )
    header = f"{TASK}, paired with an input that provides further context. {REQUEST}"
    assert instruct.make_prompt("I", "X", training=True) == (
        f"{header} \n\n{I16}### Instruction:\n{I16}I\n{I16}\n{I16}### Input:\n{I16}X\n{I16}\n{I16}### Response:\n{I16}"
    )
    assert instruct.make_prompt("I", "X") == (
        f"{header}\n\n{I16}### Instruction:\n{I16}I\n\n{I16}### Input:\n{I16}X\n\n{I16}### Response:\n{I16}"
    )


@pytest.mark.parametrize("training", [True, False])
def test_the_form_with_an_input_can_be_had_for_an_empty_one(training):
    with_text = instruct.make_prompt("I", "X", training=training)
    assert instruct.make_prompt("I", "", training=training, with_input=True) == with_text.replace("X", "")
    assert instruct.make_prompt("I", "X", training=training, with_input=True) == with_text


# ---- encoding ----


def test_prompt_and_output_are_one_text_with_bos_and_eos_and_the_loss_on_all_of_it():
    tokenizer = tokenizer_with_bos()
    encoded = instruct.encode_dataset(records(), tokenizer)
    for row, source in zip(encoded, records(), strict=True):
        text = instruct.make_prompt(source["instruction"], training=True) + source["output"]
        expected = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        assert row["input_ids"] == [*expected, tokenizer.eos_token_id]
        assert row["labels"] == row["input_ids"]
        assert row["attention_mask"] == [1] * len(row["input_ids"])
        assert row["length"] == len(row["input_ids"])


def test_a_tokenizer_without_bos_gets_none_and_the_output_is_not_tokenized_apart():
    # The last space of the prompt and the output are one token together.
    tokenizer = make_tokenizer([f"{I16}a"] * 9)
    joined = instruct.encode_dataset(records(record(output="a")), tokenizer, max_length=999)[0]["input_ids"]
    prompt = instruct.make_prompt("How many?", training=True)
    assert joined == [*tokenizer(f"{prompt}a")["input_ids"], tokenizer.eos_token_id]
    assert joined[:-1] != tokenizer(prompt)["input_ids"] + tokenizer("a")["input_ids"]


@pytest.mark.parametrize("shorter", [0, 1, 2, 7])
def test_eos_stands_where_it_fits_and_long_examples_are_cut(shorter):
    tokenizer = tokenizer_with_bos()
    row = records(record())
    whole = instruct.encode_dataset(row, tokenizer)[0]["input_ids"]
    cut = instruct.encode_dataset(row, tokenizer, max_length=len(whole) - shorter)[0]["input_ids"]
    assert cut == whole[: len(whole) - shorter]
    assert (tokenizer.eos_token_id in cut) == (shorter == 0)


def test_there_are_never_two_eos():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", tokenizer.eos_token_id)]
    )
    ids = instruct.encode_dataset(records(record()), tokenizer)[0]["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id


def test_the_form_with_an_input_is_encoded_too():
    tokenizer = make_tokenizer()
    rows = records(record(), record(input="X"))
    ids = instruct.encode_dataset(rows, tokenizer, max_length=999, with_input=True)["input_ids"]
    texts = [tokenizer.decode(row) for row in ids]
    assert f"### Input:\n{I16}\n" in texts[0]
    assert f"### Input:\n{I16}X\n" in texts[1]


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        instruct.encode_dataset(records(), tokenizer)


def test_batches_are_padded_on_the_left_with_id_0_that_does_not_count():
    tokenizer = tokenizer_with_bos()
    tokenizer.pad_token = tokenizer.eos_token
    encoded = instruct.encode_dataset(records(), tokenizer).remove_columns("length")
    batch = instruct.make_collator(tokenizer)(list(encoded))
    size = batch["input_ids"].shape[1]
    assert size % 8 == 0
    for ids, mask, labels, row in zip(
        batch["input_ids"], batch["attention_mask"], batch["labels"], encoded, strict=True
    ):
        padding = size - len(row["input_ids"])
        assert ids.tolist() == [0] * padding + row["input_ids"]
        assert mask.tolist() == [0] * padding + [1] * len(row["input_ids"])
        assert labels.tolist() == [-100] * padding + row["input_ids"]
    assert (batch["attention_mask"] == 0).any()


# ---- beside the original code's outputs ----


def test_prompts_equal_the_original_to_the_character(reference_data):
    golden = json.loads((reference_data / "golden" / "llm_adapters_prompts.json").read_text())
    first = json.loads((reference_data / "math" / "train.json").read_text())[0]
    prompt = instruct.make_prompt(first["instruction"], training=True)
    assert prompt == golden["train_noinput_prompt_only"]
    assert prompt + first["output"] == golden["train_noinput"]
    assert instruct.make_prompt(first["instruction"]) == golden["eval_noinput"]
    assert instruct.make_prompt("I", training=True) + "O" == golden["train_noinput_tmpl"]
    assert instruct.make_prompt("I") == golden["eval_noinput_tmpl"]
    assert instruct.make_prompt("I", "X", training=True) + "O" == golden["train_input"]
    assert instruct.make_prompt("I", "X") == golden["eval_input"]
    assert len(golden) == 7
    # No two of the forms are the same.
    forms = sorted(value for name, value in golden.items() if name.endswith(("tmpl", "_input")))
    assert all(one != other for one, other in pairwise(forms))
