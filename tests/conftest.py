"""Fixtures: the project's tiny base, tiny random models of every family, and the real Qwen tokenizer. All offline."""

import json
import os
import signal
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"] = "python"  # alipai's old generated code, wherever wandb comes first
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Under nohup, and behind a shell's &, the runs that the tests start would ignore these, as they should there.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).parent.parent
TINY = ROOT / "data" / "tiny"
SAMPLE = ROOT / "data" / "sample"


# One of these files as the last would leave the other worker of `make test` with nothing to do.
LONGEST = ["test_torture.py", "test_two_processes.py", "test_stops.py", "test_training.py", "test_hostile.py"]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: [*LONGEST, item.path.name].index(item.path.name))


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch):
    """Paths of the configs are relative to the project."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="session", autouse=True)
def no_cache_of_the_user(tmp_path_factory):
    """What was measured or brought before these tests, and by them, stays out of them and of the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def family_model(request, tmp_path_factory) -> Path:
    """The folder of a random model of one family, with the real Qwen tokenizer."""
    from tests.tiny import make_family

    folder = tmp_path_factory.getbasetemp() / request.param
    return folder if folder.exists() else make_family(request.param, folder)  # pytest asks again in each file


@pytest.fixture
def talk(tmp_path):
    """Writes a meta-file of conversations given as lists of texts, user first; returns its path. Pictures lie beside it."""

    def write(*conversations: list[str], name: str = "train.json") -> Path:
        records = [
            {"conversations": [{"from": ("user", "assistant")[number % 2], "value": text} for number, text in enumerate(texts)]}
            for texts in conversations
        ]
        path = tmp_path / name
        path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
        return path

    return write


@pytest.fixture
def pictures(tmp_path):
    """Three pictures of different sizes in the folder of `talk`: a.png, b.png, c.jpg."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for name, (width, height) in {"a.png": (168, 112), "b.png": (90, 200), "c.jpg": (61, 47)}.items():
        Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(tmp_path / name)
    return tmp_path
