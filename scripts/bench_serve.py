"""Many clients at once against `qwenvl-ft serve`: no error, no mixed-up answer, how long an answer takes, how many a second.

    python scripts/bench_serve.py --clients 64 --seconds 60

Each client asks about its own picture, again and again, and compares with the answer that it got alone, beforehand.

    python scripts/bench_serve.py --clients 4 --seconds 20 --storm 200

Then `--storm` more clients, in a process of their own, who are all refused (429) and ask again at once: what that costs the others.
"""

import argparse
import asyncio
import base64
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).parent.parent


def body(picture: Path, number: int, tokens: int) -> dict:
    """What client `number` asks."""
    url = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": f"Read row {number} of the chart."}]
    return {"messages": [{"role": "user", "content": parts}], "max_tokens": tokens}


def answer_of(response: httpx.Response) -> tuple[str, int]:
    """The answer's text and its number of tokens."""
    answer = response.raise_for_status().json()
    return answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"]


async def ask_for(client: httpx.AsyncClient, asked: dict, expected: str, until: float, seen: list) -> None:
    """Asks until the time is up; `seen` gets (seconds, tokens, what was wrong)."""
    while time.monotonic() < until:
        began, tokens, wrong = time.monotonic(), 0, ""
        try:
            text, tokens = answer_of(await client.post("/v1/chat/completions", json=asked))
            wrong = "" if text == expected else "another answer"
        except httpx.HTTPError as error:
            wrong = repr(error)
        seen.append((time.monotonic() - began, tokens, wrong))


async def ask_together(url: str, bodies: list[dict], expected: list[str], seconds: float) -> list:
    """All clients at once."""
    seen: list = []
    limits = httpx.Limits(max_connections=len(bodies))
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        until = time.monotonic() + seconds
        await asyncio.gather(*(ask_for(client, *pair, until, seen) for pair in zip(bodies, expected, strict=True)))
    return seen


async def refused_again(port: int, request: bytes, until: float, counts: list[int]) -> None:
    """Asks, is refused, asks again: over a connection as long as the server keeps it; `counts` by the status' first digit."""
    while time.monotonic() < until:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            while time.monotonic() < until:
                writer.write(request)
                head = await reader.readuntil(b"\r\n\r\n")
                counts[int(head[9:10])] += 1
                size = next(int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
                await reader.readexactly(size)
                if b"connection: close" in head.lower():
                    break
        except (OSError, asyncio.IncompleteReadError):
            counts[0] += 1
        finally:
            writer.close()


async def storm(port: int, clients: int, seconds: float, tokens: int) -> None:
    """Prints how many were answered, by status."""
    content = json.dumps(body(sorted((ROOT / "data/sample/images").glob("*.png"))[0], 0, tokens)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    counts, until = [0] * 6, time.monotonic() + seconds
    await asyncio.gather(*(refused_again(port, head.encode() + content, until, counts) for _ in range(clients)))
    print(json.dumps({"answered": counts[2], "refused": counts[4], "unavailable": counts[5], "broken": counts[0]}))


def cpu_seconds(process: int) -> float:
    """What a process has used so far, all of its threads."""
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Starts a server, measures, stops it. Exit code 1 where an answer was wrong or missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=ROOT / "data/tiny", type=Path)
    parser.add_argument("--clients", default=64, type=int)
    parser.add_argument("--seconds", default=60.0, type=float)
    parser.add_argument("--max-tokens", default=32, type=int, help="of an answer")
    parser.add_argument("--max-batch", default=16, type=int)
    parser.add_argument("--storm", default=0, type=int, help="clients that are refused; without them nobody is")
    parser.add_argument("--storm-on", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.storm_on:
        asyncio.run(storm(given.storm_on, given.storm, given.seconds, given.max_tokens))
        return
    pictures = sorted((ROOT / "data/sample/images").glob("*.png"))
    bodies = [body(pictures[number % len(pictures)], number, given.max_tokens) for number in range(given.clients)]
    command = [str(Path(sys.executable).parent / "qwenvl-ft"), "serve", str(given.model), "--port", "0",
               "--max-batch", str(min(given.max_batch, given.clients) if given.storm else given.max_batch),
               "--max-waiting", str(max(0, given.clients - given.max_batch) if given.storm else given.clients)]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout
        url = server.stdout.readline().split(" at ")[1].split("/v1")[0]
        with httpx.Client(base_url=url, timeout=120, transport=httpx.HTTPTransport(retries=10)) as client:
            client.post("/v1/chat/completions", json=bodies[0])  # the first answer warms up
            began = time.monotonic()
            alone = [answer_of(client.post("/v1/chat/completions", json=asked)) for asked in bodies]
            alone_s = time.monotonic() - began
        calm, began = cpu_seconds(server.pid), time.monotonic()
        seen = asyncio.run(ask_together(url, bodies, [text for text, _ in alone], given.seconds))
        together_s = time.monotonic() - began
        calm = cpu_seconds(server.pid) - calm
        if given.storm:
            command = [sys.executable, __file__, "--storm-on", url.rsplit(":", 1)[1], "--storm", str(given.storm),
                       "--seconds", str(given.seconds), "--max-tokens", str(given.max_tokens)]  # fmt: skip
            used = cpu_seconds(server.pid)
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as storming:
                began = time.monotonic()
                stormed = asyncio.run(ask_together(url, bodies, [text for text, _ in alone], given.seconds))
                stormed_s = time.monotonic() - began
                refused = json.loads(storming.communicate()[0])
            used = cpu_seconds(server.pid) - used
        server.terminate()
    wrong = [what for _, _, what in seen if what]
    waits = sorted(seconds for seconds, _, _ in seen)
    rates = [(len(alone) / alone_s, sum(tokens for _, tokens in alone) / alone_s),
             (len(seen) / together_s, sum(tokens for _, tokens, _ in seen) / together_s)]  # fmt: skip
    print(f"{given.clients} clients, {given.seconds:g} s, {len(seen)} answers ({len({text for text, _ in alone})} different ones)")
    print(f"wrong or missing: {len(wrong)} {sorted(set(wrong))[:3] if wrong else ''}")
    print(f"seconds an answer: median {statistics.median(waits):.2f}, p95 {waits[int(0.95 * (len(waits) - 1))]:.2f}")
    print(f"one at a time: {rates[0][0]:.1f} answers/s, {rates[0][1]:.0f} tokens/s")
    print(f"together:      {rates[1][0]:.1f} answers/s, {rates[1][1]:.0f} tokens/s, {rates[1][0] / rates[0][0]:.1f} times as many")
    if given.storm:
        # A place that falls free may be a stormer's: its answer counts.
        num = len([what for _, _, what in stormed if not what]) + refused["answered"]
        print(
            f"in a storm of {given.storm}: {num / stormed_s:.1f} answers/s, {100 * (1 - num / stormed_s / rates[1][0]):.0f} % fewer; {refused}"
        )
        print(f"the server's CPU an answer: {1000 * calm / len(seen):.0f} ms, in the storm {1000 * used / max(1, num):.0f} ms")
    sys.exit(1 if wrong or not seen else 0)


if __name__ == "__main__":
    main()
