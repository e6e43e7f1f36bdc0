"""`qwenvl-ft convert`: the documented form of what was read gives the same ids, labels and grids, or is refused in words."""

import json
from pathlib import Path

import pytest
from PIL import Image

from qwenvl_ft.cli.main import main
from qwenvl_ft.data.chat import open_chat
from qwenvl_ft.data.convert import convert
from qwenvl_ft.data.meta_file import read_records
from qwenvl_ft.data.records import Box
from qwenvl_ft.errors import UserError
from tests.conftest import TINY
from tests.data.form_cases import EVERY, QUESTION, SAME, documented, messages, text


@pytest.fixture
def folder(tmp_path) -> Path:
    """a.png and b.png, and a folder of three frames."""
    (tmp_path / "frames").mkdir()
    for name, size in (("a.png", (50, 40)), ("b.png", (90, 60)), *((f"frames/{i}.png", (56, 56)) for i in range(4))):
        Image.new("RGB", size).save(tmp_path / name)
    return tmp_path


def write(folder: Path, entries: list) -> Path:
    (folder / "in.json").write_text(json.dumps(entries))
    return folder / "in.json"


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_what_is_converted_gives_the_same_ids_labels_and_grids(suffix, folder):
    chat = open_chat(TINY)
    masked = {"messages": [*messages("q"), {"role": "assistant", "content": "a", "reasoning_content": "hm", "weight": 0},
                           *messages("\nwhy?", "so\n")]}  # fmt: skip
    entries = [*SAME.values(), masked, documented("<img>a.png</img>\n\nand <img>b.png</img> \n<img>a.png</img>", "x"),
               {"messages": messages([{"type": "image", "image": "a.png"}, text("\nq")], "a")}]  # fmt: skip
    source = write(folder, entries)
    tally = convert(source, folder / f"out{suffix}")
    (records, *_), (again, problems, total) = read_records(source), read_records(folder / f"out{suffix}")
    assert not problems and total == len(entries) == tally.num_records
    for record, other in zip(records, again, strict=True):
        wanted, found = ([(of.ids, of.labels, of.grids) for of in chat.write_scripts(one)] for one in (record, other))
        assert wanted == found and record.turns == other.turns
    lines = (folder / f"out{suffix}").read_text().splitlines()
    assert len(lines) == len(entries) + 2 * (suffix == ".json")
    assert all("conversations" in entry for entry in (map(json.loads, lines) if suffix == ".jsonl" else json.loads("".join(lines))))


@pytest.mark.parametrize("name", [name for name, entry in EVERY.items() if "tools" in entry and entry["tools"] != "[]"])
def test_tools_and_their_calls_are_carried(name, folder):
    source = write(folder, [EVERY[name]])
    convert(source, folder / "out.jsonl")
    (record,), (again,) = read_records(source).records, read_records(folder / "out.jsonl").records
    assert (again.turns, again.tools) == (record.turns, record.tools) and record.tools


@pytest.mark.parametrize("key", ["conversations", "messages"])
def test_how_a_record_is_scored_is_read_and_carried(key, folder):
    talk = documented("q", "a")["conversations"] if key == "conversations" else messages("q", "a")
    source = write(folder, [{key: talk, "metric": "anls"}, {key: talk, "metric": None}])
    convert(source, folder / "out.jsonl")
    assert [of.metric for path in (source, folder / "out.jsonl") for of in read_records(path).records] == ["anls", ""] * 2
    (problem,) = read_records(write(folder, [{key: talk, "metric": 3}])).problems
    assert problem.where == "in.json[0].metric" and "not a text" in problem.what


def test_a_folder_of_frames_is_carried(folder):
    entry = {"messages": messages(f"<video>\n{QUESTION}", "a"), "videos": [[f"frames/{i}.png" for i in range(4)]]}
    source = write(folder, [entry])
    convert(source, folder / "out.jsonl")
    assert "<video>frames</video>" in (folder / "out.jsonl").read_text()
    (record,), (again,) = read_records(source).records, read_records(folder / "out.jsonl").records
    assert record.turns == again.turns and record.media[0].kind == "video"


@pytest.mark.parametrize(("content", "what"), [
    ([{"type": "image", "image": "a.png", "max_pixels": 5000}, text("q")], "is another record once it is read in the documented form"),
    ([{"type": "video", "video": [f"frames/{i}.png" for i in range(4)], "fps": 1}], "is another record"),
    ([{"type": "video", "video": [f"frames/{i}.png" for i in range(2)]}], "is another record"),
])  # fmt: skip
def test_what_cannot_be_carried_is_said_and_nothing_is_written(content, what, folder):
    with pytest.raises(UserError) as error:
        convert(write(folder, [{"messages": messages(content, "a")}]), folder / "out.jsonl")
    (problem,) = error.value.problems
    assert problem.where == "in.json[0]" and problem.what.startswith(what)
    assert {path.name for path in folder.iterdir()} == {"a.png", "b.png", "frames", "in.json"}


def test_a_picture_within_a_tar_cannot_be_named(folder):
    import tarfile

    with tarfile.open(folder / "in.tar", "w") as tar:
        tar.add(folder / "a.png", "0.png")
        (folder / "0.txt").write_text("Red.")
        tar.add(folder / "0.txt", "0.txt")
    with pytest.raises(UserError) as error:
        convert(folder / "in.tar", folder / "out.jsonl")
    assert [problem.what for problem in error.value.problems] == ["0.png lies inside in.tar"]


def test_a_bad_record_or_a_bad_name_stops_it(folder, capsys):
    good, bad = documented("q", "a"), documented("q", "a", more=1)
    for entries, out, what in (([good, bad], "out.jsonl", 'has a key "more"'), ([good], "out.csv", "is named as no meta-file"),
                               ([good], "in.json", "is there already"), ([good], "no/out.json", "is not a folder")):  # fmt: skip
        with pytest.raises(SystemExit) as exit:
            main(["convert", str(write(folder, entries)), str(folder / out)])
        assert exit.value.code == 1 and what in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit:
        main(["convert", str(write(folder, [good, good])), str(folder / "out.json")])
    assert exit.value.code == 0
    assert capsys.readouterr().out.split(": ")[1] == "2 records, read as documented 2\n"


def test_boxes_are_carried_within_a_thousandth_of_a_px_or_refused(folder):
    source = write(folder, [EVERY["boxes"]])
    try:
        convert(source, folder / "out.jsonl")
    except UserError as error:
        assert [problem.what for problem in error.problems] == ["is another record once it is read in the documented form"]
        return
    (record,), (again,) = read_records(source).records, read_records(folder / "out.jsonl").records
    (box,), (other,) = ([part for part in of.turns[1].parts if isinstance(part, Box)] for of in (record, again))
    assert other.corners == pytest.approx(box.corners, abs=1e-3) and other.label == box.label == "cat"
