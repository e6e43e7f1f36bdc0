"""Asks real vLLM and our engine the same questions: a merged folder, the adapter beside its base, and the adapter through
`qwenvl-ft serve --engine vllm`. Greedy answers must be equal.

    python scripts/check_vllm.py --vllm ENV/bin/vllm [--records 20]

Needs what `make demo` leaves: runs/demo and runs/demo-merged. vLLM lives in an environment of its own.
"""

import argparse
import base64
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from qwenvl_ft.data.meta_file import read_records
from qwenvl_ft.data.records import Picture
from qwenvl_ft.infer.engine import Engine

BASE, ADAPTER, MERGED, SAMPLE = Path("data/tiny"), Path("runs/demo"), Path("runs/demo-merged"), Path("data/sample")
PORT = 8321
ANSWER_TOKENS = 48


def content(turn) -> list[dict]:
    """A turn in OpenAI's form."""
    return [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(part.source.read_bytes()).decode()}}
        if isinstance(part, Picture) else {"type": "text", "text": part}
        for part in turn.parts
    ]  # fmt: skip


def asked(model: str, turns) -> str:
    """vLLM's greedy answer."""
    messages = [{"role": turn.role, "content": content(turn)} for turn in turns]
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": ANSWER_TOKENS}
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return json.load(urllib.request.urlopen(request, timeout=300))["choices"][0]["message"]["content"]


def compare(title: str, command: list[str], engine: Engine, questions: list) -> bool:
    """Starts a server, asks all questions, prints how many answers are equal."""
    command = [*command, "--port", str(PORT)]
    print(f"\n{title}\n$ {' '.join(command)}", flush=True)
    log = Path(f"runs/vllm-{title.replace(' ', '-')}.log")
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"})
    try:
        while True:
            if process.poll() is not None:
                sys.exit(f"vLLM ended: see {log}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(2)
        right = 0
        for turns in questions:
            theirs, ours = asked("served", turns), engine.ask(turns, ANSWER_TOKENS)
            right += theirs == ours
            print(
                f"{'equal ' if theirs == ours else 'DIFFER'}  {theirs!r}" + ("" if theirs == ours else f"  ours {ours!r}"),
                flush=True,
            )
        print(f"{right} of {len(questions)} answers are equal")
        return right == len(questions)
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", required=True, help="vLLM's command")
    parser.add_argument("--records", type=int, default=20)
    arguments = parser.parse_args()
    records, _, _ = read_records(SAMPLE / "eval.json", SAMPLE / "images")
    questions = [record.turns[:1] for record in records[: arguments.records]]
    rank = json.loads((ADAPTER / "adapter_config.json").read_text())["r"]
    small = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"]
    lora = ["--served-model-name", "base", "--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"served={ADAPTER}"]
    through = [f"--engine-arg={argument}" for argument in small]
    os.environ["PATH"] = f"{Path(arguments.vllm).parent.resolve()}:{os.environ['PATH']}"
    equal = [
        compare(
            "merged folder", ["vllm", "serve", str(MERGED), "--served-model-name", "served", *small], Engine.open(MERGED), questions
        ),
        compare("adapter beside its base", ["vllm", "serve", str(BASE), *lora, *small], Engine.open(BASE, ADAPTER), questions),
        compare(
            "adapter through our server",
            [
                str(Path(sys.executable).parent / "qwenvl-ft"),
                "serve",
                str(BASE),
                "--adapter",
                f"served={ADAPTER}",
                "--engine",
                "vllm",
                *through,
            ],
            Engine.open(BASE, ADAPTER),
            questions,
        ),
    ]
    sys.exit(not all(equal))


if __name__ == "__main__":
    main()
