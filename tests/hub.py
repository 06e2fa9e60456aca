"""A model hub on this machine: as much of its HTTP interface as its own client uses to publish a
model and to get it again. Large files go through the LFS protocol, small ones into the commit."""

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

import yaml

TOKEN = "hf_test"
#: Files of this size and more are uploaded with LFS.
LARGE = 100_000


@dataclass
class Hub:
    """The models, the blobs, and what was asked for. A file in `ignored` is left out, as an ignore
    file in the repository makes the client do."""

    url: str = ""
    models: dict[str, dict[str, bytes]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    commits: list[list[dict[str, Any]]] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    ignored: set[str] = field(default_factory=set)

    def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        files = self.models[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.commits.append(lines)


def oid(content: bytes) -> str:
    """The name of a file's content: that of LFS for large files, that of git for small ones."""
    if len(content) >= LARGE:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0%s" % (len(content), content)).hexdigest()


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Serve a hub on a free port until the block ends."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the base class names it
        self.state.requests.append(f"{self.command} {self.path}")

    def _answer(self, status: int, content: Any = None, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _missing(self, code: str = "RepoNotFound") -> None:
        self._answer(404, {"error": "not found"}, X_Error_Code=code)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+", path):
            files = self.state.models.get(found[1], {})
            return self._answer(200, [
                {"type": "file", "path": name, "size": len(content), "oid": oid(content)}
                for name, content in files.items()
            ])  # fmt: skip
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/main)?", path):
            files = self.state.models.get(found[1])
            if files is None:
                return self._missing()
            siblings = [{"rfilename": name} for name in files]
            return self._answer(200, {"id": found[1], "sha": "0" * 40, "siblings": siblings})
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            content = self.state.models.get(found[1], {}).get(found[2])
            if content is None:
                return self._missing("EntryNotFound")
            digest = hashlib.sha256(content).hexdigest()
            return self._answer(200, content, ETag=f'"{digest}"', X_Repo_Commit="0" * 40)
        return self._missing()

    do_HEAD = do_GET  # noqa: N815  # the base class names it

    def do_PUT(self) -> None:
        content = self._body()
        self.state.blobs[hashlib.sha256(content).hexdigest()] = content
        self._answer(200)

    def do_POST(self) -> None:
        body = self._body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid username or password."})
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            held = self.state.models[found[1]]
            return self._answer(200, {"files": [
                {
                    "path": one["path"], "uploadMode": "lfs" if one["size"] >= LARGE else "regular",
                    "shouldIgnore": one["path"] in self.state.ignored,
                    "oid": oid(held[one["path"]]) if one["path"] in held else None,
                }
                for one in json.loads(body)["files"]
            ]})  # fmt: skip
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            return self._answer(200, {"transfer": "basic", "objects": [
                {**one, "actions": {"upload": {"href": f"{self.state.url}/lfs/{one['oid']}"}}}
                for one in objects
            ]})  # fmt: skip
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self.state.commit(found[1], [json.loads(line) for line in body.splitlines()])
            url = f"{self.state.url}/{found[1]}/commit/{len(self.state.commits)}"
            return self._answer(200, {"commitUrl": url, "commitOid": "0" * 40})
        return self._missing()

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.state.models:
            found = {
                "error": "You already created this model repo",
                "url": f"{self.state.url}/{name}",
            }
            return self._answer(409, found)
        self.state.models[name] = {".gitattributes": b"*.safetensors filter=lfs\n"}
        return self._answer(200, {"url": f"{self.state.url}/{name}"})

    def _validate(self, content: str) -> None:
        """What the hub checks first: front matter in YAML, with texts under the known keys."""
        data = yaml.safe_load(content.split("---\n")[1])
        wrong = [key for key in ("license", "library_name") if not isinstance(data.get(key), str)]
        if wrong:
            message = f'"{wrong[0]}" must be a string'
            return self._answer(400, {"errors": [{"message": message}], "warnings": []})
        return self._answer(200, {"errors": [], "warnings": []})
