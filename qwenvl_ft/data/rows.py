"""Rows of tensors for the model: the pictures and videos decoded, the placeholders widened, several records joined into one row.

A row is never padded and holds exactly the keyword arguments of the model's forward, and `labels`. What keeps its records
apart is the text row of `position_ids`, which starts again at 0 with each record; transformers builds the attention mask from
it only while there is no `attention_mask` and no cache (`loss` sees to the cache). Each of these fails without a word when it is
missing, so this is the one place where a row is built.

Records that share a prefix stand in a row as a tree: it once, with its pictures, then the rest of each, whose positions go
on from it and whose tokens see it and themselves. Then the bounds of keys differ from those of queries: see KEYS.

Axes: S = tokens in a row, P = patches, D = values of a patch, N = pictures, R = pieces of the row, which are records, or prefixes
and what follows them.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import SizeDict
from transformers.video_processing_utils import BaseVideoProcessor

from qwenvl_ft.data.chat import IGNORE, Chat, Script, runs_of
from qwenvl_ft.data.features import Features
from qwenvl_ft.data.packing import PackedRows
from qwenvl_ft.data.pictures import PictureChanged, opened
from qwenvl_ft.data.records import Medium, Picture, Video
from qwenvl_ft.data.videos import frames
from qwenvl_ft.errors import Problem, UserError

Row = dict[str, Any]
Built = tuple[Row, list[Problem]]  # a row, and what is wrong with those of its records that it shows blank and untaught


Grid = tuple[int, int, int]
# By the kind of a medium: what the model calls its patches and its grids.
PIXELS = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}


SCALES = "scales"  # in a row: what `scales_of` its processor
KEYS = "key_places"  # in a row with trees: (K) the place of every key that a piece sees, piece after piece
FEATURES = "features"  # in a row whose media need not be shown: (T, W) what the vision tower made of them, see Features
MAY_KEEP = "may_keep"  # in a row whose features are not kept: whether what is made of it may be
SIZES = "feature_tokens"  # and how many of T are of pictures, and of videos, where there are any
PIECES = "pieces"  # in an example that is a tree: the tokens of its prefix, then of each record's rest
IN_8_BITS = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}


def positions(
    ids: Sequence[int], runs: Sequence[tuple[Grid, torch.Tensor | None]], placeholders: Sequence[int | None], merge_size: int
) -> torch.Tensor:
    """(4, S): the token's number, then its time, height and width as Qwen-VL's rotary embedding wants them.

    A text token has the same place on all three axes. The tokens of a run (a picture, a video, or a step of one) spread over its
    grid from one start, its steps as many places apart on the time axis as is said, else one, and what comes after starts past its
    larger side. Source: `get_rope_index` of transformers 5.23, equal to it by test.
    """
    pieces: list[torch.Tensor] = []
    start, at = 0, 0
    rest = iter(runs)
    while at < len(ids):
        end = at
        if ids[at] in placeholders:
            (steps, rows, columns), apart = next(rest)
            rows, columns = rows // merge_size, columns // merge_size
            end += steps * rows * columns
            times = torch.arange(steps) if apart is None else (torch.arange(steps) * apart).long()
            place = torch.meshgrid(times, torch.arange(rows), torch.arange(columns), indexing="ij")
            pieces.append(torch.stack(place).reshape(3, -1) + start)
            start += max(rows, columns)
        else:
            while end < len(ids) and ids[end] not in placeholders:
                end += 1
            pieces.append(torch.arange(end - at).expand(3, -1) + start)
            start += end - at
        at = end
    return torch.cat([torch.arange(len(ids))[None], torch.cat(pieces, dim=1)])


def positions_of(script: Script, ids: Sequence[int], chat: Chat) -> torch.Tensor:
    """`positions` of a script, whose widened ids are these."""
    runs: list[tuple[Grid, torch.Tensor | None]] = []
    for medium, grid in zip(script.media, script.grids, strict=True):
        apart = None  # in float32, as transformers has it: it is cut to whole places
        if isinstance(medium, Video) and chat.tokens_per_second:
            apart = torch.tensor(seconds_a_step(medium, chat.video_limits.step_frames)) * chat.tokens_per_second
        runs += [(run, apart) for run in runs_of(medium, grid, chat.family)]
    return positions(ids, runs, script.placeholders, chat.limits.merge_size)


def seconds_a_step(video: Video, step_frames: int) -> float:
    """How long a step of its frames lasts: transformers' `second_per_grid_ts`."""
    return step_frames / (len(video.indices) / video.num_frames * video.fps)


