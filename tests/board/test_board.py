"""The board's pages, asked in this process; a browser drives them in test_browser.py."""

import json
import os
import re
import signal
import sys
import time
from collections import Counter
from contextlib import contextmanager
from threading import Event

import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from qwenvl_ft.board import words
from qwenvl_ft.board.answers import files_of
from qwenvl_ft.board.app import as_said, make_app
from qwenvl_ft.board.curves import Curve, curve_of, draw, ticks_of
from qwenvl_ft.board.effects import CHINESE_EFFECTS
from qwenvl_ft.board.export import Filed, pages
from qwenvl_ft.board.form import filled, sections
from qwenvl_ft.board.form import write as write_form
from qwenvl_ft.board.render import HERE as BOARD
from qwenvl_ft.board.render import yaml
from qwenvl_ft.board.runs import Kept, differences, folders, read_run
from qwenvl_ft.cli.main import main
from qwenvl_ft.config import Config, load_config
from qwenvl_ft.errors import UserError
from qwenvl_ft.folders.whole import held, holder
from tests.board.conftest import HERE, end_all, predicted, write_predictions, write_run
from tests.conftest import ROOT, TINY
from tests.data.test_page import Read

# What stands for `python -m qwenvl_ft`: takes the folder's lock as training does, writes a step, waits for SIGTERM.
STAND_IN = """
import json, signal, sys, time
from pathlib import Path
from qwenvl_ft.cli.main import main
from qwenvl_ft.config import load_config
from qwenvl_ft.folders.whole import held
config = load_config(sys.argv[3], sys.argv[4:])
out = config.output_dir
out.mkdir(parents=True, exist_ok=True)
signal.signal(signal.SIGTERM, lambda *heard: sys.exit(143))
with held(out):
    (out / "config.yaml").write_text(f"model: {config.model}\\ntrain_meta_file: x\\noutput_dir: {out}\\n")
    (out / "plan.json").write_text(json.dumps({"steps": 9}))
    print("resume is", config.resume, flush=True)
    time.sleep(60)
"""


def token_of(client: TestClient) -> str:
    return re.search(r'name="token" value="([^"]+)"', client.get("/new").text)[1]


def rows(page: str) -> list[str]:
    return [said.strip() for _, said in Read(page).of("tr")]


def test_runs_are_listed_with_their_state_and_how_far_they_are(client, root):
    page = client.get("/").text
    assert set(re.findall(r'href="/runs/([^"]+)"', page)) == {"first", "sweep/second"}
    first, second = sorted(line for line in rows(page) if "first" in line or "second" in line)
    assert "finished" in first and "10 / 10" in first and "1.1250" in first
    assert "stopped" in second and "4 / 10" in second
    with held(root / "sweep/second"):
        line = next(line for line in rows(client.get("/").text) if "second" in line)
    assert "running" in line and "about 3 s" in line  # six steps of half a second


def test_who_holds_a_folder_is_told_from_the_lock_and_not_from_its_file(tmp_path):
    assert holder(tmp_path) is None and not list(tmp_path.iterdir())
    with held(tmp_path):
        assert holder(tmp_path)[0] == os.getpid()
    assert (tmp_path / ".lock").is_file() and holder(tmp_path) is None
    (tmp_path / ".lock").write_text("something else")
    assert holder(tmp_path) is None


def test_a_runs_page_draws_its_curves_and_says_what_was_set(client):
    page = Read(client.get("/runs/sweep/second").text)
    assert [facts["aria-label"] for facts, _ in page.of("svg")] == [
        "loss per taught token, step 1–4", "learning rate, step 1–4", "tokens/s, step 1–4", "peak memory, GiB, step 1–4"
    ]  # fmt: skip
    assert [said for _, said in page.of("tr", "changed")] == ["learning_rate0.002"]
    assert "predictions-eval.jsonl" in page.of("ul", "links")[0][1]


def test_two_runs_lie_over_each_other_with_what_differs(client):
    page = Read(client.get("/compare?run=first&run=sweep/second").text)
    loss = page.of("figure", "curves")[0][1]
    assert "first · train" in loss and "first · eval" in loss and "sweep/second · train" in loss
    assert [said for _, said in page.of("th") if said][2:] == ["output_dir", "learning_rate"]


