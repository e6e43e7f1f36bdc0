"""Boxes as ms-swift lists them beside the turns: <ref-object> is what is there, <bbox> where; the next of each list.

    "objects": {"ref": ["cat"], "bbox": [[10, 20, 60, 80]], "bbox_type": "real", "image_id": [0]}

A box that is the value of a key of the text's own JSON, as ms-swift's newer data have it, is written as its numbers alone.

`real`, the default, is pixels of the picture, `norm1` shares of its sides; two numbers are a point. `image_id` counts the record's
pictures from 0 and is 0 where it is not given. What stands directly before a box is its label.
"""

import re
from collections.abc import Sequence
from typing import Any

from qwenvl_ft.data.formats.documented import check_text
from qwenvl_ft.data.formats.keys import Complaints
from qwenvl_ft.data.records import Box, Part, Picture

TAG = re.compile(r"(<ref-object>|<bbox>)")
OF_KEY = re.compile(r"""["']\s*:\s*\[?\s*$""")
MOST = 10**9  # px
KEYS = ("ref", "bbox", "bbox_type", "image_id")
FIX = 'write "objects": {"ref": ["cat"], "bbox": [[x1, y1, x2, y2]]}'


class Objects:
    """The boxes of one record, handed out as the tags in its texts ask for them."""

    def __init__(self, objects: Any, where: str, complaints: Complaints):
        self.where, self.complaints = f"{where}.objects", complaints
        self.refs: list[Any] = []
        self.boxes: list[Any] = []
        self.images: list[Any] = []
        self.num_refs = self.num_boxes = 0
        self.shares = False
        if not isinstance(objects, dict):
            complaints.not_a("an object", objects, self.where, FIX)
            return
        complaints.unknown_keys(objects, self.where, KEYS, {})
        for key, target in (("ref", self.refs), ("bbox", self.boxes), ("image_id", self.images)):
            value = objects.get(key)
            if isinstance(value, list):
                target += value
            elif value is not None:
                complaints.not_a("a list", value, self.where, FIX, key)
        for ref in self.refs:
            if isinstance(ref, str):
                check_text(ref, self.where, complaints)
        kind = "real" if objects.get("bbox_type") is None else objects["bbox_type"]
        if kind not in ("real", "norm1"):
            complaints.say(self.where, f'its "bbox_type" is {str(kind)[:40]}', "write real or norm1")
        if self.images and len(self.images) != len(self.boxes):
            complaints.say(self.where, f'has {len(self.boxes)} boxes and {len(self.images)} "image_id"', "write one for each box")
        self.shares = kind == "norm1"

    def put_into(self, parts: Sequence[Part], place: str, pictures: Sequence[Picture | None]) -> list[Part]:
        """The parts with references and boxes in place of their tags; `pictures` are the record's so far."""
        found: list[Part] = []
        for part in parts:
            if not isinstance(part, str):
                found.append(part)
                continue
            label = ""
            pieces = TAG.split(part)
            for number, piece in enumerate(pieces):
                if piece == "<ref-object>":
                    label = self._ref(place)
                    if pieces[number + 1] or pieces[number + 2 : number + 3] != ["<bbox>"]:  # it stands alone
                        found.append(label)
                        label = ""
                elif piece == "<bbox>":
                    bare = bool(OF_KEY.search(pieces[number - 1]))
                    found += self._box(label, place, pictures, bare)
                elif piece:
                    found.append(piece)
                    label = ""
        return found

    def settle(self) -> None:
        """Says where tags and lists do not agree."""
        for tag, asked, listed in (("<ref-object>", self.num_refs, self.refs), ("<bbox>", self.num_boxes, self.boxes)):
            if asked != len(listed):
                what = f"lists {len(listed)} and the texts hold {asked} {tag}"
                self.complaints.say(self.where, what, f"write {tag} once for each, where it is said")

    def _ref(self, place: str) -> str:
        self.num_refs += 1
        if self.num_refs > len(self.refs):
            return ""
        ref = self.refs[self.num_refs - 1]
        if not isinstance(ref, str):
            self.complaints.not_a("a text", ref, f"{self.where}.ref[{self.num_refs - 1}]", FIX)
            return ""
        return ref

    def _box(self, label: str, place: str, pictures: Sequence[Picture | None], bare: bool) -> list[Part]:
        self.num_boxes += 1
        number = self.num_boxes - 1
        if number >= len(self.boxes):
            return []
        at, corners = f"{self.where}.bbox[{number}]", self.boxes[number]
        if not isinstance(corners, list) or len(corners) not in (2, 4) or not all(map(_is_number, corners)):
            self.complaints.say(at, "is no box", "write [x1, y1, x2, y2], or [x, y] for a point")
            return []
        image = self.images[number] if number < len(self.images) else 0
        if isinstance(image, bool) or not isinstance(image, int) or not 0 <= image < len(pictures):
            what = f"lies in picture {str(image)[:40]}, and {len(pictures)} stand before it"
            self.complaints.say(at, what, "count the pictures from 0, and show one before its boxes")
            return []
        picture = pictures[image]
        if picture is None:  # which has been complained about
            return []
        width, height = picture.width, picture.height
        if self.shares:
            corners = [value * (height if index % 2 else width) for index, value in enumerate(corners)]
        xs, ys = corners[::2], corners[1::2]
        if not (0 <= xs[0] <= xs[-1] <= width and 0 <= ys[0] <= ys[-1] <= height):
            fix = "write x1 <= x2 and y1 <= y2, in px of the picture, or bbox_type: norm1 for shares of its sides"
            self.complaints.say(at, f"is not inside its picture of {width} x {height} px", fix)
            return []
        return [Box(tuple(map(float, corners)), label, image, bare)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -MOST <= value <= MOST  # which no NaN is
