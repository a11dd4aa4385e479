"""The requests that the Hub of the tests (hub_server.py) answers, each as the client makes it and reads the answer."""

from __future__ import annotations

import base64
import binascii
import fnmatch
import hashlib
import json
import re
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote

from hub_storage import MODEL_ID, Commit, File, HubError, Repo, card_tags, git_hash, validate_card

if TYPE_CHECKING:
    from hub_server import HubServer


@dataclass
class Request:
    """A request as it came; `hub.requests` has them all, with the status of the answer (0: none was sent)."""

    method: str
    path: str
    query: str
    headers: dict[str, str]  # names in lower case
    body: bytes = b""  # emptied after the answer when it is longer than a mebibyte
    length: int = 0
    status: int = 0

    @property
    def parameters(self) -> dict[str, list[str]]:
        return parse_qs(self.query, keep_blank_values=True)

    def flag(self, name: str) -> bool:
        return self.parameters.get(name, [""])[-1].lower() in ("1", "true")

    def json(self) -> Any:
        try:
            return json.loads(self.body or b"{}")
        except ValueError as error:
            raise HubError(400, f"Invalid JSON: {error}") from error


@dataclass
class Reply:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def as_json(value: Any, status: int = 200, **headers: str) -> Reply:
    return Reply(json.dumps(value, default=str).encode(), status, {"Content-Type": "application/json", **headers})


ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Reply]]] = []
PARTS = {"repo": "[^/]+/[^/]+", "path": ".+"}  # any other part is one segment: the client quotes the "/" of a revision


def route(methods: str, template: str) -> Callable:
    pattern = re.sub(r"{(\w+)}", lambda part: f"(?P<{part[1]}>{PARTS.get(part[1], '[^/]+')})", template)

    def register(function: Callable[..., Reply]) -> Callable[..., Reply]:
        ROUTES.extend((method, re.compile(pattern), function) for method in methods.split())
        return function

    return register


def find_route(request: Request) -> tuple[Callable[..., Reply], dict[str, str]]:
    for method, pattern, function in ROUTES:
        if method == request.method and (match := pattern.fullmatch(request.path)):
            return function, {name: unquote(part) for name, part in match.groupdict().items()}
    raise HubError(404, f"Not found: {request.method} {request.path}")


@route("GET", "/api/whoami-v2")
def whoami(hub: HubServer, request: Request) -> Reply:
    user = hub.user(request, needed=True)
    orgs = [{"type": "org", "name": name} for name, members in hub.orgs.items() if user in members]
    access = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
    return as_json({"type": "user", "name": user, "fullname": user, "isPro": False, "orgs": orgs, "auth": access})


@route("POST", "/api/repos/create")
def create_repo(hub: HubServer, request: Request) -> Reply:
    data = request.json()
    user = hub.user(request, needed=True)
    namespace = data.get("organization") or user
    id = f"{namespace}/{data['name']}"
    if data.get("type") not in (None, "model") or not MODEL_ID.fullmatch(id):
        raise HubError(400, f"Invalid name or type of a repository: {id}")
    if not hub.may_write(request, namespace):
        raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
    url = f"{hub.endpoint}/{id}"
    if id in hub.repos:
        return as_json({"error": "You already created this model repo", "url": url}, 409)
    hub.add_repo(id, private=data.get("visibility") == "private" or data.get("private", False))
    return as_json({"url": url, "name": id})


@route("DELETE", "/api/repos/delete")
def delete_repo(hub: HubServer, request: Request) -> Reply:
    data = request.json()
    repo = hub.writable(request, f"{data.get('organization') or hub.user(request)}/{data['name']}")
    del hub.repos[repo.id]
    return as_json({})


@route("GET", "/api/models/{repo}/auth-check")
@route("GET", "/api/models/{repo}/auth-check/{write}")
def auth_check(hub: HubServer, request: Request, repo: str, write: str = "") -> Reply:
    if write:
        hub.writable(request, repo)
    hub.readable(request, repo, content=True)
    return as_json({})


