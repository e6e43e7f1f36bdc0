"""Finds boxes and points in a text, in the forms in which people and models write them.

The tags of the first Qwen-VL, the tokens of Qwen2-VL, and JSON objects with bbox_2d, bbox, point_2d or point. Every repetition is
possessive, so that a hostile text takes linear time.

    >>> list(marks("See <ref>it</ref><box>(1,2),(3,4)</box>.", as_json=False))
    ['See ', Mark(numbers=(1.0, 2.0, 3.0, 4.0), label='it', kind='tag'), '.']
"""

import json
import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple


class Mark(NamedTuple):
    """Four numbers of a box, two of a point, or none: a reference, which names something and does not say where it is.

    kind: tag (the first Qwen-VL's), token (Qwen2-VL's), object (of a JSON text that holds boxes, labels and nothing else), or
    bare: the numbers alone, within a JSON text that says more and is kept.
    """

    numbers: tuple[float, ...]
    label: str
    kind: Literal["tag", "token", "object", "bare"]


class Stray(NamedTuple):
    """What begins as a box and is none; `fix` says how one is written. A placeholder has no number: a prompt says with it what an
    answer looks like."""

    text: str
    fix: str

    @property
    def is_placeholder(self) -> bool:
        return VALUE.search(self.text) is None


VALUE = re.compile(r"(?<![\w.])[-.]?\d")  # a number by itself, as the 1 of x1 is not
NUMBER = r"-?\d{1,9}+(?:\.\d{1,30}+)?(?:[eE][-+]?\d{1,2})?"
POINT = rf"\(\s*+{NUMBER}\s*+,\s*+{NUMBER}\s*+\)"
PLACE = rf"\s*+{POINT}(?:\s*+,\s*+{POINT})?+\s*+"
TAG_REF, TAG_BOX = r"<ref>(?:(?!</?ref>|<box>).)*+</ref>", rf"<box>{PLACE}</box>"
TOKEN_REF = r"<\|object_ref_start\|>(?:(?!<\|).)*+<\|object_ref_end\|>"
TOKEN_BOX = rf"<\|box_start\|>{PLACE}<\|box_end\|>"
# Objects within which there is no other, and lists of these.
STRING = r'"(?:[^"\\]++|\\.)*+"'
FLAT = rf'\[(?:[^\[\]{{}}"]++|{STRING})*+\]'
MEMBER = rf"{STRING}\s*+:\s*+(?:{STRING}|-?\d[\d.eE+-]{{0,40}}+|true|false|null|{FLAT})"
OBJECT = rf"\{{\s*+{MEMBER}(?:\s*+,\s*+{MEMBER})*+\s*+\}}"
LIST = rf"\[\s*+{OBJECT}(?:\s*+,\s*+{OBJECT})*+\s*+\]"
KEYS = ("bbox_2d", "bbox", "point_2d", "point")
NUMBERS = rf"\[\s*+{NUMBER}\s*+,\s*+{NUMBER}(?:\s*+,\s*+{NUMBER}\s*+,\s*+{NUMBER})?+\s*+\]"
PLACES = rf"{NUMBERS}|\[\s*+{NUMBERS}(?:\s*+,\s*+{NUMBERS})*+\s*+\]"
KEYED = rf"""["'](?:{"|".join(KEYS)})["']\s*+:\s*+(?:(?P<places>{PLACES})|\[(?!\s*+\])[\[\s]*+[^\[\]{{}}\n]{{0,60}}+\]?+)"""
TAGGED = "|".join((
    rf"(?P<tag>(?:{TAG_REF}\s*+)?{TAG_BOX}(?:[ \t]*+{TAG_BOX})*+|{TAG_REF})",
    rf"(?P<token>(?:{TOKEN_REF}\s*+)?{TOKEN_BOX}(?:[ \t]*+{TOKEN_BOX})*+|{TOKEN_REF})",
    r"(?P<stray>(?P<box><box>[^<]*+</box>)|(?:<quad>\s*+\(|<\|box_start\|>)[^<]{0,60}+|<\|(?:box_end|object_ref_(?:start|end))\|>)",
))  # fmt: skip

IN_TAGS = re.compile(TAGGED, re.DOTALL)
ANYWHERE = re.compile(rf"{TAGGED}|(?P<json>{LIST}|{OBJECT})|(?P<keyed>{KEYED})", re.DOTALL)
BOX_OF = {"tag": re.compile(TAG_BOX), "token": re.compile(TOKEN_BOX)}
REFS = {"tag": ("<ref>", "</ref>"), "token": ("<|object_ref_start|>", "<|object_ref_end|>")}
FIXES = {"<quad>": "write its box, <box>(x1,y1),(x2,y2)</box>: later families have no form for four corners",
         "<box>": "write <box>(x1,y1),(x2,y2)</box>",
         "<|box": "write <|box_start|>(x1,y1),(x2,y2)<|box_end|>",
         "<|obj": "write <|object_ref_start|>what it is<|object_ref_end|>"}  # fmt: skip
