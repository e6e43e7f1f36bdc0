"""Brings a file over http(s) without being led where it should not go.

Every host that is dialled, redirects included, is resolved first, every address of it is checked, and the checked address is
the one that is dialled: a name that answers differently the second time gains nothing. Only what a user names himself may go
through the environment's proxies, since it is these that resolve its host.
"""

import http.client
import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Collection
from contextlib import suppress
from threading import Timer
from typing import Any
from urllib.parse import SplitResult, quote, urljoin, urlsplit
from urllib.request import HTTPErrorProcessor, Request, build_opener, getproxies, proxy_bypass

from qwenvl_ft.errors import Problem, UserError

MAX_BYTES = 200 << 20
MAX_REDIRECTS = 5
# What Python's tables count as the internet's: site-local addresses, documentation's newer ones, the old relays of 6to4.
PRIVATE_TOO = tuple(map(ipaddress.ip_network, ("fec0::/10", "3fff::/20", "192.88.99.0/24")))
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # the internet's IPv4 addresses behind a translator; its last 32 bits are one

LONE_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")


def fetch(url: str, hosts: Collection[str] | None = None, max_bytes: int = MAX_BYTES, seconds: float = 60) -> bytes:
    """The body of a URL. With `hosts`, only these may be asked, their names only at public addresses; `seconds` bound all of it.

    Raises UserError where it may not, or cannot, be fetched; it names `url`, not where a redirect led.
    """
    until = time.monotonic() + seconds
    at = url
    try:
        for _ in range(MAX_REDIRECTS + 1):
            status, place, body = _get(at, hosts, max_bytes, until)
            if len(body) > max_bytes:
                raise _Refused(f"is larger than {max_bytes:,} bytes")
            if time.monotonic() >= until:  # a body of unknown length, cut off by the watchdog, looks whole
                raise _Refused("takes too long")
            if status in (301, 302, 303, 307, 308) and place:
                at = urljoin(at, place.encode("latin-1").decode(errors="replace"))  # as http.client reads headers
            elif status != 200:
                raise _Refused(f"answered with status {status}")
            else:
                return body
        raise _Refused(f"redirects more than {MAX_REDIRECTS} times")
    except _Refused as refusal:
        raise UserError(Problem(url[:200], str(refusal), "send the file itself, as a data: URL")) from refusal
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: what is no URL, a host that is no name
        what = "takes too long" if time.monotonic() >= until else "cannot be reached"
        raise UserError(Problem(url[:200], what, "send the file itself, as a data: URL")) from error


class _Refused(Exception):
    """Why a URL is not fetched."""


def _get(url: str, hosts: Collection[str] | None, max_bytes: int, until: float) -> tuple[int, str | None, bytes]:
    """(status, Location, body) of one hop; of the body at most one byte too many."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise _Refused("is no http or https URL")
    if hosts is not None and parts.hostname not in hosts:
        raise _Refused("its host is not allowed here")
    if hosts is None and getproxies().get(parts.scheme) and not proxy_bypass(parts.hostname):
        return _get_by_proxy(parts, max_bytes, until)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    # An address in place of a name was written by whoever lists `hosts`; what a name stands for, others may change.
    address = _address(parts.hostname, port, public=hosts is not None and not is_address(parts.hostname))
    left = until - time.monotonic()
    if left <= 0:
        raise _Refused("takes too long")
    connection = _Pinned(address, parts.hostname, port, parts.scheme == "https", left)
    # A time-out of the socket bounds each wait of its own: a server that drips a byte a second would never meet it.
    watchdog = Timer(left, connection.cut)
    watchdog.daemon = True
    watchdog.start()
    try:
        connection.request("GET", _target(parts), headers={"Accept": "*/*"})
        with connection.getresponse() as response:
            return response.status, response.getheader("Location"), response.read(max_bytes + 1)
    finally:
        watchdog.cancel()
        connection.close()
        connection.raw.close()


def _target(parts: SplitResult) -> str:
    """Path and query as they may stand in a request, quoted as requests does it: what is quoted already stays so."""
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return quote(LONE_PERCENT.sub("%25", target), safe="!$%&'()*+,/:;=?@~")


def _get_by_proxy(parts: SplitResult, max_bytes: int, until: float) -> tuple[int, str | None, bytes]:
    """`_get` through the proxy that the environment names for the scheme."""
    request = Request(f"{parts.scheme}://{parts.netloc.encode('idna').decode()}{_target(parts)}", headers={"Accept": "*/*"})
    body = bytearray()
    try:
        with build_opener(_AsItIs).open(request, timeout=max(until - time.monotonic(), 0.001)) as response:
            while len(body) <= max_bytes and time.monotonic() < until and (piece := response.read1(1 << 16)):
                body += piece
            return response.status, response.getheader("Location"), bytes(body)
    except OSError as error:
        if time.monotonic() >= until:
            raise
        raise _Refused(f"cannot be reached through the proxy that {parts.scheme}_proxy names") from error


class _AsItIs(HTTPErrorProcessor):
    """No status is an error, and no redirect is followed: `fetch` does that."""

    def http_response(self, request: Request, response: Any) -> Any:
        return response

    https_response = http_response


def _address(host: str, port: int, public: bool) -> tuple[int, str]:
    """(family, address) to dial. Of a host that may only be public, one private address among its own spoils all."""
    found = [(entry[0], str(entry[4][0])) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if public and not all(is_public(address) for _, address in found):
        raise _Refused("its host has an address that is not public")
    return found[0]


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the open internet; an IPv4 address inside an IPv6 one counts as itself."""
    ip: ipaddress.IPv4Address | ipaddress.IPv6Address = ipaddress.ip_address(address.split("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inside = ip.ipv4_mapped or ip.sixtofour
        if ip in NAT64:
            inside = ipaddress.IPv4Address(ip.packed[-4:])
        ip = inside or ip
    return ip.is_global and not ip.is_multicast and not ip.is_reserved and not any(ip in network for network in PRIVATE_TOO)


def is_address(host: str) -> bool:
    """Whether a host is an IP address, an IPv6 one without its brackets, and no name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether a name or an address, an IPv6 one without its brackets, means this machine."""
    return ipaddress.ip_address(host).is_loopback if is_address(host) else host == "localhost"


def host_of(url: str) -> str:
    """The host of a URL in lower case, an IPv6 one without its brackets; nothing for what is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def is_own_page(origin: str, called: str) -> bool:
    """Whether an Origin header names the very server that the Host header `called`: its port counts, for other pages of this
    machine are other people's, too."""
    return origin.lower().partition("://")[2] == called.lower()


class _Pinned(http.client.HTTPConnection):
    """A connection to a checked address that speaks to the host by its name."""

    def __init__(self, address: tuple[int, str], host: str, port: int, tls: bool, seconds: float):
        super().__init__(host, port, timeout=seconds)
        self.address, self.tls = address, tls
        self.raw = socket.socket(address[0], socket.SOCK_STREAM)

    def connect(self) -> None:
        self.raw.settimeout(self.timeout)
        self.raw.connect((self.address[1], self.port))
        self.sock = self.raw
        if self.tls:
            context = ssl.create_default_context()
            self.sock = self.raw = context.wrap_socket(self.raw, server_hostname=self.host, do_handshake_on_connect=False)
            self.sock.do_handshake()  # after `cut` can reach the socket that shakes hands

    def cut(self) -> None:
        """Ends whatever waits for this connection, in whichever thread."""
        with suppress(OSError):
            self.raw.shutdown(socket.SHUT_RDWR)
