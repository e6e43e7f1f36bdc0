"""The board in a browser, with a run of its own, where there are node, Chromium and playwright-core."""

import json
import shutil
import subprocess
import threading

import pytest
import uvicorn

from qwenvl_ft.board.app import make_app
from tests.board.conftest import end_all, predicted, write_predictions
from tests.conftest import ROOT, SAMPLE
from tests.data.test_page import BROWSERS
from tests.runs import BASE, few_records


@pytest.fixture
def served(root, monkeypatch):
    """The address of the board, on a port of its own."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    app = make_app(root)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()
    end_all(app)


@pytest.mark.timeout(600)  # two starts of a training, each of which takes a minute where the machine is busy
def test_a_run_is_started_watched_stopped_and_gone_on_with_and_a_wrong_answer_found(served, root, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    node = shutil.which("node")
    wanted = "require.resolve('playwright-core'); require.resolve('axe-core')"
    if not browser or not node or subprocess.run([node, "-e", wanted], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("needs Chromium, node, and its packages playwright-core and axe-core")
    write_predictions(root / "first/predictions-many.jsonl", *(predicted(number, "16") for number in range(10_000)))
    settings = {
        **BASE,
        "train_meta_file": few_records(tmp_path),
        "output_dir": root / "driven",
        "max_steps": 3000,
        "rows_per_step": 1,
    }
    given = {key: json.dumps(value) if isinstance(value, bool) else str(value) for key, value in settings.items()}
    command = [node, str(ROOT / "tests/board/drive_board.js"), browser, served, json.dumps(given),
               str(SAMPLE / "images/two_col_2954.png")]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["said"] == [] and seen["asked"] == []  # the console, the network
    text, line = seen["written"]
    assert text == (root / "driven.yaml").read_text() and line == f"qwenvl-ft train --config {root / 'driven.yaml'}"
    assert seen["curves"] == 4 and 0 < seen["stopped"] < seen["later"] < 3000
    assert len((root / "driven/metrics.jsonl").read_text().splitlines()) == seen["later"]
    (wrong,) = seen["wrong"]
    assert "<b>17</b>" in wrong and "wanted\t16" in wrong.replace("\n", "") and wrong.count("wrong") == 1
    assert seen["focused"] == "ARTICLE" and seen["picture"] == 640
    assert seen["answers"] == ["base", "tuned"] and seen["said_as_a_form"] == seen["said_as_it_came"]
    assert seen["heap_bytes"] < 50 << 20
    assert seen["violations"] == []  # of accessibility, by axe; a page wider than its window
