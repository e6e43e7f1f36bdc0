"""A run's meta-file as the page of `show --html`, live: what has problems first. No torch."""

from functools import lru_cache

from markupsafe import Markup, escape

from qwenvl_ft.board.render import Served
from qwenvl_ft.board.runs import Run
from qwenvl_ft.board.words import translator
from qwenvl_ft.config import load_config
from qwenvl_ft.data.chat import Chat, open_chat
from qwenvl_ft.data.meta_file import Found, Tally, stream_records
from qwenvl_ft.data.reading import Reading
from qwenvl_ft.data.show import Cut, draw_page
from qwenvl_ft.errors import Problem, UserError

PAGE = 50  # records
MOST_READ = 20_000  # of a meta-file that are looked through for problems: some ten seconds

# Of a base that is asked for again and again its tokenizer is read once.
chat_of = lru_cache(maxsize=2)(open_chat)


def draw_records(run: Run, part: str, start: int, lang: str) -> str:
    """The page of `part`, training or evaluation, from record `start` on, those with problems counted before all others.

    Raises UserError.
    """
    config = load_config(run.folder / "config.yaml")
    meta = config.train_meta_file if part == "training" else config.eval_meta_file
    folder = config.train_data_dir if part == "training" else config.held_out_dir
    if meta is None:
        raise UserError(Problem(part, f"{run.name} has none", "look at its training records"))
    chat: Chat = chat_of(config.model, config.min_pixels, config.max_pixels, config.thinking, config.video_max_pixels)
    bad: list[Found] = []
    good: list[Found] = []
    tally, elsewhere, more = Tally(), list[Problem](), False
    for found in stream_records(meta, folder, Reading.of(config), tally):
        if not found.where:
            elsewhere += found.problems
        elif more := tally.num_records > MOST_READ:
            break
        elif len(those := bad if found.problems else good) < start + PAGE:
            those.append(found)
    chosen = [*bad, *good][start : start + PAGE]
    if not chosen:
        raise UserError(*elsewhere, Problem(str(meta), f"has no record {start} in its first {MOST_READ:,}", "begin at 0"))
    total = min(tally.num_records, MOST_READ)
    mine = [problem for of in chosen for problem in of.problems]
    elsewhere = [*(of for of in tally.said_once(mine) if of not in mine), *elsewhere]
    page = draw_page(f"{run.name} · {part}", Cut(0, chosen, elsewhere, False), chat).html
    return page.replace("<body>", f"<body>\n{_line(run, part, start, len(chosen), total, more, lang)}", 1)


def _line(run: Run, part: str, start: int, number: int, total: int, more: bool, lang: str) -> Markup:
    """Where this page is among the others, and the way back."""
    t, links = translator(lang), Served()
    before = links.data(run.name, part, max(0, start - PAGE)) if start else ""
    after = links.data(run.name, part, start + PAGE) if start + number < total else ""
    parts = [
        Markup('<a href="{}">← {}</a>').format(links.run(run.name), run.name),
        escape(f"{start:,}–{start + number - 1:,} / {total:,}"),
        escape(t("problems first")),
        *([escape(t("only the beginning of the file was read"))] if more else []),
        *([Markup('<a href="{}" rel="prev">←</a>').format(before)] if before else []),
        *([Markup('<a href="{}" rel="next">→</a>').format(after)] if after else []),
    ]
    return Markup('<p class="note">{}</p>').format(Markup(" · ").join(parts))
