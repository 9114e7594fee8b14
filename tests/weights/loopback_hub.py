"""A Hugging Face hub on the loopback: what huggingface_hub asks for to upload and to download.

    with serve() as hub:
        hub.commit("someone/model", {"config.json": b"{}"})
        subprocess.run(..., env=hub.environment(tmp_path / "cache"))

Commands run in processes of their own, since huggingface_hub reads its settings when it is
imported.
"""

import base64
import contextlib
import dataclasses
import hashlib
import http.server
import json
import os
import re
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

# The first may write to repositories of its owner, the other one to none.
OWNER, TOKEN, STRANGER = "someone", "hf_of_someone", "hf_of_a_stranger"
# What real repositories keep as regular files; all others are large files.
REGULAR = (".json", ".md", ".txt")


@dataclasses.dataclass
class Commit:
    oid: str
    message: str
    files: dict[str, bytes]  # of the whole tree


@dataclasses.dataclass
class Repo:
    private: bool = False
    branches: dict[str, list[Commit]] = dataclasses.field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        every = [commit for commits in self.branches.values() for commit in commits]
        return next((commit for commit in every if commit.oid == revision), None)


class Hub:
    """The state of the server.

    Attributes:
      endpoint: for HF_ENDPOINT.
      repos: by owner/name.
      requests: (method, path) of those so far.
      broken: status by a part of the paths whose requests are refused with it.
    """

    def __init__(self) -> None:
        self.endpoint = ""
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []
        self.broken: dict[str, int] = {}
        self.objects: dict[str, bytes] = {}  # large files by their SHA-256

    def create(self, repo: str, *, private: bool = False) -> Repo:
        self.repos[repo] = Repo(private)
        self.commit(repo, {".gitattributes": b""}, message="initial commit")
        return self.repos[repo]

    def commit(
        self, repo: str, files: dict[str, bytes], *, branch: str = "main", message: str = ""
    ) -> Commit:
        """Adds files to a branch, in a repository that need not be there."""
        commits = (self.repos.get(repo) or self.create(repo)).branches.setdefault(branch, [])
        tree = (commits[-1].files if commits else {}) | files
        text = repr((repo, branch, len(commits), message, sorted(tree.items())))
        commits.append(Commit(hashlib.sha1(text.encode()).hexdigest(), message, tree))
        return commits[-1]

    def environment(self, cache: Path, *, token: str | None = TOKEN, **more: str) -> dict[str, str]:
        """The environment of a process that uses this hub alone."""
        plain = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        given = {} if token is None else {"HF_TOKEN": token}
        return plain | given | {
            "HF_ENDPOINT": self.endpoint, "HF_HOME": str(cache), "NO_PROXY": "127.0.0.1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", **more,
        }  # fmt: skip


def _oid(name: str, content: bytes) -> str:
    """As the hub names contents: by Git's hash, and large files by their SHA-256."""
    if name.endswith(REGULAR):
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return hashlib.sha256(content).hexdigest()


class Refusal(Exception):
    def __init__(self, status: int, code: str = "", **body: str) -> None:
        self.status, self.code, self.body = status, code, body


class Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub

    def handle_any(self):
        path = urlsplit(self.path).path  # still quoted: a revision may have a slash
        self.hub.requests.append((self.command, unquote(path)))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {}
        try:
            for part, status in self.hub.broken.items():
                if part in path:
                    raise Refusal(status)
            for method, pattern, answer in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and (self.command.replace("HEAD", "GET")) == method:
                    groups = {key: unquote(value) for key, value in match.groupdict().items()}
                    result = answer(self, body, **groups)
                    break
            else:
                raise Refusal(404)
            status = 200
            if isinstance(result, tuple):
                result, headers = result
            content = result if isinstance(result, bytes) else json.dumps(result).encode()
        except Refusal as refusal:
            status, content = refusal.status, json.dumps(refusal.body).encode()
            if refusal.code:
                headers = {"X-Error-Code": refusal.code}
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def log_message(self, *_):
        pass

    # --- Who may do what --------------------------------------------------------------------------

    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def may_write(self, owner: str) -> None:
        if self.token() not in (TOKEN, STRANGER):
            raise Refusal(401)
        if self.token() != TOKEN or owner != OWNER:
            raise Refusal(403)

    def repo(self, name: str, *, write: bool = False) -> Repo:
        if write:
            self.may_write(name.partition("/")[0])
        found = self.hub.repos.get(name)
        if found is None or (found.private and self.token() != TOKEN):
            raise Refusal(404 if self.token() else 401, "RepoNotFound")
        return found

    def at(self, name: str, revision: str) -> Commit:
        found = self.repo(name).find(revision)
        if found is None:
            raise Refusal(404, "RevisionNotFound")
        return found

    # --- Answers ----------------------------------------------------------------------------------

    def create(self, body):
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        self.may_write(asked["organization"])
        url = f"{self.hub.endpoint}/{name}"
        if name in self.hub.repos:
            raise Refusal(409, url=url)
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.create(name, private=bool(private))
        return {"url": url}

    def branch(self, body, name, branch):
        repo = self.repo(name, write=True)
        if branch in repo.branches:
            raise Refusal(409)
        repo.branches[branch] = list(repo.branches["main"])
        return {}

    def preupload(self, body, name, revision):
        self.repo(name, write=True)
        present = self.at(name, revision).files
        return {
            "files": [
                {
                    "path": path,
                    "uploadMode": "regular" if path.endswith(REGULAR) else "lfs",
                    "shouldIgnore": False,
                    "oid": _oid(path, present[path]) if path in present else None,
                }
                for path in (file["path"] for file in json.loads(body)["files"])
            ]
        }

    def batch(self, body, name):
        self.repo(name, write=True)
        return {
            "transfer": "basic",
            "objects": [
                {**entry, "actions": {"upload": {"href": f"{self.hub.endpoint}/put/{oid}"}}}
                for entry in json.loads(body)["objects"]
                for oid in [entry["oid"]]
            ],
        }

    def put(self, body, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        return {}

    def commit(self, body, name, revision):
        self.repo(name, write=True)
        self.at(name, revision)
        lines = [json.loads(line) for line in body.splitlines()]
        files, message = {}, ""
        for key, value in ((line["key"], line["value"]) for line in lines):
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                raise Refusal(400)
        made = self.hub.commit(name, files, branch=revision, message=message)
        url = f"{self.hub.endpoint}/{name}/commit/{made.oid}"
        return {"success": True, "commitOid": made.oid, "commitUrl": url}

    def info(self, body, name, revision="main"):
        commit = self.at(name, revision)
        return {
            "id": name,
            "modelId": name,
            "sha": commit.oid,
            "private": self.repo(name).private,
            "tags": [],
            "downloads": 0,
            "siblings": [{"rfilename": path} for path in commit.files],
        }

    def refs(self, body, name):
        branches = self.repo(name).branches
        return {
            "branches": [
                {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": commits[-1].oid}
                for branch, commits in branches.items()
            ],
            "tags": [],
            "converts": [],
        }

    def tree(self, body, name, revision):
        entries = []
        for path, content in self.at(name, revision).files.items():
            oid = _oid(path, content)
            entry = {"type": "file", "path": path, "size": len(content), "oid": oid}
            if not path.endswith(REGULAR):
                entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 100}
            entries.append(entry)
        return entries

    def resolve(self, body, name, revision, path):
        commit = self.at(name, revision)
        if path not in commit.files:
            raise Refusal(404, "EntryNotFound")
        content = commit.files[path]
        return content, {"ETag": f'"{_oid(path, content)}"', "X-Repo-Commit": commit.oid}

    def valid_yaml(self, body):
        return {"errors": [], "warnings": []}


_NAME, _REVISION = r"(?P<name>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
ROUTES = (
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.valid_yaml),
    ("POST", rf"/api/models/{_NAME}/branch/(?P<branch>.+)", Handler.branch),
    ("POST", rf"/api/models/{_NAME}/preupload/{_REVISION}", Handler.preupload),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/put/(?P<oid>\w+)", Handler.put),
    ("POST", rf"/api/models/{_NAME}/commit/{_REVISION}", Handler.commit),
    ("GET", rf"/api/models/{_NAME}", Handler.info),
    ("GET", rf"/api/models/{_NAME}/revision/{_REVISION}", Handler.info),
    ("GET", rf"/api/models/{_NAME}/refs", Handler.refs),
    ("GET", rf"/api/models/{_NAME}/tree/{_REVISION}", Handler.tree),
    ("GET", rf"/{_NAME}/resolve/{_REVISION}/(?P<path>.+)", Handler.resolve),
)


@contextlib.contextmanager
def serve():
    """Runs a hub without repositories; gives its `Hub`."""
    hub = Hub()
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
