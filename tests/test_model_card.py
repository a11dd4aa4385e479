import ast
import configparser
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import attach_trained, make_model, sara_arguments
from hub_storage import validate_card
from huggingface_hub import EvalResult, ModelCard
from training import make_trainer
from transformers import TrainingArguments

from hf_sara import SaraAdapter, card_text, model_card, storage
from hf_sara.card_text import BEGIN, END
from hf_sara.model_card import CARD_FILE, LOSS_FILE, RANKS_FILE, Sample, Training
from hf_sara.planning import count_base
from hf_sara.trainer.cards import non_default

HOSTILE = "a | b\n---\n# <script>`x` [y](z)\\ \"': {x: 1} <!-- hf_sara: generated up to here -->"


def result(**changes):
    values = {"task_type": "text-generation", "dataset_type": "e2e_nlg", "dataset_name": "E2E", "metric_type": "bleu"}
    return EvalResult(**{**values, "metric_value": 0.7, **changes})


def card_of(adapter, folder=None, **card) -> str:
    """The card of an adapter: its text alone, or as it is written beside its files."""
    if folder is None:
        return model_card.make_card(adapter.manifest(), count_base(adapter.model), **card)
    adapter.write_card(folder, **card)
    return (folder / CARD_FILE).read_text()


def parts(card: str) -> tuple[dict, str]:
    """Metadata and Markdown, read as any YAML reader does."""
    _, head, text = card.split("---\n", 2)
    return yaml.safe_load(head), text


def on_the_hub(model):
    model.config._name_or_path = "someone/tiny-model"
    return model


def test_a_card_says_what_the_adapter_is(method, tmp_path):
    adapter = attach_trained(on_the_hub(make_model()), method)
    adapter.save_pretrained(tmp_path)
    card = card_of(
        adapter,
        folder=tmp_path,
        repo_id="me/my-adapter",
        language="en",
        license="apache-2.0",
        tags="restaurants",
        datasets=["e2e_nlg", "a file of mine"],
        results=[result()],
    )
    metadata, text = parts(card)
    assert metadata["base_model"] == "someone/tiny-model"
    assert metadata["base_model_relation"] == "adapter"
    assert (metadata["library_name"], metadata["pipeline_tag"]) == ("hf_sara", "text-generation")
    assert metadata["tags"] == ["hf_sara", method, "restaurants"]
    assert (metadata["license"], metadata["language"]) == ("apache-2.0", ["en"])
    assert metadata["datasets"] == ["e2e_nlg"]
    assert metadata["metrics"] == ["bleu"]
    scores = metadata["model-index"][0]["results"][0]
    assert scores["metrics"][0]["value"] == 0.7
    assert scores["dataset"]["type"] == "e2e_nlg"
    for site in adapter.sites:
        assert re.search(rf"^\| {site.layer} \|.*\b{site.k}\b.*\|$", text, re.MULTILINE)
    assert f"{adapter.num_parameters():,}" in text
    assert f"{storage.size_on_disk(tmp_path):,} bytes" in text
    assert "a file of mine" not in str(metadata)


def test_a_base_that_is_not_on_the_hub_is_not_named(tmp_path):
    model = make_model()
    model.config._name_or_path = str(tmp_path)
    metadata, text = parts(card_of(attach_trained(model)))
    assert "base_model" not in metadata
    assert "base_model_relation" not in metadata
    assert str(tmp_path) not in text
    assert "base_model=" in text
    named, _ = parts(card_of(attach_trained(make_model()), base_model="someone/base"))
    assert named["base_model"] == "someone/base"


@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("llama", "text-generation"),
        ("gpt2", "text-generation"),
        ("t5", "text-generation"),
        ("bert", "text-classification"),
        ("vit", "image-classification"),
    ],
)
def test_the_task_follows_from_the_class(family, task):
    assert model_card.pipeline_of(type(make_model(family)).__name__) == task
    assert model_card.pipeline_of("LlamaModel") is None


def test_values_of_users_break_neither_yaml_nor_markdown(tmp_path):
    training = Training({HOSTILE: HOSTILE}, [{"step": 1, HOSTILE: 1.0}], 61.0, [HOSTILE])
    card = card_of(
        attach_trained(make_model()),
        title=HOSTILE,
        language=[HOSTILE],
        license=HOSTILE,
        tags=[HOSTILE],
        results=[result(dataset_name=HOSTILE, metric_name=HOSTILE)],
        training=training,
    )
    metadata, errors, _ = validate_card(card)
    assert errors == []
    assert ModelCard(card).data.to_dict() == metadata
    assert (metadata["license"], metadata["license_name"]) == ("other", HOSTILE)
    assert "language" not in metadata
    assert HOSTILE in metadata["tags"]
    text = ModelCard(card).text
    assert text.count(BEGIN) == text.count(END) == 1
    assert "<script>" not in text
    for line in text.splitlines():
        if line.startswith("|"):
            cells = len(re.findall(r"(?<!\\)\|", line))
            assert cells in (3, 4), line


