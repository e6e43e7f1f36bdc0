"""What models answered: predictions-*.jsonl of runs and compare-*/ folders, side by side, the wrong ones first.

A file is named by its path below the runs' folder, and only those that were found there are opened; a picture is named by the
number of its prediction, so that nobody outside says which file is read.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from qwenvl_ft.board.runs import Kept, Lines, folders, is_number, read_lines
from qwenvl_ft.data.pictures import load, size_of
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.evaluate.overlap import is_right, mean_overlap

PAGE = 50  # questions
SIDE_PX = 640  # most of a picture's longer side, as it is shown
KINDS = ("all", "wrong", "right", "cut", "empty", "disagreement")
Prediction = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """A model's answer: `row` is its number in the file; `right` as its metric has it; `score` in words."""

    file: str
    row: int
    prediction: Prediction

    @property
    def text(self) -> str:
        return str(self.prediction["answer"])

    @property
    def overlap(self) -> float | None:
        """The mean overlap of the wanted boxes; None where none were."""
        return mean_overlap(self.prediction)

    @property
    def right(self) -> bool:
        """As the card of a model has it."""
        return is_right(self.prediction)

    @property
    def cut(self) -> bool:
        return bool(self.prediction.get("cut"))

    @property
    def empty(self) -> bool:
        return not self.text.strip()


@dataclass(frozen=True)
class Asked:
    """A question with what each model answered, None where it was not asked."""

    answers: Sequence[Answer | None]

    @property
    def given(self) -> list[Answer]:
        return [answer for answer in self.answers if answer]

    @property
    def first(self) -> Answer:
        return self.given[0]

    @property
    def num_wrong(self) -> int:
        return sum(not answer.right for answer in self.given)

    @cached_property
    def kinds(self) -> set[str]:
        """Which of KINDS it is."""
        rights = {answer.right for answer in self.given}
        found = (
            {"all", *("right" if right else "wrong" for right in rights)} if len(rights) == 1 else {"all", "wrong", "disagreement"}
        )
        found |= {"cut"} if any(answer.cut for answer in self.given) else set()
        return found | ({"empty"} if any(answer.empty for answer in self.given) else set())

    def holds(self, search: str) -> bool:
        """Whether a text stands in the question, in what was wanted or in an answer."""
        of = self.first.prediction
        texts = (of["where"], of.get("question", ""), of.get("wanted", ""), *(answer.text for answer in self.given))
        return any(search in str(text).lower() for text in texts)


def files_of(root: Path) -> dict[str, Path]:
    """Every file of predictions by its name: those of runs, of folders compare-* here and beside, and of the folder itself."""
    found = [path for _, folder in folders(root) for path in folder.glob("predictions-*.jsonl")]
    found += [path for _, folder in folders(root) for path in folder.glob("checkpoint-*/predictions-*.jsonl")]
    found += [*root.glob("predictions-*.jsonl"), *root.glob("compare-*/*.jsonl"), *root.parent.glob("compare-*/*.jsonl")]
    names = {}
    for path in found:
        below = path.is_relative_to(root)
        names[path.relative_to(root if below else root.parent).as_posix() if below else f"../{path.relative_to(root.parent)}"] = (
            path
        )
    return dict(sorted(names.items()))


def sets_of(files: Mapping[str, Path]) -> list[tuple[str, list[str]]]:
    """(title, names of files) that are looked at together: a folder compare-*, or what runs have of one meta-file."""
    sets: dict[str, list[str]] = {}
    for name, path in files.items():
        title = path.parent.name if path.parent.name.startswith("compare-") else path.stem
        sets.setdefault(title, []).append(name)
    return sorted(sets.items())


def titles_of(names: Sequence[str]) -> list[str]:
    """What the columns of some files are called: each as shortly as tells them apart, by its run, or by its own name."""
    folders, stems = zip(*(name.rpartition("/")[::2] for name in names), strict=True)
    own = [stem.removesuffix(".jsonl").removeprefix("predictions-") for stem in stems]
    if len(set(folders)) == 1 and (len(names) > 1 or Path(folders[0]).name.startswith("compare-")):
        return own
    short = list(folders)
    return short if len(set(short)) == len(names) else [f"{folder} {stem}" for folder, stem in zip(folders, own, strict=True)]


