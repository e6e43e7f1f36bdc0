"""A hub on loopback that speaks both hubs' dialects, as their real clients were seen to; it can cut, flip, forget and refuse.

What it says of the protocols was read from modelscope_hub 0.5 and huggingface_hub 2.4; no real hub was reached.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

FIRST, SECOND = "1" * 40, "2" * 40  # two commits


class FakeHub:
    """`commits` holds the files of each commit of the one repository, `branch` what master and main name today."""

    def __init__(self, files: dict[str, bytes]):
        self.repo = "org/tiny"
        self.commits = {FIRST: files}
        self.branch = FIRST
        self.cut: dict[str, int] = {}  # name -> bytes after which the connection breaks, every time
        self.stalled: set[str] = set()  # names after whose cut the line hangs, which `reached` tells, until `released`
        self.reached, self.released = threading.Event(), threading.Event()
        self.flipped: set[str] = set()  # names that arrive with another byte
        self.unhashed: set[str] = set()  # names that ModelScope lists without a Sha256
        self.asked: list[tuple[str, str | None]] = []  # (name, Range header) of every file that was asked for
        self.refusal: tuple[int, dict[str, str]] | None = None  # (status, headers) of every file request
        self.elsewhere = False  # whether files come by way of a redirect to another host, as from a CDN
        self.secrets: list[str | None] = []  # Authorization or Cookie of every request to that other host
        self.writer = "writer"  # the token that may write; others meet 403, none 401
        self.taken = False  # whether the repository is there before an upload
        self.made_private: bool | None = None
        self.pushed: dict[str, bytes] = {}
        self.lfs: dict[str, bytes] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.branch]

    def close(self) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def commit_of(self, revision: str) -> str | None:
        commit = self.branch if revision in ("master", "main") else revision
        return commit if commit in self.commits else None


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def large(name: str) -> bool:
    return name.endswith(".safetensors")


def identity(content: bytes, name: str, commit: str) -> dict[str, str]:
    """The headers in which Hugging Face says what a file is."""
    etag = hashlib.sha256(content).hexdigest() if large(name) else blob_id(content)
    return {"X-Repo-Commit": commit, "X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        path = unquote(url.path)
        if path.startswith("/cdn/"):
            self.hub.secrets.append(self.headers.get("Authorization") or self.headers.get("Cookie"))
            return self.content(path.removeprefix("/cdn/"), self.hub.files)
        if path in ("/api/whoami-v2", "/openapi/v1/users/me"):
            me = {"name": "org", "username": "org"}
            return self.json({**me, "data": me, "success": True}, 200 if self.token() else 401)
        if path.endswith("/auth-check/write"):
            return self.json({}, self.may_write())
        if path == "/api/v1/repos/internalAccelerationInfo":
            return self.json({"Code": 200, "Data": {"InternalRegionQueryAddress": ""}})
        for kind in ("models", "datasets"):
            if path.startswith(f"/api/v1/{kind}/"):
                return self.modelscope(path.removeprefix(f"/api/v1/{kind}/"), query)
        return self.huggingface(path, query)

    do_HEAD = do_GET

    def modelscope(self, path: str, query: dict[str, str]) -> None:
        repo, _, verb = path.partition("/repo")
        commit = self.hub.commit_of(query.get("Revision", "master"))
        if repo != self.hub.repo or commit is None:
            return self.json({"Code": 10010205001, "Message": "not found", "Success": False}, 404)
        files = self.hub.commits[commit]
        if verb in ("/files", "/tree"):
            entries = [
                {"Path": name, "Name": name, "Type": "blob", "Size": len(content), "Revision": commit,
                 "CommittedDate": 1700000000 + int(commit[0]),
                 "Sha256": "" if name in self.hub.unhashed else hashlib.sha256(content).hexdigest()}
                for name, content in files.items()
            ]  # fmt: skip
            return self.json({"Code": 200, "Success": True, "Data": {"Files": entries, "LatestCommitter": {"Id": ""}}})
        return self.file(query["FilePath"], files)

    def huggingface(self, path: str, query: dict[str, str]) -> None:
        parts = path.strip("/").split("/")
        if parts[0] == "datasets":
            parts = parts[1:]
        if parts[:2] in (["api", "models"], ["api", "datasets"]):
            repo, verb = "/".join(parts[2:4]), parts[4:]
            if repo != self.hub.repo:
                return self.json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            revision = verb[1] if len(verb) > 1 else "main"
            commit = self.hub.commit_of(revision)
            if commit is None:
                return self.json({"error": "no such revision"}, 404, {"X-Error-Code": "RevisionNotFound"})
            files = self.hub.commits[commit]
            if verb[:1] == ["tree"]:
                return self.json([
                    {"type": "file", "path": name, "size": len(content), "oid": blob_id(content)}
                    | ({"lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}}
                       if large(name) else {})
                    for name, content in files.items()
                ])  # fmt: skip
            return self.json({"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]})
        if "/".join(parts[:2]) == self.hub.repo and parts[2] == "resolve":
            return self.file("/".join(parts[4:]), self.hub.commits[self.hub.commit_of(parts[3])], parts[3])
        return self.json({"error": "?"}, 404)

    def file(self, name: str, files: dict[str, bytes], commit: str = "") -> None:
        """Hugging Face says in the headers, to whom asks with HEAD, what the file is; `commit` is its alone."""
        asked = self.headers.get("Range")
        if self.command != "HEAD":
            self.hub.asked.append((name, asked))
        if self.hub.refusal:
            status, headers = self.hub.refusal
            return self.json({"error": "no", "Message": "no", "Code": status}, status, headers)
        if name not in files:
            return self.json({"error": "Entry not found", "Code": 404}, 404, {"X-Error-Code": "EntryNotFound"})
        if self.hub.elsewhere:
            port = self.hub.server.server_address[1]
            there = {"Location": f"http://localhost:{port}/cdn/{name}?signed=1"}
            return self.json({}, 302, there | (identity(files[name], name, commit) if commit else {}))
        self.content(name, files, identity(files[name], name, commit) if commit else {})

    def content(self, name: str, files: dict[str, bytes], headers: dict[str, str] | None = None) -> None:
        asked = self.headers.get("Range")
        whole = files[name]
        if name in self.hub.flipped:
            whole = whole[:-1] + bytes([whole[-1] ^ 1])
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        if asked and start >= len(whole):
            return self.json({}, 416, {"Content-Range": f"bytes */{len(whole)}"})
        body = whole[start:]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(body)))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
        for header, value in (headers or {}).items():
            self.send_header(header, value)
        self.end_headers()
        left = self.hub.cut.get(name, len(whole))
        if self.command != "HEAD":
            self.wfile.write(body[: max(0, left - start)])
        if name in self.hub.stalled and self.command != "HEAD":
            self.wfile.flush()
            self.hub.reached.set()
            self.hub.released.wait(60)

    def token(self) -> str | None:
        """What the client logs in with: Hugging Face's in a header, ModelScope's as a cookie or in a header."""
        given = self.headers.get("Authorization", "") + self.headers.get("Cookie", "")
        return given.removeprefix("Bearer ").split("m_session_id=")[-1].split(";")[0] or None

    def may_write(self) -> int:
        return 401 if not self.token() else 200 if self.token() == self.hub.writer else 403

    def do_POST(self) -> None:
        """An upload: make the repository, say which files are large, LFS batch, commit."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path
        status = self.may_write()
        if status != 200 and "/lfs/" not in path:
            return self.json({"error": "no right to write", "Message": "no right to write", "Code": status}, status)
        if path == "/api/v1/models":
            if (
                self.hub.taken or self.hub.made_private is not None
            ):  # the client asks a second time itself, for one that all may see
                return self.json({"Code": 10010201001, "Message": "already exists"}, 400)
            self.hub.made_private = json.loads(body)["Visibility"] == 1
            return self.json({"Code": 200, "Success": True, "Data": {"Path": "org", "Name": "tiny"}})
        if path == "/api/repos/create":
            self.hub.made_private = json.loads(body)["visibility"] == "private"
            return self.json({"url": f"{self.hub.url}/{self.hub.repo}", "name": self.hub.repo, "id": "1"})
        if path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            return self.json({"files": [
                {"path": file["path"], "uploadMode": "lfs" if large(file["path"]) else "regular", "shouldIgnore": False}
                for file in files
            ]})  # fmt: skip
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**thing, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{thing['oid']}", "header": {}}}}
                for thing in json.loads(body)["objects"]
            ]
            return self.json({"transfer": "basic", "objects": objects, "Data": {"objects": objects}, "Code": 200})
        if path.startswith("/api/v1/repos/") and "/commit/" in path:
            for action in json.loads(body)["actions"]:
                inline = action["type"] == "normal"
                self.hub.pushed[action["path"]] = base64.b64decode(action["content"]) if inline else self.hub.lfs[action["sha256"]]
            return self.json({"Code": 200, "Success": True, "Data": {"oid": SECOND}})
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.hub.pushed[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                if line["key"] == "lfsFile":
                    self.hub.pushed[line["value"]["path"]] = self.hub.lfs[line["value"]["oid"]]
            return self.json({"success": True, "commitOid": SECOND, "commitUrl": f"{self.hub.url}/{self.hub.repo}/commit/{SECOND}"})
        return self.json({"error": "?"}, 404)

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.lfs[self.path.removeprefix("/lfs/")] = content
        self.json({})

    def json(self, value, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, content in {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, content)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
