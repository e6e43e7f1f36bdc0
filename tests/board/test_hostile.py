"""Requests that mean no good, each with the status that it gets; none of them changes or shows anything."""

import re

import pytest
from starlette.testclient import TestClient

from qwenvl_ft.board.app import make_app
from qwenvl_ft.board.guard import FORM_BYTES, PICTURE_BYTES

EVAL = "file=first/predictions-eval.jsonl"
HOSTILE = [
    ("GET", "/runs/../../etc/passwd", {}, 404), ("GET", "/runs/..%2f..%2fetc%2fpasswd", {}, 404), ("GET", "/runs/%00", {}, 404),
    ("GET", "/runs//etc", {}, 404), ("GET", "/runs/first/../../secret.txt", {}, 404), ("GET", "/runs/" + "a" * 5000, {}, 404),
    ("GET", "/picture?file=../secret.txt&row=0&number=0", {}, 404), ("GET", f"/picture?{EVAL}&row=0&number=1", {}, 404),
    ("GET", f"/picture?{EVAL}&row=-1&number=0", {}, 404), ("GET", f"/picture?{EVAL}&row=1e9&number=0", {}, 404),
    ("GET", f"/picture?{EVAL}&row={'9' * 5000}&number=0", {}, 404), ("GET", "/picture?path=/etc/passwd", {}, 404),
    ("GET", "/picture?file=/etc/passwd&row=0&number=0", {}, 404),
    ("GET", "/questions?file=../../etc/passwd", {}, 404), ("GET", "/questions?file=first/metrics.jsonl", {}, 404),
    ("GET", "/questions", {}, 404), ("GET", "/questions?file=" + "&file=".join("abcdefg"), {}, 400), ("GET", "/questions?" + "&".join([EVAL] * 500) + "&file=x", {}, 404),
    ("GET", f"/questions?{EVAL}&kind=<script>", {}, 400), ("GET", f"/questions?{EVAL}&page=-1", {}, 200),
    ("GET", f"/questions?{EVAL}&page=9{'9' * 999}", {}, 200), ("GET", f"/questions?{EVAL}&search=<script>alert(1)</script>", {}, 200),
    ("GET", "/new?like=../../etc", {}, 200), ("GET", "/compare?run=../first", {}, 400), ("GET", "/pages/base.html", {}, 404),
    ("GET", "/app.py", {}, 404), ("GET", "/?lang=<script>", {}, 200),
    ("GET", "/", {"host": "evil.example"}, 403), ("GET", "/", {"host": "127.0.0.1.evil.example"}, 403), ("GET", "/", {"host": ""}, 403), ("GET", "/", {"host": "]127.0.0.1["}, 403), ("GET", "/", {"host": "127.0.0.1]"}, 403),
    ("GET", "/", {"host": "localhost:8080@evil.example"}, 403), ("GET", "/", {"origin": "http://evil.example"}, 403),
    ("GET", "/", {"origin": "null"}, 403), ("GET", "/", {"origin": "http://127.0.0.1:9999"}, 403),
    ("POST", "/stop/first", {"origin": "http://evil.example"}, 403), ("POST", "/stop/first", {"host": "evil.example"}, 403),
    ("POST", "/stop/first", {}, 403), ("POST", "/resume/first", {}, 403), ("POST", "/new", {}, 403),
    ("POST", "/new", {"content-type": "text/plain"}, 415), ("POST", "/new", {"content-type": "application/json"}, 415),
    ("POST", "/new", {"content-length": str(FORM_BYTES + 1)}, 413), ("POST", "/new", {"content-length": "9" * 5000}, 413),
    ("POST", "/new", {"content-length": "-1"}, 411), ("POST", "/new", {"transfer-encoding": "chunked"}, 411),
    ("POST", "/try", {}, 415), ("POST", "/try", {"content-type": "multipart/form-data"}, 400),
    ("POST", "/try", {"content-length": str(PICTURE_BYTES + 1)}, 413), ("GET", "/data/first?part=../../etc", {}, 404),
    ("GET", "/data/../../etc?part=training", {}, 404), ("GET", "/data/first?part=training&start=-5", {}, 404),
    ("GET", "/stop/first", {}, 405), ("PUT", "/", {}, 405), ("DELETE", "/runs/first", {}, 405), ("TRACE", "/", {}, 405),
]  # fmt: skip


@pytest.mark.parametrize("method, path, headers, status", HOSTILE)
def test_a_hostile_request_gets_nothing(client, root, method, path, headers, status):
    before = sorted(root.parent.rglob("*"))
    more = {"content-type": "application/x-www-form-urlencoded", "content-length": "7"} if method == "POST" else {}
    if "transfer-encoding" in headers:
        del more["content-length"]
    request = client.build_request(method, path, content=b"token=x" if method == "POST" else None)
    for name, value in (more | headers).items():
        request.headers[name] = value
    if "transfer-encoding" in headers:
        del request.headers["content-length"]
    answer = client.send(request)
    assert answer.status_code == status, answer.text[:500]
    assert "a secret" not in answer.text and "root:" not in answer.text and not re.search(r"<script>[^<]", answer.text)
    assert (
        "default-src 'none'" in answer.headers["content-security-policy"] and answer.headers["x-content-type-options"] == "nosniff"
    )
    assert sorted(root.parent.rglob("*")) == before


@pytest.mark.parametrize(
    "body", ["token={}&lora_rank=%FF%FE", "token={}&" + "&".join(f"a{n}=1" for n in range(300)), "token={}&a=\udcff"]
)
def test_a_form_that_is_none_is_refused(client, body):
    token = re.search(r'name="token" value="([^"]+)"', client.get("/new").text)[1]
    headers = {"content-type": "application/x-www-form-urlencoded"}
    assert client.post("/new", content=body.format(token).encode("utf-8", "surrogateescape"), headers=headers).status_code == 400


def test_a_question_without_the_token_or_a_picture_that_is_none_is_refused(client, root):
    (root / "first/adapter_model.safetensors").touch()
    token = re.search(r'name="token" value="([^"]+)"', client.get("/try").text)[1]
    file = {"picture": ("a.png", b"GIF89a no picture")}
    assert client.post("/try", data={"run": "first", "question": "q"}, files=file).status_code == 403
    for run, said in (
        ("first", "is not a picture"),
        ("sweep/second", "has no adapter"),
        ("../first", "there is none of this name"),
    ):
        answer = client.post("/try", data={"token": token, "run": run, "question": "q"}, files=file)
        assert answer.status_code == 400 and said in answer.text


def test_a_key_lets_in_whoever_has_it_by_whatever_name(root):
    client = TestClient(make_app(root, key="sesame"), base_url="http://board.example")
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic !"}, {"authorization": "Basic c2VzYW1l"}):
        answer = client.get("/", headers=headers)
        assert answer.status_code == 401 and answer.headers["www-authenticate"].startswith("Basic") and "first" not in answer.text
    assert client.get("/", headers={"authorization": "Bearer sesame"}).status_code == 200
    assert client.get("/", auth=("anybody", "sesame")).status_code == 200
    assert (
        client.get("/", auth=("", "sesame"), headers={"origin": "http://evil.example"}).status_code == 403
    )  # a browser sends the key
    assert client.post("/stop/first", auth=("", "sesame")).status_code == 415


def test_the_right_names_of_this_machine_are_let_in(client):
    for host in ("127.0.0.1", "localhost", "localhost:8080", "[::1]:8080", "127.8.8.8:1"):
        assert client.get("/", headers={"host": host}).status_code == 200
        assert client.get("/", headers={"host": host, "origin": f"http://{host}"}).status_code == 200
