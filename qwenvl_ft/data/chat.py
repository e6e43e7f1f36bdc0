"""Writes what a model reads: the prompt before an answer, and the answers that a record teaches. Needs no torch.

`Chat.prompt` is the one place where a prompt is made: an answer is taught behind the very ids that asking for it sends. The model's
own template writes them. A control token in somebody's text is tokenised as the letters that it is written with.

    >>> chat = open_chat(Path("data/tiny"))
    >>> chat.said(chat.prompt([Turn("user", ("Hi",))]))[-46:]
    '<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n'
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Template
from tokenizers import Tokenizer

from qwenvl_ft.data.boxes import Seen, written
from qwenvl_ft.data.families import Family, family_of
from qwenvl_ft.data.geometry import Limits, VideoLimits, grid_of, read_limits, read_video_limits, tokens_of
from qwenvl_ft.data.records import Medium, Picture, Record, Turn, Video
from qwenvl_ft.data.template import (
    CLOSE_THOUGHT,
    OPEN_THOUGHT,
    compile_template,
    knows_tools,
    render,
    settle,
    settled,
    split_thought,
    thinks,
)
from qwenvl_ft.data.tools import call_of, function_of
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.model import read_config, read_model_json, read_template
from qwenvl_ft.folders.problems import talk_problems
from qwenvl_ft.folders.runs import processor_folder
from qwenvl_ft.values import Thinking

SHORT, MOST_SHORT = 64, 50_000  # letters of a text whose ids are kept beyond its record; and of how many texts
IGNORE = -100  # the label that torch's cross entropy skips
END, PICTURE, VIDEO = "<|im_end|>", "<|image_pad|>", "<|video_pad|>"
STEP = "<{:.1f} seconds><|vision_start|>" + VIDEO + "<|vision_end|>"  # of a video whose times are written; source: Qwen3VLProcessor
TOKENS_PER_SECOND = 4  # of Qwen2.5-VL, where its config.json does not say it
# Special tokens that people write and models say. Each other one ends a turn or poses as a picture.
MEANT = {f"<|{name}_{side}|>" for name in ("object_ref", "box", "quad") for side in ("start", "end")}


@dataclass(frozen=True)
class Script:
    """One example as token ids, ONE placeholder for each run of a medium's tokens, and the grid (t, rows, columns) that each medium
    will have.

    `labels` has the ids of what is taught and IGNORE elsewhere; `where` names the record; `counts` are the tokens of each
    placeholder, which is one of `placeholders`: a picture's, a video's.
    """

    where: str
    ids: list[int]
    labels: list[int]
    media: list[Medium]
    grids: list[tuple[int, int, int]]
    counts: list[int]
    placeholders: tuple[int, int | None]

    @property
    def length(self) -> int:
        """Tokens it takes in a row, pictures and videos at their real number of tokens."""
        return len(self.ids) + sum(self.counts) - len(self.counts)

    def widened(self) -> tuple[list[int], list[int]]:
        """ids and labels with each placeholder at its real number of tokens."""
        ids, labels = [], []
        counts = iter(self.counts)
        for token, label in zip(self.ids, self.labels, strict=True):
            count = next(counts) if token in self.placeholders else 1
            ids += [token] * count
            labels += [label] * count
        return ids, labels

    def shared_with(self, before: "Script") -> int:
        """How many tokens, widened, both begin with: all media and nothing that is taught lie in them, and what follows them is not
        taught either. 0 for a script of other media."""
        if self.media != before.media:
            return 0
        untaught = [next((at for at, label in enumerate(of.labels) if label != IGNORE), len(of.ids)) for of in (self, before)]
        most = max(0, min(untaught) - 1)
        same = zip(self.ids[:most], before.ids, strict=False)
        end = next((at for at, (own, other) in enumerate(same) if own != other), most)
        whole = sum(id in self.placeholders for id in self.ids[:end]) == len(self.counts)
        return end + sum(self.counts) - len(self.counts) if whole else 0


def runs_of(medium: Medium, grid: tuple[int, int, int], family: Family) -> list[tuple[int, int, int]]:
    """The grid of each run of a medium's tokens: a video whose times are written has a run a step."""
    steps, rows, columns = grid
    return [(1, rows, columns)] * steps if isinstance(medium, Video) and family.clock == "written" else [grid]


