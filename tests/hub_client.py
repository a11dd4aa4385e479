"""A user of a Hub on loopback: his base model, his pushes, and a training that is full of private things."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import attach_trained, logits, make_model, make_tokenizer
from hub_server import HubServer, online
from huggingface_hub import constants
from training import dataset
from transformers import PreTrainedTokenizerFast, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from hf_sara import SaraTrainer, hub

TOKEN = "hf_alicealicealicealice"
BASE, REPO = "someone/base", "alice/adapter"


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A Hub that this process's client takes for the real one, with a base model on it and an empty cache."""
    with (
        online(),
        HubServer(
            tokens={TOKEN: "alice", "hf_bobbobbobbob": "bob", "hf_someone": "someone"}, expired=["hf_oldoldoldold"]
        ) as server,
    ):
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        server.add_repo(BASE, files=base_files(tmp_path / "base"))
        yield server


def base_files(folder: Path) -> dict[str, bytes]:
    tokenizer = make_tokenizer()
    make_model(vocab_size=len(tokenizer), eos_token_id=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def load_base(server):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(BASE, cache_dir=constants.HF_HUB_CACHE)


def pushed(server, method="sara", repo=REPO, factors="recompute", **card):
    """A trained adapter on the Hub, and what it does."""
    model = load_base(server)
    adapter = attach_trained(model, method, factors=factors)
    adapter.push_to_hub(repo, **card)
    return adapter, logits(model)


@dataclass
class PrivateArguments(TrainingArguments):
    """Arguments with fields of somebody's own."""

    api_key: str = field(default="sk-12345")
    data_url: str = field(default="https://me:hunter2@example.org/x")


class PrivateCallback(TrainerCallback, ExportableState):
    """A callback that logs, and keeps, what is nobody else's business."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        state.log_history[-1]["note"] = "sk-12345 in /secret-place"

    def state(self):
        return {"args": {"key": "sk-12345"}, "attributes": {"where": "/secret-place"}}


def train_in_private(server, strategy: str, folder: Path) -> dict[str, bytes]:
    """
    Train and push with private arguments, callbacks and paths. Returns each file that was uploaded, of all commits.

    Args:
        strategy (`str`): The trainer's `hub_strategy`.
        folder (`Path`): A folder to work in.
    """
    place = folder / "secret-place"
    model = load_base(server)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<star>"])
    tokenizer.save_pretrained(place / "tokenizer")
    args = PrivateArguments(
        str(place / "run"),
        max_steps=4,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        logging_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        push_to_hub=True,
        hub_model_id=REPO,
        hub_token=TOKEN,
        hub_strategy=strategy,
        hub_always_push=True,
    )
    trainer = SaraTrainer(
        model,
        args,
        train_dataset=dataset(),
        eval_dataset=dataset(8, seed=1),
        # Its class knows where it was loaded from.
        processing_class=PreTrainedTokenizerFast.from_pretrained(place / "tokenizer"),
        callbacks=[PrivateCallback()],
    )
    trainer.train()
    trainer.push_to_hub(
        dataset=str(place / "data.jsonl"),
        finetuned_from=str(place / "llama"),
        dataset_tags=str(place / "more"),
        tags=[str(place / "tag"), "https://me:hunter2@example.org"],
        model_name=str(place / "name"),
    )
    repo = server.repo(REPO)
    assert {"README.md", "tokenizer.json", hub.TRAINING_ARGS_FILE} <= set(repo.files())
    uploaded = {
        f"{commit.title}/{name}": file.content for commit in repo.commits for name, file in commit.files.items()
    }
    return uploaded | server.uploaded()


def secrets_in(uploaded: dict[str, bytes]) -> list[tuple[str, bytes]]:
    """What must not have left the machine, with the name of the file that has it."""
    secrets = (b"secret-place", b"sk-12345", b"hunter2", TOKEN.encode(), str(Path.home()).encode() + b"/")
    return [(name, secret) for name, content in uploaded.items() for secret in secrets if secret in content]