def pixels(media: Sequence[Medium], chat: Chat, processor: Any, where: str = "") -> Row:
    """(P, D) patches of 8 bits and (N, 3) grids of the pictures among the media, and of the videos, by the names that the model
    gives them, and under SCALES how the patches become what it is given: see `as_floats`.

    A frame is resized as soon as it is decoded, so that of a film there is no more in memory than the model sees.
    """
    found: dict[str, list[torch.Tensor]] = {name: [] for names in PIXELS.values() for name in names}
    pictures = [medium for medium in media if isinstance(medium, Picture)]
    plain = [picture for picture in pictures if not (picture.min_pixels or picture.max_pixels)]
    together = [plain] if len(plain) == len(pictures) else [[picture] for picture in pictures]
    for some in filter(None, together):
        limits = chat.limits.of(some[0])
        size = {"shortest_edge": limits.min_pixels, "longest_edge": limits.max_pixels}
        shown = [opened(picture, where) for picture in some]
        _add(found, processor.image_processor(images=shown, size=size, **IN_8_BITS))
    for video in (medium for medium in media if isinstance(medium, Video)):
        _add(found, _video_pixels(video, chat, processor.video_processor, where))
    row = {name: tensors[0] if len(tensors) == 1 else torch.cat(tensors) for name, tensors in found.items() if tensors}
    return row | {SCALES: scales_of(processor)} if row else row


def scales_of(processor: Any) -> torch.Tensor:
    """(2, 2, 3): of pictures and of videos the mean and the standard deviation of each colour, in 8 bits."""
    kinds = (processor.image_processor, processor.video_processor)
    return torch.stack([torch.tensor([of.image_mean, of.image_std]) * (1.0 / of.rescale_factor) for of in kinds])


def as_floats(row: Row) -> Row:
    """The row's patches as transformers' processors make them, to the bit: in float32, about 0. Done on the device, a fourth of the
    bytes pass between processes and to it."""
    scales = row.get(SCALES)
    floats = {key: value for key, value in row.items() if key != SCALES}
    for number, (patches, _) in enumerate(PIXELS.values()):
        if patches in row:
            mean, std = scales[number, :, :, None]  # type: ignore[index]
            floats[patches] = row[patches].unflatten(1, (len(mean), -1)).float().sub_(mean).div_(std).flatten(1)
    return floats


def _add(found: dict[str, list[torch.Tensor]], inputs: Any) -> None:
    for name in found.keys() & inputs.keys():
        found[name].append(inputs[name])


def _video_pixels(video: Video, chat: Chat, processor: Any, where: str) -> Any:
    height, width = chat.video_limits.size_of(video)
    size = SizeDict(height=height, width=width)

    def as_shown(frame: Image.Image) -> torch.Tensor:
        """(3, height, width) of 8 bits; the resize is the processor's own, which does all frames at once, to the bit."""
        whole = torch.from_numpy(np.array(frame)).permute(2, 0, 1).contiguous()
        return BaseVideoProcessor.resize(processor, whole, size, processor.resample)

    shown = torch.stack(frames(video, as_shown, where))
    return processor(videos=[shown], do_resize=False, do_sample_frames=False, **IN_8_BITS)


def branched(examples: Sequence[Row], shared: int) -> Row:
    """One example of several that begin with the same `shared` tokens, which show all that they show: a tree, with its PIECES."""
    if len(examples) == 1:
        return examples[0]
    pieces = [(examples[0], slice(shared)), *((example, slice(shared, None)) for example in examples)]
    texts = {key: torch.cat([of[key][..., part] for of, part in pieces], -1) for key in ("input_ids", "labels", "position_ids")}
    return examples[0] | texts | {PIECES: [shared, *(len(example["input_ids"]) - shared for example in examples)]}


