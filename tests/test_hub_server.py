"""The Hub of the tests, used by the real client: what the other tests conclude from it is worth no more than this."""

import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import make_model
from hub_server import Fault, HubServer, online
from hub_storage import validate_card
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

ALICE, BOB, OLD, READER = "hf_alice", "hf_bob", "hf_old", "hf_reader"
TOKENS = {ALICE: "alice", BOB: "bob", READER: "alice"}
WEIGHTS = bytes(range(256)) * 400


@pytest.fixture
def hub():
    # online(), which says why, undoes for a while what conftest.py does to the client.
    with online(), HubServer(tokens=TOKENS, expired=[OLD], read_only=[READER], orgs={"team": ["alice"]}) as server:
        yield server


@pytest.fixture
def api(hub) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=ALICE)


@pytest.fixture
def no_wait(monkeypatch):
    """The client's waits before it tries again, without the waiting."""
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


def run(hub, cache, code, token=None, **changes):
    """Python code in a process whose Hub this is."""
    environment = {**hub.environment(cache, token), **changes}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


def made(hub, method="", path=""):
    return [r for r in hub.requests if method in r.method and path in r.path]


# Repositories.


def test_create_repo(hub, api):
    url = api.create_repo("alice/x", private=True)
    assert (url.repo_id, url.endpoint, str(url)) == ("alice/x", hub.endpoint, f"{hub.endpoint}/alice/x")
    assert hub.repo("alice/x").private
    assert api.create_repo("alice/x", exist_ok=True) == url
    with pytest.raises(HfHubHTTPError, match="already created") as error:
        api.create_repo("alice/x")
    assert error.value.response.status_code == 409
    assert api.create_repo("short").repo_id == "alice/short"
    assert api.create_repo("team/x").repo_id == "team/x"
    with pytest.raises(HfHubHTTPError, match="don't have the rights"):
        api.create_repo("bob/x")
    with pytest.raises(HfHubHTTPError, match="Invalid username or password"):
        api.create_repo("alice/y", token=False)
    api.delete_repo("alice/x")
    assert not api.repo_exists("alice/x")
    api.delete_repo("alice/x", missing_ok=True)


def test_whoami(api):
    user = api.whoami()
    assert (user["name"], user["orgs"][0]["name"]) == ("alice", "team")
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami(token="hf_wrong")


def test_private_repos(hub, api, tmp_path):
    hub.add_repo("alice/secret", files={"config.json": b"{}"}, private=True)
    assert api.model_info("alice/secret").private
    assert api.hf_hub_download("alice/secret", "config.json", cache_dir=tmp_path)
    for token, status in ((BOB, 404), (False, 401)):
        for call in (api.model_info, api.list_repo_refs, api.list_repo_files):
            with pytest.raises(RepositoryNotFoundError) as error:
                call("alice/secret", token=token)
            assert error.value.response.status_code == status
        with pytest.raises(RepositoryNotFoundError):
            api.hf_hub_download("alice/secret", "config.json", token=token, cache_dir=tmp_path / "other")
        with pytest.raises(RepositoryNotFoundError):
            api.model_info("alice/missing", token=token)
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        api.model_info("alice/secret", token="hf_wrong")
    with pytest.raises(RepositoryNotFoundError, match="is expired"):
        api.model_info("alice/secret", token=OLD)
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami(token=OLD)


@pytest.mark.parametrize("token", [False, BOB, READER])
def test_writing_needs_the_right(hub, api, token):
    hub.add_repo("alice/x")
    with pytest.raises(HfHubHTTPError) as error:
        api.upload_file(path_or_fileobj=b"1", path_in_repo="a.txt", repo_id="alice/x", token=token)
    assert error.value.response.status_code == (403 if token else 401)
    with pytest.raises(HfHubHTTPError):
        api.create_branch("alice/x", branch="b", token=token)
    with pytest.raises(HfHubHTTPError):
        api.delete_repo("alice/x", token=token)
    assert len(hub.repo("alice/x").commits) == 1
    assert not hub.uploaded()


