"""An object server on loopback, moto's, and a connection to it that is cut in the middle, or from some request on."""

import logging
import socket
import struct
import threading
from contextlib import suppress
from functools import cached_property
from itertools import count
from urllib.request import urlopen

import pytest

BUCKET = "bucket"
KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "words-nobody-may-see", "AWS_DEFAULT_REGION": "us-east-1"}
RESET = struct.pack("ii", 1, 0)  # closed with a reset, not an end


class Server:
    """The server, with one empty bucket; `fs` is fsspec's file system of it."""

    def __init__(self):
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
        self.moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self.moto.start()
        self.port = self.moto.get_host_and_port()[1]

    def attach(self, monkeypatch: pytest.MonkeyPatch, port: int | None = None) -> None:
        """What a user has in the environment; the server at another port is the one behind a Cut."""
        for name, value in KEYS.items() | {("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port or self.port}")}:
            monkeypatch.setenv(name, value)

    @cached_property
    def fs(self):
        import s3fs

        return s3fs.S3FileSystem(
            key="testing", secret="testing", endpoint_url=f"http://127.0.0.1:{self.port}", use_listings_cache=False,
            skip_instance_cache=True,
        )  # fmt: skip

    def reset(self) -> None:
        """Nothing but the empty bucket."""
        with urlopen(f"http://127.0.0.1:{self.port}/moto-api/reset", b""):
            pass
        self.fs.mkdir(BUCKET)


class Cut:
    """A way to a port on which every `each`-th connection is reset after `num_bytes`, and all of them, for good, once a request
    begins with `last`. `cuts` counts."""

    def __init__(self, port: int, each: int = 3, num_bytes: int = 20_000, last: bytes = b""):
        self.to, self.each, self.num_bytes, self.last = port, each, num_bytes, last
        self.numbers, self.cuts = count(1), 0
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                near = self.listening.accept()[0]
                far = socket.create_connection(("127.0.0.1", self.to))
                left = [self.num_bytes if next(self.numbers) % self.each == 0 else 1 << 40]
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=(one, other, left), daemon=True).start()

    def _pass(self, one: socket.socket, other: socket.socket, left: list[int]) -> None:
        with suppress(OSError):
            while data := one.recv(1 << 14):
                left[0] -= len(data)
                is_last = self.last and data.startswith(self.last)
                if is_last:
                    self.close()
                if left[0] < 0 or is_last or self.listening.fileno() < 0:
                    self.cuts += 1
                    for end in (one, other):
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                        end.close()
                    return
                other.sendall(data)
        for end in (one, other):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        """No connection comes through any more."""
        with suppress(OSError):
            self.listening.shutdown(socket.SHUT_RDWR)
        self.listening.close()
