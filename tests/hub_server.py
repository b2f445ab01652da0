"""A small Hub on loopback for the real clients, with faults on demand.

It speaks what `huggingface_hub`, `transformers` and `datasets` ask for: create, preupload, LFS, commit, info, tree,
resolve with ranges. Everything lives in memory. `with running_hub() as hub:` starts it in a thread of this process;
clients must run in fresh subprocesses with `hub.environment(...)`, because they read HF_ENDPOINT at import.
"""

import asyncio
import base64
import hashlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

LFS_SUFFIXES = (".safetensors", ".parquet", ".png", ".jpg", ".npy")
KINDS = {"models": "", "datasets": "datasets/", "spaces": "spaces/"}
TOKEN = "hf_" + "LoopbackTokenForTests" + "0123456789abc"


@dataclass
class Repository:
    """One repository: branches and commits, each commit a whole tree of {path: content}."""

    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], branch: str, message: str) -> str:
        digest = hashlib.sha1(f"{time.time_ns()}{message}".encode())
        for name, content in sorted(files.items()):
            digest.update(name.encode() + content)
        sha = digest.hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def find(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)


@dataclass
class Fault:
    """What goes wrong, for the next `times` requests whose "METHOD /path" matches."""

    # A status such as "500"; "cut" (half the body), "checksum" (one byte flipped), "slow" (stalls `seconds`), "gated",
    # or a 404 by the name that the Hub gives it.
    kind: str
    match: str
    times: int = 1
    seconds: float = 2.0
    hits: int = 0


