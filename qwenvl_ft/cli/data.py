"""Commands for before the GPU: what is in a meta-file, what the model sees of it, what a run would do. None imports torch."""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwenvl_ft.cli.options import (
    LORA_YAML,
    BoxesOption,
    ConfigFile,
    DataDir,
    FetchMedia,
    FormatOption,
    Json,
    MaxPixels,
    Meta,
    MinPixels,
    Overrides,
    SettingsOf,
    ThinkingOption,
    local_meta,
    read_reading,
    read_settings,
    training_chat_settings,
)  # fmt: skip
from qwenvl_ft.console import (
    counting,
    draw_checks,
    draw_counts,
    draw_files,
    draw_media_position,
    draw_memory,
    draw_plan,
    print_drawing,
    print_json,
    print_line,
    print_note,
    print_problems,
    save_svg,
)
from qwenvl_ft.errors import MOST_ALONE, Problem, UserError, alike
from qwenvl_ft.folders.objects import as_written

if TYPE_CHECKING:
    from qwenvl_ft.config import Config
    from qwenvl_ft.data.chat import Chat
    from qwenvl_ft.data.prepare import Prepared
    from qwenvl_ft.data.reading import Reading
    from qwenvl_ft.data.records import Record
    from qwenvl_ft.train.cards import Card


def validate_meta(
    meta: Meta,
    data_dir: DataDir = None,
    model: Annotated[Path | None, typer.Option("--model", help="Count tokens as training on this model would.")] = None,
    list_all: Annotated[bool, typer.Option("--all", help="List every problem, not the first of each kind with a count.")] = False,
    config: SettingsOf = None,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    thinking: ThinkingOption = None,
    boxes: BoxesOption = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Decode every picture, too: finds what breaks behind a good header.")
    ] = False,
    against: Annotated[Path | None, typer.Option("--against", help="Evaluation's meta-file: is anything of it in here?")] = None,
    against_data_dir: Annotated[
        Path | None, typer.Option("--against-data-dir", help="Its pictures, if they lie elsewhere.")
    ] = None,
    fetch_media: FetchMedia = False,
    format: FormatOption = None,
    as_json: Json = False,
) -> None:
    """Check a meta-file and its pictures: every problem in one run, with its place and its fix.

    Reads picture headers only, unless --deep, and never imports torch, so a million records take minutes.

    Example: validate-meta data/sample/train.json --data-dir data/sample/images --model data/tiny
    """
    from qwenvl_ft.data.batches import batches_of
    from qwenvl_ft.data.checks import Against, Checks, notes_of, token_counts
    from qwenvl_ft.data.meta_file import Tally
    from qwenvl_ft.data.notes import Noted

    meta = local_meta(meta, print_note)
    chat = training_chat_settings(config, min_pixels, max_pixels, thinking).open(model)[0] if model else None
    reading, tally, noted = read_reading(config, fetch_media, format, boxes=boxes), Tally(), Noted()
    problems, records, lengths = list[Problem](), list["Record"](), Counter[int]()
    pictures: set[bytes] = set()
    used = shown = 0
    whole = True  # of a file that breaks nothing is trusted
    theirs = Against.read(local_meta(against, print_note), against_data_dir or data_dir, reading) if against else None
    checks = Checks(chat.limits if chat else None, theirs)
    with counting("reading records") as on_record:
        for batch in batches_of(meta, data_dir, tally, chat, reading, 0, on_record, keep_records=deep, against=theirs):
            problems += batch.problems
            records += batch.records
            pictures.update(medium.digest for medium in batch.media if medium.is_picture)
            lengths.update(batch.scripts.numbers[:, 0].tolist())
            noted.join(batch.noted)
            checks.join(batch.checks)
            used, shown, whole = used + batch.num_used, shown + batch.num_shown, whole and batch.whole
    problems = tally.said_once(problems)
    if deep:
        from qwenvl_ft.data.deep import decode_all

        refused = {problem.where for problem in problems}
        with counting("decoding pictures") as on_picture:
            broken = decode_all(records if whole else [], on_picture)
        used -= len({problem.where for problem in broken} - refused)
        problems += broken
    tokens = token_counts(lengths if whole else Counter()) if chat else None
    looked = checks.facts() if whole else {}
    report: dict[str, Any] = {
        **tally.facts,
        "records": tally.num_records,
        "used": used if whole else 0,
        "pictures": len(pictures) if whole else 0,
        "shown": shown if whole else 0,
        "tokens": tokens,
        "notes": noted.lines + notes_of(looked) + (chat.notes if chat else []) if whole else [],
        "checks": looked,
        "problems": [found.facts for found in alike(problems, len(problems) if list_all else MOST_ALONE)],
    }
    if as_json:
        print_json(report)
    else:
        facts = [
            *draw_files(report),
            ("records", f"{report['records']:,}, {report['used']:,} good"),
            ("pictures", f"{report['pictures']:,}, shown {report['shown']:,} times"),
        ]
        if tokens := report["tokens"]:
            facts.append(
                ("tokens", f"{tokens['total']:,} ({tokens['min']:,} to {tokens['max']:,} a record, median {tokens['median']:,})")
            )
        facts += draw_media_position(report["media_position"]) if whole else []
        facts += draw_checks(looked)
        print_drawing(draw_counts(as_written(meta), facts))
        for note in report["notes"]:
            print_line(f"note: {note}")
        if problems:
            print_problems(problems, list_all, "--all lists each")
    if problems:
        raise typer.Exit(1)


