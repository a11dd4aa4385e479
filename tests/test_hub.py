"""To the Hub and back, by the unmodified client over HTTP."""

import ast
import json
import logging
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import hub_client
import pytest
import torch
import transformers
from conftest import (
    METHODS,
    attach_trained,
    edit_config,
    logits,
    make_inputs,
    make_model,
    make_tokenizer,
    same_bits,
    sara_arguments,
)
from hub_client import BASE, REPO, TOKEN, load_base, pushed, secrets_in, train_in_private
from hub_server import Fault
from hub_storage import File
from huggingface_hub import HfApi, ModelCard, constants, hf_hub_download
from training import make_trainer, training_arguments
from transformers import TrainerCallback
from typer.testing import CliRunner

from hf_sara import AdapterError, SaraAdapter, SaraTrainer, files, from_hub, hub, push_to_hub, repos, storage
from hf_sara.cli import app
from hf_sara.hub import UPLOAD_FILES
from hf_sara.own_tokenizer import VOCABULARY_FILES

server = hub_client.server


def run(server, cache, code, token=None, **changes):
    """Python code in a process of its own, whose Hub this is, with a cache of its own."""
    environment = {**server.environment(cache, token), "HF_SARA_CACHE": str(cache / "sara"), **changes}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200)


# ---- round trips ----


def test_a_trained_adapter_does_elsewhere_what_it_did_here(server, method, tmp_path):
    adapter, expected = pushed(server, method)
    model = from_hub(REPO, cache_dir=tmp_path / "other cache")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not model.training
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)
    assert same_bits(model.sara_adapter.state_dict(), adapter.state_dict())
    assert model.generate(**{k: v for k, v in make_inputs(model).items() if k != "labels"}, max_new_tokens=3).shape[1]


@pytest.mark.slow
def test_another_user_loads_in_a_new_process_and_offline_afterwards(server, tmp_path):
    expected = {f"{REPO}-{method}": pushed(server, method, f"{REPO}-{method}")[1] for method in METHODS}
    torch.save(expected, tmp_path / "expected.pt")
    code = f"""
import torch
from hf_sara import from_hub
generator = torch.Generator().manual_seed(1)
ids = torch.randint(3, 40, (2, 6), generator=generator)
for repo, expected in torch.load({str(tmp_path / "expected.pt")!r}).items():
    with torch.no_grad():
        found = from_hub(repo)(ids, attention_mask=torch.ones_like(ids)).logits
    print(float((found - expected).abs().max()))
"""
    for changes in ({}, {"HF_HUB_OFFLINE": "1"}):
        done = run(server, tmp_path / "cache of bob", code, **changes)
        assert done.returncode == 0, done.stderr
        differences = [float(line) for line in done.stdout.splitlines()]
        assert len(differences) == 2
        assert max(differences) <= 1e-6
        server.requests.clear()
    assert not server.requests


def test_only_what_is_needed_is_downloaded(server, tmp_path):
    pushed(server, "mo_sara", license="mit")
    server.requests.clear()
    SaraAdapter.load(load_base(server), REPO, cache_dir=tmp_path / "other cache")
    # A file that is stored apart is asked for by HEAD, and then fetched from where the answer points.
    fetched = {r.path.rsplit("/", 1)[-1] for r in server.requests if f"{REPO}/resolve" in r.path}
    assert fetched == {storage.CONFIG_FILE, storage.TENSORS_FILE}


def test_the_base_is_loaded_at_the_commit_of_the_training(server, tmp_path):
    _, expected = pushed(server)
    trained_on = server.repo(BASE).commits[0].sha
    base = json.loads(server.repo(REPO).files()[storage.CONFIG_FILE])["base"]
    assert (base["model_id"], base["revision"]) == (BASE, trained_on)
    # The base gets other weights later.
    make_model(seed=9, vocab_size=len(make_tokenizer()), eos_token_id=0).save_pretrained(tmp_path / "newer")
    HfApi(token="hf_someone").upload_folder(repo_id=BASE, folder_path=tmp_path / "newer")
    assert server.repo(BASE).commits[0].sha != trained_on
    model = from_hub(REPO, cache_dir=tmp_path / "other")
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)
    model.sara_adapter.save_pretrained(tmp_path / "again")
    assert storage.read(tmp_path / "again").base.revision == trained_on


