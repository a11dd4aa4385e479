"""The files, commits and repositories of the Hub of the tests (hub_server.py), and the metadata of model cards."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import yaml


class HubError(Exception):
    """An answer that is an error. Its headers and its body say so where the client looks for it."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str):
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": " ".join(message.split()), **headers}
        if code:
            self.headers["X-Error-Code"] = code


def git_hash(kind: str, content: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()


@dataclass(frozen=True)
class File:
    content: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """The text that Git stores for a file whose content is in LFS."""
        head = "version https://git-lfs.github.com/spec/v1"
        return f"{head}\noid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()

    @cached_property
    def blob_id(self) -> str:
        return git_hash("blob", self.pointer if self.lfs else self.content)

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob_id

    def entry(self, path: str) -> dict:
        """The file as a listing shows it."""
        entry = {"type": "file", "path": path, "size": len(self.content), "oid": self.blob_id}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}
        return entry


@dataclass(frozen=True)
class Commit:
    files: Mapping[str, File]  # never changed, because a commit is made as a whole
    parent: Commit | None
    title: str
    message: str
    author: str
    date: str

    @cached_property
    def sha(self) -> str:
        parent = self.parent.sha if self.parent else ""
        text = [self.tree_id(""), parent, self.author, self.date, self.title, self.message]
        return git_hash("commit", "\n".join(text).encode())

    def tree_id(self, folder: str) -> str:
        inside = sorted((path, file.blob_id) for path, file in self.files.items() if path.startswith(folder))
        return git_hash("tree", json.dumps(inside).encode())

    def entry(self, path: str) -> dict | None:
        """A file or a folder, as listings show it."""
        if path in self.files:
            return self.files[path].entry(path)
        if any(name.startswith(f"{path}/") for name in self.files):
            return {"type": "directory", "path": path, "size": 0, "oid": self.tree_id(f"{path}/")}
        return None

    def last_change(self, path: str) -> Commit:
        """The newest commit that changed a path."""
        commit, entry = self, self.entry(path)
        while commit.parent and commit.parent.entry(path) == entry:
            commit = commit.parent
        return commit


class Repo:
    """Commits, and the references to them by full names: refs/heads/main, refs/tags/v1, refs/pr/1."""

    def __init__(self, id: str, private: bool = False, gated: bool = False):
        self.id, self.private, self.gated = id, private, gated
        self.objects: dict[str, Commit] = {}
        self.refs: dict[str, str] = {}
        self.lfs: dict[str, bytes] = {}  # what has been uploaded, whether or not a commit names it yet

    def find(self, revision: str) -> Commit:
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in self.refs:
                return self.objects[self.refs[name]]
        found = [sha for sha in self.objects if len(revision) >= 7 and sha.startswith(revision)]
        if len(found) != 1:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.objects[found[0]]

    def add(self, ref: str, files: Mapping[str, File], parent: Commit | None, title: str, message: str, author: str):
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        commit = Commit(dict(sorted(files.items())), parent, title, message, author, now)
        self.objects[commit.sha] = commit
        self.refs[ref] = commit.sha
        return commit

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """The content of every file. As on the real Hub, the first commit of a repository adds .gitattributes."""
        return {path: file.content for path, file in self.find(revision).files.items()}

    def history(self, revision: str = "main") -> list[Commit]:
        """The commits, the newest one first."""
        commit: Commit | None = self.find(revision)
        commits = []
        while commit:
            commits.append(commit)
            commit = commit.parent
        return commits

    @property
    def commits(self) -> list[Commit]:
        return self.history()


# Model cards.

