"""A model's chat template, and whether a thought stands before an answer.

`settle` sets the template's own default, so that training, asking and whoever else renders it (transformers, vLLM) write the same
prompt. What a template does is found by rendering it, not by the name of its family.
"""

import json
import re
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.values import Thinking

OPEN_THOUGHT, CLOSE_THOUGHT = "<think>\n", "\n</think>\n\n"
THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
MARK = "{{#- thinking: {} -#}}"  # a comment that says how a template was settled
DEFAULT = "{{%- if enable_thinking is not defined %}}{{% set enable_thinking = {} %}}{{% endif -%}}"
HEAD = re.compile(r"\{#- thinking: (off|on|template) -#\}(?:\{%- if enable_thinking is not defined %\}.*?\{% endif -%\})?")
# For templates that open a thought whatever is asked.
TAIL = "{% if add_generation_prompt and not enable_thinking %}{{ '\\n</think>\\n\\n' }}{% endif %}"


def compile_template(source: str) -> Template:
    """As transformers renders it. Raises UserError for what is no template."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals["raise_exception"] = _refuse
    environment.filters["tojson"] = _json  # jinja's own sorts keys, and writes < and ' as escapes
    try:
        return environment.from_string(source)
    except TemplateError as error:
        what = f"is no template that can be read: {error}"
        raise UserError(Problem("chat template", what, "copy it again from the base model")) from error


def render(
    template: Template, messages: list[dict[str, Any]], answer_next: bool, thinking: bool | None = None,
    tools: list[dict[str, Any]] | None = None,
) -> str:  # fmt: skip
    """The conversation as text; `thinking` replaces the template's default. Raises UserError for what the template refuses."""
    asked = {} if thinking is None else {"enable_thinking": thinking}
    try:
        return template.render(messages=messages, add_generation_prompt=answer_next, tools=tools or None, **asked)
    except TemplateError as error:
        what, fix = f"cannot be rendered: {error}", "change the record so that the model's template accepts it"
        raise UserError(Problem("chat template", what, fix)) from error


def thinks(template: Template) -> bool:
    """Whether the template knows thoughts: asked with one and without, it writes other prompts, or it opens one at any rate."""
    talk = [{"role": "user", "content": "a"}]
    off = render(template, talk, True, thinking=False)
    return off.endswith(OPEN_THOUGHT) or off != render(template, talk, True, thinking=True)


def knows_tools(template: Template) -> bool:
    """Whether the template writes the tools that it is given, calls of them with their arguments, and what they answer."""
    tool = {"type": "function", "function": {"name": "probed_tool", "description": "b", "parameters": {}}}
    call = {"type": "function", "function": {"name": "probed_call", "arguments": {"probed_key": "probed_value"}}}
    talk: list[dict[str, Any]] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "probed_answer"},
    ]
    try:
        text = render(template, talk, answer_next=True, tools=[tool])
    except UserError:
        return False
    return all(f"probed_{of}" in text for of in ("tool", "call", "key", "value", "answer"))


def settle(source: str, thinking: Thinking) -> str:
    """The template's text with its default set to `thinking`, or kept, and a comment that says so; as it is, if it knows no
    thoughts."""
    source = HEAD.sub("", source).removesuffix(TAIL)
    template = compile_template(source)
    if not thinks(template):
        return source
    mark = MARK.format(thinking)
    if thinking == "template":
        return mark + source
    opened = render(template, [{"role": "user", "content": "a"}], True, thinking=False).endswith(OPEN_THOUGHT)
    head = mark + DEFAULT.format("true" if thinking == "on" else "false")
    return head + source.removesuffix("\n") + TAIL if opened else head + source


def settled(source: str) -> Thinking | None:
    """What the template's default was set to here; None for one as its makers wrote it."""
    found = HEAD.match(source)
    return found[1] if found else None  # type: ignore[return-value]


def split_thought(text: str) -> tuple[str, str]:
    """(thought, answer) of what an assistant said; no thought: ("", text as it is)."""
    if not (found := THOUGHT.fullmatch(text)):
        return "", text
    return found[1].strip("\n"), found[2].lstrip("\n")


def _json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:  # fmt: skip
    """Source: transformers 5.23, chat_template_utils."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise UserError(Problem("chat template", message, "change the record so that the model's template accepts it"))