def show(
    meta: Meta,
    model: Annotated[Path, typer.Option("--model", help="The model's folder.")],
    number: Annotated[int | None, typer.Argument(min=0, help="Which record, counted from 0; may be left out with --html.")] = None,
    data_dir: DataDir = None,
    fetch_media: FetchMedia = False,
    format: FormatOption = None,
    config: SettingsOf = None,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    thinking: ThinkingOption = None,
    boxes: BoxesOption = None,
    svg: Annotated[Path | None, typer.Option("--svg", help="Write the drawing to this picture file, too.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write many records to this page for a browser.")] = None,
    start: Annotated[int | None, typer.Option(min=0, help="With --html: the first record of the page, 0 if not given.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="With --html: how many records, 200 if not given.")] = None,
    as_json: Json = False,
) -> None:
    """Show a record as training on the model would: pictures as blocks with their tokens, what is taught in green.

    With --html a page of many records: pictures at the size that the model sees, the borders of tokens, boxes, problems.

    Example: qwenvl-ft show data/sample/train.json 0 --data-dir data/sample/images --model data/tiny
    """
    if html and (svg or as_json or (number is not None and (start is not None or limit is not None))):
        raise typer.BadParameter("--html takes --start and --limit or a number, and neither --svg nor --json")
    if not html and (number is None or start is not None or limit is not None):
        raise typer.BadParameter("give the number of a record, or --html with --start and --limit")
    from qwenvl_ft.data.show import check_page, draw_record, facts_of

    if html:
        check_page(html)
    meta = local_meta(meta, print_note)
    chat, _ = training_chat_settings(config, min_pixels, max_pixels, thinking).open(model)
    reading = read_reading(config, fetch_media, format, boxes=boxes)
    if html:
        return _show_page(html, meta, data_dir, chat, reading, *((start or 0, limit or 200) if number is None else (number, 1)))
    assert number is not None
    print_note(*chat.notes)
    scripts = chat.write_scripts(record_at(meta, data_dir, number, reading))
    if as_json:
        print_json(facts_of(scripts[-1], chat))  # where a template rewrites turns, the last example has the whole talk
        return
    for script in scripts:
        print_drawing(draw_record(script, chat))
    if svg:
        save_svg(draw_record(scripts[-1], chat), svg)


def _show_page(out: Path, meta: Path, data_dir: Path | None, chat: "Chat", reading: "Reading", start: int, limit: int) -> None:
    from qwenvl_ft.data.meta_file import Tally, stream_records
    from qwenvl_ft.data.show import cut_out, draw_page, write_page

    tally = Tally()
    with counting("reading records") as on_record:
        cut = cut_out(stream_records(meta, data_dir, reading, tally), tally, start, limit, on_record)
    with counting("looking at pictures") as on_medium:
        page = draw_page(meta.name, cut, chat, on_medium)
    write_page(page, out)
    facts = f"{page.num_shown:,} record{'s' * (page.num_shown != 1)}, {page.num_bad:,} with problems"
    more = f", more follow (--start {start + limit})" * cut.more
    print_line(f"{out}: {facts}{more}, {out.stat().st_size / 1e3:,.0f} kB; open it in a browser")


def record_at(meta: Path, data_dir: Path | None, number: int, reading: "Reading") -> "Record":
    """The record of this number, counted from 0, without reading on. Raises UserError with its problems, or the file's."""
    from qwenvl_ft.data.meta_file import Tally, stream_records

    tally, last, of_files = Tally(), "", list[Problem]()
    with counting("reading records") as on_record:
        for found in stream_records(meta, data_dir, reading, tally):
            on_record(tally.num_records, None)
            if not found.where:
                of_files += found.problems
            elif tally.num_records == number + 1:
                if found.record:
                    return found.record
                if not found.problems:  # there is no folder of pictures, which is said at the end
                    continue
                raise UserError(*tally.said_once(found.problems))
            last = found.where if found.record else last
    fix = f"count from 0; the last good record is {last}" if last else "mend the others first"
    raise UserError(*(of_files or [Problem(str(meta), f"has no record {number}", fix)]))


def convert(
    meta: Meta,
    out: Annotated[Path, typer.Argument(help="The new file: .json for an array, .jsonl for JSON lines.")],
    data_dir: DataDir = None,
    fetch_media: FetchMedia = False,
    format: FormatOption = None,
    boxes: BoxesOption = None,
    config: SettingsOf = None,
) -> None:
    """Write a meta-file of any kind and form anew in the documented form, or say what that cannot carry.

    What is written is read again and compared with what was read. Pictures and videos stay where they are.

    Example: qwenvl-ft convert data/sample/train.json sample.jsonl --data-dir data/sample/images
    """
    from qwenvl_ft.data import convert as converting

    meta = local_meta(meta, print_note)
    with counting("writing records") as on_record:
        reading = replace(read_reading(config, fetch_media, format, boxes=boxes), media_position="as_written")
        tally = converting.convert(meta, out, data_dir, reading, on_record)
    count = f"{tally.num_records:,} record{'s' * (tally.num_records != 1)}"
    print_line(f"{out}: {count}, read as {draw_files(tally.facts)[-1][1]}")


def plan(
    overrides: Overrides = None,
    config: ConfigFile = LORA_YAML,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help='The card to forecast memory for: its name ("RTX 4090") or its GiB (24).')
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a training run would do: records, packed rows and how full they are, what is left out and why, steps; and for the
    GPU that is here, or is named, what memory it takes and what to change where that is too much.

    Example: qwenvl-ft plan --config configs/demo.yaml --gpu 24
    """
    from qwenvl_ft.data.prepare import prepare
    from qwenvl_ft.folders.runs import check_output_dir
    from qwenvl_ft.train.cards import card_of, sold_with

    card = card_of(gpu) if gpu else None
    settings = read_settings(config, overrides, (lambda line: None) if as_json else print_line)
    check_output_dir(settings.output_dir)
    with counting("reading records") as on_record:
        prepared = prepare(settings, on_record=on_record)
    summary = prepared.summary(settings)
    if not as_json:
        print_drawing(draw_plan(summary))
        if prepared.problems:
            print_problems(prepared.problems)
    card = card or (sold_with(settings.fit) if settings.fit else None)
    memory = _memory(settings, prepared, card) if card or shutil.which("nvidia-smi") else None
    if as_json:
        print_json(summary | ({"memory": memory} if memory else {}))
    elif memory:
        print_drawing(draw_memory(memory))


def _memory(settings: "Config", prepared: "Prepared", card: "Card | None") -> dict[str, Any] | None:
    """The forecast for a card, or for the one that is here; None if there is none, or no forecast, which is said."""
    with counting("simulating the heaviest row", patience_s=0) as tell:
        tell(0, None)  # torch and transformers take seconds to be imported
        from qwenvl_ft.train.forecast import memory_of, present_card

        if not (card := card or present_card()):
            return None
        try:
            return memory_of(settings, prepared, card)
        except (RuntimeError, ValueError, UserError) as error:  # what a model's code does with values that are not there
            print_note(
                f"no forecast of memory: {settings.model} with these settings cannot be simulated ({str(error).splitlines()[0]})"
            )
            return None
