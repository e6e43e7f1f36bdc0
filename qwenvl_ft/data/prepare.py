"""From a config to everything that is known before a GPU is touched: records, scripts, rows, and what was left out and why."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from qwenvl_ft.config import Config
from qwenvl_ft.data.batches import batches_of
from qwenvl_ft.data.chat import Chat, open_chat
from qwenvl_ft.data.checks import Against, Checks, notes_of, token_counts
from qwenvl_ft.data.families import feature_width
from qwenvl_ft.data.geometry import resized
from qwenvl_ft.data.kept import kept_table, table_name
from qwenvl_ft.data.meta_file import Meta, OnRecord, Tally, called
from qwenvl_ft.data.mirror import called as called_folder
from qwenvl_ft.data.notes import Noted
from qwenvl_ft.data.numbers import Indices, blocks
from qwenvl_ft.data.packed import PackedMedium, read_medium
from qwenvl_ft.data.packing import Alike, Plan, Schedule, is_little, pack
from qwenvl_ft.data.quantization import quantization_problems
from qwenvl_ft.data.reading import Reading
from qwenvl_ft.data.records import Picture, Video
from qwenvl_ft.data.table import Scripts, TableWriter
from qwenvl_ft.data.targets import SEEING, find_layers, num_trained, only_tower_trains, said_of
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.adapter import check_base
from qwenvl_ft.folders.cache import features_folder, free_bytes
from qwenvl_ft.folders.problems import check_adapter, check_model
from qwenvl_ft.folders.runs import check_output_dir

MOST_OF_FREE = 0.25  # of the room on a disk that what is kept may take
FEW_TOKENS = 16  # of a picture: 112 x 112 px where a token is 28 x 28
# By a rule of thumb a weight of an adapter holds two bits, and a token that is taught once brings one.
TOKENS_A_WEIGHT = 2
FEW_STEPS = 50  # optimizer steps: of the sample, 52 taught what 26 did not (docs/training.md, Where the defaults come from)


@dataclass(frozen=True)
class Prepared:
    """One meta-file made ready. `problems` are the records left out of `plan`, each with its reason.

    Its scripts lie in a table on the disk: what is here are a few numbers of each.
    """

    scripts: Scripts
    plan: Plan
    problems: list[Problem]
    chat: Chat

    @property
    def num_records(self) -> int:
        """How many the meta-file holds in all."""
        number: int = self.scripts.facts["records"]
        return number

    def taught_tokens(self, row: int) -> int:
        """How many tokens a row teaches: what the loss divides by, summed over a step's rows."""
        return int(self._taught[row])

    def tokens(self, row: int) -> int:
        """How many tokens a row has, a prefix that records share counted once."""
        return int(self.plan.tokens[row])

    def cost(self, row: int) -> int:
        """What a row takes of time, about: a token of a picture or video is one to read, and one to see."""
        return int(self.plan.tokens[row] + self.media_tokens[row])

    @cached_property
    def _taught(self) -> Indices:
        return self.plan.rows.sums(self.scripts.taught)

    @cached_property
    def media_tokens(self) -> Indices:
        """Of each row its tokens of pictures and videos."""
        return self.plan.rows.sums(self.scripts.media_tokens, once=True)

    def heaviest(self, tower_trains: bool) -> list[int]:
        """The rows that take most memory to train on: by their tokens, by the keys that these see, which are gathered where a
        prefix is shared, and, where the tower keeps something, by the tokens of their pictures and videos."""
        keys = self.plan.rows.sums(self.scripts.lengths)
        return sorted({int(of.argmax()) for of in (self.plan.tokens, keys, *[self.media_tokens] * tower_trains)})

    @property
    def shares(self) -> bool:
        """Whether a row holds a prefix once for several records."""
        return self.plan.rows.shares

    def places(self, row: int) -> str:
        """The records of a row, for a message."""
        return ", ".join(map(self.scripts.where, self.plan.rows[row]))

    def summary(self, config: Config) -> dict[str, Any]:
        """What `qwenvl-ft plan --json` prints and `plan.json` keeps; tokens are those of the packed records."""
        steps = schedule(self, config)
        facts = self.scripts.facts
        used, taught = self._used()
        return {
            "files": facts["files"],
            "forms": facts["forms"],
            "media_position": facts["media_position"],
            "records": self.num_records,
            "used": used,
            "skipped": [problem.facts for problem in self.problems],
            "pictures": facts["pictures"],
            "pictures_shrunk": facts["pictures_shrunk"],
            "tokens": token_counts(self.plan.lengths),
            "paid": {
                "tokens": int(self.plan.tokens.sum()),
                **{
                    name: int(self.plan.rows.sums(self.scripts.num_media, once).sum())
                    for name, once in (("media_shown", False), ("media", True))
                },
            },
            "features": self.features(config),
            "taught_tokens": taught,
            "trains": said_of(config),
            "rows": len(self.plan.rows),
            "row_tokens": self.plan.row_tokens,
            "fill": round(self.plan.fill, 4),
            "steps_per_epoch": steps.steps_per_epoch,
            "steps": len(steps),
            "checks": facts["checks"],
            "notes": notes(len(self.plan.rows), len(steps), config)
            + self._shared(steps, config)
            + self._held(taught, config)
            + self._unseen(config)
            + facts["notes"],
        }

    def features(self, config: Config) -> dict[str, Any]:
        """Whether what the vision tower makes of the rows is kept: why not, if it is not, and its bytes in 16 bits."""
        num_bytes = 2 * int(self.media_tokens.sum()) * feature_width(config.model) if len(self.plan.rows) else 0
        steps = schedule(self, config)
        return {"bytes": num_bytes, "not_kept": not_kept(config, len(steps) > steps.steps_per_epoch) or no_room(num_bytes)}

    def _shared(self, steps: Schedule, config: Config) -> list[str]:
        """A note, where a step takes fewer rows than it may since they share prefixes, or where records share one that rows do
        not."""
        if (fewer := -(-steps.num_rows // max(1, steps.steps_per_epoch))) < min(config.rows_per_step, steps.num_rows) / 1.5:
            more = f"; for more rows of the same records lower row_tokens, now {config.row_tokens}"
            return [f"a step takes {fewer} rows, which teach what {config.rows_per_step} would that share no prefixes" + more]
        why = not_shared(config)
        lengths = self.scripts.lengths
        shared = why and any(not is_little(of, lengths[start : start + len(of)]).all() for start, of in blocks(self.scripts.shared))
        return [f"records that share a prefix pay for it each: {why}"] if shared else []

    def _held(self, taught: int, config: Config) -> list[str]:
        """A note, where more is taught than an adapter of this rank holds."""
        weights = num_trained(config)
        if not weights or taught <= TOKENS_A_WEIGHT * weights:
            return []
        rule = f"about {TOKENS_A_WEIGHT} of them a weight, by a rule of thumb"
        held = f"{taught:,} taught tokens may be more than the adapter's {weights:,} weights hold, {rule}"
        return [f"{held}: raise lora_rank from {config.lora_rank}, if the loss stays high"]

    def _unseen(self, config: Config) -> list[str]:
        """A note, where records teach nothing since they show nothing."""
        if not only_tower_trains(config.lora_on):
            return []
        unseen = len(np.unique(self.scripts.records[:][self.scripts.media_tokens[:] == 0]))
        what = f"{unseen:,} records show no picture or video: they teach nothing with LoRA on {' and '.join(config.lora_on)} alone"
        return [f"{what}: add language to lora_on"] if unseen else []

    def _used(self) -> tuple[int, int]:
        """How many records have a script in a row, and how many tokens those teach. Scripts of one record stand together."""
        used, taught, last = 0, 0, -1
        for start, lengths in blocks(self.scripts.lengths):
            inside, here = lengths <= self.plan.row_tokens, slice(start, start + len(lengths))
            records = self.scripts.records[here][inside]
            used += int((np.diff(records, prepend=last) != 0).sum())
            taught += int(self.scripts.taught[here][inside].sum(dtype=np.int64))
            last = int(records[-1]) if len(records) else last
        return used, taught


Ready = tuple[Prepared, Prepared | None]


def not_shared(config: Config) -> str | None:
    """Why rows hold no prefix once for several records; None if they do."""
    if config.share_prefix == "off":
        return "share_prefix is off"
    if config.attn_implementation not in ("auto", "varlen"):
        return f"attn_implementation is {config.attn_implementation}, and only varlen, which auto takes then, runs such rows"
    if config.lora_dropout:
        return f"lora_dropout is {config.lora_dropout}, and would drop the same of it for all of them"
    return None


def not_kept(config: Config, again: bool) -> str | None:
    """Why what the vision tower makes of rows is made each time; None if it is kept. `again`: they are run again."""
    if config.cache_features == "off":
        return "cache_features is off"
    if trains := SEEING & set(config.lora_on):
        return f"LoRA on {' and '.join(sorted(trains))} changes it with every step"
    return None if again else "every row is run once"


def no_room(num_bytes: int) -> str | None:
    """Why so many bytes of features are not kept; None if they are."""
    free = free_bytes(features_folder())
    return f"it takes {num_bytes / 2**30:.1f} GiB, and {free / 2**30:.1f} are free" if num_bytes > MOST_OF_FREE * free else None


def prepare(config: Config, evaluation: bool = False, on_record: OnRecord = lambda done, total: None) -> Prepared:
    """Reads, writes and packs the training records, or the evaluation records; what was written before for the same files is read.

    Raises UserError with every problem, unless `on_bad_record` is skip and something is left to train on.
    """
    meta = config.eval_meta_file if evaluation and config.eval_meta_file else config.train_meta_file
    data_dir = config.held_out_dir if evaluation else config.train_data_dir
    chat = open_chat(config.model, config.min_pixels, config.max_pixels, config.thinking, config.video_max_pixels)
    reading = Reading.of(config)
    find_layers(config)

    held_out = None if evaluation else config.eval_meta_file

    def make(folder: Path) -> None:
        """Raises UserError for records that the config has no use for: whoever mends them is to be believed the next time."""
        against = Against.read(held_out, config.held_out_dir, reading) if held_out else None
        scripts, found, whole = write_table(folder, meta, data_dir, chat, reading, config.seed, on_record, against)
        if not whole or not len(scripts) or (found and config.on_bad_record == "error"):
            planned(scripts if whole else None, found)

    def planned(scripts: Scripts | None, problems: list[Problem]) -> Prepared:
        alike = Alike(scripts.back, scripts.shared) if scripts and not_shared(config) is None else None
        plan = pack(scripts.lengths if scripts else [], config.row_tokens, alike=alike)
        stops = config.on_bad_record == "error" or not len(plan.rows)
        if scripts:  # a run that skips them keeps the list of them
            problems = problems + too_long(scripts, plan, called(meta), as_one=stops)
        if scripts is None or (problems and stops):
            if config.on_bad_record == "error" and len(plan.rows):
                found = "1 problem was" if len(problems) == 1 else f"{len(problems)} problems were"
                problems.append(Problem("on_bad_record", f"is error, and {found} found",
                                        "mend them, or set on_bad_record: skip to train without these records"))  # fmt: skip
            raise UserError(*problems)
        if not evaluation and only_tower_trains(config.lora_on) and not any(of.any() for _, of in blocks(scripts.media_tokens)):
            what = f"is {' and '.join(config.lora_on)} alone, and no record shows a picture or video: nothing would be learnt"
            raise UserError(Problem("lora_on", what, "add language"))
        return Prepared(scripts, plan, problems, chat)

    name = table_name(meta, data_dir, config.model, chat, reading, config.seed, held_out, config.held_out_dir)
    scripts = kept_table(name, make)
    return planned(scripts, [Problem(*problem) for problem in scripts.facts["problems"]])


def write_table(
    folder: Path, meta: Meta, data_dir: Path | None, chat: Chat, reading: Reading, seed: int, on_record: OnRecord,
    against: Against | None = None,
) -> tuple[Scripts, list[Problem], bool]:  # fmt: skip
    """Reads all records and writes their scripts into a table; with it their problems, and whether no file broke."""
    tally, writer, noted, few = Tally(), TableWriter(folder), Noted(), Few(chat)
    checks = Checks(chat.limits, against)
    problems: list[Problem] = []
    whole = True
    for batch in batches_of(meta, data_dir, tally, chat, reading, seed, on_record, against=against):
        few.add(writer.add(batch.scripts, batch.media, batch.num_records))
        for missed in batch.missed.values():
            writer.add_files(missed.failed)
        noted.join(batch.noted)
        checks.join(batch.checks)
        problems += batch.problems
        whole &= batch.whole
    problems = tally.said_once(problems)
    looked = checks.facts()
    facts = tally.facts | {
        "placeholders": [chat.picture_id, chat.video_id],
        "problems": [[problem.where, problem.what, problem.fix, problem.kind] for problem in problems],
        "notes": noted.lines + few.lines + notes_of(looked) + chat.notes,
        "checks": looked,
        "mirrors": [called_folder(folder) for folder, media in tally.media.items() if media.mirror and media.mirror.was_asked],
    }
    writer.close(facts)
    return Scripts(folder), problems, whole


def make_ready(config: Config, on_record: OnRecord = lambda done, total: None) -> Ready:
    """What a run reads before a model is loaded: the records of training and of evaluation.

    Raises UserError for what is wrong with its folders, its records and whom it reports to: all that can be known without torch.
    """
    check_output_dir(config.output_dir)
    check_model(config.model)
    if config.init_adapter:
        check_adapter(config.init_adapter)
        check_base(config.init_adapter, config.model)
    if problems := [*quantization_problems(config)]:
        raise UserError(*problems)
    others = {"tensorboard": "tensorboardX"}  # a package that does, too
    if missing := [name for name in config.report_to if not (find_spec(name) or find_spec(others.get(name, name)))]:
        raise UserError(*(Problem("report_to", f"{name} is not installed", f"pip install {name}") for name in missing))
    return prepare(config, on_record=on_record), prepare(config, evaluation=True) if config.eval_meta_file else None


def too_long(scripts: Scripts, plan: Plan, name: str, as_one: bool) -> list[Problem]:
    """A problem for each record that no row holds; as one of the file `name`, if they are several."""
    lengths: dict[str, int] = {}  # by record: one whose template rewrites turns has several scripts
    for number in plan.too_long:
        where = scripts.where(number)
        lengths[where] = max(int(scripts.lengths[number]), lengths.get(where, 0))
    films = any(isinstance(medium, Video) for number in plan.too_long for medium in scripts[number].media)
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


class Few:
    """What can hardly be seen: pictures of few tokens, counted while they go by, the smallest named."""

    def __init__(self, chat: Chat):
        self.limits, self.count = chat.limits, 0
        self.least: tuple[int, str, str] | None = None  # its area, its name, itself

    def add(self, media: Iterable[PackedMedium]) -> None:
        """Media that were not there before."""
        for medium in media:
            if medium.is_picture and medium.area <= FEW_TOKENS * self.limits.unit_px**2:
                self.count += 1
                found = medium.area, read_medium(medium.text).name, medium.text
                self.least = min(self.least or found, found)

    @property
    def lines(self) -> list[str]:
        """A line, or none."""
        if not self.least:
            return []
        picture = read_medium(self.least[2])
        assert isinstance(picture, Picture)
        height, width = resized(picture.height, picture.width, self.limits)
        tokens = height * width // self.limits.unit_px**2
        what = f"{self.count:,} picture{'s' * (self.count > 1)} of at most {FEW_TOKENS} tokens, in which little can be seen: "
        what += f"{picture.name}, {picture.width} x {picture.height} px, becomes {width} x {height}, {tokens} tokens"
        return [f"{what}; min_pixels enlarges them"]


def schedule(prepared: Prepared, config: Config) -> Schedule:
    """(epoch, rows) of every optimizer step of the run, the same whatever the number of processes."""
    plan = prepared.plan
    unshared = -(-sum(length * count for length, count in plan.lengths.items()) // plan.row_tokens)
    return Schedule(len(plan.rows), config.rows_per_step, config.seed, config.num_train_epochs, config.max_steps, unshared)