def test_of_several_commits_in_the_cache_none_is_recorded(server, tmp_path):
    load_base(server)
    HfApi(token="hf_someone").upload_file(path_or_fileobj=b"new", path_in_repo="new.txt", repo_id=BASE)
    hf_hub_download(BASE, "new.txt", cache_dir=constants.HF_HUB_CACHE)
    assert repos.cached_commit(BASE) is None


def test_a_base_of_the_users_own_can_be_given(server, tmp_path):
    _, expected = pushed(server, "mo_sara")
    model = load_base(server)
    assert from_hub(REPO, base_model=model) is model
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(from_hub(REPO, base_model=tmp_path / "base")), expected, rtol=0, atol=1e-6)


def test_a_merged_model_is_plain(server):
    _, expected = pushed(server)
    model = from_hub(REPO, merge=True)
    assert not hasattr(model, "sara_adapter")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["../my-bse", "./nowhere", "/no/such/folder"])
def test_a_base_folder_that_does_not_exist_is_said_to_be_missing(name, tmp_path):
    attach_trained(make_model()).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"There is no base folder '{name}'"):
        from_hub(tmp_path, base_model=name)


def test_an_adapter_of_a_base_without_hub_id_asks_for_it(server, tmp_path):
    attach_trained(make_model()).save_pretrained(tmp_path / "local")
    with pytest.raises(AdapterError, match="base_model"):
        from_hub(tmp_path / "local")


# ---- what a push is ----


def test_a_push_is_one_commit_of_the_allow_list(server, method, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    pushed(server, method)
    files = server.repo(REPO).files()
    assert set(files) - {".gitattributes"} <= set(UPLOAD_FILES)
    assert {storage.CONFIG_FILE, storage.TENSORS_FILE, "README.md"} <= set(files)
    assert len([commit for commit in server.repo(REPO).commits if commit.title == "Upload adapter"]) == 1
    # What was made for the push is gone.
    assert not list(tmp_path.glob("hf_sara-*"))


def test_what_lies_in_a_folder_by_chance_stays_there(server, tmp_path):
    folder = tmp_path / "adapter"
    attach_trained(load_base(server)).save_pretrained(folder)
    for name in ("training_args.bin", "notes.txt", ".env", "optimizer.pt", "model.safetensors"):
        (folder / name).write_bytes(b"private")
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "README.md").write_text("private")
    hub.push_folder(folder, REPO)
    assert set(server.repo(REPO).files()) - {".gitattributes"} == {storage.CONFIG_FILE, storage.TENSORS_FILE}


def test_info_of_an_adapter_on_the_hub_has_the_settings_of_its_training(server, tmp_path):
    attach_trained(load_base(server)).save_pretrained(tmp_path)
    (tmp_path / hub.TRAINING_ARGS_FILE).write_text('{"learning_rate": 0.02, "fields_left_out": 0}')
    hub.push_folder(tmp_path, REPO)
    result = CliRunner().invoke(app, ["info", REPO])
    assert "training: learning_rate 0.02\n" in result.output, result.output


def test_pull_copies_an_adapter_with_its_tokenizer_and_its_card(server, tmp_path, monkeypatch):
    model = load_base(server)
    folder = tmp_path / "adapter"
    attach_trained(model).save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<star>"])
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("# My adapter\n")
    hub.push_folder(folder, REPO)
    result = CliRunner().invoke(app, ["pull", REPO, "--to", str(tmp_path / "copy")])
    assert result.exit_code == 0, result.output
    expected = server.repo(REPO).files()
    assert {"README.md", "tokenizer.json", "tokenizer_config.json", storage.TENSORS_FILE} <= set(expected)
    found = {path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir()}
    assert found == {name: content for name, content in expected.items() if name != ".gitattributes"}

    # A copy that fails leaves the old files.
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    (tmp_path / "copy" / "README.md").write_text("old")
    assert CliRunner().invoke(app, ["pull", REPO, "--to", str(tmp_path / "copy")]).exit_code == 1
    assert {path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir()} == {**found, "README.md": b"old"}


