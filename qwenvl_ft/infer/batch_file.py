"""Answers a file of conversations, a line each, and goes on where it was stopped.

In:  {"messages": [{"role": "user", "content": [{"image": "chart.png"}, {"text": "read"}]}], "id": "anything"}
Out: {"line": 1, "id": "anything", "asked": "...", "answer": "..."}, or "error" in place of the answer; "cut": true is added to one
that max_new_tokens cut, "boxes" to one that gives boxes or points, px of the last picture. The order is that of the questions.
`asked` is a hash of the question and of who was asked how: a second run goes on only where they are the same.
Questions about the same media are asked together where they are not BATCHES_AHEAD apart; answers wait for those before them.
"""

import json
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwenvl_ft.data.boxes import facts_of
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.model import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_template, weight_files
from qwenvl_ft.folders.whole import short_hash
from qwenvl_ft.infer.decoding import GENERATION_CONFIG
from qwenvl_ft.infer.engine import Answer, Engine

Line = tuple[int, dict[str, Any]]
Said = Answer | UserError
BATCHES_AHEAD = 8  # are looked through for questions about the same media; as many answers may be lost where a run is killed


def read_questions(path: Path) -> list[Line]:
    """(line number, object) of each line that is not empty. Raises UserError with every line that is no question."""
    problems, found = [], []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not at U+2028, which JSON may hold as it is
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(Problem(str(path), "cannot be read as a text file", "give a file of JSON lines")) from error
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict) and isinstance(value.get("messages"), list):
            found.append((number, value))
        else:
            problems.append(Problem(f"{path}:{number}", "is no question", 'write {"messages": [{"role": "user", ...}]}'))
    if problems:
        raise UserError(*problems)
    return found


def answer_file(engine: Engine, lines: Sequence[Line], out: Path, batch_size: int, max_new_tokens: int,
                on_answer: Callable[[int, int], None], who: str = "") -> tuple[int, list[Problem]]:  # fmt: skip
    """Appends to `out` what is not yet answered there. `who` names model and adapter.

    Returns how many lines were answered there already, and the problems of those that could not be asked, now or before.
    Raises UserError if `out` holds the answers to other questions, or of another model.
    """
    hashes = [short_hash([who, max_new_tokens, line["messages"]]) for _, line in lines]
    before = read_answers(out)
    if [said["asked"] for said in before] != hashes[: len(before)]:
        raise other_answers(out)
    what, fix = "has an error in place of an answer", "mend the question, answer into another --out"
    problems = [Problem(f"{out}, line {said['line']}", what, fix) for said in before if "error" in said]
    done = len(before)
    for num_asked, answers in _in_turn(engine, lines[done:], batch_size, max_new_tokens):
        written = []
        for (number, line), asked, answer in zip(lines[done:], hashes[done:], answers, strict=False):
            said: dict[str, Any] = {"line": number} | ({"id": line["id"]} if "id" in line else {}) | {"asked": asked}
            if isinstance(answer, Answer):
                said |= {"answer": answer.text} | ({"cut": True} if answer.cut else {})
                said |= {"boxes": [facts_of(box) for box in answer.boxes]} if answer.boxes else {}
            else:
                problems += [replace(problem, where=f"line {number}, {problem.where}") for problem in answer.problems]
                said["error"] = str(answer)
            written.append(said)
        append_answers(out, written)
        done += len(answers)
        on_answer(len(before) + num_asked, len(lines))
    return len(before), problems


def _in_turn(engine: Engine, lines: Sequence[Line], batch_size: int, max_new_tokens: int) -> Iterator[tuple[int, list[Said]]]:
    """After each batch how many lines were asked, and the answers whose turn it is: of the lines in their order."""
    for start in range(0, len(lines), BATCHES_AHEAD * batch_size):
        ahead = lines[start : start + BATCHES_AHEAD * batch_size]
        order, said, done = together([_shown(line) for _, line in ahead]), dict[int, Said](), 0
        for first in range(0, len(ahead), batch_size):
            batch = order[first : first + batch_size]
            said |= zip(batch, _answers(engine, [ahead[place] for place in batch], max_new_tokens), strict=True)
            until = next((place for place in range(done, len(ahead)) if place not in said), len(ahead))
            yield start + first + len(batch), [said.pop(place) for place in range(done, until)]
            done = until


def together(keys: Sequence[Hashable]) -> list[int]:
    """The places of the keys, those of one key one after another, in the order of the first of each."""
    firsts: dict[Hashable, int] = {}
    for place, key in enumerate(keys):
        firsts.setdefault(key, place)
    return sorted(range(len(keys)), key=lambda place: firsts[keys[place]])


def _shown(line: dict[str, Any]) -> str:
    """What a question tells the system and shows, as it is written there."""
    told = [message for message in line["messages"] if isinstance(message, dict)]
    contents = [message.get("content") for message in told if message.get("role") != "system"]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    system = [message for message in told if message.get("role") == "system"]
    return short_hash([system, [part for part in parts if "text" not in part]])


def _answers(engine: Engine, batch: Sequence[Line], max_new_tokens: int) -> list[Said]:
    """An answer a line; if the batch cannot be opened, its lines are asked one by one, so that only the bad ones fail."""
    try:
        return list(engine.answer_many([line["messages"] for _, line in batch], max_new_tokens))
    except UserError as error:
        if len(batch) == 1:
            return [error]
        return [answer for line in batch for answer in _answers(engine, [line], max_new_tokens)]


def read_answers(out: Path) -> list[dict[str, Any]]:
    """What `out` holds already; a last line that was torn off is cut away.

    The file is there then, its folder made, and can be written to. Raises UserError where it cannot, or holds something else.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("ab+") as file:
            file.seek(0)
            content = file.read()
            whole = content.rpartition(b"\n")[0]
            said = [json.loads(line) for line in whole.split(b"\n")] if whole else []
            if (content and not whole) or not all(isinstance(line["asked"], str) for line in said):
                raise ValueError
            file.truncate(len(whole) + bool(whole))
            return said
    except OSError as error:
        raise UserError(Problem(str(out), f"cannot be written ({error.strerror})", "choose another --out")) from None
    except (ValueError, KeyError, TypeError):
        raise other_answers(out) from None


def append_answers(out: Path, said: Sequence[dict[str, Any]]) -> None:
    """Adds answers to what `out` holds. Raises UserError where the disk refuses."""
    try:
        with out.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in said))
    except OSError as error:
        fix = "mend that; the same command goes on there"
        raise UserError(Problem(str(out), f"cannot be written on ({error.strerror})", fix)) from None


def other_answers(out: Path) -> UserError:
    """What is said where `out` is not to be gone on with, and not to be lost."""
    what = "holds answers to other questions, of another model or with other settings"
    return UserError(Problem(str(out), what, "choose another --out, or delete it"))


def who_answers(model_dir: Path, adapter: Path | None, engine: Engine) -> str:
    """A hash of what answers: the folders, their files by size and time, the templates, and within which limits it sees."""
    files = [*weight_files(model_dir), model_dir / "tokenizer.json"]
    files += [path] if (path := model_dir / GENERATION_CONFIG).is_file() else []
    files += [adapter / ADAPTER_CONFIG, adapter / ADAPTER_WEIGHTS] if adapter else []
    states = [(str(path.resolve()), (of := path.stat()).st_size, of.st_mtime_ns) for path in files]
    chat, reading = engine.chat, engine.reading
    seen = [vars(chat.limits), vars(chat.video_limits), reading.video_fps, reading.video_max_frames]
    return short_hash([states, read_template(model_dir), *seen, chat.source])