def test_gated_repos(hub, api, tmp_path):
    hub.add_repo("alice/gated", files={"config.json": b"{}"}, gated=True)
    assert api.model_info("alice/gated", token=BOB).gated == "manual"
    for token in (BOB, False):
        with pytest.raises(GatedRepoError):
            api.hf_hub_download("alice/gated", "config.json", token=token, cache_dir=tmp_path)
    assert api.hf_hub_download("alice/gated", "config.json", cache_dir=tmp_path)
    api.auth_check("alice/gated", write=True)
    with pytest.raises(GatedRepoError):
        api.auth_check("alice/gated", token=BOB)


# Uploads.


def test_upload_file_and_folder(hub, api, tmp_path):
    api.create_repo("alice/x")
    first = api.upload_file(path_or_fileobj=b"one", path_in_repo="a/b.txt", repo_id="alice/x", commit_message="One")
    assert hub.repo("alice/x").files()["a/b.txt"] == b"one"
    assert (first.oid, first.repo_url.repo_id) == (hub.repo("alice/x").commits[0].sha, "alice/x")
    (tmp_path / "sub").mkdir()
    (tmp_path / "small.json").write_text("{}")
    (tmp_path / "empty.bin").touch()
    (tmp_path / "sub" / "weights.safetensors").write_bytes(WEIGHTS)
    api.upload_folder(folder_path=tmp_path, repo_id="alice/x", commit_message="All", commit_description="Of them")
    repo = hub.repo("alice/x")
    expected = {"small.json": b"{}", "sub/weights.safetensors": WEIGHTS, "a/b.txt": b"one", "empty.bin": b""}
    assert repo.files().items() >= expected.items()
    assert [commit.title for commit in repo.commits] == ["All", "One", "initial commit"]
    assert (repo.commits[0].message, repo.commits[0].author) == ("Of them", "alice")
    assert len(made(hub, "PUT", "/cdn/upload")) == 1
    assert "authorization" not in made(hub, "PUT")[0].headers
    assert set(hub.uploaded().values()) == {b"one", b"{}", b"", WEIGHTS}
    # What the Hub has already is not sent again, and no change is no commit.
    api.upload_folder(folder_path=tmp_path, repo_id="alice/x")
    api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="copy.safetensors", repo_id="alice/x")
    assert len(made(hub, "PUT")) == 1
    assert len(repo.commits) == 4


def test_patterns_and_deletions(hub, api, tmp_path):
    hub.add_repo("alice/x", files={"old.json": b"1", "keep.txt": b"2", "dir/a": b"3", "dir/b": b"4"})
    for name in ("new.json", "other.txt", "ignored.log"):
        (tmp_path / name).write_text(name)
    (tmp_path / ".gitignore").write_text("*.log\n")
    api.upload_folder(
        folder_path=tmp_path,
        repo_id="alice/x",
        allow_patterns=["*.json", "*.log", ".gitignore"],
        delete_patterns="*.json",
    )
    assert set(hub.repo("alice/x").files()) == {
        ".gitattributes",
        ".gitignore",
        "new.json",
        "keep.txt",
        "dir/a",
        "dir/b",
    }
    api.create_commit(
        "alice/x",
        [CommitOperationDelete("dir/"), CommitOperationCopy("keep.txt", "copied.txt")],
        commit_message="Both",
    )
    assert hub.repo("alice/x").files().keys() == {".gitattributes", ".gitignore", "new.json", "keep.txt", "copied.txt"}
    before = hub.repo("alice/x").commits
    operations = [CommitOperationAdd("added.txt", b"5"), CommitOperationDelete("missing.txt")]
    with pytest.raises(EntryNotFoundError):
        api.create_commit("alice/x", operations, commit_message="Refused as a whole")
    assert hub.repo("alice/x").commits == before


