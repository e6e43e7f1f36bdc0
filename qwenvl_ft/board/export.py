"""The pages of runs and answers as files that open without a server: for a colleague, or for the record."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from qwenvl_ft.board.answers import KINDS, PAGE, files_of, picture_path, sets_of, side_by_side, small
from qwenvl_ft.board.curves import COLOURS
from qwenvl_ft.board.render import HERE, Links, drawings, render
from qwenvl_ft.board.runs import Kept, differences, folders, log_end, read_run
from qwenvl_ft.board.views import answers_facts, num_broken, question_facts, run_facts
from qwenvl_ft.errors import UserError
from qwenvl_ft.folders.whole import short_hash, write_whole


@dataclass
class Filed(Links):
    """The links among the files. Which pictures are wanted is kept in `pictures`, by their files' names."""

    files: dict[str, Path]
    kept: Kept
    pictures: dict[str, Path] = field(default_factory=dict)

    def asset(self, name: str) -> str:
        return name

    def runs(self) -> str:
        return "index.html"

    def run(self, name: str) -> str:
        return f"run-{short_hash(name)}.html"

    def compare(self, names: list[str]) -> str:
        return "compare.html"

    def answers(self) -> str:
        return "answers.html"

    def questions(self, files: list[str], kind: str, search: str, page: int) -> str:
        return f"answers-{short_hash(files)}-{kind or 'all'}-{page}.html"

    def picture(self, file: str, row: int, number: int) -> str:
        try:
            path = picture_path(file, row, number, self.files, self.kept)
        except LookupError:
            return ""
        name = f"pictures/{short_hash(str(path))}.webp"
        self.pictures[name] = path
        return name


def export(root: Path, out: Path, lang: str, on_page: Callable[[int, int | None], None]) -> int:
    """Writes the pages of the runs below `root` into a new folder; returns how many. `on_page(done, None)` is called after each.

    Raises UserError where the folder is there.
    """
    number = 0

    def write(folder: Path) -> None:
        nonlocal number
        links = Filed(files_of(root), Kept())
        for name, html in pages(root, links, lang):
            (folder / name).write_text(html, encoding="utf-8")
            number += 1
            on_page(number, None)
        for name in ("board.css", "board.js"):
            shutil.copyfile(HERE / name, folder / name)
        (folder / "pictures").mkdir()
        for name, path in links.pictures.items():
            try:
                (folder / name).write_bytes(small(path))
            except UserError:  # no picture: the page shows its name
                continue

    write_whole(out, write, replace=False)
    return number


def pages(root: Path, links: Filed, lang: str) -> Iterator[tuple[str, str]]:
    """(file's name, HTML) of every page."""
    runs = sorted((read_run(name, folder, links.kept) for name, folder in folders(root)), key=lambda run: -run.changed)
    yield links.runs(), render("runs.html", lang, links, "runs", {"runs": runs, "jobs": [], "root": str(root)}, static=True)
    for run in runs:
        names = [name for name in links.files if name.startswith(f"{run.name}/")]
        of_run = [(name.removeprefix(f"{run.name}/"), links.questions([name], "", "", 1)) for name in names]
        facts = {"name": run.name, "run": run, "state": run.state, "files": of_run, "log": log_end(run.log)} | run_facts(run, lang)
        yield links.run(run.name), render("run.html", lang, links, "runs", facts, static=True)
    some = runs[:COLOURS]
    facts = {"runs": some, "drawings": drawings(some, lang), "differ": differences(some), "num_left_out": len(runs) - len(some)}
    yield links.compare([]), render("compare.html", lang, links, "runs", facts, static=True)
    facts = answers_facts(links.files, links, links.kept)
    yield links.answers(), render("answers.html", lang, links, "answers", facts, static=True)
    together = [names for _, names in sets_of(links.files) if 1 < len(names) <= COLOURS]
    for names in [*([name] for name in links.files), *together]:
        every, broken = side_by_side(names, links.files, links.kept), num_broken(names, links.files, links.kept)
        for kind in KINDS:
            for page in range(1, max(1, -(-sum(kind in of.kinds for of in every) // PAGE)) + 1):
                facts = question_facts(names, every, broken, kind, "", page, links)
                yield links.questions(names, kind, "", page), render("questions.html", lang, links, "answers", facts, static=True)
