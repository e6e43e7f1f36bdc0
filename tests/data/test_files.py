"""Every container gives what loose files of the same content give; made by the libraries that people make them with."""

import csv
import io
import json
import pickle
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from qwenvl_ft.data import sources
from qwenvl_ft.data.batches import batches_of
from qwenvl_ft.data.files.containers import entries_of, files_of, names_of
from qwenvl_ft.data.files.entry import Entry
from qwenvl_ft.data.media import Media
from qwenvl_ft.data.meta_file import Tally, read_records, stream_records
from qwenvl_ft.data.pictures import PictureChanged, load, opened
from qwenvl_ft.data.reading import AS_FOUND, Reading
from qwenvl_ft.data.records import InTable, InTar, Record
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.values import MixedFile

NUMBER = 7


@pytest.fixture(scope="module")
def loose(tmp_path_factory) -> Path:
    """Pictures of several sizes, kinds and turns, and train.json that shows one in each record."""
    folder, random = tmp_path_factory.mktemp("loose"), np.random.default_rng(0)
    for number in range(NUMBER):
        pixels = random.integers(0, 255, (40 + 3 * number, 60 + 5 * number, 3), dtype=np.uint8)
        exif = Image.Exif()
        exif[0x0112] = 1 + number
        Image.fromarray(pixels).save(folder / f"{number}.{'jpg' if number % 2 else 'png'}", exif=exif)
    (folder / "train.json").write_text(json.dumps([talk(path.name, path.stem) for path in pictures_of(folder)]))
    return folder


def pictures_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (".jpg", ".png"))


def talk(name: str, answer: str) -> dict:
    return {"conversations": [{"from": "user", "value": f"<img>{name}</img>Which?"}, {"from": "assistant", "value": answer}]}


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def tar_of(loose: Path, file: Path, mode: str = "w", long: str = "") -> Path:
    with tarfile.open(file, mode) as tar:
        for path in pictures_of(loose):
            key = f"{long}{path.stem}"
            add(tar, f"{key}.json", json.dumps(talk(f"{key}{path.suffix}", path.stem)).encode())
            add(tar, f"{key}{path.suffix}", path.read_bytes())
    return file


def entries(*files: Path) -> list[Entry]:
    return [entry for file, name in zip(files, names_of(files), strict=True) for entry in entries_of(file, name)]


def values(*files: Path) -> list:
    found = entries(*files)
    assert not [entry for entry in found if isinstance(entry.value, Problem)]
    return [entry.value for entry in found]


def problems(file: Path) -> list[Problem]:
    return [entry.value for entry in entries(file) if isinstance(entry.value, Problem)]


def equal(records: list[Record], loose: Path) -> None:
    """Pixel for pixel what the loose files show, and word for word what they say."""
    wanted = read_records(loose / "train.json", loose).records
    assert len(records) == len(wanted) == NUMBER
    for ours, theirs in zip(records, wanted, strict=True):
        (picture,), (file,) = ours.pictures, theirs.pictures
        assert [turn.text for turn in ours.turns] == [turn.text for turn in theirs.turns]
        assert (picture.height, picture.width) == (file.height, file.width)
        assert opened(picture).tobytes() == load(file.source, "").tobytes()


@pytest.mark.parametrize(("mode", "long"), [("w", ""), ("w:", "a/b/"), ("w", "ordner-ü/" + "long" * 60 + "/")])
def test_a_webdataset_is_its_loose_files(loose, tmp_path, mode, long):
    file = tar_of(loose, tmp_path / "shard-000.tar", mode, long)
    records, found, total = read_records(file)
    assert (found, total) == ([], NUMBER)
    equal(records, loose)
    assert isinstance(records[0].pictures[0].source, InTar) and records[0].where == f"shard-000.tar:{long}0"