def join(examples: Sequence[Row]) -> Row:
    """One row of one or more examples: what the model's forward takes, `labels`, and SCALES if it shows something.

    (1, S) ids and labels, (4, 1, S) positions, (P, D) patches and (N, 3) grids if there are pictures, the same of videos,
    (R + 1) bounds if R > 1, KEYS if there are trees.
    """
    pieces = [example.get(PIECES, [len(example["input_ids"])]) for example in examples]
    lengths = [length for of in pieces for length in of]
    row: Row = {
        "input_ids": torch.cat([example["input_ids"] for example in examples])[None],
        "labels": torch.cat([_first_ignored(example["labels"]) for example in examples])[None],
        "position_ids": torch.cat([example["position_ids"] for example in examples], dim=1)[:, None],
    }
    if len(lengths) > 1:  # for one record there are none
        seen = [length + of[0] * (at > 0) for of in pieces for at, length in enumerate(of)]
        bounds, of_keys = (torch.tensor([0, *of]).cumsum(0).int() for of in (lengths, seen))
        row |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": of_keys, "max_length_q": max(lengths), "max_length_k": max(seen)}
        if len(lengths) > len(examples):
            row[KEYS] = torch.cat(_key_places(pieces))
    for name in (name for names in PIXELS.values() for name in names):
        if seen := [example[name] for example in examples if name in example]:
            row[name] = torch.cat(seen)
    return row | next(({SCALES: example[SCALES]} for example in examples if SCALES in example), {})


