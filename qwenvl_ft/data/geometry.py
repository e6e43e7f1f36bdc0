"""How many tokens a picture or a video takes, from its size alone.

The processor resizes a picture to whole units (a merged patch: 28 or 32 px a side) within its limits of pixels; each unit is
one token. `grid_of` does the same arithmetic without opening the picture.

Which limits those are: a config's `max_pixels` and `min_pixels`, for plan, train and, as `--config` or the defaults, for
validate-meta and show; training leaves them in the processor of the adapter and of the merged folder, where ask, eval and serve
find them. `--config`, `--max-pixels` and `--min-pixels` put them in place of a base's own, as eval needs to compare.

A video's frames are resized alike, two of them to a token's depth. `video_max_pixels` bounds one frame, in every family: see
`VideoLimits`.

    >>> grid_of(400, 500, Limits(patch_size=14, merge_size=2, min_pixels=3136, max_pixels=1003520))
    (1, 28, 36)
"""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwenvl_ft.data.reading import AS_FOUND, Reading
from qwenvl_ft.data.records import Medium, Picture, Video
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.model import read_model_json
from qwenvl_ft.folders.runs import PROCESSORS

VIDEO_PROCESSORS = ("processor_config.json", "video_preprocessor_config.json", "preprocessor_config.json")
FRAME_TOKENS, CONTEXT_TOKENS = 768, 128_000  # max_video_tokens of the two kinds, where a processor's file does not say it
ROUNDED_AWAY = 0.1  # of a picture's area; less is how every picture is rounded
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

    def of(self, medium: Picture) -> "Limits":
        """These with a picture's own bounds in their place, within them. Raises UserError for a bound that they would override."""
        least, most = max(self.min_pixels, medium.min_pixels or 0), min(medium.max_pixels or self.max_pixels, self.max_pixels)
        if medium.max_pixels:
            _check_bound(medium, least)
        return replace(self, min_pixels=min(least, most), max_pixels=most)


