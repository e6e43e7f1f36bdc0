"""Boxes and points: read from every way of writing, written as each family writes, read back; sizes against transformers."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from qwenvl_ft.config import Config
from qwenvl_ft.data.box_marks import Mark, Stray, marks
from qwenvl_ft.data.boxes import Seen, read_answer, written
from qwenvl_ft.data.chat import open_chat
from qwenvl_ft.data.families import FAMILIES
from qwenvl_ft.data.meta_file import read_records
from qwenvl_ft.data.notes import Noted
from qwenvl_ft.data.prepare import prepare
from qwenvl_ft.data.reading import Reading
from qwenvl_ft.data.records import Box, Picture, Record, Turn
from qwenvl_ft.infer.engine import Engine
from tests.conftest import TINY

TOKENS = "<|object_ref_start|>the bar<|object_ref_end|><|box_start|>(100,200),(300,400)<|box_end|>"
V1 = "<ref>the bar</ref><box>(100,200),(300,400)</box>"
UNITS = {"qwen2_vl": 28, "qwen2_5_vl": 28, **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), 32)}


@pytest.fixture
def read(tmp_path):
    """The turns and the problems of one conversation of texts about a.png, 200 x 100 px, and b.png, 1000 x 500 px."""
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    Image.new("RGB", (1000, 500)).save(tmp_path / "b.png")

    def read(*texts, boxes=None):
        turns = [{"from": ("user", "assistant")[at % 2], "value": text} for at, text in enumerate(texts)]
        (tmp_path / "train.json").write_text(json.dumps([{"conversations": turns}]))
        records, problems, _ = read_records(tmp_path / "train.json", tmp_path, reading=Reading(boxes=boxes))
        return (records[0].turns if records else ()), problems

    return read


@pytest.fixture(scope="module")
def chat(family_model):
    return open_chat(family_model)


# ---- reading ----


@pytest.mark.parametrize(("boxes", "text"), [
    (None, "<ref>the bar</ref><box>(100,200),(300,400)</box>"),
    ("pixels", "<ref>the bar</ref> <box>( 100, 200 ), (300,400)</box>"),  # v1's are thousandths whatever others are
    (None, TOKENS),
    ("unit", "<|object_ref_start|>the bar<|object_ref_end|><|box_start|>(0.1,0.2),(0.3,0.4)<|box_end|>"),
    ("pixels", "<|object_ref_start|>the bar<|object_ref_end|><|box_start|>(20, 20), (60, 40)<|box_end|>"),
    ("pixels", '{"bbox_2d": [20, 20, 60, 40], "label": "the bar"}'),
    ("pixels", '[{"label": "the bar", "bbox": [20.0, 20, 6e1, 40]}]'),
    ("unit", '[\n\t{"bbox_2d": [0.1, 0.2, 0.3, 0.4], "label": "the bar"}\n]'),
    ("thousand", '{"bbox": [100, 200, 300, 400], "label": "the \\u0062ar"}'),
])  # fmt: skip
def test_each_way_of_writing_gives_the_same_box_in_px(boxes, text, read):
    turns, problems = read("<img>a.png</img>\nFind it.", text, boxes=boxes)
    assert not problems
    (box,) = turns[1].parts
    assert (box.label, box.picture, box.bare) == ("the bar", 0, False) and box.corners == pytest.approx((20, 20, 60, 40))


def test_texts_around_boxes_stay_and_boxes_share_a_reference(read):
    turns, _ = read("<img>a.png</img>", f"It is {V1}<box>(0,0),(999,999)</box>, and <ref>a dot</ref><box>(500,500)</box>.")
    assert turns[1].parts == (
        "It is ", Box((20, 20, 60, 40), "the bar"), Box((0, 0, pytest.approx(199.8), 99.9), "the bar"), ", and ",
        Box((100, 50), "a dot"), ".",
    )  # fmt: skip
    assert turns[1].text == "It is , and ."


def test_a_box_lies_in_the_last_picture_before_it_or_in_the_first(read):
    turns, _ = read(f"{V1}? <img>a.png</img>\n", V1, f"<img>b.png</img>\n{V1}?", V1)
    boxes = [part for turn in turns for part in turn.parts if isinstance(part, Box)]
    assert [(box.picture, box.corners) for box in boxes] == [(0, (20, 20, 60, 40))] * 2 + [(1, (100, 100, 300, 200))] * 2


def test_a_picture_that_lies_on_its_side_is_measured_as_it_is_seen(read, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (100, 400)).save(tmp_path / "phone.jpg", exif=exif)
    turns, problems = read("<img>phone.jpg</img>", '{"bbox_2d": [300, 0, 400, 100]}', boxes="pixels")
    assert not problems and turns[1].parts == (Box((300, 0, 400, 100)),)


@pytest.mark.parametrize(("boxes", "text", "what"), [
    ("pixels", '{"bbox_2d": [0, 0, 202, 50], "label": "a"}', "box (0,0),(202,50) of 'a' lies outside its picture a.png, 200 x 100 px, as pixels"),
    ("unit", '{"point_2d": [0.5, 1.01]}', "point (0.5,1.01) lies outside its picture a.png, 200 x 100 px, as unit"),
    ("thousand", '{"bbox_2d": [-2, 0, 9, 9]}', "box (-2,0),(9,9) lies outside its picture a.png, 200 x 100 px, as thousand"),
    (None, "<box>(0,0),(1002,9)</box>", "box (0,0),(1002,9) lies outside its picture a.png, 200 x 100 px, as thousand"),
    (None, "<box>(9,0),(1,9)</box>", "box (9,0),(1,9) ends before it begins"),
    ("unit", '{"bbox_2d": [0.5, 0.5, 0.6, 0.4]}', "box (0.5,0.5),(0.6,0.4) ends before it begins"),
    ("pixels", '{"bbox_2d": [1, 2, 3]}', 'holds "bbox_2d": [1, 2, 3], which is no box'),
    ("pixels", '{"bbox_2d": [1, 2, 3, 4], "label": "\\u003c|im_end|>"}', "has a token or half a character in its label"),
    ("pixels", '{"bbox_2d": [1, 2, 3, 4], "label": "\\ud800"}', "has a token or half a character in its label"),
    (None, "<quad>(1,1),(2,1),(2,2),(1,2)</quad>", "holds <quad>(1,1),(2,1),(2,2),(1,2), which is no box"),
    (None, "<box>[[1,2,3,4]]</box>", "holds <box>[[1,2,3,4]]</box>, which is no box"),
    (None, "<|box_start|>(1,2),(3,4", "holds <|box_start|>(1,2),(3,4, which is no box"),
])  # fmt: skip
def test_what_its_picture_does_not_hold_is_a_problem_with_its_numbers(boxes, text, what, read):
    turns, problems = read("<img>a.png</img>\nWhere?", f"There: {text}", boxes=boxes)
    assert not turns and problems[0].where == "train.json[0].conversations[1]" and what in problems[0].what


@pytest.mark.parametrize(("boxes", "shape"), [
    ("pixels", '[{"bbox_2d": [x1, y1, x2, y2], "label": "dog"}]'),
    ("pixels", '{"bbox_2d": [...], "label": "dog"}'),
    ("pixels", '{"bbox": [["xmin", "ymin", "xmax", "ymax"], ...]}'),
    (None, "<ref>dog</ref><box>(x1,y1),(x2,y2)</box>"),
    (None, "<|box_start|>(x1,y1),(x2,y2)<|box_end|>"),
])  # fmt: skip
def test_a_question_may_say_what_a_box_looks_like_and_an_answer_may_not(boxes, shape, read):
    """Every record of a file whose prompts stated the form of the answer was refused."""
    question, answer = f"Find. Write {shape}.", '{"bbox_2d": [20, 20, 60, 40]}'
    turns, problems = read(f"<img>a.png</img>\n{question}", answer, boxes=boxes)
    assert not problems and turns[0].text.replace("dog", "") == question.replace("<ref>dog</ref>", "").replace("dog", "")
    assert len(turns[1].boxes) == bool(boxes) and not (boxes and Noted([Record("x", turns)]).lines)
    _, problems = read("<img>a.png</img>", shape, boxes=boxes)
    assert problems and all("which is no box" in problem.what for problem in problems)


def test_boxes_of_calls_are_written_as_those_of_texts(pictures, chat):
    """A call of a tool that zooms in was taught in px of the file's picture, its answer in the family's grid."""
    call = {"name": "zoom", "arguments": {"bbox_2d": [84, 28, 168, 112], "all": [{"point": [0, 56], "label": "<b>"}], "n": 3}}
    turns = [{"from": "human", "value": "<image>Zoom."}, {"from": "function_call", "value": json.dumps(call)},
             {"from": "observation", "value": "ok"}, {"from": "gpt", "value": "Done."}]  # fmt: skip
    (pictures / "train.json").write_text(json.dumps([{"images": ["a.png"], "conversations": turns}]))
    (record,), problems, _ = read_records(pictures / "train.json", pictures, reading=Reading(boxes="pixels"))
    assert not problems and [box.corners for box in record.turns[1].boxes] == [(84, 28, 168, 112), (0, 56)]
    said = written(record.turns, "thousand", [Seen(112, 168, 112, 168)])[1].calls
    wanted = {"bbox_2d": [500, 250, 1000, 1000], "all": [{"point": [0, 500], "label": "<b>"}], "n": 3}
    assert [json.loads(text) for text in said] == [{"name": "zoom", "arguments": wanted}]
    if chat._knows_tools:
        assert "[500, 250, 1000, 1000]" in "".join("".join(chat.taught_texts(script)) for script in chat.write_scripts(record))
    (unread,), _, _ = read_records(pictures / "train.json", pictures)
    assert unread.turns[1].calls == (json.dumps(call),) and "boxes in JSON" in Noted([unread]).lines[0]
    turns[1]["value"] = json.dumps({"name": "zoom", "arguments": {"at": "<box>(1,2),(3,4)</box>"}})
    (pictures / "train.json").write_text(json.dumps([{"images": ["a.png"], "conversations": turns}]))
    _, (problem,), _ = read_records(pictures / "train.json", pictures)
    assert "in tags within a call" in problem.what


def test_json_that_becomes_tokens_loses_its_fence():
    seen, box = [Seen(100, 100, 112, 112)], Box((0, 0, 50, 50), "a")
    fenced = [Turn("assistant", ("Here:\n```json\n", box, ",\n", replace(box, label="b"), "\n```\nDone.", "```json\n{}\n```"))]
    tokens = [f"<|object_ref_start|>{label}<|object_ref_end|><|box_start|>(0,0),(500,500)<|box_end|>" for label in "ab"]
    assert written(fenced, "tokens", seen)[0].text == f"Here:\n{tokens[0]},\n{tokens[1]}\nDone.```json\n{{}}\n```"
    assert written(fenced, "thousand", seen)[0].text.count("```json") == 2
    bare = [Turn("assistant", ('```json\n{"bbox_2d": ', replace(box, bare=True), ', "n": 1}\n```'))]
    assert written(bare, "tokens", seen)[0].text == '```json\n{"bbox_2d": [0, 0, 500, 500], "n": 1}\n```'


def test_a_box_without_a_picture_is_a_problem_and_a_missing_picture_is_one_only(read):
    _, (problem,) = read("Where?", V1)
    assert problem.what == "the box (100,200),(300,400) of 'the bar' has no picture"
    _, (problem,) = read("<img>c.png</img>\nWhere?", V1)
    assert "is not in" in problem.what


def test_rounding_beyond_the_edge_is_forgiven_and_ends_at_it(read):
    turns, problems = read("<img>a.png</img>", '{"bbox_2d": [-0.6, 0, 200.7, 101]}', boxes="pixels")
    assert not problems and turns[1].parts == (Box((0, 0, 200, 100)),)


def test_json_that_says_more_than_boxes_is_kept_and_its_numbers_are_converted(read):
    text = '{"objects": [{"bbox_2d": [20, 20, 60, 40], "label": "a"}], "all": [{"bbox": [0, 0, 200, 100], "score": 0.5}], "bbox": [[1, 2, 3, 4]]}'
    turns, problems = read("<img>a.png</img>", text, boxes="pixels")
    assert not problems
    (said,) = written(turns[1:], "thousand", [Seen(100, 200, 112, 196)])
    assert json.loads(said.text) == {
        "objects": [{"bbox_2d": [100, 200, 300, 400], "label": "a"}],
        "all": [{"bbox": [0, 0, 1000, 1000], "score": 0.5}], "bbox": [[5, 20, 15, 40]],
    }  # fmt: skip
    assert said.text.startswith('{"objects": [{"bbox_2d": [100, 200, 300, 400], "label": "a"}], "all"')


def test_boxes_that_ms_swift_lists_are_written_within_the_json_that_asks_for_them(talk, pictures):
    content = '```json\n[\n\t{"bbox_2d": <bbox>, "label": "<ref-object>"},\n\t{"label": "b", "point_2d": <bbox>}\n]\n```'
    entry = {"messages": [{"role": "user", "content": "<image>Find."}, {"role": "assistant", "content": content}], "images": ["a.png"],
             "objects": {"ref": ["cat"], "bbox": [[16.8, 0, 168, 56], [84, 56]]}}  # fmt: skip
    (pictures / "swift.jsonl").write_text(json.dumps(entry))
    (record,), problems, _ = read_records(pictures / "swift.jsonl", pictures)
    assert not problems
    assert written(record.turns[1:], "thousand", [Seen(112, 168, 112, 168)])[0].text == (
        '```json\n[\n\t{"bbox_2d": [100, 0, 1000, 500], "label": "cat"},\n\t{"label": "b", "point_2d": [500, 500]}\n]\n```'
    )


@pytest.mark.parametrize("form", ["llava", "messages", "openai"])
def test_boxes_are_read_in_the_texts_of_every_form(form, pictures):
    said = '{"bbox_2d": [0, 0, 84, 56], "label": "it"}'
    entry = {
        "llava": {"image": "a.png", "conversations": [{"from": "human", "value": "Find.\n<image>"}, {"from": "gpt", "value": said}]},
        "messages": {"images": ["a.png"], "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<image>Find."},
                                                       {"role": "assistant", "content": said}]},
        "openai": {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Find."}]},
                                {"role": "assistant", "content": [{"type": "text", "text": said}]}]},
    }[form]  # fmt: skip
    (pictures / "train.json").write_text(json.dumps([entry]))
    (record,), problems, _ = read_records(pictures / "train.json", pictures, reading=Reading(boxes="pixels"))
    assert not problems and record.turns[-1].parts == (Box((0, 0, 84, 56), "it"),)
    _, (problem,), _ = read_records(pictures / "train.json", pictures, reading=Reading(boxes="unit"))
    place = {"llava": "conversations[1].value", "messages": "messages[2].content", "openai": "messages[1].content"}[form]
    assert problem.where.startswith(f"train.json[0].{place.rpartition('.')[0]}")


def test_json_boxes_of_no_said_unit_are_taught_as_they_stand_and_noted(talk, pictures):
    answer = '[{"bbox_2d": [1, 2, 9999, 4], "label": "a"}]'
    records, problems, _ = read_records(
        talk(["<img>a.png</img>", answer], ["<img>a.png</img>", "no"], ["<img>a.png</img>", answer]), pictures
    )
    assert not problems and records[0].turns[1].parts == (answer,)
    assert Noted(records).lines == [
        "2 records hold boxes in JSON, which are taught as they stand: set `boxes` to what the numbers are, "
        "pixels, unit or thousand (train.json[0] for one)"
    ]


def test_footnotes_and_other_tags_of_these_names_stay_text_and_are_noted(talk, pictures):
    text = "So it is.<ref>Smith 2010</ref> A <box> is <box>a chest</box>"
    records, problems, _ = read_records(talk(["Tell", text.split(" A")[0]], ["<img>a.png</img>", text]), pictures)
    assert not problems and records[0].turns[1].parts == ("So it is.<ref>Smith 2010</ref>",)
    assert Noted(records).lines == [
        "2 records hold <ref> or <box> without the numbers of a box, which is taught as letters (train.json[0] for one)"
    ]


FRAGMENTS = st.sampled_from([
    "<ref>", "</ref>", "<box>", "</box>", "<quad>", "(1,2)", ",(3,4)", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", '{"bbox_2d": ', "[1, 2, 3, 4]", '"label": "a"', "[", "]", "{", "}", ", ", '"', "\\", "x", " ", "\n", '"point": ', "[1,2]",
])  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.lists(FRAGMENTS, max_size=30).map("".join), st.booleans())
def test_what_is_no_box_is_not_changed(text, as_json):
    pieces = list(marks(text, as_json))
    if all(isinstance(piece, str) for piece in pieces):
        assert "".join(pieces) == text
    else:
        assert all(piece in text for piece in pieces if isinstance(piece, str))
        assert any(isinstance(piece, Mark | Stray) for piece in pieces)


@pytest.mark.parametrize("text", [
    "<ref>", "<box>(1,", '{"bbox_2d": [1, 2, 3, 4], ', '[{"a":1},', "[", '{"', '{"\\"', '"bbox": [[1,2,3,4],', "<|object_ref_start|>",
    '[{"bbox_2d":[1,2,3,4]}, ', "1", '{"a":[', " ", '"point" : [1, ', "<box>(1,2),(3,4)</box>",
])  # fmt: skip
def test_hostile_texts_take_linear_time(text):
    assert list(marks(text * (400_000 // len(text)), as_json=True))  # with one repetition that gives back, it does not come back


# ---- writing ----


def written_as(form, *parts, seen=(100, 200, 112, 196)):
    return written([Turn("assistant", parts)], form, [Seen(*seen)])[0].text


BAR, LEFT, DOT = Box((20, 20, 60, 40), "the bar"), Box((0, 0, 100, 100), "left"), Box((100, 50), "a dot")


@pytest.mark.parametrize(("parts", "tokens", "thousand", "pixels"), [
    ((BAR,), TOKENS, '[{"bbox_2d": [100, 200, 300, 400], "label": "the bar"}]', '[{"bbox_2d": [20, 22, 59, 45], "label": "the bar"}]'),
    (("See ", BAR, "\n", DOT, "."),
     f"See {TOKENS}\n<|object_ref_start|>a dot<|object_ref_end|><|box_start|>(500,500)<|box_end|>.",
     'See [{"bbox_2d": [100, 200, 300, 400], "label": "the bar"}, {"point_2d": [500, 500], "label": "a dot"}].',
     'See [{"bbox_2d": [20, 22, 59, 45], "label": "the bar"}, {"point_2d": [98, 56], "label": "a dot"}].'),
    ((BAR, " and ", BAR), f"{TOKENS} and {TOKENS}", '[{"bbox_2d": [100, 200, 300, 400], "label": "the bar"}] and '
     '[{"bbox_2d": [100, 200, 300, 400], "label": "the bar"}]', None),
    ((BAR, BAR), f"{TOKENS}<|box_start|>(100,200),(300,400)<|box_end|>", None, None),
    (("Find ", Box((), "the bar"), "."), "Find <|object_ref_start|>the bar<|object_ref_end|>.", "Find the bar.", "Find the bar."),
    ((Box((0, 0, 200, 100)),), "<|box_start|>(0,0),(1000,1000)<|box_end|>", '[{"bbox_2d": [0, 0, 1000, 1000]}]',
     '[{"bbox_2d": [0, 0, 196, 112]}]'),
    ((Box((0, 0, 200, 100), '条 "a"'),), None, '[{"bbox_2d": [0, 0, 1000, 1000], "label": "条 \\"a\\""}]', None),
])  # fmt: skip
def test_boxes_are_written_in_the_form_of_the_family(parts, tokens, thousand, pixels):
    for form, wanted in {"tokens": tokens, "thousand": thousand, "pixels": pixels}.items():
        assert wanted is None or written_as(form, *parts) == wanted


def test_the_families_have_the_forms_that_their_makers_say():
    """QwenLM's process_bbox.ipynb, issues 721, 866 and 1161 of QwenLM/Qwen3-VL, and its README."""
    forms = {name: family.boxes for name, family in FAMILIES.items()}
    later = dict.fromkeys(("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), "thousand")
    assert forms == {"qwen2_vl": "tokens", "qwen2_5_vl": "pixels", **later}


def of_the_notebook(box, height, width, shown):
    """convert_to_qwen2vl_format and convert_to_qwen25vl_format of QwenLM's process_bbox.ipynb, without their last clip."""
    relative = [round(corner / side * 1000) for corner, side in zip(box, (width, height) * 2, strict=True)]
    scaled = [round(corner * (new / side)) for corner, side, new in zip(box, (width, height) * 2, shown[::-1] * 2, strict=True)]
    return relative, scaled


SIDE = st.integers(20, 3000)
SHARE = st.floats(0, 1)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(FAMILIES)),
    SIDE,
    SIDE,
    st.tuples(SHARE, SHARE, SHARE, SHARE),
    st.sampled_from([4, 300, 20_000]),
    st.booleans(),
)
def test_a_box_comes_back_within_half_a_step_of_the_grid(name, height, width, shares, most, point):
    """Pictures of 20 px to 3000 px, shrunk to four units' area and enlarged to 300 units'."""
    unit, form = UNITS[name], FAMILIES[name].boxes
    least = min(most, 300) if most != 20_000 else 4
    shown = smart_resize(height, width, unit, least * unit * unit, most * unit * unit)
    (left, right), (top, bottom) = sorted(shares[:2]), sorted(shares[2:])
    corners = (left * width, top * height, right * width, bottom * height)[: 2 if point else 4]
    seen = [Seen(height, width, *shown)]
    text = written([Turn("assistant", ("It is ", Box(corners, "a b"), "."))], form, seen)[0].text
    (back,) = read_answer(text, form, seen)
    assert (back.label, len(back.corners)) == ("a b", len(corners))
    grid = shown[::-1] if form == "pixels" else (1000, 1000)
    for corner, again, side, steps in zip(corners, back.corners, (width, height) * 2, grid * 2, strict=False):
        assert abs(corner - again) <= side / steps / 2 * (1 + 1e-9) + 1e-9
    if not point:
        numbers = json.loads(text[6:-1])[0]["bbox_2d"] if form != "tokens" else None
        assert numbers in (None, of_the_notebook(corners, height, width, shown)[form == "pixels"])


