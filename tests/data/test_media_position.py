"""media_position: the text before the pictures or behind them, as transformers' own template writes it, and how many were moved."""

import json

import pytest
from PIL import Image
from transformers import AutoProcessor

from qwenvl_ft.cli.evaluation import _records
from qwenvl_ft.cli.main import main
from qwenvl_ft.cli.options import own_reading, read_reading
from qwenvl_ft.data.chat import open_chat
from qwenvl_ft.data.checks import hash_of
from qwenvl_ft.data.media_position import placed, position_of
from qwenvl_ft.data.meta_file import read_records
from qwenvl_ft.data.prepare import prepare
from qwenvl_ft.data.reading import Reading
from qwenvl_ft.data.records import Box, Picture, Record, Turn, Video
from qwenvl_ft.errors import UserError
from qwenvl_ft.infer.engine import Engine
from tests.conftest import TINY
from tests.runs import config
from tests.serving import CHARTS

A, B = (Picture.of(Image.new("RGB", (56, 84), colour)) for colour in ("white", "black"))
FILM = Video.of([Image.new("RGB", (56, 56))] * 2, 1.0, (0, 1), 2)
BOX = Box((1, 2, 3, 4), "it")


def record(*parts, role="user", where="a.json[0]"):
    return Record(where, (Turn(role, parts), Turn("assistant", ("7",))))


@pytest.mark.parametrize(("written", "position", "wanted"), [
    ((A, "How many?"), "last", ("How many?", A)),
    ((A, FILM, B, "Where is ", BOX, "?"), "last", ("Where is ", BOX, "?", A, FILM, B)),
    (("How many?\n", A, B), "first", (A, B, "How many?\n")),
    ((A, "How many?"), "first", (A, "How many?")),
    (("How many?", A), "last", ("How many?", A)),
    ((A, "and", B, "?"), "last", (A, "and", B, "?")),
    (("see", A, "?"), "first", ("see", A, "?")),
    ((A, B), "last", (A, B)),
    ((A, "How many?"), "as_written", (A, "How many?")),
])  # fmt: skip
def test_media_are_moved_only_where_all_stand_on_one_side(written, position, wanted):
    own = record(*written)
    found = placed(own, position)
    assert found.turns[0].parts == wanted and (found is own) == (written == wanted)
    assert found.turns[1] is own.turns[1] and placed(record(*written, role="tool"), position).turns[0].parts == written


def test_a_record_is_on_one_side_the_same_again_and_records_on_both():
    """Whatever run, epoch or process reads it: its place in the meta-file decides."""
    records = [
        Record(
            f"a.json[{at}]", (Turn("user", (A, "x")), Turn("assistant", ("y",)), Turn("user", ("z", B)), Turn("assistant", ("y",)))
        )
        for at in range(400)
    ]
    sides = [position_of(placed(of, "both")) for of in records]
    assert set(sides) == {"first", "last"} and 160 < sides.count("last") < 240 and {position_of(of) for of in records} == {"mixed"}
    assert sides == [position_of(placed(placed(of, "last"), "both")) for of in records]


def test_what_is_taught_is_what_transformers_template_makes_of_the_moved_turn(talk, pictures):
    files = iter(["a.png", "b.png", "c.jpg", "a.png", "b.png", "c.jpg"])
    meta = talk(
        ["<image>\nHow many?", "7", "<image>And here?\n", "8"], ["Which of both?<image><image>", "The first."],
        ["<image>See <image> this", "No."], ["Hello", "Hi."],
    )  # fmt: skip
    entries = json.loads(meta.read_text())
    for entry in entries[:3]:
        entry["images"] = [next(files) for turn in entry["conversations"] for _ in range(turn["value"].count("<image>"))]
    meta.write_text(json.dumps(entries))
    processor, image = AutoProcessor.from_pretrained(TINY), {"type": "image"}

    def ids(*talk):
        """What transformers makes of turns, the user's and the assistant's in turn: parts, texts."""
        roles = ("user", "assistant") * 2
        messages = [
            {"role": role, "content": [part if isinstance(part, dict) else {"type": "text", "text": part} for part in parts]}
            for role, parts in zip(roles, talk, strict=False)
        ]
        return processor.tokenizer(processor.apply_chat_template(messages, tokenize=False)).input_ids

    first = [ids([image, "How many?"], ["7"], [image, "And here?\n"], ["8"]), ids([image, image, "Which of both?"], ["The first."])]
    last = [ids(["How many?", image], ["7"], ["And here?\n", image], ["8"]), ids(["Which of both?", image, image], ["The first."])]
    kept = [ids([image, "See ", image, " this"], ["No."]), ids(["Hello"], ["Hi."])]

    def taught(position):
        known = config(meta.parent, train_meta_file=meta, train_data_dir=meta.parent, media_position=position)
        prepared = prepare(known)
        return [script.ids for script in map(prepared.scripts.__getitem__, range(4))], prepared.summary(known)["media_position"]

    assert taught("first") == ([*first, *kept], {"first": 2, "last": 0, "mixed": 1, "moved": 1})
    assert taught("last") == ([*last, *kept], {"first": 0, "last": 2, "mixed": 1, "moved": 1})
    assert taught("as_written") == ([first[0], last[1], *kept], {"first": 1, "last": 1, "mixed": 1, "moved": 0})
    both, counts = taught("both")
    assert (
        all(own in sides for own, *sides in zip(both[:2], first, last, strict=True))
        and both[2:] == kept
        and counts["first"] + counts["last"] == 2
    )