def test_the_files_of_every_tokenizer_of_transformers_are_known():
    found = {"added_tokens.json", "chat_template.jinja", "special_tokens_map.json", "tokenizer_config.json"}
    for path in Path(transformers.__file__).parent.rglob("tokenization_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = {target.id.lower() for target in getattr(node, "targets", ()) if isinstance(target, ast.Name)}
            if "vocab_files_names" in names and isinstance(node.value, ast.Dict):
                found |= {value.value for value in node.value.values if isinstance(value, ast.Constant)}
    assert list(VOCABULARY_FILES) == sorted(found)
    assert set(VOCABULARY_FILES) | {"preprocessor_config.json", "processor_config.json"} <= set(UPLOAD_FILES)


def test_the_file_of_factors_of_the_first_format_goes(server, tmp_path):
    shutil.copytree(Path(__file__).parent / "data" / "format1" / "mo_sara-save-llama", tmp_path / "old")
    hub.push_folder(tmp_path / "old", REPO)
    assert storage.FACTORS_FILE in server.repo(REPO).files()
    pushed(server, "mo_sara", factors="save")
    assert storage.FACTORS_FILE not in server.repo(REPO).files()


def test_private_branches_and_pull_requests(server):
    adapter, _ = pushed(server, private=True)
    assert server.repo(REPO).private
    with pytest.raises(FileNotFoundError, match="no adapter can be had"):
        hub.fetch_adapter(REPO, token="hf_bobbobbobbob")
    adapter.push_to_hub(REPO, revision="second", commit_message="On a branch", license="mit")
    assert server.repo(REPO).history("second")[0].title == "On a branch"
    assert len(server.repo(REPO).commits) == 2
    info = adapter.push_to_hub(REPO, create_pr=True, license="apache-2.0")
    assert info.pr_url
    assert len(server.repo(REPO).commits) == 2
    assert hub.fetch_adapter(REPO, revision="second").is_dir()


def test_what_people_wrote_on_the_hub_survives_the_next_push(server):
    adapter, _ = pushed(server)
    card = ModelCard(server.repo(REPO).files()["README.md"].decode())
    edited = f"{card.content}\nWritten on the web.\n".replace("library_name:", "thumbnail: picture.png\nlibrary_name:")
    HfApi().upload_file(path_or_fileobj=edited.encode(), path_in_repo="README.md", repo_id=REPO)
    adapter.push_to_hub(REPO, license="mit")
    text = server.repo(REPO).files()["README.md"].decode()
    assert "Written on the web." in text
    assert ModelCard(text).data.to_dict()["thumbnail"] == "picture.png"
    assert ModelCard(text).data.license == "mit"


@pytest.mark.slow
def test_the_snippet_on_the_card_runs(server, tmp_path):
    pushed(server)
    card = server.repo(REPO).files()["README.md"].decode()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)
    assert f'from_hub("{REPO}")' in code
    done = run(server, tmp_path / "cache", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_pushed_classifier_is_whole_in_another_process(server, tmp_path):
    """Head, labels, vocabulary and tokenizer: all that the training changed comes back from the Hub alone."""
    from transformers import AutoTokenizer, BertForSequenceClassification, BertModel

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    body = BertModel(make_model("bert", vocab_size=len(tokenizer)).config)
    body.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    server.add_repo("someone/bert", files={path.name: path.read_bytes() for path in (tmp_path / "bert").iterdir()})
    labels = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    model = BertForSequenceClassification.from_pretrained("someone/bert", cache_dir=constants.HF_HUB_CACHE, **labels)
    tokenizer = AutoTokenizer.from_pretrained("someone/bert", cache_dir=constants.HF_HUB_CACHE)
    tokenizer.add_tokens(["<star>"])
    model.resize_token_embeddings(len(tokenizer))
    texts = ["The quick <star> fox", "the lazy dog ."] * 8
    data = [{**tokenizer(text), "labels": index % 2} for index, text in enumerate(texts)]
    trainer = SaraTrainer(
        model=model,
        args=training_arguments(tmp_path / "run", hub_model_id=REPO, max_steps=4, eval_strategy="no"),
        sara_args=sara_arguments(trainable_token_indices=[len(tokenizer) - 1]),
        train_dataset=data,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.push_to_hub()
    assert {"tokenizer.json", storage.TENSORS_FILE} <= set(server.repo(REPO).files())
    card = server.repo(REPO).files()["README.md"].decode()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)
    assert f'AutoTokenizer.from_pretrained("{REPO}")' in code
    code = code.replace("Once upon a time", "The quick <star> fox") + "\nprint(model(**inputs).logits.tolist())"
    done = run(server, tmp_path / "cache", code)
    assert done.returncode == 0, done.stderr
    label, numbers = done.stdout.strip().splitlines()[-2:]
    with torch.no_grad():
        expected = model.eval()(**tokenizer("The quick <star> fox", return_tensors="pt")).logits
    # The other process may use another number of threads.
    assert torch.allclose(torch.tensor(json.loads(numbers)), expected, atol=1e-5)
    assert label == labels["id2label"][int(expected.argmax())]


def test_the_hub_accepts_the_metadata(server):
    pushed(server, license="apache-2.0", language="en", tags=["a"], datasets=["someone/data"])
    assert any("validate-yaml" in request.path for request in server.requests)


# ---- faults ----


@pytest.mark.parametrize(
    "fault",
    [
        Fault(r"/commit/", status=500, times=9),
        Fault(r"/commit/", status=429, times=99, retry_after=0),
        Fault(r"/commit/", drop_request=10, times=9),
        Fault(r"/preupload/", status=503, times=99),
        Fault(r"/repos/create", status=500, times=99),
        Fault(r"/repos/create", drop_response=5, times=99),
        Fault(r"/cdn/upload/", status=503, times=99),
    ],
    ids=str,
)
def test_a_failed_push_says_where_the_adapter_is_and_how_to_push_it_later(server, fault, tmp_path):
    model = load_base(server)
    adapter = attach_trained(model)
    server.faults.append(fault)
    with pytest.raises(OSError, match="Nothing is lost") as failed:
        adapter.push_to_hub(REPO)
    folder, repo_id = re.search(r"hf-sara push (\S+) (\S+)", str(failed.value)).groups()
    if REPO in server.repos:
        assert storage.CONFIG_FILE not in server.repo(REPO).files()
    server.faults.clear()
    hub.push_folder(folder, repo_id)
    fresh = load_base(server)
    assert same_bits(SaraAdapter.load(fresh, REPO).state_dict(), adapter.state_dict())


@pytest.mark.parametrize("token", ["hf_bobbobbobbob", "hf_oldoldoldold", "hf_unknownunknown"])
def test_a_token_without_access_is_a_clear_error(server, token):
    adapter = attach_trained(load_base(server))
    with pytest.raises(OSError, match=r"40[134]|denied|expired|Invalid"):
        push_to_hub(adapter, REPO, token=token)


def test_a_download_that_breaks_off_leaves_no_half_adapter(server, tmp_path):
    adapter, _ = pushed(server)
    server.faults.append(Fault(storage.TENSORS_FILE, method="GET", drop_response=50, times=99))
    with pytest.raises(OSError, match=r"could not be downloaded|no adapter can be had"):
        SaraAdapter.load(load_base(server), REPO, cache_dir=tmp_path / "other")
    with pytest.raises(FileNotFoundError):
        SaraAdapter.load(load_base(server), REPO, cache_dir=tmp_path / "other", local_files_only=True)
    server.faults.clear()
    loaded = SaraAdapter.load(load_base(server), REPO, cache_dir=tmp_path / "other")
    assert same_bits(loaded.state_dict(), adapter.state_dict())


def test_two_pushes_at_once_are_two_whole_adapters(server):
    adapters = [attach_trained(load_base(server), seed=seed) for seed in (1, 2)]
    errors = []

    def push(adapter):
        try:
            adapter.push_to_hub(REPO)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=push, args=(adapter,)) for adapter in adapters]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    loaded = SaraAdapter.load(load_base(server), REPO).state_dict()
    assert sum(same_bits(loaded, adapter.state_dict()) for adapter in adapters) == 1
    assert all("Nothing is lost" in str(error) for error in errors)