@route("GET", "/api/models/{repo}")
@route("GET", "/api/models/{repo}/revision/{revision}")
def model_info(hub: HubServer, request: Request, repo: str, revision: str = "main") -> Reply:
    found = hub.readable(request, repo)
    commit = found.find(revision)
    siblings: list[dict] = []
    for path, file in commit.files.items():
        siblings.append({"rfilename": path})
        if request.flag("blobs"):
            siblings[-1].update(size=len(file.content), blobId=file.blob_id)
            if file.lfs:
                lfs = {"sha256": file.sha256, "size": len(file.content), "pointerSize": len(file.pointer)}
                siblings[-1]["lfs"] = lfs
    card = validate_card(commit.files["README.md"].content.decode())[0] if "README.md" in commit.files else {}
    config = {}
    if "config.json" in commit.files:
        with suppress(ValueError):
            config = json.loads(commit.files["config.json"].content)
    info = {
        "_id": git_hash("blob", repo.encode())[:24],
        "id": repo,
        "modelId": repo,
        "author": repo.split("/")[0],
        "sha": commit.sha,
        "lastModified": commit.date,
        "createdAt": found.history(revision)[-1].date,
        "private": found.private,
        "gated": "manual" if found.gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": card_tags(card, commit.files),
        "siblings": siblings,
        "config": {key: config[key] for key in ("architectures", "model_type") if key in config},
        "cardData": {key: value for key, value in card.items() if key != "model-index"},
        **{key: card[key] for key in ("library_name", "pipeline_tag", "model-index") if key in card},
    }
    if wanted := request.parameters.get("expand"):
        info = {key: value for key, value in info.items() if key in ("_id", "id", *wanted)}
    return as_json(info)


@route("GET", "/api/models/{repo}/refs")
def refs(hub: HubServer, request: Request, repo: str) -> Reply:
    found = hub.readable(request, repo)

    def under(prefix: str) -> list[dict]:
        return [
            {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha}
            for ref, sha in found.refs.items()
            if ref.startswith(prefix)
        ]

    answer = {"branches": under("refs/heads/"), "tags": under("refs/tags/"), "converts": []}
    return as_json({**answer, "pullRequests": under("refs/pr/")} if request.flag("include_prs") else answer)


@route("POST", "/api/models/{repo}/branch/{name}")
def create_branch(hub: HubServer, request: Request, repo: str, name: str) -> Reply:
    return create_ref(hub, request, repo, f"refs/heads/{name}", request.json().get("startingPoint", "main"))


@route("POST", "/api/models/{repo}/tag/{revision}")
def create_tag(hub: HubServer, request: Request, repo: str, revision: str) -> Reply:
    return create_ref(hub, request, repo, f"refs/tags/{request.json()['tag']}", revision)


def create_ref(hub: HubServer, request: Request, repo: str, ref: str, revision: str) -> Reply:
    found = hub.writable(request, repo)
    if ref in found.refs:
        raise HubError(409, f"Reference already exists: {ref}")
    found.refs[ref] = found.find(revision).sha
    return as_json({})


@route("DELETE", "/api/models/{repo}/{kind}/{name}")
def delete_ref(hub: HubServer, request: Request, repo: str, kind: str, name: str) -> Reply:
    found = hub.writable(request, repo)
    ref = {"branch": f"refs/heads/{name}", "tag": f"refs/tags/{name}"}.get(kind)
    if ref not in found.refs:
        raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
    if ref == "refs/heads/main":
        raise HubError(403, "Cannot delete the default branch")
    del found.refs[ref]
    return as_json({})


@route("GET", "/api/models/{repo}/commits/{revision}")
def commits(hub: HubServer, request: Request, repo: str, revision: str) -> Reply:
    items = [
        {"id": c.sha, "title": c.title, "message": c.message, "date": c.date, "authors": [{"user": c.author}]}
        for c in hub.readable(request, repo).history(revision)
    ]
    return hub.paged(request, items)


def entries(commit: Commit, paths: Collection[str], expand: bool) -> list[dict]:
    found = [entry for path in paths if (entry := commit.entry(path))]
    for entry in found if expand else []:
        last = commit.last_change(entry["path"])
        entry["lastCommit"] = {"id": last.sha, "title": last.title, "date": last.date}
    return found


@route("GET", "/api/models/{repo}/tree/{revision}")
@route("GET", "/api/models/{repo}/tree/{revision}/{path}")
def tree(hub: HubServer, request: Request, repo: str, revision: str, path: str = "") -> Reply:
    commit = hub.readable(request, repo).find(revision)
    folder = f"{path}/" if path else ""
    inside = [name[len(folder) :].split("/") for name in commit.files if name.startswith(folder)]
    if path and not inside:
        raise HubError(404, f'"{path}" does not exist on "{revision}"', "EntryNotFound")
    depth = max(map(len, inside), default=0) if request.flag("recursive") else 1
    paths = {folder + "/".join(parts[:end]) for parts in inside for end in range(1, min(len(parts), depth) + 1)}
    return hub.paged(request, entries(commit, sorted(paths), request.flag("expand")))


