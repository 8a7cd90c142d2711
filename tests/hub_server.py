"""A small Hub on this machine that speaks the protocol of huggingface_hub's client, over real HTTP.

Two servers, as in life: the Hub itself (models, commits, file addresses), which wants a token, and a storage of large
files at another address, which must never see one: its addresses are signed. `faults` make either of them fail.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "S3cret" * 6
SIGNATURE = "signature=" + "5igned" * 6
_LARGE = re.compile(r".*\.(safetensors|bin|gguf)")
_MODEL = r"/api/models/(?P<repo>[^/]+/[^/]+)"


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repo:
    """A model: branches (and pull requests) that point to commits, each with all its files."""

    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Mapping[str, bytes], branch: str = "main", message: str = "") -> str:
        """Add a commit to a branch; return its id."""
        facts = [str(len(self.commits)), branch, message, *sorted(files)]
        commit = hashlib.sha1("\n".join(facts).encode()).hexdigest()
        self.commits[commit], self.messages[commit] = dict(files), message
        self.branches[branch] = commit
        return commit

    def files(self, revision: str) -> dict[str, bytes]:
        """Return the files of a branch or a commit."""
        return self.commits[self.branches.get(revision, revision)]


@dataclass
class Fault:
    """How a request fails, a number of times."""

    where: str
    """Regular expression for `METHOD /path`."""
    times: int = 1
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b"{}"
    cut: int | None = None
    """Let go of the connection after so many bytes of the body, sent or received."""
    damage: bool = False
    """Send other bytes than asked for."""
    lost: bool = False
    """Do what is asked, and let go of the connection instead of answering."""
    silence: float = 0.0
    """Seconds to wait before answering."""


@dataclass
class Answer:
    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def as_json(table: Any, status: int = 200, **headers: str) -> Answer:
    return Answer(status, json.dumps(table).encode(), {"Content-Type": "application/json"} | headers)


def error(status: int, code: str = "", message: str = "") -> Answer:
    headers = {"X-Error-Code": code} if code else {}
    return as_json({"error": message or code}, status, **headers, **({"X-Error-Message": message} if message else {}))


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, str]
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Hub:
    """What the Hub holds, how it fails, and what it was asked."""

    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    """Large files by their SHA-256."""
    writable: set[str] = field(default_factory=lambda: {"org"})
    """Organisations that the token may write to."""
    faults: list[Fault] = field(default_factory=list)
    part_bytes: int | None = None
    """Cut uploads into parts of this size."""
    page: int = 1000
    """Files a page of a listing."""
    asked: list[str] = field(default_factory=list)
    """`METHOD /path` of every request, to both servers."""
    tokens: set[str | None] = field(default_factory=set)
    """What the Hub got as Authorization."""
    tokens_at_storage: set[str | None] = field(default_factory=set)
    received: int = 0
    """Bytes of large files that arrived, also those of uploads that broke off."""
    served: int = 0
    """Bytes of large files that were sent, also those that nobody read."""
    ranges: bool = True
    """Whether the storage knows ranges; else it sends everything."""
    on_upload: Callable[[], None] = lambda: None
    """Called for every block of a large file that arrives."""
    address: str = ""
    storage: str = ""
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    connections: int = 0
    """Which are open, to both servers."""
    changed: threading.Condition = field(default_factory=threading.Condition)
    """Held where handlers, a thread each, count."""

    def wait_until_quiet(self) -> None:
        """Wait until every connection has ended: what a killed client had sent has arrived then."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.connections == 0, timeout=60)

    def add(self, repo_id: str, files: Mapping[str, bytes], **options: Any) -> Repo:
        """Put a model there."""
        repo = self.repos[repo_id] = Repo(**options)
        repo.commit(files)
        for name, content in files.items():
            if _LARGE.fullmatch(name):
                self.objects[hashlib.sha256(content).hexdigest()] = content
        return repo

    def fault(self, request: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and re.search(fault.where, request):
                fault.times -= 1
                return fault
        return None

    # What the Hub answers

    def answer(self, request: Request) -> Answer:
        """Return the Hub's answer."""
        token = request.headers.get("Authorization")
        self.tokens.add(token)
        if token is not None and token != f"Bearer {TOKEN}":
            return error(401, message="Invalid credentials in Authorization header")
        for route, act in self._routes().items():
            method, _, path = route.partition(" ")
            match = re.fullmatch(path, request.path)
            if match is None or method not in (request.method, "ANY"):
                continue
            values = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
            refusal = self._refusal(values["repo"], request, token) if "repo" in values else None
            return refusal or act(request, **values)
        return error(404, message=f"no such address: {request.path}")

    def _routes(self) -> dict[str, Callable[..., Answer]]:
        return {
            "GET /api/whoami-v2": self._whoami,
            "POST /api/repos/create": self._create,
            "POST /api/validate-yaml": lambda request: as_json({"warnings": [], "errors": []}),
            f"POST {_MODEL}/branch/(?P<branch>[^/]+)": self._branch,
            f"POST {_MODEL}/preupload/(?P<revision>[^/]+)": self._preupload,
            f"POST {_MODEL}/commit/(?P<revision>[^/]+)": self._commit,
            f"POST {_MODEL}/paths-info/(?P<revision>[^/]+)": self._tree,
            f"GET {_MODEL}/tree/(?P<revision>[^/]+)": self._tree,
            f"GET {_MODEL}(/revision/(?P<revision>[^/]+))?": self._info,
            r"POST /(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch": self._batch,
            r"POST /(?P<repo>[^/]+/[^/]+)\.git/info/lfs/verify": self._verify,
            "ANY /(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)": self._resolve,
        }

    def _refusal(self, repo_id: str, request: Request, token: str | None) -> Answer | None:
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and token is None):
            return error(404 if token else 401, "RepoNotFound", "Repository not found")
        if repo.gated and "/resolve/" in request.path:
            return error(403, "GatedRepo", f"Access to model {repo_id} is restricted")
        changes = request.method == "POST" and not request.path.endswith("/paths-info")
        proposes = request.query.get("create_pr") or "/lfs/" in request.path
        if changes and not proposes and repo_id.split("/")[0] not in self.writable:
            return error(403, message="you may not write here")
        return None

    def _whoami(self, request: Request) -> Answer:
        return as_json({"name": "somebody"}) if request.headers.get("Authorization") else error(401)

    def _create(self, request: Request) -> Answer:
        table = request.json
        repo_id = f"{table['organization']}/{table['name']}"
        if not request.headers.get("Authorization"):
            return error(401, message="Invalid username or password.")
        if table["organization"] not in self.writable:
            return error(403, message=f"You don't have the rights to create a model under {table['organization']}")
        if repo_id in self.repos:
            return as_json({"error": "You already created this model repo", "url": f"{self.address}/{repo_id}"}, 409)
        private = table.get("visibility") == "private" or bool(table.get("private"))
        self.repos[repo_id] = Repo(private)
        self.repos[repo_id].commit({".gitattributes": b"*.safetensors filter=lfs\n"}, message="initial commit")
        return as_json({"url": f"{self.address}/{repo_id}"})

    def _branch(self, request: Request, repo: str, branch: str) -> Answer:
        branches = self.repos[repo].branches
        if branch in branches:
            return error(409, message="Reference already exists")
        branches[branch] = branches["main"]
        return as_json({})

    def _preupload(self, request: Request, repo: str, revision: str) -> Answer:
        if revision not in self.repos[repo].branches:
            return error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        there, found = self.repos[repo].files(revision), []
        for file in request.json["files"]:
            name, large = file["path"], bool(_LARGE.fullmatch(file["path"]))
            one = {"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if name in there:
                one["oid"] = hashlib.sha256(there[name]).hexdigest() if large else git_sha1(there[name])
            found.append(one)
        return as_json({"files": found})

    def _batch(self, request: Request, repo: str) -> Answer:
        found = []
        for wanted in request.json["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            one: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.objects:
                place = f"{self.storage}/objects/{oid}"
                upload: dict[str, Any] = {"href": f"{place}?{SIGNATURE}"}
                if self.part_bytes is not None and size > self.part_bytes:
                    count = -(-size // self.part_bytes)
                    parts = {str(n): f"{place}/{n}?{SIGNATURE}" for n in range(1, count + 1)}
                    header = {"chunk_size": str(self.part_bytes)} | parts
                    upload = {"href": f"{place}/complete?{SIGNATURE}", "header": header}
                verify = {"href": f"{self.address}/{repo}.git/info/lfs/verify"}
                one["actions"] = {"upload": upload, "verify": verify}
            found.append(one)
        return as_json({"transfer": "basic", "objects": found})

    def _verify(self, request: Request, repo: str) -> Answer:
        there = len(self.objects.get(request.json["oid"], b"")) == request.json["size"]
        return as_json({}) if there else error(422, message="the object is not there")

    def _commit(self, request: Request, repo: str, revision: str) -> Answer:
        here = self.repos[repo]
        if revision not in here.branches:
            return error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files, message = dict(here.files(revision)), ""
        for line in request.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.objects:
                    return error(400, message=f"{value['path']} was not uploaded")
                files[value["path"]] = self.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        number = 1 + sum(name.startswith("refs/pr/") for name in here.branches)
        proposed = request.query.get("create_pr") == "1"
        commit = here.commit(files, f"refs/pr/{number}" if proposed else revision, message)
        made: dict[str, Any] = {"commitUrl": f"{self.address}/{repo}/commit/{commit}", "commitOid": commit}
        if proposed:
            made["pullRequestUrl"] = f"{self.address}/{repo}/discussions/{number}"
        return as_json(made)

    def _info(self, request: Request, repo: str, revision: str = "main") -> Answer:
        here = self.repos[repo]
        commit = here.branches.get(revision, revision)
        if commit not in here.commits:
            return error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        siblings = [{"rfilename": name} for name in here.commits[commit]]
        return as_json({"id": repo, "sha": commit, "private": here.private, "gated": here.gated, "siblings": siblings})

    def _tree(self, request: Request, repo: str, revision: str) -> Answer:
        here = self.repos[repo]
        if here.branches.get(revision, revision) not in here.commits:
            return error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        wanted = set(request.json["paths"]) if request.method == "POST" else None
        files = [(name, c) for name, c in here.files(revision).items() if wanted is None or name in wanted]
        begin = int(request.query.get("cursor", 0))
        found = []
        for name, content in files[begin : begin + self.page]:
            one: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": git_sha1(content)}
            if _LARGE.fullmatch(name):
                one["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            found.append(one)
        if begin + self.page >= len(files):
            return as_json(found)
        following = f"{self.address}{request.path}?recursive=true&cursor={begin + self.page}"
        return as_json(found, Link=f'<{following}>; rel="next"')

    def _resolve(self, request: Request, repo: str, revision: str, name: str) -> Answer:
        here = self.repos[repo]
        commit = here.branches.get(revision, revision)
        if commit not in here.commits:
            return error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if name not in here.commits[commit]:
            return error(404, "EntryNotFound", "Entry not found")
        content, known = here.commits[commit][name], {"X-Repo-Commit": commit}
        if not _LARGE.fullmatch(name):
            return _range(request, content, known | {"ETag": f'"{git_sha1(content)}"'})
        oid = hashlib.sha256(content).hexdigest()
        known |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        return Answer(302, b"", known | {"Location": f"{self.storage}/objects/{oid}?{SIGNATURE}"})

    # What the storage answers

    def stored(self, request: Request) -> Answer:
        """Return the storage's answer."""
        self.tokens_at_storage.add(request.headers.get("Authorization"))
        match = re.fullmatch(r"/objects/(?P<oid>\w+)(/(?P<part>\d+|complete))?", request.path)
        if match is None or f"signature={request.query.get('signature')}" != SIGNATURE:
            return error(403, message="not signed")
        if request.method in ("GET", "HEAD"):
            content = self.objects.get(match["oid"])
            if content is None:
                return error(404)
            known = {"ETag": f'"{match["oid"]}"'}
            return _range(request, content, known) if self.ranges else Answer(200, content, known)
        if match["part"] is None:
            return self._keep(match["oid"], request.body)
        if match["part"] == "complete":
            return self._complete(request, match["oid"])
        self.parts.setdefault(match["oid"], {})[int(match["part"])] = request.body
        return Answer(200, b"", {"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})

    def _complete(self, request: Request, oid: str) -> Answer:
        parts = self.parts.pop(oid, {})
        named = [(part["partNumber"], part["etag"]) for part in request.json["parts"]]
        if named != [(n, f'"{hashlib.md5(part).hexdigest()}"') for n, part in sorted(parts.items())]:
            return error(400, message="the parts are not those that were sent")
        return self._keep(oid, b"".join(part for _, part in sorted(parts.items())))

    def _keep(self, oid: str, content: bytes) -> Answer:
        if hashlib.sha256(content).hexdigest() != oid:
            return error(400, message="the content does not have the digest")
        self.objects[oid] = content
        return as_json({})


def _range(request: Request, content: bytes, headers: dict[str, str]) -> Answer:
    """Return a file or a part of it: its beginning, or the rest from where a broken download stopped."""
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if asked is None:
        return Answer(200, content, headers)
    begin, end = int(asked[1]), min(int(asked[2] or len(content) - 1) + 1, len(content))
    if begin >= len(content):
        return Answer(416, b"", headers | {"Content-Range": f"bytes */{len(content)}"})
    return Answer(206, content[begin:end], headers | {"Content-Range": f"bytes {begin}-{end - 1}/{len(content)}"})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    is_storage: bool

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        asked = f"{self.command} {unquote(parts.path)}"
        self.hub.asked.append(asked)
        fault = self.hub.fault(asked) or Fault(asked)
        threading.Event().wait(fault.silence)  # tests replace time.sleep
        body = self._body(fault.cut if self.command in ("PUT", "POST") else None)
        if body is None:
            self.close_connection = True
            return
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        request = Request(self.command, parts.path, query, self.headers, body)
        if fault.status is not None:
            answer = Answer(fault.status, fault.body, fault.headers)
        else:
            answer = self.hub.stored(request) if self.is_storage else self.hub.answer(request)
        if fault.lost:
            self.close_connection = True
            return
        self._send(answer, fault)

    do_GET = do_HEAD = do_PUT = do_POST = _serve

    def _body(self, cut: int | None) -> bytes | None:
        """Read what is sent, None where the connection is let go of."""
        body = b""
        for block in self._blocks():
            body += block
            if self.is_storage:
                with self.hub.changed:
                    self.hub.received += len(block)
                self.hub.on_upload()
            if cut is not None and len(body) >= cut:
                return None
        return body

    def _blocks(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length", 0))
        while left:
            block = self.rfile.read(min(left, 1 << 16))
            if not block:
                raise ConnectionError("the client went away")
            left -= len(block)
            yield block

    def _send(self, answer: Answer, fault: Fault) -> None:
        body = bytes(255 - byte for byte in answer.body) if fault.damage else answer.body
        self.send_response(answer.status)
        for name, value in (answer.headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault.cut is not None:
            body, self.close_connection = body[: fault.cut], True
        for begin in range(0, len(body), 1 << 16):
            block = body[begin : begin + (1 << 16)]
            if self.is_storage:
                with self.hub.changed:
                    self.hub.served += len(block)
            self.wfile.write(block)

    def log_message(self, *words: object) -> None:
        """Say nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: Hub

    def process_request(self, request: Any, client_address: Any) -> None:
        """Count a connection; its handler runs in a thread of its own."""
        with self.hub.changed:
            self.hub.connections += 1
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Count it no more."""
        super().shutdown_request(request)
        with self.hub.changed:
            self.hub.connections -= 1
            self.hub.changed.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that are killed go away without a word."""


def files_of(folder: Path) -> dict[str, bytes]:
    """Return what a model on disk is as a model of the Hub."""
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Run a Hub while a test lasts."""
    hub = Hub()
    servers = []
    for is_storage in (False, True):
        handler = type("Handler", (_Handler,), {"hub": hub, "is_storage": is_storage})
        server = _Server(("127.0.0.1", 0), handler)
        server.hub = hub
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    # Two names, so that the client takes them for two machines.
    hub.address, hub.storage = (
        f"http://{name}:{server.server_port}" for name, server in zip(("127.0.0.1", "localhost"), servers, strict=True)
    )
    try:
        yield hub
    finally:
        for server in servers:
            with suppress(OSError):
                server.shutdown()
                server.server_close()
