"""A hub on the loopback interface: the endpoints of huggingface_hub, and ways to break them."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import NamedTuple
from urllib.parse import quote, unquote, urlsplit

import pytest

REPO = "org/Model-1"
COMMIT, OLDER = "a" * 40, "b" * 40


class Request(NamedTuple):
    method: str
    path: str
    range: str | None
    authorization: str | None

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[1]


@dataclass
class Hub:
    """A repository, the answers of its server, and the requests so far.

    Attributes:
        other_commits: older commits that can be fetched by name.
        repositories: the files of other repositories by name, each of the same commit.
        refusal: status and X-Error-Code of every answer.
        file_refusal: the same for files alone: a gated repository shows its listing.
        damaged: files sent with other bytes than the listing's hash.
        dropped: files that are listed but gone.
        passing: statuses of the next answers about files.
        elsewhere: the host that files are redirected to.
        bytes_an_answer: after which the connection breaks off.
        bytes_until_down: bytes of contents after which no request is answered.
        sent: bytes of contents by file.
    """

    files: dict[str, bytes]
    commit: str = COMMIT
    other_commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refusal: tuple[int, str] | None = None
    file_refusal: tuple[int, str] | None = None
    damaged: frozenset[str] = frozenset()
    dropped: frozenset[str] = frozenset()
    passing: list[int] = field(default_factory=list)
    has_ranges: bool = True
    elsewhere: str | None = None
    bytes_an_answer: int | None = None
    bytes_until_down: int | None = None
    requests: list[Request] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)
    lock: Lock = field(default_factory=Lock)

    def fetched(self) -> set[str]:
        return {r.name for r in self.requests if r.method == "GET" and "/resolve/" in r.path}

    def forget(self) -> None:
        """Start counting again."""
        self.requests.clear()
        self.sent.clear()

    def come_back(self) -> None:
        """Answer again, without limits."""
        self.bytes_an_answer = self.bytes_until_down = None

    def allowance(self, wanted: int) -> int:
        """Return the number of bytes that one answer carries."""
        with self.lock:
            allowed = min(
                wanted, self.bytes_an_answer if self.bytes_an_answer is not None else wanted
            )
            if self.bytes_until_down is not None:
                allowed = min(allowed, self.bytes_until_down)
                self.bytes_until_down -= allowed
            return allowed

    def of(self, commit: str, repository: str = REPO) -> dict[str, bytes] | None:
        if repository != REPO:
            return self.repositories.get(repository)
        return self.files if commit == self.commit else self.other_commits.get(commit)


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob " + str(len(content)).encode() + b"\0" + content).hexdigest()


def is_large(name: str) -> bool:
    return name.endswith(".safetensors")


def listing(files: dict[str, bytes], name: str) -> dict[str, object]:
    content = files[name]
    sha256, blob = hashlib.sha256(content).hexdigest(), git_sha1(content)
    entry: dict[str, object] = {
        "type": "file",
        "path": name,
        "rfilename": name,
        "size": len(content),
    }
    if is_large(name):
        entry["lfs"] = {"oid": sha256, "sha256": sha256, "size": len(content), "pointerSize": 130}
        blob = git_sha1(b"pointer to " + sha256.encode())
    return entry | {"oid": blob, "blobId": blob}


@contextmanager
def serving(state: Hub) -> Iterator[str]:
    """Serve a hub; yield its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Otherwise every answer waits 40 ms for an acknowledgement.
        wbufsize, disable_nagle_algorithm = -1, True

        def log_message(self, *_: object) -> None:
            pass

        def send(
            self, status: int, content: bytes = b"", *, cut: int | None = None, **headers: str
        ) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content[:cut])
                self.close_connection = cut is not None and cut < len(content)

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            with state.lock:
                headers = self.headers.get("Range"), self.headers.get("Authorization")
                state.requests.append(Request(self.command, path, *headers))
            if state.bytes_until_down == 0:
                self.close_connection = True
                return
            if state.refusal is not None:
                self.send(state.refusal[0], X_Error_Code=state.refusal[1])
            elif "/resolve/" in path:
                repository, _, place = path[1:].partition("/resolve/")
                commit, name = place.split("/")
                self.send_file(commit, name, repository)
            elif "/tree/" in path:
                repository, _, revision = path.removeprefix("/api/models/").partition("/tree/")
                self.send_listing(revision, repository)
            elif repository := self.asked(path):
                revision = path.partition("/revision/")[2] or "main"
                self.send_listing(revision, repository, is_tree=False)
            else:
                self.send(404, X_Error_Code="RepoNotFound")

        def asked(self, path: str) -> str | None:
            """Return the repository whose listing a path asks for, if there is one."""
            for name in (REPO, *state.repositories):
                page = f"/api/models/{name}"
                if path == page or path.startswith(f"{page}/revision/"):
                    return name
            return None

        def send_listing(self, revision: str, repository: str, *, is_tree: bool = True) -> None:
            commit = state.commit if revision in ("main", "v1") else revision
            files = state.of(commit, repository)
            if files is None:
                return self.send(404, X_Error_Code="RevisionNotFound")
            entries = [listing(files, name) for name in files]
            answer = entries if is_tree else {"id": repository, "sha": commit, "siblings": entries}
            return self.send(200, json.dumps(answer).encode())

        def send_file(self, commit: str, name: str, repository: str) -> None:
            with state.lock:
                passing = state.passing.pop(0) if state.passing else None
            files = state.of(commit, repository)
            if state.file_refusal is not None:
                self.send(state.file_refusal[0], X_Error_Code=state.file_refusal[1])
            elif passing is not None:
                self.send(passing, Retry_After="0")
            elif files is None:
                self.send(404, X_Error_Code="RevisionNotFound")
            elif name in state.dropped:
                self.send(404, X_Error_Code="EntryNotFound")
            else:
                self.send_content(commit, name, files[name])

        def send_content(self, commit: str, name: str, content: bytes) -> None:
            etag = (
                f'"{hashlib.sha256(content).hexdigest() if is_large(name) else git_sha1(content)}"'
            )
            if state.elsewhere is not None:
                target = f"{state.elsewhere}/{REPO}/resolve/{commit}/{quote(name)}?Signature=secret"
                return self.send(302, Location=target, X_Linked_Etag=etag, X_Repo_Commit=commit)
            if name in state.damaged:
                content = content[::-1]
            status, begin, extra = 200, 0, {}
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if wanted and state.has_ranges:
                size, status, begin = len(content), 206, int(wanted[1])
                if begin >= size:
                    return self.send(416)
                content = content[begin : int(wanted[2]) + 1 if wanted[2] else None]
                extra = {"Content_Range": f"bytes {begin}-{begin + len(content) - 1}/{size}"}
            cut = state.allowance(len(content)) if self.command == "GET" else 0
            with state.lock:
                state.sent[name] += cut
            return self.send(status, content, cut=cut, ETag=etag, X_Repo_Commit=commit, **extra)

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def use(monkeypatch: pytest.MonkeyPatch, endpoint: str, cache: Path) -> None:
    """Point huggingface_hub at a hub and an empty cache.

    Its constants are set, because it reads its environment variables only at import.
    """
    from huggingface_hub import constants

    for variable in (
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "HF_TOKEN",
    ):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "cache" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def go_offline(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    from huggingface_hub import constants

    if how == "flag":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        # Nobody listens on this port.
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