@dataclass(frozen=True)
class Chat:
    """A model's way of writing: its tokenizer, its chat template, its limits of pictures and videos.

    `source` is the template's text, with the default that `thinking` has given it: whoever renders it asks as was taught.
    """

    tokenizer: Tokenizer  # with `encode_special_tokens`: it reads no special token out of a text
    source: str
    limits: Limits
    family: Family
    thinking: Thinking
    video_limits: VideoLimits
    tokens_per_second: float = 0  # of the places that a video's steps take, where the family has them by the second

    def __getstate__(self) -> dict[str, Any]:
        """For another process: what it is made of; the tokenizer as its JSON, and nothing that was compiled."""
        made_of: dict[str, Any] = {part.name: getattr(self, part.name) for part in fields(self)}
        return made_of | {"tokenizer": self.tokenizer.to_str()}

    def __setstate__(self, made_of: dict[str, Any]) -> None:
        self.__dict__.update(made_of | {"tokenizer": _reads_no_special(Tokenizer.from_str(made_of["tokenizer"]))})

    def prompt(self, turns: Sequence[Turn], thinking: bool | None = None, tools: Sequence[str] = ()) -> list[int]:
        """The ids that ask for the next answer, one placeholder per picture or video. `thinking` replaces the default; `tools`
        are those that the model is told of, as in a Record.

        Raises UserError for a conversation that the template refuses, and for tools where it knows none.
        """
        self._check_tools(turns, tools)
        return self._prompt(self.written(turns), thinking, tools)[0]

    def answer_of(self, turn: Turn) -> str:
        """What an assistant's turn says: its text and, as the template writes them, its calls. Raises UserError for calls where
        the template knows no tools."""
        self._check_tools([turn], ())
        mark = _mark([turn], ())
        return turn.text + self._calls(turn, mark).replace(mark, "<")

    def written(self, turns: Sequence[Turn]) -> list[Turn]:
        """The turns of a conversation from its beginning, their boxes as the texts that the family reads and says."""
        boxes = any(turn.boxes for turn in turns)
        return written(turns, self.family.boxes, self.seen(turns)) if boxes else list(turns)

    def seen(self, turns: Sequence[Turn]) -> list[Seen]:
        """The size of each picture of the turns, and the size that the processor gives it."""
        pictures = [medium for turn in turns for medium in turn.media if isinstance(medium, Picture)]
        grids = [self.grid_of(picture) for picture in pictures]
        patch = self.limits.patch_size
        return [
            Seen(of.height, of.width, rows * patch, columns * patch) for of, (_, rows, columns) in zip(pictures, grids, strict=True)
        ]

    @property
    def notes(self) -> list[str]:
        """Which of its settings changes nothing."""
        unheeded = self.thinking == "on" and not self.thinks
        return ["thinking: on changes nothing: the model's chat template knows no thoughts"] * unheeded

    def opens_thought(self, prompt: Sequence[int]) -> bool:
        """Whether the prompt ends within a thought, whose opening tag the answer then lacks."""
        return self.said(prompt[-8:]).endswith(OPEN_THOUGHT)

    def write_scripts(self, record: Record) -> list[Script]:
        """The record as training examples: one, or several where the prompt of a later answer is not what was taught so far and
        goes on. Templates drop the thoughts of earlier turns, and white space is tokenised otherwise at an answer's beginning.

        Raises UserError if nothing is taught, a thought is missing or too much, or the template knows no tools and there are some.
        """
        self._check_tools(record.turns, record.tools)
        scripts: list[Script] = []
        ids: list[int] = []
        labels: list[int] = []
        last = 0
        cache: dict[str, list[int]] = {}
        turns = self.written(record.turns)
        for number, turn in enumerate(turns):
            if turn.role != "assistant" or not turn.taught:
                continue
            prompt, text = self._prompt(turns[:number], None, record.tools, cache)
            if prompt[: len(ids)] != ids:
                scripts.append(self._script(record.where, ids, labels, turns[:last]))
                ids, labels = [], []
            answer = [*self._answer(turn, text, number, cache), self._special[END]]
            labels = labels + [IGNORE] * (len(prompt) - len(ids)) + answer
            ids, last = prompt + answer, number + 1
        if not ids or not self._closing.startswith(END):
            what, fix = "the chat template leaves nothing to teach", "use the chat template of an instruct model"
            raise UserError(Problem(record.where, what, fix))
        return [*scripts, self._script(record.where, ids, labels, turns[:last])]

    def _script(self, where: str, ids: list[int], labels: list[int], turns: Sequence[Turn]) -> Script:
        closing = self._encode(self._closing.removeprefix(END), {})  # not taught: a model never has to say it
        return self._shown(where, ids + closing, labels + [IGNORE] * len(closing), turns)

    def asking(self, turns: Sequence[Turn], thinking: bool | None = None, tools: Sequence[str] = ()) -> Script:
        """`prompt` as a script, with what its media take; nothing of it is taught."""
        ids = self.prompt(turns, thinking, tools)
        return self._shown("", ids, [IGNORE] * len(ids), turns)

    def _shown(self, where: str, ids: Sequence[int], labels: Sequence[int], turns: Sequence[Turn]) -> Script:
        """The script of ids with one placeholder a medium, in whose place come those of its runs, its times between them."""
        media = [medium for turn in turns for medium in turn.media]
        grids = [self.grid_of(medium) for medium in media]
        runs = [runs_of(medium, grid, self.family) for medium, grid in zip(media, grids, strict=True)]
        texts = [self._times(medium) for medium in media]
        shown, taught = [*ids], [*labels]
        if any(texts):
            placed = [at for at, id in enumerate(ids) if id in (self.picture_id, self.video_id)]
            for at, text in reversed([*zip(placed, texts, strict=True)]):
                written = self.encode(text) if text else [ids[at]]
                shown[at : at + 1], taught[at : at + 1] = written, [labels[at]] * len(written)
        counts = [tokens_of(run, self.limits.merge_size) for of_medium in runs for run in of_medium]
        return Script(where, shown, taught, media, grids, counts, (self.picture_id, self.video_id))

    def grid_of(self, medium: Medium) -> tuple[int, int, int]:
        """(steps, rows, columns) of a medium's patches, within its own bounds. Raises UserError for bounds that cannot be kept."""
        if isinstance(medium, Video):
            return self.video_limits.grid_of(medium)
        return grid_of(medium.height, medium.width, self.limits.of(medium))

    def _times(self, medium: Medium) -> str:
        """A video with the time before each step, the mean of its first and its last frame's; "" where no times are written."""
        if not isinstance(medium, Video) or self.family.clock != "written":
            return ""
        frames = self.video_limits.step_frames
        indices = [*medium.indices] + [medium.indices[-1]] * (-len(medium.indices) % frames)
        seconds = [at / medium.fps for at in indices]
        ends = zip(seconds[::frames], seconds[frames - 1 :: frames], strict=True)
        return "".join(STEP.format((first + last) / 2) for first, last in ends)

    def _answer(self, turn: Turn, prompt: str, number: int, cache: dict[str, list[int]]) -> list[int]:
        """The ids of what the model has to say behind the prompt, without its end token: text, calls of tools, or both."""
        mark = _mark([turn], ())
        said = self._marked(self._continuation(turn, prompt, number), mark)
        return self._encode(said + self._calls(turn, mark), cache, mark)

    def _calls(self, turn: Turn, mark: str) -> str:
        """The turn's calls as the template writes them behind its text: what they add to an answer without them."""
        if not turn.calls:
            return ""
        answer = {"content": self._marked(split_thought(turn.text)[1] if self.thinks else turn.text, mark)}
        without, whole = self._probed(answer), self._probed(answer | {"tool_calls": self._message(turn, mark)["tool_calls"]})
        before = without.removesuffix(self._closing)
        if not (whole.startswith(before) and whole.endswith(self._closing)):
            what, fix = "writes calls elsewhere than behind an answer's text", "use a model whose template does"
            raise UserError(Problem("chat template", what, fix))
        return whole.removeprefix(before).removesuffix(self._closing)

    def _check_tools(self, turns: Sequence[Turn], tools: Sequence[str]) -> None:
        """Raises UserError for tools, their calls and their answers where the template knows none."""
        found = "is told of tools" if tools else "calls a tool" if any(turn.calls for turn in turns) else ""
        found = found or ("holds a tool's answer" if any(turn.role == "tool" for turn in turns) else "")
        if found and not self._knows_tools:
            fix = "use a model whose template does (Qwen3-VL, Qwen3.5), or put such a template into the model's folder"
            raise UserError(Problem("tools", f"the record {found}, and the model's chat template writes no tools", fix))

    def _continuation(self, turn: Turn, prompt: str, number: int) -> str:
        """What the model has to say behind the prompt, without calls and end token: the turn's text, its thought in the form that
        templates write."""
        if not self.thinks:
            return turn.text
        thought, answer = split_thought(turn.text)
        place = f"conversations[{number}]"
        if thought and prompt.endswith(CLOSE_THOUGHT):
            fix = "set thinking: on to teach it, or take it out of the record"
            raise UserError(Problem(place, f"holds a thought, and thinking is {self.thinking}", fix))
        if not thought and self.thinking == "on":
            fix = 'write it as "reasoning": "..." beside the value, or set thinking: off'
            raise UserError(Problem(place, "holds no thought, and thinking is on", fix))
        if prompt.endswith(OPEN_THOUGHT):
            return f"{thought}{CLOSE_THOUGHT}{answer}"
        return f"{OPEN_THOUGHT}{thought}{CLOSE_THOUGHT}{answer}" if thought else answer

    def _prompt(
        self, turns: Sequence[Turn], thinking: bool | None, tools: Sequence[str] = (), cache: dict[str, list[int]] | None = None
    ) -> tuple[list[int], str]:
        """The prompt's ids and its text, in which control tokens of the turns and the tools are marked."""
        mark = _mark(turns, tools)
        messages = [self._message(turn, mark) for turn in turns]
        functions = [self._marked_object(function_of(tool), mark) for tool in tools]
        text = render(self.template, messages, True, thinking, functions)
        return self._encode(text, {} if cache is None else cache, mark), text

    def _message(self, turn: Turn, mark: str) -> dict[str, Any]:
        """A turn for the template; in its texts the mark stands for the first letter of each control token."""
        if turn.role == "user" or (turn.role == "tool" and turn.media):
            parts = [
                {"type": of.kind} if isinstance(of, Picture | Video) else {"type": "text", "text": self._marked(str(of), mark)}
                for of in turn.parts
            ]
            return {"role": turn.role, "content": parts}
        thought, said = split_thought(turn.text) if turn.role == "assistant" and self._takes_thoughts else ("", turn.text)
        # Some templates want these turns as one text.
        message: dict[str, Any] = {"role": turn.role, "content": self._marked(said, mark)}
        if thought:
            message["reasoning_content"] = self._marked(thought, mark)
        if turn.calls:
            message["tool_calls"] = [self._marked_object(call_of(str(call)), mark) for call in turn.calls]
        return message

    def _marked(self, text: str, mark: str) -> str:
        return self._acting.sub(lambda token: mark + token[0][1:], text)

    def _marked_object(self, value: dict[str, Any], mark: str) -> Any:
        """The same object, its keys and texts marked; JSON writes no letter of a token otherwise."""
        return json.loads(self._marked(json.dumps(value, ensure_ascii=False), mark))

    def encode(self, text: str) -> list[int]:
        """The ids of a text whose special tokens are meant."""
        return self._encode(text, {})

    def _encode(self, text: str, cache: dict[str, list[int]], mark: str = "") -> list[int]:
        """Special tokens as their ids and what is between them as text, as tokenizers do; then the mark is a "<" again."""
        ids: list[int] = []
        for piece in self._splits.split(text):
            if piece in self._special:
                ids.append(self._special[piece])
            elif piece:
                letters = piece.replace(mark, "<") if mark else piece
                kept = self._short if len(letters) <= SHORT else cache
                if letters not in kept:
                    if len(self._short) >= MOST_SHORT:
                        self._short.clear()
                    kept[letters] = self.tokenizer.encode(letters, add_special_tokens=False).ids
                ids += kept[letters]
        return ids

    def said(self, ids: Sequence[int]) -> str:
        """The text of ids, control tokens included."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def answered(self, ids: Sequence[int]) -> str:
        """The text of an answer's ids: without ends, with boxes and references."""
        return self.said([id for id in ids if id not in self._silent])

    def taught_texts(self, script: Script) -> list[str]:
        """What the record teaches, one text for each run of labels."""
        runs = groupby(script.labels, lambda label: label != IGNORE)
        return [self.said(list(labels)) for is_taught, labels in runs if is_taught]

    @cached_property
    def template(self) -> Template:
        """The compiled template."""
        return compile_template(self.source)

    @cached_property
    def thinks(self) -> bool:
        """Whether the template knows thoughts: see `template.thinks`."""
        return thinks(self.template)

    @cached_property
    def _knows_tools(self) -> bool:
        """Whether the template writes tools: see `template.knows_tools`."""
        return knows_tools(self.template)

    @cached_property
    def picture_id(self) -> int:
        """The placeholder's id, of which a picture has one for each of its tokens."""
        return self._special[PICTURE]

    @cached_property
    def video_id(self) -> int | None:
        """The placeholder of a video."""
        return self._special.get(VIDEO)

    @cached_property
    def _short(self) -> dict[str, list[int]]:
        """The ids of short texts: what the template writes in every record, and answers such as yes."""
        return {}

    @cached_property
    def _special(self) -> dict[str, int]:
        return {token.content: id for id, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}

    @cached_property
    def _splits(self) -> re.Pattern[str]:
        return re.compile(f"({_any_of(self._special)})")

    @cached_property
    def _acting(self) -> re.Pattern[str]:
        """Control tokens, with or without their last ">": some template writes one behind a tool's name."""
        return re.compile(_any_of(token.removesuffix(">") for token in self._special.keys() - MEANT))

    @cached_property
    def _silent(self) -> frozenset[int]:
        return frozenset(id for token, id in self._special.items() if token not in MEANT)

    @cached_property
    def _takes_thoughts(self) -> bool:
        """Whether the template wants the thought of an answer apart from its text."""
        return PROBE in self._probed({"content": "b", "reasoning_content": PROBE})

    @cached_property
    def _closing(self) -> str:
        """What the template writes behind an answer: the end token and perhaps a newline."""
        return self._probed({"content": PROBE}).partition(PROBE)[2]

    def _probed(self, answer: dict[str, Any]) -> str:
        talk = [{"role": "user", "content": "a"}, {"role": "assistant"} | answer]
        return render(self.template, talk, answer_next=False)


