"""Commands that ask the questions of a meta-file: eval one model, compare several. torch is imported inside them."""

import json
import re
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from qwenvl_ft.cli.options import (
    META,
    Adapter,
    BoxesOption,
    DataDir,
    FetchMedia,
    Json,
    MaxPixels,
    Meta,
    MinPixels,
    SettingsOf,
    ThinkingOption,
    local_meta,
    note_quantized,
    own_reading,
    read_chat_settings,
    read_reading,
)
from qwenvl_ft.config import load_config
from qwenvl_ft.console import (
    counting,
    draw_counts,
    draw_files,
    draw_table,
    pass_on,
    print_drawing,
    print_json,
    print_line,
    print_note,
    print_problems,
)
from qwenvl_ft.data.reading import Reading
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.values import BATCH_SIZE, MAX_NEW_TOKENS

if TYPE_CHECKING:
    from qwenvl_ft.data.records import Record
    from qwenvl_ft.evaluate.controls import Control
    from qwenvl_ft.evaluate.table import Column
    from qwenvl_ft.infer.engine import ChatSettings

BatchSize = Annotated[int, typer.Option(min=1, help="Questions answered at a time.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="An answer is cut here.")]
Metrics = Annotated[
    list[str] | None,
    typer.Option(
        "--metric", help="exact, relaxed, anls, f1, cer, wer, choice, class, json ..., or module:function; several times."
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Ask so many of the questions, by chance.")]
Seed = Annotated[int, typer.Option(help="Of that chance, and of the pictures and resamples.")]
Blank = Annotated[bool, typer.Option("--blank", help="Ask over white pictures, too: what is still right was not seen.")]
Shuffled = Annotated[bool, typer.Option("--shuffled", help="Ask over pictures of other records, too: the answer must change.")]
NoPictures = Annotated[bool, typer.Option("--no-pictures", help="Ask without the pictures, too.")]
TextFirst = Annotated[bool, typer.Option("--text-first", help="Ask with the text before the pictures, too.")]
OF_SERVE = ("config", "min_pixels", "max_pixels", "thinking")  # what `eval --suite` hands on
OF_QUESTIONS = {"meta", "data_dir", "boxes", "max_new_tokens", "metric", "seed", "blank", "shuffled", "no_pictures",
                "text_first", "fetch_media"}  # fmt: skip
OF_SUITE = {"include_path", "lmms_eval"}


class Asked(NamedTuple):
    """What every model is asked, and how much of it."""

    records: Sequence["Record"]
    controls: Sequence["Control"]
    limit: int | None
    seed: int
    batch_size: int
    max_new_tokens: int

    def of_folder(
        self, name: str, model: Path, adapter: Path | None, settings: "ChatSettings", out: Callable[[str], Path]
    ) -> tuple["Column", dict[str, int]]:
        """The answers of a model in a folder, and its limits of pixels; `out` says where those under a control go ("": none)."""
        from qwenvl_ft.evaluate.scoring import batches
        from qwenvl_ft.infer.batch_file import read_answers, who_answers
        from qwenvl_ft.infer.engine import Engine

        for control in ("", *self.controls):
            read_answers(out(control))  # what is wrong with it is said before the model is loaded
        note_quantized([adapter] if adapter else [])
        engine = Engine.open(model, adapter, *settings)
        print_note(*engine.chat.notes)
        limits, who = engine.chat.limits, who_answers(model, adapter, engine)
        column = self._column(name, who, batches(engine, self.batch_size, self.max_new_tokens), out, engine)
        return column, {"min_pixels": limits.min_pixels, "max_pixels": limits.max_pixels}

    def of_service(self, spec: str, concurrency: int, out: Callable[[str], Path]) -> "Column":
        """The answers of a model elsewhere."""
        from qwenvl_ft.evaluate.hosted import open_hosted, replies_of

        hosted = open_hosted(spec)
        return self._column(hosted.name, hosted.name, replies_of(hosted, concurrency, self.max_new_tokens), out)

    def _column(self, name: str, who: str, replies: Any, out: Callable[[str], Path], engine: Any = None) -> "Column":
        from qwenvl_ft.evaluate.scoring import Sheet, ask_all
        from qwenvl_ft.evaluate.table import Column

        def answers(control: "Control | None") -> list[dict[str, Any]]:
            sheet = Sheet.of(self.records, engine and engine.chat, self.limit, self.seed, control)
            with counting(f"{name}{', ' + control if control else ''}: answering") as on_answer:
                return ask_all(sheet, replies, [who, self.max_new_tokens], on_answer, out(control or ""), engine)

        return Column(name, answers(None), {control: answers(control) for control in self.controls})


def evaluate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="The model's folder; with --suite also http://HOST:PORT/v1#MODEL.")],
    meta: Annotated[Path | None, META] = None,
    data_dir: DataDir = None,
    adapter: Adapter = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Where every prediction goes; default predictions-META.jsonl beside the adapter, without one -META-MODEL here. "
            "With --suite a folder; default suite-TASK-MODEL here.",
        ),
    ] = None,
    config: SettingsOf = None,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    thinking: ThinkingOption = None,
    boxes: BoxesOption = None,
    batch_size: BatchSize = BATCH_SIZE,
    max_new_tokens: MaxNewTokens = MAX_NEW_TOKENS,
    metric: Metrics = None,
    limit: Limit = None,
    seed: Seed = 0,
    blank: Blank = False,
    shuffled: Shuffled = False,
    no_pictures: NoPictures = False,
    text_first: TextFirst = False,
    fetch_media: FetchMedia = False,
    suite: Annotated[
        str | None,
        typer.Option(
            metavar="TASK,...", help="In place of a meta-file, tasks of lmms-eval, which is installed apart (docs/ask.md)."
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="With --suite: a folder with tasks of yours.")
    ] = None,
    lmms_eval: Annotated[
        str,
        typer.Option(envvar="LMMS_EVAL", metavar="COMMAND", help="With --suite: where lmms-eval is, such as ENV/bin/lmms-eval."),
    ] = "lmms-eval",
    as_json: Json = False,
) -> None:
    """Ask every question of a meta-file and score the answers, each score with its 95 % interval, beside what is right without
    looking. Every prediction is in a file, where a second run goes on.

    Without --metric: relaxed, which is ChartQA's rule, and exact; where boxes are wanted, their IoU and AP, too. Each assistant
    turn is a question, the turns before it as they stand in the record. An empty answer is wrong. To compare a base with an adapter
    at equal pixels: --config ADAPTER/config.yaml.

    --suite serves the model and lets lmms-eval ask it the questions of its tasks, --batch-size at a time, the first --limit of each
    task. Its interval is 1.96 of its own standard errors on either side.

    Example: qwenvl-ft eval data/tiny data/sample/eval.json --data-dir data/sample/images --adapter runs/demo
    """
    _refuse(context, OF_QUESTIONS if suite else OF_SUITE, "with --suite its tasks say that" if suite else "is for --suite")
    if suite:
        settings = [f"--{key.replace('_', '-')}={value}" for key in OF_SERVE if (value := context.params[key])]
        _evaluate_suite(model, adapter, settings, suite, lmms_eval, include_path, out, batch_size, limit, as_json)
        return
    if not meta:
        raise typer.BadParameter("give the file of questions, or --suite", param_hint="META")
    from qwenvl_ft.evaluate.card import CARD, SCORES, write_card
    from qwenvl_ft.evaluate.metrics import metric_named
    from qwenvl_ft.evaluate.scoring import score
    from qwenvl_ft.evaluate.table import tabulate
    from qwenvl_ft.folders.whole import write_json
    from qwenvl_ft.infer.engine import check_folders

    for name in metric or []:
        metric_named(name)
    folder = Path(model)
    check_folders(folder, [adapter] if adapter else [])
    chat_settings = read_chat_settings(config, min_pixels, max_pixels, thinking)
    reading = read_reading(config, fetch_media, own=own_reading([(folder, adapter)], boxes), boxes=boxes)
    records, facts, skipped = _records(meta, data_dir, reading, config)
    of = f"{_file_name(meta.stem)}{'' if adapter else f'-{folder.resolve().name}'}"
    target = out or (adapter or Path()) / f"predictions-{of}.jsonl"
    asked = Asked(records, _controls(records, blank, shuffled, no_pictures, text_first), limit, seed, batch_size, max_new_tokens)
    name = f"{folder}{f'+{adapter}' if adapter else ''}"
    column, limits = asked.of_folder(name, folder, adapter, chat_settings._replace(reading=reading), partial(_beside, target))
    scores = score(column.predictions) | limits | skipped | {"predictions": str(target)}
    table = tabulate([column], metric or [], seed)
    if adapter and not out:
        write_json(adapter / SCORES.format(of), {"meta": meta.name, "table": table})
        if not write_card(adapter, folder):
            print_note(f"{adapter / CARD} was changed by hand: it is left as it is")
    if as_json:
        print_json(scores | {"table": table})
        return
    shown = [(name.replace("_", " "), f"{value:,}") for name, value in scores.items() if isinstance(value, int)]
    print_drawing(draw_counts(f"{name} on {meta}", [*facts, *shown, ("predictions", str(target))]))
    _print(table)