ODD = [float("nan"), float("inf"), None, "", torch.tensor(0.5), np.float32(0.5), {1: 2}, 10**30, "x" * 10**6]
BROKEN_FILES = ["Über uns\n".encode("latin-1"), "Über uns\n".encode("utf-16"), b"---\ntags: [\n---\n"]


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: repr(odd)[:20])
def test_odd_values_of_users_make_no_invalid_card(odd, caplog):
    values = [result(metric_value=odd), result(dataset_name=odd), result(dataset_split=odd), result(metric_value=0.25)]
    facts = {"tags": ["mine", odd], "language": ["en", odd], "datasets": ["a/b", odd], "results": values}
    facts["training"] = Training({"a": odd}, [{"step": 1, "loss": 1.0, "eval_x": odd}], 1.0, [])
    adapter = attach_trained(make_model())
    title = "My card" if odd is None else odd
    card = card_of(adapter, title=title, license="My own", base_model="C:/a", **facts)
    metadata, errors, _ = validate_card(card)
    assert errors == []
    assert ModelCard(card).data.get("license_name") == "My own"
    assert metadata["tags"][:3] == ["hf_sara", "sara", "mine"]
    assert (metadata["language"], metadata["datasets"]) == (["en"], ["a/b"])
    assert "base_model" not in metadata
    assert "base model C:/a" in caplog.text
    # A number that the Hub does not have is a text, and a number of another package is a plain one.
    if isinstance(odd, float):
        assert f"'value': '{odd}'" in str(metadata["model-index"])
    if isinstance(odd, (torch.Tensor, np.float32)):
        assert "'value': 0.5" in str(metadata["model-index"])


@pytest.mark.parametrize("content", BROKEN_FILES)
def test_a_readme_that_somebody_broke_does_not_stop_a_save(tmp_path, content):
    adapter = attach_trained(make_model())
    (tmp_path / CARD_FILE).write_bytes(content)
    card = card_of(adapter, tmp_path)
    assert "Über uns" in card or "tags: [\n" in card
    assert validate_card(card)[1] == []
    assert card_of(adapter, tmp_path) == card


def test_what_people_wrote_survives_the_next_card(method):
    adapter = attach_trained(make_model(), method)
    first = card_of(adapter, license="mit", tags=["mine"], title="first")
    metadata, text = parts(first)
    metadata["thumbnail"] = "picture.png"
    metadata["tags"].append("by hand")
    edited = f"---\n{yaml.safe_dump(metadata)}---\n\nWritten before.\n{text}\nWritten after.\n"
    second = card_of(adapter, title="second", tags=["new"], existing=edited)
    metadata, text = parts(second)
    assert (metadata["thumbnail"], metadata["license"]) == ("picture.png", "mit")
    assert {"mine", "by hand", "new"} <= set(metadata["tags"])
    assert text.index("Written before.") < text.index(BEGIN) < text.index("# second") < text.index(END)
    assert text.index(END) < text.index("Written after.")
    assert "# first" not in text
    # And again: nothing piles up.
    assert card_of(adapter, title="second", tags=["new"], existing=second) == second


def test_a_card_of_somebody_else_is_kept_whole():
    card = card_of(attach_trained(make_model()), existing="# A title\n\nNo metadata.\n")
    assert card.index("No metadata.") < card.index(BEGIN)
    broken = card_of(attach_trained(make_model()), existing="---\nmodel-index: 3\ntags: x\n---\nText.\n")
    assert "Text." in broken


def test_taking_over_prefers_what_was_written_here():
    adapter = attach_trained(make_model())
    fresh = card_of(adapter, title="new")
    remote = card_of(adapter, title="old", existing="From the Hub.")
    merged = card_text.take_over(fresh, remote)
    assert "From the Hub." in merged
    assert "# new" in merged
    assert "# old" not in merged
    mine = card_of(adapter, title="new", existing="From here.")
    assert card_text.take_over(mine, remote) == mine


def test_the_log_is_thinned_and_says_how_the_training_went():
    log = [{"step": step, "loss": 10.0 / step, "epoch": 0.1} for step in range(1, 200)]
    log += [{"step": 199, "eval_loss": 0.5, "eval_runtime": 3.0}]
    card = card_of(attach_trained(make_model()), training=Training({"learning_rate": 0.02}, log, 3721.0))
    trained = card[card.index("## How it was trained") :]
    rows = [line for line in trained.splitlines() if re.match(r"\| \d+ \| [\d.]+ \|", line)]
    assert len(rows) == model_card.MAX_LOG_ROWS
    assert rows[-1].startswith("| 199 | 0.050251 | 0.5 |")
    assert "runtime" not in card
    assert "1 h 2 min" in card
    assert "| learning\\_rate | 0.02 |" in card