@route("POST", "/api/models/{repo}/paths-info/{revision}")
def paths_info(hub: HubServer, request: Request, repo: str, revision: str) -> Reply:
    form = parse_qs(request.body.decode())
    expand = form.get("expand", [""])[0].lower() == "true"
    return as_json(entries(hub.readable(request, repo).find(revision), form.get("paths", []), expand))


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: HubServer, request: Request) -> Reply:
    _, errors, warnings = validate_card(request.json()["content"])
    found = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
    return as_json(found, 400 if errors else 200)


# Uploads. The client asks how to send each file, sends the LFS files, and then makes the commit.


@route("POST", "/api/models/{repo}/preupload/{revision}")
def preupload(hub: HubServer, request: Request, repo: str, revision: str) -> Reply:
    found = (hub.readable if request.flag("create_pr") else hub.writable)(request, repo)
    commit, data = found.find(revision), request.json()
    hosted = commit.files.get(".gitignore")
    ignore = data.get("gitIgnore", hosted.content.decode() if hosted else "").splitlines()
    patterns = [line.strip().rstrip("/") for line in ignore if line.strip() and not line.startswith("#")]
    answer = []
    for wanted in data["files"]:
        path = wanted["path"]
        names = [*PurePosixPath(path).parts, path]
        old = commit.files.get(path)
        ignored = any(fnmatch.fnmatch(name, pattern) for name in names for pattern in patterns)
        mode = "lfs" if hub.is_lfs(path, wanted["size"]) else "regular"
        answer.append({"path": path, "uploadMode": mode, "shouldIgnore": ignored, "oid": old.etag if old else None})
    return as_json({"files": answer, "commitOid": commit.sha})