def read_predictions(path: Path) -> Lines:
    """The lines that are predictions; a file of something else has none."""
    return tuple(line for line in read_lines(path) if _is_prediction(line))


def _is_prediction(line: dict[str, Any]) -> bool:
    lists = [line.get(key, []) for key in ("pictures", "iou", "boxes", "wanted_boxes")]
    if not (isinstance(line.get("where"), str) and "answer" in line and all(isinstance(of, list) for of in lists)):
        return False
    _, overlaps, *boxes = lists
    return all(map(is_number, overlaps)) and all(_is_box(box) for of in boxes for box in of)


def _is_box(box: Any) -> bool:
    corners = (box.get("bbox_2d") or box.get("point_2d") or []) if isinstance(box, dict) else None
    return isinstance(corners, list) and all(map(is_number, corners))


def predictions(path: Path, kept: Kept) -> Lines:
    """What a file holds now."""
    nothing: Lines = ()
    return kept.of(path, read_predictions, nothing)


def side_by_side(names: Sequence[str], files: Mapping[str, Path], kept: Kept) -> list[Asked]:
    """The questions of some files, those that most models have wrong first, else in the first file's order. The same question has
    the same place and the same wanted answer. Raises KeyError for a file that there is not.
    """
    table: dict[tuple[str, str], list[Answer | None]] = {}
    for column, name in enumerate(names):
        for row, of in enumerate(predictions(files[name], kept)):
            answers = table.setdefault((of["where"], str(of.get("wanted"))), [None] * len(names))
            answers[column] = Answer(name, row, of)
    return sorted(map(Asked, table.values()), key=lambda asked: -asked.num_wrong)


def boxes_of(answer: Answer, picture: int) -> Iterator[tuple[str, str, bool, str]]:
    """(d of an SVG path in px of the picture, its label, whether it is wanted, point or box) of what lies on a picture."""
    for key in ("wanted_boxes", "boxes"):
        for box in answer.prediction.get(key, []):
            corners = box.get("bbox_2d") or box.get("point_2d") or []
            if box.get("picture", 0) != picture:
                continue
            if len(corners) == 4:
                x1, y1, x2, y2 = corners
                yield f"M{x1:g} {y1:g}H{x2:g}V{y2:g}H{x1:g}Z", str(box.get("label", "")), key == "wanted_boxes", "box"
            elif len(corners) == 2:
                yield f"M{corners[0]:g} {corners[1]:g}h0", str(box.get("label", "")), key == "wanted_boxes", "point"


def picture_path(file: str, row: int, number: int, files: Mapping[str, Path], kept: Kept) -> Path:
    """The file of a prediction's picture. Raises LookupError where there is no such prediction or picture."""
    path = Path(str(predictions(files[file], kept)[row].get("pictures", [])[number]))
    if row < 0 or number < 0 or not path.is_file():
        raise LookupError(str(path))
    return path


def frame_of(path: str) -> tuple[int, int] | None:
    """Width and height of a picture in px as it is seen; None for what is none."""
    try:
        height, width = size_of(Path(path), path)
    except (UserError, OSError, ValueError):
        return None
    return width, height


def small(path: Path) -> bytes:
    """A picture as WEBP, no larger than is shown. Raises UserError for a file that is no picture, or has too many px."""
    size_of(path, path.name)
    return as_webp(load(path, path.name))


def as_webp(image: Image.Image) -> bytes:
    """An image as WEBP, no larger than is shown. It becomes so small itself."""
    image.thumbnail((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)
    file = BytesIO()
    image.save(file, "WEBP", quality=80, method=2)
    return file.getvalue()


def check_kind(kind: str) -> str:
    """One of KINDS. Raises UserError."""
    if kind not in KINDS:
        raise UserError(Problem(f"kind: {kind}", "is none", f"choose one of {', '.join(KINDS)}"))
    return kind
