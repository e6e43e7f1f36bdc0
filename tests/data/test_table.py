"""The prepared table gives back what was written, in every process, and is made anew when anything that it is made from changes."""

import json
import os
import pickle
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qwenvl_ft.data import batches, kept, table
from qwenvl_ft.data.batches import batches_of
from qwenvl_ft.data.chat import IGNORE, Chat, Script, open_chat
from qwenvl_ft.data.meta_file import Tally, read_records
from qwenvl_ft.data.packed import pack_medium, pack_scripts
from qwenvl_ft.data.prepare import prepare
from qwenvl_ft.data.records import InTable, InTar, Picture, Video
from qwenvl_ft.data.table import Scripts, TableWriter
from tests.conftest import ROOT, TINY
from tests.runs import config

SIZES = st.integers(1, 2**31 - 1)
NAMES = st.text("ab/ \u00e4\udcff", min_size=1, max_size=8)
PATHS = NAMES.map(lambda name: Path("/data") / name.lstrip("/"))
SOURCES = st.one_of(
    PATHS,
    st.builds(InTar, PATHS, NAMES, st.integers(0, 2**40), SIZES),
    st.builds(InTable, PATHS, NAMES, NAMES, SIZES, st.integers(-1, 9)),
)
BOUNDS = {name: st.none() | SIZES for name in ("min_pixels", "max_pixels", "num_bytes")}
MEDIA = st.one_of(
    st.builds(Picture, SOURCES, SIZES, SIZES, **BOUNDS),
    st.builds(Video, SOURCES | st.lists(SOURCES, min_size=1, max_size=3).map(tuple), SIZES, SIZES, st.floats(0.1, 60),
              st.lists(SIZES, max_size=4).map(tuple), SIZES, **BOUNDS),
)  # fmt: skip


@st.composite
def scripts(draw):
    ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=12))
    taught = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    media = draw(st.lists(MEDIA, max_size=3))
    grids = [draw(st.tuples(SIZES, SIZES, SIZES)) for _ in media]
    labels = [id if is_taught else IGNORE for id, is_taught in zip(ids, taught, strict=True)]
    counts = draw(st.lists(st.integers(1, 10_000), max_size=4))
    return Script(draw(st.text("ab[7]", max_size=5)), ids, labels, media, grids, counts, (5, None))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(scripts(), max_size=4), min_size=1, max_size=3))
def test_every_script_comes_back_whatever_its_media(tmp_path_factory, of_parts):
    folder = tmp_path_factory.mktemp("table")
    writer = TableWriter(folder)
    for of_part in of_parts:
        media = {medium: None for script in of_part for medium in script.media}
        numbers = {medium: number for number, medium in enumerate(media)}
        writer.add(pack_scripts([*enumerate(of_part)], numbers), [pack_medium(medium, None) for medium in media], len(of_part))
    writer.close({"placeholders": [5, None]})
    written = [script for of_part in of_parts for script in of_part]
    for found in (Scripts(folder), pickle.loads(pickle.dumps(Scripts(folder)))):
        assert list(found) == written
        assert found.lengths[:].tolist() == [script.length for script in written]
        assert found.taught[:].tolist() == [sum(label != IGNORE for label in script.labels) for script in written]
        assert found.records[:].tolist() == list(range(len(written)))
    distinct = dict.fromkeys(medium for script in written for medium in script.media)
    assert list(found.media) == list(distinct)
    first = next(iter(distinct), None)
    assert first is None or next(found.media).num_bytes == first.num_bytes


@pytest.fixture
def meta(talk, pictures):
    """Records of three pictures, in a folder of their own."""
    return talk(*([f"<img>{'abc'[number % 3]}.{'png' if number % 3 < 2 else 'jpg'}</img>{number}?", "yes"] for number in range(40)))


def known(tmp_path, meta, **others):
    return config(tmp_path, train_meta_file=meta, train_data_dir=meta.parent, **others)


@pytest.fixture
def written(monkeypatch):
    """The places of the records whose scripts were written."""
    places = []
    write = Chat.write_scripts

    def counted(chat, record):
        places.append(record.where)
        return write(chat, record)

    monkeypatch.setattr(Chat, "write_scripts", counted)
    return places


def test_a_second_start_writes_nothing_and_has_the_same(tmp_path, meta, written):
    first, second = (prepare(known(tmp_path, meta)) for _ in range(2))
    assert len(written) == 40 and list(first.scripts) == list(second.scripts) and first.plan.rows == second.plan.rows
    chat = open_chat(TINY, max_pixels=known(tmp_path, meta).max_pixels, thinking="off")
    assert list(second.scripts) == [script for record in read_records(meta).records for script in chat.write_scripts(record)]
    assert first.summary(known(tmp_path, meta)) == second.summary(known(tmp_path, meta))