def test_a_curve_stands_where_its_values_are():
    drawn = str(draw([Curve("a", [(1, 0), (3, 2), (5, 4)], 0)], "loss", "step"))
    points = [tuple(map(float, point.split(","))) for point in re.search(r'points="([^"]+)"', drawn)[1].split()]
    (x1, y1), (x2, y2), (x3, y3) = points
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2) and y1 - y2 == pytest.approx(y2 - y3, abs=0.2) and y3 < y1
    assert draw([Curve("a", [], 0)], "loss", "step") == ""
    assert str(draw([Curve("<b>", [(1, 1)], 0)], "<i>", "step")).count("<b>") == 1  # that of the page's own list


@pytest.mark.parametrize("low, high", [(0, 1e-4), (0, 3.7), (-2, 5), (0, 123456), (3, 3.0001)])
def test_ticks_are_few_and_reach_from_end_to_end(low, high):
    ticks = ticks_of(low, high)
    assert 3 <= len(ticks) <= 8 and ticks[0] <= low and ticks[-1] >= high - 1e-9 * abs(high)


def test_of_many_steps_a_curve_has_means_weighed_by_what_was_taught(monkeypatch):
    lines = tuple({"step": step, "loss": float(step % 2), "taught_tokens": 1 + 2 * (step % 2)} for step in range(1, 801))
    curve = curve_of("a", lines, "loss", 0)
    assert len(curve.points) == 400 and {value for _, value in curve.points} == {0.75}
    monkeypatch.setattr("qwenvl_ft.train.curves.MOST_POINTS", 20)  # as loss.svg has it
    assert len(curve_of("a", lines, "loss", 0).points) == 20


def test_metrics_that_are_being_written_are_read_as_far_as_they_go(root):
    metrics = root / "first/metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 11, "lo')
    kept = Kept()
    assert read_run("first", root / "first", kept).step == 10
    metrics.write_text(metrics.read_text() + 'ss": 1, "taught_tokens": 5}\n')
    assert read_run("first", root / "first", kept).step == 11
    metrics.unlink()
    assert read_run("first", root / "first", kept).step == 0


def test_the_wrong_ones_come_first_and_are_told_apart(client):
    files = "file=first/predictions-eval.jsonl&file=sweep/second/predictions-eval.jsonl"

    def places(more: str) -> list[str]:
        return [said[10] for _, said in Read(client.get(f"/questions?{files}{more}").text).of("p", "where")]

    assert places("") == ["1", "2", "3", "0", "4"]
    assert places("&kind=wrong") == ["1", "2", "3"] and places("&kind=right") == ["0", "4"]
    assert places("&kind=cut") == ["3"] and places("&kind=empty") == ["2"] and places("&kind=disagreement") == ["1", "2", "3"]
    assert places("&search=question+2") == ["2"] and places("&search=%3Cb%3E") == ["1"] and places("&search=nothing") == []
    page = client.get(f"/questions?{files}").text
    assert "&lt;b&gt;17&lt;/b&gt;" in page and "<b>17" not in page and "not asked" in page and "secret.txt cannot be shown" in page


def test_boxes_lie_on_the_picture_in_its_own_px(client):
    page = Read(client.get("/questions?file=first/predictions-eval.jsonl&search=here").text)
    (svg, _), *_ = page.of("svg")
    assert svg["viewbox"] == "0 0 1600 800"
    paths = [(facts["class"], facts["d"]) for facts, _ in page.of("path")]
    assert paths == [("wanted box", "M10 20H110V130H10Z"), ("c0 box", "M10 20H110V120H10Z")]
    assert "right 0.90" in page.of("td", "score")[1][1]


def test_pictures_are_scaled_down_and_only_pictures(client):
    from io import BytesIO

    answer = client.get("/picture?file=first/predictions-eval.jsonl&row=0&number=0")
    assert Image.open(BytesIO(answer.content)).size == (640, 320)
    for number in (1, 2, 3, -1):  # a text, a file that is gone, no such picture
        assert client.get(f"/picture?file=first/predictions-eval.jsonl&row=0&number={number}").status_code == 404


def test_a_comparison_beside_the_runs_is_found(client, root):
    assert "../compare-eval/base.jsonl" in files_of(root)
    page = client.get("/answers").text
    assert "compare-eval" in page and "60.0" not in page
    assert "Question 0?" in client.get("/questions?file=../compare-eval/base.jsonl").text


def test_ten_thousand_predictions_come_fifty_a_page(client, root):
    write_predictions(root / "first/predictions-many.jsonl", *(predicted(number, "16") for number in range(10_000)))
    answer = client.get("/questions?file=first/predictions-many.jsonl&page=200")
    assert len(Read(answer.text).of("article")) == 50 and "eval.json[9999]" in answer.text and len(answer.content) < 100_000
    assert "200 / 200" in client.get("/questions?file=first/predictions-many.jsonl&page=99999").text