def test_large_files_in_parts(hub, api):
    hub.multipart_size, hub.lfs_threshold = 1000, 2000
    api.create_repo("alice/x")
    for name in ("big.safetensors", "big.txt"):
        api.upload_file(path_or_fileobj=name.encode() * 300, path_in_repo=name, repo_id="alice/x")
        assert hub.repo("alice/x").files()[name] == name.encode() * 300
    assert len(made(hub, "PUT")) == 5 + 3
    assert all(request.length <= 1000 for request in made(hub, "PUT"))


def test_pull_requests(hub, api):
    hub.add_repo("alice/x", files={"a.txt": b"1"})
    for number in (1, 2):
        commit = api.upload_file(
            path_or_fileobj=WEIGHTS,
            path_in_repo=f"{number}.bin",
            repo_id="alice/x",
            create_pr=True,
            token=BOB,
        )
        assert (commit.pr_num, commit.pr_revision) == (number, f"refs/pr/{number}")
        assert commit.pr_url == f"{hub.endpoint}/alice/x/discussions/{number}"
    assert set(hub.repo("alice/x").files()) == {".gitattributes", "a.txt"}
    assert hub.repo("alice/x").files("refs/pr/2")["2.bin"] == WEIGHTS
    api.upload_file(path_or_fileobj=b"2", path_in_repo="a.txt", repo_id="alice/x", revision="refs/pr/1")
    assert hub.repo("alice/x").files("refs/pr/1")["a.txt"] == b"2"
    assert "a.txt" in api.list_repo_files("alice/x", revision="refs/pr/1")
    refs = api.list_repo_refs("alice/x", include_pull_requests=True)
    assert [ref.ref for ref in refs.pull_requests] == ["refs/pr/1", "refs/pr/2"]


def test_parent_commit(hub, api):
    base = hub.add_repo("alice/x").commits[0].sha
    upload = {"path_in_repo": "a.txt", "repo_id": "alice/x", "parent_commit": base}
    api.upload_file(path_or_fileobj=b"1", **upload)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
        api.upload_file(path_or_fileobj=b"2", **upload)
    assert error.value.response.status_code == 412
    pull = api.upload_file(path_or_fileobj=b"3", create_pr=True, **upload)
    assert hub.repo("alice/x").history(pull.pr_revision)[1].sha == base


def test_uploads_at_once_all_land(hub, api, tmp_path):
    api.create_repo("alice/x")
    errors = []

    def upload(number):
        try:
            for name, content in (("a.txt", b"%d" % number), ("b.safetensors", WEIGHTS + b"%d" % number)):
                path = f"{number}/{name}"
                api.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id="alice/x", commit_message=path)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=upload, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(hub.repo("alice/x").files()) == 9
    titles = {commit.title for commit in hub.repo("alice/x").commits}
    assert titles == {f"{n}/{name}" for n in range(4) for name in ("a.txt", "b.safetensors")} | {"initial commit"}


RESULT = "model-index: [{name: x, results: [%s]}]"
INVALID = {
    "license: nonsense": '"license" must be one of [afl-3.0,',
    "language: English": '"language" with value "English" is not valid',
    "base_model: /home/me/model": '"base_model" with value "/home/me/model" is not valid',
    "base_model: [alice/base, ../x]": '"base_model" with value "../x" is not valid',
    "base_model: {a: b}": '"base_model" must be a string or an array of strings',
    "tags: one": '"tags" must be an array of strings',
    "datasets: [null]": '"datasets" must be a string or an array of strings',
    "license: [": "YAML metadata: ",
    "- license": "YAML metadata must be a mapping",
    "model-index: wrong": '"model-index" must be an array',
    "model-index: [{name: x}]": '"model-index[0].results" must be an array',
    RESULT % "{dataset: {type: x, name: x}, metrics: []}": '"model-index[0].results[0].task.type" is required',
    RESULT % "{task: {type: x}, metrics: []}": '"model-index[0].results[0].dataset.name" is required',
    RESULT % "{task: {type: x}, dataset: {type: x, name: x}, metrics: [{type: bleu}]}": (
        '"model-index[0].results[0].metrics[0].value" is required'
    ),
}