def larger(folder, meta):
    Image.new("RGB", (300, 200)).save(folder / "a.png")


def touched(folder, meta):
    os.utime(folder / "b.png", ns=(1, 1))


def one_word(folder, meta):
    meta.write_text(meta.read_text().replace("yes", "oui", 1))


@pytest.mark.parametrize("change", [larger, touched, one_word])
def test_a_changed_picture_or_record_makes_another_table(tmp_path, meta, written, change):
    before = prepare(known(tmp_path, meta))
    change(tmp_path, meta)
    after = prepare(known(tmp_path, meta))
    assert len(written) == 80
    assert (list(after.scripts) != list(before.scripts)) == (change is not touched)


@pytest.mark.parametrize("key, value", [("max_pixels", 40_000), ("thinking", "template"), ("format", "documented")])
def test_another_setting_makes_another_table_and_the_first_is_kept(tmp_path, meta, written, key, value):
    for of in ({}, {key: value}, {}):
        prepare(known(tmp_path, meta, **of))
    assert len(written) == 80


def test_what_says_nothing_of_a_script_makes_no_other_table(tmp_path, meta, written):
    for of in ({}, {"row_tokens": 600}, {"seed": 3}, {"rows_per_step": 1}):
        prepare(known(tmp_path, meta, **of))
    assert len(written) == 40


def test_another_folder_behind_a_link_makes_another_table(tmp_path):
    """Where data/current is another version now and its meta-file the same, the pictures of the old one were trained on."""
    for number, version in enumerate("ab"):
        (folder := tmp_path / version).mkdir()
        Image.new("RGB", (40 + 40 * number, 40)).save(folder / "a.png")
        talk = [{"from": "user", "value": "<img>a.png</img>?"}, {"from": "assistant", "value": "yes"}]
        (folder / "train.json").write_text(json.dumps([{"conversations": talk}]))
        os.utime(folder / "train.json", (1, 1))
    widths = []
    for version in "ab":
        (tmp_path / "current").unlink(missing_ok=True)
        (tmp_path / "current").symlink_to(tmp_path / version)
        settings = config(tmp_path, train_meta_file=tmp_path / "current" / "train.json", train_data_dir=None)
        widths.append(prepare(settings).scripts[0].media[0].width)
    assert widths == [40, 80]


def test_a_missing_picture_that_comes_makes_another_table(tmp_path, talk, pictures):
    """The problem was read from the table, and said of a picture that was there by then."""
    meta = talk(["<img>a.png</img>?", "yes"], ["<img>late.png</img>?", "yes"])
    assert len(prepare(known(tmp_path, meta, on_bad_record="skip")).problems) == 1
    (tmp_path / "a.png").rename(tmp_path / "late.png")
    (problem,) = prepare(known(tmp_path, meta, on_bad_record="skip")).problems
    assert "a.png is not in" in problem.what
    Image.new("RGB", (30, 40)).save(tmp_path / "a.png")
    assert prepare(known(tmp_path, meta, on_bad_record="skip")).problems == []


def test_several_processes_make_the_table_of_one_and_read_it(tmp_path, meta, monkeypatch):
    chat = open_chat(TINY, thinking="off")
    monkeypatch.setattr(batches, "RECORDS", 7)
    monkeypatch.setattr(batches, "FEW_RECORDS", 10)
    folders = []
    for cores in (1, 2):
        monkeypatch.setattr(batches, "num_cores", lambda cores=cores: cores)
        folders.append(tmp_path / f"table-{cores}")
        folders[-1].mkdir()
        writer = TableWriter(folders[-1])
        for part in batches_of(meta, None, Tally(), chat):
            writer.add(part.scripts, part.media, part.num_records)
        writer.close({"placeholders": [chat.picture_id, chat.video_id]})
    for name in ("scripts.arrow", "media.arrow", "files.arrow", "numbers.i32", "facts.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert pool.submit(list, Scripts(folders[1])).result() == list(Scripts(folders[0]))


def test_datasets_opens_it_too(tmp_path, meta):
    found = prepare(known(tmp_path, meta)).scripts
    table = datasets.Dataset.from_file(str(found.folder / "scripts.arrow"))
    assert [row["ids"] for row in table] == [script.ids for script in found]
    assert [row["where"] for row in table] == [f"train.json[{number}]" for number in range(40)]


def test_of_two_at_once_one_makes_the_table_and_the_other_waits(tmp_path):
    made = []

    def make(folder):
        made.append(folder)
        TableWriter(folder).close({"placeholders": [5, None]})

    with ThreadPoolExecutor(2) as pool:
        assert {len(table) for table in pool.map(lambda _: kept.kept_table("one", make), range(2))} == {0}
    assert len(made) == 1


def test_a_cache_that_cannot_be_written_is_said_and_costs_only_time(tmp_path, meta, monkeypatch, capsys):
    (tmp_path / "no_folder").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no_folder"))
    assert len(prepare(known(tmp_path, meta)).scripts) == 40
    assert "what is prepared is not kept" in capsys.readouterr().err


def test_a_damaged_table_is_made_again(tmp_path, meta, written):
    found = prepare(known(tmp_path, meta)).scripts
    path = found.folder / "scripts.arrow"
    path.write_bytes(path.read_bytes()[:-100])
    assert len(list(prepare(known(tmp_path, meta)).scripts)) == 40 and len(written) == 80


def test_the_tables_that_were_opened_last_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kept, "TABLES", 2)
    for number, name in enumerate(["a", "b", "c"]):
        table = kept.kept_table(name, lambda folder: TableWriter(folder).close({"placeholders": [5, None]}))
        os.utime(table.folder, (number, number))
    assert sorted(path.name for path in (tmp_path / "qwenvl_ft" / "prepared").iterdir() if path.is_dir()) == ["b-1", "c-1"]