def test_lines_that_are_no_predictions_are_counted(client, root):
    path = root / "first/predictions-eval.jsonl"
    path.write_text(path.read_text() + '[1]\n{"where": "a"}\n{"whe')
    assert "3 lines are no predictions" in client.get("/questions?file=first/predictions-eval.jsonl").text


@pytest.mark.parametrize("plan", ['{"steps": null}', '{"steps": "x"}', '{"notes": null}', "[]"])
def test_an_odd_value_of_a_plan_is_left_out_and_counted(client, root, plan):
    (root / "first/plan.json").write_text(plan)
    assert client.get("/").status_code == 200 and "plan.json: 1 values" in client.get("/runs/first").text


@pytest.mark.parametrize("odd", ['"step": NaN', '"run_loss": "x"', '"eval_loss": null', '"loss": 1' + "0" * 400])
def test_an_odd_line_of_metrics_is_left_out_and_counted(client, root, odd):
    metrics = root / "first/metrics.jsonl"
    metrics.write_text(metrics.read_text() + f'{{"step": 11, "loss": 1, "taught_tokens": 5, {odd}}}\n')
    assert client.get("/").status_code == 200 and client.get("/compare?run=first").status_code == 200
    assert "metrics.jsonl: 1 lines" in client.get("/runs/first").text


@pytest.mark.parametrize("odd", [{"iou": 0.5}, {"iou": ["x"]}, {"pictures": 5}, {"boxes": [5]}, {"boxes": [{"bbox_2d": 5}]}])
def test_an_odd_prediction_is_left_out_and_counted(client, root, odd):
    write_predictions(root / "first/predictions-eval.jsonl", predicted(0, "16"), predicted(1, "16") | odd)
    assert client.get("/answers").status_code == 200
    assert "1 lines are no predictions" in client.get("/questions?file=first/predictions-eval.jsonl").text


def test_files_are_read_once_and_the_oldest_are_let_go_of(tmp_path, monkeypatch):
    read, kept = [], Kept()
    for number in range(100):
        (tmp_path / str(number)).write_text("12345")

    def reading(path):
        read.append(path.name)
        return path.name

    for _ in range(2):
        assert [kept.of(tmp_path / str(number), reading, "") for number in range(100)] == [str(number) for number in range(100)]
    assert len(read) == 100
    monkeypatch.setattr("qwenvl_ft.board.runs.MOST_BYTES", 20)
    (tmp_path / "0").write_text("123456")
    kept.of(tmp_path / "0", reading, "")
    assert [path.name for _, path in kept.values] == ["98", "99", "0"] and kept.num_bytes == 16


def test_the_form_has_every_key_with_what_lora_yaml_says_of_it(client):
    fields = {of.key: of for _, many in sections() for of in many}
    assert fields.keys() == Config.model_fields.keys() - {"resume"}
    assert fields["lora_rank"].effect == "more learns more and makes a larger adapter" and fields["lora_rank"].default == "16"
    assert fields["use_dora"].choices == ("true", "false") and fields["lr_scheduler_type"].choices[0] == "cosine"
    page = client.get("/new").text
    assert all(f'name="{key}"' in page for key in fields)


def test_in_chinese_the_form_says_of_every_key_in_chinese_what_lora_yaml_says(client):
    text = (ROOT / "configs/lora.yaml").read_text()
    english = dict(re.findall(r"^(\w+): .*?#\s*(.*)", text, re.MULTILINE))
    assert CHINESE_EFFECTS.keys() == english.keys() == Config.model_fields.keys()
    for key, effect in CHINESE_EFFECTS.items():
        assert re.search("[一-鿿]", effect) and Counter(re.findall(r"[\d.e-]*\d", effect)) == Counter(
            re.findall(r"[\d.e-]*\d", english[key])
        )
    page = client.get("/new?lang=zh").text
    assert CHINESE_EFFECTS["lora_rank"] in page and english["lora_rank"] not in page


