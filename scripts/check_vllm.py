"""Asks real vLLM and our engine the same questions: a merged folder, the adapter beside its base, and the adapter through
`qwenvl-ft serve --engine vllm`. Greedy answers must be equal. Then the openai client asks for what only vLLM does: a schema, calls of
tools, several answers, logprobs, a beginning.

    python scripts/check_vllm.py --vllm ENV/bin/vllm [--records 20]

Needs what `make demo` leaves: runs/demo and runs/demo-merged. vLLM lives in an environment of its own.
"""

import argparse
import base64
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import torch
import trl

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


@contextmanager
def running(title: str, command: list[str]) -> Iterator[None]:
    """A server that has come up, stopped at the end."""
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
        yield
    finally:
        process.terminate()
        process.wait()


def compare(title: str, command: list[str], engine: Engine, questions: list) -> bool:
    """Starts a server, asks all questions, prints how many answers are equal."""
    with running(title, command):
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


SCHEMA = {"type": "object", "required": ["title", "bars"], "additionalProperties": False,
          "properties": {"title": {"type": "string", "maxLength": 12}, "bars": {"type": "integer", "minimum": 0, "maximum": 99}}}  # fmt: skip


def fits(text: str) -> bool:
    """Whether it is JSON of the schema."""
    value = json.loads(text)
    return (
        value.keys() == {"title", "bars"} and len(value["title"]) <= 12 and type(value["bars"]) is int and 0 <= value["bars"] <= 99
    )