def test_a_full_disk_is_an_error_and_the_old_adapter_stays(server, tmp_path, monkeypatch):
    adapter = attach_trained(load_base(server))
    adapter.save_pretrained(tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        adapter.save_pretrained(tmp_path / "adapter")
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before


@pytest.mark.parametrize("name", ["", "a b/c", "../x", "a/b/c", "x" * 200])
def test_a_name_that_the_hub_does_not_accept_is_refused_before_anything_happens(server, name):
    with pytest.raises(ValueError, match="repo_id="):
        push_to_hub(attach_trained(make_model()), name)


def test_a_model_without_adapter_and_an_unknown_repository_are_clear_errors(server):
    with pytest.raises(ValueError, match="carries no SARA adapter"):
        push_to_hub(make_model(), REPO)
    model = make_model()
    attach_trained(model)
    attach_trained(model, name="other")
    with pytest.raises(ValueError, match="carries the adapters default, other"):
        push_to_hub(model, REPO)
    with pytest.raises(FileNotFoundError, match="alice/nothing"):
        from_hub("alice/nothing")
    with pytest.raises(FileNotFoundError, match="cannot be a Hub id"):
        from_hub("no/such/folder")


# ---- secrets ----


def test_no_byte_of_a_token_leaves(server, tmp_path, capfd, caplog):
    caplog.set_level(logging.DEBUG, logger="hf_sara")
    trainer = make_trainer(
        tmp_path / "run",
        model=load_base(server),
        push_to_hub=True,
        hub_model_id=REPO,
        hub_token=TOKEN,
        hub_strategy="all_checkpoints",
        hub_always_push=True,
    )
    trainer.train()
    trainer.push_to_hub()
    assert len(server.uploaded()) > 8
    assert not any(TOKEN.encode() in content for content in server.uploaded().values())
    assert not any(TOKEN.encode() in request.body for request in server.requests)
    out, err = capfd.readouterr()
    assert TOKEN not in caplog.text + out + err


@pytest.mark.parametrize(
    "strategy",
    [*(pytest.param(name, marks=pytest.mark.slow) for name in ("end", "every_save", "checkpoint")), "all_checkpoints"],
)
def test_no_path_and_no_secret_is_in_anything_that_is_published(server, strategy, tmp_path):
    uploaded = train_in_private(server, strategy, tmp_path)
    assert len(uploaded) > 8
    assert secrets_in(uploaded) == []


def test_links_are_not_followed(server, tmp_path, caplog):
    folder = tmp_path / "adapter"
    attach_trained(load_base(server)).save_pretrained(folder)
    (tmp_path / "secret.txt").write_text("hunter2")
    for name in ("README.md", "tokenizer.json", hub.TRAINING_ARGS_FILE, "notes.txt"):
        (folder / name).symlink_to(tmp_path / "secret.txt")
    hub.push_folder(folder, REPO)
    assert set(server.repo(REPO).files()) - {".gitattributes"} == {storage.CONFIG_FILE, storage.TENSORS_FILE}
    assert "does not follow symbolic links" in caplog.text
    (folder / storage.TENSORS_FILE).rename(tmp_path / "elsewhere")
    (folder / storage.TENSORS_FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"safetensors is a symbolic link.*pull"):
        hub.push_folder(folder, REPO)


# ---- what a push publishes ----


def test_a_push_publishes_what_was_there_when_it_was_queued(server, tmp_path):
    """Each commit in progress has the adapter of its own step, also if that checkpoint was deleted meanwhile."""
    steps = {}

    class Slow(SaraTrainer):
        def _push_from_checkpoint(self, folder):
            super()._push_from_checkpoint(folder)
            steps[self.state.global_step] = Path(folder, storage.TENSORS_FILE).read_bytes()

    gate, real = threading.Event(), hub.push_files

    def push(*args, **kwargs):
        gate.wait(60)
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "push_files", push)
        trainer = make_trainer(
            tmp_path / "run",
            model=load_base(server),
            trainer_class=Slow,
            push_to_hub=True,
            hub_model_id=REPO,
            hub_strategy="every_save",
            hub_always_push=True,
            save_total_limit=1,
        )
        trainer.add_callback(AtTheEnd(gate.set))
        trainer.train()
    assert sorted(steps) == [2, 4, 6, 7]
    history = {
        int(commit.title.rsplit(" ", 1)[1]): commit
        for commit in server.repo(REPO).commits
        if commit.title.startswith("Training in progress")
    }
    assert sorted(history) == sorted(steps)
    for step, commit in history.items():
        assert server.repo(REPO).files(commit.sha)[storage.TENSORS_FILE] == steps[step]


