"""Pictures that break only when they are decoded: `validate-meta --deep` names them all."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwenvl_ft.cli.main import main
from qwenvl_ft.data.deep import decode_all
from qwenvl_ft.data.meta_file import read_records

# What Pillow decodes to the end of its data, and then stops.
CUT = ["a.bmp", "a.gif", "a.tif", "a.ppm", "a.jp2", "a.avif"]


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8))


def bad_png(path: Path) -> None:
    """One whose data has another check sum than it says; its header and its end are whole."""
    noise().save(path)
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 2000] ^= 1
    path.write_bytes(content)


def meta(folder: Path, *talks: list[str]) -> Path:
    """A meta-file of records that each show these pictures."""
    records = [
        {"conversations": [{"from": "user", "value": "".join(f"<img>{name}</img>\n" for name in names) + "q"},
                           {"from": "assistant", "value": "a"}]} for names in talks
    ]  # fmt: skip
    (folder / "train.json").write_text(json.dumps(records))
    return folder / "train.json"


def test_deep_names_every_picture_that_breaks_when_it_is_decoded(tmp_path):
    """validate-meta called them good, and training stopped in the middle."""
    for name in CUT:
        noise().save(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: int(len(content) * 0.99)])
    bad_png(tmp_path / "a.png")
    noise().save(tmp_path / "good.png")
    names = [*CUT, "a.png"]
    file = meta(tmp_path, *([name] for name in names), ["good.png"], ["good.png", "a.png", "good.png", "a.png"])
    records, problems, _ = read_records(file, tmp_path)
    assert problems == [] and len(records) == len(names) + 2
    calls: list[tuple[int, int]] = []
    found = decode_all(records, lambda *call: calls.append(call))
    broken = [(f"train.json[{number}]", name) for number, name in enumerate(names)] + [(f"train.json[{len(names) + 1}]", "a.png")]
    assert [(problem.where, problem.what.split()[0]) for problem in found] == broken
    assert all("breaks while it is decoded" in problem.what and problem.fix for problem in found)
    assert calls == [(number, len(names) + 1) for number in range(1, len(names) + 2)]


def test_validate_meta_decodes_when_it_is_asked_to(tmp_path, capsys):
    bad_png(tmp_path / "a.png")
    noise().save(tmp_path / "good.png")
    file = meta(tmp_path, ["good.png"], ["a.png"])
    reports = []
    for options in ([], ["--deep"]):
        with pytest.raises(SystemExit) as exit:
            main(["validate-meta", str(file), "--data-dir", str(tmp_path), "--json", *options])
        reports.append((exit.value.code, json.loads(capsys.readouterr().out)))
    assert [(code, report["used"], len(report["problems"])) for code, report in reports] == [(0, 2, 0), (1, 1, 1)]
    assert reports[1][1]["problems"][0]["where"] == "train.json[1]"
