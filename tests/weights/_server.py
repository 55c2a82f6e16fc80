"""Servers on this machine: of plain files, and one that answers as the Hub does. Both can fail."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TypeVar

AnyServer = TypeVar("AnyServer", bound="Server")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Fault:
    """What a request meets; `status` answers with it, the others send part of the file.

    cut: close the connection behind so many bytes of the answer. stall: send nothing more behind
    so many. whole: answer a range with the whole file. claim: another length in the header.
    tail: bytes behind the file.
    """

    def __init__(self, status=None, cut=None, stall=None, whole=False, claim=None, tail=b""):
        self.status, self.cut, self.stall = status, cut, stall
        self.whole, self.claim, self.tail = whole, claim, tail


class Server(ThreadingHTTPServer):
    """Files by path; `fault(path, number)` says what the n-th request of a file meets, or None.

    `lies` are bodies that are sent instead of files; `requests` are (method, path, first byte) of
    all; `hub` answers as the Hub.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes], hub: bool = False):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.hub = files, hub
        self.lies: dict[str, bytes] = {}
        self.gated = False
        self.fault: Callable[[str, int], Fault | None] = lambda path, number: None
        self.requests: list[tuple[str, str, int]] = []
        self.end = threading.Event()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def gets(self, path: str) -> list[int]:
        """First bytes that were asked for."""
        return [start for method, asked, start in self.requests if (method, asked) == ("GET", path)]

    def handle_error(self, request, client_address):
        pass  # a client that goes away


@contextlib.contextmanager
def serving(server: AnyServer) -> Iterator[AnyServer]:
    """The server, for the block."""
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.end.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = self.path.partition("?")[0]
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        with self.server.lock:
            self.server.requests.append((self.command, path, start))
            number = sum(method == "GET" and p == path for method, p, _ in self.server.requests)
        if self.server.gated:
            return self.refuse(403, path)
        fault = (self.server.fault(path, number) if body else None) or Fault()
        content = self.server.files.get(path)
        if fault.status or content is None:
            return self.refuse(fault.status or 404, path)
        whole = self.server.lies.get(path, content) + fault.tail
        if fault.whole:
            start = 0
        if start >= len(whole):
            return self.refuse(416, path)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(fault.claim or len(whole) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
        if self.server.hub:
            self.hub_headers(content)
        self.end_headers()
        if not body:
            return
        for stop in (fault.cut, fault.stall):
            if stop is not None:
                whole = whole[: start + stop]
        with contextlib.suppress(OSError):
            self.wfile.write(whole[start:])
            self.wfile.flush()
        if fault.stall is not None:
            self.server.end.wait()
        self.close_connection = True

    def refuse(self, status, path):
        self.send_response(status)
        if self.server.hub and status == 404:
            repository = "/".join(path.split("/")[:3])
            known = any(name.startswith(f"{repository}/") for name in self.server.files)
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
        if self.server.gated:
            self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def hub_headers(self, content):
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")


class Uploads(Server):
    """The Hub's other side, by the protocol of git-lfs: what is pushed lies in `files` afterwards.

    `allowed` False refuses the token. `committed` are (repository, path) in order.
    """

    def __init__(self):
        super().__init__({}, hub=True)
        self.RequestHandlerClass = _Receiver
        self.allowed, self.objects = True, {}
        self.committed: list[tuple[str, str]] = []


class _Receiver(_Handler):
    server: Uploads  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_POST(self):
        text = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.server.allowed:
            return self.refuse(401, self.path)
        if self.path.endswith("/commit/main"):
            return self.commit([json.loads(line) for line in text.splitlines()])
        asked = json.loads(text)
        if self.path == "/api/repos/create":
            name = f"{asked['organization']}/{asked['name']}"
            return self.tell({"url": f"{self.server.url}/{name}", "name": name, "id": name})
        if self.path == "/api/validate-yaml":
            return self.tell({"errors": [], "warnings": []})
        if self.path.endswith("/preupload/main"):
            modes = {True: "lfs", False: "regular"}
            return self.tell({"files": [
                {"path": x["path"], "uploadMode": modes[x["path"].endswith(".safetensors")],
                 "shouldIgnore": False} for x in asked["files"]
            ]})  # fmt: skip
        assert self.path.endswith("/info/lfs/objects/batch"), self.path
        self.tell({"transfer": "basic", "objects": [
            {**x, "actions": {"upload": {"href": f"{self.server.url}/lfs/{x['oid']}"}}}
            for x in asked["objects"]
        ]})  # fmt: skip

    def do_PUT(self):
        if "Content-Length" in self.headers:
            content = self.rfile.read(int(self.headers["Content-Length"]))
        else:  # in chunks
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.server.objects[self.path.rpartition("/")[2]] = content
        self.tell({})

    def commit(self, lines):
        name = self.path.removeprefix("/api/models/").removesuffix("/commit/main")
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.server.objects[value["oid"]]
            else:
                continue
            self.server.files[f"/{name}/resolve/main/{value['path']}"] = content
            self.server.committed.append((name, value["path"]))
        self.tell({
            "commitUrl": f"{self.server.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT,
            "hookOutput": "",
        })  # fmt: skip

    def tell(self, values):
        text = json.dumps(values).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
