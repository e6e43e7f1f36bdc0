"""The pages as HTML: whatever a file holds is escaped by Jinja; where links lead says the caller, a server or an export."""

import time
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from ruamel.yaml import YAML

from qwenvl_ft.board.curves import curve_of, draw
from qwenvl_ft.board.runs import Run
from qwenvl_ft.board.words import translator

HERE = Path(__file__).parent


class Links(Protocol):
    """Where the pages are; each returns a URL."""

    def asset(self, name: str) -> str: ...
    def runs(self) -> str: ...
    def run(self, name: str) -> str: ...
    def compare(self, names: list[str]) -> str: ...
    def answers(self) -> str: ...
    def questions(self, files: list[str], kind: str, search: str, page: int) -> str: ...
    def picture(self, file: str, row: int, number: int) -> str: ...


@dataclass(frozen=True)
class Served:
    """The links of a server. `here` is the page that is shown, for the link to it in the other language."""

    here: str = "/"

    def asset(self, name: str) -> str:
        return f"/{name}"

    def runs(self) -> str:
        return "/"

    def run(self, name: str) -> str:
        return f"/runs/{quote(name)}"

    def act(self, name: str, act: str) -> str:
        """Where a form is sent that does something to a run."""
        return f"/{act}/{quote(name)}"

    def compare(self, names: list[str]) -> str:
        return f"/compare?{urlencode([('run', name) for name in names])}".rstrip("?")

    def answers(self) -> str:
        return "/answers"

    def questions(self, files: list[str], kind: str, search: str, page: int) -> str:
        said = [("kind", kind), ("search", search), ("page", str(page) if page > 1 else "")]
        return f"/questions?{urlencode([('file', file) for file in files] + [pair for pair in said if pair[1]])}"

    def picture(self, file: str, row: int, number: int) -> str:
        return f"/picture?{urlencode({'file': file, 'row': row, 'number': number})}"

    def data(self, name: str, part: str, start: int = 0) -> str:
        """The records of a run's meta-file."""
        return f"/data/{quote(name)}?part={part}" + (f"&start={start}" if start else "")

    def new(self, name: str = "") -> str:
        """The form for a run, with another's settings."""
        return f"/new?{urlencode({'like': name})}" if name else "/new"

    def attempt(self) -> str:
        """The form for a question."""
        return "/try"

    def language(self, lang: str) -> str:
        """This page in the other language."""
        return f"{self.here}{'&' if '?' in self.here else '?'}lang={lang}"


def duration(seconds: float) -> str:
    """40 s, 12 min, 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


def yaml(value: Any) -> str:
    """A value as it stands in a config, on one line."""
    if value is None or isinstance(value, bool | int | float):
        return {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else repr(value)
    writer = YAML(typ="safe")
    writer.default_flow_style, writer.width, writer.allow_unicode = True, 1 << 20, True
    text = StringIO()
    writer.dump(value if isinstance(value, str | list | dict) else str(value), text)
    return text.getvalue().removesuffix("...\n").strip()


def environment() -> Environment:
    """Jinja over the pages: every value is escaped, and a name that is not given is an error."""
    made = Environment(loader=FileSystemLoader(HERE / "pages"), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    made.filters.update(
        duration=duration,
        yaml=yaml,
        loss=lambda value: "" if value is None else f"{value:.4f}",
        whole=lambda value: "" if value is None else f"{value:,.0f}",
        moment=lambda at: time.strftime("%Y-%m-%d %H:%M", time.localtime(at)),
    )
    return made


PAGES = environment()


def render(name: str, lang: str, links: Links, here: str, facts: dict[str, Any], static: bool = False) -> str:
    """A page of pages/ in a language. `here`: which of the head's links it is; `static`: without what needs a server."""
    known = {"t": translator(lang), "lang": lang, "links": links, "here": here, "static": static}
    return PAGES.get_template(name).render(known | facts)


def drawings(runs: list[Run], lang: str) -> list[Markup]:
    """The curves of one run, or of several over each other."""
    t = translator(lang)

    def name(run: Run, of: str) -> str:
        return t(of) if len(runs) == 1 else f"{run.name} · {t(of)}"

    losses = [
        curve_of(name(run, of), run.lines, key, number if len(runs) > 1 else number + dashed, dashed)
        for number, run in enumerate(runs)
        for of, key, dashed in (("train", "loss", False), ("eval", "eval_loss", True))
    ]
    drawn = [draw(losses, t("loss per taught token"), t("step"))]
    for word, key in (("learning rate", "learning_rate"), ("tokens/s", "tokens_per_s"), ("peak memory, GiB", "peak_memory_gib")):
        curves = [curve_of(run.name, run.lines, key, number) for number, run in enumerate(runs)]
        drawn.append(draw(curves, t(word), t("step")))
    return [drawing for drawing in drawn if drawing]
