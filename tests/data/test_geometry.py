"""Grids from the size alone, against transformers' own smart_resize."""

import doctest
import json
import random

import pytest

from qwenvl_ft.data import geometry
from qwenvl_ft.data.geometry import Limits, grid_of, read_limits, resized, tokens_of
from qwenvl_ft.errors import UserError

FAMILIES = {  # the limits of Qwen2-VL, of Qwen3-VL and of a user who wants small pictures
    "28": Limits(14, 2, 56 * 56, 1280 * 28 * 28),
    "32": Limits(16, 2, 256 * 256, 4096 * 4096),
    "small": Limits(14, 2, 56 * 56, 64 * 28 * 28),
}


def test_2100_random_sizes_are_resized_as_transformers_does():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    rng = random.Random(0)
    cases, ours = [], []
    for limits in FAMILIES.values():
        for _ in range(700):
            height = int(10 ** rng.uniform(0, 3.7))
            width = min(max(int(height * 10 ** rng.uniform(-2.3, 2.3)), -(-height // 200)), 200 * height)
            cases.append((height, width, limits.unit_px, limits.min_pixels, limits.max_pixels))
            ours.append(list(resized(height, width, limits)))
    wanted = [list(smart_resize(*case)) for case in cases]
    assert [difference for difference in zip(cases, ours, wanted, strict=True) if difference[1] != difference[2]] == []


@pytest.mark.parametrize("limits", FAMILIES.values(), ids=FAMILIES)
def test_the_grid_is_the_resized_picture_in_patches_and_a_token_is_a_merged_patch(limits):
    height, width = resized(333, 777, limits)
    assert height % limits.unit_px == width % limits.unit_px == 0
    assert grid_of(333, 777, limits) == (1, height // limits.patch_size, width // limits.patch_size)
    assert tokens_of(grid_of(333, 777, limits), limits.merge_size) == height * width // limits.unit_px**2


def test_limits_are_read_as_transformers_4_and_as_5_write_them(tmp_path):
    four = {"patch_size": 14, "merge_size": 2, "min_pixels": 3136, "max_pixels": 12845056}
    five = {"image_processor": {"patch_size": 16, "merge_size": 2, "size": {"shortest_edge": 65536, "longest_edge": 16777216}}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(four))
    assert read_limits(tmp_path) == Limits(14, 2, 3136, 12845056)
    assert read_limits(tmp_path, 1000, 2000) == Limits(14, 2, 1000, 2000)
    (tmp_path / "processor_config.json").write_text(json.dumps(five))
    assert read_limits(tmp_path) == Limits(16, 2, 65536, 16777216)


def test_a_folder_without_a_processor_is_named(tmp_path):
    with pytest.raises(UserError, match=r"holds no preprocessor_config\.json or processor_config\.json"):
        read_limits(tmp_path)


def test_the_examples_in_the_docstrings_hold():
    result = doctest.testmod(geometry)
    assert result.attempted and not result.failed
