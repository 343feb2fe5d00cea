"""A stand-in for the Hugging Face hub on loopback: the calls that its client makes, and faults on demand.

LFS files redirect to another host, as the real hub's do, so that a token that follows them is seen.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LFS_FROM = 4096  # bytes; smaller files lie in git itself
TOKEN = "hf_standin"


@dataclass
class Repo:
    files: dict[str, bytes] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    architecture: str = ""
    commits: list[dict[str, bytes]] = field(default_factory=list)

    def commit(self) -> str:
        """Freeze the files as they are; returns the commit's id."""
        if not self.commits or self.commits[-1] != self.files:
            self.commits.append(dict(self.files))
        return f"{len(self.commits):040x}"

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return self.commit(), self.files
        if re.fullmatch("[0-9a-f]{40}", revision) and 1 <= int(revision, 16) <= len(self.commits):
            return revision, self.commits[int(revision, 16) - 1]
        return None


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]


@dataclass
class Hub:
    """What the stand-in holds, what it was asked, and how it misbehaves."""

    repos: dict[str, Repo] = field(default_factory=dict)
    store: dict[str, bytes] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)
    """For each of the next downloads of a large file: after how many bytes the line breaks."""
    spoil: bool = False
    """Large files come with one bit turned."""
    failing: int = 0
    """HTTP status of everything, where it is not 0."""
    url: str = ""

    def add(self, name: str, **files: bytes) -> Repo:
        repo = self.repos.setdefault(name, Repo())
        repo.files.update({key.replace("__", "/"): content for key, content in files.items()})
        repo.commit()
        return repo

    def downloads(self) -> list[Request]:
        return [request for request in self.requests if request.path.startswith("/cdn/")]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_digest(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, status: int, content: bytes = b"", **headers: Any) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def json(self, value: Any, status: int = 200) -> None:
        self.reply(status, json.dumps(value).encode(), Content_Type="application/json")

    def refuse(self, status: int, code: str) -> None:
        self.reply(status, b"{}", X_Error_Code=code, X_Error_Message=code)

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(self.chunks())
        hub.requests.append(Request(self.command, path, {k.lower(): v for k, v in self.headers.items()}))
        if hub.failing:
            return self.reply(hub.failing, b"{}")
        if path.startswith("/cdn/"):
            return self.content(path.removeprefix("/cdn/"))
        if self.headers.get("Authorization", f"Bearer {TOKEN}") != f"Bearer {TOKEN}":
            # as the real hub, which then refuses public repositories too
            return self.reply(401, b"{}", X_Error_Message="Invalid credentials in Authorization header")
        if found := re.fullmatch("/lfs/([0-9a-f]{64})", path):
            hub.store[found[1]] = body
            return self.reply(200)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self.info(found[1], found[2] or "main")
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(found[1], found[2], found[3])
        return self.write(path, body)

    def chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    @property
    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repo(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit and files asked for, or None once the refusal is sent."""
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self.known):
            self.refuse(404 if self.known else 401, "RepoNotFound")
        elif repo.gated and not self.known:
            self.refuse(401, "GatedRepo")
        elif (found := repo.at(revision)) is None:
            self.refuse(404, "RevisionNotFound")
        else:
            return found
        return None

    def info(self, name: str, revision: str) -> None:
        if (found := self.repo(name, revision)) is None:
            return
        siblings = []
        for file, content in found[1].items():
            row: dict[str, Any] = {"rfilename": file, "size": len(content), "blobId": git_digest(content)}
            if len(content) >= LFS_FROM:
                row["lfs"] = {"sha256": sha256(content), "size": len(content), "pointerSize": 134}
            siblings.append(row)
        told: dict[str, Any] = {
            "private": self.hub.repos[name].private,
            "id": name,
            "modelId": name,
            "sha": found[0],
            "siblings": siblings,
            "tags": [],
        }
        if architecture := self.hub.repos[name].architecture:
            told["gguf"] = {"architecture": architecture, "total": 1}
        self.json(told)

    def resolve(self, name: str, revision: str, file: str) -> None:
        if (found := self.repo(name, revision)) is None:
            return
        commit, files = found
        if file not in files:
            return self.refuse(404, "EntryNotFound")
        content = files[file]
        if len(content) < LFS_FROM:
            return self.reply(200, content, X_Repo_Commit=commit, ETag=f'"{git_digest(content)}"')
        digest = sha256(content)
        self.hub.store[digest] = content
        elsewhere = self.hub.url.replace("127.0.0.1", "localhost")
        self.reply(
            302,
            Location=f"{elsewhere}/cdn/{digest}",
            X_Repo_Commit=commit,
            X_Linked_Size=len(content),
            X_Linked_ETag=f'"{digest}"',
            X_Xet_Hash=digest,
            Link=f'<{self.hub.url}/api/models/{name}/xet-read-token/{commit}>; rel="xet-auth"',
        )

    def content(self, digest: str) -> None:
        content = self.hub.store[digest]
        if self.hub.spoil:
            content = content[:-1] + bytes([content[-1] ^ 1])
        start, whole = 0, len(content)
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(found[1])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{whole - 1}/{whole}")
        self.send_header("Content-Length", str(whole - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.cuts:
            self.wfile.write(content[start : start + self.hub.cuts.pop(0)])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
        else:
            self.wfile.write(content[start:])

    def write(self, path: str, body: bytes) -> None:
        if not self.known:
            return self.reply(401, b"{}", X_Error_Message="Invalid credentials in Authorization header")
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.hub.repos:
                return self.json(
                    {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409
                )
            self.hub.repos[name] = Repo(private=asked.get("visibility") == "private")
            return self.json({"url": f"{self.hub.url}/{name}", "id": name})
        if path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] >= LFS_FROM else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self.json({"files": files})
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = []
            for row in json.loads(body)["objects"]:
                upload = {"href": f"{self.hub.url}/lfs/{row['oid']}"}
                objects.append(
                    {**row, "actions": {"upload": upload}} if row["oid"] not in self.hub.store else row
                )
            return self.json({"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            return self.commit(found[1], body)
        self.reply(404, b"{}")

    def commit(self, name: str, body: bytes) -> None:
        repo = self.hub.repos[name]
        for row in map(json.loads, body.splitlines()):
            value = row["value"]
            if row["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                content = self.hub.store[value["oid"]]
                assert (sha256(content), len(content)) == (value["oid"], value["size"])
                repo.files[value["path"]] = content
            elif row["key"] == "deletedFile":
                del repo.files[value["path"]]
        commit = repo.commit()
        self.json(
            {"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit, "success": True}
        )


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Lines that break are what we do here."""


@contextmanager
def serve() -> Iterator[Hub]:
    """Run a stand-in on a free port of loopback."""
    hub = Hub()
    server = Server(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
