"""A hub on loopback: what `huggingface_hub`, `datasets` and `evaluate` ask the Hugging Face hub for, and its answers.

Repositories are kept in memory, one dict of files for each commit. Large files are LFS objects, as on the hub: they are
redirected to another host, which is told no token, and which serves parts. Xet is not spoken; clients get
`HF_HUB_DISABLE_XET`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from aiohttp import web

KINDS = ("model", "dataset", "space")
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".parquet", ".png", ".model", ".gz")
OWNER_TOKEN, OTHER_TOKEN = "hf_ownerownerownerowner", "hf_otherotherotherother"
USERS = {OWNER_TOKEN: "owner", OTHER_TOKEN: "other"}
COMMIT_HEADER = "X-Repo-Commit"


@dataclass
class Repository:
    """Files by commit, and commits by name.

    Args:
        kind: `model`, `dataset` or `space`.
        name: With the user's.
        private: Whether its owner alone may see it.
        gated: Whether its files are for its owner alone.
    """

    kind: str
    name: str
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: Mapping[str, bytes], revision: str = "main", message: str = "") -> str:
        """Make `files` the content of a branch or tag. Returns the hash of the commit."""
        sha = hashlib.sha1(f"{self.kind}{self.name}{len(self.commits)}".encode()).hexdigest()
        self.commits[sha], self.refs[revision] = dict(files), sha
        self.messages.append(message)
        return sha

    def resolve(self, revision: str) -> str | None:
        """The hash of a branch, a tag or a hash."""
        return revision if revision in self.commits else self.refs.get(revision)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.refs[revision]]


@dataclass(frozen=True)
class Asked:
    """A request.

    Args:
        method: `GET` for example.
        path: With the query.
        token: `None` where none was sent.
        range: Part of a file.
    """

    method: str
    path: str
    token: str | None
    range: str | None

    @classmethod
    def of(cls, request: web.Request) -> Asked:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        return cls(request.method, request.path_qs, token or None, request.headers.get("Range"))


class Hub:
    """The repositories, the requests that came, and what goes wrong on purpose.

    Args:
        requests: That came.
        cut: Number of bytes of an LFS object after which the next that are sent break off, each entry once.
        limited: Number of requests that are answered with 429 from now on.
        broken: Number of requests that are answered with 500 from now on.
    """

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[Asked] = []
        self.cut: list[int] = []
        self.limited = self.broken = 0
        self.address = self.other_address = ""

    def add(
        self, name: str, files: Path | Mapping[str, bytes], kind: str = "model", revision: str = "main", **access: bool
    ) -> Repository:
        """A repository with the files of a folder; a further commit of one that is there."""
        if isinstance(files, Path):
            files = {str(file.relative_to(files)): file.read_bytes() for file in files.rglob("*") if file.is_file()}
        repository = self.repositories.setdefault((kind, name), Repository(kind, name, **access))
        repository.commit(files, revision)
        repository.refs.setdefault("main", repository.refs[revision])
        return repository

    def seen(self, method: str, part: str) -> list[Asked]:
        """The requests of a method whose path has `part`."""
        return [request for request in self.requests if request.method == method and part in request.path]


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve `hub` from a thread; `hub.address` is what `HF_ENDPOINT` has to be."""
    loop, started = asyncio.new_event_loop(), threading.Event()

    async def start() -> web.AppRunner:
        runner = web.AppRunner(_application(hub))
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        hub.address, hub.other_address = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
        return runner

    def run() -> None:
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(start())
        started.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    started.wait(10)
    try:
        yield hub
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def _application(hub: Hub) -> web.Application:
    answers = _Answers(hub)
    application = web.Application(middlewares=[answers.noted], client_max_size=2**30)
    name = "{name:[^/]+(?:/[^/]+)?}"
    api = "/api/{kind:(?:model|dataset|space)s}/" + name
    routes: list[tuple[str, str, Callable[..., Any]]] = [
        ("GET", "/api/whoami-v2", answers.whoami),
        ("POST", "/api/validate-yaml", answers.validate),
        ("POST", "/api/repos/create", answers.create),
        ("GET", api + "/revision/{revision}", answers.info),
        ("GET", api + "/tree/{revision}", answers.tree),
        ("GET", api + "/tree/{revision}/{folder:.*}", answers.tree),
        ("GET", api + "/refs", answers.refs),
        ("POST", api + "/paths-info/{revision}", answers.paths),
        ("POST", api + "/branch/{revision:.+}", answers.branch),
        ("POST", api + "/preupload/{revision}", answers.preupload),
        ("POST", api + "/commit/{revision}", answers.commit),
        ("GET", api, answers.info),
        ("POST", "/" + name + ".git/info/lfs/objects/batch", answers.batch),
        ("POST", "/{prefix:datasets|spaces}/" + name + ".git/info/lfs/objects/batch", answers.batch),
        ("PUT", "/lfs/{oid}", answers.upload),
        ("GET", "/lfs/{oid}", answers.download),
        ("GET", "/{prefix:datasets|spaces}/" + name + "/resolve/{revision}/{path:.+}", answers.file),
        ("GET", "/" + name + "/resolve/{revision}/{path:.+}", answers.file),
    ]
    for method, path, answer in routes:
        application.router.add_route(method, path, answer)
        if method == "GET":
            application.router.add_route("HEAD", path, answer)
    return application


