"""`compare`: folders, our own server and a stand-in of DashScope, through the clients that people have."""

import base64
import json
import shutil
import subprocess
import sys
import threading
from io import BytesIO
from pathlib import Path

import dashscope
import pytest
from PIL import Image

from qwenvl_ft.cli.evaluation import model_and_adapter
from qwenvl_ft.cli.main import main
from qwenvl_ft.data.meta_file import read_records
from qwenvl_ft.data.records import Box, Picture, Record, Turn
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.evaluate import hosted
from qwenvl_ft.evaluate.hosted import TRIES, askable, file_of, open_hosted, replies_of
from qwenvl_ft.infer.engine import Engine
from tests.conftest import SAMPLE, TINY
from tests.evaluate.standin import StandIn
from tests.serving import serving, wait_for


@pytest.fixture
def service(monkeypatch):
    with StandIn().serving() as service:
        monkeypatch.setattr(dashscope, "base_http_api_url", f"{service.url}/api/v1")
        monkeypatch.setenv("DASHSCOPE_API_KEY", "sk-secret")
        yield service


@pytest.fixture
def meta(talk):
    return talk(*([f"say {word}", word] for word in ("one", "two", "three", "four")), ["say five", "six"])


def compare(capsys, *arguments, code=0):
    """What it printed: the table as JSON, or the complaints where it failed."""
    with pytest.raises(SystemExit) as done:
        main(["compare", *map(str, arguments), "--json"])
    said = capsys.readouterr()
    assert (done.value.code or 0) == code, said.err
    return said.err if code else json.loads(said.out)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows_of(table, metric="relaxed"):
    return {row["model"]: row for row in table["rows"] if row["metric"] == metric}


