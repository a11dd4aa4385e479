"""What leaves the machine with an adapter holds no path of it and no secret."""

import json
import time
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest
from conftest import make_model
from training import dataset
from transformers import Seq2SeqTrainingArguments, TrainingArguments

from hf_sara import SaraTrainer, publishing
from hf_sara.card_metadata import is_repo
from hf_sara.publishing import KNOWN_ARGUMENTS, published_arguments, published_file, published_text
from hf_sara.repos import hub_id

PLACE, KEY, PASSWORD = "/secret-place/of mine", "sk-12345", "hunter2"
SECRETS = ("secret-place", KEY, PASSWORD)


@dataclass
class Mine(TrainingArguments):
    api_key: str = field(default=KEY)
    db_password: str = field(default=PASSWORD)
    data_url: str = field(default=f"https://me:{PASSWORD}@example.org/x?token={KEY}")
    folder: str = field(default=PLACE)
    packing: bool = field(default=True)


def clean(text: str) -> bool:
    return not any(secret in text for secret in SECRETS)


def test_every_field_of_the_list_is_one_of_transformers():
    known = {item.name for item in fields(Seq2SeqTrainingArguments)}
    # Some are those of the earlier versions that the project allows.
    assert KNOWN_ARGUMENTS - known <= {"group_by_length", "warmup_ratio"}
    risky = [name for name in KNOWN_ARGUMENTS if name.endswith(("_dir", "_name_or_path", "_token", "_id", "_config"))]
    assert sorted(risky) == ["accelerator_config", "liger_kernel_config"]


def test_fields_of_a_subclass_are_left_out_and_counted(tmp_path):
    plain = published_arguments(TrainingArguments(f"{tmp_path}/secret-place"))
    mine = published_arguments(Mine(f"{tmp_path}/secret-place"))
    assert mine.values == plain.values
    assert mine.left_out == plain.left_out + 5
    record = json.loads(mine.to_json())
    assert clean(mine.to_json())
    assert record["learning_rate"] == 5e-5
    assert record["lr_scheduler_type"] == "linear"
    assert record["fields_left_out"] == mine.left_out


def test_chosen_fields_are_published_but_no_path_and_no_password(caplog):
    chosen = ("packing", "data_url", "folder")
    found = published_arguments(Mine("x"), chosen)
    assert found.values["packing"] is True
    assert found.values["data_url"] == "https://example.org/x"
    assert "folder" not in found.values
    assert "['folder'] is not published" in caplog.text
    assert published_arguments(Mine("x"), "packing").values["packing"] is True
    with pytest.raises(ValueError, match="'pakcing', and Mine has no such field"):
        published_arguments(Mine("x"), ["pakcing"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/secret-place/data.jsonl", "data.jsonl"),
        ("/secret-place/of mine/", "of mine"),
        ("see /secret-place/a.txt, and C:\\secret-place\\b.txt", "see a.txt, and b.txt"),
        ("file:///secret-place/a.json", "a.json"),
        ("in ~/secret-place/x and ../secret-place/y", "in x and y"),
        ("[(/secret-place/x)]", "[(x)]"),
        ("\\\\secret-place\\share\\f", "f"),
        ("path=/secret-place/x", "path=x"),
        ("https://me:hunter2@example.org/x?token=sk-12345#a", "https://example.org/x"),
        ("https://me:hunter2/x?y@example.org/x", "https://example.org/x"),
        (
            "from postgres://u:hunter2@h:80/db to git+ssh://hunter2@host/x.git",
            "from postgres://h:80/db to git+ssh://host/x.git",
        ),
        ("https://huggingface.co/me/x", "https://huggingface.co/me/x"),
        ("me/my-data", "me/my-data"),
        ("1/2 and/or 3/4", "1/2 and/or 3/4"),
        (r"model\.layers\.\d+", r"model\.layers\.\d+"),
        (r"\frac{1}{2} of \alpha </s>", r"\frac{1}{2} of \alpha </s>"),
        ("@/secret-place/a -/secret-place/b $HOME/secret-place/c %HOME%\\secret-place\\d", "@a -b c d"),
        ("C:\\secret-place\\of mine\\x", "x"),
        ("see C:\\secret-place\\of mine\\a b\\x, and D:\\y", "see x, and y"),
        ("No file 'C:\\\\secret-place\\\\of mine\\\\x'", "No file 'x'"),
        ("\\\\secret-place\\of mine\\x", "x"),
        ("from C:\\a and D:\\b", "from a and b"),
        (".\\secret-place\\x ..\\y", "y"),
        ("$env:SECRET\\secret-place\\x", "x"),
        ("C://secret-place/x", "x"),
        ("file:///C:/secret-place/x", "x"),
        ("https://medium.com/@alice/post", "https://medium.com/@alice/post"),
        ("https://h.org/x;token=sk-12345", "https://h.org/x"),
        ("me:hunter2@example.org", "example.org"),
        ("git@github.com:me/x", "git@github.com:me/x"),
        ("a\0b", "ab"),
    ],
)
def test_texts_lose_paths_and_passwords(text, expected):
    assert published_text(text) == expected
    assert published_text(expected) == expected


