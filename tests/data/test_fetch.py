"""Fetching over http(s): only allowed hosts, only public addresses, the checked address, within size and time. On loopback."""

import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests

from qwenvl_ft.data import fetch as module
from qwenvl_ft.data.fetch import fetch, is_public
from qwenvl_ft.errors import UserError


class Site(BaseHTTPRequestHandler):
    """/picture, /large, /to?URL (a redirect), /round (one to itself), /drip (a byte now and then), /drip-head, /missing,
    /to-chinese (a redirect to /图片.png, not quoted)."""

    asked: list[tuple[str, str]] = []

    def do_GET(self):
        self.asked.append((self.headers["Host"], self.path))
        path, _, query = self.path.removeprefix("http://images.invalid").partition("?")  # what a proxy is asked for is whole
        if path == "/drip-head":
            for _ in range(100):
                self.wfile.write(b"HTTP/1.1 200 OK\r\n"[:1] if _ == 0 else b"x")
                self.wfile.flush()
                time.sleep(0.1)
            return
        if path in ("/to", "/round", "/to-chinese"):
            self.send_response(302)
            self.send_header("Location", query or ("/图片.png".encode().decode("latin-1") if path == "/to-chinese" else "/round"))
            self.end_headers()
            return
        self.send_response(404 if path == "/missing" else 200)
        self.end_headers()
        if path == "/large":
            self.wfile.write(b"x" * 2_000_000)
        for _ in range(100 if path == "/drip" else 1):
            self.wfile.write(b"picture")
            self.wfile.flush()
            time.sleep(0.1 if path == "/drip" else 0)

    def handle(self):
        try:
            super().handle()
        except OSError:  # a client that hangs up
            pass

    def log_message(self, *_):
        pass


