"""The recipe that classifies one's own texts or images, as a user runs it, on tiny models."""

import csv
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer
from datasets.utils import disable_progress_bars
from recipe_scripts import RECIPES, load, need_smollm2
from transformers import AutoModelForImageClassification

from harness import base_models
from harness.base_models import SMOLLM2
from harness.options import RecipeError, parse_arguments
from hf_sara import SaraAdapter, from_hub

disable_progress_bars()

KINDS = {"pub": "The {} pub has beer .", "cafe": "The {} cafe has tea ."}
COLOURS = {"dark": 30, "light": 220}


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """A tiny Llama without a head for classes, in a folder."""
    folder, tokenizer = tmp_path_factory.mktemp("llama"), make_tokenizer()
    tokenizer.save_pretrained(folder)
    make_model("llama", vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A tiny ViT with a head for three classes, in a folder."""
    pytest.importorskip("PIL", reason="needs Pillow: pip install -e '.[test]'")
    from transformers import ViTImageProcessorPil

    folder = tmp_path_factory.mktemp("vit")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    make_model("vit").save_pretrained(folder)
    return folder


def write(path: Path, kinds=tuple(KINDS), size: int = 20, columns=("text", "label")) -> Path:
    """Sentences with labels, as CSV or as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [(KINDS[kinds[i % len(kinds)]].format("quick" * (i + 1)), kinds[i % len(kinds)]) for i in range(size)]
    with open(path, "w", encoding="utf-8", newline="") as stream:
        if path.suffix == ".csv":
            csv.writer(stream).writerows([columns, *rows])
        else:
            stream.writelines(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows)
    return path


def draw(folder: Path, split: str, size: int) -> None:
    """Images of one colour each, in a folder for each label; some of them are grey ones without colours."""
    from PIL import Image

    for label, value in COLOURS.items():
        (folder / split / label).mkdir(parents=True)
        for index in range(size):
            image = Image.fromarray(np.full((10, 12, 3), value + index, dtype=np.uint8))
            (image.convert("L") if index == 0 else image).save(folder / split / label / f"{index}.png")


def arguments(base, data, output, *more) -> list[str]:
    values = {
        "model_name_or_path": base,
        "dataset": data,
        "output_dir": output,
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "save_steps": 6,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return [*(part for name, value in values.items() for part in (f"--{name}", str(value))), *more]


def run(*argv) -> dict:
    return load("run_classification").main(arguments(*argv))


def test_texts_are_classified(texts, tmp_path, monkeypatch):
    output, data = tmp_path / "run", write(tmp_path / "my.csv")
    argv = arguments(texts, data, output, "--threshold", "0.9", "--eval_share", "0.2")
    monkeypatch.setattr(sys, "argv", ["run_classification.py", *argv])
    metrics = load("run_classification").main()
    assert metrics == json.loads((output / "metrics.json").read_text())
    assert metrics["eval_loss"] < metrics["eval_loss_before"]
    assert metrics["eval_accuracy"] >= 0.75
    assert 0.0 < metrics["eval_macro_f1"] <= 1.0
    assert (metrics["train_records"], metrics["eval_records"]) == (16, 4)

    card = (output / "README.md").read_text()
    assert "pipeline_tag: text-classification\n" in card
    assert all(f"- type: {name}\n" in card for name in ("loss", "accuracy", "macro_f1"))
    again = from_hub(output, base_model=str(texts))
    assert again.sara_adapter.num_parameters() == metrics["trained_parameters"]
    assert [part.name for part in again.sara_adapter.parts] == ["score"]


def test_columns_may_have_other_names_and_texts_may_be_pairs(texts, tmp_path):
    data = write(tmp_path / "my.jsonl", columns=("first", "kind"))
    more = ("--text_columns", "first", "first", "--label_column", "kind", "--method", "mo_sara", "--max_steps", "2")
    metrics = run(texts, data, tmp_path / "run", *more, "--save_strategy", "no")
    assert metrics["eval_records"] == 2
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_images_are_classified(images, tmp_path):
    data, output = tmp_path / "data", tmp_path / "run"
    draw(data, "train", 8)
    draw(data, "test", 3)
    metrics = run(images, data, output, "--threshold", "0.9", "--max_steps", "16")
    assert metrics["eval_loss"] < metrics["eval_loss_before"]
    assert metrics["eval_accuracy"] == 1.0
    assert (metrics["train_records"], metrics["eval_records"]) == (16, 6)
    assert "pipeline_tag: image-classification\n" in (output / "README.md").read_text()
    model = AutoModelForImageClassification.from_pretrained(images, num_labels=2, ignore_mismatched_sizes=True)
    assert SaraAdapter.load(model, output).num_parameters() == metrics["trained_parameters"]


def test_the_model_knows_the_names_of_the_labels(texts, tmp_path):
    recipe = load("run_classification")
    options = parse("--model_name_or_path", str(texts), "--dataset", "none")[0]
    labels = {"id2label": {0: "cafe", 1: "pub", 2: "bar"}, "label2id": {"cafe": 0, "pub": 1, "bar": 2}}
    from datasets import Dataset, DatasetDict

    data = DatasetDict({"train": Dataset.from_dict({"text": ["a pub", "a bar"], "labels": [1, 2]})})
    model, tokenizer, encoded = recipe.for_texts(options, data, labels)
    assert (model.config.num_labels, model.config.id2label[1], model.config.label2id["bar"]) == (3, "pub", 2)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert set(encoded["train"].column_names) >= {"input_ids", "attention_mask", "labels"}
    assert "text" not in encoded["train"].column_names
    # The last token that is no padding decides, so padding changes nothing.
    padded = tokenizer(["a pub", "a pub with a long name"], padding=True, return_tensors="pt")
    alone = tokenizer(["a pub"], return_tensors="pt")
    with torch.no_grad():
        assert torch.allclose(model(**padded).logits[0], model(**alone).logits[0], atol=1e-5)


# ---- what is refused, before a model is loaded ----


def test_labels_and_columns_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(base_models, "load_base", None)
    write(tmp_path / "data" / "train.csv")
    KINDS["bar"] = "The {} bar ."
    write(tmp_path / "data" / "test.csv", kinds=("pub", "bar"))
    del KINDS["bar"]
    with pytest.raises(RecipeError, match="eval data have the labels bar, which the training data do not have"):
        run("none", tmp_path / "data", tmp_path / "run")
    with pytest.raises(RecipeError, match=r"have the columns text, label, and need question\+label"):
        run("none", tmp_path / "data", tmp_path / "run", "--text_columns", "question")


def test_an_error_of_the_user_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run_classification.py", "--demo", "--max_length", "0"])
    with pytest.raises(SystemExit, match=r"^run_classification: max_length=0 has to be at least 1\.$"):
        runpy.run_path(str(RECIPES / "run_classification.py"), run_name="__main__")


# ---- settings ----


def parse(*argv):
    return parse_arguments(*load("run_classification").arguments(), list(argv))


def test_the_settings_suit_the_method_and_the_demo(tmp_path, capsys):
    data = str(write(tmp_path / "my.csv"))
    options, sara, training = parse("--model_name_or_path", "a/b", "--dataset", data, "--method", "mo_sara")
    assert (training.learning_rate, sara.threshold) == (2e-2, None)
    assert training.output_dir == "runs/classification-b-mo_sara"
    assert (options.text_columns, options.data_names()) == (["text"], {"dataset": "my.csv", "dataset_id": None})
    options, _, training = parse("--demo")
    assert (options.model_name_or_path, training.learning_rate) == (SMOLLM2, 8e-3)
    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in ("dataset", "text_columns", "image_column", "threshold"))


@pytest.mark.slow
@pytest.mark.long
def test_the_demo_on_the_real_model(tmp_path):
    need_smollm2()
    metrics = load("run_classification").main(["--demo", "--output_dir", str(tmp_path)])
    assert metrics["eval_accuracy"] > 0.9
    assert metrics["eval_loss"] < metrics["eval_loss_before"]