def test_cards_in_commits(hub, api):
    api.create_repo("alice/x")

    def push(metadata):
        card = f"---\n{metadata}\n---\nText".encode()
        api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="alice/x")

    push("license: mit\nlanguage: [no, code]\nbase_model: alice/base\nmodel-index: []")
    for metadata, message in INVALID.items():
        with pytest.raises(ValueError, match=r"Invalid metadata in README.md") as error:
            push(metadata)
        assert message in str(error.value)
    assert len(hub.repo("alice/x").commits) == 2
    assert not made(hub, "POST", "/preupload")[1:]
    with pytest.warns(UserWarning, match="empty or missing yaml"):
        push("")


# Information.


def test_branches_and_tags(hub, api):
    hub.add_repo("alice/x", files={"a.txt": b"1"})
    api.create_branch("alice/x", branch="dev/one")
    api.create_branch("alice/x", branch="dev/one", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="already exists"):
        api.create_branch("alice/x", branch="dev/one")
    api.upload_file(path_or_fileobj=b"2", path_in_repo="a.txt", repo_id="alice/x", revision="dev/one")
    api.create_tag("alice/x", tag="v1", revision="dev/one")
    api.create_tag("alice/x", tag="v1", exist_ok=True)
    repo = hub.repo("alice/x")
    assert (repo.files()["a.txt"], repo.files("dev/one")["a.txt"], repo.files("v1")["a.txt"]) == (b"1", b"2", b"2")
    refs = api.list_repo_refs("alice/x")
    assert {ref.name: ref.target_commit for ref in refs.branches} == {
        "main": repo.commits[0].sha,
        "dev/one": repo.history("v1")[0].sha,
    }
    assert [(ref.name, ref.ref) for ref in refs.tags] == [("v1", "refs/tags/v1")]
    assert refs.pull_requests is None
    with pytest.raises(BadRequestError, match="Not a branch"):
        api.upload_file(path_or_fileobj=b"3", path_in_repo="a.txt", repo_id="alice/x", revision="v1")
    with pytest.raises(RevisionNotFoundError):
        api.upload_file(path_or_fileobj=b"3", path_in_repo="a.txt", repo_id="alice/x", revision="missing")
    api.delete_branch("alice/x", branch="dev/one")
    api.delete_tag("alice/x", tag="v1")
    assert not api.revision_exists("alice/x", "dev/one")
    assert not api.revision_exists("alice/x", "v1")


CARD = """---
license: mit
language: [en]
library_name: hf_sara
base_model: alice/base
base_model_relation: adapter
tags: [sara]
datasets: [tuetschek/e2e_nlg]
model-index:
- name: x
  results:
  - task: {type: text-generation}
    dataset: {type: tuetschek/e2e_nlg, name: E2E}
    metrics: [{type: bleu, value: 0.5}]
---
# Text
"""


def test_model_info(hub, api):
    files = {"README.md": CARD.encode(), "config.json": b'{"model_type": "llama"}', "model.safetensors": WEIGHTS}
    repo = hub.add_repo("alice/x", files=files)
    info = api.model_info("alice/x")
    assert (info.id, info.sha, info.private, info.gated) == ("alice/x", repo.commits[0].sha, False, False)
    assert info.library_name == "hf_sara"
    assert info.card_data.base_model == "alice/base"
    assert info.card_data.license == "mit"
    assert info.config == {"model_type": "llama"}
    assert info.last_modified.tzinfo
    assert {"sara", "safetensors", "license:mit", "base_model:alice/base", "base_model:adapter:alice/base"} < {
        *info.tags
    }
    assert {sibling.rfilename for sibling in info.siblings} == {*files, ".gitattributes"}
    assert info.siblings[0].size is None
    blobs = {sibling.rfilename: sibling for sibling in api.model_info("alice/x", files_metadata=True).siblings}
    assert blobs["model.safetensors"].lfs.size == len(WEIGHTS)
    assert blobs["config.json"].lfs is None
    expanded = api.model_info("alice/x", expand=["private", "sha"])
    assert (expanded.private, expanded.sha, expanded.siblings) == (False, info.sha, None)
    old = api.model_info("alice/x", revision=repo.commits[1].sha)
    assert [sibling.rfilename for sibling in old.siblings] == [".gitattributes"]
    with pytest.raises(RevisionNotFoundError):
        api.model_info("alice/x", revision="missing")


