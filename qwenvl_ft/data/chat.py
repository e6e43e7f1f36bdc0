"""Writes a record as the model's own chat template does, and marks what is taught. Needs no torch.

What is taught follows from the rendered text by one rule for every family: each assistant turn from after its header to the
<|im_end|> that closes it; not the newline after that, which the model never has to produce. The rule is safe because the reader
refuses records whose own text holds a control token.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from qwenvl_ft.data.families import Family, family_of
from qwenvl_ft.data.geometry import Limits, grid_of, read_limits, tokens_of
from qwenvl_ft.data.records import Picture, Record, Turn
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.model import read_model_json, read_template
from qwenvl_ft.folders.problems import talk_problems

IGNORE = -100  # the label that torch's cross entropy skips
TAUGHT = re.compile(r"<\|im_start\|>assistant\n(?:<think>\n\n</think>\n\n)?(.*?<\|im_end\|>)", re.DOTALL)
PICTURE = "<|image_pad|>"


@dataclass(frozen=True)
class Script:
    """One example as token ids, ONE placeholder per picture, and the grid (t, rows, columns) that each picture will have.

    `labels` has the ids of what is taught and IGNORE elsewhere; `where` names the record.
    """

    where: str
    ids: list[int]
    labels: list[int]
    pictures: list[Picture]
    grids: list[tuple[int, int, int]]
    picture_tokens: list[int]
    picture_id: int

    @property
    def length(self) -> int:
        """Tokens it takes in a row, pictures at their real number of tokens."""
        return len(self.ids) + sum(self.picture_tokens) - len(self.picture_tokens)

    def widened(self) -> tuple[list[int], list[int]]:
        """ids and labels with each picture's placeholder at its real number of tokens."""
        ids, labels = [], []
        counts = iter(self.picture_tokens)
        for token, label in zip(self.ids, self.labels, strict=True):
            count = next(counts) if token == self.picture_id else 1
            ids += [token] * count
            labels += [label] * count
        return ids, labels


@dataclass(frozen=True)
class Chat:
    """A model's way of writing: its tokenizer, its chat template, its picture limits."""

    tokenizer: Tokenizer
    template: Template
    limits: Limits
    family: Family
    picture_id: int

    def render(self, turns: Sequence[Turn], answer_next: bool = False) -> str:
        """The conversation as text, one placeholder per picture; `answer_next` ends it with the assistant's header."""
        messages = [{"role": turn.role, "content": _content(turn)} for turn in turns]
        return self.template.render(messages=messages, add_generation_prompt=answer_next, tools=None)

    def write_scripts(self, record: Record) -> list[Script]:
        """The record as training examples: one, or one per answer where the template rewrites earlier turns.

        Raises UserError if the template leaves nothing taught.
        """
        if not self.family.rewrites_turns:
            return [self._script(record.where, record.turns, last_only=False)]
        answers = [number for number, turn in enumerate(record.turns) if turn.role == "assistant"]
        return [self._script(record.where, record.turns[: number + 1], last_only=True) for number in answers]

    def _script(self, where: str, turns: tuple[Turn, ...], last_only: bool) -> Script:
        text = self.render(turns)
        spans = [match.span(1) for match in TAUGHT.finditer(text)]
        if not spans:
            what, fix = "the chat template leaves nothing to teach", "use the chat template of an instruct model"
            raise UserError(Problem(where, what, fix))
        if last_only:
            spans = spans[-1:]
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        labels = [IGNORE] * len(encoding.ids)
        token = 0
        for start, end in spans:
            while encoding.offsets[token][0] < start:
                token += 1
            while token < len(labels) and encoding.offsets[token][0] < end:
                labels[token] = encoding.ids[token]
                token += 1
        pictures = Record(where, turns).pictures
        grids = [grid_of(picture.height, picture.width, self.limits) for picture in pictures]
        counts = [tokens_of(grid, self.limits.merge_size) for grid in grids]
        return Script(where, encoding.ids, labels, pictures, grids, counts, self.picture_id)

    def said(self, ids: Sequence[int]) -> str:
        """The text of ids, control tokens included."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def taught_texts(self, script: Script) -> list[str]:
        """What the record teaches, one text for each run of labels."""
        runs = groupby(script.labels, lambda label: label != IGNORE)
        return [self.said(list(labels)) for is_taught, labels in runs if is_taught]


def open_chat(model_dir: Path, min_pixels: int | None = None, max_pixels: int | None = None) -> Chat:
    """Reads tokenizer, template and limits from a model's folder; the bounds replace the processor's own.

    Raises UserError naming the file that is missing.
    """
    family = family_of(model_dir)
    if problems := talk_problems(model_dir):
        raise UserError(*problems)
    path = model_dir / "tokenizer.json"
    # As transformers renders it.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals["raise_exception"] = _refuse
    template = environment.from_string(read_template(model_dir) or "")
    read_model_json(path)  # the tokenizers library's own error names neither the file nor the cause
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library has no error of its own
        raise UserError(Problem(str(path), "is not a tokenizer", "download it again")) from error
    if (picture_id := tokenizer.token_to_id(PICTURE)) is None:
        raise UserError(Problem(str(path), f"has no token {PICTURE}", "bring the tokenizer.json of the model itself"))
    return Chat(tokenizer, template, read_limits(model_dir, min_pixels, max_pixels), family, picture_id)


def _content(turn: Turn) -> Any:
    if turn.role != "user":  # some templates want these turns as one text
        return turn.text
    return [{"type": "text", "text": part} if isinstance(part, str) else {"type": part.kind} for part in turn.parts]


def _refuse(message: str) -> None:
    raise UserError(Problem("chat template", message, "change the record so that the model's template accepts it"))
