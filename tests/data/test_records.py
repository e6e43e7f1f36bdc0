"""What the reader makes of a meta-file, and every complaint it has, word for word."""

import json
import time
from pathlib import Path

import pytest
from PIL import Image

from qwenvl_ft.data import media
from qwenvl_ft.data.formats.json_entries import EXAMPLE
from qwenvl_ft.data.meta_file import read_records
from qwenvl_ft.data.notes import Noted
from qwenvl_ft.data.records import Picture, Turn
from qwenvl_ft.errors import Problem, alike

TURN = 'write {"from": "user", "value": "..."}'
TAG = "write <img>file.png</img>"
LIST = f"write a JSON list of records: [{EXAMPLE}]"
ORDER = "let user and assistant take turns, user first"
COPY = "copy it there, or give the right folder (train_data_dir, --data-dir)"
TOOL = 'write {"type": "function", "function": {"name": "...", "description": "...", "parameters": {...}}}'
MEND = "mend the file at this line and column"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Holds a.png, 50 x 40 px, and an empty folder b."""
    Image.new("RGB", (50, 40)).save(tmp_path / "a.png")
    (tmp_path / "b").mkdir()
    return tmp_path


def talk(*texts: str, roles: tuple[str, ...] = ("user", "assistant")) -> dict:
    """A record whose turns take the roles in a circle."""
    return {"conversations": [{"from": roles[i % len(roles)], "value": text} for i, text in enumerate(texts)]}


def read(folder: Path, content: object, name: str = "train.json"):
    """(records, problems) of a meta-file of these bytes, this text or this value."""
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
    (folder / name).write_bytes(content)
    return read_records(folder / name, folder)[:2]


def parts_of(folder: Path, value: str):
    """The parts of a user's turn; a picture as its file's name."""
    (record,), problems = read(folder, [talk(value, "ok")])
    assert not problems
    return [part.name if isinstance(part, Picture) else part for part in record.turns[0].parts]


FILES = [
    (b"\xb5\xc4[]", ":1:1", "is not UTF-8 text (GBK or UTF-16, perhaps)", "save the file as UTF-8"),
    (b"[\n\n\xff]", ":3:1", "is not UTF-8 text (GBK or UTF-16, perhaps)", "save the file as UTF-8"),
    (" \n", "", "is empty", LIST),
    ("[\n {]", ":2:3", "is not JSON: expecting property name enclosed in double quotes", MEND),
    ("7", "", "holds a number, not a list", LIST),
    ("null", "", "holds null, not a list", LIST),
    ("[]", "", "holds no records", LIST),
    ('{\n"conversations": []\n}', "", "holds an object, not a list", "put [ before it and ] after it"),
    ('{"data": [{"conversations": []}]}', "", 'its list of records is under "data"', "save that list alone as the file"),
    (
        '{"v": 1,\n "train": [{"conversations": []}]}',
        "",
        'its list of records is under "train"',
        "save that list alone as the file",
    ),
    ('[{"a": 1, "a": 2}]', "", 'an object has the key "a" twice', "keep one of them, or make two records"),
    ('{"a": 1, "a": 2}', ":1", 'an object has the key "a" twice', "keep one of them, or make two records"),
    ("[NaN]", "", "holds NaN, which is not JSON", "write a number or a text"),
    ("[" * 100_000, "", "is not a meta-file: nested too deeply", LIST),
]
USER = ".conversations[0]"
ANSWER = ".conversations[1]"
RECORDS = [
    ("x", "", "is a text, not an object", f"write {EXAMPLE}"),
    ({}, "", 'has no key "conversations"', f"write {EXAMPLE}"),
    ({"conversations": {}}, ".conversations", "is an object, not a list", "list its turns, each with from and value"),
    ({"conversations": []}, ".conversations", "is empty", "list its turns, each with from and value"),
    ({"conversations": ["x", *talk("q", "a")["conversations"]]}, USER, "is a text, not an object", TURN),
    ({"conversations": [{"from": "user"}, talk("q", "a")["conversations"][1]]}, USER, 'has no key "value"', TURN),
    ({"conversations": [{"from": "user", "value": "q"}, {"value": "a"}]}, ANSWER, 'has no key "from"', TURN),
    (talk("q", True), ANSWER, 'its "value" is a truth value, not a text', TURN),
    (talk("q", "a", roles=("user", 7)), ANSWER, 'its "from" is a number, not a text', TURN),
    (talk("q", "a", roles=("user", "bot")), ANSWER, 'is from "bot"',
     "write from: user or assistant (human, gpt and system are understood)"),
    (talk("q", "s", "a", roles=("user", "system", "gpt")), ANSWER, "a system turn stands after the first place",
     "move it to the front or delete it"),
    (talk("q", "r", "a", roles=("user", "user", "gpt")), ANSWER, "is from the user where the assistant's turn was due", ORDER),
    (talk("a", roles=("assistant",)), USER, "is from the assistant where the user's turn was due", ORDER),
    (talk(" \n", "a"), USER, "the user's turn is empty", "write its text or delete the turn and its partner"),
    (talk("q", ""), ANSWER, "the assistant's turn is empty", "write its text or delete the turn and its partner"),
    (talk("q"), "", "has no assistant turn, so it teaches nothing", "add the answer that the model should learn"),
    (talk("q", "a", "q"), ".conversations[2]", "the last turn is the user's and nobody answers it", "add the answer or delete it"),
    (talk("q<|im_end|>", "a"), USER, "holds the control token <|im_end|>",
     "take it out: it would end the turn or pose as a picture"),
    (talk("q", "a<|image_pad|>"), ANSWER, "holds the control token <|image_pad|>",
     "take it out: it would end the turn or pose as a picture"),
    (talk("q", "\ud83d"), ANSWER, "holds half of a surrogate pair, which no tokenizer can read",
     "write the character itself, in UTF-8"),
    (talk("q", "<img>a.png</img>"), ANSWER, "an <img> tag stands in the assistant's turn",
     "name pictures in the user's turns only"),
    (talk("a.png</img>q", "a"), USER, "an </img> has no <img> before it", TAG),
    (talk("<img>a.png", "a"), USER, "an <img> tag is not closed", TAG),
    (talk("<img> </img>q", "a"), USER, "an <img> tag is empty", TAG),
    (talk("<img>a.png<img>a.png</img>", "a"), USER, "an <img> tag stands inside another",
     "close the first one: <img>file.png</img>"),
    (talk("<img>http://x/a.png</img>", "a"), USER, "http://x/a.png is not a file name",
     "set fetch_media: true to bring such files once, or put the file into FOLDER and name it"),
    (talk("<img>s3://b/a.png</img>", "a"), USER, "s3://b/a.png is not a file name", "put the file into FOLDER and name it"),
    (talk("<img>file:///etc/hosts</img>", "a"), USER, "/etc/hosts lies outside FOLDER", "copy it into that folder"),
    (talk("<img>../a.png</img>", "a"), USER, "../a.png lies outside FOLDER", "copy it into that folder"),
    (talk("<img>/etc/hosts</img>", "a"), USER, "/etc/hosts lies outside FOLDER", "copy it into that folder"),
    (talk("<img>a.jpg</img>", "a"), USER, "a.jpg is not in FOLDER", "did you mean a.png?"),
    (talk("<img>zzz</img>", "a"), USER, "zzz is not in FOLDER", COPY),
    (talk("<img>\0</img>", "a"), USER, "\0 is not in FOLDER", COPY),
    (talk("<img>nope.png</img>", "a"), USER, "nope.png is not in FOLDER", COPY),
    (talk("<image>\nq", "a"), USER, "holds <image>, which is no tag here: it would be read as text", TAG),
    (talk("q<video>", "a"), USER, "holds <video>, which is no tag here: it would be read as text",
     "write <video>clip.mp4</video>"),
    (talk("<Audio>q", "a"), USER, "holds <Audio>, which is no tag here: it would be read as text",
     "sound is not trained on: leave the record out, or take the tag out if the talk needs none"),
    (talk("<IMG>a.png</IMG>q", "a"), USER, "holds <IMG>, which is no tag here: it would be read as text", TAG),
    (talk("<img>a.png</img><Img>a.png</Img>", "a"), USER, "holds <Img>, which is no tag here: it would be read as text", TAG),
    (talk("<image>a.png</image>q", "a") | {"image": "a.png"}, USER, "holds </image>, which is no tag here: it would be read as text", TAG),
    (talk("<img>b</img>", "a"), USER, "b is not a regular file", "name a picture file"),
    (talk("q", "a") | {"image": "a.png"}, "", "holds 0 <image> and names 1 picture",
     "write <image> once for each picture, where it is seen"),
    (talk("<image>q", "a") | {"images": ["a.png", "a.png"]}, "", "holds 1 <image> and names 2 pictures",
     "write <image> once for each picture, where it is seen"),
    (talk("q", "a<image>") | {"image": "a.png"}, ANSWER, "<image> stands in the assistant's turn",
     "show pictures and videos in the user's turns only"),
    (talk("q", "a") | {"videos": ["a.mp4"]}, "", "holds 0 <video> and names 1 video",
     "write <video> once for each video, where it is seen"),
    (talk("q", "a") | {"system": 0}, ".system", "is a number, not a text", "write a text"),
    (talk("q", "a") | {"tools": 0}, ".tools", "is a number, not an object or a list", TOOL),
    (talk("q", "a") | {"audio": "a.mp3"}, "", 'has a key "audio", which is not read',
     "sound is not trained on: leave the record out, or delete the key if the talk needs none"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "where", "what", "fix"), FILES, ids=[row[2] + row[1] for row in FILES])
def test_a_broken_file_is_one_problem_and_no_records(content, where, what, fix, folder):
    assert read(folder, content) == ([], [Problem(f"train.json{where}", what, fix)])


@pytest.mark.parametrize(("entry", "where", "what", "fix"), RECORDS, ids=[row[2] for row in RECORDS])
def test_a_broken_record_is_one_problem_and_its_neighbours_are_kept(entry, where, what, fix, folder):
    records, problems = read(folder, [talk("q", "a"), entry, talk("q", "a")])
    what, fix = (text.replace("FOLDER", str(folder)) for text in (what, fix))
    assert problems == [Problem(f"train.json[1]{where}", what, fix)]
    assert [record.where for record in records] == ["train.json[0]", "train.json[2]"]


def test_a_missing_meta_file_and_a_missing_folder_are_named(folder):
    no_file, no_folder = folder / "no.json", folder / "no"
    (folder / "train.json").write_text(json.dumps([talk("q", "a")]))
    fix = "give the JSON file of conversations (a config's train_meta_file)"
    assert read_records(no_file, folder) == ([], [Problem(str(no_file), "is not there", fix)], 0)
    fix = "give the folder of the pictures (train_data_dir, --data-dir)"
    assert read_records(folder / "train.json", no_folder) == ([], [Problem(str(no_folder), "is not a folder", fix)], 1)


def test_all_problems_of_a_file_come_at_once(folder):
    bad = talk("<img>x</img><img>y</img>", "", "<|im_end|>", "</img>")
    records, problems = read(folder, [bad, None, talk("<img>a.png</img>q", "a"), talk("q")])
    places = [0, 0, 1, 2, 3]
    assert [problem.where for problem in problems] == [f"train.json[0].conversations[{i}]" for i in places] + [
        "train.json[1]",
        "train.json[3]",
    ]
    assert [record.where for record in records] == ["train.json[2]"]


def test_a_folder_with_none_of_the_pictures_is_one_problem_and_its_records_are_counted(folder):
    """A wrong --data-dir printed the same two lines for each of 115 pictures."""
    entries = [talk(f"<img>b/{i}.png</img>q", "a") for i in range(115)] + [talk("q", "a"), talk("q")]
    records, problems = read(folder, entries)
    assert read_records(folder / "train.json", folder).num_records == 117
    asked = "is it the right folder (train_data_dir, --data-dir)?"
    assert problems[0] == Problem(str(folder), "none of the 115 pictures is in this folder, b/0.png for one", asked)
    assert [problem.where for problem in problems[1:]] == ["train.json[116]"] and len(records) == 1
    _, problems = read(folder, [talk("<img>x/a.png</img>q", "a"), talk("<img>x/c.png</img>q", "a")])
    assert [problem.fix for problem in problems] == [f"{asked} For that one: did you mean a.png?"]


def test_a_picture_that_is_there_and_broken_speaks_for_the_folder(folder):
    (folder / "broken.png").write_bytes(b"")
    _, problems = read(folder, [talk(f"<img>{name}</img>q", "a") for name in ("zzz", "yyy", "broken.png")])
    assert [problem.where for problem in problems] == [f"train.json[{i}].conversations[0]" for i in range(3)]


def test_an_answer_may_write_what_a_question_may_not(folder):
    (record,), problems = read(folder, [talk("draw it", "<image><video><IMG>a.png</IMG>")])
    assert not problems and record.turns[1].parts == ("<image><video><IMG>a.png</IMG>",)


def test_problems_come_in_the_same_order_every_time(folder):
    """The keys of a record were looked through as a set: another order in every process."""
    _, problems = read(folder, [talk("q", "a") | dict.fromkeys(("rejected", "audio", "zz", "img", "weight"), "")])
    assert [problem.what.split('"')[1] for problem in problems] == ["img", "audio", "rejected", "weight", "zz"]


def test_a_missing_picture_alone_in_its_turn_is_one_problem(folder):
    """Once it was two: the turn was called empty as well, because no part of it was left."""
    assert len(read(folder, [talk("<img>zzz</img>", "a")])[1]) == 1


def test_every_spelling_of_the_roles_is_read(folder):
    (record,), _ = read(folder, [talk("s", "q", "a", roles=("system", "human", "gpt"))])
    assert record.turns == (Turn("system", ("s",)), Turn("user", ("q",)), Turn("assistant", ("a",)))


def test_json_lines_and_a_byte_order_mark_are_read(folder):
    line = json.dumps(talk("q", "a"))
    records, problems = read(folder, f"\ufeff{line}\r\n\n{line}\n{{\n{line}", "train.jsonl")
    assert [record.where for record in records] == ["train.jsonl:1", "train.jsonl:3", "train.jsonl:5"]
    assert [problem.where for problem in problems] == ["train.jsonl:4"]
    assert read(folder, "\ufeff[" + line + "]")[0][0].where == "train.json[0]"


@pytest.mark.parametrize(("value", "parts"), [
    ("<img>a.png</img>\nq", ["a.png", "q"]),
    ("<img>a.png</img>\r\nq", ["a.png", "q"]),
    ("<img>a.png</img>\n\nq\n", ["a.png", "\nq\n"]),
    ("<img>a.png</img>\r\n\r\nq", ["a.png", "\r\nq"]),
    ("<img>a.png</img> \nq", ["a.png", " \nq"]),
    ("\n<img>a.png</img>", ["\n", "a.png"]),
    ("<img> a.png </img><img>a.png</img>\n", ["a.png", "a.png"]),
    (" p <img>a.png</img>\n q\t<img>a.png</img>r ", [" p ", "a.png", " q\t", "a.png", "r "]),
    ("a\u2028b  \n<IMAGES>", ["a\u2028b  \n<IMAGES>"]),
    ('<img src="a.png"><IMG SRC="a.png"/><video controls>', ['<img src="a.png"><IMG SRC="a.png"/><video controls>']),
    ("<|quad_start|>(1,2),(3,2),(3,4),(1,4)<|quad_end|><ref>a note</ref>",) * 2,
])  # fmt: skip
def test_a_tag_takes_one_newline_and_everything_else_stays(value, parts, folder):
    assert parts_of(folder, value) == ([parts] if isinstance(parts, str) else parts)


@pytest.mark.parametrize("value", ["<image></image>\nq", "<image>\nq"])
def test_a_placeholder_may_be_closed(value, folder):
    """`<image></image>`, as some write it, left its second half in the question."""
    (record,), _ = read(folder, [talk(value, "a") | {"image": "a.png"}])
    assert [part if isinstance(part, str) else part.name for part in record.turns[0].parts] == ["a.png", "q"]


def test_html_that_shows_a_picture_is_text_and_noted(folder):
    records, _ = read(folder, [talk('<IMG alt="x" src = "a.png">q', "a"), talk("q <img>a.png</img> src=", '<img src="a">')])
    assert len(records) == 2 and Noted(records).lines == [
        "1 question holds <img src=...>, which is text here: a picture is shown by <img>file.png</img> (train.json[0] for one)"
    ]


def test_a_picture_knows_its_file_and_its_size(folder):
    (record,), _ = read(folder, [talk("<img>b/../a.png</img>", "a")])
    assert record.pictures == [Picture(folder.resolve() / "a.png", height=40, width=50)]


def test_a_link_out_of_the_folder_is_refused(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "secret.png"
    Image.new("RGB", (50, 40)).save(outside)
    (folder / "link.png").symlink_to(outside)
    _, (problem,) = read(folder, [talk("<img>link.png</img>", "a")])
    assert problem.what == f"link.png lies outside {folder}"


@pytest.mark.parametrize(
    "value", ["<img>" * 200_000, "<img>" * 20_000 + "</img>", "</img>" * 200_000, "<img>" + "a" * 100_000 + "</img>"]
)
def test_hostile_tags_take_linear_time(value, folder):
    """`<img>(.*?)</img>` looks from every unclosed tag to the end of the text: 200,000 of them took minutes."""
    began = time.process_time()
    assert len(read(folder, [talk(value, "a")])[1]) == 1
    assert time.process_time() - began < 3


def test_a_folder_of_missing_pictures_is_not_compared_name_by_name_for_hours(folder, monkeypatch):
    """Each suggestion looks at every file: 100 missing pictures beside 5,000 took 24 s, 20,000 would have taken hours."""
    monkeypatch.setattr(media, "MAX_COMPARED", 6)  # the folder holds two files: a.png and the meta-file
    _, problems = read(folder, [talk("<img>a.png</img>q", "a"), *(talk(f"<img>a{i}.png</img>", "a") for i in range(5))])
    assert [problem.fix[:12] for problem in problems] == ["did you mean"] * 3 + ["copy it ther"] * 2


@pytest.mark.parametrize(("name", "meant"), [
    ("A.PNG", "a.png"), ("./images/a.png", "a.png"), ("a%2Epng", "a.png"), ("images\\a.png", "a.png"), ("x/IMAGES/A.png", "a.png"),
    ("pic_2.jpg", "pic_02.jpg"), ("pic_002.jpg", "pic_02.jpg"), ("x/cafe\u0301.png", "caf\u00e9.png"), ("deep.png", "sub/deep.png"),
    ("set/sub/deep.png", "sub/deep.png"), ("same.png", "same.PNG"),
])  # fmt: skip
def test_a_picture_in_another_spelling_is_told_which_it_is(name, meant, folder):
    """pic_2.jpg was told pic_29.jpg though pic_02.jpg was there, A.PNG to look for another folder."""
    (folder / "sub").mkdir()
    for file in ("pic_02.jpg", "pic_29.jpg", "caf\u00e9.png", "sub/deep.png", "sub/same.png", "same.PNG"):
        Image.new("RGB", (50, 40)).save(folder / file)
    _, problems = read(folder, [talk("<img>a.png</img>q", "a"), talk(f"<img>{name}</img>q", "a")])
    assert [problem.fix for problem in problems] == [f"did you mean {meant}?"]


def test_a_picture_with_another_number_is_not_what_was_meant(folder):
    for file in ("pic_29.jpg", "pic_20.jpg", "x/1.png", "y/1.png"):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(b"")
    _, problems = read(folder, [talk(f"<img>{name}</img>q", "a") for name in ("pic_2.jpg", "1.png")])
    assert all("did you mean" not in problem.fix for problem in problems)


def test_a_folder_whose_pictures_are_all_spelt_otherwise_is_the_right_one(folder):
    _, problems = read(folder, [talk(f"<img>{name}</img>q", "a") for name in ("A.PNG", "./images/a.png", "a%2Epng")])
    assert [(problem.where, problem.fix) for problem in problems] == [
        (f"train.json[{i}].conversations[0]", "did you mean a.png?") for i in range(3)
    ]


def test_missing_pictures_and_broken_ones_are_of_a_kind_each(folder):
    names = [f"{word}.jpg" for word in ("cat in hat", "dog", "a bird", "图", "fish", "is not in")]
    for name in names:
        (folder / f"broken {name}").write_bytes(b"")
    _, problems = read(folder, [talk(f"<img>{first}{name}</img>", "a") for name in names for first in ("nowhere ", "broken ")])
    assert sorted(group.count for group in alike(problems)) == [6, 6]


@pytest.mark.parametrize(("head", "what", "fix"), [
    (b"PAR1\x15\x04\xff", "is a damaged parquet file", "copy it again"),
    (b"ARROW1\0\0\xff", "is a damaged Arrow file", "copy it again"),
    (b"\xff\xff\xff\xff\x10", "is a damaged Arrow file", "copy it again"),
    (b"PK\x03\x04\x14", "is a zip archive", "unpack it"),
    (b"\x1f\x8b\x08", "is a gzip file", "unpack it"),
    (b"\0" * 257 + b"ustar", "is a damaged tar archive", "copy it again"),
    (b"\x89PNG\r\n\x1a\n", "is a picture", "give the file that names it"),
    (b"\xff\xd8\xff\xe0", "is a picture", "give the file that names it"),
    (b"\0\0\0\x18ftypheic", "is an HEIC photo", "give the JSON file of conversations"),
    (b"\x80\x04\x95", "is a pickle", "write its records as JSON, where it was made"),
    (b"version https://git-lfs.github.com/spec/v1\noid", "is a git-lfs pointer", "git lfs pull"),
    (b"\n<!DOCTYPE html><html>", "is an HTML page", "bring the file itself"),
    ('[{"a": 1}]'.encode("utf-16"), "is UTF-16 or UTF-32 text", "save the file as UTF-8"),
])  # fmt: skip
def test_a_file_of_another_kind_in_place_of_a_meta_file_is_named_as_what_it_is(head, what, fix, folder):
    """Parquet, a zip archive and a picture were told "save the file as UTF-8"."""
    records, (problem,) = read(folder, head)
    assert (records, problem.where) == ([], "train.json") and problem.what.startswith(what) and fix in problem.fix
