import json
import math

import pytest
import torch
from conftest import FAMILIES, make_model, make_tokenizer, sara_arguments, train
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from training import training_arguments
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

from hf_sara import SaraAdapter, SaraTrainer
from hf_sara.tasks import e2e

DECODERS = [name for name, (_, _, kind) in FAMILIES.items() if kind.endswith("CausalLM") or kind == "GPT2LMHeadModel"]


# ---- data ----


def write_data(folder, **lines):
    folder.mkdir(exist_ok=True)
    for split, name in e2e.SPLITS.items():
        (folder / name).write_text(lines.get(split, "name : A||A is here . \n"), encoding="utf-8")
    return folder


def test_lines_are_stripped_and_split_and_blank_ones_left_out(tmp_path):
    text = "name : Café £ | area : x||The Café . \n\nname : B||B\u2028is  here .\n"
    data = e2e.load_e2e(write_data(tmp_path, train=text))
    assert data["train"]["mr"] == ["name : Café £ | area : x", "name : B"]
    assert data["train"]["text"] == ["The Café .", "B\u2028is  here ."]
    assert len(data["test"]) == 1


@pytest.mark.parametrize("line", ["no separator", "name : A||", "||text", "a||b||c"])
def test_a_line_of_another_form_is_an_error_with_its_number(line, tmp_path):
    with pytest.raises(ValueError, match=r"valid.txt, line 2: expected"):
        e2e.load_e2e(write_data(tmp_path, validation=f"name : A||A .\n{line}\n"))


def test_a_missing_or_empty_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train.txt, valid.txt, test.txt"):
        e2e.load_e2e(tmp_path / "nowhere")
    write_data(tmp_path, test="\n")
    with pytest.raises(ValueError, match=r"test.txt is empty"):
        e2e.load_e2e(tmp_path)
    (tmp_path / "valid.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no valid.txt"):
        e2e.load_e2e(tmp_path)


def test_texts_are_grouped_by_their_meaning_in_order_of_first_appearance():
    data = {"mr": ["b", "a", "b", "c"], "text": ["1", "2", "3", "4"]}
    groups = e2e.group_by_mr(data)
    assert list(groups.items()) == [("b", ["1", "3"]), ("a", ["2"]), ("c", ["4"])]


# ---- encoding ----


def rows(mrs=("name : A", "name : B | area : C"), texts=("A .", "B is in C .")):
    return DatasetDict({"train": Dataset.from_dict({"mr": list(mrs), "text": list(texts)})})


def test_an_example_is_prompt_eos_text_eos_with_loss_on_the_text():
    tokenizer = make_tokenizer()
    eos = tokenizer.eos_token_id
    encoded = e2e.encode_dataset(rows(), tokenizer)["train"]
    prompt, text = tokenizer("name : A")["input_ids"], tokenizer(" A .")["input_ids"]
    assert encoded[0]["input_ids"] == [*prompt, eos, *text, eos]
    assert encoded[0]["labels"] == [-100] * (len(prompt) + 1) + [*text, eos]
    assert encoded["length"] == [len(ids) for ids in encoded["input_ids"]]


def test_a_tokenizer_with_a_bos_token_gets_it_in_front_and_nothing_else():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    without = e2e.encode_prompts(tokenizer, ["name : A"])[0]
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    assert e2e.encode_prompts(tokenizer, ["name : A"])[0] == [tokenizer.bos_token_id, *without]


def test_long_examples_are_cut_and_prompts_that_fill_everything_refused():
    tokenizer = make_tokenizer()
    whole = e2e.encode_dataset(rows(), tokenizer)["train"]
    shorter = whole["length"][1] - 2
    cut = e2e.encode_dataset(rows(), tokenizer, max_length=shorter)["train"]
    assert cut[1]["input_ids"] == whole[1]["input_ids"][:shorter]
    assert cut[1]["labels"] == whole[1]["labels"][:shorter]
    with pytest.raises(ValueError, match="max_length=4 leaves no room"):
        e2e.encode_dataset(rows(), tokenizer, max_length=4)


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        e2e.encode_dataset(rows(), tokenizer)


def test_batches_are_padded_on_the_right_and_padding_does_not_count():
    tokenizer = make_tokenizer()
    encoded = e2e.encode_dataset(rows(), tokenizer)["train"].remove_columns("length")
    batch = e2e.make_collator(tokenizer)([encoded[0], encoded[1]])
    short, long = len(encoded[0]["input_ids"]), len(encoded[1]["input_ids"])
    assert batch["input_ids"].shape == batch["labels"].shape == (2, long)
    assert batch["attention_mask"].sum(1).tolist() == [short, long]
    assert (batch["labels"][0, short:] == -100).all()
    # EOS is also the pad token: the real one still counts.
    assert batch["labels"][0, short - 1] == tokenizer.eos_token_id


