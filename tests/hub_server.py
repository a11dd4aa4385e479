"""
A small Hugging Face Hub on loopback, for tests. It speaks the part of the real one's protocol that an adapter library
needs, to the unmodified `huggingface_hub` client over real sockets. It has models only, and plain Git LFS without Xet.

    with HubServer(tokens={"hf_alice": "alice"}) as hub:
        hub.add_repo("alice/base", files={"config.json": b"{}"}, private=True)
        hub.faults.append(Fault(r"/commit/", status=503))
        subprocess.run([sys.executable, script], env=hub.environment(cache_dir, token="hf_alice"), check=True)
        hub.repo("alice/adapter").files()["README.md"], hub.repo("alice/adapter").commits[0].title, hub.requests

Everything is in memory. The Hub is not checked against the real service, only against what its client reads. It needs
the standard library, and PyYAML (which huggingface_hub requires) for the metadata of model cards. This module has the
server and the functions for tests, hub_routes.py has the requests it answers, and hub_storage.py has what it keeps.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from unittest import mock
from urllib.parse import quote, unquote, urlencode

from hub_routes import Reply, Request, as_json, find_route
from hub_storage import File, HubError, Repo

MEBIBYTE = 1 << 20
LFS_SUFFIXES = """
.7z .arrow .bin .bz2 .ckpt .ftz .gz .h5 .joblib .model .msgpack .npy .npz .onnx .ot .parquet .pb .pickle .pkl .pt .pth
.rar .safetensors .tar .tgz .wasm .xz .zip .zst
"""
LFS_SUFFIXES = tuple(LFS_SUFFIXES.split())
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


@dataclass
class Fault:
    """
    A fault that happens to the next `times` requests whose path (without the query) and method match.

    If a `status` is given, it is the answer, and the request is not done. `drop_request` closes the connection after
    that many bytes of the request's body, and the request is not done. `drop_response` closes it after that many bytes
    of the answer's body, when the request has been done, so that the client cannot know it. `delay` is the number of
    seconds before the answer.
    """

    path: str
    method: str = ".*"
    times: int = 1
    status: int = 0
    retry_after: int | None = None
    drop_request: int | None = None
    drop_response: int | None = None
    delay: float = 0.0


class Handler(BaseHTTPRequestHandler):
    """Brings requests to the Hub and answers to the client, and makes the faults of the connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Listener

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, *_: Any) -> None:
        """Log nothing, because `hub.requests` is the log."""

    def handle_request(self) -> None:
        hub = self.server.hub
        path, _, query = self.path.partition("?")
        request = Request(self.command, path, query, {name.lower(): value for name, value in self.headers.items()})
        fault = hub.take_fault(request)
        length = int(self.headers.get("Content-Length", 0))
        request.body = self.rfile.read(length if fault.drop_request is None else min(length, fault.drop_request))
        request.length = len(request.body)
        hub.requests.append(request)
        if "Transfer-Encoding" in self.headers:
            hub.failures.append("A request whose body has no length: the client was not known to make any")
        if fault.drop_request is not None or request.length < length:  # the client may have been killed
            return self.hang_up()
        if fault.delay:
            time.sleep(fault.delay)
        if fault.status:
            retry = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
            reply = hub.error_reply(HubError(fault.status, f"Injected fault {fault.status}", **retry))
        else:
            reply = hub.answer(request)
        if request.length > MEBIBYTE:
            request.body = b""
        head = request.method == "HEAD"
        if fault.drop_response is not None and head:  # the answer has no body that could be cut in the middle
            return self.hang_up()
        request.status = reply.status
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
            self.send_header(name, value.encode("latin-1", "replace").decode("latin-1"))
        self.end_headers()
        self.wfile.write(b"" if head else reply.body[: fault.drop_response])
        if fault.drop_response is not None:
            self.hang_up()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request  # noqa: N815

    def hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


LOOPBACK = "127.0.0.1,localhost"