def test_what_the_form_writes_is_what_the_run_it_was_filled_from_had(tmp_path):
    given = {"lora_on": {"language": {}, "vision": {"rank": 8}}, "lora_targets": ["q_proj", "v_proj"], "columns": {"a": None},
             "run_name": "a: b # c", "learning_rate": 0.002, "use_dora": True, "report_to": ["wandb"], "min_pixels": 5000}  # fmt: skip
    given |= {"model": "a b", "train_meta_file": [{"file": "x.json", "weight": 2}], "output_dir": "runs/x"}
    path = tmp_path / "written.yaml"
    path.write_text(write_form(filled(given)))
    assert load_config(path) == Config(**given) and "lora_rank" not in path.read_text()


@pytest.mark.parametrize("text", ["[1", "1\nresume: true", "a: b: c", "{", "*x", "!!python/object:os.system x"])
def test_a_text_that_is_not_one_value_is_refused(text):
    with pytest.raises(UserError, match="run_name: its value is not YAML"):
        write_form({"run_name": text})


def test_the_form_shows_problems_and_the_very_yaml_and_command(client, root):
    form = {
        "token": token_of(client),
        "model": "data/tiny",
        "train_meta_file": "t.json",
        "output_dir": str(root / "third"),
        "act": "look",
    }
    page = client.post("/new", data=form | {"lora_rank": "-1", "learning_rate": "7"})
    assert page.status_code == 400
    assert [said.split()[0] for _, said in Read(page.text).of("li")] == ["lora_rank", "learning_rate"]
    page = Read(client.post("/new", data=form | {"lora_rank": "8"}).text)
    written, command = [said for _, said in page.of("pre")]
    assert written == f"model: data/tiny\ntrain_meta_file: t.json\noutput_dir: {root / 'third'}\nlora_rank: 8\n"
    assert command == f"qwenvl-ft train --config {root / 'third.yaml'}" and not (root / "third.yaml").exists()
    for elsewhere in (root / "../third", root / "a/third", root / "first", root / ".hidden", "/etc/third"):
        assert client.post("/new", data=form | {"output_dir": str(elsewhere)}).status_code == 400


@pytest.fixture
def board_of(root):
    """Clients of boards whose runs are those of another program."""
    apps = []

    def made(program: str) -> TestClient:
        apps.append(make_app(root, program=(sys.executable, "-c", program)))
        return TestClient(apps[-1], base_url=HERE)

    yield made
    for app in apps:
        end_all(app)


def until(said: str, client: TestClient, path: str) -> str:
    deadline = time.monotonic() + 60
    while said not in (page := client.get(path).text):
        assert time.monotonic() < deadline, page
        time.sleep(0.2)
    return page


def test_a_run_is_started_stopped_and_gone_on_with(root, board_of):
    client = board_of(STAND_IN)
    asking = client.app.state.asking
    asking.key = asking.engine = "loaded"
    token = {"token": token_of(client)}
    form = token | {"model": "data/tiny", "train_meta_file": "t.json", "output_dir": str(root / "third"), "act": "start"}
    started = client.post("/new", data=form, follow_redirects=False)
    assert (started.status_code, started.headers["location"]) == (303, "/runs/third")
    assert (asking.key, asking.engine) == (None, None)  # the run has the GPU
    assert client.post("/resume/third", data=token).status_code == 400  # it runs, or is about to
    page = until("resume is False", client, "/runs/third")
    assert 'class="state running"' in page and f"process {holder(root / 'third')[0]}" in page
    assert client.post("/new", data=form).status_code == 400  # there is a run
    assert client.post("/stop/third", data=token).status_code == 200
    until('class="state stopped"', client, "/runs/third")
    assert client.post("/stop/third", data=token).status_code == 400
    client.post("/resume/third", data=token)
    page = until("resume is True", client, "/runs/third")
    assert f"$ qwenvl-ft train --config {root / 'third/config.yaml'} resume=true" in page
    os.kill(holder(root / "third")[0], signal.SIGTERM)  # as from a terminal
    until('class="state stopped"', client, "/runs/third")


def test_a_model_that_does_not_fit_is_let_go_of_and_the_page_says_so(client, root, monkeypatch):
    (root / "first/adapter_model.safetensors").touch()
    asking = client.app.state.asking

    def full(*given):
        asking.key = asking.engine = "loaded"
        raise torch.OutOfMemoryError("CUDA out of memory. Of the allocated memory advice")

    monkeypatch.setattr(asking, "opened", full)
    form = {"token": token_of(client), "run": "first", "question": "q"}
    answer = client.post("/try", data=form, files={"picture": b""})
    assert answer.status_code == 400 and "does not fit: CUDA out of memory.<" in answer.text
    assert (asking.key, asking.engine) == (None, None)