# ---- decoding ----


def plain_beam_search(model, prompt, beams, penalty, ngram, steps, eos):
    """The algorithm in plain words: one prompt, no cache, every step to the end."""
    states = [([], 0.0)]
    best, best_score = None, -math.inf
    for step in range(steps):
        scored = []
        for order, (tokens, total) in enumerate(states):
            with torch.no_grad():
                scores = model(torch.tensor([[*prompt, *tokens]])).logits[0, -1].float()
            for start in range(len(tokens) - ngram + 1 if ngram else 0):
                gram = tokens[start : start + ngram]
                if gram[:-1] == tokens[len(tokens) - ngram + 1 :]:
                    scores[gram[-1]] = -math.inf
            for token, value in enumerate(scores.log_softmax(0).tolist()):
                scored.append((total + value, -order, -token, tokens))
        scored.sort(reverse=True, key=lambda entry: entry[:3])
        states = []
        for total, _, token, tokens in scored[:beams]:
            tokens = [*tokens, -token]
            if -token in eos or step == steps - 1:
                score = total / len(tokens) ** penalty
                if score > best_score:
                    best, best_score = tokens, score
            states.append((tokens, -math.inf if -token in eos else total))
    return best


def prompts_of(lengths=(5, 2, 9, 1), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 40, (length,), generator=generator).tolist() for length in lengths]


SETTINGS = [
    {"num_beams": 4, "length_penalty": 0.8, "no_repeat_ngram_size": 2, "max_new_tokens": 8, "eos_token_ids": (2, 7)},
    {"num_beams": 3, "length_penalty": -0.5, "no_repeat_ngram_size": 0, "max_new_tokens": 6, "eos_token_ids": (5,)},
    {"num_beams": 1, "length_penalty": 1.0, "no_repeat_ngram_size": 1, "max_new_tokens": 5, "eos_token_ids": ()},
]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("family", DECODERS)
def test_batched_search_with_a_cache_is_the_plain_one(family, settings):
    # Bloom's float64 mask turns into -inf in its float32 softmax, so its padding would be NaN.
    model = make_model(family, dtype=torch.float32 if family == "bloom" else torch.float64)
    expected = [plain_beam_search(model, prompt, *settings.values()) for prompt in prompts_of()]
    assert e2e.beam_search(model, prompts_of(), **settings) == expected
    assert [e2e.beam_search(model, [prompt], **settings)[0] for prompt in prompts_of()] == expected


@pytest.mark.slow
def test_many_random_models_search_alike():
    settings = {**SETTINGS[0], "eos_token_ids": (2, 7, 11, 23)}
    lengths = set()
    for seed in range(8):
        model = make_model("gpt2", seed=seed, dtype=torch.float64)
        expected = [plain_beam_search(model, prompt, *settings.values()) for prompt in prompts_of(seed=seed)]
        assert e2e.beam_search(model, prompts_of(seed=seed), **settings) == expected
        lengths |= {len(tokens) for tokens in expected}
    # Texts that end at once, later, and not at all are among them.
    assert min(lengths) < 4
    assert max(lengths) == 8


