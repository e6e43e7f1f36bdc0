"""What only a tool can find: planted once each, and not found where it is not."""

import json
import pickle
import random
from array import array
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwenvl_ft.cli.main import main
from qwenvl_ft.data import checks as checks_module
from qwenvl_ft.data.batches import batches_of
from qwenvl_ft.data.chat import open_chat
from qwenvl_ft.data.checks import Against, Checks, Places
from qwenvl_ft.data.geometry import Limits, shrunk
from qwenvl_ft.data.meta_file import Tally, read_records
from qwenvl_ft.data.numbers import Spool
from qwenvl_ft.data.records import Box, Picture, Record, Turn, Video
from qwenvl_ft.errors import UserError
from qwenvl_ft.values import MixedFile
from tests.conftest import TINY

CHAT = open_chat(TINY)
A, B = Picture(Path("a.png"), 100, 200, num_bytes=1), Picture(Path("b.png"), 100, 200, num_bytes=2)


def checked(records, scripts=(), chat=None, against=None) -> Checks:
    """The checks of records that are there, with their scripts."""
    checks = Checks(chat.limits if chat else None, against)
    of_record: dict[str, list] = {}
    for script in scripts:
        of_record.setdefault(script.where, []).append(script)
    for record in records:
        checks.add(record, of_record.get(record.where, ()))
    return checks


def against(*records) -> Against:
    """Records of evaluation that are there."""
    theirs = Against()
    for one in records:
        theirs.add(one)
    return theirs


def record(number, *texts, **more):
    """Turns of user and assistant; a text alone, or parts."""
    parts = [text if isinstance(text, tuple) else (text,) for text in texts]
    turns = tuple(Turn(("user", "assistant")[at % 2], of) for at, of in enumerate(parts))
    return Record(f"train.json[{number}]", turns, **more)


CLEAN = [
    record(0, (A, "What is in picture 1?"), "A cat that sleeps."),
    record(1, (A, B, "Compare picture 1 and image 2, of 2019."), "They are alike, but for the colour."),
    record(2, "Red or green?", "green", "Why not red?", "It is green because red was not among the colours."),
    record(3, (A, "Where is it?"), (Box((10, 10, 60, 60), "cat"),)),
    record(4, "What does image 2019 of the archive show, Picture 1", "I cannot see it."),
]
CLEAN[4] = record(4, "What does image 2019 of the archive show?", "I cannot see it.")


def found(records, *more):
    return {name: fact for name, fact in checked(records, *more).facts().items() if name not in ("tokens", "taught_tokens")}


def test_in_clean_records_nothing_is_found():
    assert found(CLEAN) == {}
    plain = [of for of in CLEAN if not any(isinstance(part, Box) for turn in of.turns for part in turn.parts)]
    scripts = [script for of in plain for script in CHAT.write_scripts(of)]
    assert found(plain, scripts, CHAT, against(replace(record(9, "Other?", "Other."), where="eval.json[0]"))) == {}


def test_records_that_say_the_same_of_the_same_pictures_are_duplicates():
    again = [
        replace(CLEAN[1], where="train.json[7]"),
        replace(CLEAN[0], where="train.json[9]"),
        replace(CLEAN[1], where="more.jsonl:12"),
    ]
    facts = found([*CLEAN, *again])
    assert facts["duplicate_records"]["count"] == 3
    assert facts["duplicate_records"]["note"].startswith("3 records repeat earlier ones")
    assert "(train.json[7] is train.json[1] again)" in facts["duplicate_records"]["note"]
    other = [replace(CLEAN[0], where="x", tools=('{"name": "z"}',)), record(5, (B, "What is in picture 1?"), "A cat that sleeps.")]
    assert not found([*CLEAN, *other])
    turns = CLEAN[2].turns
    split = Record("y", (turns[0], replace(turns[1], calls=('{"name": "z"}',)), *turns[2:]))
    assert not found([*CLEAN, split])


