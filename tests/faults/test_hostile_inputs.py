"""READMEs that somebody broke, caches that somebody poisoned, and command lines that are wrong."""

import logging
import os
import pickle
import shutil
from pathlib import Path

import hub_client
import pytest
import test_wrong_commands as commands
import torch
from conftest import METHODS, attach_trained, make_model, same_bits, sara_arguments
from hub_client import load_base
from hub_storage import File
from safetensors import safe_open
from safetensors.torch import save_file
from test_card_text import BROKEN, WORD

from hf_sara import SaraAdapter, hub, storage
from hf_sara.card_text import decode
from hf_sara.manifest import Manifest
from hf_sara.tensor_files import tensors_digest

pytestmark = pytest.mark.slow
server = hub_client.server
home = commands.home


# ---- READMEs ----


@pytest.mark.parametrize("where", ["in the folder", "on the Hub"])
def test_a_hostile_readme_stops_no_push_and_loses_no_text(server, where, tmp_path, monkeypatch, tried):
    # The plot is not what is tried here, and it would take most of the time.
    monkeypatch.setattr(Manifest, "plot", lambda self, path: path.write_bytes(b"an image"))
    adapters = []
    for method in METHODS:
        adapter = attach_trained(load_base(server), method)
        adapter.save_pretrained(tmp_path / method)
        adapters.append((tmp_path / method, adapter))
    lost = wrong = traces = 0
    for number, content in enumerate(BROKEN.values()):
        # Two adapters take turns, so that one cannot be taken for the other.
        source, adapter = adapters[number % 2]
        repo, folder = f"alice/adapter-{number}", tmp_path / f"adapter {number}"
        shutil.copytree(source, folder)
        try:
            if where == "on the Hub":
                hub.push_folder(folder, repo)
                last = server.repo(repo).find("main")
                edited = {**last.files, "README.md": File(content, False)}
                server.repo(repo).add("refs/heads/main", edited, last, "Edit", "", "alice")
            else:
                (folder / "README.md").write_bytes(content)
            adapter.save_pretrained(folder)
            adapter.write_card(folder, repo_id=repo)
            hub.push_folder(folder, repo)
            found = storage.read(hub.fetch_adapter(repo)).tensors
        except OSError:
            wrong += 1
            continue
        except Exception:
            logging.exception("%s %s", list(BROKEN)[number], where)
            traces += 1
            continue
        wrong += not same_bits(found, adapter.state_dict())
        lost += WORD not in decode(server.repo(repo).files()["README.md"])
    what = "a hostile README in the folder or on the Hub, saved over and pushed"
    tried(what, len(BROKEN), lost=lost, wrong=wrong, traces=traces)
    assert len(BROKEN) >= 40


# ---- the cache ----


class Payload:
    """An object whose pickle makes a folder when it is loaded."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


def rewrite(path: Path, change=None, **metadata: str) -> None:
    """Change the tensors of an entry, or its metadata. The digest is that of the new tensors."""
    with safe_open(path, framework="pt") as file:
        tensors, written = {name: file.get_tensor(name) for name in list(file.keys())}, file.metadata()
    if change is not None:
        tensors = {name: change(name, tensor).contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={**written, **metadata, "digest": tensors_digest(tensors)})


def orthonormal(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if name == "values":
        return torch.rand_like(tensor).sort(descending=True).values
    tall = torch.randn_like(tensor if name == "U" else tensor.t())
    found = torch.linalg.qr(tall).Q
    return found if name == "U" else found.t()


def first_sign(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """One pair of vectors with the other sign: its product stays, but it is not in its canonical form."""
    signs = torch.ones_like(tensor)
    signs[(slice(None), 0) if name == "U" else 0] = -1
    return tensor * signs


def not_finite(name: str, tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[-1] = float("nan")
    return tensor


def with_only(path: Path, name: str, tensor: torch.Tensor) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({name: tensor}, path, metadata={**metadata, "digest": tensors_digest({name: tensor})})


def swap(path: Path, make) -> None:
    """Something else in the place of the file."""
    path.unlink()
    make()


def rotated(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The first two pairs of vectors, rotated together."""
    rotation = torch.eye(tensor.shape[1 if name == "U" else 0], dtype=tensor.dtype)
    rotation[:2, :2] = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    return tensor @ rotation.t() if name == "U" else rotation @ tensor