def test_the_search_takes_the_adapter_into_account_and_restores_the_mode(method):
    model = make_model("llama")
    base = e2e.beam_search(model, prompts_of(), **SETTINGS[0])
    adapter = train(SaraAdapter.attach(model, sara_arguments(method)), steps=30, lr=0.2)
    model.train()
    assert e2e.beam_search(model, prompts_of(), **SETTINGS[0]) != base
    assert model.training
    with adapter.disabled():
        assert e2e.beam_search(model, prompts_of(), **SETTINGS[0]) == base


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_beams": 0}, "num_beams=0"),
        ({"num_beams": 41}, "between 1 and the vocabulary's 40"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size=-1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 40}, "of 32 positions"),
        ({"prompts": [[3], []]}, "no tokens"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    values = {"prompts": prompts_of(), **SETTINGS[0], **changes}
    with pytest.raises(ValueError, match=message):
        e2e.beam_search(make_model("gpt2"), **values)


def test_an_encoder_decoder_and_a_diverged_model_are_refused():
    with pytest.raises(ValueError, match="encoder-decoder"):
        e2e.beam_search(make_model("t5"), prompts_of(), **SETTINGS[0])
    model = make_model("gpt2")
    torch.nn.init.constant_(model.transformer.wte.weight, float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        e2e.beam_search(model, prompts_of(), **SETTINGS[0])


def test_no_prompts_give_no_texts():
    assert e2e.beam_search(make_model("gpt2"), []) == []


def test_a_text_ends_at_eos_and_at_a_blank_line():
    tokenizer = make_tokenizer()
    ids = tokenizer(" The fox .\n\nAnd more")["input_ids"]
    assert e2e.decode_text(tokenizer, ids) == "The fox ."
    ids = [*tokenizer(" The fox .")["input_ids"], tokenizer.eos_token_id, *tokenizer(" more")["input_ids"]]
    assert e2e.decode_text(tokenizer, ids) == "The fox ."
    assert e2e.decode_text(tokenizer, [tokenizer.eos_token_id]) == ""


def test_a_blank_line_ends_a_text_where_it_is_one_token():
    assert e2e.eos_tokens(make_tokenizer()) == [0]
    tokenizer = make_tokenizer(["a\n\n"] * 9)
    assert e2e.eos_tokens(tokenizer) == [0, tokenizer("\n\n")["input_ids"][0]]


def test_the_mode_of_a_model_is_restored():
    model = make_model()
    for training in (True, False):
        model.train(training)
        with e2e.evaluating(model):
            assert not model.training
        assert model.training == training
        with pytest.raises(KeyError), e2e.evaluating(model):
            raise KeyError
        assert model.training == training


# ---- beside the original code's outputs ----


def test_the_real_data_are_complete_and_encoded_as_in_the_original(reference_data):
    data = e2e.load_e2e(reference_data / "e2e")
    assert [(len(part), len(e2e.group_by_mr(part))) for part in data.values()] == [
        (42061, 4862),
        (4672, 547),
        (4693, 630),
    ]
    tokenizer = GPT2TokenizerFast.from_pretrained(reference_data / "gpt2_tokenizer")
    head = DatasetDict({split: part.select(range(3)) for split, part in data.items()})
    encoded = e2e.encode_dataset(head, tokenizer)
    for split, name in (("train", "train"), ("validation", "valid"), ("test", "test")):
        golden = json.loads((reference_data / "golden" / f"e2e_{name}_first3.json").read_text())
        for row, expected in zip(encoded[split], golden, strict=True):
            assert row["input_ids"] == expected["context_ids"] + expected["completion_ids"]
            assert row["labels"] == [-100] * len(expected["context_ids"]) + expected["completion_ids"]


def lines(path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def golden_gpt2(reference_data):
    folder = reference_data / "golden"
    model = GPT2LMHeadModel(GPT2Config(**json.loads((folder / "tiny_gpt2_config.json").read_text())))
    result = model.load_state_dict(load_file(folder / "tiny_gpt2.safetensors"), strict=False)
    assert result.missing_keys == ["lm_head.weight"]
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [7, 60])
def test_the_search_equals_the_original_token_by_token(reference_data, golden_gpt2, batch_size):
    folder = reference_data / "golden"
    golden = [json.loads(line)["predict"] for line in lines(folder / "tiny_beam_b10_lp0.8_ng4.jsonl")]
    prompts = [json.loads(line)["context"] for line in lines(folder / "tiny_test.jsonl")]
    assert len(golden) == len(prompts) == 60
    found = []
    for start in range(0, 60, batch_size):
        found += e2e.beam_search(golden_gpt2, prompts[start : start + batch_size])
    for output, expected in zip(found, golden, strict=True):
        # The original fills up with zeros behind the end.
        assert output == expected[: len(output)]
        assert output[-1] in (50256, 628) or len(output) == 64


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_equals_the_original(reference_data, golden_gpt2, tmp_path, smoothing):
    folder = reference_data / "golden"
    golden = json.loads((folder / "tiny_loss.json").read_text())
    tokenizer = GPT2TokenizerFast.from_pretrained(reference_data / "gpt2_tokenizer", pad_token="<|endoftext|>")
    examples = [json.loads(line) for line in lines(folder / "tiny_train8.jsonl")]
    batch = e2e.make_collator(tokenizer)(
        [
            {
                "input_ids": row["context"] + row["completion"],
                "labels": [-100] * len(row["context"]) + row["completion"],
            }
            for row in examples
        ]
    )
    assert int((batch["labels"] != -100).sum()) == golden["mask_sum"]
    args = training_arguments(tmp_path, label_smoothing_factor=smoothing)
    trainer = SaraTrainer(model=golden_gpt2, args=args, sara_args=sara_arguments("mo_sara"))
    try:
        with torch.no_grad():
            loss = trainer.compute_loss(golden_gpt2.eval(), dict(batch))
    finally:
        trainer.sara_adapter.detach()
    assert float(loss) == pytest.approx(golden[f"loss_label_smooth_{smoothing}"], rel=1e-5)