def test_a_tar_trains_to_the_ids_labels_grids_and_pixels_of_loose_files(loose, tmp_path):
    import torch
    from transformers import AutoProcessor

    from qwenvl_ft.data.chat import open_chat
    from qwenvl_ft.data.rows import Rows
    from tests.conftest import TINY

    chat, processor = open_chat(TINY), AutoProcessor.from_pretrained(TINY)
    rows = []
    for meta in (loose / "train.json", tar_of(loose, tmp_path / "a.tar")):
        scripts = [script for record in read_records(meta).records for script in chat.write_scripts(record)]
        built = Rows(scripts, [list(range(NUMBER))], chat, processor, False)
        rows.append((scripts, built[0]))
    (theirs, wanted), (ours, row) = rows
    assert [(script.ids, script.labels, script.grids) for script in ours] == [(of.ids, of.labels, of.grids) for of in theirs]
    assert row.keys() == wanted.keys() and all(torch.equal(*map(torch.as_tensor, (row[key], wanted[key]))) for key in row)


def test_a_text_alone_is_what_is_said_of_the_picture(loose, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for path in pictures_of(loose):
            add(tar, f"x/{path.name}", path.read_bytes())
            add(tar, f"x/{path.stem}.txt", f"This is {path.stem}.\n".encode())
    records, found, _ = read_records(tmp_path / "a.tar")
    assert not found
    assert [record.turns[1].text for record in records] == [f"This is {path.stem}." for path in pictures_of(loose)]
    assert [opened(of.pictures[0]).tobytes() for of in records] == [load(path, "").tobytes() for path in pictures_of(loose)]


def test_beside_a_text_a_json_that_is_no_talk_is_not_read_and_counted(loose, tmp_path):
    """img2dataset packs 000.jpg, 000.json and 000.txt: no sample of such a tar was read."""
    facts = {"caption": "zero", "url": "http://x/0.jpg", "key": "000", "status": "success", "width": 8}
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for key, said in (("0", json.dumps(facts)), ("1", json.dumps(talk("1.png", "one"))), ("2", "{")):
            add(tar, f"{key}.png", (loose / "0.png").read_bytes())
            add(tar, f"{key}.json", said.encode())
            add(tar, f"{key}.txt", f"caption {key}".encode())
    (part,) = batches_of(tmp_path / "a.tar", None, Tally(), keep_records=True)
    assert [(record.where, record.turns[1].text) for record in part.records] == [("a.tar:0", "caption 0")]
    what = "record is made of a txt, and the json beside it, which is no talk, is not read"
    assert part.noted.lines == [f"1 {what} (a.tar:0 for one)"]
    assert [(problem.where, problem.what[:24]) for problem in part.problems] == [
        ("a.tar:1", "has a json that is a tal"), ("a.tar:2", "is not JSON: expecting p"),
    ]  # fmt: skip


def test_a_sample_whose_json_names_no_picture_is_given_its_own(loose, tmp_path):
    one, other = pictures_of(loose)[:2]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for key, said in {"a": {"q": "?"}, "b": {"q": "?", "image": "b.1.jpg"}, "c": {"q": ["<img>x.png</img>"]}}.items():
            add(tar, f"{key}.json", json.dumps(said).encode())
            add(tar, f"{key}.0.png", one.read_bytes())
            add(tar, f"{key}.1.jpg", other.read_bytes())
    a, b, c = entries(tmp_path / "a.tar")
    assert [of.name for of in a.value["images"]] == ["a.0.png", "a.1.jpg"] and sources.read(
        a.value["images"][1]
    ) == other.read_bytes()
    assert b.value == {"q": "?", "image": "b.1.jpg"} and sources.read(b.beside["b.1.jpg"]) == other.read_bytes()
    assert c.value == {"q": ["<img>x.png</img>"]}


def test_a_picture_of_a_sample_that_its_json_does_not_show_is_named(loose, tmp_path):
    """It was left out without a word."""
    file = tmp_path / "a.tar"
    with tarfile.open(file, "w") as tar:
        add(tar, "0.png", (loose / "0.png").read_bytes())
        add(tar, "0.depth.png", (loose / "2.png").read_bytes())
        add(tar, "0.json", json.dumps(talk("0.png", "zero")).encode())
    records, (problem,), _ = read_records(file)
    assert not records and problem.where == "a.tar:0" and problem.what == "holds 0.depth.png, which its json does not show"
    with tarfile.open(file, "w") as tar:  # several records of one sample show them together
        add(tar, "0.png", (loose / "0.png").read_bytes())
        add(tar, "0.depth.png", (loose / "2.png").read_bytes())
        add(tar, "0.json", json.dumps([talk("0.png", "zero"), talk("0.depth.png", "far")]).encode())
    assert len(read_records(file).records) == 2


def test_what_a_tar_holds_besides_is_named(loose, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "a.jpg", b"")
        add(tar, "a.json", b"{}")
        add(tar, "a.cls", b"7")
        add(tar, "b.jpg", b"")
        add(tar, "c.txt", b"alone")
        add(tar, "d.json", b'{"a": 1, "a": 2}')
        add(tar, "e.txt", b"\xff")
        add(tar, "e.jpg", b"")
        add(tar, "README", b"x")
        link = tarfile.TarInfo("f.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    said = {problem.where: problem.what for problem in problems(tmp_path / "a.tar")}
    assert said == {
        "a.tar:README": "has no name of the form KEY.ENDING", "a.tar:f.jpg": "is no plain file in the tar",
        "a.tar:a": "holds a.cls, which is not read", "a.tar:b": "has 0 json and 0 txt", "a.tar:c": "is a text without a picture",
        "a.tar:d": 'an object has the key "a" twice', "a.tar:e.txt": "is not UTF-8 text (GBK or UTF-16, perhaps)",
    }  # fmt: skip
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        add(tar, "a.json", b"{}")
    (problem,) = problems(tmp_path / "a.tar.gz")
    assert problem.what == "is a gzip file" and "gunzip" in problem.fix


@pytest.mark.parametrize("cut", ["at a header", "in a header", "in a file", "of its end", "with a hole", "joined"])
def test_a_tar_that_is_not_whole_is_never_read_in_part_without_a_word(loose, tmp_path, cut):
    """Python's tarfile takes a damaged header for the end of the tar."""
    content = tar_of(loose, tmp_path / "a.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        third, last = tar.getmembers()[3], tar.getmembers()[-1]
    end = last.offset_data + -(-last.size // 512) * 512
    content = {
        "at a header": content[: third.offset], "in a header": content[: third.offset + 100], "of its end": content[:end],
        "in a file": content[: third.offset_data + 9], "with a hole": content[: third.offset] + b"x" * 512 + content[third.offset :],
        "joined": content + content,
    }[cut]  # fmt: skip
    (tmp_path / "a.tar").write_bytes(content)
    (problem,) = problems(tmp_path / "a.tar")
    assert problem.where == "a.tar" and "damaged tar archive" in problem.what
    assert read_records(tmp_path / "a.tar").records == []


def image_rows(loose: Path) -> datasets.Dataset:
    """As `datasets` makes them: an Image column, lists of images, none at all, texts and nested talks."""
    files = [str(path) for path in pictures_of(loose)]
    rows = {
        "image": files,
        "images": [[files[0]] * number if number != 2 else None for number in range(NUMBER)],
        "id": list(range(NUMBER)),
        "talk": [[{"role": "user", "content": "q"}, {"role": "assistant", "content": path}] for path in files],
        "maybe": [None, "x"] * 3 + [None],
    }
    image = datasets.Image()
    data = datasets.Dataset.from_dict(rows).cast_column("image", image)
    return data.cast_column("images", datasets.List(image))


TABLES = ["parquet", "parquet in groups", "parquet uncompressed", "parquet zstd", "arrow stream", "arrow file", "feather", "saved"]


@pytest.fixture(params=TABLES)
def table(request, loose, tmp_path) -> list[Path]:
    data = image_rows(loose)
    embedded = datasets.table.embed_table_storage(data.data.table)  # as to_parquet and save_to_disk of the hub's data sets do
    file = tmp_path / "train.parquet"
    match request.param:
        case "parquet":
            data.to_parquet(file)
            pq.write_table(embedded, file)
        case "parquet in groups":
            pq.write_table(embedded, file, row_group_size=2, data_page_size=1000)
        case "parquet uncompressed":
            pq.write_table(embedded, file, compression="none", use_dictionary=False, data_page_version="2.0")
        case "parquet zstd":
            pq.write_table(embedded, file, compression="zstd", write_page_index=True, data_page_size=5000)
        case "arrow stream" | "arrow file":
            opening = pa.ipc.new_stream if request.param == "arrow stream" else pa.ipc.new_file
            with opening(file := tmp_path / "train.arrow", embedded.schema) as writer:
                for at in range(0, NUMBER, 3):
                    writer.write_table(embedded.slice(at, 3))
        case "feather":
            pa.feather.write_feather(embedded, file := tmp_path / "train.feather")
        case "saved":
            datasets.Dataset(datasets.table.InMemoryTable(embedded)).save_to_disk(tmp_path / "saved", num_shards=2)
            file = tmp_path / "saved"
    return files_of(file)


def test_a_table_with_pictures_in_it_is_read_in_place(table, loose):
    found = values(*table)
    media = Media(loose, AS_FOUND)
    assert [value["id"] for value in found] == list(range(NUMBER))
    for number, (value, path) in enumerate(zip(found, pictures_of(loose), strict=True)):
        assert isinstance(value["image"], InTable) and sources.read(value["image"]) == path.read_bytes()
        assert pickle.loads(pickle.dumps(value["image"])) == value["image"]
        picture = media.picture(value["image"], "here")
        assert opened(picture).tobytes() == load(path, "").tobytes()
        assert value["talk"] == [{"role": "user", "content": "q"}, {"role": "assistant", "content": str(path)}]
        assert value.get("maybe") == (None if number % 2 == 0 else "x") and ("maybe" in value) == (number % 2 == 1)
        assert ("images" in value) == (number != 2)
        assert [sources.read(of) for of in value.get("images", [])] == [pictures_of(loose)[0].read_bytes()] * (
            number * (number != 2)
        )


def test_other_processes_read_a_table_s_pictures(loose, tmp_path):
    """As the workers of a DataLoader do: a source goes to them pickled, and each opens the file for itself."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    pq.write_table(datasets.table.embed_table_storage(image_rows(loose).data.table), tmp_path / "a.parquet", row_group_size=3)
    found = [value["image"] for value in values(tmp_path / "a.parquet")]
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        assert list(pool.map(sources.read, found)) == [path.read_bytes() for path in pictures_of(loose)]


def test_of_a_compressed_arrow_file_one_batch_is_in_memory(tmp_path):
    """Feather compresses by itself; all of it was unpacked and kept once one picture was read."""
    rows = [bytes([number]) * 1_000_000 for number in range(30)]
    pa.feather.write_feather(pa.table({"image": rows}), tmp_path / "a.feather", chunksize=1)
    del rows
    before = pa.total_allocated_bytes()
    for row in (5, 29, 0):
        assert sources.read(InTable(tmp_path / "a.feather", "x", "image", row)) == bytes([row]) * 1_000_000
    assert pa.total_allocated_bytes() - before < 4_000_000


def test_a_parquet_that_names_its_pictures_and_one_of_plain_bytes(loose, tmp_path):
    paths = [path.name for path in pictures_of(loose)]
    named = pa.array([{"bytes": None, "path": name} for name in paths], pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    plain = pa.array([path.read_bytes() for path in pictures_of(loose)], pa.large_binary())
    pq.write_table(pa.table({"image": named, "raw": plain}), tmp_path / "a.parquet")
    found = values(tmp_path / "a.parquet")
    assert [value["image"] for value in found] == paths
    assert [sources.read(value["raw"]) for value in found] == plain.to_pylist()


def test_a_table_s_texts_may_hold_json_as_those_of_a_csv(tmp_path):
    """A parquet of talks as JSON text was refused, though a CSV of the same was read."""
    talks = [json.dumps(talk("a.png", "x")["conversations"]), "[no JSON", '{"a": 1, "a": 2}']
    pq.write_table(pa.table({"conversations": talks}), tmp_path / "a.parquet")
    with (tmp_path / "b.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["conversations"], *([text] for text in talks)])
    theirs, ours = ([entry.value for entry in entries(tmp_path / name)] for name in ("b.csv", "a.parquet"))
    assert ours[:2] == theirs[:2] == [talk("a.png", "x"), {"conversations": "[no JSON"}]
    assert ours[2].what == theirs[2].what == 'an object has the key "a" twice'


def test_a_folder_of_splits_asks_for_one(loose, tmp_path):
    datasets.DatasetDict(train=image_rows(loose), test=image_rows(loose)).save_to_disk(tmp_path / "both")
    with pytest.raises(UserError, match=r"2 splits: test, train(.|\n)*name one: .*/both/test"):
        files_of(tmp_path / "both")
    assert [path.suffix for path in files_of(tmp_path / "both" / "train")] == [".arrow"]
    for name in ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match="several splits: test, train"):
        files_of(tmp_path)


def test_a_csv_is_its_rows_whatever_its_delimiter_quotes_and_mark(tmp_path):
    rows = [
        {"image": "a.png", "question": 'He said "no",\nand\twent; | so', "answer": "图"},
        {"image": "b.png", "question": "q", "answer": "1,5"},
    ]
    for delimiter, name in ((",", "a.csv"), ("\t", "a.tsv"), (";", "a.csv"), ("|", "b.csv")):
        for mark in ("", "\ufeff"):
            with (tmp_path / name).open("w", encoding="utf-8", newline="") as file:
                file.write(mark)
                writer = csv.DictWriter(file, ["image", "question", "answer"], delimiter=delimiter, lineterminator="\r\n")
                writer.writeheader()
                writer.writerows(rows)
            found = entries(tmp_path / name)
            assert [entry.value for entry in found] == rows
            assert [entry.where for entry in found] == [f"{name}:2", f"{name}:4"]  # the first has a newline in it


def test_records_whose_picture_is_empty_are_counted(loose, tmp_path):
    """Rows of a table whose picture was null, and records with `images: []`, trained as text without a word."""
    said, named = {"question": "q", "answer": "a"}, pictures_of(loose)[0].name
    struct = pa.array([{"bytes": (loose / named).read_bytes(), "path": None}, None])
    pq.write_table(pa.table({"image": struct} | {key: [text] * 2 for key, text in said.items()}), tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_text(f"bild,question,answer\n,q,a\n{named},q,a\n")
    talk = [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]
    entries = [said | {"images": []}, {"image": None, "conversations": talk}, said, {"conversations": talk}]
    (tmp_path / "c.json").write_text(json.dumps(entries))
    for name, columns, blank in (("a.parquet", {}, [1]), ("b.csv", {"image": "bild"}, [0]), ("c.json", {}, [0, 1])):
        found = list(stream_records(tmp_path / name, loose, Reading(columns=columns)))
        assert all(of.record for of in found) and [at for at, of in enumerate(found) if of.is_blank] == blank, name
    (part,) = batches_of(tmp_path / "c.json", loose, Tally())
    assert part.noted.lines == [
        "2 records are taught as text alone, since the key or column of pictures or videos is empty there (c.json[0] for one)"
    ]


@pytest.mark.parametrize(("text", "where", "what"), [
    ("", "a.csv", "is empty"), ("a,b\n", "a.csv", "holds no rows below its header"), ("a,a\n1,2\n", "a.csv:1", 'has two columns "a"'),
    ("a,b\n1,2\n1\n", "a.csv:3", "has 1 cells, and the first row 2"), ('a,b\n"1,2\n1,2\n', "a.csv:3", "is not CSV: unexpected end of data"),
    ('a,b\n"1"2,3\n', "a.csv:2", "is not CSV: ',' expected after '\"'"), ("a,b\n1,\udcff\n", "a.csv:2:3", "is not UTF-8 text (GBK or UTF-16, perhaps)"),
])  # fmt: skip
def test_a_csv_that_is_none_says_so(text, where, what, tmp_path):
    (tmp_path / "a.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert [(problem.where, problem.what) for problem in problems(tmp_path / "a.csv")] == [(where, what)]


def test_json_is_read_through_a_small_window_as_python_reads_it_whole(tmp_path, monkeypatch):
    from qwenvl_ft.data.files import json_text

    random = np.random.default_rng(0)
    whole = [
        {"n": number, "t": '图\\" \u2028' * int(random.integers(0, 9)), "f": -1.5e-7, "l": [[], {}, None, True]}
        for number in range(200)
    ]
    for chunk in (1, 7, 64, 1 << 20):
        monkeypatch.setattr(json_text, "CHUNK_BYTES", chunk)
        for indent in (None, 2):
            (tmp_path / "a.json").write_text(
                json.dumps([*whole, 12345], indent=indent, ensure_ascii=bool(indent)), encoding="utf-8"
            )
            assert values(tmp_path / "a.json") == json.loads((tmp_path / "a.json").read_bytes())
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, whole)) + "\n", encoding="utf-8")
    assert values(tmp_path / "a.jsonl") == whole


def test_a_broken_array_is_placed_where_python_places_it(tmp_path, monkeypatch):
    from qwenvl_ft.data.files import json_text

    monkeypatch.setattr(json_text, "CHUNK_BYTES", 16)
    good = json.dumps([{"a": "图\n", "b": [1, {"c": 2.5}]}, {"d": None}] * 3, indent=1, ensure_ascii=False)
    random = np.random.default_rng(0)
    for _ in range(300):
        at = int(random.integers(1, len(good)))
        broken = good[:at] + str(random.choice(["", "x", ",", '"', "}", "]", "\n", "\\"])) + good[at + int(random.integers(0, 3)) :]
        (tmp_path / "a.json").write_text(broken, encoding="utf-8")
        found = problems(tmp_path / "a.json")
        try:
            json.loads(broken)
        except json.JSONDecodeError as error:
            what = f"is not JSON: {error.msg[0].lower()}{error.msg[1:]}"
            assert [(problem.where, problem.what) for problem in found] == [(f"a.json:{error.lineno}:{error.colno}", what)], broken
        else:
            assert not found


def test_a_large_array_costs_no_memory(tmp_path):
    import tracemalloc

    record = json.dumps(talk("a.png", "x" * 1000))
    with (tmp_path / "a.json").open("w") as file:
        file.write("[" + ",\n".join([record] * 20_000) + "]")  # 22 MB
    tracemalloc.start()
    assert sum(1 for _ in entries_of(tmp_path / "a.json", "a.json")) == 20_000
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_a_folder_and_a_pattern_are_their_files_in_order(loose, tmp_path):
    for number in (10, 2, 1):
        (tmp_path / f"part{number}.jsonl").write_text(json.dumps(talk("0.png", str(number))))
    (tmp_path / "README.md").write_text("x")
    for meta in (tmp_path, tmp_path / "part*.jsonl", str(tmp_path / "*")):
        records = read_records(meta, loose).records
        assert [record.turns[1].text for record in records] == ["1", "2", "10"]
        assert records[2].where == "part10.jsonl:1"
    (tmp_path / "sub").mkdir()
    (tmp_path / "part1.jsonl").rename(tmp_path / "sub" / "part2.jsonl")
    assert len({record.where for record in read_records(tmp_path / "**" / "part*.jsonl", loose).records}) == 3
    (tmp_path / "old.json.gz").write_bytes(b"\x1f\x8b")
    assert [problem.where for problem in read_records(tmp_path, loose).problems] == ["old.json.gz"]
    assert "matches no file" in read_records(tmp_path / "no*", loose).problems[0].what
    (tmp_path / "empty").mkdir()
    assert "holds no files of records" in read_records(tmp_path / "empty", loose).problems[0].what


def test_mixed_files_count_by_their_weights_and_alike_for_one_seed(loose, tmp_path):
    (tmp_path / "many.jsonl").write_text("\n".join(json.dumps(talk("0.png", str(number))) for number in range(400)))
    mixed = [MixedFile(file=loose / "train.json", weight=2), MixedFile(file=tmp_path / "many.jsonl", data_dir=loose, weight=1.25)]

    def drawn(seed: int) -> list[tuple[str, int]]:
        tally = Tally()
        times = [(found.where, found.times) for found in stream_records(mixed, None, AS_FOUND, tally, seed)]
        assert (tally.num_records, [part["used"] for part in tally.facts["files"]]) == (
            NUMBER + 400,
            [2 * NUMBER, sum(times for _, times in times[NUMBER:])],
        )
        assert len(read_records(mixed, seed=seed).records) == sum(times for _, times in times)
        return times

    one = drawn(1)
    assert {times for _, times in one[:NUMBER]} == {2} and {times for _, times in one[NUMBER:]} == {1, 2}
    assert 460 < sum(times for _, times in one[NUMBER:]) < 540  # 500 is meant; five standard deviations are 43
    assert drawn(1) == one != drawn(2)


def test_a_picture_in_a_tar_that_changed_is_told_from_a_damaged_one(loose, tmp_path):
    file = tar_of(loose, tmp_path / "a.tar")
    picture = read_records(file).records[1].pictures[0]
    content = bytearray(file.read_bytes())
    content[picture.source.offset : picture.source.offset + 20] = bytes(20)
    file.write_bytes(content)
    with pytest.raises(PictureChanged):
        opened(picture)
    file.unlink()
    with pytest.raises(PictureChanged, match=r"a\.tar is gone"):
        opened(picture)


def test_sizes_are_read_once_and_again_when_a_file_changes(loose, tmp_path, monkeypatch):
    from qwenvl_ft.data import media as module

    asked = []
    real = module.size_of
    monkeypatch.setattr(module, "size_of", lambda source, where: (asked.append(source.name), real(source, where))[1])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    (tmp_path / "train.json").write_text(json.dumps([talk("a.png", "x"), talk("./a.png", "x")]))
    for wanted, size in ((["a.png"], (20, 30)), ([], (20, 30))):
        records = read_records(tmp_path / "train.json").records
        assert asked == wanted and {(of.height, of.width, of.num_bytes) for record in records for of in record.pictures} == {
            (*size, (tmp_path / "a.png").stat().st_size)
        }
        asked.clear()
    Image.new("RGB", (31, 20)).save(tmp_path / "a.png")
    assert read_records(tmp_path / "train.json").records[0].pictures[0].width == 31 and asked == ["a.png"]
    (tmp_path / "cache" / "qwenvl_ft" / "sizes-1.npy").write_bytes(b"\x93NUMPY damaged")
    assert len(read_records(tmp_path / "train.json").records) == 2
    file = tar_of(loose, tmp_path / "a.tar")
    asked.clear()
    assert len(read_records(file).records) == NUMBER == len(asked) and len(read_records(file).records) == NUMBER == len(asked)


def test_a_link_out_of_the_folder_is_refused_also_where_the_size_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "in").mkdir()
    Image.new("RGB", (30, 20)).save(tmp_path / "out.png")
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "out.png")
    (tmp_path / "all.json").write_text(json.dumps([talk("out.png", "x")]))
    (tmp_path / "train.json").write_text(json.dumps([talk("link.png", "x"), talk("../out.png", "x")]))
    for _ in range(2):
        assert not read_records(tmp_path / "all.json").problems
        found = read_records(tmp_path / "train.json", tmp_path / "in").problems
        assert [problem.what.split(" lies ")[0] for problem in found] == ["link.png", "../out.png"]
