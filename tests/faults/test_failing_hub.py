"""A Hub that fails, and what leaves the machine: no adapter is lost or mixed with another, and no secret is sent."""

import copy
import json
import logging
from pathlib import Path

import hub_client
import pytest
from conftest import METHODS, attach_trained, same_bits
from hub_client import REPO, load_base, secrets_in, train_in_private
from hub_server import Fault
from training import make_trainer

from hf_sara import hub, storage

pytestmark = pytest.mark.slow
server = hub_client.server

# What happens to a push. Once is little enough for a client that tries again; always is not.
FAULTS = [
    *(
        Fault(place, status=status, times=times)
        for place in (r"/repos/create", r"/preupload/", r"/commit/", r"/resolve/")
        for status, times in ((500, 1), (503, 99))
    ),
    *(Fault(place, status=429, times=99, retry_after=0) for place in (r"/preupload/", r"/commit/")),
    *(Fault(place, status=401, times=99) for place in (r"/repos/create", r"/commit/")),
    *(
        Fault(place, method="POST|PUT", drop_request=10, times=99)
        for place in (r"/preupload/", r"/objects/batch", r"/cdn/upload/", r"/commit/")
    ),
    *(
        Fault(place, method="POST|PUT|GET", drop_response=5, times=times)
        for place in (r"/repos/create", r"/preupload/", r"/objects/batch", r"/commit/", r"/resolve/")
        for times in (1, 99)
    ),
    Fault(r"/cdn/upload/", status=503, times=99),
    Fault(r"/objects/verify", status=500, times=99),
    Fault(r".*", status=500, times=10_000),
]
# What happens in the middle of a training. The Hub is there again at its end.
TRAININGS = [
    Fault(r"/commit/", status=500, times=2),
    Fault(r"/commit/", status=503, times=99),
    Fault(r"/commit/", status=429, times=99, retry_after=0),
    Fault(r"/commit/", drop_request=10, times=99),
    Fault(r"/commit/", drop_response=5, times=2),
    Fault(r"/cdn/upload/", drop_request=10, times=99),
    Fault(r".*", status=401, times=10_000),
    Fault(r".*", status=500, times=10_000),
]


def mixed(server, folder: Path) -> int:
    """How many commits have an adapter whose files do not belong together."""
    found = 0
    for commit in server.repo(REPO).commits if REPO in server.repos else ():
        files = server.repo(REPO).files(commit.sha)
        names = [name for name in storage.ADAPTER_FILES if name in files]
        if not names:
            continue
        place = folder / commit.sha
        place.mkdir(parents=True)
        for name in names:
            (place / name).write_bytes(files[name])
        try:
            # Nothing may be left to finish: the copy of the config is the one that the tensors have.
            found += storage.settle(place) != {name: files[name] for name in names}
        except Exception:
            logging.exception(commit.title)
            found += 1
    return found


def is_on_the_hub(adapter, cache: Path) -> bool:
    return same_bits(storage.read(hub.fetch_adapter(REPO, cache_dir=cache)).tensors, adapter.state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_a_push_that_fails_loses_nothing(server, method, tmp_path, tried):
    old = attach_trained(load_base(server), method, seed=3)
    new = attach_trained(load_base(server), method, seed=17, threshold=0.6)
    old.save_pretrained(tmp_path / "old")
    new.save_pretrained(tmp_path / "new")
    (tmp_path / "new" / "README.md").write_text("# Mine\n")
    lost = wrong = traces = 0
    for number, fault in enumerate(FAULTS):
        place = tmp_path / str(number)
        server.repos.pop(REPO, None)
        server.faults.clear()
        hub.push_folder(tmp_path / "old", REPO)
        server.faults.append(copy.copy(fault))
        try:
            hub.push_folder(tmp_path / "new", REPO)
            told = True
        except OSError as error:
            told = "Nothing is lost" in str(error)
        except Exception:
            logging.exception("%s", fault)
            traces += 1
            continue
        server.faults.clear()
        # Either the push was refused with a clear message, or the new adapter is there.
        wrong += not told or mixed(server, place / "commits")
        wrong += not any(is_on_the_hub(adapter, place / "cache") for adapter in (old, new))
        lost += not same_bits(storage.read(tmp_path / "new").tensors, new.state_dict())
        hub.push_folder(tmp_path / "new", REPO)
        lost += not is_on_the_hub(new, place / "later")
        lost += server.repo(REPO).files()["README.md"].count(b"# Mine") != 1
    tried("a hub that fails", len(FAULTS), lost=lost, wrong=wrong, traces=traces)


@pytest.mark.parametrize("token", ["hf_bobbobbobbob", "hf_oldoldoldold", "hf_unknownunknown"])
def test_a_push_without_the_right_token_changes_nothing(server, token, tmp_path, tried):
    adapter = attach_trained(load_base(server))
    adapter.save_pretrained(tmp_path / "adapter")
    hub.push_folder(tmp_path / "adapter", REPO)
    before = server.repo(REPO).files()
    with pytest.raises(OSError, match="Nothing is lost"):
        hub.push_folder(tmp_path / "adapter", REPO, token=token)
    wrong = server.repo(REPO).files() != before
    lost = not same_bits(storage.read(tmp_path / "adapter").tensors, adapter.state_dict())
    tried("a hub that fails", lost=int(lost), wrong=int(wrong))


@pytest.mark.parametrize("fault", TRAININGS, ids=str)
def test_a_training_goes_on_when_the_hub_fails(server, fault, tmp_path, tried):
    trainer = make_trainer(
        tmp_path / "run",
        model=load_base(server),
        push_to_hub=True,
        hub_model_id=REPO,
        hub_strategy="every_save",
        hub_always_push=True,
        save_steps=1,
        max_steps=4,
    )
    server.faults.append(copy.copy(fault))
    lost = wrong = 0
    try:
        trainer.train()
        trainer.save_model()
    except OSError as error:
        lost += "Nothing is lost" not in str(error)
    lost += trainer.state.global_step != 4
    state = trainer.sara_adapter.state_dict()
    lost += not same_bits(storage.read(tmp_path / "run").tensors, state)
    checkpoint = tmp_path / "run" / "checkpoint-4"
    lost += json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] != 4
    lost += not same_bits(storage.read(checkpoint).tensors, state)
    server.faults.clear()
    wrong += mixed(server, tmp_path / "commits")
    hub.push_folder(tmp_path / "run", REPO)
    lost += not is_on_the_hub(trainer.sara_adapter, tmp_path / "cache")
    wrong += mixed(server, tmp_path / "commits later")
    tried("a hub that fails", lost=lost, wrong=wrong)


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_no_secret_is_in_any_byte_that_is_uploaded(server, strategy, tmp_path, tried):
    uploaded = train_in_private(server, strategy, tmp_path)
    # Names and messages are in the requests themselves.
    uploaded |= {f"request {number}": request.body for number, request in enumerate(server.requests)}
    hits = secrets_in(uploaded)
    searched = sum(map(len, uploaded.values()))
    tried("bytes searched for a secret in all that was uploaded", searched, secret_bytes=len(hits))