# What is done to an entry: its file, the file of another matrix, and a place that nothing may make.
POISONS = {
    "another matrix": lambda path, other, _: path.write_bytes(other),
    "permuted": lambda path, *_: rewrite(path, lambda name, t: t.flip(1 if name == "U" else 0)),
    "rolled": lambda path, *_: rewrite(path, lambda name, t: t.roll(1, 1 if name == "U" else 0)),
    "signs": lambda path, *_: rewrite(path, lambda name, t: -t),
    "one sign": lambda path, *_: rewrite(path, first_sign),
    "scaled": lambda path, *_: rewrite(path, lambda name, t: t * 1.001),
    "random": lambda path, *_: rewrite(path, lambda name, t: torch.randn_like(t)),
    "random orthonormal": lambda path, *_: rewrite(path, orthonormal),
    "not finite": lambda path, *_: rewrite(path, not_finite),
    "zero": lambda path, *_: rewrite(path, lambda name, t: torch.zeros_like(t)),
    "another dtype": lambda path, *_: rewrite(path, lambda name, t: t.to(torch.float16)),
    "integers": lambda path, *_: rewrite(path, lambda name, t: t.to(torch.int64)),
    "another shape": lambda path, *_: rewrite(path, lambda name, t: torch.cat([t, t])),
    "a scalar": lambda path, *_: rewrite(path, lambda name, t: t.flatten()[0]),
    "fewer tensors": lambda path, *_: with_only(path, "Vh", torch.zeros(3, 24)),
    "metadata": lambda path, *_: rewrite(path, radius="nan", clusters="0 999"),
    "no number": lambda path, *_: rewrite(path, radius="x", clusters="0"),
    "truncated": lambda path, *_: path.write_bytes(path.read_bytes()[:-20]),
    "a cut header": lambda path, *_: path.write_bytes(path.read_bytes()[:20]),
    "empty": lambda path, *_: path.write_bytes(b""),
    "noise": lambda path, *_: path.write_bytes(b"\xff" * path.stat().st_size),
    "a pickle": lambda path, _, place: path.write_bytes(pickle.dumps(Payload(place))),
    "torch.save": lambda path, _, place: torch.save(Payload(place), path),
    "a folder": lambda path, *_: swap(path, path.mkdir),
    "a full folder": lambda path, *_: swap(path, lambda: (path / "inside").mkdir(parents=True)),
    "a link": lambda path, other, _: swap(path, lambda: link(path, other)),
    "unreadable": lambda path, *_: path.chmod(0),
}
# What only factors can have: vectors that are said to belong together, so that a rotation of them is as good.
FACTOR_POISONS = {
    "pretended clusters": lambda path, *_: rewrite(path, first_sign, clusters="0 2"),
    "a cluster behind the end": lambda path, *_: rewrite(path, clusters="20 21"),
    "a rotated cluster": lambda path, *_: rewrite(path, rotated, clusters="0 2"),
}


def link(path: Path, other: bytes) -> None:
    target = path.with_name("elsewhere")
    target.write_bytes(other)
    path.symlink_to(target)


def poison(cache: Path, kind: str, how, place: Path) -> int:
    """Poison the entries of a kind, and return how many can still be read as they were."""
    entries = sorted(path for path in cache.rglob("*.safetensors") if (".spectrum." in path.name) == (kind != "k"))
    contents = [path.read_bytes() for path in entries]
    for path, other in zip(entries, contents[1:] + contents[:1], strict=True):
        if other != path.read_bytes():
            how(path, other, place)
    return sum(path.is_file() and path.read_bytes() == old for path, old in zip(entries, contents, strict=True))


def found_on(model) -> dict[str, torch.Tensor]:
    """The factors of all sites, and the tensors that start from them."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if ".sara." in name}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].shape == other[name].shape and torch.allclose(one[name], other[name], atol=1e-6) for name in one
    )


@pytest.mark.parametrize(("method", "kind"), [("sara", "spectrum"), ("mo_sara", "spectrum"), ("mo_sara", "k")])
def test_a_poisoned_cache_is_not_believed(method, kind, tmp_path, monkeypatch, caplog, tried):
    caplog.set_level(logging.WARNING, logger="hf_sara")
    place, count, wrong, traces = tmp_path / "executed", 0, 0, 0

    def attach(seed: int):
        model = make_model(seed=seed)
        torch.manual_seed(3)
        return SaraAdapter.attach(model, sara_arguments(method))

    for seed in (0, 1):
        clean = tmp_path / f"clean {seed}"
        monkeypatch.setenv("HF_SARA_CACHE", str(clean))
        adapter = attach(seed)
        expected = found_on(adapter.model)
        adapter.save_pretrained(tmp_path / f"adapter {seed}")
        for name, how in {**POISONS, **(FACTOR_POISONS if kind == "k" else {})}.items():
            for action in ("attach", "load"):
                cache = tmp_path / f"{seed} {name} {action}"
                shutil.copytree(clean, cache)
                sound = poison(cache, kind, how, place)
                monkeypatch.setenv("HF_SARA_CACHE", str(cache))
                caplog.clear()
                count += 1
                try:
                    if action == "attach":
                        model = attach(seed).model
                    else:
                        model = make_model(seed=seed)
                        SaraAdapter.load(model, tmp_path / f"adapter {seed}")
                except Exception:
                    logging.exception("%s of a %s: %s", action, kind, name)
                    traces += 1
                    continue
                # SARA takes nothing from the cache when it is loaded, and Mo-SARA only vectors.
                silent = (action == "load" and kind == "spectrum") or sound
                right = equal(found_on(model), expected) and (bool(caplog.records) or silent)
                if not right:
                    logging.error("%s of a %s: %s", action, kind, name)
                wrong += not right
    tried("a poisoned cache", count, wrong=wrong, traces=traces, executed=int(place.exists()))


# ---- command lines ----


def test_a_wrong_command_line_is_a_message(home, tmp_path, monkeypatch, tried):
    monkeypatch.chdir(tmp_path)
    wrong = traces = 0
    table = [*((arguments, 1) for arguments in commands.PLAN + commands.LOAD), *((u, 2) for u in commands.USAGE)]
    for number, (arguments, code) in enumerate(table):
        (tmp_path / str(number)).mkdir()
        try:
            wrong += commands.run(home, arguments, tmp_path / str(number)).exit_code != code
        except AssertionError as error:
            logging.error("%s: %s", commands.label(arguments), error)
            traces += 1
    tried("a wrong command line", len(table), wrong=wrong, traces=traces)
    assert len(table) >= 300
