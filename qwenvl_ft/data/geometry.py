"""How many tokens a picture takes, from its size alone.

The processor resizes a picture to whole units (a merged patch: 28 or 32 px a side) within its limits of pixels; each unit is
one token. `grid_of` does the same arithmetic without opening the picture.

Which limits those are: a config's `max_pixels` and `min_pixels`, for plan, train and, as `--config` or the defaults, for
validate-meta and show; training leaves them in the processor of the adapter and of the merged folder, where ask, eval and serve
find them. `--config`, `--max-pixels` and `--min-pixels` put them in place of a base's own, as eval needs to compare.

    >>> grid_of(400, 500, Limits(patch_size=14, merge_size=2, min_pixels=3136, max_pixels=1003520))
    (1, 28, 36)
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.model import read_model_json
from qwenvl_ft.folders.runs import PROCESSORS

MAX_ASPECT = 200  # the processors refuse a picture whose sides differ by more


@dataclass(frozen=True)
class Limits:
    """A processor's settings, read from its own files. `min_pixels` and `max_pixels` bound height x width after resizing."""

    patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int

    @property
    def unit_px(self) -> int:
        """Side of what becomes one token, in px."""
        return self.patch_size * self.merge_size


def resized(height: int, width: int, limits: Limits) -> tuple[int, int]:
    """(height, width) in px after the processor's resize. Source: `smart_resize` of transformers 5.23.

    The aspect ratio must be at most MAX_ASPECT: `pictures.size_of` has refused others.
    """
    unit = limits.unit_px
    new_height, new_width = round(height / unit) * unit, round(width / unit) * unit
    if new_height * new_width > limits.max_pixels:
        shrink = math.sqrt(height * width / limits.max_pixels)
        new_height = max(unit, math.floor(height / shrink / unit) * unit)
        new_width = max(unit, math.floor(width / shrink / unit) * unit)
    elif new_height * new_width < limits.min_pixels:
        grow = math.sqrt(limits.min_pixels / (height * width))
        new_height, new_width = math.ceil(height * grow / unit) * unit, math.ceil(width * grow / unit) * unit
    return new_height, new_width


def within(limits: Limits, least: int | None, most: int | None) -> Limits:
    """The limits of a picture that has bounds of its own, in px: the narrower of both."""
    most = min(most or limits.max_pixels, limits.max_pixels)
    return replace(limits, min_pixels=min(max(limits.min_pixels, least or 0), most), max_pixels=most)


def grid_of(height: int, width: int, limits: Limits) -> tuple[int, int, int]:
    """(1, rows, columns) of patches, as the processor's `image_grid_thw`."""
    new_height, new_width = resized(height, width, limits)
    return 1, new_height // limits.patch_size, new_width // limits.patch_size


def tokens_of(grid: tuple[int, int, int], merge_size: int) -> int:
    """Number of placeholder tokens that a grid of patches takes."""
    return math.prod(grid) // merge_size**2


def read_limits(model_dir: Path, min_pixels: int | None = None, max_pixels: int | None = None) -> Limits:
    """The picture settings of the processor in `model_dir`, with the given bounds in place of its own.

    Raises UserError where its files do not say them, and for bounds that cross.
    """
    for path in (model_dir / name for name in PROCESSORS):
        content = read_model_json(path) if path.is_file() else {}
        settings = content.get("image_processor", content)
        size = settings.get("size") or {}
        least = min_pixels or settings.get("min_pixels") or size.get("shortest_edge")
        most = max_pixels or settings.get("max_pixels") or size.get("longest_edge")
        if {"patch_size", "merge_size"} <= settings.keys() and least is not None and most is not None:
            if least > most:
                own, fix = ("", "lower min_pixels") if min_pixels else ("the model's own ", "set min_pixels, too")
                raise UserError(Problem("max_pixels", f"is {most}, less than {own}min_pixels, {least}", f"raise it, or {fix}"))
            return Limits(settings["patch_size"], settings["merge_size"], int(least), int(most))
    what = f"holds no {' or '.join(sorted(PROCESSORS))} with patch_size and limits of pixels"
    raise UserError(Problem(str(model_dir), what, "download the whole model"))