LICENSES = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0
cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0
creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2
fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community h-research intel-research isc lgpl
lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by
ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib
"""
LICENSES = frozenset(LICENSES.split())
FRONT_MATTER = re.compile(r"\A\s*---\r?\n(.*?)(?:\r?\n)?^---[ \t]*$", re.DOTALL | re.MULTILINE)
MODEL_ID = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9]([\w.-]*\w)?(/[A-Za-z0-9_]([\w.-]*\w)?)?")  # with or without owner


class _Loader(yaml.SafeLoader):
    """The YAML 1.2 of the Hub, where `no` is a language and not False."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in found if not tag.endswith(":bool") or first in "tTfF"]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def validate_card(text: str) -> tuple[dict, list[str], list[str]]:
    """The metadata of a model card, the errors that make the Hub refuse it, and its warnings."""
    block = FRONT_MATTER.match(text)
    if block is None or not block[1].strip():
        return {}, [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.load(block[1], _Loader)
    except yaml.YAMLError as error:
        return {}, [f"YAML metadata: {' '.join(str(error).split())}"], []
    if not isinstance(data, dict):
        return {}, ["YAML metadata must be a mapping"], []
    errors = model_index_errors(data["model-index"]) if "model-index" in data else []

    def check(holds: Any, message: str) -> None:
        if not holds:
            errors.append(message)

    def strings(key: str, only_list: bool = False) -> list[str]:
        value = data.get(key, [])
        values = value if isinstance(value, list) else [value]
        if (only_list and values is not value) or not all(isinstance(item, str) for item in values):
            errors.append(f'"{key}" must be {"" if only_list else "a string or "}an array of strings')
            return []
        return values

    for value in strings("license"):
        check(value in LICENSES, f'"license" must be one of [{", ".join(sorted(LICENSES))}]')
    for value in strings("language"):
        known = re.fullmatch("[a-z]{2,3}|code|multilingual", value)
        check(known, f'"language" with value "{value}" is not valid. It must be an ISO 639 code.')
    for key, kind in (("base_model", "model"), ("datasets", "dataset")):
        for value in strings(key):
            valid = MODEL_ID.fullmatch(value)
            check(valid, f'"{key}" with value "{value}" is not valid. Use a {kind} id of the Hub.')
    strings("tags", only_list=True)
    strings("metrics", only_list=True)
    for key in ("pipeline_tag", "library_name", "license_name", "license_link"):
        check(isinstance(data.get(key, ""), str), f'"{key}" must be a string')
    relation = data.get("base_model_relation", "adapter")
    check(relation in ("adapter", "merge", "quantized", "finetune"), '"base_model_relation" is not a known relation')
    return data, errors, []


def model_index_errors(index: Any) -> list[str]:
    """Errors for everything that is missing in the results that a card reports."""
    errors: list[str] = []

    def objects(value: Any, name: str) -> list[tuple[str, dict]]:
        if not isinstance(value, list):
            errors.append(f'"{name}" must be an array')
            return []
        found = [(f"{name}[{position}]", item) for position, item in enumerate(value)]
        errors.extend(f'"{at}" must be an object' for at, item in found if not isinstance(item, dict))
        return [(at, item) for at, item in found if isinstance(item, dict)]

    def require(value: Any, name: str, *keys: str) -> None:
        value = value if isinstance(value, dict) else {}
        errors.extend(f'"{name}.{key}" is required' for key in keys if value.get(key) in (None, ""))

    for model_at, model in objects(index, "model-index"):
        require(model, model_at, "name")
        for at, result in objects(model.get("results"), f"{model_at}.results"):
            require(result.get("task"), f"{at}.task", "type")
            require(result.get("dataset"), f"{at}.dataset", "type", "name")
            for metric_at, metric in objects(result.get("metrics"), f"{at}.metrics"):
                require(metric, metric_at, "type", "value")
    return errors


def card_tags(data: dict, files: Collection[str]) -> list[str]:
    """The tags that the Hub derives from a card's metadata."""

    def listed(key: str) -> list[str]:
        value = data.get(key) or []
        return [str(item) for item in (value if isinstance(value, list) else [value])]

    tags = [data[key] for key in ("library_name", "pipeline_tag") if data.get(key)]
    tags += ["safetensors"] if any(path.endswith(".safetensors") for path in files) else []
    tags += listed("tags") + listed("language")
    tags += [f"dataset:{value}" for value in listed("datasets")] + [f"license:{value}" for value in listed("license")]
    for base in listed("base_model"):
        relation = data.get("base_model_relation")
        tags += [f"base_model:{base}"] + ([f"base_model:{relation}:{base}"] if relation else [])
    return list(dict.fromkeys([*tags, "region:us"]))