@route("POST", "/{repo}.git/info/lfs/objects/batch")
def lfs_batch(hub: HubServer, request: Request, repo: str) -> Reply:
    data = request.json()
    # A batch for a pull request names no ref, and who may read a repository may open a pull request.
    found = (hub.writable if "ref" in data else hub.readable)(request, repo)
    hub.user(request, needed=True)
    multipart, objects = "multipart" in data["transfers"], []
    for wanted in data["objects"]:
        oid, size = wanted["oid"], wanted["size"]
        path = f"/cdn/upload/{repo}/{oid}"
        upload = {"href": hub.signed(hub.cdn, path)}
        if multipart and size > hub.multipart_size:
            count = -(-size // hub.multipart_size)
            parts = {f"{part:05d}": hub.signed(hub.cdn, f"{path}/{part}") for part in range(1, count + 1)}
            header = {"chunk_size": str(hub.multipart_size), **parts}
            upload = {"href": hub.signed(hub.endpoint, f"/cdn/complete/{repo}/{oid}"), "header": header}
        verify = {"href": f"{hub.endpoint}/{repo}.git/info/lfs/objects/verify"}
        actions = {} if oid in found.lfs else {"actions": {"upload": upload, "verify": verify}}
        objects.append({"oid": oid, "size": size, **actions})
    return as_json({"transfer": "multipart" if multipart else "basic", "objects": objects})


@route("PUT", "/cdn/upload/{repo}/{oid}")
@route("PUT", "/cdn/upload/{repo}/{oid}/{part}")
def store(hub: HubServer, request: Request, repo: str, oid: str, part: str = "") -> Reply:
    hub.check_signature(request)
    sha256 = hub.receive(request.body)
    if part:
        hub.parts[f"{repo}/{oid}/{part}"] = request.body
    elif sha256 != oid:
        raise HubError(400, "BadDigest: the content is not what was announced")
    else:
        hub.repos[repo].lfs[oid] = request.body
    return Reply(headers={"ETag": f'"{sha256}"'})


@route("POST", "/cdn/complete/{repo}/{oid}")
def complete(hub: HubServer, request: Request, repo: str, oid: str) -> Reply:
    hub.check_signature(request)
    contents = []
    for part in request.json()["parts"]:
        contents.append(hub.parts.pop(f"{repo}/{oid}/{part['partNumber']}", b""))
        if part["etag"].strip('"') != hashlib.sha256(contents[-1]).hexdigest():
            raise HubError(400, f"InvalidPart: {part['partNumber']}")
    if hub.receive(b"".join(contents)) != oid:
        raise HubError(400, "BadDigest: the parts are not what was announced")
    hub.repos[repo].lfs[oid] = b"".join(contents)
    return as_json({})


@route("POST", "/{repo}.git/info/lfs/objects/verify")
def verify(hub: HubServer, request: Request, repo: str) -> Reply:
    hub.user(request, needed=True)
    data = request.json()
    content = hub.readable(request, repo).lfs.get(data["oid"])
    if content is None or len(content) != data["size"]:
        raise HubError(404, "The object was not uploaded")
    return as_json({})


@route("POST", "/api/models/{repo}/commit/{revision}")
def commit(hub: HubServer, request: Request, repo: str, revision: str) -> Reply:
    pull = request.flag("create_pr")
    found = (hub.readable if pull else hub.writable)(request, repo)
    user = hub.user(request, needed=True)
    try:
        lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
        operations = [(line["key"], line["value"]) for line in lines]
        header = dict(operations)["header"]
    except (ValueError, KeyError, TypeError) as error:
        raise HubError(400, f"Invalid commit: {error!r}") from error
    parent, base = found.find(revision), header.get("parentCommit")
    if base and pull:
        parent = found.find(base)
    elif base and not parent.sha.startswith(base):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
    if pull:
        number = 1 + sum(name.startswith("refs/pr/") for name in found.refs)
        ref = f"refs/pr/{number}"
    elif ref not in found.refs:
        raise HubError(400, f"Not a branch, so that nothing can be committed to it: {revision}")
    files = apply(hub, found, dict(parent.files), operations)
    made = found.add(ref, files, parent, header["summary"], header.get("description", ""), user or "")
    url = f"{hub.endpoint}/{repo}"
    answer = {"success": True, "commitOid": made.sha, "commitUrl": f"{url}/commit/{made.sha}", "hookOutput": ""}
    return as_json({**answer, "pullRequestUrl": f"{url}/discussions/{number}"} if pull else answer)


def apply(hub: HubServer, repo: Repo, files: dict[str, File], operations: list[tuple[str, dict]]) -> dict[str, File]:
    """The files after the operations of a commit, which is refused as a whole if one of them cannot be done."""
    for key, value in operations:
        path = value.get("path", "")
        if key != "header" and (not path or {"", ".", "..", ".git"} & set(path.rstrip("/").split("/"))):
            raise HubError(400, f"Invalid path: {path}")
        if key == "file":
            try:
                content = base64.b64decode(value["content"], validate=True)
            except binascii.Error as error:
                raise HubError(400, f"Invalid content of {path}") from error
            hub.receive(content)
            if path == "README.md" and (errors := validate_card(content.decode())[1]):
                raise HubError(400, f"Invalid metadata in README.md: {'; '.join(errors)}")
            files[path] = File(content, lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in repo.lfs:
                raise HubError(400, f"LFS pointer of {path} points to a file that was not uploaded")
            files[path] = File(repo.lfs[value["oid"]], lfs=True)
        elif key in ("deletedFile", "deletedFolder"):
            gone = [
                name
                for name in files
                if name == path or (key[7:] == "Folder" and name.startswith(f"{path.rstrip('/')}/"))
            ]
            if not gone:
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            for name in gone:
                del files[name]
        elif key != "header":
            raise HubError(400, f"Unknown operation: {key}")
    return files


# Downloads.


@route("GET HEAD", "/{repo}/resolve/{revision}/{path}")
def resolve(hub: HubServer, request: Request, repo: str, revision: str, path: str) -> Reply:
    commit = hub.readable(request, repo, content=True).find(revision)
    headers = {"X-Repo-Commit": commit.sha}
    if path not in commit.files:
        raise HubError(404, "Entry not found", "EntryNotFound", **headers)
    file = commit.files[path]
    headers |= {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
    if not file.lfs:
        return ranged(request, file.content, headers)
    linked = {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
    location = hub.signed(hub.cdn, f"/cdn/download/{repo}/{commit.sha}/{path}")
    return Reply(b"", 302, {**headers, **linked, "Location": location})


@route("GET HEAD", "/cdn/download/{repo}/{revision}/{path}")
def download(hub: HubServer, request: Request, repo: str, revision: str, path: str) -> Reply:
    hub.check_signature(request)
    file = hub.repos[repo].find(revision).files[path]
    return ranged(request, file.content, {"ETag": f'"{file.sha256}"', "Accept-Ranges": "bytes"})


def ranged(request: Request, content: bytes, headers: dict[str, str]) -> Reply:
    """All of the content, or the one range of bytes that was asked for."""
    headers["Content-Type"] = "application/octet-stream"
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    if not match or not any(match.groups()):
        return Reply(content, 200, headers)
    first, last = match.groups()
    start = int(first) if first else max(len(content) - int(last), 0)
    stop = min(int(last) + 1, len(content)) if first and last else len(content)
    if start >= len(content):
        raise HubError(416, "Range Not Satisfiable", **{"Content-Range": f"bytes */{len(content)}"})
    return Reply(content[start:stop], 206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"})