class AtTheEnd(TrainerCallback):
    def __init__(self, action):
        self.action = action

    def on_train_end(self, *args, **kwargs):
        self.action()


def test_a_save_that_was_cut_off_is_finished_before_the_push(server, tmp_path):
    folder = tmp_path / "adapter"
    adapter = attach_trained(load_base(server))
    adapter.save_pretrained(folder)
    stale = (folder / storage.CONFIG_FILE).read_bytes()
    adapter = attach_trained(load_base(server), threshold=0.4)
    adapter.save_pretrained(folder)
    right = (folder / storage.CONFIG_FILE).read_bytes()
    assert right != stale
    # The crash came between the two files, over an adapter of the first format.
    (folder / storage.CONFIG_FILE).write_bytes(stale)
    (folder / storage.FACTORS_FILE).write_bytes(b"of another adapter")
    hub.push_folder(folder, REPO)
    files = server.repo(REPO).files()
    assert files[storage.CONFIG_FILE] == right
    assert storage.FACTORS_FILE not in files
    assert {path.name for path in folder.iterdir()} == {storage.TENSORS_FILE, storage.CONFIG_FILE}
    assert (folder / storage.CONFIG_FILE).read_bytes() == right


def test_a_pending_save_of_the_first_format_is_finished_before_the_push(server, tmp_path):
    source = Path(__file__).parent / "data" / "format1" / "mo_sara-save-llama"
    folder = Path(shutil.copytree(source, tmp_path / "old"))
    expected = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".pt"}
    expected = {name: expected[name] for name in storage.ADAPTER_FILES}
    (folder / storage.CONFIG_FILE).rename(folder / storage.PENDING_CONFIG_FILE)
    (folder / storage.FACTORS_FILE).rename(folder / storage.PENDING_FACTORS_FILE)
    (folder / storage.CONFIG_FILE).write_bytes(b"{}")
    (folder / storage.FACTORS_FILE).write_bytes(b"of another adapter")
    hub.push_folder(folder, REPO)
    files = server.repo(REPO).files()
    assert {name: files[name] for name in expected} == expected
    assert {name: (folder / name).read_bytes() for name in expected} == expected
    assert not list(folder.glob("*.new"))


