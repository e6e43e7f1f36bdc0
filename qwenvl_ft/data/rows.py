"""Rows of tensors for the model: the pictures decoded, the placeholders widened, several records joined into one row.

A row is never padded and holds exactly the keyword arguments of the model's forward, and `labels`. What keeps its records
apart is the text row of `position_ids`, which starts again at 0 with each record; transformers builds the attention mask from
it only while there is no `attention_mask` and no cache (`loss` sees to the cache). Each of these fails without a word when it is
missing, so this is the one place where a row is built.

Axes: S = tokens in a row, P = patches, D = values of a patch, N = pictures, R = records in the row.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from qwenvl_ft.data.chat import IGNORE, Chat, Script
from qwenvl_ft.data.pictures import PictureChanged, opened
from qwenvl_ft.data.records import Picture
from qwenvl_ft.errors import Problem, UserError

Row = dict[str, Any]
Built = tuple[Row, list[Problem]]  # a row, and what is wrong with those of its records that it shows blank and untaught


def positions(ids: Sequence[int], grids: Sequence[tuple[int, int, int]], picture_id: int, merge_size: int) -> torch.Tensor:
    """(4, S): the token's number, then its time, height and width as Qwen-VL's rotary embedding wants them.

    A text token has the same place on all three axes. A picture's tokens spread over its grid from one start, and what comes
    after starts past its larger side. Source: `get_rope_index` of transformers 5.23, equal to it by test.
    """
    pieces: list[torch.Tensor] = []
    start, at = 0, 0
    rest = iter(grids)
    while at < len(ids):
        end = at
        if ids[at] == picture_id:
            frames, rows, columns = next(rest)
            rows, columns = rows // merge_size, columns // merge_size
            end += frames * rows * columns
            place = torch.meshgrid(torch.arange(frames), torch.arange(rows), torch.arange(columns), indexing="ij")
            pieces.append(torch.stack(place).reshape(3, -1) + start)
            start += max(rows, columns)
        else:
            while end < len(ids) and ids[end] != picture_id:
                end += 1
            pieces.append(torch.arange(end - at).expand(3, -1) + start)
            start += end - at
        at = end
    return torch.cat([torch.arange(len(ids))[None], torch.cat(pieces, dim=1)])


def join(examples: Sequence[Row]) -> Row:
    """One row of one or more examples.

    (1, S) ids and labels, (4, 1, S) positions, (P, D) patches and (N, 3) grids if there are pictures, (R + 1) bounds if R > 1.
    """
    lengths = [example["input_ids"].shape[0] for example in examples]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    row: Row = {
        "input_ids": torch.cat([example["input_ids"] for example in examples])[None],
        "labels": torch.cat([_first_ignored(example["labels"]) for example in examples])[None],
        "position_ids": torch.cat([example["position_ids"] for example in examples], dim=1)[:, None],
    }
    if len(examples) > 1:  # Qwen3.5 without flash-linear-attention refuses bounds, and for one record there are none
        longest = max(lengths)
        row |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    if seen := [example for example in examples if "pixel_values" in example]:
        row["pixel_values"] = torch.cat([example["pixel_values"] for example in seen])
        row["image_grid_thw"] = torch.cat([example["image_grid_thw"] for example in seen])
    return row


def _first_ignored(labels: torch.Tensor) -> torch.Tensor:
    """In a joined row the last token of the record before would be trained to predict this record's first."""
    return torch.cat([torch.full((1,), IGNORE), labels[1:]])


class Rows:
    """The rows of a plan, each built when it is asked for. `image_processor` is the model's own, within `chat.limits`.

    `always_look` gives a row without pictures a blank one, in a record of its own that teaches nothing: where processes
    share out the vision tower's weights or gradients, one that does not run it leaves the others waiting for ever.
    """

    def __init__(
        self, scripts: Sequence[Script], rows: Sequence[Sequence[int]], chat: Chat, image_processor: Any, always_look: bool = False,
        skip: bool = False,
    ):  # fmt: skip
        self.scripts, self.rows, self.limits, self.image_processor = scripts, rows, chat.limits, image_processor
        self.picture_id, self.always_look, self.skip = chat.picture_id, always_look, skip

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        row, problems = self.build(index)
        if problems:
            raise UserError(*problems)
        return row

    def build(self, index: int) -> Built:
        """The row. With `skip` a record whose pictures break keeps its place in it, blank and untaught, so that the others are
        what they would be; without, UserError is raised. So it is where a picture changed: that could not be done again."""
        examples: list[Row] = []
        problems: list[Problem] = []
        for script in (self.scripts[number] for number in self.rows[index]):
            try:
                examples.append(self.example(script))
            except UserError as error:
                if not self.skip or isinstance(error, PictureChanged):
                    raise
                problems += error.problems
                examples.append(self.untaught(script))
        if self.always_look and not any("pixel_values" in example for example in examples):
            examples.append(self.blank())
        return join(examples), problems

    def built_or_problems(self, index: int) -> Built | UserError:
        """`build`, or what it raises: what a worker of a DataLoader raises loses its problems on the way."""
        try:
            return self.build(index)
        except UserError as error:
            return error

    def blank(self) -> Row:
        """A record of one picture of one token, nothing of it taught."""
        merge = self.limits.merge_size
        grid = (1, merge, merge)
        return {
            "input_ids": torch.tensor([self.picture_id]),
            "labels": torch.tensor([IGNORE]),
            "position_ids": positions([self.picture_id], [grid], self.picture_id, merge),
            **self.blank_pictures([grid]),
        }

    def blank_pictures(self, grids: Sequence[tuple[int, int, int]]) -> Row:
        """Grey pictures of these grids."""
        patch_values = 3 * self.image_processor.temporal_patch_size * self.limits.patch_size**2
        patches = torch.zeros(sum(map(math.prod, grids)), patch_values)
        return {"pixel_values": patches, "image_grid_thw": torch.tensor(grids)}

    def untaught(self, script: Script) -> Row:
        """The example of a record whose pictures cannot be shown: as long as it was planned, nothing of it taught."""
        text = self.text(script)
        return text | {"labels": torch.full_like(text["labels"], IGNORE)} | self.blank_pictures(script.grids)

    def text(self, script: Script) -> Row:
        """What of an example follows from its text and the sizes of its pictures."""
        ids, labels = script.widened()
        return {
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor(labels),
            "position_ids": positions(ids, script.grids, self.picture_id, self.limits.merge_size),
        }

    def example(self, script: Script) -> Row:
        """One record's tensors: (S) ids and labels, (4, S) positions, (P, D) patches, (N, 3) grids."""
        example = self.text(script)
        if script.media:
            pictures = [opened(picture, script.where) for picture in script.media if isinstance(picture, Picture)]
            inputs = self.image_processor(images=pictures, return_tensors="pt")
            grids = [tuple(grid) for grid in inputs["image_grid_thw"].tolist()]
            if grids != list(script.grids):
                files = ", ".join(medium.name for medium in script.media)
                what = f"planned with grids {script.grids} but its pictures ({files}) gave {grids}"
                raise PictureChanged(Problem(script.where, what, "a picture changed since the plan was made: start again"))
            example["pixel_values"], example["image_grid_thw"] = inputs["pixel_values"], inputs["image_grid_thw"]
        return example