def test_a_folder_our_server_and_dashscopes_client_get_the_same_answers(tmp_path, capsys, monkeypatch):
    """The same prompt and the same pixels, whichever way a model is asked."""
    meta = tmp_path / "few.json"
    meta.write_text(json.dumps(json.loads((SAMPLE / "eval.json").read_text())[:3]))
    monkeypatch.setenv("DASHSCOPE_API_KEY", "any")
    monkeypatch.setenv("OUR_KEY", "any")
    shutil.copytree(TINY, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    sizes, answer = [], Engine.answer_many
    monkeypatch.setattr(Engine, "answer_many", lambda self, asked, *more: sizes.append(len(asked)) or answer(self, asked, *more))
    with serving({"tiny": Engine.open(TINY, max_pixels=100352)}, key="any") as server:
        monkeypatch.setattr(dashscope, "base_http_api_url", f"{server.url}/api/v1")
        address = server.url.replace("http://", "http://OUR_KEY@")
        models = ["base", f"{address}/v1#tiny", "dashscope:tiny"]
        table = compare(
            capsys, *models, meta, "--data-dir", SAMPLE / "images", "--max-new-tokens", "8", "--blank", "--metric", "cer"
        )
    folder = tmp_path / "compare-few"
    answers = {path.name: [line["answer"] for line in lines_of(path)] for path in folder.glob("*.jsonl")}
    assert len(answers) == 6 and all(answers.values())
    for blank in (False, True):
        said = [lines for name, lines in answers.items() if name.endswith("-blank.jsonl") is blank]
        assert said[0] == said[1] == said[2]
    assert answers["base.jsonl"] != answers["base-blank.jsonl"]
    rows = rows_of(table, "cer")
    assert list(rows) == ["base", f"{server.url}/v1#tiny", "dashscope:tiny"]
    assert "p" not in rows["base"] and rows["dashscope:tiny"]["p"] == 1 == rows[f"{server.url}/v1#tiny"]["p"]
    assert {"value", "low", "high"} <= rows["base"]["blank"].keys() & rows["base"]["prior"].keys()
    spent = table["models"]
    assert spent["base"]["answers"] == spent["dashscope:tiny"]["answers"] == 2 * table["questions"]
    assert spent["dashscope:tiny"]["prompt_tokens"] == spent[f"{server.url}/v1#tiny"]["prompt_tokens"] > 0
    assert json.loads((folder / "compare.json").read_text()) == table
    lines = (folder / "compare.md").read_text().splitlines()
    assert lines[2].startswith("| metric | model | score (95 %) | p, against base | blank pictures | prior |")
    assert lines[4].startswith("| cer | base | ")


@pytest.mark.parametrize("kind", ["openai", "dashscope"])
def test_a_service_that_is_busy_or_fails_is_asked_again_and_that_is_counted(kind, service, meta, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hosted, "LONGEST_WAIT_S", 0.05)
    service.statuses = [429, 500, 503]
    model = f"{service.url}/v1" if kind == "openai" else "dashscope:qwen-vl-max"
    table = compare(capsys, model, meta, "--out", tmp_path / "out", "--concurrency", "2")
    (row,) = rows_of(table).values()
    assert row["value"] == 4 / 5 and service.asked == dict.fromkeys(service.asked, 1) and len(service.asked) == 5
    (spent,) = table["models"].values()
    tokens = {"openai": (10, 1), "dashscope": (30, 2)}[kind]
    assert spent["retries"] == 3 and (spent["prompt_tokens"], spent["answer_tokens"]) == (tokens[0] * 5, tokens[1] * 5)
    assert spent.get("cut", 0) == (5 if kind == "openai" else 0)
    assert service.keys == ({"Bearer none"} if kind == "openai" else {"Bearer sk-secret"})
    asked = service.bodies[-1] if kind == "openai" else service.bodies[-1]["parameters"]
    assert asked["max_tokens"] == 128 and asked["temperature"] == 0
    (path,) = (tmp_path / "out").glob("*.jsonl")
    assert "secret" not in path.read_text() and sum(line.get("retries", 0) for line in lines_of(path)) == 3


def test_a_service_that_stays_busy_ends_that_model_and_loses_no_answer(service, meta, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hosted, "LONGEST_WAIT_S", 0.01)
    service.statuses = [200, 200, *[429] * TRIES]
    arguments = ["dashscope:a", f"{service.url}/v1", meta, "--out", tmp_path / "out", "--concurrency", "1"]
    said = compare(capsys, *arguments, code=1)
    assert (
        f"dashscope:a: is still busy after {TRIES} tries: 429 Throttling.RateQuota" in said and "asks only what is missing" in said
    )
    kept = lines_of(tmp_path / "out" / "dashscope_a.jsonl")
    assert len(kept) == 2 and not service.statuses
    asked = service.asked.total()
    assert asked == 2 + 5, "the other model is asked all the same"
    table = compare(capsys, *arguments)
    assert service.asked.total() == asked + 3 and rows_of(table)["dashscope:a"]["value"] == 4 / 5


def test_a_kill_in_the_middle_loses_no_answer(service, meta, tmp_path, capsys):
    service.after = 3
    service.delay.clear()
    out = tmp_path / "out"
    arguments = [f"{service.url}/v1#m", meta, "--out", out, "--concurrency", "1"]
    running = subprocess.Popen([sys.executable, "-m", "qwenvl_ft", "compare", *map(str, arguments)], stderr=subprocess.PIPE)
    wait_for(lambda: len(service.bodies) == 4 and any(path.read_text().count("\n") == 3 for path in out.glob("*.jsonl")))
    running.kill()
    running.communicate()
    service.after = None
    before = service.asked.total()
    service.delay.set()
    wait_for(lambda: service.asked.total() == before + 1)  # the one that was being answered to nobody
    table = compare(capsys, *arguments)
    assert service.asked.total() == before + 1 + 2 and rows_of(table)[f"{service.url}/v1#m"]["value"] == 4 / 5


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_service_that_will_not_answer_is_not_asked_again(status, service, meta, tmp_path, capsys, monkeypatch):
    service.statuses, service.code = [status] * 5, "InvalidApiKey"
    monkeypatch.setenv("A_KEY", "sk-of-mine")
    address = service.url.replace("//", "//A_KEY@") + "/v1#m"
    said = compare(capsys, address, meta, "--out", tmp_path / "out", "--concurrency", "1", code=1)
    assert f"will not answer: {status} InvalidApiKey" in said and len(service.bodies) == 1
    assert service.keys == {"Bearer sk-of-mine"} and "sk-of-mine" not in said and "A_KEY" not in said


def test_a_question_that_is_refused_is_kept_with_its_error_and_is_wrong(service, meta, tmp_path, capsys):
    service.statuses, service.code = [400], "DataInspectionFailed"
    table = compare(capsys, "dashscope:m", meta, "--out", tmp_path / "out", "--concurrency", "1")
    first = lines_of(tmp_path / "out" / "dashscope_m.jsonl")[0]
    assert first["error"].startswith("400 DataInspectionFailed") and first["answer"] == "" and not first["exact"]
    assert table["models"]["dashscope:m"]["refused"] == 1 and rows_of(table)["dashscope:m"]["value"] == 3 / 5


def test_pictures_reach_dashscope_as_files_each_under_a_name_of_its_own(service, talk, pictures, tmp_path, capsys, monkeypatch):
    """A text that is the name of a file would be uploaded by the client."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_text("mine")
    meta = talk(["<img>a.png</img><img>c.jpg</img>which", "which"], ["secret", "x"])
    compare(capsys, "dashscope:m", meta, "--out", tmp_path / "out")
    assert sorted(service.files.values()) == sorted((pictures / name).read_bytes() for name in ("a.png", "c.jpg"))
    sent = [part for body in service.bodies for part in body["input"]["messages"][0]["content"]]
    assert sum(part.get("image", "").startswith("oss://dir/") for part in sent) == 2 and {"text": " secret"} in sent


def test_an_address_without_a_model_is_of_the_one_that_is_served(service):
    assert open_hosted(f"{service.url}/v1/").name == f"{service.url}/v1#alone"
    service.served = ("a", "b")
    with pytest.raises(UserError, match="serves a, b"):
        open_hosted(f"{service.url}/v1")


def test_what_is_not_clear_about_a_service_is_said(monkeypatch):
    monkeypatch.delenv("DASHSCOPE_API_KEY", raising=False)
    cases = {"dashscope:m": "needs a key", "https://sk-typed@host/v1#m": "no variable", "http://": "cannot be read"}
    for spec, said in cases.items():
        with pytest.raises(UserError, match=said) as error:
            open_hosted(spec)
        assert "sk-typed" not in str(error.value)
    monkeypatch.setenv("DASHSCOPE_API_KEY", "k")
    monkeypatch.setitem(sys.modules, "dashscope", None)
    with pytest.raises(UserError, match=r"pip install '.\[compare\]'"):
        open_hosted("dashscope:m")


def test_what_a_service_cannot_be_asked_is_said_before_anything_is(tmp_path):
    picture = Picture(tmp_path / "a.png", 20, 20)
    boxes = Record("r[0]", (Turn("user", (picture, "where")), Turn("assistant", (Box((0, 0, 9, 9), "it"),))))
    tools = Record("r[1]", (Turn("user", ("hi",)), Turn("assistant", ("x",))), ('{"name": "f"}',))
    with pytest.raises(UserError) as error:
        askable([boxes, tools])
    assert [problem.where for problem in error.value.problems] == ["r[0]", "r[1]"]


def test_a_picture_is_sent_as_training_sees_it(pictures):
    assert file_of(Picture(pictures / "c.jpg", 47, 61)) == ((pictures / "c.jpg").read_bytes(), "jpeg")
    turned = Image.open(pictures / "a.png").convert("RGB")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(pictures / "turned.jpg", exif=exif)
    for name, size in (("turned.jpg", (112, 168)), ("grey.bmp", (168, 112))):
        if name == "grey.bmp":
            Image.open(pictures / "a.png").convert("L").save(pictures / name)
        content, kind = file_of(Picture(pictures / name, *size[::-1]))
        assert kind == "png" and Image.open(BytesIO(content)).size == size
    white = Image.new("RGB", (30, 20), "white")
    assert Image.open(BytesIO(file_of(Picture.of(white))[0])).getcolors() == [(600, (255,) * 3)]


def test_the_same_model_twice_is_refused(service, meta, capsys):
    assert "two of them have the same name" in compare(capsys, "dashscope:m", "dashscope:m", meta, code=1)


def test_as_many_requests_are_open_as_concurrency_says(service, meta, tmp_path):
    records = [Record(f"r[{number}]", (Turn("user", (f"say {number}",)),)) for number in range(6)]
    service.after = 0
    service.delay.clear()
    replies = replies_of(open_hosted(f"{service.url}/v1#m"), 3, 8)
    found = []
    thread = threading.Thread(target=lambda: found.extend(replies(records)))
    thread.start()
    wait_for(lambda: len(service.bodies) == 3)
    service.delay.set()
    thread.join(30)
    assert sorted(index for batch in found for index, _, _ in batch) == list(range(6)) and len(service.bodies) == 6


def test_what_a_folder_is_asked_how_is_said_by_the_options(meta, tmp_path, capsys, monkeypatch):
    """Those of `eval`, which tests/cli look at more closely."""
    heard = {}

    def read(path, data_dir, reading, tally):
        heard.update(data_dir=data_dir, boxes=reading.boxes, fetch_media=reading.fetch_media)
        return read_records(path, data_dir, reading=reading, tally=tally)

    def opened(model, adapter, *settings):
        heard.update(model=model, adapter=adapter, settings=(*settings[:4], settings[4].video_fps))
        raise UserError(Problem("here", "is enough", ""))

    monkeypatch.setattr("qwenvl_ft.data.meta_file.read_records", read)
    monkeypatch.setattr(Engine, "open", opened)
    plain = [TINY, meta, "--out", tmp_path / "out"]
    compare(capsys, *plain, code=1)
    assert heard == {
        "data_dir": None,
        "boxes": None,
        "fetch_media": False,
        "model": TINY,
        "adapter": None,
        "settings": (None, None, None, None, 2.0),
    }
    config = tmp_path / "config.yaml"
    config.write_text("model: m\ntrain_meta_file: t\noutput_dir: o\nvideo_max_pixels: 12544\nvideo_fps: 0.5\n")
    more = [
        "--data-dir",
        tmp_path,
        "--boxes",
        "unit",
        "--fetch-media",
        "--min-pixels",
        3136,
        "--max-pixels",
        6272,
        "--thinking",
        "off",
    ]
    compare(capsys, *plain, *more, "--config", config, code=1)
    assert heard == {"data_dir": tmp_path, "boxes": "unit", "fetch_media": True, "model": TINY, "adapter": None,
                     "settings": (3136, 6272, "off", 12544, 0.5)}  # fmt: skip


def test_pictures_of_other_sizes_are_said(talk, pictures, tmp_path, capsys):
    other = shutil.copytree(TINY, tmp_path / "other")
    settings = json.loads((other / "processor_config.json").read_text())
    settings["image_processor"]["size"]["longest_edge"] = 6272
    (other / "processor_config.json").write_text(json.dumps(settings))
    arguments = [TINY, other, talk(["<img>a.png</img>read", "a"]), "--max-new-tokens", "2"]
    table = compare(capsys, *arguments, "--out", tmp_path / "out")
    assert "pictures of other sizes" in table["words"][-1] and table["models"][str(other)]["max_pixels"] == 6272
    table = compare(capsys, *arguments, "--out", tmp_path / "equal", "--max-pixels", "6272")
    assert not any("other sizes" in word for word in table["words"])


def test_an_adapter_stands_behind_a_plus_sign(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a+b").mkdir()
    found = [model_and_adapter(spec) for spec in ("a", "a+b", "a+b+run", "m+run")]
    assert found == [(Path("a"), None), (Path("a+b"), None), (Path("a+b"), Path("run")), (Path("m"), Path("run"))]


def test_the_same_questions_without_looking_are_columns_of_the_table(service, talk, pictures, tmp_path, capsys):
    """Every flag changes what is asked: the service is shown white pictures, those of others, none."""
    meta = talk(
        *([f"<img>{name}</img>{number} of {name[0]}", name[0]] for number in range(3) for name in ("a.png", "b.png", "c.jpg"))
    )
    plain = [f"{service.url}/v1#m", meta, "--out", tmp_path / "out"]
    table = compare(capsys, *plain, "--limit", "4")
    assert table["questions"] == 4 == service.asked.total() and not {"blank", "shuffled", "no_pictures"} & table["rows"][0].keys()
    controls = ["--blank", "--shuffled", "--no-pictures"]
    table = compare(capsys, *plain, *controls, "--metric", "anls", "--metric", "choice")
    assert service.asked.total() == 4 * 9 and [row["metric"] for row in table["rows"]] == ["anls", "choice"]
    assert all(
        row["value"] == row[control]["value"] for row in table["rows"][:1] for control in ("blank", "shuffled", "no_pictures")
    )
    shown = {}
    for body in service.bodies:
        said = body["messages"][0]["content"]
        parts = said if isinstance(said, list) else [{"text": said}]
        pictures_of = [base64.b64decode(part["image_url"]["url"].partition(",")[2]) for part in parts if "image_url" in part]
        shown.setdefault(parts[-1]["text"], []).append(pictures_of)
    own = {name[0]: (pictures / name).read_bytes() for name in ("a.png", "b.png", "c.jpg")}
    for text, four in shown.items():
        mine = own[text[-1]]
        assert four.count([]) == 1 and four.count([mine]) == 1
        others = [of[0] for of in four if of and of != [mine]]
        white = [of for of in others if Image.open(BytesIO(of)).convert("RGB").getcolors(1)]
        assert len(white) == 1 and len(others) == 2 and sum(of in own.values() for of in others) == 1
    words = " ".join(table["words"])
    assert all(f"m is no better than with {name} pictures" in words for name in ("blank", "other", "no"))
    assert "m is not surely better than what the commonest answer gets" in words
    assert "gave another answer to 0 of 9 questions over other pictures" in words
    before = len(service.bodies)
    table = compare(capsys, *plain[:2], "--out", tmp_path / "first", "--limit", "1", "--text-first")
    kinds = [[part["type"] for part in body["messages"][0]["content"]] for body in service.bodies[before:]]
    assert kinds == [["image_url", "text"], ["text", "image_url"]] and table["rows"][0]["text_first"]["value"] is not None
    other = compare(capsys, *plain[:2], "--out", tmp_path / "again", "--limit", "4", "--seed", "1")
    chosen = [[line["where"] for line in lines_of(path)] for path in (tmp_path / "again").glob("*.jsonl")]
    assert other["questions"] == 4 and chosen[0] != [f"train.json[{number}].conversations[1]" for number in range(4)]