class Hub:
    """The server's state, shared with the test's own process."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []  # of the test
        self.client_faults: list[Fault] = []  # that a client asked for
        self.requests: list[str] = []
        self.authorizations: set[str] = set()
        self.url = ""

    def repository(self, name: str, kind: str = "models") -> Repository:
        return self.repositories[(kind, name)]

    def files(self, name: str, kind: str = "models", revision: str = "main") -> dict[str, bytes]:
        repository = self.repository(name, kind)
        return repository.commits[repository.branches[revision]]

    def put(self, name: str, source: Path | dict[str, bytes], kind: str = "models", **facts: Any) -> str:
        """A repository from a folder or from contents; returns its commit."""
        if isinstance(source, Path):
            source = {str(p.relative_to(source)): p.read_bytes() for p in sorted(source.rglob("*")) if p.is_file()}
        repository = self.repositories.setdefault((kind, name), Repository(**facts))
        return repository.commit(dict(source), "main", "put")

    def fault(self, kind: str, match: str, times: int = 1, seconds: float = 3.0) -> Fault:
        fault = Fault(kind, match, times, seconds)
        self.faults.append(fault)
        return fault

    def reset(self) -> None:
        self.faults.clear()
        self.client_faults.clear()
        self.requests.clear()

    def environment(self, home: Path, **extra: str) -> dict[str, str]:
        """The environment of a client: this Hub alone, an empty cache, no network beside loopback."""
        kept = {
            key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "DISABLE_SAFE"))
        }
        return {
            **kept,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_TOKEN": TOKEN,
            "OMP_NUM_THREADS": "1",
            "NO_PROXY": "*",
            **extra,
        }

    # ---- requests -----------------------------------------------------------------------------------------------

    async def handle(self, request: Request) -> Response:
        path = request.url.path
        line = f"{request.method} {path}"
        self.requests.append(line)
        self.authorizations.add(request.headers.get("authorization", ""))
        fault = next(
            (f for f in self.faults + self.client_faults if f.hits < f.times and re.search(f.match, line)), None
        )
        if fault is not None:
            fault.hits += 1
            if fault.kind.isdigit():
                await request.body()
                headers = {"Retry-After": "1"} if fault.kind == "429" else {}
                return JSONResponse({"error": f"fault {fault.kind}"}, int(fault.kind), headers)
            if fault.kind == "gated":
                return _gated("org/name")
            if fault.kind in ("RepoNotFound", "RevisionNotFound", "EntryNotFound"):
                return _missing(fault.kind, fault.kind)
            if fault.kind == "slow":
                await asyncio.sleep(fault.seconds)
        response = await self._answer(request, path)
        if fault is not None and fault.kind == "checksum" and response.body:
            body = bytearray(response.body)
            body[-1] ^= 0xFF
            return Response(bytes(body), response.status_code, dict(response.headers))
        if fault is not None and fault.kind == "cut" and response.body:
            return StreamingResponse(_half(bytes(response.body)), response.status_code, dict(response.headers))
        return response

    async def _answer(self, request: Request, path: str) -> Response:
        if path == "/api/whoami-v2":
            return JSONResponse({"type": "user", "name": "tester", "orgs": [], "auth": {"type": "access_token"}})
        if path == "/api/validate-yaml":
            return JSONResponse({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(await request.json())
        if match := re.fullmatch(r"/_lfs/([0-9a-f]{64})", path):
            return self._store(match[1], await request.body())
        if path == "/_test/fault":
            fault = await request.json()
            self.client_faults = [Fault(**fault)] if fault else []
            self.objects.clear()  # so that a next push really sends its files
            return JSONResponse({})
        if path == "/_test/hits":
            return JSONResponse({"hits": sum(fault.hits for fault in self.client_faults)})
        if path == "/_lfs/verify":
            return JSONResponse({}, 200 if (await request.json())["oid"] in self.objects else 404)
        if match := re.fullmatch(r"/(?:datasets/|spaces/)?[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            return self._batch(await request.json())
        if match := re.fullmatch(r"/api/(models|datasets|spaces)/([^/]+/[^/]+)(?:/([a-z-]+)(?:/(.+))?)?", path):
            return await self._api(request, match[1], match[2], match[3], match[4])
        if match := re.fullmatch(
            r"/(datasets/|spaces/)?([^/]+/[^/]+)/resolve/((?:refs/[a-z]+/[^/]+)|[^/]+)/(.+)", path
        ):
            kind = {prefix: kind for kind, prefix in KINDS.items()}[match[1] or ""]
            return self._resolve(request, kind, match[2], match[3], match[4])
        return _missing("EntryNotFound", f"no route {path}")

    def _create(self, body: dict[str, Any]) -> Response:
        kind = body.get("type", "model") + "s"
        name = f"{body.get('organization') or 'tester'}/{body['name']}"
        url = f"{self.url}/{KINDS[kind]}{name}"
        if (kind, name) in self.repositories:
            return JSONResponse({"error": "You already created this repo", "url": url}, 409)
        private = body.get("private") or body.get("visibility") == "private"
        repository = self.repositories[(kind, name)] = Repository(private=bool(private))
        repository.commit({}, "main", "initial commit")
        return JSONResponse({"url": url, "name": name, "id": name})

    def _store(self, oid: str, content: bytes) -> Response:
        if hashlib.sha256(content).hexdigest() != oid:
            return JSONResponse({"error": "the content does not match its checksum"}, 400)
        self.objects[oid] = content
        return Response(status_code=200)

    def _batch(self, body: dict[str, Any]) -> Response:
        objects = []
        for entry in body["objects"]:
            actions = {}
            if entry["oid"] not in self.objects:
                actions = {
                    "upload": {"href": f"{self.url}/_lfs/{entry['oid']}"},
                    "verify": {"href": f"{self.url}/_lfs/verify"},
                }
            objects.append({**entry, "authenticated": True, **({"actions": actions} if actions else {})})
        return JSONResponse({"transfer": "basic", "objects": objects})

    async def _api(self, request: Request, kind: str, name: str, verb: str | None, rest: str | None) -> Response:
        repository = self.repositories.get((kind, name))
        if repository is None:
            return _missing("RepoNotFound", "Repository not found")
        if repository.gated:
            return _gated(name)
        if verb == "refs":
            branches = [
                {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": sha}
                for branch, sha in repository.branches.items()
            ]
            return JSONResponse({"branches": branches, "converts": [], "tags": []})
        if verb == "branch":
            if rest in repository.branches:
                return JSONResponse({"error": "Reference already exists"}, 409)
            repository.branches[str(rest)] = repository.branches["main"]
            return JSONResponse({}, 201)
        if verb in ("tree", "paths-info"):
            revision, inner = _split_revision(str(rest))
        else:
            revision, inner = rest or "main", ""
        if verb == "commit" and revision not in repository.branches:
            return _missing("RevisionNotFound", f"Invalid rev id: {revision}")
        sha = repository.find(revision)
        if sha is None:
            return _missing("RevisionNotFound", f"Invalid rev id: {revision}")
        files = repository.commits[sha]
        if verb is None or verb == "revision":
            siblings = [{"rfilename": path} for path in sorted(files)]
            facts = {"id": name, "sha": sha, "private": repository.private, "siblings": siblings, "tags": []}
            return JSONResponse({**facts, "gated": False, "disabled": False, "downloads": 0, "likes": 0})
        if verb == "preupload":
            wanted = (await request.json())["files"]
            modes = [
                {
                    "path": entry["path"],
                    "uploadMode": "lfs" if entry["path"].endswith(LFS_SUFFIXES) else "regular",
                    "shouldIgnore": False,
                }
                for entry in wanted
            ]
            return JSONResponse({"files": modes})
        if verb == "commit":
            return await self._commit(request, kind, name, repository, revision)
        if verb == "tree":
            recursive = request.query_params.get("recursive", "").lower() in ("true", "1")
            return JSONResponse(_tree(files, inner, recursive))
        if verb == "paths-info":
            form = await request.form() if "form" in request.headers.get("content-type", "") else None
            paths = form.getlist("paths") if form is not None else (await request.json())["paths"]
            entries = {entry["path"]: entry for entry in _tree(files, "", True)}
            return JSONResponse([entries[path] for path in paths if path in entries])
        return _missing("EntryNotFound", f"no verb {verb}")

    async def _commit(self, request: Request, kind: str, name: str, repository: Repository, revision: str) -> Response:
        files = dict(repository.commits[repository.branches[revision]])
        message = ""
        for line in (await request.body()).splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.objects:
                    return JSONResponse({"error": f"LFS object {value['oid']} was never uploaded"}, 400)
                files[value["path"]] = self.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        facts: dict[str, Any] = {"success": True}
        if request.query_params.get("create_pr") in ("1", "true"):
            number = 1 + sum(branch.startswith("refs/pr/") for branch in repository.branches)
            revision = f"refs/pr/{number}"
            facts["pullRequestUrl"] = f"{self.url}/{KINDS[kind]}{name}/discussions/{number}"
        sha = repository.commit(files, revision, message)
        return JSONResponse({**facts, "commitOid": sha, "commitUrl": f"{self.url}/{KINDS[kind]}{name}/commit/{sha}"})

    def _resolve(self, request: Request, kind: str, name: str, revision: str, path: str) -> Response:
        repository = self.repositories.get((kind, name))
        if repository is None:
            return _missing("RepoNotFound", "Repository not found")
        if repository.gated:
            return _gated(name)
        sha = repository.find(revision)
        if sha is None:
            return _missing("RevisionNotFound", f"Invalid rev id: {revision}")
        content = repository.commits[sha].get(path)
        if content is None:
            response = _missing("EntryNotFound", "Entry not found")
            response.headers["X-Repo-Commit"] = sha
            return response
        etag = _etag(path, content)
        headers = {"X-Repo-Commit": sha, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if path.endswith(LFS_SUFFIXES):
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        status = 200
        if request.method == "GET" and (span := re.match(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))):
            first, last = int(span[1]), int(span[2] or len(content) - 1)
            if first >= len(content):
                return Response(status_code=416, headers={"Content-Range": f"bytes */{len(content)}"})
            headers["Content-Range"] = f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"
            content, status = content[first : last + 1], 206
        if request.method == "HEAD":
            return Response(headers={**headers, "Content-Length": str(len(content))})
        return Response(content, status, headers, media_type="application/octet-stream")


async def _half(body: bytes) -> AsyncIterator[bytes]:
    yield body[: len(body) // 2]
    raise ConnectionResetError("fault: the connection is cut here")


def _etag(path: str, content: bytes) -> str:
    """As git and git-LFS name contents."""
    if path.endswith(LFS_SUFFIXES):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _split_revision(rest: str) -> tuple[str, str]:
    if rest.startswith("refs/"):
        parts = rest.split("/", 3)
        return "/".join(parts[:3]), parts[3] if len(parts) > 3 else ""
    revision, _, inner = rest.partition("/")
    return revision, inner


def _tree(files: dict[str, bytes], inner: str, recursive: bool) -> list[dict[str, Any]]:
    prefix = f"{inner}/" if inner else ""
    entries: dict[str, dict[str, Any]] = {}
    for path, content in sorted(files.items()):
        if not path.startswith(prefix):
            continue
        parts = path[len(prefix) :].split("/")
        for depth in range(1, len(parts) if recursive else min(2, len(parts))):
            folder = prefix + "/".join(parts[:depth])
            entries.setdefault(folder, {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0})
        if recursive or len(parts) == 1:
            entry = {"type": "file", "path": path, "oid": _etag("", content), "size": len(content)}
            if path.endswith(LFS_SUFFIXES):
                entry["lfs"] = {"oid": _etag(path, content), "size": len(content), "pointerSize": 134}
            entries[path] = entry
    return list(entries.values())


def _missing(code: str, message: str) -> Response:
    return JSONResponse({"error": message}, 404, {"X-Error-Code": code, "X-Error-Message": message})


def _gated(name: str) -> Response:
    message = f"Access to model {name} is restricted. You must have access to it and be authenticated."
    return JSONResponse({"error": message}, 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": message})


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub on a free port of loopback."""
    hub = Hub()
    methods = ["GET", "HEAD", "POST", "PUT", "DELETE"]
    app = Starlette(routes=[Route("/{path:path}", hub.handle, methods=methods)])
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    hub.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield hub
    finally:
        server.should_exit = True
        thread.join(5)
        listener.close()