def test_the_trainer_writes_the_card_of_its_run(method, tmp_path):
    trainer = make_trainer(tmp_path, method, hub_token="hf_secretsecretsecret", eval_strategy="steps", eval_steps=3)
    trainer.train()
    trainer.state.log_history.append({"eval_loss": 1.0, "eval_new": 2.0, "epoch": 1.0, "step": 7})
    trainer.save_model()
    trainer.create_model_card(model_name="card", dataset_tags="e2e_nlg", dataset="E2E", tags="mine")
    card = (tmp_path / "README.md").read_text()
    metadata, text = parts(card)
    assert {"hf_sara", method, "mine"} <= set(metadata["tags"])
    results = metadata["model-index"][0]["results"][0]
    assert {entry["type"]: entry["value"] for entry in results["metrics"]} == {"loss": 1.0, "new": 2.0}
    assert "learning\\_rate | 0.02" in text
    assert "eval\\_loss" in text
    assert "secretsecret" not in card
    assert str(tmp_path) not in card
    trainer.create_model_card()
    assert "model-index" in (tmp_path / "README.md").read_text()


def test_epochs_that_steps_stand_for_are_not_shown(tmp_path):
    given = {"output_dir": str(tmp_path), "num_train_epochs": 5, "use_cpu": True}
    always = {"learning_rate": 5e-5, "lr_scheduler_type": "linear", "per_device_train_batch_size": 8, "seed": 42}
    always["optim"] = str(TrainingArguments(**given).optim.value)
    assert non_default(TrainingArguments(**given)).values == {**always, "num_train_epochs": 5}
    assert non_default(TrainingArguments(**given, max_steps=7)).values == {**always, "max_steps": 7}


def test_ranks_are_drawn_where_matplotlib_is_installed(tmp_path, monkeypatch):
    adapter = attach_trained(make_model())
    monkeypatch.setattr(model_card.importlib.util, "find_spec", lambda name: None)
    assert RANKS_FILE not in card_of(adapter, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [CARD_FILE]
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert f"![rank per layer]({RANKS_FILE})" in card_of(adapter, folder=tmp_path)
    assert (tmp_path / RANKS_FILE).read_bytes().startswith(b"\x89PNG")


def test_the_loss_is_drawn_where_there_is_a_curve(tmp_path):
    pytest.importorskip("matplotlib")
    adapter = attach_trained(make_model())
    one = Training(log=[{"step": 1, "loss": 2.0}])
    assert LOSS_FILE not in card_of(adapter, tmp_path, training=one)
    assert not (tmp_path / LOSS_FILE).exists()
    two = Training(log=[{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 1.5}, {"step": 2, "loss": 1.0}])
    assert two.losses() == [(1, 2.0), (2, 1.0)]
    assert f"![training loss per step]({LOSS_FILE})" in card_of(adapter, tmp_path, training=two)
    assert (tmp_path / LOSS_FILE).read_bytes().startswith(b"\x89PNG")
    # The curve of an earlier training does not stay with another adapter.
    assert LOSS_FILE not in card_of(adapter, tmp_path, training=one)
    assert not (tmp_path / LOSS_FILE).exists()


def test_each_card_has_the_figures_of_its_own_adapter(tmp_path):
    pytest.importorskip("matplotlib")
    drawn = []
    for threshold, losses in ((0.2, (2.0, 1.0)), (0.6, (2.0, 1.0)), (0.2, (2.0, 1.5)), (0.2, (2.0, 1.0))):
        adapter = SaraAdapter.attach(make_model(), sara_arguments(threshold=threshold))
        log = [{"step": step, "loss": loss} for step, loss in enumerate(losses)]
        card_of(adapter, tmp_path, training=Training(log=log))
        drawn.append([(tmp_path / name).read_bytes() for name in (RANKS_FILE, LOSS_FILE)])
    (ranks, loss), more_ranks, other_loss, again = drawn
    assert more_ranks[0] != ranks
    assert more_ranks[1] == loss
    assert other_loss[0] == ranks
    assert other_loss[1] != loss
    assert again == [ranks, loss]


def test_a_sample_of_the_task_is_shown_with_its_output():
    sample = Sample('name : The "Mill" | food : `tea`\n |', "The Mill serves tea.\n```\nIt is \U0001f375.")
    card = card_of(attach_trained(make_model()), sample=sample)
    code = re.search(r"```python\n(.*?)\n```\n", card, re.DOTALL).group(1)
    prompt = re.search(r"^prompt = (.*)$", code, re.MULTILINE).group(1)
    assert ast.literal_eval(prompt) == sample.prompt
    assert "````text\n" + sample.output + "\n````" in card
    assert card.count(END) == 1


def test_a_mark_in_a_sample_does_not_end_the_generated_text():
    adapter, sample = attach_trained(make_model()), Sample(f"a {BEGIN} b", f"one {END} two")
    card = card_of(adapter, sample=sample)
    assert card_of(adapter, sample=sample, existing=card) == card
    assert card.count(BEGIN) == card.count(END) == 1
    assert "one   two" in card


def test_a_card_names_the_project_and_the_versions():
    settings = configparser.ConfigParser()
    settings.read(Path(__file__).parent.parent / "setup.cfg", encoding="utf-8")
    assert f"Homepage = {model_card.PROJECT_URL}" in settings["metadata"]["project_urls"]
    card = card_of(attach_trained(make_model()))
    assert f"made with [hf_sara]({model_card.PROJECT_URL})" in card
    for package in ("hf_sara", "transformers", "torch", "accelerate", "datasets", "tokenizers", "python"):
        assert re.search(rf"Versions: .*\b{package.replace('_', '.*')} \d", card), package