def test_listings(hub, api):
    hub.page_size = 2
    hub.add_repo("alice/x", files={"a/b/c.bin": WEIGHTS, "a/d.txt": b"1", "e.txt": b"2"})
    api.upload_file(path_or_fileobj=b"3", path_in_repo="a/d.txt", repo_id="alice/x", commit_message="New")
    tree = {entry.path: entry for entry in api.list_repo_tree("alice/x", recursive=True, expand=True)}
    assert set(tree) == {".gitattributes", "a", "a/b", "a/b/c.bin", "a/d.txt", "e.txt"}
    assert (tree["a/b/c.bin"].lfs.size, tree["a/d.txt"].lfs) == (len(WEIGHTS), None)
    assert (tree["a"].last_commit.title, tree["a/b"].last_commit.title) == ("New", "Add files")
    assert {entry.path for entry in api.list_repo_tree("alice/x")} == {".gitattributes", "a", "e.txt"}
    assert [entry.path for entry in api.list_repo_tree("alice/x", "a/b")] == ["a/b/c.bin"]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree("alice/x", "missing"))
    paths = api.get_paths_info("alice/x", ["a", "e.txt", "missing"])
    assert [type(entry).__name__ for entry in paths] == ["RepoFolder", "RepoFile"]
    commits = api.list_repo_commits("alice/x")
    assert [(commit.title, commit.authors) for commit in commits] == [
        ("New", ["alice"]),
        ("Add files", ["alice"]),
        ("initial commit", ["alice"]),
    ]
    assert api.file_exists("alice/x", "a/b/c.bin")
    assert not api.file_exists("alice/x", "a/b/missing.bin")


# Downloads.


def test_downloads_and_the_cache(hub, api, tmp_path):
    repo = hub.add_repo("alice/x", files={"config.json": b"{}", "sub/m.safetensors": WEIGHTS}, private=True)
    cached = {"cache_dir": tmp_path, "repo_id": "alice/x"}
    assert Path(api.hf_hub_download(filename="config.json", **cached)).read_bytes() == b"{}"
    path = api.hf_hub_download(filename="sub/m.safetensors", **cached)
    assert Path(path).read_bytes() == WEIGHTS
    assert f"snapshots/{repo.commits[0].sha}/" in path
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(filename="missing.json", **cached)
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download(filename="config.json", revision="missing", **cached)
    storage = made(hub, "GET", "/cdn/")
    assert storage
    assert not [request for request in storage if "authorization" in request.headers]
    folder = api.snapshot_download(**cached, allow_patterns="*.json")
    assert len(made(hub, "GET", "/cdn/")) == 1  # all that is asked for was in the cache
    count = len(hub.requests)
    assert api.snapshot_download(**cached, local_files_only=True, allow_patterns="*.json") == folder
    assert api.hf_hub_download(filename="sub/m.safetensors", local_files_only=True, **cached) == path
    with pytest.raises(LocalEntryNotFoundError):
        api.hf_hub_download(filename="other.json", local_files_only=True, **cached)
    assert len(hub.requests) == count