def with_features(row: Row, features: torch.Tensor, merge_size: int) -> Row:
    """The row, whose media need not be shown any more."""
    grids = [row[name] for _, name in PIXELS.values() if name in row]
    row = {name: of for name, of in row.items() if name not in [patches for patches, _ in PIXELS.values()]}
    return row | {FEATURES: features, SIZES: [int(grid.prod(1).sum()) // merge_size**2 for grid in grids]}


def _key_places(pieces: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """For each piece of each example the places that it sees in the row: those of its prefix, and its own."""
    found, at = list[torch.Tensor](), 0
    for first, *rests in pieces:
        prefix = torch.arange(at, at := at + first)
        found.append(prefix)
        for length in rests:
            found += [prefix, torch.arange(at, at := at + length)]
    return found


def _first_ignored(labels: torch.Tensor) -> torch.Tensor:
    """In a joined row the last token of the record before would be trained to predict this record's first."""
    return torch.cat([torch.full((1,), IGNORE), labels[1:]])


class Rows:
    """The rows of a plan, each built when it is asked for. `processor` is the model's own.

    `always_look` gives a row without pictures and videos a blank one, in a record of its own that teaches nothing: where processes
    share out the vision tower's weights or gradients, one that does not run it leaves the others waiting for ever; and where the
    tower alone trains a loss cannot go backward without it. A row that `features` has is built without its pictures.
    """

    def __init__(
        self, scripts: Sequence[Script], rows: Sequence[Sequence[int]], chat: Chat, processor: Any, always_look: bool = False,
        skip: bool = False, features: Features | None = None,
    ):  # fmt: skip
        self.scripts, self.rows, self.chat, self.processor = scripts, rows, chat, processor
        self.always_look, self.skip, self.features = always_look, skip, features

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        row, problems = self.build(index)
        if problems:
            raise UserError(*problems)
        return row

    def build(self, index: int) -> Built:
        """The row. With `skip` the records whose pictures break keep their place in it, blank and untaught, so that the others are
        what they would be; without, UserError is raised. So it is where a picture changed: that could not be done again."""
        examples: list[Row] = []
        problems: list[Problem] = []
        packed = self.rows
        held = self.features.read(index) if self.features else None
        example = self.example if held is None else self.unseen
        for group in packed.groups(index) if isinstance(packed, PackedRows) else [[number] for number in packed[index]]:
            scripts = [self.scripts[number] for number in group]
            try:
                shown = [example(scripts[0]), *map(self.text, scripts[1:])]
            except UserError as error:
                if not self.skip or isinstance(error, PictureChanged):
                    raise
                problems += [replace(problem, where=script.where) for script in scripts for problem in error.problems]
                shown = [*map(self.untaught, scripts)]
            shared = [script.shared_with(before) for before, script in pairwise(scripts)]
            examples.append(branched(shown, min(shared, default=0)))
        if self.always_look and not any(patches in example for example in examples for patches, _ in PIXELS.values()):
            examples.append(self.blank())
        row = join(examples)
        if held is not None:
            row = with_features(row, held, self.chat.limits.merge_size)
        elif self.features:
            media = [medium for number in self.rows[index] for medium in self.scripts[number].media]
            row[MAY_KEEP] = not problems and self.features.may_keep(media)
        return row, problems

    def built_or_problems(self, index: int) -> Built | UserError:
        """`build`, or what it raises: what a worker of a DataLoader raises loses its problems on the way."""
        try:
            return self.build(index)
        except UserError as error:
            return error

    def blank(self) -> Row:
        """A record of one picture of one token, nothing of it taught."""
        merge, id = self.chat.limits.merge_size, self.chat.picture_id
        grid = (1, merge, merge)
        return {
            "input_ids": torch.tensor([id]),
            "labels": torch.tensor([IGNORE]),
            "position_ids": positions([id], [(grid, None)], [id], merge),
            **self.blank_media(["image"], [grid]),
        }

    def blank_media(self, kinds: Sequence[str], grids: Sequence[Grid]) -> Row:
        """Grey pictures and videos of these grids."""
        values = 3 * self.chat.video_limits.step_frames * self.chat.limits.patch_size**2
        blank: Row = {}
        for kind, (patches, sizes) in PIXELS.items():
            if own := [grid for of, grid in zip(kinds, grids, strict=True) if of == kind]:
                blank[patches] = torch.full((sum(map(math.prod, own)), values), 128, dtype=torch.uint8)
                blank[sizes] = torch.tensor(own)
        return blank | ({SCALES: scales_of(self.processor)} if blank else {})

    def untaught(self, script: Script) -> Row:
        """The example of a record whose media cannot be shown: as long as it was planned, nothing of it taught."""
        example = self.unshown(script)
        return example | {"labels": torch.full_like(example["labels"], IGNORE)}

    def unshown(self, script: Script) -> Row:
        """The example of a record with grey media of the planned sizes."""
        return self.text(script) | self.blank_media([medium.kind for medium in script.media], script.grids)

    def text(self, script: Script) -> Row:
        """What of an example follows from its text and the sizes of its media."""
        ids, labels = script.widened()
        return {
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor(labels),
            "position_ids": positions_of(script, ids, self.chat),
        }

    def unseen(self, script: Script) -> Row:
        """The example of a record whose media the model has seen, with their grids."""
        kinds = [medium.kind for medium in script.media]
        grids = {
            name: [grid for of, grid in zip(kinds, script.grids, strict=True) if of == kind] for kind, (_, name) in PIXELS.items()
        }
        return self.text(script) | {name: torch.tensor(own) for name, own in grids.items() if own}

    def example(self, script: Script) -> Row:
        """One record's tensors: (S) ids and labels, (4, S) positions, (P, D) patches and (N, 3) grids of pictures and of videos."""
        example = self.text(script) | pixels(script.media, self.chat, self.processor, script.where)
        for kind, (_, name) in PIXELS.items():
            planned = [grid for medium, grid in zip(script.media, script.grids, strict=True) if medium.kind == kind]
            grids = [tuple(grid) for grid in example[name].tolist()] if name in example else []
            if grids != planned:
                files = ", ".join(medium.name for medium in script.media if medium.kind == kind)
                what = f"planned with grids {planned} but its {kind}s ({files}) gave {grids}"
                raise PictureChanged(Problem(script.where, what, "one of them changed since the plan was made: start again"))
        return example
