"""From a config to everything that is known before a GPU is touched: records, scripts, rows, and what was left out and why."""

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import count, islice
from statistics import median
from typing import Any

from qwenvl_ft.config import Config
from qwenvl_ft.data.chat import IGNORE, Chat, Script, open_chat
from qwenvl_ft.data.checks import Against, Checks, checked, notes_of
from qwenvl_ft.data.formats.documented import record_notes
from qwenvl_ft.data.geometry import resized
from qwenvl_ft.data.meta_file import OnRecord, Tally, called, read_records
from qwenvl_ft.data.packing import Plan, pack, steps
from qwenvl_ft.data.reading import Reading
from qwenvl_ft.data.records import Picture, Record, Video
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.problems import check_model
from qwenvl_ft.folders.runs import check_output_dir

ROUNDED_AWAY = 0.1  # of a picture's area; less is how every picture is rounded
FEW_TOKENS = 16  # of a picture: 112 x 112 px where a token is 28 x 28
FEW_STEPS = 20  # optimizer steps; LoRA has hardly left its zeros after fewer


@dataclass(frozen=True)
class Prepared:
    """One meta-file made ready. `problems` are the records left out of `plan`, each with its reason."""

    num_records: int
    records: list[Record]
    scripts: list[Script]
    plan: Plan
    problems: list[Problem]
    chat: Chat
    tally: Tally

    def taught_tokens(self, row: int) -> int:
        """How many tokens a row teaches: what the loss divides by, summed over a step's rows."""
        return sum(sum(label != IGNORE for label in self.scripts[index].labels) for index in self.plan.rows[row])

    def places(self, row: int) -> str:
        """The records of a row, for a message."""
        return ", ".join(self.scripts[index].where for index in self.plan.rows[row])

    def summary(self, config: Config) -> dict[str, Any]:
        """What `qwenvl-ft plan --json` prints and `plan.json` keeps; tokens are those of the packed records."""
        num_steps = len(schedule(self, config))
        used = [index for row in self.plan.rows for index in row]
        pictures = {picture for record in self.records for picture in record.pictures}
        return {
            **self.tally.facts,
            "records": self.num_records,
            "used": len({self.scripts[index].where for index in used}),
            "skipped": [problem.facts for problem in self.problems],
            "pictures": len(pictures),
            "pictures_shrunk": sum(shrunk(picture, self.chat) for picture in pictures),
            "tokens": token_counts([self.scripts[index].length for index in used]),
            "taught_tokens": sum(self.taught_tokens(row) for row in range(len(self.plan.rows))),
            "rows": len(self.plan.rows),
            "row_tokens": self.plan.row_tokens,
            "fill": round(self.plan.fill, 4),
            "steps_per_epoch": len(steps(len(self.plan.rows), config.rows_per_step, config.seed, 0)),
            "steps": num_steps,
            "checks": (checks := self.checks(config).facts()),
            "notes": notes(len(self.plan.rows), num_steps, config)
            + record_notes(self.records)
            + picture_notes(pictures, self.chat)
            + notes_of(checks),
        }

    def checks(self, config: Config) -> Checks:
        """What only a tool can find in the records, compared with those of evaluation."""
        against = None
        if config.eval_meta_file:
            against = Against.read(config.eval_meta_file, config.eval_data_dir or config.train_data_dir, Reading.of(config))
        return checked(self.records, self.scripts, self.chat, against)


Ready = tuple[Prepared, Prepared | None]


def prepare(config: Config, evaluation: bool = False, on_record: OnRecord = lambda done, total: None) -> Prepared:
    """Reads, writes and packs the training records, or the evaluation records.

    Raises UserError with every problem, unless `on_bad_record` is skip and something is left to train on.
    """
    meta_file = config.eval_meta_file if evaluation and config.eval_meta_file else config.train_meta_file
    data_dir = config.eval_data_dir if evaluation and config.eval_data_dir else config.train_data_dir
    chat = open_chat(config.model, config.min_pixels, config.max_pixels, config.thinking, config.video_max_pixels)
    tally = Tally()
    records, problems, total = read_records(
        meta_file, data_dir, on_record, reading=Reading.of(config), tally=tally, seed=config.seed
    )
    scripts = write_scripts(chat, records, problems)
    plan = pack([script.length for script in scripts], config.row_tokens, share=not chat.family.linear_attention)
    stops = config.on_bad_record == "error" or not plan.rows
    problems += too_long(scripts, plan, called(meta_file), as_one=stops)  # a run that skips them keeps the list of them
    if problems and stops:
        if config.on_bad_record == "error" and plan.rows:
            found = "1 problem was" if len(problems) == 1 else f"{len(problems)} problems were"
            problems.append(Problem("on_bad_record", f"is error, and {found} found",
                                    "mend them, or set on_bad_record: skip to train without these records"))  # fmt: skip
        raise UserError(*problems)
    return Prepared(total, records, scripts, plan, problems, chat, tally)


