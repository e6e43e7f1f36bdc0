"""What is right without looking: other pictures than a question's own, and the commonest answer."""

import pytest
from PIL import Image

from qwenvl_ft.data.records import Picture, Record, Turn
from qwenvl_ft.errors import UserError
from qwenvl_ft.evaluate.controls import prior, shown_by
from qwenvl_ft.evaluate.scoring import Sheet


def record(where, *pictures):
    return Record(where, (Turn("user", (*pictures, "How many?")), Turn("assistant", ("7",))))


@pytest.fixture
def records(pictures):
    a, b, c = (Picture(pictures / name, *size) for name, size in (("a.png", (112, 168)), ("b.png", (200, 90)), ("c.jpg", (47, 61))))
    return [record("r[0]", a, b), record("r[1]", c), record("r[2]", a), record("r[3]")]


def test_a_blank_picture_is_white_and_of_the_size_of_its_own(records):
    show = shown_by("blank", records, 0)
    for own, shown in zip(records[0].pictures, show(records[0]).pictures, strict=True):
        assert shown.source.size == (own.width, own.height) and shown.source.getcolors() == [(own.width * own.height, (255,) * 3)]
    assert show(records[3]) == records[3]


@pytest.mark.parametrize("seed", range(4))
def test_another_picture_is_of_no_record_with_its_own(records, seed):
    show = shown_by("shuffled", records, seed)
    a, b, c = records[0].pictures[0], records[0].pictures[1], records[1].pictures[0]
    assert [picture for of in records for picture in show(of).pictures] == [c, c, show(records[1]).pictures[0], c]
    assert show(records[1]).pictures[0] in (a, b) and show(records[0]).turns[0].text == "How many?"


def test_which_other_pictures_are_shown_comes_from_the_seed(tmp_path):
    records = [record(f"r[{number}]", Picture(tmp_path / f"{number}.png", 30, 40)) for number in range(6)]
    orders = [tuple(shown_by("shuffled", records, seed)(of).pictures[0].name for of in records) for seed in (0, 0, 1, 2)]
    assert orders[0] == orders[1] and len(set(orders)) == 3
    assert all(name != of.pictures[0].name for order in orders for name, of in zip(order, records, strict=True))


def test_without_another_picture_there_is_nothing_to_show(records):
    with pytest.raises(UserError, match="no other record has another image"):
        shown_by("shuffled", [records[0], records[3]], 0)


def test_a_question_without_its_pictures_keeps_its_words(records):
    assert shown_by("no_pictures", records, 0)(records[0]).turns[0].parts == ("How many?",)


def test_a_question_with_its_text_first_shows_the_same_pictures_behind_it(records):
    show = shown_by("text_first", records, 0)
    assert show(records[0]).turns[0].parts == ("How many?", *records[0].pictures) and show(records[3]) is records[3]
    with pytest.raises(UserError, match="no question has its pictures before its text"):
        shown_by("text_first", [show(records[0]), records[3]], 0)


def test_fewer_questions_are_among_more_of_the_same_seed(records):
    talks = [record(f"r[{number}]") for number in range(30)]
    few, more, other = (Sheet.of(talks, limit=limit, seed=seed).chosen for limit, seed in ((5, 0), (12, 0), (5, 1)))
    assert set(few) < set(more) and len(few) == 5 and len(more) == 12 and few == sorted(few) and few != other
    assert Sheet.of(talks, limit=99).chosen == Sheet.of(talks).chosen == list(range(30))


def asked(*pairs):
    return [{"question": question, "wanted": wanted, "answer": "x"} for question, wanted in pairs]


@pytest.mark.parametrize(
    ("pairs", "answers"),
    [
        ([("a", "1"), ("a", "1"), ("a", "2")], ["1", "1", "1"]),  # of the same text
        ([("a", "no"), ("a", "yes"), ("a", "yes"), ("a", "no")], ["no"] * 4),  # the first of equals: right as often as chance
        (
            [("a", "1"), ("b", "2"), ("c", "2"), ("c", "3")],
            ["2", "2", "3", "2"],
        ),  # a text of its own: of all; c has no answer twice
        ([("a", "1")], [""]),  # nothing is known
    ],
)
def test_the_prior_is_the_commonest_answer(pairs, answers):
    assert [of["answer"] for of in prior(asked(*pairs))] == answers


def test_the_prior_of_boxes_is_scored_by_its_boxes():
    box = {"bbox_2d": [0, 0, 10, 10], "label": "a"}
    half = {"bbox_2d": [0, 0, 10, 5], "label": "a"}
    found = prior([
        {"question": "where", "wanted": wanted, "answer": "", "wanted_boxes": boxes, "boxes": [], "iou": [0.0]}
        for wanted, boxes in (("whole", [box]), ("whole", [box]), ("half", [half]))
    ])  # fmt: skip
    assert [of["iou"] for of in found] == [[1.0], [1.0], [0.5]]


def test_a_question_over_white_pictures_is_another_question(records):
    Image.new("RGB", (168, 112)).save(records[0].pictures[0].source)
    sheets = [Sheet.of(records, control=control) for control in (None, "blank", "shuffled", "no_pictures", "text_first")]
    hashes = [sheet.hashes("me") for sheet in sheets]
    assert len({of[1] for of in hashes}) == 5 and hashes[0] != sheets[0].hashes("you")
