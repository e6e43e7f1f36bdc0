"""Files that are no meta-file, through the real command line: exit code 1 and a way out, never a traceback."""

import json

import pytest
from PIL import Image

from qwenvl_ft.cli.main import main

TURNS = '{"from": "user", "value": "<img>a.png</img>q"}, {"from": "assistant", "value": "a"}'
GOOD = '{"conversations": [' + TURNS + "]}"


def record(text: str) -> bytes:
    """A meta-file of one record, whose conversation is this JSON."""
    return b'[{"conversations": %s}]' % text.encode("utf-8", "surrogatepass")


MALFORMED = {
    "nothing": b"",
    "white space": b" \n\t\r\n",
    "only a byte order mark": b"\xef\xbb\xbf",
    "null": b"null",
    "a list of null": b"[null]",
    "a list of texts": b'["x"]',
    "a list of lists of lists": f"[[[{GOOD}]]]".encode(),
    "a list of numbers": b"[1, 2.5, -3e9]",
    "an empty list": b"[]",
    "an empty object": b"{}",
    "a number": b"12",
    "a number of 5,000 digits": b"[" + b"1" * 5000 + b"]",
    "a text": b'"train.json"',
    "NaN": b'[{"conversations": NaN}]',
    "minus infinity": b"[-Infinity]",
    "a dict of records": b'{\n "train": [%s]\n}' % GOOD.encode(),
    "cut off": f"[{GOOD}, {GOOD[:40]}".encode(),
    "cut off inside a character": f'[{GOOD}, {{"a": "图'.encode()[:-1],
    "a trailing comma": f"[{GOOD},]".encode(),
    "no commas between records": f"[{GOOD} {GOOD}]".encode(),
    "two arrays": f"[{GOOD}]\n[{GOOD}]".encode(),
    "comments": f"// records\n[{GOOD}]".encode(),
    "single quotes": b"[{'conversations': []}]",
    "Python": b"[{'conversations': None}]",
    "GBK": f"[{GOOD}]".replace("q", "问").encode("gbk"),
    "UTF-16": f"[{GOOD}]".encode("utf-16"),
    "UTF-32": f"[{GOOD}]".encode("utf-32"),
    "a surrogate in UTF-8": record("[" + TURNS.replace("q", "\ud83d") + "]"),
    "a surrogate escape": record("[" + TURNS.replace("q", "\\ud83d") + "]"),
    "a surrogate as a role": record("[" + TURNS.replace("assistant", "\\ud83d") + "]"),
    "a surrogate in a file name": record("[" + TURNS.replace("a.png", "\\ud83d.png") + "]"),
    "a surrogate key twice": b'[{"\\ud83d": 1, "\\ud83d": 2}]',
    "a NUL": f"[{GOOD}]".replace("q", "\0").encode(),
    "a NUL in a file name": record("[" + TURNS.replace("a.png", "\\u0000.png") + "]"),
    "a file name of 10,000 letters": record("[" + TURNS.replace("a.png", "a" * 10_000) + "]"),
    "zeros": bytes(1000),
    "a key twice": b'[{"conversations": [], "conversations": [%s]}]' % TURNS.encode(),
    "100,000 lists deep": b"[" * 100_000 + b"]" * 100_000,
    "100,000 objects deep": b'{"a":' * 100_000,
    "HTML": b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>",
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "a picture": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\1\0\0\0\1\x08\2\0\0\0\x90wS\xde",
    "CSV": b"image,question,answer\na.png,q,a\n",
    "broken JSON lines": f"{GOOD}\n{GOOD[:-1]}\n".encode(),
    "a key in capitals": f"[{GOOD}]".replace("conversations", "Conversations").encode(),
    "LLaMA-Factory's messages": b'[{"messages": [{"role": "user", "content": "q"}], "images": ["a.png"]}]',
    "roles and values": record('[{"role": "user", "value": "q"}, {"role": "assistant", "value": "a"}]'),
    "conversations null": record("null"),
    "conversations a text": record('"q"'),
    "no turns": record("[]"),
    "empty turns": record("[{}, {}]"),
    "values of wrong types": record('[{"from": ["user"], "value": {"text": "q"}}, {"from": null, "value": 16}]'),
    "only a system turn": record('[{"from": "system", "value": "s"}]'),
    "only a question": record('[{"from": "user", "value": "q"}]'),
    "ends with a question": record(f'[{TURNS}, {{"from": "user", "value": "q"}}]'),
    "starts with an answer": record('[{"from": "assistant", "value": "a"}]'),
    "an unknown role": record('[{"from": "user", "value": "q"}, {"from": "tool", "value": "a"}]'),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_ends_in_problems_and_never_in_a_traceback(name, tmp_path, capsys):
    Image.new("RGB", (50, 40)).save(tmp_path / "a.png")
    file = tmp_path / "train.json"
    file.write_bytes(MALFORMED[name])
    arguments = ["validate-meta", str(file), "--data-dir", str(tmp_path)]

    with pytest.raises(SystemExit) as exit:
        main([*arguments, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert exit.value.code == 1
    assert list(report) == [
        "files",
        "forms",
        "media_position",
        "records",
        "used",
        "pictures",
        "shown",
        "tokens",
        "notes",
        "checks",
        "problems",
    ]
    assert report["used"] <= report["records"]
    assert report["problems"] and all(problem[key] for problem in report["problems"] for key in ("where", "what", "fix"))

    with pytest.raises(SystemExit) as exit:
        main(arguments)
    said = capsys.readouterr().err
    assert exit.value.code == 1
    assert said.count("\n  fix: ") == len(report["problems"])
    assert "Traceback" not in said


def test_a_good_file_beside_them_passes(tmp_path, capsys):
    Image.new("RGB", (50, 40)).save(tmp_path / "a.png")
    (tmp_path / "train.json").write_text(f"[{GOOD}]")
    with pytest.raises(SystemExit) as exit:
        main(["validate-meta", str(tmp_path / "train.json"), "--data-dir", str(tmp_path), "--json"])
    file = {"meta": str(tmp_path / "train.json"), "weight": 1, "containers": {"JSON": 1}, "records": 1, "used": 1}
    sides = {"media_position": {"first": 1, "last": 0, "mixed": 0, "moved": 0}}
    wanted = {
        "files": [file],
        "forms": {"documented": 1},
        **sides,
        "records": 1,
        "used": 1,
        "pictures": 1,
        "shown": 1,
        "tokens": None,
    }
    assert (exit.value.code, json.loads(capsys.readouterr().out)) == (0, wanted | {"notes": [], "checks": {}, "problems": []})
