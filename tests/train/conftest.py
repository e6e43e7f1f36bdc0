"""What several files here compare with, and the process that starts their runs of two processes."""

import json
import shutil

import pytest

from tests.runs import ROOT, few_records, run

SETTINGS = {"max_steps": 4, "save_steps": 2, "lora_dropout": 0.1}


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """A finished run of four steps with dropout, a checkpoint each two: what other runs are compared with."""
    folder = tmp_path_factory.mktemp("plain")
    run(folder, **SETTINGS)
    return folder / "run"


@pytest.fixture(scope="session")
def forks():
    from tests.forked import Forks

    forks = Forks()
    yield forks
    forks.stop()


@pytest.fixture(scope="session")
def skipping(tmp_path_factory):
    """A run of four steps, one epoch, that skips records 1 and 4, and its settings."""
    folder = tmp_path_factory.mktemp("skipping")
    settings = breaks(folder, 1, 4)
    run(folder, **settings)
    return folder / "run", settings


def breaks(folder, *numbers):
    """Eight records, the pictures of these damaged behind a good header; settings of a run on them."""
    images, meta = folder / "images", folder / "some.json"
    shutil.copytree(ROOT / "data/sample/images", images)
    records = json.loads(few_records(folder).read_text())
    for number in numbers:
        ask = records[number]["conversations"][0]
        name = ask["value"].split("<img>")[1].split("</img>")[0]
        content = bytearray((images / name).read_bytes())
        at = content.index(b"IDAT") + 200
        content[at : at + 400] = bytes(400)
        (images / f"broken_{number}.png").write_bytes(content)
        ask["value"] = ask["value"].replace(name, f"broken_{number}.png")
    meta.write_text(json.dumps(records))
    settings = {"max_steps": 4, "save_steps": 1, "lora_dropout": 0.1}
    return {**settings, "train_meta_file": meta, "train_data_dir": images, "on_bad_record": "skip"}