def test_a_push_without_an_adapter_is_an_error(server, tmp_path):
    (tmp_path / "README.md").write_text("# Nothing\n")
    with pytest.raises(FileNotFoundError, match="is not a hf_sara adapter"):
        hub.push_folder(tmp_path, REPO)
    with pytest.raises(ValueError, match="no adapter among the files"):
        hub.push_files({"README.md": b""}, tmp_path, REPO, commit_message="x")
    assert REPO not in server.repos


# The tests of tests/faults try many more.
@pytest.mark.parametrize(("where", "text"), [("folder", b"---\na: [1\n---\nmine"), ("hub", b"\xffmine")])
def test_a_readme_that_somebody_broke_stops_no_push(server, text, where, tmp_path):
    folder = tmp_path / "adapter"
    adapter = attach_trained(load_base(server))
    adapter.save_pretrained(folder)
    if where == "hub":
        adapter.push_to_hub(REPO)
        last = server.repo(REPO).find("main")
        server.repo(REPO).add(
            "refs/heads/main", {**last.files, "README.md": File(text, False)}, last, "Edit", "", "me"
        )
        adapter.write_card(folder, repo_id=REPO)
    else:
        adapter.write_card(folder, repo_id=REPO)
        (folder / "README.md").write_bytes(text)
    hub.push_folder(folder, REPO)
    assert "mine" in server.repo(REPO).files()["README.md"].decode()
    assert storage.read(hub.fetch_adapter(REPO)).sites


