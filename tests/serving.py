"""A server on loopback for the tests: the tiny base, and two adapters beside it with random weights."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch
import uvicorn

from qwenvl_ft.data.families import family_of
from qwenvl_ft.infer.engine import Engine, open_beside
from qwenvl_ft.model.load import add_lora, load_base, trainable
from qwenvl_ft.serve.api import Bounds
from qwenvl_ft.serve.app import make_app
from qwenvl_ft.serve.open_request import Opener
from qwenvl_ft.serve.timeouts import TimeoutProtocol
from qwenvl_ft.serve.transformers_backend import TransformersBackend
from tests.conftest import SAMPLE, TINY

BOUNDS = Bounds()
KEY = "the key"
CHARTS = sorted((SAMPLE / "images").glob("*.png"))[:24]


def random_adapter(base: Path, folder: Path, seed: int) -> Path:
    """An adapter on both towers whose weights are large enough to change every answer."""
    model = add_lora(load_base(base, "float32"), family_of(base), ["language", "vision", "merger"], 4, 8, 0.0, seed)
    torch.manual_seed(seed)
    for parameter in trainable(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def tiny_engines(folder: Path) -> dict[str, Engine]:
    """The tiny base and the adapters one and two.b, by the names that they are served under."""
    adapters = {name: random_adapter(TINY, folder / name, seed) for seed, name in enumerate(("one", "two.b"))}
    engines = open_beside(TINY, adapters)
    return {"tiny": engines.pop(None), **engines}


class Served:
    """A server that runs in a thread of this process."""

    def __init__(self, app, backend):
        self.backend = backend
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(
            app, http=TimeoutProtocol, ws="none", lifespan="on", log_level="critical", timeout_graceful_shutdown=30
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listening]}, daemon=True)
        self.thread.start()
        wait_for(lambda: self.server.started)

    def stop(self) -> None:
        """As SIGTERM does."""
        self.server.should_exit = True

    def metric(self, name: str) -> float:
        """A line of /metrics, without a key."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))


@contextmanager
def serving(
    engines, key=None, bounds=BOUNDS, max_batch=16, max_waiting=64, hosts=(), prefix="", public_url="", origins=()
) -> Iterator[Served]:
    """A server over these engines, stopped at the end."""
    opener = Opener(bounds, hosts)
    backend = TransformersBackend(engines, opener, max_batch)
    served = Served(make_app(backend, opener, max_batch + max_waiting, key, prefix, public_url, origins), backend)
    try:
        yield served
    finally:
        served.stop()
        served.thread.join(30)
        assert not served.thread.is_alive()


class Running:
    """A server in a process of its own, with small bounds."""

    def __init__(self, *arguments: str, env: dict | None = None):
        command = [str(Path(sys.executable).parent / "qwenvl-ft"), "serve", "data/tiny", "--port", "0", *arguments]
        env = {**os.environ, "QWENVL_KEY": KEY, "OMP_NUM_THREADS": "1", "COLUMNS": "300", **(env or {})}
        self.process = subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        line = self.process.stdout.readline()
        assert "http://" in line, self.process.stderr.read()
        self.url = line.split(" at ")[1].split("/v1")[0]
        self.port = int(self.url.rsplit(":", 1)[1])
        until = time.monotonic() + 30
        while time.monotonic() < until:
            try:
                httpx.get(self.url + "/health")
                return
            except httpx.ConnectError:
                time.sleep(0.05)

    @property
    def megabytes(self) -> float:
        """What it holds in memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1024

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def wait_for(happens, seconds: float = 60) -> None:
    """Returns once it happens."""
    until = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < until, "did not happen"
        time.sleep(0.01)


def data_url(path: Path) -> str:
    """A file as base64."""
    return f"data:image/{path.suffix[1:]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def question(text: str, *pictures: Path) -> list[dict]:
    """Messages in OpenAI's form."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(path)}} for path in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def events(text: str) -> list[dict]:
    """The JSON of a stream's data lines."""
    lines = [line[5:].strip() for line in text.splitlines() if line.startswith("data:")]
    return [json.loads(line) for line in lines if line != "[DONE]"]