@pytest.fixture
def site(monkeypatch):
    """http://good.test, a public name at a private address that passes for a public one here; bad.test stays private."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Site.asked.clear()
    addresses = {"good.test": "127.0.0.1", "bad.test": "127.0.0.2", "mixed.test": ["127.0.0.1", "127.0.0.2"]}
    real = socket.getaddrinfo

    def resolve(host, port, *rest, **more):
        found = addresses.get(host, host)
        return [entry for one in ([found] if isinstance(found, str) else found) for entry in real(one, port, *rest, **more)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(module, "is_public", lambda address: address == "127.0.0.1")
    yield f"http://good.test:{server.server_port}"
    server.shutdown()
    server.server_close()


HOSTS = {"good.test", "mixed.test"}


def refusal(url: str, **more) -> str:
    with pytest.raises(UserError) as error:
        fetch(url, HOSTS, **more)
    return error.value.problems[0].what


def test_an_allowed_host_is_fetched_by_its_name(site):
    assert fetch(f"{site}/picture?a=b", HOSTS) == b"picture"
    assert Site.asked == [(site.removeprefix("http://"), "/picture?a=b")]
    assert fetch(f"{site}/to?/picture", HOSTS) == b"picture"


def test_every_hop_of_a_redirect_is_checked(site):
    assert "not allowed" in refusal(f"{site}/to?{site.replace('good', 'bad')}/secret")
    assert "not public" in refusal(f"{site}/to?{site.replace('good', 'mixed')}/secret")
    assert "not allowed" in refusal(f"{site}/to?http://127.0.0.1:1/")
    assert "no http" in refusal(f"{site}/to?file:///etc/passwd")
    assert "redirects" in refusal(f"{site}/round")
    assert not [path for _, path in Site.asked if "secret" in path and not path.startswith("/to")]


def test_the_address_that_was_checked_is_dialled(site, monkeypatch):
    """A name that answers with a public address when it is checked and a private one when it is dialled gains nothing."""
    answers = iter(["127.0.0.1", "127.0.0.2", "127.0.0.2"])
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: real(next(answers), *rest, **more))
    assert fetch(f"{site}/picture", HOSTS) == b"picture"
    assert next(answers) == "127.0.0.2"  # asked once


@pytest.mark.parametrize("url", ["http://bad.test/", "http://good.test@bad.test/", "http://bad.test\\@good.test/x", "http://GOOD.test.evil/",
                                 "ftp://good.test/", "file:///etc/passwd", "http://", "http://[::1", "http://good.test:99999/",
                                 "http://good.test:port/", "//good.test/", "http://good.test./"])  # fmt: skip
def test_what_is_not_an_allowed_host_is_not_asked(site, url):
    refusal(url)
    assert Site.asked == []


@pytest.mark.parametrize("path", ["/a\nb", "/ü", "/%0d%0aX: y", "/a b"])
def test_odd_paths_are_refused_or_asked_as_one_line(site, path):
    try:
        fetch(site + path, HOSTS)
    except UserError:
        pass
    assert len(Site.asked) <= 1


@pytest.mark.parametrize("path", [
    "/图片.png", "/a b.png", "/%E5%9B%BE.png", "/图%20%E7%89%87.png", "/100%.png", "/a?q=图 1&x=%2F", "?q", "/a;b=c@d!$'()*+,~[1]?b[0]=1",
])  # fmt: skip
def test_a_path_is_asked_for_as_requests_asks(site, path):
    """Letters and spaces once could not be reached."""
    fetch(site + path, HOSTS)
    wanted = requests.Request("GET", site + path).prepare().path_url
    assert [asked for _, asked in Site.asked] == [wanted]


def test_a_redirect_in_letters_is_followed(site):
    assert fetch(f"{site}/to-chinese", HOSTS) == b"picture"
    assert Site.asked[-1][1] == requests.Request("GET", f"{site}/图片.png").prepare().path_url


def test_a_host_that_is_listed_as_an_address_may_be_private_and_a_name_may_not(site, monkeypatch):
    monkeypatch.setattr(module, "is_public", is_public)
    port = site.rpartition(":")[2]
    assert fetch(f"http://127.0.0.1:{port}/picture", {"127.0.0.1"}) == b"picture"
    assert "not public" in refusal(f"{site}/picture")


def test_a_users_own_url_goes_through_the_proxy_and_a_strangers_does_not(site, monkeypatch):
    """The server stands for a proxy here, which is asked for whole URLs."""
    monkeypatch.setenv("http_proxy", site)
    monkeypatch.setenv("https_proxy", site)
    monkeypatch.setenv("no_proxy", "other.invalid")
    assert fetch("http://images.invalid/图.png") == b"picture"
    assert fetch("http://images.invalid/to?http://images.invalid/picture") == b"picture"
    assert Site.asked[0] == ("images.invalid", requests.Request("GET", "http://images.invalid/图.png").prepare().url)
    assert len(Site.asked) == 3
    for url, hosts, what in (
        ("http://other.invalid/x.png", None, "cannot be reached"),
        ("http://images.invalid/x.png", {"images.invalid"}, "cannot be reached"),
        ("https://images.invalid/x.png", None, "cannot be reached through the proxy that https_proxy names"),
        ("http://images.invalid/missing", None, "answered with status 404"),
    ):
        with pytest.raises(UserError) as error:
            fetch(url, hosts)
        assert error.value.problems[0].what == what
    with pytest.raises(UserError, match="larger"):
        fetch("http://images.invalid/large", max_bytes=1_000_000)
    with pytest.raises(UserError, match="too long"):
        fetch("http://images.invalid/drip", seconds=0.5)


def test_size_and_status_are_bounded(site):
    assert "larger" in refusal(f"{site}/large", max_bytes=1_000_000)
    assert "404" in refusal(f"{site}/missing")


@pytest.mark.parametrize("path", ["/drip", "/drip-head"])
def test_a_server_that_drips_is_left_in_time(site, path):
    began = time.monotonic()
    assert "too long" in refusal(site + path, seconds=0.5)
    assert time.monotonic() - began < 2


def test_nobody_listens():
    with pytest.raises(UserError, match="cannot be reached"):
        fetch("http://127.0.0.1:1/")


@pytest.mark.parametrize("address", [
    "127.0.0.1", "127.1.2.3", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.100.100.200", "0.0.0.0", "224.0.0.1",
    "255.255.255.255", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254",
    "2002:7f00:1::", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "::127.0.0.1", "ff02::1", "2001:db8::1", "fec0::1", "3fff::1",
    "192.88.99.1", "::ffff:192.88.99.1",
])  # fmt: skip
def test_a_private_address_in_any_dress(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_a_public_address(address):
    assert is_public(address)


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "127.1", "0177.0.0.1"])
def test_a_private_address_as_a_number(host):
    """An allow-list that names such a host still meets the check of what it resolves to."""
    with pytest.raises(UserError, match=r"not public|cannot be reached"):
        fetch(f"http://{host}/", {host})
