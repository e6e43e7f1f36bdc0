"""Makes the record of what a reader found, and says everything that is wrong with it, at the place where it stands.

Whatever form a record came in, these are the rules: user and assistant take turns, tools answer calls, something is taught, every
placeholder has its medium and every medium its placeholder.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from qwenvl_ft.data.boxes import placed
from qwenvl_ft.data.formats.documented import check_text, check_untagged, read_parts
from qwenvl_ft.data.formats.keys import Complaints
from qwenvl_ft.data.formats.objects import Objects
from qwenvl_ft.data.formats.talk import Finder, Listed, Said, Shown, Talk
from qwenvl_ft.data.records import InTable, InTar, Medium, Part, Picture, Record, Turn
from qwenvl_ft.errors import UserError
from qwenvl_ft.values import BoxUnit

NAMES = {"image": ("<image>", "picture"), "video": ("<video>", "video")}
EMPTY_FIX = "write its text or delete the turn and its partner"
TURNS_FIX = "let user and assistant take turns, user first"


def assemble(talk: Talk, where: str, finder: Finder, complaints: Complaints, boxes: BoxUnit | None = None) -> Record | None:
    """The record, or None where anything was complained about. `boxes` says what the numbers of those in its texts are."""
    before = len(complaints.problems)
    media = _Media(talk, finder, complaints)
    places: list[str] = []
    objects = Objects(talk.objects, where, complaints) if talk.objects is not None else None
    turns: list[Turn] = []
    place, last, expected = where, "", "user"
    answered = taught = False
    hollow = ""  # the place of a user's turn that has no text: the media may come there
    for text in talk.tools:
        check_text(text, where, complaints)
    for number, said in enumerate(talk.said):
        place, role = said.place, "assistant" if said.role == "call" else said.role
        if said.content is None:
            answered |= expected == "assistant"
            taught = True  # perhaps
            last = expected
            expected = {"user": "assistant", "assistant": "user"}[expected]
            continue
        if role == "system" and number > 0:
            complaints.say(place, "a system turn stands after the first place", "move it to the front or delete it")
            continue
        goes_on = said.role == "call" and last == "assistant"  # an answer that ends in a call, or several calls
        follows = role == "tool" and (last == "tool" or (last == "assistant" and bool(turns) and bool(turns[-1].calls)))
        follows |= talk.in_parts and role == last == "user"
        if role not in ("system", None, expected) and not goes_on and not follows:
            complaints.say(place, f"is from the {role} where the {expected}'s turn was due", TURNS_FIX)
        if role != "system":
            last = role or expected
            expected = "user" if last == "assistant" else "assistant"
        parts = tuple(_parts(said, role or "user", media, objects, complaints))
        if not (said.calls or role in ("tool", None)) and not _says_something(said):
            if talk.front and role == "user" and media.any_listed and not any(turn.role == "user" for turn in turns):
                hollow = place
            else:
                complaints.say(place, f"the {role}'s turn is empty", EMPTY_FIX)
        answers = role not in ("user", "system", "tool")
        answered |= answers
        teaches = said.taught is not False
        taught |= answers and teaches
        if goes_on and turns:
            if turns[-1].taught != teaches:
                complaints.say(place, 'has another "loss" than the answer that it belongs to', "write the same in both")
            turns[-1] = replace(turns[-1], calls=turns[-1].calls + said.calls)
        else:
            turns.append(Turn(role or "user", parts, taught=teaches or not answers, calls=said.calls))
            places.append(place)
    if place == where and not turns and len(complaints.problems) > before:
        return None  # there are no turns to speak of
    if not answered:
        complaints.say(where, "has no assistant turn, so it teaches nothing", "add the answer that the model should learn")
    elif expected == "assistant":
        complaints.say(place, f"the last turn is the {last}'s and nobody answers it", "add the answer or delete it")
    elif not taught:
        complaints.say(where, 'has "loss": false on every answer, so it teaches nothing', "let one be taught, or delete the record")
    front = media.settle(where, talk.front) if media.used else []
    if hollow and not front:
        complaints.say(hollow, "the user's turn is empty", EMPTY_FIX)
    if objects:
        objects.settle()
    if front and turns:
        first = next((number for number, turn in enumerate(turns) if turn.role == "user"), 0)
        turns[first] = replace(turns[first], parts=(*front, *turns[first].parts))
    if all(media.pictures):  # else boxes might be looked for in the wrong one
        turns = placed(turns, places, boxes, complaints.problems)
    return Record(where, tuple(turns), talk.tools, talk.metric) if len(complaints.problems) == before else None


def _parts(said: Said, role: str, media: "_Media", objects: Objects | None, complaints: Complaints) -> Sequence[Part]:
    """The texts, boxes and media of a turn."""
    found: list[Part] = []
    for part in [said.content] if isinstance(said.content, str) else said.content or ():
        if isinstance(part, Shown):
            medium = media.next(part.kind) if part.listed is None else media.found(part.kind, part.listed)
            found += [medium] if medium else []
            continue
        check_text(part, said.place, complaints)
        if role in ("user", "tool"):  # a tool may bring a picture
            found += read_parts(part, said.place, media, complaints)
        else:
            if "<" in part:
                check_untagged(part, role, said.place, media, complaints)
            if part.strip():
                found.append(part)
    for text in said.calls:
        check_text(text, said.place, complaints)
    return found if objects is None else objects.put_into(found, said.place, media.pictures)


def _says_something(said: Said) -> bool:
    if isinstance(said.content, str):
        return bool(said.content.strip())
    return any(isinstance(part, Shown) or part.strip() for part in said.content or ())


class _Media:
    """The media of one record: those beside its turns, handed out as placeholders ask for them, and those that are named."""

    def __init__(self, talk: Talk, finder: Finder, complaints: Complaints):
        self.listed = {"image": talk.pictures, "video": talk.videos}
        self.asked = {"image": 0, "video": 0}
        self.finder, self.complaints = finder, complaints
        self.pictures: list[Picture | None] = []

    @property
    def any_listed(self) -> bool:
        return any(self.listed.values())

    @property
    def used(self) -> bool:
        return self.any_listed or any(self.asked.values())

    def lists(self, kind: str) -> bool:
        return bool(self.listed[kind])

    def next(self, kind: str) -> Medium | None:
        number = self.asked[kind]
        self.asked[kind] += 1
        return self.found(kind, self.listed[kind][number]) if number < len(self.listed[kind]) else None

    def named(self, kind: str, name: str, place: str) -> Medium | None:
        return self.found(kind, Listed(name, place))

    def found(self, kind: str, listed: Listed) -> Medium | None:
        medium: Medium | None = None
        try:
            if kind == "image":
                medium = self._picture(listed)
            elif isinstance(listed.name, list):
                if not listed.name:
                    self.complaints.say(listed.place, "is a film of no frames", "list the names of its frames")
                elif all(self._is_name(name, listed.place) for name in listed.name):
                    medium = self.finder.video(listed.name, listed.place, listed.options)
            elif self._is_name(listed.name, listed.place):
                medium = self.finder.video(listed.name, listed.place, listed.options)
        except UserError as error:
            self.complaints.problems.extend(error.problems)
        if kind == "image":
            self.pictures.append(medium if isinstance(medium, Picture) else None)
        return medium

    def _picture(self, listed: Listed) -> Picture | None:
        if not self._is_name(listed.name, listed.place):
            return None
        picture = self.finder.picture(listed.name, listed.place)
        if listed.options:
            for key, value in listed.options.items():
                if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                    self.complaints.not_a("a number of pixels", value, listed.place, "write a whole number, an area in px", key)
                    return None
            picture = replace(picture, **listed.options)
        return picture

    def _is_name(self, name: Any, place: str) -> bool:
        if isinstance(name, str | InTar | InTable):
            return True
        self.complaints.not_a("a file name", name, place, "write the name of a file")
        return False

    def settle(self, where: str, front: bool) -> list[Part]:
        """Says where placeholders and media do not agree; the media that come before the first text, where `front` allows it."""
        first: list[Part] = []
        unseen = not any(self.asked.values())
        for kind, (tag, noun) in NAMES.items():
            listed, asked = len(self.listed[kind]), self.asked[kind]
            if listed == asked:
                continue
            if front and unseen:
                first += [medium for one in self.listed[kind] if (medium := self.found(kind, one))]
                continue
            what = f"holds {asked} {tag} and names {listed} {noun}{'s' * (listed != 1)}"
            self.complaints.say(where, what, f"write {tag} once for each {noun}, where it is seen")
        return first