@pytest.mark.parametrize("size", [(60, 40), (640, 480), (4000, 3000)])  # enlarged, about as large, shrunk
def test_what_a_family_is_taught_comes_back_as_px_of_the_file(size, chat, read, tmp_path):
    Image.new("RGB", size, "white").save(tmp_path / "a.png")
    width, height = size
    box = [width / 7, height / 9, width / 3, height]
    turns, problems = read(
        "<img>a.png</img>\nFind.", json.dumps([{"bbox_2d": box, "label": "it"}, {"point_2d": box[:2]}]), boxes="pixels"
    )
    assert not problems
    (script,) = chat.write_scripts(Record("here", turns))
    (taught,) = chat.taught_texts(script)
    patches, patch = script.grids[0], chat.limits.patch_size
    (seen,) = chat.seen(turns)
    assert (seen.shown_height, seen.shown_width) == (patches[1] * patch, patches[2] * patch)
    back = read_answer(taught.removesuffix("<|im_end|>"), chat.family.boxes, chat.seen(turns))
    step = max(width / 1000, height / 1000, width / seen.shown_width, height / seen.shown_height)
    assert [of.label for of in back] == ["it", ""] and len(back[1].corners) == 2
    assert all(math.isclose(a, b, abs_tol=step / 2 * 1.001) for a, b in zip(back[0].corners, box, strict=True))


