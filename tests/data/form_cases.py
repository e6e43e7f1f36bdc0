"""One conversation about two pictures, as each project's own documentation writes it, and the documented form of it.

The tests of forms read them, and those that break and mutate them.
"""

import json
from typing import Any

QUESTION, ANSWER, AGAIN, LAST = "What changed between the two?", "The colour.", "Sure?", "Yes."
SHOWN = f"<image>\n<image>\n{QUESTION}"
FILES = ["a.png", "b.png"]


def documented(*texts: str, **more: Any) -> dict[str, Any]:
    """A record of the documented form, user first."""
    return {"conversations": [{"from": ("user", "assistant")[i % 2], "value": text} for i, text in enumerate(texts)], **more}


def messages(*contents: Any, first: str = "user") -> list[dict[str, Any]]:
    """Messages of role and content, in turns."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def text(said: str) -> dict[str, Any]:
    """A part."""
    return {"type": "text", "text": said}


WANTED = documented(f"<img>a.png</img>\n<img>b.png</img>\n{QUESTION}", ANSWER, AGAIN, LAST)
HUMAN = [{"from": ("human", "gpt")[i % 2], "value": said} for i, said in enumerate((SHOWN, ANSWER, AGAIN, LAST))]
SAME: dict[str, dict[str, Any]] = {  # the same content in other forms
    "llava": {"id": "000000033471", "image": FILES, "conversations": HUMAN},
    "QwenLM's images": {"images": FILES, "conversations": HUMAN},
    "LLaMA-Factory's sharegpt": {"conversations": HUMAN, "images": FILES, "system": "", "tools": "[]"},
    "LLaMA-Factory's messages": {"messages": messages(SHOWN, ANSWER, AGAIN, LAST), "images": FILES},
    "LLaMA-Factory's alpaca": {"instruction": AGAIN, "input": "", "output": LAST, "system": "", "history": [[SHOWN, ANSWER]],
                               "images": FILES},
    "ms-swift's query": {"query": AGAIN, "response": LAST, "history": [[SHOWN, ANSWER]], "images": FILES},
    "ms-swift's messages": {"messages": [{"role": "user", "content": SHOWN}, {"role": "assistant", "content": ANSWER, "loss": True},
                                         *messages(AGAIN, LAST)], "images": FILES},
    "OpenAI's": {"messages": messages([{"type": "image_url", "image_url": {"url": "a.png"}},
                                       {"type": "image_url", "image_url": {"url": "b.png"}}, text(QUESTION)], ANSWER, AGAIN, LAST)},
    "OpenAI's weights": {"messages": [*messages([{"type": "image_url", "image_url": {"url": name}} for name in FILES] + [text(QUESTION)]),
                                      {"role": "assistant", "content": ANSWER, "weight": 1}, *messages(AGAIN, LAST)]},
    "Qwen's parts": {"messages": messages([{"type": "image", "image": "a.png"}, {"type": "image", "image": "b.png"}, text(QUESTION)],
                                          [text(ANSWER)], [text(AGAIN)], [text(LAST)])},
    "parts without types": {"messages": messages([{"image": "a.png"}, {"image_url": "b.png"}, {"text": QUESTION}], ANSWER, AGAIN, LAST)},
    "TRL's images": {"images": FILES,
                     "messages": messages([{"type": "image"}, {"type": "image"}, text(QUESTION)], [text(ANSWER)], [text(AGAIN)], LAST)},
    "the hub's parts": {"images": FILES, "messages": messages(
        [{"index": 0, "text": None, "type": "image"}, {"index": 1, "text": None, "type": "image"},
         {"index": None, "text": QUESTION, "type": "text"}], [{"index": None, "text": ANSWER, "type": "text"}], AGAIN, LAST)},
    "the Cauldron's": {"images": FILES, "texts": [{"user": QUESTION, "assistant": ANSWER}, {"user": AGAIN, "assistant": LAST}]},
    "ms-swift's conversation": {"images": FILES, "system": "", "conversation": [{"human": SHOWN, "assistant": ANSWER},
                                                                                {"human": AGAIN, "assistant": LAST}]},
    "unsloth's": {"conversations": messages(SHOWN, ANSWER, AGAIN, LAST), "images": FILES},
    "tags in messages": {"messages": messages(WANTED["conversations"][0]["value"], ANSWER, AGAIN, LAST)},
}  # fmt: skip
FORM_OF = {
    "llava": "llava", "QwenLM's images": "sharegpt", "LLaMA-Factory's sharegpt": "sharegpt", "LLaMA-Factory's messages": "messages",
    "LLaMA-Factory's alpaca": "alpaca", "ms-swift's query": "query_response", "ms-swift's messages": "messages",
    "OpenAI's": "openai", "OpenAI's weights": "openai", "Qwen's parts": "openai", "parts without types": "openai",
    "TRL's images": "openai", "the hub's parts": "openai", "the Cauldron's": "pairs", "ms-swift's conversation": "pairs", "unsloth's": "sharegpt",
    "tags in messages": "messages",
}  # fmt: skip

ONE = documented(f"<img>a.png</img>\n{QUESTION}", ANSWER)
ROWS: dict[str, dict[str, Any]] = {  # one question about one picture: the rows of tables, and what takes no history
    "VQA": {"image": "a.png", "question": QUESTION, "answer": ANSWER},
    "ChartQA": {"image": "a.png", "query": QUESTION, "label": [ANSWER]},
    "DocVQA": {"image": "a.png", "question": QUESTION, "answers": [ANSWER]},
    "GRPO's": {"images": ["a.png"], "problem": QUESTION, "solution": ANSWER},
    "a file's name": {"image_path": "a.png", "prompt": QUESTION, "response": ANSWER},
    "TRL's texts": {"image": "a.png", "prompt": QUESTION, "completion": ANSWER},
    "TRL's turns": {"images": ["a.png"], "prompt": messages(QUESTION), "completion": messages(ANSWER, first="assistant")},
    "2U1's": {"id": "1", "image": "a.png", "conversations": [
        {"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": ANSWER}]},
    "alpaca": {"instruction": QUESTION, "input": "", "output": ANSWER, "images": ["a.png"]},
}  # fmt: skip

TOOL = {"name": "crop", "description": "Cuts out.", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}
CALL, RESULT = {"name": "crop", "arguments": {"x": 1}}, "done"
CALLS: dict[str, dict[str, Any]] = {  # one call of a tool, as each project writes it
    "LLaMA-Factory's": {
        "conversations": [
            {"from": "human", "value": AGAIN}, {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": RESULT}, {"from": "gpt", "value": LAST},
        ],
        "tools": json.dumps([TOOL]),
    },
    "ms-swift's": {
        "tools": json.dumps([{"type": "function", "function": TOOL}]),
        "messages": [
            {"role": "user", "content": AGAIN}, {"role": "tool_call", "content": json.dumps(CALL)},
            {"role": "tool_response", "content": RESULT}, {"role": "assistant", "content": LAST},
        ],
    },
    "OpenAI's": {
        "messages": [
            {"role": "user", "content": AGAIN},
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "crop", "arguments": json.dumps(CALL["arguments"])}}]},
            {"role": "tool", "tool_call_id": "call_1", "content": RESULT},
            {"role": "assistant", "content": LAST},
        ],
        "tools": [{"type": "function", "function": TOOL}],
    },
    "TRL's": {
        "messages": [
            {"role": "user", "content": AGAIN},
            {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]},
            {"role": "tool", "name": "crop", "content": RESULT},
            {"role": "assistant", "content": LAST},
        ],
        "tools": [TOOL],
    },
}  # fmt: skip
GROUNDED = {
    "messages": messages("<image>\nWhere is the <ref-object>?", "<ref-object><bbox>"),
    "images": ["a.png"],
    "objects": {"ref": ["cat", "cat"], "bbox": [[5, 10, 25, 30]], "bbox_type": "real", "image_id": [0]},
}
EVERY = {f"{of}, {name}": entry for of, cases in (("same", SAME), ("row", ROWS), ("call", CALLS)) for name, entry in cases.items()} | {
    "documented": WANTED, "boxes": GROUNDED,
}  # fmt: skip