def test_a_record_that_counts_twice_by_its_weight_is_no_duplicate(tmp_path, talk):
    mixed, checks, tally = [MixedFile(file=talk(["one?", "1"], ["two?", "2"]), weight=2)], Checks(), Tally()
    for batch in batches_of(mixed, tmp_path, tally):
        checks.join(batch.checks)
    assert not checks.facts() and tally.used[0] == 4


def test_records_of_evaluation_in_training_are_named():
    facts = found(CLEAN, (), None, against(replace(CLEAN[2], where="eval.json[4]")))
    assert facts["records_of_evaluation"] == {
        "count": 1, "first": "train.json[2]",
        "note": "1 record is in evaluation, too, turns and pictures alike (train.json[2] is eval.json[4])",
    }  # fmt: skip


def test_a_picture_of_evaluation_is_found_by_its_content_under_another_name(tmp_path, talk, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    random = np.random.default_rng(0)
    for name in ("a", "b", "c", "d"):  # of one size in px and, but for one, of other bytes
        Image.fromarray(random.integers(0, 255, (40, 60, 3), np.uint8)).save(tmp_path / f"{name}.bmp")
    (tmp_path / "copy.bmp").write_bytes((tmp_path / "b.bmp").read_bytes())
    records, problems, _ = read_records(talk(["<img>a.bmp</img>one?", "1"], ["<img>copy.bmp</img>two?", "2"]), tmp_path)
    theirs, _, _ = read_records(talk(["<img>b.bmp</img>x?", "1"], ["<img>c.bmp</img>y?", "2"]), tmp_path)
    assert not problems and len(records) == len(theirs) == 2
    fact = found(records, (), None, against(*theirs))["pictures_of_evaluation"]
    assert fact["count"] == 1 and fact["first"] == records[1].where
    assert fact["note"].endswith(f"{records[1].where} shows copy.bmp, and {theirs[0].where} the same as b.bmp")
    assert not found(records, (), None, against(*theirs[1:]))


def test_shrunk_pictures_are_counted_once_each_with_how_much():
    small, big, huge = (Picture(Path(f"{of}.png"), of, 2 * of, num_bytes=1) for of in (112, 1000, 4000))
    records = [
        record(at, (of, f"{at}?"), "x") for at, of in enumerate((small, big, huge, huge, replace(big, source=Path("2.png"))))
    ]
    scripts = [script for of in records for script in CHAT.write_scripts(of)]
    fact = found(records, scripts, CHAT)["pictures_shrunk"]
    _, rows, columns = CHAT.write_scripts(records[2])[0].grids[0]
    area = rows * columns * CHAT.limits.patch_size**2
    assert fact["count"] == 3 and fact["worst"] == pytest.approx((4000 * 8000 / area) ** 0.5, abs=1e-3)
    assert 1 < fact["median"] < fact["worst"] and "4000.png, 8000 x 4000 px becomes" in fact["note"]
    assert "pictures_shrunk" not in found(records[:1], scripts[:1], CHAT)


@pytest.mark.parametrize(("size", "is_so"), [((1602, 25), False), ((2361, 28), True), ((400, 300), True), ((97, 99), False)])
def test_what_is_seen_no_smaller_than_it_is_is_not_shrunk(size, is_so):
    """A strip of 1602 x 25 px is seen as 1792 x 32, less than a bound makes of it and more than it is: `plan` counted it as shrunk
    beside checks that did not."""
    limits = Limits(16, 2, 3136, 50176)
    checks = Checks(limits)
    picture = Picture(Path("a.png"), *size, num_bytes=1)
    checks.add(record(0, (picture, "?"), "x"), CHAT.write_scripts(record(0, "?", "x")))
    assert shrunk(*size, limits) == ("pictures_shrunk" in checks.facts()) == is_so


def test_tokens_and_taught_tokens_are_those_of_the_scripts():
    records = [record(at, "a" * at, "b " * (at + 1)) for at in range(40)]
    scripts = [script for of in records for script in CHAT.write_scripts(of)]
    facts = checked(records, scripts, CHAT).facts()
    taught = [sum(label != -100 for label in script.labels) for script in scripts]
    assert [facts["taught_tokens"][of] for of in ("min", "median", "max")] == [min(taught), int(np.median(taught)), max(taught)]
    for start, count in facts["tokens"]["from"].items():
        assert count == sum(int(start) <= script.length < 2 * int(start) for script in scripts)
    assert sum(facts["tokens"]["from"].values()) == 40


def test_a_picture_by_a_number_that_there_is_not_is_found():
    bad = [record(5, (A, B, "What is in Picture 3?"), "x"), record(6, (A, "?"), "In image 2 there is a cat.")]
    assert found([*CLEAN, *bad])["numbered_pictures"] == {
        "count": 2, "first": "train.json[5]",
        "note": "2 records speak of a picture by a number that is more than it has pictures (train.json[5] for one)",
    }  # fmt: skip


def test_boxes_that_cover_everything_are_found():
    boxes = (Box((0, 0, 200, 100)), Box((1, 1, 199, 100)), Box((0, 0, 100, 100)), Box((5, 5)), Box((0, 0, 200, 100), picture=7))
    assert found([*CLEAN, record(5, (A, "Where?"), boxes)])["boxes"]["count"] == 2


def test_answers_that_stand_in_their_questions_are_found():
    said = "the quick brown fox jumps"
    facts = found([*CLEAN, record(5, f"Repeat: {said}.", f" {said}\n", "And?", said)])
    assert facts["answers"]["count"] == 1 and facts["answers"]["first"] == "train.json[5]"
    silent = Record("x", (Turn("user", (said,)), Turn("assistant", (said,), taught=False)))
    assert not found([*CLEAN, silent])


def test_checks_of_parts_join_to_the_checks_of_all():
    """As when processes read a part each."""
    again = [replace(of, where=f"more.jsonl:{at}") for at, of in enumerate(CLEAN)]
    bad = record(8, (A, "What is in Picture 3?"), "x")
    records = [bad, *CLEAN[:3], *again[:3]]
    scripts = [script for of in records for script in CHAT.write_scripts(of)]
    theirs = against(replace(CLEAN[1], where="e"))
    theirs.media.clear()
    theirs.sizes.clear()  # their files are not there
    whole, joined = checked(records, scripts, CHAT, theirs), Checks(CHAT.limits, theirs)
    for start in (0, 2, 4, 6):
        part = checked(records[start : start + 2], scripts, CHAT, theirs)
        joined.join(pickle.loads(pickle.dumps(part)))
    assert joined.facts() == whole.facts() and len(whole.facts()) >= 5


def test_frames_in_memory_and_odd_places_are_no_matter():
    films = [Video.of([Image.new("RGB", (56, 56), color)] * 2, 2.0, range(2), 2) for color in ("red", "blue")]
    records = [Record("", (Turn("user", (film, "?")), Turn("assistant", ("x",)))) for film in films]
    checks = Checks(CHAT.limits, against(*records))
    for number, of in enumerate(records):
        checks.add(replace(of, where=f"no number {'x' * number}"))
    assert not found([]) and "duplicate_records" not in checks.facts()


@pytest.mark.parametrize("place", ["a.tar:000012", "a.tar:9" + 30 * "0", "a.tar:x", "a.tar:007.b", "a.tar:0", "a.tar:\u0663", "7"])
def test_a_place_is_named_as_it_was_whatever_its_number(place):
    """Keys of tars begin with zeros, which were lost; one of twenty digits ended the command with a traceback."""
    first = record(0, "Is it red or green?", "green")
    checks = checked([first, replace(first, where=place)])
    assert checks.facts()["duplicate_records"]["first"] == place


def test_commands_show_what_was_found(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Image.new("RGB", (56, 56), "red").save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    turns = [{"from": "user", "value": "<img>a.png</img>What is in picture 2?"}, {"from": "assistant", "value": "Red."}]
    theirs = [{"from": "user", "value": "<img>b.png</img>Which colour?"}, {"from": "assistant", "value": "Red."}]
    (tmp_path / "train.json").write_text(json.dumps([{"conversations": turns}] * 2))
    (tmp_path / "eval.json").write_text(json.dumps([{"conversations": theirs}, {"conversations": []}]))
    arguments = ["validate-meta", str(tmp_path / "train.json"), "--against", str(tmp_path / "eval.json"), "--json"]
    names = {"pictures_of_evaluation", "not_compared", "duplicate_records", "numbered_pictures"}
    with pytest.raises(SystemExit):
        main([*arguments, "--model", str(TINY)])
    report = json.loads(capsys.readouterr().out)
    assert report["checks"].keys() == names | {"taught_tokens", "tokens"}
    assert {fact["note"] for name, fact in report["checks"].items() if name in names} <= set(report["notes"])
    with pytest.raises(SystemExit):
        main(arguments)
    assert json.loads(capsys.readouterr().out)["checks"].keys() == names
    settings = [f"model={TINY}", f"train_meta_file={tmp_path / 'train.json'}", f"eval_meta_file={tmp_path / 'eval.json'}",
                f"train_data_dir={tmp_path}", f"output_dir={tmp_path / 'out'}"]  # fmt: skip
    with pytest.raises(SystemExit):
        main(["plan", "--config", "configs/demo.yaml", "--json", *settings])
    plan = json.loads(capsys.readouterr().out)
    assert plan["checks"].keys() == names | {"taught_tokens", "tokens"}
    assert {fact["note"] for name, fact in plan["checks"].items() if name in names} <= set(plan["notes"])


def test_a_file_of_evaluation_that_is_not_there_is_an_error(tmp_path, talk):
    with pytest.raises(UserError, match=r"none\.json"):
        Against.read(tmp_path / "none.json", None)
    (tmp_path / "cut.json").write_text(talk(["q", "a"]).read_text()[:-3])
    with pytest.raises(UserError, match="is not JSON"):
        Against.read(tmp_path / "cut.json", None)


def test_places_of_records_are_kept_as_runs_of_numbers_and_come_back_whole():
    """Each record left 24 bytes for its place: 10 million took 240 MB."""
    said = [f"a.jsonl:{number}" for number in (1, 2, 3, 5, 6)] + [
        "b.tar/x0007",
        "b.tar/x0008",
        "c.tar/kitten",
        "a.jsonl:7",
        "d[0].conversations",
    ]
    whole, joined = Places(), Places()
    for start in range(0, len(said), 2):
        part = Places()
        for where in said[start : start + 2]:
            whole.add(where)
            part.add(where)
        joined.join(part)
    assert [whole[at] for at in range(len(said))] == [joined[at] for at in range(len(said))] == said
    assert len(whole.runs) == len(joined.runs) == 6


@pytest.mark.parametrize("sorted_at_a_time", [1, 5, 64, 1000])
def test_repeated_records_are_found_however_many_hashes_are_sorted_at_a_time(sorted_at_a_time, monkeypatch):
    draw = random.Random(sorted_at_a_time)
    for size, kinds in ((0, 1), (1, 1), (40, 1), (200, 300), (200, 10**9)):
        hashes = array("Q", (draw.randrange(kinds) * 2**33 + draw.randrange(2) for _ in range(size)))
        again = [at for at in range(size) if hashes[at] in hashes[:at]]
        monkeypatch.setattr(checks_module, "SORTED", sorted_at_a_time)
        monkeypatch.setattr(checks_module, "STRETCH", sorted_at_a_time)
        assert checks_module._repeated(Spool("u8", hashes)) == (len(again), again[0] if again else size)