def test_tags_of_the_first_qwen_vl_are_taught_in_the_form_of_each_family(chat, read):
    turns, problems = read("Picture 1: <img>a.png</img>\nFind <ref>the bar</ref>.", V1)
    assert not problems
    (script,) = chat.write_scripts(Record("here", turns))
    taught = {
        "tokens": TOKENS, "thousand": '[{"bbox_2d": [100, 200, 300, 400], "label": "the bar"}]',
        "pixels": '[{"bbox_2d": [20, 22, 59, 45], "label": "the bar"}]',
    }[chat.family.boxes]  # fmt: skip
    assert [text.removesuffix("<|im_end|>") for text in chat.taught_texts(script)] == [taught]
    name = "<|object_ref_start|>the bar<|object_ref_end|>" if chat.family.boxes == "tokens" else "the bar"
    assert f"Find {name}." in chat.said(script.ids)


def test_boxes_of_a_question_stand_in_its_prompt_in_training_and_in_asking(chat, read):
    turns, _ = read(f"<img>a.png</img>\nWhat is {V1}?", "A bar.", "Sure?", V1)
    scripts = chat.write_scripts(Record("here", turns))
    prompt = chat.prompt(turns[:3])
    assert scripts[-1].ids[: len(prompt)] == prompt
    assert chat.said(prompt).count("the bar") == 1


