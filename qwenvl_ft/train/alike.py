"""Whether a model of a type that is not in the table of families is trained as the one that it is like: tried on made-up records.

What the table says of a family was seen of each of its members by the tests; here it is seen of the model itself, before the
first step. That a model is asked as it was taught, and merges, is made sure of each, where records are written and where it is
exported.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from PIL import Image
from transformers.video_utils import VideoMetadata

from qwenvl_ft.console import print_line
from qwenvl_ft.data.chat import IGNORE
from qwenvl_ft.data.families import NAMES
from qwenvl_ft.data.records import Part, Picture, Record, Turn, Video
from qwenvl_ft.data.rows import PIXELS, Row, Rows, as_floats, pixels, positions_of
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.model.loss import vision_features
from qwenvl_ft.train.state import Run

CLOSE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of a loss: what another order of sums may change


def check_alike(run: Run) -> None:
    """Raises UserError with the property that a model of an unknown type lacks."""
    family, where = run.prepared.chat.family, f"{run.config.model}/config.json"
    if not family.like:
        return
    if lacking := next(_lacking(run), None):
        what = f"its model_type is not known, its layers are those of {family.like}, but {lacking}"
        raise UserError(Problem(where, what, f"use a model of {', '.join(NAMES)}"))
    if run.accelerator.is_main_process:
        print_line(f"{where}: its model_type is not known, its layers are those of {family.like}, and it proved to be alike")


def records() -> list[Record]:
    """A picture, a film of four seconds, and text alone."""
    grey = Image.linear_gradient("L").convert("RGB")
    film = Video.of([grey.resize((96, 64)).rotate(40 * turn) for turn in range(8)], 2.0, range(8), 8)
    asked: list[tuple[Part, ...]] = [(Picture.of(grey), "What is this?"), (film, "What turns?"), ("Say a word, and another one.",)]
    answers = ["A grey ramp, from black to white.", "The ramp does, by degrees.", "Word, and word again."]
    return [
        Record(f"made up {number}", (Turn("user", parts), Turn("assistant", (answer,))))
        for number, (parts, answer) in enumerate(zip(asked, answers, strict=True))
    ]


def _lacking(run: Run) -> Iterator[str]:
    """In words, each property that does not hold."""
    chat, processor = run.prepared.chat, run.processor
    made = records()
    for record in made:
        yield from (f"{what} of a prompt with {shown(record)} differ from transformers'" for what in _unlike(run, record))
    scripts = [chat.write_scripts(record)[-1] for record in made]
    rows = Rows(scripts, [[0, 1, 2], [0], [1], [2]], chat, processor, run.always_look)
    run.model.eval()
    close = CLOSE[torch.bfloat16 if run.bf16 else torch.float32]

    def losses(row: Row) -> list[float]:
        """Of each record in the joined row, the others untaught."""
        found, bounds = [], row["cu_seq_lens_q"].tolist()
        for start, end in pairwise(bounds[:4]):
            labels = torch.full_like(row["labels"], IGNORE)
            labels[:, start:end] = row["labels"][:, start:end]
            found.append(run.loss(row | {"labels": labels}).item())
        return found

    with torch.no_grad():
        joined = losses(rows[0])
        for alone, together, record in zip((run.loss(rows[at]).item() for at in (1, 2, 3)), joined, made, strict=True):
            if not abs(alone - together) <= close * alone:
                yield f"the loss of a record with {shown(record)} is {alone:.6g} alone and {together:.6g} in a row with others"
        for number, record in enumerate(made):
            changed = dict(rows[0])
            changed["input_ids"] = changed["input_ids"].clone()
            end = int(changed["cu_seq_lens_q"][number + 1])
            changed["input_ids"][:, end - 8 : end] = changed["input_ids"][:, end - 8 : end].roll(3, -1)
            for other, (before, after) in enumerate(zip(joined, losses(changed), strict=True)):
                if other != number and not abs(before - after) <= close / 10 * before:
                    yield f"a record sees what the one with {shown(record)} in its row says"


def _unlike(run: Run, record: Record) -> Iterator[str]:
    """What of a record's prompt is not as transformers' own processor and model have it."""
    chat, processor, turns = run.prepared.chat, run.processor, record.turns[:1]
    script = chat.asking(turns)
    content = [{"type": medium.kind} for medium in turns[0].media] + [{"type": "text", "text": turns[0].text}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
    given: dict[str, object] = {}
    if films := [medium for medium in record.media if isinstance(medium, Video)]:
        facts = [VideoMetadata(total_num_frames=of.num_frames, fps=of.fps, frames_indices=list(of.indices)) for of in films]
        given = {"videos": [of.images for of in films], "video_metadata": facts, "do_sample_frames": False}
    if pictures := record.pictures:
        given["images"] = [picture.source for picture in pictures]
    wanted = processor(text=[text], **given, return_tensors="pt")
    ids = script.widened()[0]
    if ids != wanted["input_ids"][0].tolist():
        yield "the tokens"
        return
    looked_at = pixels(script.media, chat, processor)
    ours = as_floats(looked_at)
    for name in wanted.keys() & {"pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"}:
        if not torch.equal(ours[name], wanted[name]):
            yield f"the {name}"
    device = run.accelerator.device
    with torch.no_grad():
        seen = vision_features(run.bare, looked_at | {"input_ids": wanted["input_ids"]}, False, device=device) or {}
        for kind, found in seen.items():
            shows = [ours[name].to(device) for name in PIXELS[kind]]
            stock = torch.cat(tuple(getattr(run.bare, f"get_{kind}_features")(*shows, return_dict=True).pooler_output))
            if not torch.allclose(found.pooler_output[0], stock, rtol=0, atol=CLOSE[stock.dtype] * float(stock.abs().max())):
                yield f"the {kind} features"
    timed = {"second_per_grid_ts": wanted["second_per_grid_ts"]} if "second_per_grid_ts" in wanted else {}
    grids = (wanted.get("image_grid_thw"), wanted.get("video_grid_thw"))
    places, _ = run.bare.base_model.model.model.get_rope_index(wanted["input_ids"], wanted["mm_token_type_ids"], *grids, **timed)
    if not torch.equal(positions_of(script, ids, chat)[1:], places[:, 0]):
        yield "the positions"


def shown(record: Record) -> str:
    """What a record shows, in words."""
    return " and ".join("a video" if isinstance(of, Video) else "a picture" for of in record.media) or "text alone"