class _Listener(ThreadingHTTPServer):
    request_queue_size = 64

    def __init__(self, hub: HubServer, host: str):
        self.hub = hub
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://{host}:{self.server_port}"
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def handle_error(self, *_: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # an OSError only means that a client has hung up
            self.hub.failures.append(traceback.format_exc())

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):  # kept-alive connections would still be answered
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.thread.join()


class HubServer:
    """
    The Hub, which runs inside of a `with` block. `tokens` has the user of each token, and `orgs` has the members of
    organisations. Tokens in `expired` are refused with a message, and those in `read_only` may not write.
    """

    lfs_threshold = 10 * MEBIBYTE  # files as large as this go to LFS whatever their names
    multipart_size = 20 * MEBIBYTE  # LFS files larger than this are uploaded in parts of this size
    page_size = 1000

    def __init__(
        self,
        tokens: Mapping[str, str] | None = None,
        expired: Collection[str] = (),
        read_only: Collection[str] = (),
        orgs: Mapping[str, Collection[str]] | None = None,
    ):
        self.tokens, self.expired, self.read_only, self.orgs = dict(tokens or {}), expired, read_only, orgs or {}
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.failures: list[str] = []
        self.received: dict[str, bytes] = {}
        self.parts: dict[str, bytes] = {}  # the parts of uploads that are not complete, by path
        self.lock = threading.RLock()  # a request is done as a whole: commits are atomic, and follow one another
        self.secret = secrets.token_bytes()

    def __enter__(self) -> HubServer:
        # The client follows a redirect inside one host and then misses the headers of the first answer, so the storage
        # has to be another host here too. Then the client does not send its token to the storage either.
        self.listeners = _Listener(self, "127.0.0.1"), _Listener(self, "localhost")
        self.endpoint, self.cdn = (listener.url for listener in self.listeners)
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        for listener in self.listeners:
            listener.close()
        if self.failures and kind is None:
            raise RuntimeError("The Hub of the tests has a fault of its own:\n" + "\n".join(self.failures))

    # For tests.

    def add_repo(
        self, id: str, files: Mapping[str, bytes] | None = None, private: bool = False, gated: bool = False
    ) -> Repo:
        with self.lock:
            repo = self.repos[id] = Repo(id, private, gated)
            owner = id.split("/")[0]
            initial = {".gitattributes": File(GITATTRIBUTES, lfs=False)}
            commit = repo.add("refs/heads/main", initial, None, "initial commit", "", owner)
            if files:
                added = {path: File(content, self.is_lfs(path, len(content))) for path, content in files.items()}
                repo.add("refs/heads/main", initial | added, commit, "Add files", "", owner)
        return repo

    def repo(self, id: str) -> Repo:
        return self.repos[id]

    def uploaded(self) -> dict[str, bytes]:
        """Every file that has been sent, by its SHA-256, even if no commit has it."""
        return dict(self.received)

    def environment(self, cache_dir: str | os.PathLike, token: str | None = None) -> dict[str, str]:
        """
        The environment of a process that uses this Hub. It has none of the user's own settings, tokens and proxies.

        A script that imports conftest.py has to import huggingface_hub.constants first, or it will be offline.
        """
        foreign = re.compile(r"(HF_(?!SARA_)|HUGGING_?FACE|TRANSFORMERS_)|.*_PROXY$", re.IGNORECASE)
        kept = {name: value for name, value in os.environ.items() if not foreign.match(name)}
        own = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(cache_dir),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": LOOPBACK,
        }
        return {**kept, **own, **({"HF_TOKEN": token} if token else {})}

    # Behind the handlers.

    def take_fault(self, request: Request) -> Fault:
        with self.lock:
            for fault in self.faults:
                matches = re.search(fault.path, unquote(request.path)) and re.fullmatch(fault.method, request.method)
                if matches and fault.times > 0:
                    fault.times -= 1
                    return fault
        return Fault("")

    def answer(self, request: Request) -> Reply:
        try:
            function, parts = find_route(request)
            with self.lock:
                return function(self, request, **parts)
        except HubError as error:
            missing = error.status == 401 and "Invalid credentials" not in error.message
            if missing and re.match("/api/models/|.*/resolve/", request.path):
                # If the Hub is at https, the client takes such an answer for this error by its URL alone.
                error.headers.setdefault("X-Error-Code", "RepoNotFound")
            return self.error_reply(error)
        except Exception:
            self.failures.append(traceback.format_exc())
            return self.error_reply(HubError(500, traceback.format_exc()))

    @staticmethod
    def error_reply(error: HubError) -> Reply:
        return as_json({"error": error.message}, error.status, **error.headers)

    def user(self, request: Request, needed: bool = False) -> str | None:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token in self.expired:
            raise HubError(401, 'User Access Token "test" is expired')
        if token and token not in self.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        if needed and not token:
            raise HubError(401, "Invalid username or password.")
        return self.tokens.get(token)

    def owns(self, user: str | None, namespace: str) -> bool:
        return user is not None and (user == namespace or user in self.orgs.get(namespace, ()))

    def readable(self, request: Request, id: str, content: bool = False) -> Repo:
        """A repository, if the request may see it (or its content); private ones look like missing ones."""
        user = self.user(request)
        repo, owner = self.repos.get(id), self.owns(user, id.split("/")[0])
        if repo is None or (repo.private and not owner):
            status, message = (404, "Repository not found") if user else (401, "Invalid username or password.")
            raise HubError(status, message, "RepoNotFound")
        if content and repo.gated and not owner:
            message = f"Access to model {id} is restricted and you are not in the authorized list."
            raise HubError(403 if user else 401, message, "GatedRepo")
        return repo

    def may_write(self, request: Request, namespace: str) -> bool:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        return self.owns(self.user(request, needed=True), namespace) and token not in self.read_only

    def writable(self, request: Request, id: str) -> Repo:
        self.user(request, needed=True)
        repo = self.readable(request, id)
        if not self.may_write(request, id.split("/")[0]):
            raise HubError(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repo

    def is_lfs(self, path: str, size: int) -> bool:
        return PurePosixPath(path).suffix in LFS_SUFFIXES or size >= self.lfs_threshold

    def signed(self, origin: str, path: str) -> str:
        """A URL that is its own permission, as those of object storage are."""
        signature = hmac.new(self.secret, unquote(path).encode(), "sha256").hexdigest()
        return f"{origin}{quote(path)}?Signature={signature}"

    def check_signature(self, request: Request) -> None:
        if "authorization" in request.headers:
            raise HubError(400, "Only one auth mechanism allowed: a token was sent to the storage")
        path = unquote(request.path)
        expected = hmac.new(self.secret, path.encode(), "sha256").hexdigest()
        if not hmac.compare_digest(request.parameters.get("Signature", [""])[0], expected):
            raise HubError(403, "SignatureDoesNotMatch")

    def receive(self, content: bytes) -> str:
        sha256 = hashlib.sha256(content).hexdigest()
        self.received[sha256] = content
        return sha256

    def paged(self, request: Request, items: list) -> Reply:
        start = int(request.parameters.get("cursor", ["0"])[0])
        headers = {}
        if start + self.page_size < len(items):
            query = urlencode({**request.parameters, "cursor": start + self.page_size}, doseq=True)
            headers["Link"] = f'<{self.endpoint}{request.path}?{query}>; rel="next"'
        return as_json(items[start : start + self.page_size], **headers)


@contextmanager
def online() -> Iterator[None]:
    """
    Let the client of this process reach a HubServer, as HfApi(endpoint=hub.endpoint, token=...).

    conftest.py makes the client offline for good when it is imported. The client asks these two constants at each
    call, and makes a new session, which reads the proxies, after the last one was closed. This is enough for calls
    that take an endpoint. Functions that take none (ModelCard.validate, from_pretrained) need a process of their own,
    with `HubServer.environment`.
    """
    from huggingface_hub import close_session, constants

    close_session()
    with (
        mock.patch.multiple(constants, HF_HUB_OFFLINE=False, HF_HUB_DISABLE_XET=True),
        mock.patch.dict(os.environ, {"NO_PROXY": LOOPBACK, "no_proxy": LOOPBACK}),
    ):
        yield
    close_session()
