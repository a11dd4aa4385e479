"""
Hostile adapters: folders that are damaged, or made to do harm. Each is refused with one clear error, in bounded memory
and time, nothing in it is executed, nothing is written, and the model is what it was.
"""

import base64
import hashlib
import json
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import sys
from collections.abc import Callable
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import attach_trained, logits, make_model, same_bits
from safetensors.torch import load_file, save_file

from hf_sara import AdapterError, SaraAdapter, from_hub, storage
from hf_sara.storage import CONFIG_FILE, FACTORS_FILE, PENDING_CONFIG_FILE, TENSORS_FILE

BASE, COMMIT = "someone/base", "0123456789abcdef0123456789abcdef01234567"
SECRET = "hunter2"
Q = "model.layers.0.self_attn.q_proj"
Damage = Callable[[Path], object]


# ---- ways to damage a folder ----


def config(change: Callable[[dict], object]) -> Damage:
    """Change the config."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / CONFIG_FILE).read_text())
        change(content)
        (folder / CONFIG_FILE).write_text(json.dumps(content))

    return damage


def site(**changes) -> Damage:
    """Change the record of the first site."""
    return config(lambda c: c["sites"][0].update(changes))


def arguments(**changes) -> Damage:
    return config(lambda c: c["arguments"].update(changes))


def base(**changes) -> Damage:
    return config(lambda c: c["base"].update(changes))


def text(change: Callable[[str], str | bytes]) -> Damage:
    """Change the config's text."""

    def damage(folder: Path) -> None:
        content = change((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def content(change: Callable[[bytes], bytes], file: str = TENSORS_FILE) -> Damage:
    """Change the bytes of a tensor file. Whoever does that for a purpose writes the new digest into the config."""

    def damage(folder: Path) -> None:
        (folder / file).write_bytes(change((folder / file).read_bytes()))
        sign(folder, file)

    return damage


def sign(folder: Path, file: str) -> None:
    digest = hashlib.sha256((folder / file).read_bytes()).hexdigest()
    config(lambda c: c.update({f"{'tensors' if file == TENSORS_FILE else 'factors'}_sha256": digest}))(folder)


def tensors(change: Callable[[dict], object], file: str = TENSORS_FILE) -> Damage:
    """Change the tensors of a file, which stays a valid one."""

    def damage(folder: Path) -> None:
        found = load_file(folder / file)
        change(found)
        save_file(found, folder / file)
        sign(folder, file)

    return damage


def tensor(change: Callable[[torch.Tensor], torch.Tensor], name: str = f"{Q}.S", file: str = TENSORS_FILE) -> Damage:
    """Change one tensor of a file."""
    return tensors(lambda found: found.update({name: change(found[name]).contiguous()}), file)


def header(change: Callable[[dict], object]) -> Damage:
    """Change the header of the tensor file, and leave the bytes behind it."""

    def rewrite(whole: bytes) -> bytes:
        (length,) = struct.unpack("<Q", whole[:8])
        found = json.loads(whole[8 : 8 + length])
        change(found)
        changed = json.dumps(found).encode()
        return struct.pack("<Q", len(changed)) + changed + whole[8 + length :]

    return content(rewrite)


def entry(**changes) -> Damage:
    """Change what the header says of one tensor."""
    return header(lambda found: found[f"{Q}.S"].update(changes))


def raw_header(text: bytes) -> Damage:
    """Another header altogether, with no bytes behind it."""
    return content(lambda whole: struct.pack("<Q", len(text)) + text)


def claimed(length: int) -> Damage:
    """A header that claims a length."""
    return content(lambda whole: struct.pack("<Q", length) + whole[8:])


def instead(file: str, make: Callable[[Path], object]) -> Damage:
    """Something else in the place of a file."""

    def damage(folder: Path) -> None:
        (folder / file).unlink()
        make(folder / file)

    return damage


def sparse(size: int) -> Callable[[Path], None]:
    """A file of any size that takes no space."""

    def make(path: Path) -> None:
        path.touch()
        os.truncate(path, size)

    return make


def secret(path: Path) -> None:
    """A link to a file outside of the folder."""
    outside = path.parent.parent / "secret.txt"
    outside.write_text(f"password={SECRET}")
    path.symlink_to(outside)


class Payload:
    """Unpickling it makes the marker."""

    def __init__(self, folder: Path):
        self.marker = folder.parent / "marker"

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def pickled(file: str, replaces: str | None = None) -> Damage:
    """A pickle with a payload, as torch writes it or plain, in the place of a file."""

    def damage(folder: Path) -> None:
        if replaces is not None:
            (folder / replaces).unlink()
        if file.endswith(".pt"):
            torch.save({"state": Payload(folder)}, folder / file)
        else:
            (folder / file).write_bytes(pickle.dumps(Payload(folder)))

    return damage


def many_heads(folder: Path) -> None:
    """Config and tensor file agree on 10^8 heads; the 6 GB of the first site's S are a hole in the file."""
    config(lambda c: c["arguments"].update(num_heads=10**8))(folder)
    saved = storage.read(folder)
    records, end = {}, 0
    for name, shape in saved.trained_shapes().items():
        size = 4 * torch.Size(shape).numel()
        records[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(records).encode()
    (folder / TENSORS_FILE).write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(folder / TENSORS_FILE, 8 + len(text) + end)


def nested(depth: int, opening: str, closing: str) -> str:
    return opening * depth + closing * depth


def sketch(*numbers: float) -> str:
    return base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()


def switch_method(folder: Path) -> None:
    """The config says the other method, consistently; its sites have or lack what that needs."""
    method = {"sara": "mo_sara", "mo_sara": "sara"}[json.loads((folder / CONFIG_FILE).read_text())["method"]]
    config(lambda c: c.update(method=method, arguments={"method": method}))(folder)


def crowd(folder: Path) -> None:
    record = '{{"name":"x{}","shape":[1,1],"k":1}}'
    sites = ",".join(record.format(number) for number in range(50_000))
    text(lambda t: t[: t.index('"sites"')] + f'"sites":[{sites}]}}')(folder)


@header
def many_tensors(found: dict) -> None:
    found.update({f"t{number}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(10**5)})


@header
def overlap(found: dict) -> None:
    """Two tensors of one shape on the same bytes."""
    found.pop("__metadata__")
    one, other = next(pair for pair in combinations(found.values(), 2) if pair[0]["shape"] == pair[1]["shape"])
    one["data_offsets"] = other["data_offsets"]


def gap(folder: Path) -> None:
    """Everything four bytes later: the first bytes belong to no tensor."""

    @header
    def shift(found: dict) -> None:
        found.pop("__metadata__")
        for record in found.values():
            record["data_offsets"] = [offset + 4 for offset in record["data_offsets"]]

    shift(folder)
    content(lambda whole: whole + bytes(4))(folder)


def torch_archive(folder: Path) -> None:
    torch.save({"state": Payload(folder)}, folder / TENSORS_FILE)
    sign(folder, TENSORS_FILE)


def flip_a_bit(folder: Path) -> None:
    """The lowest bit of a number: neither its shape nor its finiteness tells."""
    whole = bytearray((folder / TENSORS_FILE).read_bytes())
    whole[-4] ^= 1
    (folder / TENSORS_FILE).write_bytes(whole)


@config
def swap_seeds(content: dict) -> None:
    one, other = content["sites"][0], content["sites"][2]
    for field in ("sha256", "sketch"):
        one[field], other[field] = other[field], one[field]


def exchange_factors(folder: Path) -> None:
    """Orthonormal, finite, of the right shapes: but not those that the adapter was trained with."""
    found = load_file(folder / FACTORS_FILE)
    save_file({name: tensor.flip(0).contiguous() for name, tensor in found.items()}, folder / FACTORS_FILE)


def pending(folder: Path) -> None:
    """As after a crash of a write, but the tensors are a terabyte."""
    shutil.copy(folder / CONFIG_FILE, folder / PENDING_CONFIG_FILE)
    os.truncate(folder / TENSORS_FILE, 2**40)


def taken_name(folder: Path) -> None:
    """The base's id is also a path that exists, seen from where the tests are."""
    (folder.parent / "someone" / "here").mkdir(parents=True)
    base(model_id="someone/here")(folder)


def remote_base(folder: Path) -> None:
    """A base whose repository has code that its config asks for."""
    base(model_id="someone/remote", **{"class": "EvilForCausalLM"})(folder)


# ---- the table ----


class Case(NamedTuple):
    name: str
    damage: Damage
    # What the error has to say.
    message: str
    # The adapters that it damages: of both methods, or one, or one with saved factors.
    kinds: tuple[str, ...] = ("sara", "mo_sara")
    # Who refuses it. A base that does not exist says nothing to somebody who brings one.
    loaders: tuple[str, ...] = ("load", "from_hub")


SARA, MO_SARA, FACTORS = ("sara",), ("mo_sara",), ("factors",)
# A case that takes a second is run once.
ONCE = {"kinds": SARA, "loaders": ("load",)}
WITH_BASE = {"loaders": ("from_hub",)}
DAMAGED = rf"{CONFIG_FILE} is damaged: "
BROKEN = rf"{TENSORS_FILE} is damaged: "

CASES = [
    # -- the config as a file --
    Case("config: empty", text(lambda t: ""), DAMAGED + "it is not JSON"),
    Case("config: not JSON", text(lambda t: "not json"), DAMAGED + "it is not JSON"),
    Case("config: cut off", text(lambda t: t[:-40]), DAMAGED + "it is not JSON"),
    Case("config: more behind it", text(lambda t: t + "{}"), DAMAGED + r"it is not JSON \(Extra data"),
    Case("config: a list", text(lambda t: "[1, 2]"), DAMAGED + "it is not a JSON object"),
    Case("config: byte order mark", text(lambda t: "\ufeff" + t), DAMAGED + r"it is not JSON \(Unexpected UTF-8 BOM"),
    Case("config: UTF-16", text(lambda t: t.encode("utf-16")), DAMAGED + "it is not JSON .*can't decode"),
    Case("config: Latin-1", text(lambda t: t.replace("model", "modèl").encode("latin-1")), "can't decode byte 0xe8"),
    Case("config: deep lists", text(lambda t: nested(10**5, "[", "]")), DAMAGED + "it is not JSON .*recursion"),
    Case("config: deep objects", text(lambda t: nested(10**5, '{"a":', "")), DAMAGED + "it is not JSON .*recursion"),
    Case("config: deep in a field", text(lambda t: t.replace("1,", nested(10**5, "[", "]") + ",", 1)), "recursion"),
    Case("config: 200 MB", instead(CONFIG_FILE, sparse(200 * 2**20)), DAMAGED + "it has more than 8,388,608 bytes"),
    Case("config: a terabyte", instead(CONFIG_FILE, sparse(2**40)), DAMAGED + "it has more than 8,388,608 bytes"),
    Case("config: millions of lists", text(lambda t: f"[{'[],' * 2_700_000}0]"), "it is not a JSON object", **ONCE),
    Case("config: a pickle", pickled(CONFIG_FILE, CONFIG_FILE), DAMAGED + "it is not JSON"),
    Case("config: missing", instead(CONFIG_FILE, lambda path: None), f"it has no {CONFIG_FILE}"),
    Case("config: a folder", instead(CONFIG_FILE, Path.mkdir), f"it has no {CONFIG_FILE}"),
    Case("config: a pipe", instead(CONFIG_FILE, os.mkfifo), f"it has no {CONFIG_FILE}"),
    Case("config: a device", instead(CONFIG_FILE, lambda p: p.symlink_to("/dev/zero")), f"it has no {CONFIG_FILE}"),
    Case("config: a link to itself", instead(CONFIG_FILE, lambda p: p.symlink_to(p)), f"it has no {CONFIG_FILE}"),
    Case("config: a link outside", instead(CONFIG_FILE, secret), DAMAGED + "it is not JSON"),
    Case(
        "pending config: damaged",
        lambda folder: (folder / PENDING_CONFIG_FILE).write_text(nested(10**5, "[", "]")),
        rf"{PENDING_CONFIG_FILE} is damaged: it is not JSON",
    ),
    Case("pending config: for a terabyte of tensors", pending, BROKEN + "it has 1,099,511,627,776 bytes"),
    # -- the config as JSON --
    Case("number: NaN", config(lambda c: c.update(threshold=float("nan"))), DAMAGED + ".*number NaN is not finite"),
    Case("number: Infinity", arguments(dropout=float("inf")), DAMAGED + ".*number Infinity is not finite"),
    Case("number: 1e999", text(lambda t: t.replace("0.05", "1e999")), DAMAGED + ".*number 1e999 is not finite"),
    Case("number: 5000 digits", text(lambda t: t.replace("0.05", "9" * 5000)), DAMAGED + "it is not JSON .*digits"),
    Case("duplicate: a field", text(lambda t: t.replace("{", '{"method": "sara",', 1)), "'method' stands twice"),
    Case("duplicate: of a site", text(lambda t: t.replace('{"name"', '{"k":1,"name"', 1)), "'k' stands twice"),
    Case("version: a later one", config(lambda c: c.update(format_version=2, new=1)), "version 2; .*Update hf_sara"),
    Case("version: zero", config(lambda c: c.update(format_version=0)), DAMAGED + "there is no format version 0"),
    Case(
        "version: true", config(lambda c: c.update(format_version=True)), "format_version=True.* not of the type int"
    ),
    Case("version: text", config(lambda c: c.update(format_version="1")), "format_version='1'.* not of the type int"),
    *(
        Case(
            f"missing: {name}",
            config(lambda c, name=name: c.pop(name)),
            DAMAGED + f"'{name}' is missing in the config",
        )
        for name in ("format_version", "method", "threshold", "arguments", "dtype", "tensors_sha256", "base", "sites")
    ),
    Case(
        "unknown: auto_map",
        config(lambda c: c.update(auto_map={"AutoModel": "evil.Model"})),
        "the field 'auto_map' in the config is unknown",
    ),
    Case(
        "unknown: trust_remote_code", base(trust_remote_code=True), "the field 'trust_remote_code' in its base is unkn"
    ),
    Case("unknown: an argument", arguments(rank_plan="x"), "'rank_plan' in its arguments is unknown: update hf_sara"),
    Case("unknown: of a site", site(__class__="evil"), "'__class__' in the record of site 0 is unknown"),
    Case("unknown: a seed of SARA", site(sha256="0" * 64), "'sha256' in the record of site 0 is unknown", SARA),
    Case("method: unknown", config(lambda c: c.update(method="lora")), "its method 'lora' is not that of its arg"),
    Case("method: unknown twice", arguments(method="os.system"), "method='os.system' is unknown"),
    Case("method: the other", switch_method, DAMAGED + ".* in the record of site 0"),
    Case(
        "dtype: half", config(lambda c: c.update(dtype="float16")), "trained tensors cannot have the dtype 'float16'"
    ),
    Case("dtype: a list", config(lambda c: c.update(dtype=["float32"])), r"dtype=\['float32'\].* not of the type str"),
    Case("threshold: zero", config(lambda c: c.update(threshold=0)), "threshold=0 has to be"),
    Case("threshold: above one", config(lambda c: c.update(threshold=1.5)), "threshold=1.5 has to be"),
    Case("threshold: true", config(lambda c: c.update(threshold=True)), "threshold=True.* not of the type float"),
    Case("argument: threshold", arguments(threshold=-0.5), "threshold=-0.5 has to be"),
    Case("argument: threshold as text", arguments(threshold="0.5"), "threshold='0.5'.* not of the type"),
    Case("argument: no heads", arguments(num_heads=0), "num_heads=0 has to be"),
    Case("argument: heads true", arguments(num_heads=True), "num_heads=True.* not of the type int"),
    Case("argument: dropout", arguments(dropout=1), "dropout=1 has to lie in"),
    Case("argument: dropout as text", arguments(dropout="0.1"), "dropout='0.1'.* not of the type float"),
    Case("argument: singular_values", arguments(singular_values="no"), "singular_values='no'.* not of the type bool"),
    Case("argument: target_modules", arguments(target_modules=[["q"]]), "target_modules=.* not of the type"),
    Case("argument: layers", arguments(layers="0-9999999999"), "layers='0-9999999999'"),
    Case("argument: budget", arguments(parameter_budget="all", threshold=None), "parameter_budget='all'"),
    Case("argument: factors", arguments(factors="pickle"), "factors='pickle' is unknown"),
    Case("argument: v_position", arguments(v_position="forward"), "v_position='forward' is unknown"),
    Case("arguments: a list", config(lambda c: c.update(arguments=[1])), r"arguments=\[1\].* not of the type dict"),
    Case("versions: not text", config(lambda c: c["versions"].update(torch=[2])), "versions=.* not of the type"),
    # -- sites --
    Case("sites: none", config(lambda c: c.update(sites=[])), DAMAGED + "it names no sites"),
    Case("sites: an object", config(lambda c: c.update(sites={"0": 1})), "sites=.* not of the type list"),
    Case("sites: text", config(lambda c: c["sites"].append("text")), "the record of site 4 is not a JSON object"),
    Case("sites: one twice", config(lambda c: c["sites"].append(c["sites"][0])), "it names no sites, or one twice"),
    Case("sites: one fewer", config(lambda c: c["sites"].pop()), "tensors in .* unexpected: model.layers.1"),
    Case(
        "sites: a million", text(lambda t: f'{{"sites":[{"{},".ljust(9) * 10**6}0]}}'), "more than 8,388,608", **ONCE
    ),
    Case("sites: 50,000 that the model has not", crowd, "adapts 'x0', which this Llama", **ONCE),
    *(
        Case(f"site name: {name[:40]!r}", site(name=name), r"adapts .*, which this LlamaForCausalLM does not have")
        for name in (
            *("", ".", "..", "../../x", "/etc/passwd", "C:\\x", f"{Q}/../../x", f"{Q}\0", f"{Q} ", Q.upper()),
            *("__class__", "__init__.__globals__", "forward", "weight", "model", "config", f"{Q}.weight", f"{Q}.sara"),
            *("model.layers.0.self_attn", "model.layers.-1.self_attn.q_proj", "model.embed_tokens", "model.norm"),
            *("\x1b[2J\x1b]0;evil\x07", "a\nHF_TOKEN:", "\ud800", "\u202eevil", "x" * 10**6, "{0.__class__}", "%s%n"),
        )
    ),
    Case("site name: a number", site(name=7), "name=7.* not of the type str"),
    Case("site name: of another site", site(name="lm_head"), "lm_head: .* shape .*this model's has", SARA),
    Case("shape: one number", site(shape=[24]), r"k=.* shape \(24,\) cannot have"),
    Case("shape: three", site(shape=[24, 24, 24]), r"shape \(24, 24, 24\) cannot have"),
    Case("shape: not a list", site(shape=24), r"shape=24.* not of the type list\[int\]"),
    Case("shape: with fractions", site(shape=[24.0, 24]), r"shape=\[24.0, 24\].* not of the type"),
    Case("shape: negative", site(shape=[-24, -24]), r"shape \(-24, -24\) cannot have"),
    Case("shape: empty", site(shape=[0, 24]), r"shape \(0, 24\) cannot have"),
    Case("shape: 10^18", site(shape=[10**9, 10**9]), r"q_proj: .* shape \(1000000000, 1000000000\), this model's has"),
    Case("shape: 10^18 and its k", site(shape=[10**9, 10**9], k=10**9), r"shape \(1000000000, 1000000000\), this"),
    Case("shape: turned round", config(lambda c: c["sites"][1].update(shape=[12, 24])), r"v_proj: .*\(12, 24\), this"),
    *(
        Case(f"k: {k}", site(k=k), f"k={k}, which a weight of shape .* cannot have")
        for k in (0, -1, 25, 10**12, -(10**30))
    ),
    *(
        Case(f"k: {k!r}", site(k=k), re.escape(f"k={k!r} in the record of site 0 is not of the type int"))
        for k in (True, 1.0, "1", None, [1])
    ),
    Case("k: another", config(lambda c: c["sites"][0].update(k=c["sites"][0]["k"] + 1)), r"q_proj\.\w+: the tensor"),
    Case(
        "slice: of a plain module", site(name=f"{Q}.q", slice={"groups": 1, "start": 0, "stop": 24}), "does not have"
    ),
    Case(
        "slice: out of range",
        site(slice={"groups": 1, "start": -9, "stop": 10**9}),
        r"shape .* in the columns .*start=-9.*, this model's has \(24, 24\)",
    ),
    Case(
        "slice: unknown field",
        site(slice={"groups": 1, "start": 0, "stop": 4, "step": 2}),
        "'step' in the slice of .* is unknown",
    ),
    Case("slice: a list", site(slice=[0, 4]), r"slice=\[0, 4\].* not of the type dict"),
    # -- the base that the config names --
    *(
        Case(f"base: {model_id!r}", base(model_id=model_id), "its base .* is not a Hub id")
        for model_id in (
            *("/etc", "../../base", "a/../b", ".", "..", "~/base", "a\\b", "", "a/b/c", "someone/base\n", "x" * 200),
            *("https://example.org/base", "file:///etc/passwd", "hf://someone/base", "//server/share", "\x1b[31mbase"),
        )
    ),
    Case("base: a number", base(model_id=3), "model_id=3 in its base is not of the type"),
    Case("base: a list", config(lambda c: c.update(base=[])), r"base=\[\].* not of the type dict"),
    Case("base: without class", config(lambda c: c["base"].pop("class")), "'class' is missing in its base"),
    Case("base: revision", base(revision="../../x"), "its base's revision '../../x' is not a commit"),
    Case("base: revision, a branch", base(revision="main"), "its base's revision 'main' is not a commit"),
    Case("base: class os.system", base(**{"class": "os.system"}), "class 'os.system' is not the name of a class"),
    Case("base: class a number", base(**{"class": 5}), "class=5.* not of the type str"),
    Case("base: dtype int8", base(dtype="int8"), "its base's dtype 'int8' is not one"),
    Case("base: dtype load", base(dtype="load"), "its base's dtype 'load' is not one"),
    Case("base: pad token", base(pad_token_id="0"), "pad_token_id='0'.* not of the type"),
    Case("base: eos tokens", base(eos_token_id=[0, "x"]), "eos_token_id=.* not of the type"),
    Case("base: labels", base(id2label=["a"]), "id2label=.* not of the type"),
    Case("base: not on the Hub", base(model_id=None), "not on the Hub. Give it as base_model", **WITH_BASE),
    Case("base: not to be had", base(model_id="someone/else"), "base 'someone/else' .*cannot be had", **WITH_BASE),
    Case("base: commit not to be had", base(revision="f" * 40), "base 'someone/base' .* cannot be had", **WITH_BASE),
    Case("base: a folder here", taken_name, "folder of that name here. Give base_model", **WITH_BASE),
    *(
        Case(f"base: class {name}", base(**{"class": name}), "not one of transformers", **WITH_BASE)
        for name in ("Trainer", "pipeline", "AutoModelForCausalLM", "PreTrainedModel", "utils", "__path__", "Payload")
    ),
    Case("base: another class", base(**{"class": "LlamaModel"}), "which this LlamaModel does not have", **WITH_BASE),
    Case("base: remote code", remote_base, "not one of transformers. If you trust .*_remote_code", **WITH_BASE),
    # -- the tensor file as a file --
    Case("tensors: empty", content(lambda whole: b""), BROKEN),
    Case("tensors: five bytes", content(lambda whole: whole[:5]), BROKEN),
    Case("tensors: cut off in the header", content(lambda whole: whole[:60]), BROKEN),
    Case("tensors: cut off in the data", content(lambda whole: whole[:-4]), BROKEN),
    Case("tensors: more behind them", content(lambda whole: whole + b"more"), BROKEN),
    Case("tensors: zeros behind them", content(lambda whole: whole + bytes(8)), BROKEN),
    Case("tensors: a pickle", pickled(TENSORS_FILE, TENSORS_FILE), BROKEN),
    Case("tensors: an archive of torch", torch_archive, BROKEN),
    Case("tensors: one bit flipped", flip_a_bit, BROKEN + "its SHA-256 is not the one"),
    Case("tensors: wrong digest", config(lambda c: c.update(tensors_sha256="0" * 64)), "its SHA-256 is not the one"),
    Case("tensors: no digest", config(lambda c: c.update(tensors_sha256="none")), "'none' is not a SHA-256"),
    Case(
        "tensors: a terabyte", lambda f: os.truncate(f / TENSORS_FILE, 2**40), BROKEN + "it has 1,099,511,627,776 by"
    ),
    Case("tensors: missing", instead(TENSORS_FILE, lambda path: None), f"it has no {TENSORS_FILE}"),
    Case("tensors: a folder", instead(TENSORS_FILE, Path.mkdir), f"it has no {TENSORS_FILE}"),
    Case("tensors: a pipe", instead(TENSORS_FILE, os.mkfifo), f"it has no {TENSORS_FILE}"),
    Case("tensors: a device", instead(TENSORS_FILE, lambda p: p.symlink_to("/dev/zero")), f"it has no {TENSORS_FILE}"),
    Case("tensors: a link outside", instead(TENSORS_FILE, secret), BROKEN),
    *(
        Case(f"tensors: {name} in their place", pickled(name, TENSORS_FILE), f"it has no {TENSORS_FILE}")
        for name in ("pytorch_model.bin", "adapter_model.bin", "sara_adapter.bin", "sara_adapter.pt")
    ),
    # -- its header --
    *(
        Case(f"header: claims {n} bytes", claimed(n), BROKEN)
        for n in (0, 1, 2**31, 2**40, 2**60, 2**63 + 5, 2**64 - 1)
    ),
    Case("header: claims the whole file", content(lambda w: struct.pack("<Q", len(w) - 8) + w[8:]), BROKEN),
    Case("header: not JSON", content(lambda whole: whole[:8] + b"[" + whole[9:]), BROKEN),
    Case("header: a list", raw_header(b"[]"), BROKEN),
    Case("header: empty", raw_header(b"{}"), "Missing: model.layers.0"),
    Case("header: not UTF-8", raw_header(b'{"\xff\xfe": 1}'), BROKEN),
    Case("header: deep", raw_header(b'{"a":' + b"[" * 900), BROKEN),
    Case("header: 90 MB", raw_header(b"{" + b" " * 90_000_000 + b"}"), BROKEN + "it has 90,000,010 bytes", **ONCE),
    Case("header: 100,000 tensors", many_tensors, BROKEN + "it has .* bytes, the tensors of the", **ONCE),
    Case("header: hostile metadata", header(lambda h: h.update(__metadata__={"format": 1})), BROKEN),
    *(
        Case(f"header: dtype {dtype}", entry(dtype=dtype), BROKEN)
        for dtype in ("F64", "F16", "BOOL", "F8_E4M3", "I64", "F7", "object", "", "../../x")
    ),
    Case("header: dtype I32", entry(dtype="I32"), rf"{Q}\.S: the file has dtype I32, expected \['F32'\]"),
    Case("header: dtype a number", entry(dtype=32), BROKEN),
    Case("header: shape 10^18", entry(shape=[10**9, 10**9]), BROKEN),
    Case("header: shape 2^63", entry(shape=[2**63]), BROKEN),
    Case("header: shape negative", entry(shape=[-1]), BROKEN),
    Case("header: shape text", entry(shape="24"), BROKEN),
    Case("header: shape empty", entry(shape=[0]), BROKEN),
    Case("header: no shape", header(lambda h: h[f"{Q}.S"].pop("shape")), BROKEN),
    Case("header: offsets beyond the file", entry(data_offsets=[10**6, 10**6 + 20]), BROKEN),
    Case("header: offsets huge", entry(data_offsets=[2**63, 2**64 - 1]), BROKEN),
    Case("header: offsets backwards", header(lambda h: h[f"{Q}.S"]["data_offsets"].reverse()), BROKEN),
    Case("header: offsets negative", entry(data_offsets=[-8, 0]), BROKEN),
    Case("header: offsets overlap", overlap, BROKEN),
    Case("header: a gap", gap, BROKEN),
    # -- its tensors --
    Case("tensor: missing", tensors(lambda t: t.pop(f"{Q}.S")), rf"Missing: {Q}\.S"),
    Case("tensor: all missing", tensors(lambda t: t.clear() or t.update(x=torch.ones(1))), "Missing: .*unexpected: x"),
    Case("tensor: extra", tensors(lambda t: t.update(extra=torch.ones(1))), "unexpected: extra"),
    Case(
        "tensor: the base's weight", tensors(lambda t: t.update({f"{Q}.weight": torch.ones(9)})), "unexpected: model"
    ),
    Case("tensor: control characters", tensors(lambda t: t.update({"\x1b[2J\n": torch.ones(1)})), "unexpected: .x1b"),
    Case("tensor: path in the name", tensors(lambda t: t.update({"../../x": torch.ones(1)})), r"unexpected: \.\./"),
    Case("tensor: long name", tensors(lambda t: t.update({"x" * 900: torch.ones(1)})), "unexpected: xxx"),
    Case("tensor: shorter", tensor(lambda t: t[..., :-1]), rf"{Q}\.S: the tensor has the shape"),
    Case("tensor: more dimensions", tensor(lambda t: t[None]), rf"{Q}\.S: the tensor has the shape \(1, "),
    Case("tensor: a scalar", tensor(lambda t: torch.tensor(1.0)), rf"{Q}\.S: the tensor has the shape \(\)"),
    Case("tensor: empty", tensor(lambda t: t[:0]), rf"{Q}\.S: the tensor is empty"),
    Case("tensor: NaN", tensor(lambda t: t * torch.nan), rf"{Q}\.S: the tensor has NaN or infinite"),
    Case("tensor: one infinite", tensor(lambda t: t / (t != t.flatten()[0])), rf"{Q}\.S: .*NaN or infinite"),
    *(
        Case(f"tensor: {dtype}", tensor(lambda t, dtype=dtype: t.to(dtype)), rf"{Q}\.S: the file has dtype {name}, ex")
        for dtype, name in (
            *((torch.float16, "F16"), (torch.bfloat16, "BF16"), (torch.float64, "F64"), (torch.bool, "BOOL")),
            *((torch.int8, "I8"), (torch.int64, "I64"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.complex64, "C64")),
        )
    ),
    Case("tensor: U turned round", tensor(lambda t: t.t(), f"{Q}.U"), rf"{Q}\.U: the tensor has the shape", SARA),
    Case("heads: 10^12", arguments(num_heads=10**12), "claims num_heads=1000000000000", MO_SARA),
    Case("heads: 10^8, and a file that has them", many_heads, "claims num_heads=100000000", MO_SARA),
    # -- seeds --
    Case(
        "seed: missing",
        config(lambda c: c["sites"][0].pop("sha256")),
        "'sha256' is missing in the record of site 0",
        MO_SARA,
    ),
    Case("seed: another weight", site(sha256="0" * 64), "this base's weight is not the one.*SHA-256", MO_SARA),
    Case("seed: sha256 short", site(sha256="0" * 63), f"{Q}: its sha256 '0+' is not a SHA-256", MO_SARA),
    Case("seed: sha256 not text", site(sha256=7), "sha256=7.* not of the type str", MO_SARA),
    Case("seed: sha256 a path", site(sha256="../../../../x"), "its sha256 '../../../../x' is not a SHA", MO_SARA),
    Case("seed: dtype", site(dtype="os.system"), "a weight cannot have the dtype 'os.system'", MO_SARA),
    Case("seed: dtype and weight", site(dtype="float64", sha256="0" * 64), "trained on a float64 base, this", MO_SARA),
    Case("seed: sketch not base64", site(sketch="%" * 44), "its sketch '%+' is not 32 bytes in base64", MO_SARA),
    Case("seed: sketch short", site(sketch=sketch(*[1.0] * 7)), "is not 32 bytes in base64", MO_SARA),
    Case("seed: sketch long", site(sketch=sketch(*[1.0] * 10**5)), "is not 32 bytes in base64", MO_SARA),
    Case("seed: sketch NaN", site(sketch=sketch(*[float("nan")] * 8)), "sketch has NaN or infinite", MO_SARA),
    Case("seed: another sketch", site(sketch=sketch(*[1.0] * 8)), "singular vectors computed here are not", MO_SARA),
    Case("seed: swapped", swap_seeds, "this base's weight is not the one", MO_SARA),
    *(
        Case(f"seed: clusters {clusters}", site(clusters=clusters), "clusters.* not ranges of its vectors", MO_SARA)
        for clusters in ([[3, 2]], [[0, 25]], [[-1, 2]], [[0, 4], [2, 6]], [[0, 1, 2]], [[]], [[2, 3]], [[0, 10**30]])
    ),
    Case("seed: clusters with fractions", site(clusters=[[0.5, 2]]), "clusters=.* not of the type list", MO_SARA),
    Case("seed: clusters not a list", site(clusters=5), "clusters=5.* not of the type list", MO_SARA),
    # -- saved factors --
    Case("factors: missing", instead(FACTORS_FILE, lambda path: None), f"{FACTORS_FILE} is missing", FACTORS),
    Case("factors: a pipe", instead(FACTORS_FILE, os.mkfifo), f"{FACTORS_FILE} is missing", FACTORS),
    Case("factors: a pickle", pickled(FACTORS_FILE, FACTORS_FILE), f"{FACTORS_FILE} is damaged", FACTORS),
    Case("factors: a terabyte", lambda f: os.truncate(f / FACTORS_FILE, 2**40), f"{FACTORS_FILE} is damaged", FACTORS),
    Case("factors: NaN", tensor(lambda t: t * torch.nan, f"{Q}.U", FACTORS_FILE), rf"{Q}\.U: .*NaN", FACTORS),
    Case("factors: shorter", tensor(lambda t: t[:-1], f"{Q}.U", FACTORS_FILE), rf"{Q}\.U: .* shape \(23, ", FACTORS),
    Case("factors: integers", tensor(lambda t: t.int(), f"{Q}.U", FACTORS_FILE), "has dtype I32", FACTORS),
    Case("factors: extra", tensors(lambda t: t.update(x=torch.ones(1)), FACTORS_FILE), "unexpected: x", FACTORS),
    Case("factors: exchanged", exchange_factors, f"{FACTORS_FILE} is damaged: its SHA", FACTORS),
    Case("factors: no digest", config(lambda c: c.pop("factors_sha256")), "it has to have factors_sha256 if", FACTORS),
    Case("factors: promised", arguments(factors="save"), "it has to have factors_sha256 if", MO_SARA),
    Case("factors: of SARA", config(lambda c: c.update(factors_sha256="0" * 64)), "has to have factors_sha256", SARA),
]


# ---- what holds for each ----


@contextmanager
def bounded(seconds: float = 20.0, room: int = 2**29):
    """A limit on time and on memory: beyond it an allocation fails, with an error that no test expects."""

    def late(*_):
        raise TimeoutError(f"It took more than {seconds} s.")

    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else None
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    if pages is not None:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


class Watch:
    """What Python does meanwhile that no adapter may bring about: write, start a process, connect, or unpickle."""

    EVENTS = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "socket.connect")
    EVENTS += ("pickle.find_class", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink")

    def __init__(self):
        self.seen: list[str] | None = None
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple) -> None:
        if self.seen is None:
            return
        if event == "open" and args[2] and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self.seen.append(f"open {args[0]}")
        elif event in self.EVENTS:
            self.seen.append(f"{event} {args}")

    @contextmanager
    def nothing_happens(self):
        self.seen = []
        try:
            yield
        finally:
            seen, self.seen = self.seen, None
        assert not seen


@pytest.fixture(scope="module")
def watch():
    return Watch()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A cache of the Hub with the base, and with a base that wants to run code of its own."""
    folder = tmp_path_factory.mktemp("hub")
    for name in ("base", "remote"):
        snapshot = folder / f"models--someone--{name}" / "snapshots" / COMMIT
        make_model().save_pretrained(snapshot)
        (folder / f"models--someone--{name}" / "refs").mkdir()
        (folder / f"models--someone--{name}" / "refs" / "main").write_text(COMMIT)
    found = json.loads((snapshot / "config.json").read_text())
    found["auto_map"] = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilForCausalLM"}
    (snapshot / "config.json").write_text(json.dumps(found))
    (snapshot / "evil.py").write_text(f"import os\nos.mkdir({str(folder / 'marker')!r})\n")
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Trained adapters to damage: one of each method, and one with saved factors."""
    folder = tmp_path_factory.mktemp("good")
    for name, changes in {"sara": {}, "mo_sara": {}, "factors": {"factors": "save"}}.items():
        model = make_model()
        model.config._name_or_path, model.config._commit_hash = BASE, COMMIT
        attach_trained(model, "sara" if name == "sara" else "mo_sara", **changes).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def model():
    return make_model()


def describe(model) -> tuple:
    """All that attaching would change."""
    modules = {name: (vars(module).keys(), len(module._forward_hooks)) for name, module in model.named_modules()}
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return dict(vars(model)), modules, trainable


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.fixture
def loaders(model, hub):
    """The ways to load an adapter: onto a model, and together with the base that it names."""
    return {
        "load": lambda folder: SaraAdapter.load(model, folder),
        "from_hub": lambda folder: from_hub(folder, cache_dir=hub),
    }


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def test_the_undamaged_adapters_load(good, loaders):
    # Which also imports and computes, once, what the other tests then do not.
    for kind in ("sara", "mo_sara", "factors"):
        loaders["load"](good / kind).detach()
        loaders["from_hub"](good / kind)


@pytest.mark.parametrize(
    ("case", "kind"), [pytest.param(case, kind, id=f"{kind}-{case.name}") for case in CASES for kind in case.kinds]
)
def test_a_hostile_adapter_is_refused(case, kind, good, hub, loaders, model, watch, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(good / kind, folder)
    case.damage(folder)
    before, files = describe(model), listing(tmp_path)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in case.loaders:
        with watch.nothing_happens(), bounded(), pytest.raises((AdapterError, FileNotFoundError)) as caught:
            loaders[name](folder)
        error = str(caught.value)
        assert re.search(case.message, error), error
        assert type(caught.value) in (AdapterError, FileNotFoundError)
        assert len(error) < 2500
        assert error.isprintable() or type(caught.value) is FileNotFoundError
        assert SECRET not in error
        assert describe(model) == before
        assert same_bits(dict(model.state_dict()), weights)
    assert listing(tmp_path) == files
    assert not (tmp_path / "marker").exists()
    assert not (hub / "marker").exists()


def test_what_lies_beside_an_adapter_is_never_opened(good, hub, loaders, model, watch, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(good / "sara", folder)
    for name in ("training_args.bin", "pytorch_model.bin", "optimizer.pt", "rng_state.pth", "adapter_model.bin"):
        pickled(name)(folder)
    code = f"import os\nos.mkdir({str(tmp_path / 'marker')!r})\n"
    for name in ("__init__.py", "sitecustomize.py", "conftest.py", "evil.py", "modeling_llama.py", "setup.py"):
        (folder / name).write_text(code)
    (folder / "README.md").write_text(
        f"---\ntags: !!python/object/apply:os.mkdir ['{tmp_path}/marker']\n---\n<script>"
    )
    hostile = {"auto_map": {"AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}}
    for name in ("config.json", "tokenizer_config.json", "adapter_config.json", "generation_config.json"):
        (folder / name).write_text(json.dumps(hostile))
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    (folder / "tokenizer.json").write_text(nested(10**5, "[", "]"))
    os.mkfifo(folder / PENDING_CONFIG_FILE)
    files = listing(tmp_path)
    with watch.nothing_happens(), bounded():
        adapter = loaders["load"](folder)
        loaded = loaders["from_hub"](folder)
    assert torch.equal(logits(loaded), logits(model))
    adapter.detach()
    assert listing(tmp_path) == files


def test_code_beside_the_base_is_not_run(good, hub, loaders, watch, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(good / "sara", folder)
    base(model_id="someone/remote")(folder)
    with watch.nothing_happens():
        assert type(loaders["from_hub"](folder)).__module__.startswith("transformers.")
    assert not (hub / "marker").exists()


def test_the_table_has_sixty_cases_and_more():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert len(names) >= 60