def _refuse(context: typer.Context, names: Collection[str], what: str) -> None:
    """Raises BadParameter where one of these parameters was given."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in names and source and source.name == "COMMANDLINE":
            raise typer.BadParameter(what, param_hint=parameter.opts[0])


def _evaluate_suite(
    model: str, adapter: Path | None, settings: list[str], tasks: str, program: str, include_path: Path | None, out: Path | None,
    num_concurrent: int, limit: int | None, as_json: bool,
) -> None:  # fmt: skip
    """`eval --suite`; `settings` are arguments of `serve`."""
    from qwenvl_ft.evaluate.hosted import is_hosted
    from qwenvl_ft.evaluate.suite import OTHERWISE_ASKED, check_served, find_program, run_suite, serving, suite_table
    from qwenvl_ft.folders.whole import writing
    from qwenvl_ft.infer.engine import check_folders

    path = find_program(program)
    name = re.sub(r"//[^/@]*@", "//", f"{model}{f'+{adapter}' if adapter else ''}")
    elsewhere = None
    if is_hosted(model):
        if adapter or settings:
            raise typer.BadParameter("the server there has its own adapters, pixels and thoughts", param_hint="MODEL")
        elsewhere = check_served(model)
        if any(word in elsewhere.model for word in OTHERWISE_ASKED):
            print_note(f"lmms-eval takes {elsewhere.model} for one of OpenAI's by its name, and asks it without a temperature")
    else:
        check_folders(Path(model), [adapter] if adapter else [])
    target = out or Path(f"suite-{_file_name(tasks)}-{_file_name(name)}")
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        served = elsewhere or stack.enter_context(serving(Path(model), adapter, num_concurrent, settings, target / "serve.log"))
        figures = run_suite(path, tasks, served, target, include_path, limit, num_concurrent, pass_on)
    if as_json:
        print_json({"model": name, "suite": tasks} | figures)
        return
    counts = [("answers", f"{figures['answers']:,}"), ("empty answers", f"{figures['empty_answers']:,}")]
    print_drawing(draw_counts(f"{name} on {tasks}", [*counts, ("results", figures["results"])]))
    print_drawing(draw_table(*suite_table(figures)))


def compare(
    models: Annotated[
        list[str],
        typer.Argument(help="A model's folder, BASE+ADAPTER, http://HOST/v1#MODEL, dashscope:MODEL; the first is compared with."),
    ],
    meta: Meta,
    data_dir: DataDir = None,
    out: Annotated[Path | None, typer.Option("--out", help="The folder of answers and table; default compare-META here.")] = None,
    config: SettingsOf = None,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    thinking: ThinkingOption = None,
    boxes: BoxesOption = None,
    batch_size: BatchSize = BATCH_SIZE,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests to a service at a time.")] = 8,
    max_new_tokens: MaxNewTokens = MAX_NEW_TOKENS,
    metric: Metrics = None,
    limit: Limit = None,
    seed: Seed = 0,
    blank: Blank = False,
    shuffled: Shuffled = False,
    no_pictures: NoPictures = False,
    text_first: TextFirst = False,
    fetch_media: FetchMedia = False,
    as_json: Json = False,
) -> None:
    """Ask several models the same questions, here or behind an address, and write one table: scores with their 95 % intervals,
    p-values against the first model, what is right without looking.

    Every answer is kept as it comes; the same command asks only what is missing. A service that is busy is asked again, later each
    time. http://NAME@HOST/v1#MODEL takes the key from the variable NAME; dashscope:MODEL takes DASHSCOPE_API_KEY.

    Example: qwenvl-ft compare data/tiny data/tiny+runs/demo data/sample/eval.json --data-dir data/sample/images --blank
    """
    from qwenvl_ft.evaluate.hosted import askable, is_hosted
    from qwenvl_ft.evaluate.metrics import metric_named
    from qwenvl_ft.evaluate.table import markdown, tabulate
    from qwenvl_ft.infer.engine import check_folders

    for name in metric or []:
        metric_named(name)
    folders = {spec: model_and_adapter(spec) for spec in models if not is_hosted(spec)}
    for model, adapter in folders.values():
        check_folders(model, [adapter] if adapter else [])
    reading = read_reading(config, fetch_media, own=own_reading([*folders.values()], boxes), boxes=boxes)
    records, facts, skipped = _records(meta, data_dir, reading, config)
    if len(folders) < len(models):
        askable(records)
    files = [_file_name(re.sub(r"//[^/@]*@", "//", spec)) for spec in models]
    if len(set(files)) < len(files):
        raise UserError(Problem("the models", "two of them have the same name", "name each once"))
    target = out or Path(f"compare-{_file_name(meta.stem)}")
    asked = Asked(records, _controls(records, blank, shuffled, no_pictures, text_first), limit, seed, batch_size, max_new_tokens)
    chat_settings = read_chat_settings(config, min_pixels, max_pixels, thinking)
    columns: list[Column] = []
    problems: list[Problem] = []
    limits: dict[str, dict[str, int]] = {}
    for spec, file in zip(models, files, strict=True):
        place = partial(_beside, target / f"{file}.jsonl")
        try:
            if spec in folders:
                column, limits[spec] = asked.of_folder(spec, *folders[spec], chat_settings._replace(reading=reading), place)
                columns.append(column)
            else:
                columns.append(asked.of_service(spec, concurrency, place))
        except UserError as error:  # the others are asked all the same
            problems += error.problems
    if problems:
        raise UserError(*problems)
    table = tabulate(columns, metric or [], seed)
    table["models"] = {column.name: _counts(column) | limits.get(column.name, {}) | skipped for column in columns}
    if len({tuple(of.values()) for of in limits.values()}) > 1:
        table["words"].append("the models in folders were shown pictures of other sizes: --config RUN/config.yaml makes them equal")
    (target / "compare.json").write_text(json.dumps(table, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    (target / "compare.md").write_text(markdown(table), encoding="utf-8")
    if as_json:
        print_json(table)
        return
    print_drawing(draw_counts(f"{len(columns)} models on {meta}", facts))
    _print(table)
    for name, counts in table["models"].items():
        print_line(f"{name}: " + ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in counts.items()))
    print_line(f"answers, compare.md and compare.json are in {target}")


def _records(
    meta: Path, data_dir: Path | None, reading: Reading, config: Path | None
) -> tuple[Sequence["Record"], list[tuple[str, str]], dict[str, int]]:
    """The records, what is said of their files, and how many were skipped. Raises UserError where one cannot be read, unless
    the settings say `on_bad_record: skip`: then that is said, and the others are asked about."""
    from qwenvl_ft.data.meta_file import Tally, read_records
    from qwenvl_ft.data.notes import Noted
    from qwenvl_ft.evaluate.metrics import check_stated

    tally = Tally()
    reading = replace(reading, media_position="as_written")  # of whatever run: --text-first asks the other way round
    records, problems, _ = read_records(local_meta(meta, print_note), data_dir, reading=reading, tally=tally)
    if problems and not (records and config and load_config(config).on_bad_record == "skip"):
        raise UserError(*problems)
    check_stated(records)
    for note in Noted(records).lines:
        print_note(note)
    if not problems:
        return records, draw_files(tally.facts), {}
    print_problems(problems)
    return records, draw_files(tally.facts), {"skipped": tally.num_records - len(records)}


def _controls(records: Sequence["Record"], blank: bool, shuffled: bool, no_pictures: bool, text_first: bool) -> list["Control"]:
    """Those that are wanted; what --text-first leaves as it is, is said."""
    from qwenvl_ft.evaluate.controls import num_moved

    if text_first and 0 < (moved := num_moved(records)) < len(records):
        left = f"{len(records) - moved:,} of {len(records):,} records"
        print_note(f"--text-first asks {left} as they are written: they show nothing, or nothing before all of a turn's text")
    wanted: dict[Control, bool] = {"blank": blank, "shuffled": shuffled, "no_pictures": no_pictures, "text_first": text_first}
    return [control for control, is_wanted in wanted.items() if is_wanted]


def model_and_adapter(spec: str) -> tuple[Path, Path | None]:
    """The folders that a text names, the adapter behind the last plus sign."""
    if Path(spec).is_dir() or "+" not in spec:
        return Path(spec), None
    model, _, adapter = spec.rpartition("+")
    return Path(model), Path(adapter)


def _file_name(text: str) -> str:
    return re.sub("[^-.0-9A-Za-z_]+", "_", text).strip("_.")


def _beside(path: Path, control: str) -> Path:
    return path.with_name(f"{path.stem}-{control}{path.suffix}") if control else path


def _counts(column: "Column") -> dict[str, int]:
    """What was spent on a model's answers and how they ended, those under its controls, too."""
    lines = [*column.predictions, *(line for lines in column.controls.values() for line in lines)]
    prompt, answer = (sum(line.get("tokens", (0, 0))[at] for line in lines) for at in (0, 1))
    counts = {
        "answers": len(lines), "empty": sum(not line["answer"].strip() for line in lines),
        "cut": sum(line["cut"] for line in lines), "refused": sum("error" in line for line in lines),
        "retries": sum(line.get("retries", 0) for line in lines),
        "prompt_tokens": prompt, "answer_tokens": answer,
    }  # fmt: skip
    return {name: count for name, count in counts.items() if count or name == "answers"}


def _print(table: dict[str, Any]) -> None:
    from qwenvl_ft.evaluate.table import sections

    for title, head, rows in sections(table):
        print_drawing(draw_table(title, head, rows))
    for word in table["words"]:
        print_line(word, "bold")