def test_resumed_download(hub, api, tmp_path, no_wait):
    # The client writes, and can resume from, whole chunks of 10 MiB.
    hub.lfs_threshold = 100 << 20
    content = WEIGHTS * 120
    hub.add_repo("alice/x", files={"m.safetensors": content, "long.txt": content})
    for name, path in (("m.safetensors", "/cdn/download"), ("long.txt", "/resolve/")):
        hub.faults.append(Fault(path, method="GET", drop_response=11 << 20))
        assert Path(api.hf_hub_download("alice/x", name, cache_dir=tmp_path)).read_bytes() == content
        first, second = made(hub, "GET", path)
        assert ("range" in first.headers, second.headers["range"]) == (False, f"bytes={10 << 20}-")
        assert (first.status, second.status) == (200, 206)
    assert no_wait == [1, 1]


def test_ranges(hub, api):
    from huggingface_hub.utils import get_session

    hub.add_repo("alice/x", files={"digits.txt": b"0123456789"})
    url = f"{hub.endpoint}/alice/x/resolve/main/digits.txt"
    for asked, content in (("2-4", b"234"), ("7-", b"789"), ("-2", b"89"), ("0-99", b"0123456789")):
        response = get_session().get(url, headers={"Range": f"bytes={asked}"})
        assert (response.status_code, response.content) == (206, content)
    assert get_session().get(url, headers={"Range": "bytes=10-"}).status_code == 416


# Faults.


def test_server_errors(hub, api, no_wait):
    api.create_repo("alice/x")
    upload = {"path_in_repo": "m.bin", "repo_id": "alice/x"}
    hub.faults += [
        Fault("/preupload/", status=500, times=2),
        Fault("/cdn/upload/", status=503),
        Fault("/objects/verify", status=429, retry_after=3),
    ]
    api.upload_file(path_or_fileobj=WEIGHTS, **upload)
    assert hub.repo("alice/x").files()["m.bin"] == WEIGHTS
    assert [request.status for request in made(hub, "POST", "/preupload/")] == [500, 500, 200]
    assert [request.status for request in made(hub, "PUT")] == [503, 200]
    assert 4.0 in no_wait  # what Retry-After says, and a second
    hub.faults.append(Fault("/commit/", status=500))
    with pytest.raises(HfHubHTTPError, match="Injected fault 500"):
        api.upload_file(path_or_fileobj=b"other", **upload)
    assert hub.repo("alice/x").files()["m.bin"] == WEIGHTS


def test_dropped_connections(hub, api, no_wait):
    api.create_repo("alice/x")
    upload = {"path_in_repo": "m.bin", "repo_id": "alice/x"}
    hub.faults += [Fault("/cdn/upload/", drop_request=50_000)]
    api.upload_file(path_or_fileobj=WEIGHTS * 20, **upload)
    assert [(request.status, request.length) for request in made(hub, "PUT")] == [
        (0, 50_000),
        (200, 20 * len(WEIGHTS)),
    ]
    assert hub.repo("alice/x").files()["m.bin"] == WEIGHTS * 20
    # The answer to a commit is lost, and the commit is there; a request that is lost leaves nothing.
    before = len(hub.repo("alice/x").commits)
    for fault, done in ((Fault("/commit/", drop_request=10), 0), (Fault("/commit/", drop_response=10), 1)):
        hub.faults.append(fault)
        with pytest.raises(Exception, match=r"disconnected|peer closed|reset|Broken pipe"):
            api.upload_file(path_or_fileobj=b"new", **upload)
        assert len(hub.repo("alice/x").commits) == before + done


def test_a_client_that_dies_leaves_nothing(hub):
    hub.add_repo("alice/x")
    lines = [{"key": "header", "value": {"summary": "Half"}}]
    lines += [{"key": "file", "value": {"path": "a.txt", "content": "", "encoding": "base64"}}]
    body = "".join(json.dumps(line) + "\n" for line in lines)
    head = f"POST /api/models/alice/x/commit/main HTTP/1.1\r\nAuthorization: Bearer {ALICE}\r\n"
    for length, commits in ((len(body) + 1, 1), (len(body), 2)):
        with socket.create_connection(("127.0.0.1", int(hub.endpoint.rsplit(":", 1)[1]))) as connection:
            connection.sendall(f"{head}Content-Length: {length}\r\n\r\n{body}".encode())
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1)
        assert len(hub.repo("alice/x").commits) == commits


