"""What is kept of what was read last."""

import pytest
import torch
from PIL import Image
from transformers import DynamicCache

from qwenvl_ft.infer.engine import Engine
from qwenvl_ft.infer.messages import read_messages
from qwenvl_ft.infer.prefix_cache import Prefixes, Prompt, shown_hash
from tests.conftest import TINY

IDS = [*range(100)]


def read(tokens: int) -> DynamicCache:
    """Two layers of (1, 1, tokens, 2), each number that of its token: 32 bytes a token."""
    cache = DynamicCache()
    for layer in range(2):
        states = torch.arange(tokens, dtype=torch.float32)[None, None, :, None].expand(1, 1, tokens, 2)
        cache.update(states, -states, layer)
    return cache


def asked(ids, text_from=0, shown="", adapter=None):
    return Prompt(ids, text_from, shown, adapter)


@pytest.mark.parametrize("ids, text_from, tokens", [
    (IDS + [7, 8], 90, 100), (IDS[:80] + [7] * 40, 80, 80), (IDS[:80] + [7] * 40, 81, None), (IDS, 10, 99), (IDS[:20] + [7], 10, 20),
    (IDS[:63] + [7] * 9, 0, None), (IDS[:64] + [7] * 9, 0, 64), (IDS[:64], 0, 63),
])  # fmt: skip
def test_a_prompt_goes_on_behind_what_it_has_in_common_if_all_media_lie_in_that(ids, text_from, tokens):
    prefixes = Prefixes()
    prefixes.keep(asked(IDS, text_from), -5, read(100))
    for other in ({"shown": "another picture"}, {"adapter": "another"}, {"text_from": text_from + 1}):
        assert prefixes.begin(asked(**{"ids": ids, "text_from": text_from} | other)) is None
    begun = prefixes.begin(asked(ids, text_from))
    assert (begun and begun[0]) == tokens
    if begun:
        _, ahead, cache = begun
        assert ahead == -5
        assert all(layer.keys[0, 0, :, 0].tolist() == [*range(tokens)] for layer in cache.layers)
        cache.layers[0].keys.zero_()
        again = prefixes.begin(asked(ids, text_from))[2]
        assert again.layers[0].keys[0, 0, :, 0].tolist() == [*range(tokens)], "what is kept is nobody's to change"


def test_the_bytes_are_bounded_and_what_was_used_longest_ago_goes():
    prefixes = Prefixes(max_bytes=3 * 3200)
    for adapter in "abc":
        prefixes.keep(asked(IDS, adapter=adapter), 0, read(100))

    def there(adapters):
        return [adapter for adapter in adapters if prefixes.begin(asked([*IDS, 1], adapter=adapter))]

    assert prefixes.num_bytes == prefixes.max_bytes and there("a")
    prefixes.keep(asked(IDS, adapter="d"), 0, read(100))
    assert there("abcd") == ["a", "c", "d"]
    prefixes.keep(asked(IDS * 2, adapter="a"), 0, read(200))  # in place of the one before
    assert there("acd") == ["a", "d"] and prefixes.num_bytes == prefixes.max_bytes
    prefixes.keep(asked(IDS * 4, adapter="e"), 0, read(400))
    assert prefixes.num_bytes == 0, "larger than all that may be kept"
    prefixes.keep(asked(IDS, adapter="a"), 0, read(100))
    prefixes.clear()
    assert prefixes.num_bytes == 0 and not there("a")


def test_what_is_shown_is_named_by_its_pixels_its_size_and_its_times():
    """Qwen2.5-VL's ids are the same for a film at twice the rate; the places of its tokens are not."""
    engine = Engine.open(TINY)
    one, other = Image.new("RGB", (112, 112), "red"), Image.new("RGB", (112, 112), (255, 1, 0))
    shown = [
        [{"image": one}], [{"image": other}], [{"image": one}, {"image": other}], [{"image": other}, {"image": one}], [],
        [{"image": one, "max_pixels": 56 * 56}], [{"video": [one, other], "fps": 1.0}], [{"video": [one, other], "fps": 2.0}],
        [{"video": [other, one], "fps": 1.0}], [{"image": Image.new("RGB", (56, 224), "red")}],
    ]  # fmt: skip

    def named(parts, text):
        (script,) = engine.scripts([read_messages([{"role": "user", "content": [*parts, text]}])])
        return shown_hash(script)

    names = [named(parts, "a") for parts in shown]
    assert len(set(names)) == len(shown) and names == [named(parts, "b") for parts in shown]
