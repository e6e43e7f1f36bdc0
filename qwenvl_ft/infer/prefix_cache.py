"""The keys and values of what was read last, so that a prompt which begins like one of them is read from there on.

A conversation's next turn repeats the turns before it, and the next question about a picture repeats the picture. Of the prompts of
one model or adapter that begin alike, as far as their last medium, or else for LEAST_SHARED tokens, the one that was read last is
kept; those used longest ago go where all would take more than `max_bytes`.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers import DynamicCache

from qwenvl_ft.data.chat import Script
from qwenvl_ft.data.packing import LEAST_SHARED
from qwenvl_ft.data.records import Video

PREFIX_BYTES = 1 << 30


class Prompt(NamedTuple):
    """The ids of a prompt that shows what `shown` names, before `text_from`, to the model or adapter of this name."""

    ids: Sequence[int]
    text_from: int
    shown: str
    adapter: str | None

    @property
    def key(self) -> Hashable:
        """What prompts that begin alike have in common."""
        return self.adapter, self.shown, *self.ids[: self.text_from or LEAST_SHARED]


class Kept(NamedTuple):
    """What was read of a prompt: keys and values (1, H, S, D) of each layer. Behind its media a token's position is its number and
    `ahead`."""

    ids: Sequence[int]
    ahead: int
    layers: list[tuple[torch.Tensor, torch.Tensor]]


class Prefixes:
    """What was read last, as above. Linear attention has a state, of which no part can be taken: such a model keeps 0 bytes."""

    def __init__(self, max_bytes: int = PREFIX_BYTES):
        self.max_bytes = max_bytes
        self.kept = OrderedDict[Hashable, Kept]()

    @property
    def num_bytes(self) -> int:
        """What is kept."""
        return sum(of.nbytes for kept in self.kept.values() for layer in kept.layers for of in layer)

    def begin(self, prompt: Prompt) -> tuple[int, int, Any] | None:
        """How many tokens of the prompt, but its last, were read before, `ahead`, and a cache of them."""
        if (kept := self.kept.get(prompt.key)) is None:
            return None
        self.kept.move_to_end(prompt.key)
        pairs = zip(kept.ids, prompt.ids[:-1], strict=False)
        tokens = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        cache = DynamicCache()
        for number, (keys, values) in enumerate(kept.layers):
            cache.update(keys[:, :, :tokens], values[:, :, :tokens], number)
        return tokens, kept.ahead, cache

    def keep(self, prompt: Prompt, ahead: int, cache: Any) -> None:
        """Keeps what was read of a prompt, in place of one that begins alike. `cache` may grow: not it is held, but its tensors."""
        if len(prompt.ids) <= (prompt.text_from or LEAST_SHARED) or not self.max_bytes:
            return
        self.kept.pop(prompt.key, None)
        self.kept[prompt.key] = Kept(prompt.ids, ahead, [(layer.keys, layer.values) for layer in cache.layers])
        while self.num_bytes > self.max_bytes:
            self.kept.popitem(last=False)

    def clear(self) -> None:
        """Lets go of everything."""
        self.kept.clear()


def shown_hash(script: Script) -> str:
    """Names what a script shows of media in memory: their pixels, the size that they are seen in, and when."""
    found = hashlib.sha256()
    for medium, grid in zip(script.media, script.grids, strict=True):
        times = (medium.fps, medium.indices, medium.num_frames) if isinstance(medium, Video) else ()
        images = medium.images if isinstance(medium, Video) else [medium.source]
        found.update(repr((medium.kind, grid, times, len(images))).encode())
        for image in images:
            assert isinstance(image, Image.Image)
            found.update(repr((image.mode, image.size)).encode())
            found.update(image.tobytes())
    return found.hexdigest()
