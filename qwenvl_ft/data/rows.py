"""Rows of tensors for the model: the pictures decoded, the placeholders widened, several records joined into one row.

A row is never padded and holds exactly the keyword arguments of the model's forward, and `labels`. What keeps its records
apart is the text row of `position_ids`, which starts again at 0 with each record; transformers builds the attention mask from
it only while there is no `attention_mask` and no cache (`loss` sees to the cache). Each of these fails without a word when it is
missing, so this is the one place where a row is built.

Axes: S = tokens in a row, P = patches, D = values of a patch, N = pictures, R = records in the row.
"""

from collections.abc import Sequence
from typing import Any

import torch

from qwenvl_ft.data.chat import IGNORE, Chat, Script
from qwenvl_ft.data.pictures import opened
from qwenvl_ft.errors import Problem, UserError

Row = dict[str, Any]


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
        self, scripts: Sequence[Script], rows: Sequence[Sequence[int]], chat: Chat, image_processor: Any, always_look: bool = False
    ):
        self.scripts, self.rows, self.limits, self.image_processor = scripts, rows, chat.limits, image_processor
        self.picture_id, self.always_look = chat.picture_id, always_look

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        examples = [self.example(self.scripts[number]) for number in self.rows[index]]
        if self.always_look and not any("pixel_values" in example for example in examples):
            examples.append(self.blank())
        return join(examples)

    def row_or_problems(self, index: int) -> Row | UserError:
        """The row, or what is wrong with it: what a worker of a DataLoader raises loses its problems on the way."""
        try:
            return self[index]
        except UserError as error:
            return error

    def blank(self) -> Row:
        """A record of one picture of one token, nothing of it taught."""
        merge, patch = self.limits.merge_size, self.limits.patch_size
        grid = (1, merge, merge)
        return {
            "input_ids": torch.tensor([self.picture_id]),
            "labels": torch.tensor([IGNORE]),
            "position_ids": positions([self.picture_id], [grid], self.picture_id, merge),
            "pixel_values": torch.zeros(merge**2, 3 * self.image_processor.temporal_patch_size * patch**2),
            "image_grid_thw": torch.tensor([grid]),
        }

    def example(self, script: Script) -> Row:
        """One record's tensors: (S) ids and labels, (4, S) positions, (P, D) patches, (N, 3) grids."""
        ids, labels = script.widened()
        example: Row = {
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor(labels),
            "position_ids": positions(ids, script.grids, script.picture_id, self.limits.merge_size),
        }
        if script.pictures:
            pictures = [opened(picture, script.where) for picture in script.pictures]
            inputs = self.image_processor(images=pictures, return_tensors="pt")
            grids = [tuple(grid) for grid in inputs["image_grid_thw"].tolist()]
            if grids != list(script.grids):
                files = ", ".join(picture.name for picture in script.pictures)
                raise UserError(Problem(script.where, f"planned with grids {script.grids} but its pictures ({files}) gave {grids}",
                                        "a picture changed since the plan was made: start again"))  # fmt: skip
            example["pixel_values"], example["image_grid_thw"] = inputs["pixel_values"], inputs["image_grid_thw"]
        return example