def test_a_check_counts_what_a_run_moves_and_an_evaluation_asks_as_written(talk, pictures, tmp_path, capsys):
    meta = talk(["<img>a.png</img>How many?", "7"], ["<img>b.png</img>How many?", "8"], ["Which?<img>c.jpg</img>", "9"])
    (tmp_path / "config.yaml").write_text(f"model: {TINY}\ntrain_meta_file: {meta}\noutput_dir: o\nmedia_position: last\n")
    said = []
    for more in (["--json"], []):
        with pytest.raises(SystemExit) as done:
            main(["validate-meta", str(meta), "--config", str(tmp_path / "config.yaml"), *more])
        assert not done.value.code
        said.append(capsys.readouterr().out)
    assert json.loads(said[0])["media_position"] == {"first": 0, "last": 3, "mixed": 0, "moved": 2}
    assert "after it in 3 of the records read; media_position moved those of 2" in " ".join(said[1].split())
    last = Reading(media_position="last")
    moved, (written, *_) = read_records(meta, reading=last).records, _records(meta, None, last, None)
    assert [[type(part) for part in of.turns[0].parts] for of in moved] == [[str, Picture]] * 3
    assert [type(of.turns[0].parts[0]) for of in written] == [Picture, Picture, str]
    with pytest.raises(SystemExit) as done:
        main(["convert", str(meta), str(tmp_path / "out.jsonl"), "--config", str(tmp_path / "config.yaml")])
    assert not done.value.code
    assert [position_of(of) for of in read_records(tmp_path / "out.jsonl").records] == ["first", "first", "last"]


def test_ask_has_the_media_where_the_run_had_them(tmp_path, monkeypatch):
    """The Try page does by the same function."""
    asked = []
    monkeypatch.setattr("qwenvl_ft.infer.engine.check_folders", lambda *of: None)  # the runs hold settings only
    monkeypatch.setattr(Engine, "open", lambda *of, **named: Engine(None, None, open_chat(TINY)))
    monkeypatch.setattr(
        Engine, "stream", lambda engine, talk, *of, **named: asked.append([type(part) for part in talk[0].parts]) or []
    )
    for position, first in (("last", str), ("both", Picture), ("as_written", Picture)):
        run = tmp_path / position
        run.mkdir()
        (run / "config.yaml").write_text(f"media_position: {position}\n")
        with pytest.raises(SystemExit) as done:
            main(["ask", str(TINY), "--adapter", str(run), "--image", str(CHARTS[0]), "How many?"])
        assert not done.value.code and asked[-1][0] is first and len(asked[-1]) == 2
    merged = tmp_path / "merged"  # as export leaves it of the first
    merged.mkdir()
    (merged / "reading.json").write_text('{"media_position": "last"}')
    with pytest.raises(SystemExit):
        main(["ask", str(merged), "--image", str(CHARTS[0]), "How many?"])
    assert asked[-1][0] is str


def test_what_runs_say_of_boxes_is_checked_and_they_must_agree(tmp_path):
    def runs(**texts):
        for name, text in texts.items():
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "config.yaml").write_text(text)
        return [(TINY, None), *((TINY, tmp_path / name) for name in texts)]

    assert own_reading(runs(a="boxes: pixels\n", b="boxes:\n", c="boxes: pixels\n")).boxes == "pixels"
    apart = runs(a="boxes: pixels\n", b="boxes: thousand\n")
    with pytest.raises(UserError, match=r"boxes: are pixels in .*a/config.yaml and thousand in .*b/config.yaml"):
        own_reading(apart)
    assert own_reading(apart, "unit").boxes == "unit"
    for text, said in (
        ("boxes: foo\n", "is 'foo'"),
        ("boxes: [pixels]\n", "is \\['pixels'\\]"),
        ("boxes: [\n", "config.yaml:"),
        ("", "holds no settings"),
    ):
        with pytest.raises(UserError, match=said):
            own_reading(runs(a=text))
    (tmp_path / "settings.yaml").write_text("model: m\ntrain_meta_file: t\noutput_dir: o\n")
    own = own_reading(runs(a="boxes: pixels\n"))
    assert read_reading(tmp_path / "settings.yaml", False, own=own).boxes == "pixels", "a config that does not say it"


def test_a_record_with_its_text_first_is_still_the_same_record():
    """A question of evaluation that is trained on the other way round has leaked all the same."""
    own = record(A, "How many?")
    assert hash_of(own) == hash_of(placed(own, "last")) != hash_of(record(A, "How much?"))