class RefusalError(Exception):
    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.response = web.json_response(
            {"error": message}, status=status, headers={"X-Error-Code": code, "X-Error-Message": message, **headers}
        )


class _Answers:
    """The handlers of requests."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub

    @property
    def noted(self) -> Any:
        @web.middleware
        async def middleware(request: web.Request, handler: Any) -> web.StreamResponse:
            hub = self.hub
            hub.requests.append(Asked.of(request))
            if hub.limited > 0:
                hub.limited -= 1
                return web.json_response({"error": "Too many requests"}, status=429, headers={"Retry-After": "0"})
            if hub.broken > 0:
                hub.broken -= 1
                return web.json_response({"error": "Internal error"}, status=500)
            try:
                return await handler(request)
            except RefusalError as refusal:
                return refusal.response

        return middleware

    # Who asks for what

    def _user(self, request: web.Request) -> str | None:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in USERS:
            raise RefusalError(401, "", "Invalid credentials in Authorization header")
        return USERS.get(token)

    def _repository(self, request: web.Request, reads_files: bool = False, writes: bool = False) -> Repository:
        kind = request.match_info.get("kind", request.match_info.get("prefix", "models")).removesuffix("s")
        name, user = unquote(request.match_info["name"]), self._user(request)
        repository = self.hub.repositories.get((kind, name))
        is_owner = user is not None and name.partition("/")[0] == user
        if repository is None or (repository.private and not is_owner):
            raise RefusalError(404 if user else 401, "RepoNotFound", "Repository not found")
        if writes and not is_owner:
            raise RefusalError(403, "", "you don't have the rights to create a model under this namespace")
        if reads_files and repository.gated and not is_owner:
            raise RefusalError(403 if user else 401, "GatedRepo", f"Access to {kind} {name} is restricted")
        return repository

    def _commit(self, request: web.Request, repository: Repository) -> str:
        revision = unquote(request.match_info.get("revision", "main"))
        sha = repository.resolve(revision)
        if sha is None:
            raise RefusalError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    async def whoami(self, request: web.Request) -> web.Response:
        user = self._user(request)
        if user is None:
            raise RefusalError(401, "", "Invalid username or password.")
        return web.json_response({"type": "user", "name": user, "fullname": user, "orgs": [], "auth": {}})

    # Reading

    async def info(self, request: web.Request) -> web.Response:
        repository = self._repository(request)
        sha = self._commit(request, repository)
        return web.json_response(
            {
                "_id": sha[:24],
                "id": repository.name,
                "modelId": repository.name,
                "sha": sha,
                "private": repository.private,
                "gated": "manual" if repository.gated else False,
                "tags": [],
                "lastModified": "2026-01-01T00:00:00.000Z",
                "siblings": [{"rfilename": path} for path in repository.commits[sha]],
            }
        )

    async def refs(self, request: web.Request) -> web.Response:
        repository = self._repository(request)
        refs = repository.refs.items()
        branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in refs]
        return web.json_response({"branches": branches, "tags": [], "converts": []})

    async def tree(self, request: web.Request) -> web.Response:
        repository = self._repository(request)
        files = repository.commits[self._commit(request, repository)]
        folder = unquote(request.match_info.get("folder", "")).strip("/")
        inside = [PurePosixPath(path) for path in files if not folder or path.startswith(f"{folder}/")]
        if folder and not inside:
            raise RefusalError(404, "EntryNotFound", f"{folder} does not exist")
        depth = len(PurePosixPath(folder).parts) + 1
        is_recursive = request.query.get("recursive", "").lower() in ("1", "true")
        entries = [_entry(str(path), files[str(path)]) for path in inside if is_recursive or len(path.parts) == depth]
        folders = {str(parent) for path in inside for parent in path.parents if len(parent.parts) >= depth}
        kept = sorted(path for path in folders if is_recursive or len(PurePosixPath(path).parts) == depth)
        return web.json_response([*map(_folder, kept), *entries])

    async def paths(self, request: web.Request) -> web.Response:
        repository = self._repository(request)
        files = repository.commits[self._commit(request, repository)]
        asked = (await request.json())["paths"]
        found: list[dict[str, Any]] = [_entry(path, files[path]) for path in asked if path in files]
        others = [path for path in asked if path not in files]
        found += [_folder(path) for path in others if any(file.startswith(f"{path}/") for file in files)]
        return web.json_response(found)

    async def file(self, request: web.Request) -> web.StreamResponse:
        repository = self._repository(request, reads_files=True)
        sha, path = self._commit(request, repository), unquote(request.match_info["path"])
        if path not in repository.commits[sha]:
            raise RefusalError(404, "EntryNotFound", "Entry not found", **{COMMIT_HEADER: sha})
        content = repository.commits[sha][path]
        headers = {COMMIT_HEADER: sha, "ETag": f'"{_oid(content)}"', "Accept-Ranges": "bytes"}
        if not is_lfs(path):
            return web.Response(body=content, headers=headers)
        oid = hashlib.sha256(content).hexdigest()
        self.hub.objects[oid] = content
        location = f"{self.hub.other_address}/lfs/{oid}"
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content)), "Location": location}
        return web.Response(status=302, headers={**headers, **linked})

    async def download(self, request: web.Request) -> web.StreamResponse:
        content = self.hub.objects[request.match_info["oid"]]
        part = request.http_range
        start, stop = part.start or 0, part.stop or len(content)
        headers = {"Content-Length": str(stop - start), "Accept-Ranges": "bytes"}
        if "Range" in request.headers:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        response = web.StreamResponse(status=206 if "Range" in request.headers else 200, headers=headers)
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        if self.hub.cut:
            await response.write(content[start : start + self.hub.cut.pop(0)])
            request.transport.close()  # type: ignore[union-attr]
            return response
        await response.write(content[start:stop])
        return response

    # Writing

    async def validate(self, request: web.Request) -> web.Response:
        return web.json_response({"errors": [], "warnings": []})

    async def create(self, request: web.Request) -> web.Response:
        user, asked = self._user(request), await request.json()
        if user is None:
            raise RefusalError(401, "", "Invalid username or password.")
        owner, kind = asked.get("organization") or user, asked.get("type") or "model"
        if owner != user:
            raise RefusalError(403, "", f'You don\'t have the rights to create a {kind} under the namespace "{owner}".')
        name = f"{owner}/{asked['name']}"
        prefix = "" if kind == "model" else f"{kind}s/"
        answer = {"url": f"{self.hub.address}/{prefix}{name}", "id": name, "name": name}
        if (kind, name) in self.hub.repositories:
            return web.json_response({"error": "You already created this repo", **answer}, status=409)
        is_private = asked.get("visibility") == "private" or bool(asked.get("private"))
        repository = self.hub.repositories[kind, name] = Repository(kind, name, private=is_private)
        repository.commit({".gitattributes": b""}, message="initial commit")
        return web.json_response(answer)

    async def branch(self, request: web.Request) -> web.Response:
        repository = self._repository(request, writes=True)
        name = unquote(request.match_info["revision"])
        if name in repository.refs:
            return web.json_response({"error": "Reference already exists"}, status=409)
        repository.refs[name] = repository.refs["main"]
        return web.json_response({})

    async def preupload(self, request: web.Request) -> web.Response:
        repository = self._repository(request, writes=True)
        files = repository.commits[self._commit(request, repository)]
        asked = [file["path"] for file in (await request.json())["files"]]
        answer = [
            {
                "path": path,
                "uploadMode": "lfs" if is_lfs(path) else "regular",
                "shouldIgnore": False,
                "oid": _entry(path, files[path]).get("lfs", {}).get("oid", _oid(files[path]))
                if path in files
                else None,
            }
            for path in asked
        ]
        return web.json_response({"files": answer})

    async def batch(self, request: web.Request) -> web.Response:
        self._repository(request, writes=True)
        asked = json.loads(await request.text())["objects"]
        answer = [
            {**each, "actions": {"upload": {"href": f"{self.hub.other_address}/lfs/{each['oid']}", "header": {}}}}
            for each in asked
            if each["oid"] not in self.hub.objects
        ]
        known = [each for each in asked if each["oid"] in self.hub.objects]
        return web.json_response({"transfer": "basic", "objects": [*answer, *known]})

    async def upload(self, request: web.Request) -> web.Response:
        content = await request.read()
        if hashlib.sha256(content).hexdigest() != request.match_info["oid"]:
            return web.Response(status=422)
        self.hub.objects[request.match_info["oid"]] = content
        return web.Response()

    async def commit(self, request: web.Request) -> web.Response:
        repository = self._repository(request, writes=True)
        revision = unquote(request.match_info["revision"])
        files, message = dict(repository.commits[self._commit(request, repository)]), ""
        for line in (await request.read()).splitlines():
            entry = json.loads(line)
            kind, value = entry["key"], entry["value"]
            if kind == "header":
                message = value["summary"]
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
            elif kind == "deletedFolder":
                files = {path: content for path, content in files.items() if not path.startswith(value["path"])}
        sha = repository.commit(files, revision, message)
        url = f"{self.hub.address}/{repository.name}/commit/{sha}"
        return web.json_response({"success": True, "commitOid": sha, "commitUrl": url, "pullRequestUrl": None})


def is_lfs(path: str) -> bool:
    """Whether the hub keeps a file of this name outside of git."""
    return path.endswith(LFS_SUFFIXES)


def _oid(content: bytes) -> str:
    """Git's hash of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
    if is_lfs(path):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry


def _folder(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "oid": "0", "size": 0}
