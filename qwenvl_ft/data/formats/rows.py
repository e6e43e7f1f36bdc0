"""Reads rows, which have a question and an answer in keys of their own: alpaca, ms-swift's query and response, TRL's prompt and
completion, the columns of a table. What comes before them may stand under `history`, what is shown under `images` or `videos`.

    {"image": "a.png", "question": "What colour?", "answer": "Red."}
"""

from collections.abc import Iterator
from typing import Any

from qwenvl_ft.data.formats.calls import tools_of
from qwenvl_ft.data.formats.keys import FIXES, IDS, PICTURES, VIDEOS, Complaints, is_empty
from qwenvl_ft.data.formats.talk import Listed, Said, Talk
from qwenvl_ft.data.formats.turns import read_turns
from qwenvl_ft.data.magic import PICTURE_ENDINGS

# The names that a column has in the field, the first of them that is there is read and each other one is named.
QUESTION = ("question", "query", "prompt", "problem", "instruction", "user")
ANSWER = ("answer", "response", "output", "completion", "label", "answers", "solution", "caption", "text", "assistant")
PICTURE = (*PICTURES, "image_path", "image_paths", "image_file", "image_url", "image_urls", "img", "img_path", "picture",
           "pictures", "file_name")  # fmt: skip
VIDEO = (*VIDEOS, "video_path", "video_url")
BESIDE = ("system", "history", "tools", "objects")
COLUMNS_FIX = "say which column has it: columns: {{{}: COLUMN}}"
FRAMES = tuple(f".{ending}" for ending in PICTURE_ENDINGS)


def read_row(entry: dict[str, Any], where: str, complaints: Complaints) -> Talk:
    """A row with the names that a table's columns have."""
    question, answer = _first(entry, QUESTION), _first(entry, ANSWER)
    pictures, videos = _first(entry, PICTURE), _first(entry, VIDEO)
    known = {*IDS, *BESIDE, question, answer, pictures, videos}
    if question == "instruction":
        known.add("input")
    fixes = {key: f"name what is read, or leave it out: columns: {{{key}: null}}" for key in entry.keys() & {*QUESTION, *ANSWER}}
    complaints.unknown_keys(entry, where, known, FIXES | fixes)
    return Talk(
        _said(entry, question, answer, where, complaints),
        listed(entry, pictures, where, complaints),
        listed(entry, videos, where, complaints),
        tools_of(entry.get("tools"), f"{where}.tools", complaints),
        entry.get("objects"),
        front=True,
    )


def read_pairs(entry: dict[str, Any], where: str, complaints: Complaints) -> Talk:
    """A list of a user's and an assistant's texts: the Cauldron's `texts`, ms-swift's `conversation`."""
    key = "texts" if "texts" in entry else "conversation"
    complaints.unknown_keys(entry, where, {*IDS, *PICTURES, "system", key}, FIXES)
    return Talk(_pairs(entry, key, where, complaints), listed(entry, _first(entry, PICTURES), where, complaints), front=True)


def _pairs(entry: dict[str, Any], key: str, where: str, complaints: Complaints) -> Iterator[Said]:
    if not is_empty(entry.get("system")):
        yield _text(entry, "system", "system", where, complaints)
    for number, pair in enumerate(entry[key]):
        place = f"{where}.{key}[{number}]"
        if not isinstance(pair, dict):
            complaints.not_a("an object", pair, place, 'write {"user": "...", "assistant": "..."}')
            continue
        user = "human" if "human" in pair else "user"
        complaints.unknown_keys(pair, place, {user, "assistant"}, {})
        yield _text(pair, user, "user", place, complaints)
        yield _text(pair, "assistant", "assistant", place, complaints)


def is_pairs(value: Any) -> bool:
    """Whether this is what `read_pairs` reads."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and bool({"user", "human"} & value[0].keys())


def _first(entry: dict[str, Any], names: tuple[str, ...]) -> str:
    """The key that is there and holds something, else the first that is there, else none."""
    there = [name for name in names if name in entry]
    return next((name for name in there if not is_empty(entry[name])), there[0] if there else "")


def listed(entry: dict[str, Any], key: str, where: str, complaints: Complaints) -> list[Listed]:
    """The media that an entry lists under this key: one, or a list of them; a film may be a list of its frames."""
    value = entry.get(key) if key else None
    if is_empty(value):
        return []
    if not isinstance(value, list):
        return [Listed(value, f"{where}.{key}")]
    if key not in PICTURE and all(isinstance(name, str) and name.lower().endswith(FRAMES) for name in value):
        return [Listed(value, f"{where}.{key}")]
    return [Listed(name, f"{where}.{key}[{number}]") for number, name in enumerate(value)]


def _said(entry: dict[str, Any], question: str, answer: str, where: str, complaints: Complaints) -> Iterator[Said]:
    if not is_empty(entry.get("system")):
        yield _text(entry, "system", "system", where, complaints)
    yield from _history(entry.get("history"), f"{where}.history", complaints)
    asked = entry.get(question) if question else ""
    if isinstance(asked, list):  # TRL's prompt, as turns: only the completion is taught
        for turn in read_turns(asked, f"{where}.{question}", complaints):
            yield turn._replace(taught=bool(turn.taught))
    else:
        said = _text(entry, question, "user", where, complaints) if question else Said(where, "user", "")
        more = entry.get("input")
        if not is_empty(more) and question == "instruction" and said.content is not None:
            if isinstance(more, str):
                said = said._replace(content=f"{said.content}\n{more}")
            else:
                complaints.not_a("a text", more, f"{where}.input", "write a text")
        yield said
    answers = entry.get(answer) if answer else None
    if is_empty(answers):
        complaints.say(where, "has no answer", COLUMNS_FIX.format("answer"))
        yield Said(where, "assistant", None)
    elif isinstance(answers, list) and any(isinstance(turn, dict) and "role" in turn for turn in answers):
        yield from read_turns(answers, f"{where}.{answer}", complaints)
    elif isinstance(answers, list):
        if len(answers) == 1 and isinstance(answers[0], str):
            yield Said(f"{where}.{answer}", "assistant", answers[0])
        else:
            what = f"holds {len(answers)} answers, and one is taught" if len(answers) != 1 else "holds an answer that is no text"
            complaints.say(f"{where}.{answer}", what, f"keep the one to be taught, or {COLUMNS_FIX.format('answer')}")
            yield Said(where, "assistant", None)
    else:
        yield _text(entry, answer, "assistant", where, complaints)


def _text(entry: dict[str, Any], key: str, role: str, where: str, complaints: Complaints) -> Said:
    value = entry.get(key)
    if not isinstance(value, str):
        if key in entry:
            complaints.not_a("a text", value, f"{where}.{key}", f"write a text, or {COLUMNS_FIX.format(NAMES.get(role, role))}")
        else:
            complaints.say(where, f'has no key "{key}"', f"write it, or {COLUMNS_FIX.format(NAMES.get(role, role))}")
        return Said(where, role, None)
    return Said(f"{where}.{key}", role, value)


NAMES = {"user": "question", "assistant": "answer"}


def _history(history: Any, where: str, complaints: Complaints) -> Iterator[Said]:
    """Earlier questions and answers, as pairs."""
    if is_empty(history):
        return
    if not isinstance(history, list):
        complaints.not_a("a list", history, where, 'write [["question", "answer"]]')
        return
    for number, pair in enumerate(history):
        place = f"{where}[{number}]"
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            complaints.say(place, "is no pair of a question and its answer", 'write ["question", "answer"]')
            continue
        yield Said(place, "user", pair[0])
        yield Said(place, "assistant", pair[1])