def test_tokens_of_boxes_are_one_token_each_and_an_answer_keeps_them_whole(read):
    turns, problems = read("<img>a.png</img>\nWhere is <|object_ref_start|>the bar<|object_ref_end|>?", TOKENS)
    chat = open_chat(TINY)
    (script,) = chat.write_scripts(Record("here", turns))
    prompt = chat.prompt(turns[:1])
    asked = Engine.open(TINY).inputs([turns[:1]])["input_ids"][0].tolist()
    assert [id for id in asked if id != chat.picture_id] == [id for id in prompt if id != chat.picture_id]
    assert not problems and script.ids[: len(prompt)] == prompt
    assert {chat._special["<|object_ref_start|>"], chat._special["<|object_ref_end|>"]} <= set(prompt)
    assert chat.answered([label for label in script.labels if label >= 0]) == TOKENS


def test_the_key_boxes_says_what_is_trained(tmp_path, talk, pictures):
    meta = talk(["<img>a.png</img>", '[{"bbox_2d": [16.8, 11.2, 168, 112], "label": "a"}]'])
    kept = {}
    for boxes in (None, "pixels"):
        config = Config(model=TINY, train_meta_file=meta, train_data_dir=pictures, output_dir=Path(tmp_path / "run"), boxes=boxes)
        ready = prepare(config)
        kept[boxes] = (
            ready.chat.taught_texts(ready.scripts[0])[0],
            [note for note in ready.summary(config)["notes"] if "JSON" in note],
        )
    assert kept[None][0].startswith('[{"bbox_2d": [16.8') and len(kept[None][1]) == 1
    tokens = "<|object_ref_start|>a<|object_ref_end|><|box_start|>(100,100),(1000,1000)<|box_end|><|im_end|>"
    assert kept["pixels"] == (tokens, [])


