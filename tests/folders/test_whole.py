"""A folder is whole or not there: every moment of a save cut off, every file damaged."""

import json
import os

import pytest
from filelock import FileLock

from qwenvl_ft.errors import UserError
from qwenvl_ft.folders.runs import checkpoints, newest, rotate
from qwenvl_ft.folders.whole import Path, damage, write_whole

FILES = {"adapter_model.safetensors": b"a" * 1000, "optimizer.safetensors": b"b" * 2000, "state.json": b"{}"}


def save(output_dir, step):
    def write(folder):
        for name, content in FILES.items():
            (folder / name).write_bytes(content + str(step).encode())

    write_whole(output_dir / f"checkpoint-{step}", write)


class PowerCut(BaseException):
    """Ends the process as far as the code under test can tell."""


@pytest.mark.parametrize("cut", range(20))
def test_a_save_cut_off_at_any_moment_leaves_the_older_checkpoint(tmp_path, monkeypatch, cut):
    save(tmp_path, 1)
    count = 0

    def counted(real):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == cut + 1:
                raise PowerCut
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(os, "fsync", counted(os.fsync))
    monkeypatch.setattr(Path, "rename", counted(Path.rename))
    monkeypatch.setattr(Path, "write_text", counted(Path.write_text))
    try:
        save(tmp_path, 2)
    except PowerCut:
        pass
    monkeypatch.undo()
    folder, skipped = newest(tmp_path)
    assert folder.name in ("checkpoint-1", "checkpoint-2") and not skipped
    assert damage(folder) is None
    save(tmp_path, 2)
    assert newest(tmp_path)[0].name == "checkpoint-2"


@pytest.mark.parametrize("name", [*FILES, "MANIFEST.json"])
@pytest.mark.parametrize("harm", ["delete", "empty", "halve", "flip", "zero the tail", "from another step"])
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, name, harm):
    save(tmp_path, 1)
    save(tmp_path, 20)
    path = tmp_path / "checkpoint-20" / name
    content = path.read_bytes()
    flipped = content[:10] + bytes([content[10] ^ 4]) + content[11:] if len(content) > 10 else b"??"
    changed = {
        "empty": b"", "halve": content[: len(content) // 2], "flip": flipped, "zero the tail": content[:-2] + b"\0\0",
        "from another step": (tmp_path / "checkpoint-1" / name).read_bytes(),
    }  # fmt: skip
    path.unlink() if harm == "delete" else path.write_bytes(changed[harm])
    folder, skipped = newest(tmp_path)
    assert folder.name == "checkpoint-1"
    (reason,) = skipped
    assert reason.startswith("checkpoint-20: ") and ("missing" in reason or "damaged" in reason)


def test_if_no_checkpoint_is_whole_the_run_stops_rather_than_starting_again(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoint-1" / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot resume: checkpoint-1: state\.json is damaged"):
        newest(tmp_path)


def test_without_checkpoints_there_is_nothing_to_resume(tmp_path):
    assert newest(tmp_path) == (None, [])


def test_a_full_disk_is_said_in_words_and_leaves_nothing(tmp_path):
    def write(folder):
        (folder / "half").write_bytes(b"x")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"No space left on device .*GiB free"):
        write_whole(tmp_path / "checkpoint-1", write)
    assert not list(tmp_path.glob("**/half"))


def test_files_that_a_library_writes_for_their_owner_alone_get_the_folders_rights(tmp_path):
    def write(folder):
        (folder / "secret").write_text("")
        (folder / "secret").chmod(0o600)

    write_whole(tmp_path / "out", write)
    assert (tmp_path / "out" / "secret").stat().st_mode & 0o777 == (tmp_path / "out").stat().st_mode & 0o666


def test_two_that_write_the_same_folder_do_not_mix(tmp_path):
    def write(folder):
        (folder / "file").write_text("first")
        with pytest.raises(UserError, match="is being written by another process"):
            write_whole(tmp_path / "out", lambda folder: None)

    write_whole(tmp_path / "out", write)
    assert damage(tmp_path / "out") is None and (tmp_path / "out" / "file").read_text() == "first"
    with pytest.raises(UserError, match="exists already"):
        write_whole(tmp_path / "out", lambda folder: None, replace=False)
    assert (tmp_path / "out" / "file").read_text() == "first" and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_process_left_aside_is_taken_away_by_the_next_that_writes_there(tmp_path):
    """An export that was killed left gigabytes, which only one of the same name took away."""
    aside = tmp_path / ".incoming"
    for name in ("killed", "alive"):
        (aside / name).mkdir(parents=True)
        (aside / name / "model.safetensors").write_bytes(b"gigabytes")
        (aside / f"{name}.lock").touch()
    with FileLock(aside / "alive.lock"):
        write_whole(tmp_path / "out", lambda folder: None)
        assert sorted(path.name for path in aside.iterdir()) == ["alive", "alive.lock"]
    write_whole(tmp_path / "again", lambda folder: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "out"]


def test_the_oldest_go_and_order_is_by_number(tmp_path):
    for step in (9, 10, 100):
        save(tmp_path, step)
    rotate(tmp_path, keep=2)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-100"]


def spoil(folder):
    (folder / "state.json").write_text("[]")


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("damaged", [[4], [3, 4], [2, 3, 4], [2, 4], [1, 2, 3, 4]])
def test_rotation_never_counts_a_damaged_checkpoint_and_never_deletes_for_its_sake(tmp_path, keep, damaged):
    """With two to keep and the two newest damaged, the only whole one was deleted: the run could not go on from anything."""
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    for step in damaged:
        spoil(tmp_path / f"checkpoint-{step}")
    whole = [step for step in (1, 2, 3, 4) if step not in damaged]
    oldest = whole[-keep] if len(whole) >= keep else 1
    rotate(tmp_path, keep)
    assert [folder.name for folder in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in range(oldest, 5)]


def test_the_manifest_lists_sizes_and_hashes(tmp_path):
    save(tmp_path, 1)
    manifest = json.loads((tmp_path / "checkpoint-1" / "MANIFEST.json").read_text())
    assert manifest.keys() == FILES.keys() and manifest["state.json"]["bytes"] == 3