def check_client(title: str, command: list[str], engine: Engine, tuned: Engine, turns) -> bool:
    """What the openai client asks for that only vLLM does."""
    zoom = {"type": "function", "function": {"name": "zoom", "description": "Shows a bar.", "parameters": SCHEMA, "strict": True}}
    schema = {"type": "json_schema", "json_schema": {"name": "chart", "schema": SCHEMA, "strict": True}}
    messages = [{"role": turn.role, "content": content(turn)} for turn in turns]
    # A grammar lets white space come wherever JSON has some, and a model that knows no JSON writes it without end.
    tokens = engine.chat.tokenizer
    spaces = {str(token): -100 for token in tokens.get_vocab().values() if (text := tokens.decode([token])) and not text.strip()}
    seen = {}
    door, adapter = f"http://127.0.0.1:{PORT}", {"lora_name": "added", "lora_path": str(ADAPTER.resolve())}
    with running(title, command), openai.OpenAI(base_url=f"{door}/v1", api_key="none", max_retries=0) as client:

        def ask(**more):
            return client.chat.completions.create(
                **{"model": "served", "messages": messages, "max_tokens": 120, "temperature": 0} | more
            )

        texts = [ask(response_format=schema, logit_bias=spaces).choices[0].message.content]
        texts += [
            "".join(part.choices[0].delta.content or "" for part in ask(response_format=schema, logit_bias=spaces, stream=True))
        ]
        seen[f"a schema, whole and streamed: {texts[0]}"] = all(map(fits, texts)) and texts[0] == texts[1]
        text = ask(response_format={"type": "json_object"}, logit_bias=spaces, temperature=1, seed=1).choices[0]
        seen["a JSON object, or the beginning of one"] = text.message.content.startswith("{") and (
            text.finish_reason == "length" or isinstance(json.loads(text.message.content), dict)
        )
        for choice in ("required", {"type": "function", "function": {"name": "zoom"}}):
            (call,) = ask(tools=[zoom], tool_choice=choice, logit_bias=spaces).choices[0].message.tool_calls
            seen[f"a call, tool_choice {choice}: {call.function.arguments}"] = call.function.name == "zoom" and fits(
                call.function.arguments
            )
        deltas = [part.choices[0].delta for part in ask(tools=[zoom], tool_choice="required", logit_bias=spaces, stream=True)]
        pieces = [delta.tool_calls[0].function for delta in deltas if delta.tool_calls]
        streamed = "".join(piece.arguments or "" for piece in pieces)
        seen[f"a call, streamed: {streamed}"] = pieces[0].name == "zoom" and fits(streamed)
        spoken = {"role": "assistant", "content": None, "tool_calls": [call.to_dict()]}
        told = {"role": "tool", "tool_call_id": call.id, "content": "it is blue"}
        asked_again = ask(messages=[*messages, spoken, told], tools=[zoom], max_tokens=4)
        seen["a tool's answer is read"] = asked_again.usage.prompt_tokens > ask(tools=[zoom], max_tokens=4).usage.prompt_tokens
        several = ask(n=3, temperature=1.5, max_tokens=8)
        seen["three answers"] = [choice.index for choice in several.choices] == [0, 1, 2]
        (first,) = ask(logprobs=True, top_logprobs=3, max_tokens=1).choices[0].logprobs.content
        with torch.inference_mode():
            scores = engine.model(**engine.inputs([turns]), logits_to_keep=1).logits[0, -1].float().log_softmax(-1)
        apart = [abs(told.logprob - float(score)) for told, score in zip(first.top_logprobs, scores.topk(3).values, strict=True)]
        seen[f"logprobs, {max(apart):.1e} from torch's"] = max(apart) < 1e-3
        whole = ask(max_tokens=8).choices[0].message.content
        begun = [*messages, {"role": "assistant", "content": whole[:1]}]
        rest = ask(messages=begun, max_tokens=7, extra_body={"continue_final_message": True}).choices[0].message.content
        seen[f"{whole[:1]!r} goes on with {rest!r}"] = bool(rest) and (whole[:1] + rest)[: len(whole)][:2] == whole[:2]
        banned = {str(int(scores.argmax())): -100}
        plain, other = (ask(max_tokens=1, logit_bias=bias).choices[0].message.content for bias in ({}, banned))
        seen[f"a bias makes {plain!r} {other!r}"] = plain != other
        response = client.responses.create(model="served", input="hi", max_output_tokens=8)
        seen[f"/v1/responses: {response.output_text!r}"] = bool(response.output_text)
        admin = {"Authorization": f"Bearer {os.environ['CHECK_ADMIN_KEY']}"}
        httpx.post(f"{door}/v1/load_lora_adapter", json=adapter, headers=admin, timeout=120).raise_for_status()
        theirs = ask(model="added", max_tokens=ANSWER_TOKENS).choices[0].message.content
        seen[f"an adapter that was added answers {theirs!r}"] = theirs == tuned.ask(turns, ANSWER_TOKENS)
        httpx.post(f"{door}/v1/unload_lora_adapter", json=adapter, headers=admin, timeout=120).raise_for_status()
        seen["and it is gone"] = "added" not in [model.id for model in client.models.list()]
    for what, right in seen.items():
        print(f"{'seen  ' if right else 'WRONG '}  {what}")
    print(f"{sum(seen.values())} of {len(seen)} seen")
    return all(seen.values())


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
    # A base whose template knows tools, which the adapter is asked by, too.
    os.environ["CHECK_ADMIN_KEY"] = secrets.token_hex(16)
    told = Path("runs/vllm-tools")
    shutil.copytree(BASE, told, dirs_exist_ok=True)
    shutil.copy(Path(trl.__file__).parent / "chat_templates/qwen3_vl.jinja", told / "chat_template.jinja")
    command = [
        str(Path(sys.executable).parent / "qwenvl-ft"),
        "serve",
        str(told),
        "--name",
        "served",
        "--engine",
        "vllm",
        "--admin-key-env=CHECK_ADMIN_KEY",
        *through,
        f"--engine-arg=--max-lora-rank={rank}",
    ]
    engine = Engine.open(told)
    tuned = replace(Engine.open(BASE, ADAPTER), chat=engine.chat)
    equal.append(check_client("what only vLLM does", command, engine, tuned, questions[0]))
    sys.exit(not all(equal))


if __name__ == "__main__":
    main()