def test_delays_and_the_end_of_the_hub(hub, api, tmp_path):
    hub.add_repo("alice/x", files={"config.json": b"{}"})
    hub.faults.append(Fault("/api/models/alice/x", delay=0.3))
    with pytest.raises(Exception, match="timed out"):
        api.model_info("alice/x", timeout=0.1)
    assert api.model_info("alice/x")
    with HubServer(tokens=TOKENS) as other:
        other.add_repo("alice/x", files={"config.json": b"{}"})
        api = HfApi(endpoint=other.endpoint)
        assert api.hf_hub_download("alice/x", "config.json", cache_dir=tmp_path)
    with pytest.raises(Exception, match=r"disconnected|refused|reset"):
        api.model_info("alice/x")
    assert api.hf_hub_download("alice/x", "config.json", cache_dir=tmp_path)


def test_its_own_faults_are_not_silent():
    def use(server):
        server.repos["alice/x"] = object()
        with server, pytest.raises(HfHubHTTPError, match="500"):
            HfApi(endpoint=server.endpoint, token=ALICE).delete_repo("alice/x")

    with online(), pytest.raises(RuntimeError, match="AttributeError"):
        use(HubServer(tokens=TOKENS))


# What takes no endpoint, in processes of its own.


def test_cards_and_the_environment(hub, tmp_path):
    hub.add_repo("alice/x")
    code = f"""
import pytest
from huggingface_hub import HfApi, ModelCard, snapshot_download
import huggingface_hub
card = ModelCard({CARD!r})
# Before 2.0, this method asks the real Hub, whatever the endpoint is.
follows = not huggingface_hub.__version__.startswith("1.")
if follows:
    card.validate()
card.push_to_hub("alice/x")
assert ModelCard.load("alice/x").data.license == "mit"
if follows:
    with pytest.raises(ValueError, match="must be one of .afl-3.0,"):
        ModelCard("---\\nlicense: nonsense\\n---\\n").validate()
print(snapshot_download("alice/x"), HfApi().whoami()["name"])
"""
    result = run(hub, tmp_path, code, token=ALICE)
    assert result.returncode == 0, result.stderr
    assert validate_card(hub.repo("alice/x").files()["README.md"].decode()) == validate_card(CARD)
    offline = "from huggingface_hub import snapshot_download; print(snapshot_download('alice/x'))"
    count = len(hub.requests)
    result = run(hub, tmp_path, offline, HF_HUB_OFFLINE="1")
    assert hub.repo("alice/x").commits[0].sha in result.stdout
    assert len(hub.requests) == count


@pytest.mark.slow
def test_transformers(hub, tmp_path):
    folder = tmp_path / "model"
    make_model("llama").save_pretrained(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.add_repo("alice/tiny", files=files, private=True)
    code = """
from transformers import AutoConfig, AutoModelForCausalLM
assert AutoConfig.from_pretrained("alice/tiny").hidden_size == 24
model = AutoModelForCausalLM.from_pretrained("alice/tiny")
model.push_to_hub("alice/copy", private=True)
try:
    AutoConfig.from_pretrained("alice/copy", token=False)
except OSError as error:
    print(error)
"""
    result = run(hub, tmp_path / "cache", code, token=ALICE)
    assert result.returncode == 0, result.stderr
    assert "alice/copy is not a local folder and is not a valid model identifier" in result.stdout
    copy = hub.repo("alice/copy")
    assert copy.private
    assert copy.files()["model.safetensors"] == files["model.safetensors"]
