"""Commands for before the GPU: what is in a meta-file, what the model sees of it, what a run would do. None imports torch."""

from pathlib import Path
from typing import Annotated, Any

import typer

from qwenvl_ft.cli.options import (
    LORA_YAML,
    BoxesOption,
    ConfigFile,
    DataDir,
    Json,
    MaxPixels,
    Meta,
    MinPixels,
    Overrides,
    SettingsOf,
    ThinkingOption,
    read_reading,
    read_settings,
    training_chat_settings,
)  # fmt: skip
from qwenvl_ft.console import counting, draw_counts, draw_plan, print_drawing, print_json, print_line, print_problems, save_svg
from qwenvl_ft.data.show import draw_record, facts_of
from qwenvl_ft.errors import MOST_ALONE, Problem, UserError, alike


def validate_meta(
    meta: Meta,
    data_dir: DataDir,
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
    as_json: Json = False,
) -> None:
    """Check a meta-file and its pictures: every problem in one run, with its place and its fix.

    Reads picture headers only, unless --deep, and never imports torch, so a million records take minutes.

    Example: validate-meta data/sample/train.json --data-dir data/sample/images --model data/tiny
    """
    from qwenvl_ft.data.chat import open_chat
    from qwenvl_ft.data.formats.documented import record_notes
    from qwenvl_ft.data.meta_file import read_records

    chat = open_chat(model, *training_chat_settings(config, min_pixels, max_pixels, thinking)) if model else None
    with counting("reading records") as on_record:
        records, problems, total = read_records(meta, data_dir, on_record, reading=read_reading(config, boxes))
    if deep:
        from qwenvl_ft.data.deep import decode_all

        with counting("decoding pictures") as on_picture:
            problems.extend(decode_all(records, on_picture))
    tokens = None
    if chat:  # imported here, since it brings the whole config with it: a third of the time of a run without a model
        from qwenvl_ft.data.prepare import token_counts, write_scripts

        tokens = token_counts([script.length for script in write_scripts(chat, records, problems)])
    refused = {problem.where for problem in problems}
    report: dict[str, Any] = {
        "records": total,
        "used": sum(record.where not in refused for record in records),
        "pictures": len({picture.source for record in records for picture in record.pictures}),
        "shown": sum(len(record.pictures) for record in records),
        "tokens": tokens,
        "notes": record_notes(records),
        "problems": [found.facts for found in alike(problems, len(problems) if list_all else MOST_ALONE)],
    }
    if as_json:
        print_json(report)
    else:
        facts = [
            ("records", f"{report['records']:,}, {report['used']:,} good"),
            ("pictures", f"{report['pictures']:,}, shown {report['shown']:,} times"),
        ]
        if tokens := report["tokens"]:
            facts.append(
                ("tokens", f"{tokens['total']:,} ({tokens['min']:,} to {tokens['max']:,} a record, median {tokens['median']:,})")
            )
        print_drawing(draw_counts(str(meta), facts))
        for note in report["notes"]:
            print_line(f"note: {note}")
        if problems:
            print_problems(problems, list_all, "--all lists each")
    if problems:
        raise typer.Exit(1)


def show(
    meta: Meta,
    number: Annotated[int, typer.Argument(help="Which record, counted from 0.")],
    data_dir: DataDir,
    model: Annotated[Path, typer.Option("--model", help="The model's folder.")],
    config: SettingsOf = None,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    thinking: ThinkingOption = None,
    boxes: BoxesOption = None,
    svg: Annotated[Path | None, typer.Option("--svg", help="Write the drawing to this picture file, too.")] = None,
    as_json: Json = False,
) -> None:
    """Show a record as training on the model would: pictures as blocks with their tokens, what is taught in green.

    Example: qwenvl-ft show data/sample/train.json 0 --data-dir data/sample/images --model data/tiny
    """
    from qwenvl_ft.data.chat import open_chat
    from qwenvl_ft.data.meta_file import read_records

    chat = open_chat(model, *training_chat_settings(config, min_pixels, max_pixels, thinking))
    with counting("reading records") as on_record:
        records, problems, _ = read_records(meta, data_dir, on_record, reading=read_reading(config, boxes))
    in_array, in_lines = f"{meta.name}[{number}]", f"{meta.name}:{number + 1}"
    found = [record for record in records if record.where in (in_array, in_lines)]
    if not found:
        mine = [problem for problem in problems if f"{problem.where}.".startswith((in_array, f"{in_lines}.", f"{in_lines}:"))]
        if not mine and records:
            mine = [Problem(str(meta), f"has no record {number}", f"count from 0; the last good record is {records[-1].where}")]
        raise UserError(*(mine or problems))
    scripts = chat.write_scripts(found[0])
    if as_json:
        print_json(facts_of(scripts[-1], chat))  # where a template rewrites turns, the last example has the whole talk
        return
    for script in scripts:
        print_drawing(draw_record(script, chat))
    if svg:
        save_svg(draw_record(scripts[-1], chat), svg)


def plan(overrides: Overrides = None, config: ConfigFile = LORA_YAML, as_json: Json = False) -> None:
    """Show what a training run would do: records, packed rows and how full they are, what is left out and why, steps.

    Example: qwenvl-ft plan --config configs/demo.yaml
    """
    from qwenvl_ft.data.prepare import prepare
    from qwenvl_ft.folders.runs import check_output_dir

    settings = read_settings(config, overrides, (lambda line: None) if as_json else print_line)
    check_output_dir(settings.output_dir)
    with counting("reading records") as on_record:
        prepared = prepare(settings, on_record=on_record)
    summary = prepared.summary(settings)
    if as_json:
        print_json(summary)
    else:
        print_drawing(draw_plan(summary))
        if prepared.problems:
            print_problems(prepared.problems)