PROBE = "a text that no template writes"


def open_chat(
    model_dir: Path, min_pixels: int | None = None, max_pixels: int | None = None, thinking: Thinking | None = None,
    video_max_pixels: int | None = None, adapter: Path | None = None,
) -> Chat:  # fmt: skip
    """Reads tokenizer, template and limits from a model's folder, the latter two from an adapter's own if it has them.

    The bounds replace the processor's. `thinking` defaults to what the template was set to in training, else to off.
    Raises UserError naming the file that is missing.
    """
    family = family_of(model_dir)
    if problems := talk_problems(model_dir):
        raise UserError(*problems)
    path = model_dir / "tokenizer.json"
    folder = processor_folder(model_dir, adapter)
    source = read_template(folder) or read_template(model_dir) or ""
    thinking = thinking or settled(source) or "off"
    source = settle(source, thinking)
    read_model_json(path)  # the tokenizers library's own error names neither the file nor the cause
    try:
        tokenizer = _reads_no_special(Tokenizer.from_file(str(path)))
    except Exception as error:  # the library has no error of its own
        raise UserError(Problem(str(path), "is not a tokenizer", "download it again")) from error
    limits = read_limits(folder, min_pixels, max_pixels)
    videos = read_video_limits(folder, family.clock == "written", video_max_pixels)
    ticks = read_config(model_dir).get("vision_config", {}).get("tokens_per_second", TOKENS_PER_SECOND)
    ticks = ticks if family.clock == "seconds" else 0
    chat = Chat(tokenizer, source, limits, family, thinking, videos, ticks)
    if missing := [token for token in (PICTURE, END) if token not in chat._special]:
        raise UserError(Problem(str(path), f"has no token {missing[0]}", "bring the tokenizer.json of the model itself"))
    return chat


def _reads_no_special(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.encode_special_tokens = True
    return tokenizer


def _mark(turns: Sequence[Turn], tools: Sequence[str]) -> str:
    """A letter that stands nowhere in them."""
    texts = [part for turn in turns for part in turn.parts if isinstance(part, str)]
    objects = [call_of(str(call)) for turn in turns for call in turn.calls] + [function_of(tool) for tool in tools]
    texts += [json.dumps(value, ensure_ascii=False) for value in objects]
    return next(mark for mark in map(chr, range(0xF8FF, 0, -1)) if not any(mark in text for text in texts))


def _any_of(tokens: Iterable[str]) -> str:
    return "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
