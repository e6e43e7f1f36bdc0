"""Decodes every picture and video of some records, in parallel, and names those that only look whole.

A header says nothing of what follows it: a file that was cut off, or a bit that fell over, shows when it is decoded.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from multiprocessing import get_context
from typing import Any

from qwenvl_ft.data.pictures import opened
from qwenvl_ft.data.records import Medium, Picture, Record
from qwenvl_ft.data.spawned import end_with_parent
from qwenvl_ft.errors import Problem, UserError

CHUNK = 16  # pictures that a process takes at once
OnPicture = Callable[[int, int], None]


def decode_all(records: Sequence[Record], on_picture: OnPicture = lambda done, total: None) -> list[Problem]:
    """A problem for each record and each picture and video of it that breaks; each is decoded once, as training decodes it.

    `on_picture(done, total)` is called after each.
    """
    pictures = list({medium.source: medium for record in records for medium in record.media}.values())
    broken: dict[Any, Problem] = {}
    # Pillow holds the lock of Python's threads while it decodes, so processes; new ones, since a fork copies what threads hold.
    with ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=end_with_parent) as pool:
        try:
            for done, (picture, problem) in enumerate(
                zip(pictures, pool.map(problem_of, pictures, chunksize=CHUNK), strict=True), 1
            ):
                if problem:
                    broken[picture.source] = problem
                on_picture(done, len(pictures))
        except BrokenProcessPool as error:
            what = "killed the process that decoded it, by its size or by a fault of its decoder"
            raise UserError(
                Problem("a picture", what, "leave out large pictures, and TIFF, AVIF or JPEG 2000 of strangers")
            ) from error
    return [
        Problem(record.where, broken[picture.source].what, broken[picture.source].fix)
        for record in records
        for picture in dict.fromkeys(record.media)
        if picture.source in broken
    ]


def problem_of(medium: Medium) -> Problem | None:
    """What is wrong with a picture or a video once it is decoded."""
    try:
        if isinstance(medium, Picture):
            opened(medium)
        else:
            import_module("qwenvl_ft.data.videos").frames(medium, lambda frame: None)  # and PyAV, which pictures can do without
    except UserError as error:
        return error.problems[0]
    return None
