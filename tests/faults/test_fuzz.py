"""
Adapters that chance made. Each is read or refused as fuzz_adapter.py says, in bounded time and memory, and nothing in
it is executed.
"""

import contextlib
import hashlib
import io
import json
import logging
import pickle
import random
import struct
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from fuzz_adapter import BETWEEN, REFUSALS, corpus, read_adapter, tensors_of
from safetensors.torch import load, save
from test_hostile import Payload, bounded, joined, nested, split

from hf_sara.storage import CONFIG_KEY
from hf_sara.tensor_files import tensors_digest

logger = logging.getLogger(__name__)
pytestmark = pytest.mark.slow
SECONDS = 60
ODD = [None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 2**64, 10**30, -(2**63), 0.5, -0.0, 1e308, 1e-320]
ODD += [float("nan"), float("inf"), "", "x", "0", "../../x", "/dev/zero", "a\nb", "\0", "\ud800", "é" * 1000, "0" * 64]
ODD += [
    [],
    {},
    [[]],
    [None],
    [0],
    [-1],
    {"": 0},
    {"a": {"b": []}},
    [1, 2, 3],
    ["x", "x"],
    list(range(1000)),
    "9" * 5000,
]
ODD += ["float16", "float64", "sara", "mo_sara", "F32", "BF16", "model.norm", "model.layers.0", "lm_head"]


class Mutant(NamedTuple):
    """
    A changed adapter.

    Args:
        data (`bytes`): See `fuzz_adapter.read_adapter`.
        is_signed (`bool`): Whether the digests were made to fit to what was changed.
    """

    data: bytes
    is_signed: bool


class Maker:
    """Makes mutants of a corpus. The same seed makes the same ones."""

    def __init__(self, seed: int, adapters: dict[str, bytes], folder: Path):
        self.chance = random.Random(seed)
        self.adapters = list(adapters.values())
        self.folder = folder
        self.ways = (self.flip, self.change_data, self.cut, self.splice, self.change_header)
        self.signed_ways = (self.change_config, self.change_tensors)

    def make(self) -> Mutant:
        """The next mutant: one change most often, at times up to four."""
        pieces = self.chance.choice(self.adapters).split(BETWEEN)
        if self.chance.random() < 0.08:
            return Mutant(self.with_pickle(pieces), False)
        is_signed = self.chance.random() < 0.65
        for _ in range(self.chance.choice((1, 1, 1, 2, 4))):
            if is_signed and self.chance.random() < 0.9:
                # What an earlier change broke cannot be changed in such a way any more.
                with contextlib.suppress(Exception):
                    pieces = self.chance.choice(self.signed_ways)(pieces)
            else:
                number = self.chance.randrange(len(pieces))
                pieces[number] = self.chance.choice(self.ways)(pieces[number])
        if is_signed:
            with contextlib.suppress(Exception):
                pieces = self.sign(pieces)
        return Mutant(BETWEEN.join(pieces), is_signed)

    # ---- changes of one file ----

    def flip(self, data: bytes, start: int = 0) -> bytes:
        """Flip a few bits."""
        changed = bytearray(data)
        for _ in range(self.chance.choice((1, 1, 2, 8)) if len(data) > start else 0):
            changed[self.chance.randrange(start, len(data))] ^= 1 << self.chance.randrange(8)
        return bytes(changed)

    def change_data(self, data: bytes) -> bytes:
        """Flip bits of the numbers, behind the header."""
        start = 8 + struct.unpack("<Q", data[:8].ljust(8, b"\0"))[0]
        return self.flip(data, start if start < len(data) else 0)

    def cut(self, data: bytes) -> bytes:
        """Leave out the end, or a part, or add to it."""
        at, count = self.chance.randrange(len(data) + 1), self.chance.choice((1, 4, 8, 100))
        more = self.chance.randbytes(count)
        return self.chance.choice(
            (data[:at], data[:at] + data[at + count :], data + more, data[:at] + more + data[at:])
        )

    def splice(self, data: bytes) -> bytes:
        """Put a part of another adapter in."""
        other = self.chance.choice(self.adapters)
        start, at, count = (self.chance.randrange(size + 1) for size in (len(other), len(data), 2000))
        part = other[start : start + count]
        return data[:at] + part + data[at + (len(part) if self.chance.random() < 0.5 else 0) :]

    def change_header(self, data: bytes) -> bytes:
        """Change what the header says of the tensors."""
        with contextlib.suppress(Exception):
            header, numbers = split(data)
            self.change_json(header)
            return joined(header, numbers)
        # An earlier change left no header.
        return self.flip(data)

    def with_pickle(self, pieces: list[bytes]) -> bytes:
        """A pickle with a payload in the place of a file, as torch writes it or plain."""
        payload = Payload(self.folder)
        archive = io.BytesIO()
        torch.save({"state": payload}, archive)
        found = self.chance.choice((pickle.dumps(payload), pickle.dumps(payload, 0), archive.getvalue()))
        if self.chance.random() < 0.3:
            # As the header of a tensor file.
            found = struct.pack("<Q", len(found)) + found
        pieces[self.chance.randrange(len(pieces))] = found
        return BETWEEN.join(pieces)

    # ---- changes for which the digests are made anew ----

    def change_config(self, pieces: list[bytes]) -> list[bytes]:
        """Replace fields of the config by odd values."""
        config = self.config(pieces)
        self.change_json(config)
        return self.with_config(pieces, config)

    def change_tensors(self, pieces: list[bytes]) -> list[bytes]:
        """Replace tensors by odd ones."""
        number = self.chance.choice([number for number in range(len(pieces)) if number != 1])
        header, _ = split(pieces[number])
        tensors = load(pieces[number])
        name = self.chance.choice(list(tensors))
        old = tensors[name]
        odd = (
            old * self.chance.choice((0, -1, 1e30, 1e-30, float("nan"), float("inf"))),
            old.double(),
            old.half(),
            old.long(),
            old[:-1] if old.dim() else old,
            old[None],
            old.flatten(),
            old.t() if old.dim() == 2 else old.flip(0) if old.dim() else old,
            torch.zeros(0),
            torch.zeros(3, 0),
        )
        tensors[name] = self.chance.choice(odd).contiguous()
        if self.chance.random() < 0.2:
            tensors[f"{name}{self.chance.choice(('', 'x', '.S', '.U'))}"] = tensors.pop(name)
        return [*pieces[:number], save(tensors, header.get("__metadata__")), *pieces[number + 1 :]]

    def sign(self, pieces: list[bytes]) -> list[bytes]:
        """Write the digests of the tensors into the config."""
        config = self.config(pieces)
        if len(pieces) > 1:
            digests = [hashlib.sha256(piece).hexdigest() for piece in (pieces[0], *pieces[2:])]
            config.update(zip(("tensors_sha256", "factors_sha256"), digests, strict=False))
        else:
            tensors = load(pieces[0])
            has_factors = "factors_sha256" in config
            factors = {name: t for name, t in tensors.items() if has_factors and name.endswith((".U", ".Vh"))}
            config["tensors_sha256"] = tensors_digest({n: t for n, t in tensors.items() if n not in factors})
            if has_factors:
                config["factors_sha256"] = tensors_digest(factors)
        return self.with_config(pieces, config)

    def config(self, pieces: list[bytes]) -> dict:
        return json.loads(pieces[1] if len(pieces) > 1 else split(pieces[0])[0]["__metadata__"][CONFIG_KEY])

    def with_config(self, pieces: list[bytes], config: dict) -> list[bytes]:
        text = json.dumps(config)
        if self.chance.random() < 0.02:
            text = text.replace("{", nested(10**5, "[", "]"), 1)
        if len(pieces) > 1:
            return [pieces[0], text.encode(), *pieces[2:]]
        header, numbers = split(pieces[0])
        header["__metadata__"][CONFIG_KEY] = text
        return [joined(header, numbers)]

    def change_json(self, value: dict) -> None:
        """Change something at a place of an object, however deep it lies."""
        places: list[tuple] = []
        inside: list = [value]
        while inside:
            found = inside.pop()
            keys = list(found) if isinstance(found, dict) else range(len(found))
            places += [(found, key) for key in keys]
            inside += [found[key] for key in keys if isinstance(found[key], (dict, list))]
        place, key = self.chance.choice(places)
        other, other_key = self.chance.choice(places)
        old = place[key]
        way = self.chance.randrange(7)
        if way == 0:
            del place[key]
        elif way == 1 and isinstance(place, dict):
            place[self.chance.choice((f"{key}x", "", "name", "k"))] = place.pop(key)
        elif way == 2 and isinstance(place, list):
            place.append(old)
        elif way == 3:
            place[key] = json.loads(json.dumps(other[other_key]))
        elif way == 4 and isinstance(old, (int, float)):
            place[key] = old + self.chance.choice((-1, 1, 4, 0.5, 2**32))
        else:
            place[key] = self.chance.choice(ODD)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("corpus"))


