"""Two servers behind one door, one of them killed while clients ask: no answer may be lost that had not begun to stream.

    python scripts/check_replicas.py --vllm ENV/bin/vllm [--clients 16] [--seconds 40]

Half of the clients stream. Without --vllm our own engine stands behind the door, on the tiny base.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import httpx

BASE, PORTS, OURS = Path("data/tiny"), (8331, 8332), str(Path(sys.executable).parent / "qwenvl-ft")


def wait_up(url: str, process: subprocess.Popen) -> None:
    """Returns once it answers."""
    while True:
        if process.poll() is not None:
            sys.exit(f"{process.args} ended")
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(1)


def ask(url: str, number: int, until: float, seen: Counter, expected: dict, lock: threading.Lock) -> None:
    """Asks again and again; `seen` counts what came of it."""
    stream, question = number % 2 == 1, f"Read row {number} of the chart."
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": 64, "temperature": 0, "stream": stream}
    with httpx.Client(base_url=url, timeout=120) as client:
        while time.monotonic() < until:
            text, status, ended = "", 0, False
            try:
                with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                    status = answer.status_code
                    lines = (
                        [line[5:].strip() for line in answer.iter_lines() if line.startswith("data:")]
                        if stream
                        else [answer.read()]
                    )
                parts = [json.loads(line) for line in lines if line not in ("[DONE]", "")]
                if stream:
                    deltas = [part["choices"][0]["delta"].get("content") or "" for part in parts if part.get("choices")]
                    text, ended = "".join(deltas), lines[-1:] == ["[DONE]"]
                elif status == 200:
                    text, ended = parts[0]["choices"][0]["message"]["content"], True
            except httpx.HTTPError as error:
                status = type(error).__name__
            with lock:
                if ended and status == 200:
                    same = expected.setdefault(question, text) == text
                    seen["answered" if same else "another answer"] += 1
                else:
                    seen["broken off in its stream" if stream and text else f"LOST ({status})"] += 1


def main() -> None:
    """Exit code 1 where an answer was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", help="vLLM's command; default: our own engine")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=40)
    given = parser.parse_args()
    name, small = ["--served-model-name", "tiny"], ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"]
    command = [given.vllm, "serve", str(BASE), *name, *small] if given.vllm else [OURS, "serve", str(BASE)]
    environment, urls = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}, [f"http://127.0.0.1:{port}" for port in PORTS]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    behind = [subprocess.Popen([*command, "--port", str(port)], env=environment, **quiet) for port in PORTS]
    door = None
    try:
        for url, process in zip(urls, behind, strict=True):
            wait_up(url, process)
        door = subprocess.Popen([OURS, "serve", "--port", "8330", *(f"--engine-url={url}" for url in urls)], **quiet)
        wait_up("http://127.0.0.1:8330", door)
        seen, lock, until = Counter(), threading.Lock(), time.monotonic() + given.seconds
        clients = [
            threading.Thread(target=ask, args=["http://127.0.0.1:8330", number, until, seen, {}, lock])
            for number in range(given.clients)
        ]
        for client in clients:
            client.start()
        time.sleep(given.seconds / 2)
        with lock:
            before = dict(seen)
        os.killpg(behind[0].pid, signal.SIGKILL)
        for client in clients:
            client.join()
        print(f"before the kill {before}, in all {dict(seen)}")
        sys.exit(any("LOST" in what or what == "another answer" for what in seen) or not seen["answered"])
    finally:
        for process in [*behind, *([door] if door else [])]:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()


if __name__ == "__main__":
    main()