@dataclass(frozen=True)
class VideoLimits:
    """A video processor's settings, read from its own files; the processor is held to `cap_pixels_per_frame`, as qwen_vl_utils is.

    `whole` says what `min_pixels` and `max_pixels` bound: in Qwen2-VL and Qwen2.5-VL the area of a frame, in Qwen3-VL and Qwen3.5
    height x width x frames of the whole video. There a frame is bounded by `max_video_tokens`, tokens of one frame; elsewhere they
    are those of the context, of which a video may take 9 of 10. So a config's `video_max_pixels` becomes `max_pixels` there and
    `max_video_tokens` here, and means the area of a frame in both.
    """

    patch_size: int
    merge_size: int
    step_frames: int  # of one token: temporal_patch_size
    min_pixels: int
    max_pixels: int
    max_video_tokens: int
    whole: bool

    @property
    def unit_px(self) -> int:
        """Side of what becomes one token, in px."""
        return self.patch_size * self.merge_size

    def frame_bounds(self, num_frames: int) -> tuple[int, int]:
        """The least and the greatest area of a frame, where the whole video's bounds do not say otherwise."""
        floor = int(self.min_pixels * 1.05)
        if self.whole:
            share = min(self.max_video_tokens * self.unit_px**2, self.max_pixels // num_frames)
            return self.min_pixels // num_frames, max(share, floor)
        share = int(self.max_video_tokens * self.unit_px**2 * 0.9) * self.step_frames // num_frames
        return self.min_pixels, max(min(self.max_pixels, share), floor)

    def size_of(self, video: Video) -> tuple[int, int]:
        """(height, width) in px of its frames after the processor's resize, or within the video's own bounds.

        Raises UserError for a bound that the processor would override. Source: `resize` of the video processors of transformers
        5.23, equal to it by test.
        """
        num_frames, height, width = len(video.indices), video.height, video.width
        least, most = self.frame_bounds(num_frames)
        if video.max_pixels:
            _check_bound(video, max(least, video.min_pixels or 0))
        most = min(video.max_pixels or most, most)
        least = min(max(least, video.min_pixels or 0), most) if video.min_pixels or video.max_pixels else self.min_pixels
        if not self.whole:
            return _resized(height, width, self.unit_px, least, most)
        if min(height, width) < self.unit_px:
            scale = self.unit_px / min(height, width)
            height, width = int(height * scale), int(width * scale)
        if video.min_pixels or video.max_pixels:
            least *= num_frames
        return _resized(height, width, self.unit_px, least, most * num_frames, num_frames, self.step_frames)

    def grid_of(self, video: Video) -> tuple[int, int, int]:
        """(steps, rows, columns) of patches, as the processor's `video_grid_thw`."""
        height, width = self.size_of(video)
        return -(-len(video.indices) // self.step_frames), height // self.patch_size, width // self.patch_size


def _check_bound(medium: Medium, least: int) -> None:
    if (medium.max_pixels or 0) < least:
        what = f"is {medium.max_pixels}, below the least that it may have, {least}"
        raise UserError(Problem(f"a {medium.kind}'s max_pixels", what, "raise it, or leave it out"))


def resized(height: int, width: int, limits: Limits) -> tuple[int, int]:
    """(height, width) in px after the processor's resize. Source: `smart_resize` of transformers 5.23.

    The aspect ratio must be at most MAX_ASPECT: `pictures.size_of` has refused others.
    """
    return _resized(height, width, limits.unit_px, limits.min_pixels, limits.max_pixels)


def _resized(
    height: int, width: int, unit: int, least: int, most: int, num_frames: int = 1, step_frames: int = 1
) -> tuple[int, int]:
    """The bounds are those of height x width x frames, which are counted in whole steps before and as they are behind the root."""
    frames = round(num_frames / step_frames) * step_frames
    new_height, new_width = round(height / unit) * unit, round(width / unit) * unit
    if frames * new_height * new_width > most:
        shrink = math.sqrt(num_frames * height * width / most)
        new_height = max(unit, math.floor(height / shrink / unit) * unit)
        new_width = max(unit, math.floor(width / shrink / unit) * unit)
    elif frames * new_height * new_width < least:
        grow = math.sqrt(least / (num_frames * height * width))
        new_height, new_width = math.ceil(height * grow / unit) * unit, math.ceil(width * grow / unit) * unit
    return new_height, new_width


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


def read_video_limits(model_dir: Path, whole: bool, max_pixels: int | None = None) -> VideoLimits:
    """The video settings of the processor in `model_dir`, with the given bound of a frame in place of its own.

    Raises UserError where its files do not say them, and for a bound below the least that the processor makes of a frame.
    """
    settings = video_settings(model_dir)
    size = settings.get("size") or {}
    least = settings.get("min_pixels") or size.get("shortest_edge")
    most = settings.get("max_pixels") or size.get("longest_edge")
    if not {"patch_size", "merge_size"} <= settings.keys() or least is None or most is None:
        what = f"holds no {' or '.join(VIDEO_PROCESSORS)} with the settings of videos"
        raise UserError(Problem(str(model_dir), what, "download the whole model"))
    unit = settings["patch_size"] * settings["merge_size"]
    tokens = settings.get("max_video_tokens") or (FRAME_TOKENS if whole else CONTEXT_TOKENS)
    if max_pixels and max_pixels < (floor := int(least * 1.05)):
        raise UserError(Problem("video_max_pixels", f"is {max_pixels}, less than the model's own least, {floor}", "raise it"))
    if max_pixels:
        most, tokens = (most, max_pixels // unit**2) if whole else (max_pixels, tokens)
    steps = settings.get("temporal_patch_size", 2)
    return VideoLimits(settings["patch_size"], settings["merge_size"], steps, int(least), int(most), tokens, whole)


def reading_of(model_dir: Path) -> Reading:
    """How a processor's files say that videos are drawn: in an adapter's and a merged folder, as they were in training."""
    settings = video_settings(model_dir)
    fps, frames = settings.get("fps") or AS_FOUND.video_fps, settings.get("max_frames") or AS_FOUND.video_max_frames
    return replace(AS_FOUND, video_fps=float(fps), video_max_frames=int(frames))


def video_settings(model_dir: Path) -> dict[str, Any]:
    """What the processor's files say of videos, where transformers 5.23 looks for it, in its order."""
    for name in VIDEO_PROCESSORS:
        content = read_model_json(model_dir / name) if (model_dir / name).is_file() else {}
        settings: dict[str, Any] = content.get("video_processor", {} if name == VIDEO_PROCESSORS[0] else content)
        if settings:
            return settings
    return {}


def shrunk(height: int, width: int, limits: Limits) -> bool:
    """Whether a picture is made smaller: by `max_pixels`, or by rounding to whole units, if that takes a tenth of it or more."""
    seen, area = resized(height, width, limits), height * width
    rounded = resized(height, width, replace(limits, max_pixels=sys.maxsize))
    return math.prod(seen) < area and (seen != rounded or math.prod(seen) <= (1 - ROUNDED_AWAY) * area)