class Judge:
    """Reads mutants, and counts what must not happen."""

    def __init__(self, adapters: dict[str, bytes], folder: Path):
        self.folder = folder
        self.marker = folder.parent / "marker"
        self.counts: Counter[str] = Counter()
        self.complaints: list[str] = []
        self.known = set()
        for data in adapters.values():
            read_adapter(data, folder)
            self.known.add(tensors_digest(tensors_of(folder)))

    def __call__(self, number: int, mutant: Mutant) -> None:
        self.counts["tried"] += 1
        try:
            with bounded(10, 500 * 10**6):
                read_adapter(mutant.data, self.folder)
            if not mutant.is_signed and tensors_digest(tensors_of(self.folder)) not in self.known:
                raise AssertionError("Other numbers loaded, and the digest is that of the old ones.")
            self.counts["loaded"] += 1
        except REFUSALS as error:
            self.counts["refused"] += 1
            if len(str(error)) > 2500:
                self.complain("wrong", number, error)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            self.complain("wrong", number, error)
        if self.marker.exists():
            self.marker.rmdir()
            self.complain("executed", number, "The payload of a pickle ran.")

    def complain(self, outcome: str, number: int, error: object) -> None:
        self.counts[outcome] += 1
        self.complaints.append(f"{number}: {outcome}: {error!r}"[:500])

    def report(self, what: str, tried) -> None:
        logger.warning("%s %s", dict(self.counts), "\n".join(self.complaints[:20]))
        tried(what, self.counts["tried"], wrong=self.counts["wrong"], executed=self.counts["executed"])
        # Most are refused, but not all: what is changed in names and versions, for example, has no digest.
        assert self.counts["loaded"] > self.counts["tried"] // 200
        assert self.counts["refused"] > self.counts["tried"] // 2


def test_a_thousand_fuzzed_adapters(adapters, tmp_path, tried):
    maker, judge = Maker(2026, adapters, tmp_path / "adapter"), Judge(adapters, tmp_path / "adapter")
    for number in range(1000):
        judge(number, maker.make())
    judge.report("a fuzzed adapter", tried)


@pytest.mark.long
def test_a_minute_of_fuzzing(adapters, tmp_path, tried):
    maker, judge = Maker(60, adapters, tmp_path / "adapter"), Judge(adapters, tmp_path / "adapter")
    end = time.monotonic() + SECONDS
    number = 0
    while time.monotonic() < end:
        judge(number, maker.make())
        number += 1
    judge.report(f"a fuzzed adapter, in {SECONDS} seconds", tried)