# ---- reading back ----


def test_of_an_answer_that_was_cut_the_whole_boxes_are_read():
    seen = [Seen(100, 200, 112, 196)]
    whole = (
        '```json\n[\n\t{"bbox_2d": [0, 0, 500, 500], "label": "a"},\n\t{"bbox_2d": [500, 500, 1000, 1000], "label": "b"}\n]\n```'
    )
    first, second = whole.index("},") + 1, whole.rindex("}") + 1
    for cut in range(len(whole) + 1):
        boxes = read_answer(whole[:cut], "thousand", seen)
        assert [box.label for box in boxes] == ["a", "b"][: (cut >= first) + (cut >= second)]
    assert boxes[1].corners == (100, 50, 200, 100)


def test_an_answer_is_read_whatever_stands_around_its_boxes():
    seen = [Seen(10, 10, 28, 28), Seen(100, 200, 112, 196)]
    said = f'Two: {TOKENS} and {{"label": "b", "score": 0.5, "point_2d": [10, 20]}}; <|box_start|>(1,2'
    boxes = read_answer(said, "tokens", seen)
    assert [(box.corners, box.label, box.picture) for box in boxes] == [((20, 20, 60, 40), "the bar", 1), ((2, 2), "b", 1)]
    assert read_answer(said, "tokens", []) == [] and read_answer("no box [1, 2, 3, 4]", "pixels", seen) == []


def test_boxes_are_read_within_the_bounds_of_their_own_picture():
    chat = open_chat(TINY)
    picture = Picture.of(Image.new("RGB", (1120, 1120)), max_pixels=4 * 28 * 28)
    (seen,) = chat.seen([Turn("user", (picture,))])
    assert (seen.height, seen.shown_height, seen.shown_width) == (1120, 56, 56)