def make_ready(config: Config, on_record: OnRecord = lambda done, total: None) -> Ready:
    """What a run reads before a model is loaded: the records of training and of evaluation.

    Raises UserError for what is wrong with its folders, its records and whom it reports to: all that can be known without torch.
    """
    check_output_dir(config.output_dir)
    check_model(config.model)
    installed = {"wandb": find_spec("wandb"), "tensorboard": find_spec("tensorboard") or find_spec("tensorboardX")}
    if missing := [name for name in config.report_to if not installed[name]]:
        raise UserError(*(Problem("report_to", f"{name} is not installed", f"pip install {name}") for name in missing))
    return prepare(config, on_record=on_record), prepare(config, evaluation=True) if config.eval_meta_file else None


def write_scripts(chat: Chat, records: Sequence[Record], problems: list[Problem]) -> list[Script]:
    """The examples of all records; what the template refuses is added to `problems`."""
    scripts: list[Script] = []
    for record in records:
        try:
            scripts += chat.write_scripts(record)
        except UserError as error:
            problems += [replace(problem, where=record.where) for problem in error.problems]
    return scripts


def too_long(scripts: Sequence[Script], plan: Plan, name: str, as_one: bool) -> list[Problem]:
    """A problem for each record that no row holds; as one of the file `name`, if they are several."""
    lengths: dict[str, int] = {}  # by record: one whose template rewrites turns has several scripts
    for script in (scripts[index] for index in plan.too_long):
        lengths[script.where] = max(script.length, lengths.get(script.where, 0))
    films = any(isinstance(medium, Video) for index in plan.too_long for medium in scripts[index].media)
    lower = "video_max_pixels, video_fps or video_max_frames" if films else "max_pixels"
    if as_one and len(lengths) > 1:
        longest = max(lengths, key=lambda where: lengths[where])
        what = f"{len(lengths):,} records are too long for a row of {plan.row_tokens} tokens; {longest} is the longest, "
        fix = f"raise row_tokens to {lengths[longest]}, lower {lower}, or shorten them"
        return [Problem(name, f"{what}{lengths[longest]} tokens", fix)]
    fix = f"raise row_tokens to {{}}, lower {lower}, or shorten the record"
    return [
        Problem(where, f"{length} tokens, a row holds {plan.row_tokens}", fix.format(length)) for where, length in lengths.items()
    ]


def notes(num_rows: int, num_steps: int, config: Config) -> list[str]:
    """What is allowed and probably not meant."""
    found = []
    if num_rows < config.rows_per_step:
        found.append(f"{num_rows} rows are fewer than rows_per_step, {config.rows_per_step}: every step takes them all; lower it")
    if num_steps < FEW_STEPS:
        more = "raise max_steps" if config.max_steps else "lower rows_per_step or row_tokens, or raise num_train_epochs"
        found.append(f"{num_steps} optimizer steps teach little: {more}")
    if config.attn_implementation == "flash_attention_2" and not (find_spec("flash_attn") or find_spec("kernels")):
        found.append(
            "flash_attention_2 is not installed here, where train would stop; attn_implementation: auto takes what there is"
        )
    return found


def picture_notes(pictures: Collection[Picture], chat: Chat) -> list[str]:
    """What can hardly be seen: pictures of few tokens, the smallest named."""
    sizes = {picture: resized(picture.height, picture.width, chat.limits) for picture in pictures}
    few = [picture for picture, (height, width) in sizes.items() if height * width <= FEW_TOKENS * chat.limits.unit_px**2]
    if not few:
        return []
    least = min(few, key=lambda picture: (sizes[picture][0] * sizes[picture][1], picture.name))
    height, width = sizes[least]
    tokens = height * width // chat.limits.unit_px**2
    what = f"{len(few):,} picture{'s' * (len(few) > 1)} of at most {FEW_TOKENS} tokens, in which little can be seen: {least.name}, "
    return [f"{what}{least.width} x {least.height} px, becomes {width} x {height}, {tokens} tokens; min_pixels enlarges them"]


def schedule(prepared: Prepared, config: Config) -> list[tuple[int, list[int]]]:
    """(epoch, rows) of every optimizer step of the run, the same whatever the number of processes."""
    num_rows, epochs = len(prepared.plan.rows), count() if config.max_steps else range(config.num_train_epochs)
    found = ((epoch, rows) for epoch in epochs for rows in steps(num_rows, config.rows_per_step, config.seed, epoch))
    return list(islice(found, config.max_steps))


def token_counts(lengths: Sequence[int]) -> dict[str, int]:
    """min, median, max and total, as the commands print them."""
    lengths = lengths or [0]
    return {"min": min(lengths), "median": int(median(lengths)), "max": max(lengths), "total": sum(lengths)}


def shrunk(picture: Picture, chat: Chat) -> bool:
    """Whether the picture is made smaller: by `max_pixels`, or by rounding to whole units, if that takes a tenth of it or more."""
    height, width = resized(picture.height, picture.width, chat.limits)
    rounded = resized(picture.height, picture.width, replace(chat.limits, max_pixels=sys.maxsize))
    return (height, width) != rounded or height * width <= (1 - ROUNDED_AWAY) * picture.height * picture.width