@pytest.mark.parametrize(
    "piece", ["x", "a:", "a.", "a/", "~", "$a", "%a", "@", "a:a@", "http://", "://", "\\", "{", "../", " .\\", "C:\\ "]
)
def test_long_texts_take_no_long_time(piece):
    start = time.process_time()
    published_text(piece * 200_000)
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize(
    "name", ["C:\\models\\llama", "C:/models/llama", ".\\base", "..\\base", "\\\\server\\share", "a\\b"]
)
def test_a_path_of_windows_is_no_name_on_the_hub(name):
    assert hub_id(name) is None
    assert not is_repo(name)


def test_a_relative_path_that_exists_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert published_text("secret-place/x.json") == "secret-place/x.json"
    Path("secret-place").mkdir()
    Path("secret-place/x.json").touch()
    assert published_text("secret-place/x.json") == "x.json"


def test_a_file_of_an_earlier_version_is_published_without_its_secrets():
    earlier = Mine(f"{PLACE}/x").to_json_string()
    content = json.loads(published_file("training_args.json", earlier.encode()))
    assert content["learning_rate"] == 5e-5
    assert content["fields_left_out"] > 5
    assert clean(json.dumps(content))
    # A file of this version keeps what was chosen.
    chosen = published_arguments(Mine("x"), ["packing"])
    again = json.loads(published_file("last-checkpoint/training_args.json", chosen.to_json().encode()))
    assert again["packing"] is True
    assert again["fields_left_out"] == chosen.left_out
    # A number that is not finite is one that Trainer takes.
    inf = published_arguments(TrainingArguments("x", max_grad_norm=float("inf")))
    assert json.loads(published_file("training_args.json", inf.to_json().encode()))["max_grad_norm"] == "inf"
    state = published_file("trainer_state.json", b'{"global_step": 1, "log_history": [{"eval_loss": NaN, "step": 1}]}')
    assert "NaN" in state.decode()
    for broken in (b"", b"[1]", b"\xff", b"{" * 10_000):
        assert published_file("training_args.json", broken) is None


def test_a_state_is_published_without_paths_and_can_be_resumed():
    state = {
        "global_step": 4,
        "epoch": 0.5,
        "best_model_checkpoint": f"{PLACE}/checkpoint-4",
        "best_global_step": 4,
        "log_history": [{"loss": 1.5, "step": 4, "note": KEY, f"{PLACE}/x": 1.0}, PLACE],
        "trial_params": {"folder": PLACE, "key": KEY},
        "trial_name": PLACE,
        "stateful_callbacks": {
            "TrainerControl": {"args": {"should_save": True}, "attributes": {}},
            "Mine": {"args": {"key": KEY}},
            "EarlyStoppingCallback": {"args": {"where": PLACE}},
        },
        "key": KEY,
    }
    found = published_file("x/trainer_state.json", json.dumps(state).encode()).decode()
    assert clean(found)
    record = json.loads(found)
    assert (record["global_step"], record["epoch"], record["best_global_step"]) == (4, 0.5, 4)
    assert record["log_history"] == [{"loss": 1.5, "step": 4}]
    assert list(record["stateful_callbacks"]) == ["TrainerControl"]
    assert "key" not in record


def test_what_a_trainer_writes_holds_no_path_and_no_secret(tmp_path):
    out = tmp_path / "secret-place" / "run"
    args = Mine(str(out), max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no")
    data = dataset()
    trainer = SaraTrainer(make_model(), args, train_dataset=data, published_arguments=["packing"])
    trainer.train()
    trainer.save_model()
    trainer.state.log_history.append({"step": 2, "eval_loss": 1.0, f"{PLACE}/x": 2.0})
    trainer.create_model_card(
        dataset=f"{PLACE}/data.jsonl",
        finetuned_from=f"{PLACE}/llama",
        dataset_args=PLACE,
        tags=[PLACE, f"https://me:{PASSWORD}@example.org"],
        model_name=f"{PLACE}/name",
        tasks="text-generation",
    )
    for path in out.iterdir():
        assert clean(path.read_bytes().decode("latin-1")), path
    card = (out / "README.md").read_text()
    assert "data.jsonl" in card
    assert "packing" not in card  # It has its default.
    assert json.loads((out / "training_args.json").read_text())["packing"] is True
    assert "other settings" in card
    with pytest.raises(ValueError, match="published_arguments names 'folders'"):
        SaraTrainer(make_model(), args, train_dataset=data, published_arguments=["folders"])


def test_the_count_on_a_card_is_that_of_settings_that_were_changed(tmp_path):
    from hf_sara.trainer.cards import non_default

    plain, mine = (non_default(kind(str(tmp_path))) for kind in (TrainingArguments, Mine))
    changed = non_default(Mine(str(tmp_path), api_key="other", learning_rate=1e-3))
    assert mine.left_out == plain.left_out
    assert changed.left_out == plain.left_out + 1
    assert changed.values["learning_rate"] == 1e-3
    assert publishing.LEFT_OUT not in changed.values


@pytest.mark.parametrize(("steps", "shown"), [(-1, {"num_train_epochs": 3}), (25, {"max_steps": 25})])
def test_the_number_of_epochs_is_no_main_setting_where_steps_are_given(steps, shown, tmp_path):
    record = {"num_train_epochs": 3, "max_steps": steps}
    (tmp_path / publishing.TRAINING_ARGS_FILE).write_text(json.dumps(record), encoding="utf-8")
    assert publishing.main_settings(tmp_path) == shown
