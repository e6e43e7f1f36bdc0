"""What the pages of a server and of an export show alike, worked out from the files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwenvl_ft.board.answers import (
    KINDS,
    PAGE,
    Asked,
    Prediction,
    boxes_of,
    frame_of,
    predictions,
    sets_of,
    side_by_side,
    titles_of,
)
from qwenvl_ft.board.curves import COLOURS
from qwenvl_ft.board.render import Links, drawings
from qwenvl_ft.board.runs import Kept, Run, defaults

MOST_PICTURES = 4  # of a question that are shown


def run_facts(run: Run | None, lang: str) -> dict[str, Any]:
    """What a run's page draws and says of its settings."""
    if run is None:
        return {"drawings": [], "changed": set(), "parts": []}
    changed = {key for key, value in run.settings.items() if key in defaults() and defaults()[key] not in (value, str(value))}
    parts = [(part, run.settings.get(f"{key}_meta_file")) for part, key in (("training", "train"), ("evaluation", "eval"))]
    return {"drawings": drawings([run], lang), "changed": changed, "parts": [part for part in parts if part[1]]}


def answers_facts(files: Mapping[str, Path], links: Links, kept: Kept) -> dict[str, Any]:
    """The sets of files that are looked at together, each file with its count of right answers."""
    sets = []
    for title, names in sets_of(files):
        rows = []
        for name, who in zip(names, titles_of(names), strict=True):
            asked = side_by_side([name], files, kept)
            rows.append((name, who, len(asked), sum("right" in of.kinds for of in asked), links.questions([name], "", "", 1)))
        sets.append((title, rows, links.questions(names, "", "", 1) if 1 < len(names) <= COLOURS else ""))
    return {"sets": sets, "most": COLOURS}


def question_facts(
    names: Sequence[str], every: Sequence[Asked], broken: int, kind: str, search: str, page: int, links: Links
) -> dict[str, Any]:
    """A page of `every` question of some files, which have `broken` lines; a page that there is not is the nearest."""
    found = [of for of in every if of.holds(search.lower())] if search else every
    counts = {of: sum(of in asked.kinds for asked in found) for of in KINDS}
    kinds = [of for of in KINDS if of != "disagreement" or len(names) > 1]
    chosen = [of for of in found if kind in of.kinds]
    num_pages = max(1, -(-len(chosen) // PAGE))
    page = min(max(1, page), num_pages)
    return {
        "names": list(names), "titles": titles_of(names), "kind": kind, "search": search, "page": page, "num_pages": num_pages,
        "kinds": [(of, counts[of], links.questions(list(names), of, search, 1)) for of in kinds],
        "num_found": len(chosen), "broken": broken,
        "cards": [card(asked, links) for asked in chosen[(page - 1) * PAGE : page * PAGE]],
        "before": links.questions(list(names), kind, search, page - 1) if page > 1 else "",
        "after": links.questions(list(names), kind, search, page + 1) if page < num_pages else "",
    }  # fmt: skip


def num_broken(names: Sequence[str], files: Mapping[str, Path], kept: Kept) -> int:
    """How many lines of some files are no predictions."""

    def lines(path: Path) -> int:
        try:
            return sum(bool(line.strip()) for line in path.read_bytes().splitlines())
        except OSError:
            return 0

    return sum(max(0, lines(files[name]) - len(predictions(files[name], kept))) for name in names)


def card(asked: Asked, links: Links) -> dict[str, Any]:
    """What a question's card shows."""
    first = asked.first
    of: Prediction = first.prediction
    pictures = []
    for number, path in enumerate(of.get("pictures", [])[:MOST_PICTURES]):
        boxes = [
            (d, label, "wanted" if wanted else f"c{column % COLOURS}", shape)
            for column, answer in enumerate(asked.answers)
            if answer
            for d, label, wanted, shape in boxes_of(answer, number)
            if not wanted or answer is first
        ]
        frame = frame_of(str(path))
        pictures.append((links.picture(first.file, first.row, number) if frame else "", Path(str(path)).name, frame, boxes))
    return {"where": of["where"], "question": of.get("question", ""), "wanted": of.get("wanted", ""), "pictures": pictures,
            "answers": asked.answers, "more": max(0, len(of.get("pictures", [])) - MOST_PICTURES)}  # fmt: skip
