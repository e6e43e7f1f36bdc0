"""Broken containers end in problems, and odd pictures within them are read or refused as loose files of the same bytes are."""

import csv
import io
import json
import random
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from PIL import Image

from qwenvl_ft.data import pictures
from qwenvl_ft.data.meta_file import Tally, read_records
from qwenvl_ft.data.records import InTable, InTar, Source
from qwenvl_ft.errors import UserError

NUMBER = 8
CONTAINERS = ["a.json", "a.jsonl", "a.csv", "a.tar", "a.parquet", "b.parquet", "a.arrow", "b.arrow", "a.feather"]
MUTATIONS = 12  # of each container here; 2,700 were tried once when this was written


def encoded(kind: str, image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def whole(name: str, folder: Path) -> bytes:
    """A good file of that name with NUMBER records."""
    shown = [encoded("PNG" if at % 2 else "JPEG", Image.new("RGB", (30 + at, 20), (20 * at, 0, 0))) for at in range(NUMBER)]
    rows = [
        {"image": {"bytes": of, "path": f"{at}.png"}, "question": f"Which {at}?", "answer": "图"} for at, of in enumerate(shown)
    ]
    talks = [{"messages": [{"role": "user", "content": f"q {at}"}, {"role": "assistant", "content": "图"}]} for at in range(NUMBER)]
    table, file = pa.Table.from_pylist(rows), folder / "whole"
    match name:
        case "a.json":
            return json.dumps(talks, indent=1, ensure_ascii=False).encode()
        case "a.jsonl":
            return "\n".join(json.dumps(of, ensure_ascii=False) for of in talks).encode()
        case "a.csv":
            text = io.StringIO()
            csv.writer(text).writerows([["question", "answer"], *((f'q "{at}",\n', "图") for at in range(NUMBER))])
            return text.getvalue().encode()
        case "a.tar":
            with tarfile.open(file, "w") as tar:
                for at, content in enumerate(shown):
                    for ending, data in (("png", content), ("txt", b"is %d" % at)):
                        member = tarfile.TarInfo(f"{at}.{ending}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
        case "a.parquet":
            pq.write_table(table, file)
        case "b.parquet":
            pq.write_table(table, file, compression="none", use_dictionary=False, data_page_version="2.0", row_group_size=3)
        case "a.arrow" | "b.arrow":
            with (pa.ipc.new_stream if name == "a.arrow" else pa.ipc.new_file)(file, table.schema) as writer:
                writer.write_table(table)
        case "a.feather":
            pa.feather.write_feather(table, file)
    return file.read_bytes()


def mutated(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        at = draw.randrange(len(changed)) if changed else 0
        match draw.randrange(7):
            case 0:
                del changed[at:]
            case 1 if changed:
                changed[at] ^= 1 << draw.randrange(8)
            case 2 if changed:
                changed[at] = draw.choice((0, 255, 127, 128, 34, 44, 10))
            case 3:
                changed[at:at] = draw.randbytes(draw.randrange(1, 9))
            case 4:
                del changed[at : at + draw.randrange(1, 64)]
            case 5:
                changed += changed[at:]
            case _:
                changed[at : at + 8] = bytes(8)
    return bytes(changed)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", CONTAINERS)
def test_a_broken_file_ends_in_problems_and_in_no_wrong_count(name, tmp_path):
    content, draw = whole(name, tmp_path), random.Random(name)
    file = tmp_path / name
    file.write_bytes(content)
    records, problems, total = read_records(file)
    assert (len(records), problems, total) == (NUMBER, [], NUMBER)
    for _ in range(MUTATIONS):
        file.write_bytes(mutated(content, draw))
        tally = Tally()
        records, problems, total = read_records(file, tally=tally)
        assert total == tally.num_records and (problems or len(records) == total)
        assert all(problem.where and problem.what and problem.fix for problem in problems)
        for picture in (picture for record in records for picture in record.pictures):
            try:
                assert pictures.opened(picture).size == (picture.width, picture.height)
            except UserError as error:
                assert error.problems


def odd_pictures() -> dict[str, bytes]:
    """60 and more: formats, modes, turns, ends that are missing, bytes that fell over, things that are no picture."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    found = {f"{mode}.png": encoded("PNG", noise.convert(mode)) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")}
    found |= {f"{mode}.tif": encoded("TIFF", noise.convert(mode)) for mode in ("1", "L", "RGB", "RGBA", "CMYK", "I", "F", "LAB")}
    found["16.png"] = encoded("PNG", Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60) * 20))
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000"):
        content = encoded(kind, noise)
        found |= {f"whole.{kind}": content, f"cut.{kind}": content[: len(content) // 2], f"end.{kind}": content[:-3]}
        broken = bytearray(content)
        broken[len(content) // 2] ^= 0xFF
        found |= {f"broken.{kind}": bytes(broken), f"tail.{kind}": content + b"more"}
    for turn in (3, 6, 8):
        exif = Image.Exif()
        exif[0x0112] = turn
        found[f"turned{turn}.jpg"] = encoded("JPEG", noise, exif=exif)
    found["two.jpg"] = encoded("MPO", noise, save_all=True, append_images=[noise])
    found |= {"thin.png": encoded("PNG", Image.new("L", (2000, 2))), "one.png": encoded("PNG", Image.new("L", (1, 1)))}
    found |= {
        "empty.png": b"",
        "text.png": b"hello",
        "page.png": b"<!doctype html><html>",
        "lfs.png": b"version https://git-lfs.github.com/spec/v1",
    }
    return found


def seen(source: Source) -> object:
    """The size and the pixels, or what is said."""
    try:
        size = pictures.size_of(source, "here")
    except UserError as error:
        return [(problem.what, problem.fix) for problem in error.problems]
    try:
        return size, pictures.load(source, "here").tobytes()
    except UserError as error:
        return size, [(problem.what, problem.fix) for problem in error.problems]


def test_odd_pictures_in_tars_and_tables_are_as_loose_ones(tmp_path):
    found = odd_pictures()
    assert len(found) >= 60
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in found.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
            (tmp_path / name).write_bytes(content)
    with tarfile.open(tmp_path / "a.tar") as tar:
        places = {member.name: (member.offset_data, member.size) for member in tar}
    pq.write_table(pa.table({"image": list(found.values())}), tmp_path / "a.parquet", row_group_size=9)
    wanted = [seen(tmp_path / name) for name in found]
    assert [seen(InTar(tmp_path / "a.tar", name, *places[name])) for name in found] == wanted
    assert [seen(InTable(tmp_path / "a.parquet", name, "image", row)) for row, name in enumerate(found)] == wanted
    assert sum(isinstance(of, list) for of in wanted) > 10 and sum(isinstance(of, tuple) for of in wanted) > 30
