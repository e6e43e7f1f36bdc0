"""Overlaps of boxes: cases worked out by hand, and torchvision's box_iou."""

import doctest

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.ops import box_iou

from qwenvl_ft.data.boxes import read_answer
from qwenvl_ft.data.chat import open_chat
from qwenvl_ft.data.records import Box, Picture, Record, Turn
from qwenvl_ft.evaluate import overlap
from qwenvl_ft.evaluate.overlap import iou, pair
from qwenvl_ft.evaluate.scoring import score
from qwenvl_ft.infer.engine import Answer
from tests.conftest import TINY
from tests.evaluate.asking import predictions_of

SQUARE = (0, 0, 10, 10)
CASES = {  # (label, corners) that are wanted, that are answered, the overlaps
    "the same": ([("a", SQUARE)], [("a", SQUARE)], [1]),
    "half of it": ([("a", SQUARE)], [("a", (0, 0, 10, 5))], [0.5]),
    "moved by half": ([("a", SQUARE)], [("a", (5, 0, 15, 10))], [1 / 3]),
    "beside it": ([("a", SQUARE)], [("a", (10, 0, 20, 10))], [0]),
    "none": ([("a", SQUARE)], [], [0]),
    "of another label": ([("a", SQUARE)], [("b", SQUARE)], [0]),
    "of the label in capitals": ([("a dog", SQUARE)], [("A dog ", SQUARE)], [1]),
    "of no label": ([("a", SQUARE)], [("", SQUARE)], [1]),
    "two in another order": ([("a", SQUARE), ("a", (20, 0, 30, 10))], [("a", (20, 0, 30, 10)), ("a", SQUARE)], [1, 1]),
    "one for two": ([("a", SQUARE), ("a", (0, 0, 10, 8))], [("a", SQUARE)], [1, 0]),
    "the same twice": ([("a", SQUARE), ("a", SQUARE)], [("a", SQUARE), ("a", SQUARE)], [1, 1]),
    "one too many": ([("a", SQUARE)], [("a", (0, 0, 10, 5)), ("a", SQUARE)], [1]),
    "turned round": ([("a", SQUARE)], [("a", (10, 10, 0, 0))], [0]),
    "a line": ([("a", (0, 0, 0, 10))], [("a", (0, 0, 0, 10))], [0]),
}


@pytest.mark.parametrize("name", CASES)
def test_each_wanted_box_has_one_partner(name):
    wanted, said, overlaps = CASES[name]
    boxes = [[Box(corners, label) for label, corners in side] for side in (wanted, said)]
    assert pair(*boxes) == pytest.approx(overlaps)


BOXES = st.tuples(*[st.integers(0, 20)] * 4).map(
    lambda of: (min(of[0], of[2]), min(of[1], of[3]), max(of[0], of[2]) + 1, max(of[1], of[3]) + 1)
)


@settings(max_examples=200, deadline=None)
@given(BOXES, BOXES)
def test_an_overlap_is_that_of_torchvision(one, other):
    theirs = box_iou(torch.tensor([one], dtype=torch.float64), torch.tensor([other], dtype=torch.float64)).item()
    assert iou(Box(one), Box(other)) == pytest.approx(theirs) == pytest.approx(iou(Box(other), Box(one)))


class Pointer:
    """Answers from a list of texts, and reads boxes as an engine does."""

    def __init__(self, *answers):
        self.chat, self.answers = open_chat(TINY), list(answers)

    def boxes(self, turns, answer):
        return read_answer(answer, self.chat.family.boxes, self.chat.seen(turns))

    def answer_many(self, conversations, max_new_tokens):
        answers = [self.answers.pop(0) for _ in conversations]
        return [
            Answer(text, False, tuple(self.boxes(record.turns, text))) for record, text in zip(conversations, answers, strict=True)
        ]


def test_records_with_boxes_are_scored_by_their_overlap_and_others_are_not():
    question = Turn("user", (Picture.of(Image.new("RGB", (100, 200))), "Where?"))
    wanted = Turn("assistant", (Box((0, 0, 50, 100), "it"), Box((50, 100, 100, 200), "it"), " and ", Box((1, 1), "a dot")))
    talks = [Record("a", (question, wanted)), Record("b", (question, Turn("assistant", ("Here.",))))]
    perfect = "<|object_ref_start|>it<|object_ref_end|><|box_start|>(0,0),(500,500)<|box_end|>"
    answer = f"{perfect}, <|box_start|>(500,500),(1000,700)<|box_end|>, <|box_start|>(0,0),(9,9)<|box_end|>"
    predictions = predictions_of(Pointer(answer, "Here."), talks, 1)
    scores = score(predictions)
    assert predictions[0]["iou"] == [1, 0.4] and "iou" not in predictions[1]
    assert predictions[0]["wanted"].startswith(perfect) and predictions[0]["wanted"].endswith("(10,5)<|box_end|>")
    assert predictions[0]["boxes"][1] == {"bbox_2d": [50, 100, 100, 140], "label": "", "picture": 0}
    assert [box.get("point_2d") for box in predictions[0]["wanted_boxes"]] == [None, None, [1, 1]]
    found = {name: scores[name] for name in ("wanted_boxes", "answered_boxes", "mean_iou", "iou_at_50", "exact_accuracy")}
    assert found == {"wanted_boxes": 2, "answered_boxes": 3, "mean_iou": 0.7, "iou_at_50": 0.5, "exact_accuracy": 0.5}
    assert "mean_iou" not in score(predictions_of(Pointer("Here."), talks[1:], 1))


def test_the_example_in_the_docstring_holds():
    result = doctest.testmod(overlap)
    assert result.attempted and not result.failed