class Speaking:
    """An engine whose answers come in pieces; the base's is cut."""

    def __init__(self):
        self.model, self.base = self, False

    @contextmanager
    def disable_adapter(self):
        self.base = True
        yield
        self.base = False

    def stream(self, turns, max_new_tokens, on_cut):
        yield from ("16", " <b>", "of base") if self.base else ("16", " cats")
        if self.base:
            on_cut()


def test_what_is_said_comes_piece_by_piece_and_ends_with_the_page_that_a_form_gets(client, root, monkeypatch):
    (root / "first/adapter_model.safetensors").touch()
    monkeypatch.setattr(client.app.state.asking, "opened", lambda run, adapter: Speaking())
    form = {"token": token_of(client), "run": "first", "question": "How many?"}
    answer = client.post("/try", data=form, files={"picture": b""}, headers={"accept": "application/x-ndjson"})
    *pieces, last = map(json.loads, answer.text.splitlines())
    assert [(of["who"], of["piece"]) for of in pieces] == [
        ("base", "16"), ("base", " <b>"), ("base", "of base"), ("tuned", "16"), ("tuned", " cats")
    ]  # fmt: skip
    page = client.post("/try", data=form, files={"picture": b""}).text
    assert last == {"page": page} and "16 &lt;b&gt;of base" in page and [said.strip() for said in rows(page)[:2]] == [
        "base16 <b>of basecut", "tuned16 cats"
    ]  # fmt: skip
    refused = client.post("/try", data=form | {"run": "none"}, files={"picture": b""}, headers={"accept": "application/x-ndjson"})
    assert "there is none of this name" in json.loads(refused.text)["page"]


def test_a_piece_is_sent_before_the_next_one_is_said():
    heard = Event()

    def answer(on_piece):
        on_piece("base", "a")
        assert heard.wait(30)
        return "<p>"

    lines = as_said(answer)
    assert json.loads(next(lines)) == {"who": "base", "piece": "a"}
    heard.set()
    assert [json.loads(line) for line in lines] == [{"page": "<p>"}]


@pytest.mark.parametrize("config", ["lora_rank: 8\n", "model: [a\n", "model: 5\n"])
def test_a_run_whose_config_names_no_model_is_asked_nothing(client, root, config):
    (root / "first/adapter_model.safetensors").touch()
    (root / "first/config.yaml").write_text(config)
    form = {"token": token_of(client), "run": "first", "question": "q"}
    answer = client.post("/try", data=form, files={"picture": b""})
    assert answer.status_code == 400 and "names no model" in answer.text


def test_a_run_that_could_not_begin_is_shown_with_what_it_said(root, board_of):
    client = board_of("import sys; sys.exit('no such model')")
    form = {"token": token_of(client), "model": "m", "train_meta_file": "t", "output_dir": str(root / "third"), "act": "start"}
    client.post("/new", data=form)
    page = until('class="state failed"', client, "/runs/third")
    assert "no such model" in page and 'class="state failed"' in client.get("/").text


def test_the_pages_speak_chinese(client):
    page = client.get("/", headers={"accept-language": "zh-CN,zh;q=0.9"}).text
    assert 'lang="zh-CN"' in page and "训练损失" in page
    assert "训练损失" in client.get("/?lang=zh").text and "训练损失" in client.get("/").text  # kept in a cookie
    assert "train loss" in client.get("/?lang=en").text
    assert words.language_of("fr", None, "fr, zh") == "zh" and words.language_of(None, None, "fr") == "en"


def test_the_records_of_a_run_have_those_with_problems_first(client, root, talk, pictures):
    meta = talk(*([f"Question {number}?", "a"] for number in range(55)), ["<img>gone.png</img>q", "a"])
    write_run(
        root, "third", 1, 2, model=str(TINY), train_meta_file=str(meta), train_data_dir=str(pictures), eval_meta_file=str(meta)
    )
    page = client.get("/data/third?part=training")
    places = [facts["id"] for facts, _ in Read(page.text).of("article", "card")]
    assert len(places) == 50 and places[:2] == ["train.json[55]", "train.json[0]"]
    assert (
        "0–49 / 56" in page.text
        and "script-src 'sha256-" in page.text
        and "script-src" not in page.headers["content-security-policy"]
    )
    later = Read(client.get("/data/third?part=evaluation&start=50").text)
    assert [facts["id"] for facts, _ in later.of("article", "card")] == [f"train.json[{number}]" for number in range(49, 55)]
    assert client.get("/data/third?part=training&start=56").status_code == 400
    assert client.get("/data/first?part=evaluation").status_code == 400 and client.get("/data/third?part=all").status_code == 404


