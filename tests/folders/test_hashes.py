"""A file is read once and then known, until anything happens to it that the file system can tell."""

import json
import os
import time
from pathlib import Path

import pytest

from qwenvl_ft.errors import UserError
from qwenvl_ft.folders import hashes
from qwenvl_ft.folders.hashes import digests, user_cache
from qwenvl_ft.folders.whole import sha256


@pytest.fixture
def read(monkeypatch):
    """The names of the files that were read, in a process that has seen none of them; clocks are an hour on, so all is settled."""
    names = []
    monkeypatch.setattr(hashes, "sha256", lambda path: (names.append(path.name), sha256(path))[1])
    monkeypatch.setattr(hashes, "SEEN", {})
    monkeypatch.setattr(time, "time_ns", lambda now=time.time_ns: now() + 3600 * 10**9)
    return names


@pytest.fixture
def files(tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "pictures" / name).write_text(f"what is in {name}")
    return sorted((tmp_path / "pictures").iterdir())


@pytest.mark.parametrize("given", ["", "here", None])
def test_a_cache_that_is_not_named_by_its_whole_path_is_that_of_the_home(given, monkeypatch):
    """As the XDG specification says. The digests once went into the current folder, and everything else did not."""
    monkeypatch.setenv("HOME", "/home/who")
    monkeypatch.setenv("XDG_CACHE_HOME", given) if given is not None else monkeypatch.delenv("XDG_CACHE_HOME")
    assert user_cache() == Path("/home/who/.cache/qwenvl_ft/hashes.json")


def look(files):
    found = digests(files, files[0].parent.parent / "cache" / "hashes.json", "hashing")
    hashes.SEEN.clear()  # as another process
    return found


def test_a_second_look_reads_nothing(files, read):
    first = look(files)
    assert first == {path: sha256(path) for path in files} and sorted(read) == ["a.png", "b.png"]
    assert look(files) == first and len(read) == 2


def rewrite(a, b):
    times = a.stat()
    a.write_text("what is in c.png")
    os.utime(a, ns=(times.st_atime_ns, times.st_mtime_ns))


def swap(a, b):
    os.utime(a, ns=(10**18, 10**18))
    os.utime(b, ns=(10**18, 10**18))
    a.rename(a.with_name("c")), b.rename(a), a.with_name("c").rename(b)


@pytest.mark.parametrize("change", [rewrite, swap], ids=lambda change: change.__name__)
def test_other_content_of_the_same_size_and_time_is_read_again(files, read, change):
    """Size and mtime alone are what a copy keeps, and what files out of one archive share."""
    look(files)
    change(*files)
    assert look(files) == {path: sha256(path) for path in files}


def test_what_was_written_within_a_tick_of_the_clock_is_not_remembered(files, monkeypatch):
    """It could be written again without leaving a trace."""
    monkeypatch.setattr(time, "time_ns", lambda: files[0].stat().st_ctime_ns)
    look(files)
    kept = json.loads((files[0].parent.parent / "cache" / "hashes.json").read_text())
    assert not kept.keys() & set(map(str, files))  # files that other tests have looked at may stand there


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"a": 1}', "\0"])
def test_a_damaged_cache_is_no_cache(files, read, damage):
    first = look(files)
    cache = files[0].parent.parent / "cache" / "hashes.json"
    cache.write_text(damage)
    assert look(files) == first and len(read) == 4
    assert look(files) == first and len(read) == 4


def test_where_no_cache_can_be_written_one_process_still_reads_once(files, read):
    (files[0].parent.parent / "cache").write_text("a file where the folder should be")
    cache = files[0].parent.parent / "cache" / "hashes.json"
    assert digests(files, cache, "hashing") == digests(files, cache, "hashing") and len(read) == 2


def test_a_file_that_is_gone_is_named(files):
    files[1].unlink()
    with pytest.raises(UserError, match=r"b\.png: cannot be read .No such file"):
        look(files)