KEYED_FIX = "write the four numbers of a box or the two of a point"
NUMBER_OF, OBJECT_OF, KEYED_OF, NUMBERS_OF = map(re.compile, (NUMBER, OBJECT, KEYED, NUMBERS))
TAG = re.compile(r"<(?:ref|box|quad)>|<\|(?:box|object_ref)_")
JSON_KEY = re.compile(rf"""["'](?:{"|".join(KEYS)})["']\s*+:\s*+\[[\[\s]*+(?!\])(["']?[-.]?\d)?""")


def has_tags(text: str) -> bool:
    """Whether there may be marks in tags or tokens; quick where there are none."""
    return "<" in text and TAG.search(text) is not None


def has_json(text: str) -> bool:
    """Whether there may be marks in JSON; quick where there are none."""
    return ("bbox" in text or "point" in text) and JSON_KEY.search(text) is not None


def has_numbers(text: str) -> bool:
    """Whether there are marks in JSON that begin with a number: no placeholders of a prompt."""
    return ("bbox" in text or "point" in text) and any(match[1] for match in JSON_KEY.finditer(text))


def marks(text: str, as_json: bool) -> Iterator[str | Mark | Stray]:
    """The text in pieces, boxes and references as marks; those in JSON only if `as_json`."""
    at = 0
    for match in (ANYWHERE if as_json else IN_TAGS).finditer(text):
        yield text[at : match.start()]
        at = match.end()
        said = match[0]
        if match["tag"] or match["token"]:
            yield from _tagged(said, "tag" if match["tag"] else "token")
        elif match["stray"]:
            is_text = match["box"] and not NUMBER_OF.search(said)  # somebody's <box> of another kind
            yield said if is_text else Stray(said, next(fix for start, fix in FIXES.items() if said.startswith(start)))
        elif match["json"]:
            yield from _objects(said, _is_nested(text, match.start()))
        else:
            yield from _bare(said, "")
    yield text[at:]


def _tagged(said: str, kind: Literal["tag", "token"]) -> Iterator[Mark]:
    """The boxes of one reference, or the reference alone."""
    opening, closing = REFS[kind]
    label = ""
    if said.startswith(opening):
        label, _, said = said.removeprefix(opening).partition(closing)
    found = [Mark(_numbers(box), label, kind) for box in BOX_OF[kind].findall(said)]
    yield from found or [Mark((), label, kind)]


def _objects(said: str, nested: bool) -> Iterator[str | Mark | Stray]:
    """Objects of boxes and labels as marks; where they say more, or are part of more, their numbers."""
    objects = OBJECT_OF.findall(said)
    values = [_parse(found) for found in objects]
    keys = [[key for key in KEYS if key in value] for value in values]
    plain = all(
        len(of) == 1 and value.keys() <= {*of, "label"} and isinstance(value.get("label", ""), str) and _places(value[of[0]])
        for of, value in zip(keys, values, strict=True)
    )
    if plain and not nested:
        for of, value in zip(keys, values, strict=True):
            yield Mark(tuple(map(float, value[of[0]])), value.get("label", ""), "object")
        return
    at = 0
    for found, value in zip(OBJECT_OF.finditer(said), values, strict=True):
        yield said[at : found.start()]
        at = found.end()
        label = value.get("label")
        yield from _bare(found[0], label if isinstance(label, str) else "")
    yield said[at:]


def _bare(said: str, label: str) -> Iterator[str | Mark | Stray]:
    """The numbers behind each key of a box, and the text around them."""
    at = 0
    for keyed in KEYED_OF.finditer(said):
        if keyed["places"] is None:
            yield said[at : keyed.start()]
            yield Stray(keyed[0], KEYED_FIX)
            at = keyed.end()
            continue
        for place in NUMBERS_OF.finditer(said, keyed.start("places"), keyed.end()):
            yield said[at : place.start()]
            at = place.end()
            yield Mark(_numbers(place[0]), label, "bare")
    yield said[at:]


def _parse(said: str) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(said)
    except ValueError:  # a newline in a string, a number with two points
        return {}
    return value


def _places(value: Any) -> bool:
    return isinstance(value, list) and len(value) in (2, 4) and all(type(number) in (int, float) for number in value)


def _numbers(said: str) -> tuple[float, ...]:
    return tuple(map(float, NUMBER_OF.findall(said)))


def _is_nested(text: str, at: int) -> bool:
    """Whether what begins at `at` is part of a larger JSON text: the value of a key, or an item among others."""
    before: list[str] = []
    while at and len(before) < 2:
        at -= 1
        if not text[at].isspace():
            before.append(text[at])
    return "".join(before)[:2] in (':"', ",}", ",]") or before[:1] == ["["]