def test_an_export_has_every_page_that_it_links_to_and_opens_without_a_server(root, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="0"):
        main(["board", str(root), "--export", str(tmp_path / "pages"), "--lang", "zh"])
    links = set()
    for page in (tmp_path / "pages").glob("*.html"):
        read = Read(page.read_text())
        links |= {facts[name] for _, facts, _ in read.found for name in ("href", "src") if name in facts}
        assert not read.of("button") and "训练" in page.read_text()
    wanted = {link for link in links if link not in ("data:,", "#main")}
    lacking = [link for link in wanted if not (tmp_path / "pages" / link).is_file()]
    assert {"index.html", "answers.html", "compare.html", "board.css", "board.js"} < wanted
    assert lacking == []
    with Image.open(next((tmp_path / "pages/pictures").iterdir())) as picture:
        assert picture.size == (640, 320)
    with pytest.raises(SystemExit, match="1"):
        main(["board", str(root), "--export", str(tmp_path / "pages")])


def test_an_export_says_how_many_runs_do_not_lie_over_each_other(root):
    for name in "abcdef":
        write_run(root, name, 1, 2)
    found = dict(pages(root, Filed(files_of(root), Kept()), "en"))
    assert "2 older runs are left out" in found["compare.html"]


def test_every_word_of_the_pages_is_in_the_dictionary_and_the_other_way_round():
    sources = [*BOARD.glob("pages/*.html"), *BOARD.glob("*.py")]
    said = {word for path in sources for word in re.findall(r"""\bt\(\s*["']([^"']+)["']\s*\)""", path.read_text())}
    from qwenvl_ft.board.answers import KINDS

    variable = {*KINDS, *(title for title, _ in sections()), "running", "starting", "finished", "stopped", "failed", "training",
                "evaluation", "base", "tuned", "train loss", "eval loss", "learning rate", "tokens/s", "peak memory, GiB", "train", "eval"}  # fmt: skip
    assert said | variable == words.CHINESE.keys()


def test_values_are_shown_as_a_config_has_them():
    assert [yaml(value) for value in (None, True, 1e-4, 16, "a", "yes: no", ["a", "b"], {"a": None})] == [
        "null", "true", "0.0001", "16", "a", "'yes: no'", "[a, b]", "{a: null}"
    ]  # fmt: skip


def test_settings_differ_where_one_run_has_a_key_alone(root):
    runs = [read_run(name, folder, Kept()) for name, folder in folders(root)]
    assert ("learning_rate", [None, 0.002]) in differences(runs)


def test_of_more_files_than_lie_side_by_side_it_is_said_and_some_are_chosen(client, root):
    for number in range(5):
        write_run(root, f"more-{number}", 1, 2)
        write_predictions(root / f"more-{number}/predictions-eval.jsonl", predicted(0, "16"))
    page = client.get("/answers")
    files = re.findall(r'name="file" value="([^"]+predictions-eval.jsonl)"', page.text)
    assert "7 files are more than can be told apart side by side; choose at most 6" in page.text and len(files) == 7
    assert client.get("/questions", params={"file": files[:6]}).status_code == 200
    assert client.get("/questions", params={"file": files}).status_code == 400
    exported = dict(pages(root, Filed(files_of(root), Kept()), "zh"))["answers.html"]
    assert "7 个文件并排时分不清</p>" in exported


@pytest.mark.parametrize("options, said", [
    (["gone"], "is no folder"), ([".", "--host", "0.0.0.0"], "--api-key-env"), (["s3://bucket/runs"], "s3://bucket/runs: is on an object server"),
])  # fmt: skip
def test_the_command_says_what_is_wrong(options, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="1"):
        main(["board", *options])
    assert said in capsys.readouterr().err


def test_the_command_serves_the_folder_that_it_is_given(root, monkeypatch):
    served = []
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: served.append((self.config.app, sockets[0].getsockname()[0])))
    monkeypatch.setenv("KEY", "sesame")
    with pytest.raises(SystemExit, match="0"):
        main(["board", str(root), "--port", "0", "--host", "0.0.0.0", "--api-key-env", "KEY"])
    ((app, host),) = served
    client = TestClient(app, base_url=HERE)
    assert host == "0.0.0.0" and client.get("/").status_code == 401
    assert "sweep/second" in client.get("/", auth=("", "sesame")).text