def test_a_table_that_is_open_stays_readable_when_newer_ones_take_its_place(tmp_path, meta, monkeypatch):
    """The held-out records of a run are read at its first evaluation, hours after eight other runs may have begun."""
    monkeypatch.setattr(kept, "TABLES", 1)
    settings = config(tmp_path, train_meta_file=meta, train_data_dir=None)
    scripts = prepare(settings).scripts
    prepare(settings.model_copy(update={"max_pixels": 4096}))
    assert not scripts.folder.exists() and len(list(scripts)) == 40 and list(scripts.media)


def test_weighed_records_are_used_as_often_as_they_weigh(tmp_path, meta):
    both = [{"file": str(meta), "data_dir": str(tmp_path), "weight": 2.5}]
    prepared = prepare(config(tmp_path, train_meta_file=both))
    counts = np.bincount(prepared.scripts.records, minlength=40)
    assert set(counts) == {2, 3} and prepared.num_records == 40
    assert prepared.summary(known(tmp_path, meta))["files"][0]["used"] == counts.sum()


SCRIPT = """
from pathlib import Path
from qwenvl_ft.config import load_config
from qwenvl_ft.data import batches, kept, table
from qwenvl_ft.data.prepare import prepare
batches.FEW_RECORDS = 1
batches.num_cores = lambda: 2
{guard}
"""
CALL = "prepare(load_config({config!r}, ['train_meta_file={meta}', 'output_dir={out}']), on_record=lambda *_: print('reads', flush=True))"


def script_of(tmp_path, talk, guard, number=2000):
    """A user's script that prepares, and its environment."""
    meta = talk(*(["Which?", f"{number}"] for number in range(number)))
    call = CALL.format(config=str(ROOT / "configs" / "demo.yaml"), meta=meta, out=tmp_path / "run")
    (script := tmp_path / "script.py").write_text(SCRIPT.format(guard=guard + call))
    return [sys.executable, str(script)], os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}


def test_a_script_without_a_guard_is_told_so_and_does_not_wait_for_itself(tmp_path, talk):
    """The processes that read records import the script; there they waited for the lock of whoever waited for them."""
    command, environment = script_of(tmp_path, talk, "")
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode and "put what it does under `if __name__" in run.stderr


def test_no_process_that_reads_outlives_whoever_started_it(tmp_path, talk):
    """Killed in the middle, as by torch's launcher, it left one process a core behind, each waiting for its next job."""
    command, environment = script_of(tmp_path, talk, "if __name__ == '__main__': ", number=12_000)
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as run:
        assert run.stdout.readline()
        children = [int(line) for line in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
        run.kill()
    assert len(children) >= 2
    until = time.monotonic() + 60
    while any(Path(f"/proc/{child}/cmdline").exists() and Path(f"/proc/{child}/cmdline").read_bytes() for child in children):
        assert time.monotonic() < until
        time.sleep(0.1)


def test_small_parts_are_written_as_few_batches(tmp_path, monkeypatch):
    """Whoever opens a table touches each of its batches: ten thousand of them were 640 MiB of pages."""
    script = Script("a.json[0]", [1, 2, 3], [IGNORE, 2, 3], [], [], [], (5, None))
    for most, num_batches in ((1, 50), (table.BATCH_BYTES, 1)):
        monkeypatch.setattr(table, "BATCH_BYTES", most)
        (folder := tmp_path / str(most)).mkdir()
        writer = TableWriter(folder)
        for _ in range(50):
            writer.add(pack_scripts([(0, script)], {}), [], 1)
        writer.close({"placeholders": [5, None]})
        with pa.ipc.open_stream(folder / "scripts.arrow") as stream:
            assert len(list(stream)) == num_batches
        assert list(Scripts(folder)) == [script] * 50