# ---- the token ----


def test_a_file_that_contains_the_token_is_not_uploaded(server, tmp_path):
    folder = tmp_path / "adapter"
    attach_trained(load_base(server)).save_pretrained(folder)
    (folder / "README.md").write_text(f"My token is {TOKEN}.")
    with pytest.raises(ValueError, match=r"README.md contains your Hub token"):
        hub.push_folder(folder, REPO)
    assert REPO not in server.repos


# ---- the trainer ----


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_every_hub_strategy_of_the_trainer(server, strategy, tmp_path):
    trainer = make_trainer(
        tmp_path / "run",
        model=load_base(server),
        push_to_hub=True,
        hub_model_id=REPO,
        hub_strategy=strategy,
        hub_always_push=True,
        hub_private_repo=True,
    )
    trainer.train()
    trainer.save_model()
    repo = server.repo(REPO)
    files = set(repo.files())
    assert repo.private
    assert {storage.CONFIG_FILE, storage.TENSORS_FILE, "README.md", hub.TRAINING_ARGS_FILE} <= files
    assert not any(name.endswith((".bin", "model.safetensors")) for name in files)
    in_progress = [commit for commit in repo.commits if commit.title.startswith("Training in progress")]
    assert len(in_progress) == (0 if strategy == "end" else 4)
    folders = {name.split("/")[0] for name in files if "/" in name}
    expected = {"checkpoint": {"last-checkpoint"}, "all_checkpoints": {f"checkpoint-{step}" for step in (2, 4, 6, 7)}}
    assert folders == expected.get(strategy, set())
    for folder in folders:
        assert {f"{folder}/{name}" for name in ("optimizer.pt", "scheduler.pt", "trainer_state.json")} <= files
    loaded = SaraAdapter.load(load_base(server), REPO)
    assert same_bits(loaded.state_dict(), trainer.sara_adapter.state_dict())


def test_a_checkpoint_from_the_hub_can_be_resumed(server, tmp_path):
    whole = make_trainer(tmp_path / "whole", model=load_base(server))
    whole.train()
    trainer = make_trainer(
        tmp_path / "run",
        model=load_base(server),
        push_to_hub=True,
        hub_model_id=REPO,
        hub_strategy="all_checkpoints",
        hub_always_push=True,
    )
    trainer.train()
    for name, content in server.repo(REPO).files().items():
        if name.startswith("checkpoint-4/"):
            (tmp_path / "pulled" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "pulled" / name).write_bytes(content)
    resumed = make_trainer(tmp_path / "pulled", model=load_base(server))
    resumed.train(resume_from_checkpoint=True)
    assert same_bits(resumed.sara_adapter.state_dict(), whole.sara_adapter.state_dict())


def test_a_training_goes_on_when_the_hub_does_not(server, tmp_path, caplog):
    trainer = make_trainer(
        tmp_path / "run",
        model=load_base(server),
        push_to_hub=True,
        hub_model_id=REPO,
        hub_strategy="every_save",
        hub_always_push=True,
    )
    server.faults.append(Fault(r".*", status=500, times=10_000))
    assert trainer.train().global_step == 7
    assert "Nothing is lost" in caplog.text
    with pytest.raises(OSError, match="Push it later with: hf-sara push"):
        trainer.save_model()
    assert storage.read(tmp_path / "run").sites
    server.faults.clear()
    hub.push_folder(tmp_path / "run", REPO)
    assert storage.CONFIG_FILE in server.repo(REPO).files()


# ---- bases that are not to be trusted ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_id": "https://example.org/base"}, "not a Hub id"),
        ({"revision": "../../x"}, "not a commit"),
        ({"class": "Trainer"}, "not one of transformers"),
        ({"class": "MyRemoteModel"}, "trust_remote_code"),
    ],
)
def test_the_hub_is_not_asked_for_a_base_that_is_refused(server, tmp_path, change, message):
    folder = tmp_path / "adapter"
    attach_trained(load_base(server)).save_pretrained(folder)
    edit_config(folder, lambda config: config["base"].update(change))
    server.requests.clear()
    with pytest.raises(AdapterError, match=message):
        from_hub(folder)
    assert not server.requests
