"""The page of `show --html`: as a parser of HTML reads it, and as a browser does, where there are node, Chromium and playwright-core."""

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image, ImageDraw

from qwenvl_ft.data import show
from qwenvl_ft.data.chat import IGNORE, Script, open_chat
from qwenvl_ft.data.meta_file import Found, Tally, stream_records
from qwenvl_ft.data.page import Shown, card
from qwenvl_ft.data.page import page as draw
from qwenvl_ft.data.records import Box, Picture, Record, Turn, Video
from qwenvl_ft.data.show import cut_out, draw_page, draw_record, see
from qwenvl_ft.data.videos import measured
from qwenvl_ft.errors import UserError
from tests.conftest import ROOT, TINY
from tests.films import number_of, write

HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)>\"'`</span></style>&lt;{{cards}}</article> <|im_end|> a\r\nb\0c "
    "汉字 👩‍👩‍👧‍👦 \u202e rtl ﷽ \ufffd \U0001f926🏽 </script><!-- -->"
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def chat():
    return open_chat(TINY)


class Read(HTMLParser):
    """What a parser finds: (tag, its attributes, the text that it holds) of each element that has an end."""

    def __init__(self, html: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str], list[str]]] = []
        self.open: list[tuple[str, dict[str, str], list[str]]] = []
        self.policy = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        element = (tag, dict(attrs), [])
        self.found.append(element)
        if tag not in ("meta", "link", "img", "br", "hr", "input"):
            self.open.append(element)
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for *_, texts in self.open:
            texts.append(data)

    def of(self, tag: str, kind: str = "") -> list[tuple[dict[str, str], str]]:
        """The elements of this tag and class."""
        found = ((name, facts, "".join(texts)) for name, facts, texts in self.found)
        return [
            (facts, said) for name, facts, said in found if name == tag and set(kind.split()) <= set(facts.get("class", "").split())
        ]

    @property
    def pictures(self) -> dict[str, str]:
        (said,) = [said for facts, said in self.of("script") if facts.get("id") == "pictures"]
        return json.loads(said)


def drawn(chat, *records: Record) -> Read:
    """The page of some records."""
    found = [Found(record.where, record, []) for record in records]
    return Read(draw_page("train.json", cut_out(found, Tally(), 0, 200, lambda done, total: None), chat).html)


def of_file(chat, meta: Path, start: int = 0, limit: int = 200) -> Read:
    tally = Tally()
    cut = cut_out(stream_records(meta, meta.parent, tally=tally), tally, start, limit, lambda done, total: None)
    return Read(draw_page(meta.name, cut, chat).html)


def says(where: str, question: str, answer: str, *media) -> Record:
    return Record(where, (Turn("user", (*media, question)), Turn("assistant", (answer,))))


def opened(url: str) -> Image.Image:
    assert url.startswith("data:image/webp;base64,")
    return Image.open(BytesIO(base64.b64decode(url.split(",")[1])))


def test_every_letter_of_what_the_model_reads_stands_in_the_page_and_every_token_has_its_end(chat):
    record = says("train.json[0]", HOSTILE, "Aha 🙂\n\n* so", Picture.of(Image.new("RGB", (60, 90))))
    page, (script,) = drawn(chat, record), chat.write_scripts(record)
    runs = page.of("span", "run")
    ids = [token for token in script.ids if token not in script.placeholders]
    assert "".join(said for _, said in runs) == chat.said(ids).replace("\0", "␀")
    assert "".join(said for _, said in page.of("span", "run taught")) == "".join(chat.taught_texts(script))
    ends = [[tuple(map(int, f"{end}*1".split("*")[:2])) for end in facts["data-ends"].split()] for facts, _ in runs]
    assert [sum(length for length, _ in of) for of in ends] == [len(said.encode("utf-16-le")) // 2 for _, said in runs]
    assert sum(count for of in ends for _, count in of) == len(ids)
    assert {said for _, said in page.of("span", "run control")} >= {"<|im_start|>", "<|vision_start|>", "<|vision_end|>"}


def test_names_and_texts_of_strangers_are_no_markup(chat, tmp_path):
    name = "a'\"><script>alert(1)<b>.png".replace("/", "")
    Image.new("RGB", (60, 90)).save(tmp_path / name)
    picture = Picture(tmp_path / name, 90, 60)
    boxes = (Box((1, 2, 30, 40), HOSTILE), "and")
    turns = (Turn("user", (picture, HOSTILE)), Turn("assistant", (*boxes, HOSTILE)))
    page = drawn(chat, Record(f"{HOSTILE}.json[0]", turns))
    own = (ROOT / "qwenvl_ft" / "data" / "page.js").read_text()
    assert [said for facts, said in page.of("script") if "id" not in facts] == [own]
    assert len(page.of("article")) == 1 and page.of("article")[0][0]["aria-label"].startswith("<script>alert(1)")
    assert len(page.of("img")) == 1 and page.of("img")[0][0]["alt"] == name
    assert page.of("figcaption")[0][1].startswith(name)
    assert page.of("span", "label")[0][1] == HOSTILE.replace("\0", "␀")
    link = page.of("a")[0][0]["href"]
    assert unquote(link) == f"#{HOSTILE}.json[0]" and not re.search(r"[\s<>\"']", link)


def test_no_script_but_its_own_may_run_and_nothing_is_fetched(chat):
    page = drawn(chat, says("train.json[0]", "q", "a"))
    (policy,) = [facts["content"] for facts, _ in page.of("meta") if "http-equiv" in facts]
    assert policy.startswith("default-src 'none'; img-src data:;") and "script-src 'sha256-" in policy
    assert not [facts for _, facts, _ in page.found for name in ("src", "srcset") if name in facts]
    assert {facts["href"][0] for _, facts, _ in page.found if "href" in facts} == {"#"}


def test_a_picture_is_resized_as_for_the_model_and_stands_in_the_page_once(chat, talk, tmp_path):
    chart = Image.new("RGB", (300, 200), "#eef")
    ImageDraw.Draw(chart).ellipse([60, 40, 220, 160], fill="#c33")
    chart.save(tmp_path / "a.png")
    shutil.copy(tmp_path / "a.png", tmp_path / "b.png")
    page = of_file(chat, talk(["<img>a.png</img>q<img>./a.png</img>", "x"], ["<img>b.png</img>q", "x"], ["<img>a.png</img>r", "x"]))
    assert len(page.of("img")) == 4 and len(page.pictures) == 1
    seen = opened(page.pictures["p0"]).convert("RGB")
    height, width = (round(side / chat.limits.unit_px) * chat.limits.unit_px for side in (200, 300))
    assert seen.size == (width, height)
    as_pillow_has_it = np.asarray(chart.resize((width, height), Image.Resampling.BICUBIC), dtype=float)
    assert np.abs(np.asarray(seen, dtype=float) - as_pillow_has_it).mean() < 4
    style = page.of("figure", "image")[0][0]["style"]
    assert f"--columns:{width // chat.limits.unit_px};--rows:{height // chat.limits.unit_px}" in style
    assert page.of("figcaption")[1][1] == f"a.png 300 × 200 → {width} × {height} px · {width * height // 784} tokens (11 × 7)"


def test_what_cannot_be_read_has_a_card_with_its_problem_in_its_place(chat, talk, pictures):
    page = of_file(chat, talk(["q", "a"], ["<img>a_.png</img>q", ""], ["<img>a.png</img>q", "a"]))
    cards = page.of("article", "card")
    assert [facts["id"] for facts, _ in cards] == ["train.json[0]", "train.json[1]", "train.json[2]"]
    assert [facts["class"] for facts, _ in cards] == ["card text", "card bad", "card seen"]
    assert "a_.png is not in" in cards[1][1] and "fix: did you mean a.png?" in cards[1][1] and "turn is empty" in cards[1][1]
    numbers = dict(re.findall(r"([a-z ]+?)([\d,]+)", page.of("dl")[0][1]))
    assert (numbers["records"], numbers["with problems"], numbers["pictures"]) == ("3", "1", "1")


def test_a_picture_that_breaks_when_it_is_decoded_is_said_in_its_place(chat, talk, tmp_path):
    Image.effect_noise((200, 200), 90).convert("RGB").save(tmp_path / "a.bmp")
    (tmp_path / "a.bmp").write_bytes((tmp_path / "a.bmp").read_bytes()[:5000])
    page = of_file(chat, talk(["<img>a.bmp</img>q", "x"]))
    ((_, said),) = page.of("div", "see broken")
    assert "a.bmp is not a picture that can be read: it breaks while it is decoded" in said
    assert page.of("article", "bad seen") and not page.of("img")
    assert "copy it again from its source" in page.of("ul", "problems")[0][1]


def test_a_page_keeps_to_its_size_whatever_the_pictures_are(chat, monkeypatch):
    """200 photos of 1 MB each would be a page that no browser opens."""
    monkeypatch.setattr(show, "PAGE_BYTES", 400)
    noise = [Picture.of(Image.effect_noise((400, 300), 90).convert("RGB")) for _ in range(8)]
    page = drawn(chat, *(says(f"train.json[{number}]", "q", "a", picture) for number, picture in enumerate(noise)))
    assert len(page.pictures) == 8 and sum(map(len, page.pictures.values())) < 200 * 400
    assert min(opened(url).width for url in page.pictures.values()) >= show.LEAST_SIDE_PX


def test_boxes_and_points_are_drawn_where_they_are_in_the_picture(chat):
    picture, other = Picture.of(Image.new("RGB", (400, 200))), Picture.of(Image.new("RGB", (100, 100)))
    boxes = (Box((40, 20, 200, 100), "cat"), " ", Box((300, 50), "dog", 1), " ", Box((10, 2, 20, 30), "cat", 1))
    page = drawn(chat, Record("train.json[0]", (Turn("user", (other, picture, "q")), Turn("assistant", ("a",)))))
    assert not page.of("path")
    turns = (Turn("user", (picture, other, "q")), Turn("assistant", ("See ", *boxes)))
    page = drawn(chat, Record("train.json[0]", turns))
    (first, _), (second, _) = page.of("svg")[-2:]
    assert (first["viewbox"], second["viewbox"]) == ("0 0 400 200", "0 0 100 100")
    assert [facts["d"] for facts, _ in page.of("path")][1::2] == ["M40 20H200V100H40Z", "M300 50h0", "M10 2H20V30H10Z"]
    labels = page.of("span", "label")
    assert [said for _, said in labels] == ["cat", "dog", "cat"]
    assert labels[0][0]["style"] == "left:10.00%;top:10.00%"


def film(chat, num_frames: int = 12) -> Script:
    """A video with six time steps, each with its time before it, as Qwen3-VL has them."""
    images = [Image.new("RGB", (112, 56), (20 * number, 60, 90)) for number in range(num_frames)]
    video = Video.of(images, 24.0, range(0, 48 * num_frames, 48), 48 * num_frames)
    start, end = (chat.tokenizer.token_to_id(token) for token in ("<|im_start|>", "<|im_end|>"))
    ids = [start, *chat.encode("user\n")]
    for step in range(6):
        ids += [*chat.encode(f"<{4 * step + 1}.0 seconds><|vision_start|>"), chat.picture_id, *chat.encode("<|vision_end|>")]
    ids += [*chat.encode("What moves?"), end, *chat.encode("\n"), start, *chat.encode("assistant\n")]
    answer = [*chat.encode("Nothing."), end]
    labels = [IGNORE] * len(ids) + answer
    return Script("train.json[0]", ids + answer, labels, [video], [(6, 4, 8)], [8] * 6, (chat.picture_id, None))


def test_a_video_is_a_strip_of_its_frames_with_their_times(chat):
    script = film(chat)
    looks = see([script], chat, 1, lambda done, total: None)
    read = Read(draw("train.json", [Shown("train.json[0]", [script])], chat, looks, []))
    assert len(read.of("img")) == show.FRAMES == len(read.pictures)
    times = [said for _, said in read.of("span", "at")]
    assert times[0] == "0.0 s" and times[-1] == "22.0 s" and len(times) == show.FRAMES
    assert read.of("figcaption")[-1][1] == "a video in memory 12 of 576 frames, 24 a second · 112 × 56 px · 48 tokens"
    assert [said for _, said in read.of("span", "more")] == ["8 tokens"] * 5
    assert [said for _, said in read.of("span", "run taught")] == ["Nothing.", "<|im_end|>"]


def test_a_record_of_several_examples_shows_the_last_and_folds_the_others(chat):
    """Templates drop the thoughts of earlier turns, so that each answer is an example of its own."""
    scripts = [chat.write_scripts(says("train.json[0]", "q", answer))[0] for answer in ("One.", "Two.", "Three.")]
    (article,) = Read(card(Shown("train.json[0]", scripts), chat, {})).of("article")
    (folded,) = Read(card(Shown("train.json[0]", scripts), chat, {})).of("details")
    assert folded[1].startswith("3 examples, ") and "One." in folded[1] and "Two." in folded[1]
    assert "Three." in article[1] and "Three." not in folded[1]
    taught = sum(label != IGNORE for script in scripts for label in script.labels)
    assert f"{scripts[-1].length} tokens · {taught} taught" in article[1]


def test_a_films_frames_are_those_that_are_trained_on(chat, tmp_path):
    film = write(tmp_path / "a'b.mp4", count=40, rate=10)
    video = measured(film, "train.json[0]", {"fps": 5.0})
    page = drawn(chat, says("train.json[0]", "What moves?", "A bar.", video))
    seen = [number_of(opened(url)) for url in page.pictures.values()]
    wanted = [video.indices[round(step * (len(video.indices) - 1) / 7)] for step in range(8)]
    assert len(video.indices) == 20 and [abs(one - other) <= 1 for one, other in zip(seen, wanted, strict=True)] == [True] * 8
    assert [said for _, said in page.of("span", "at")] == [f"{at / 10:.1f} s" for at in wanted]
    assert page.of("figcaption")[-1][1].startswith("a'b.mp4 20 of 40 frames, 10 a second")


def test_a_film_that_is_gone_is_said_in_its_place(chat, tmp_path):
    film = write(tmp_path / "a.mp4")
    record = says("train.json[0]", "q", "a", measured(film, "train.json[0]"))
    film.unlink()
    page = drawn(chat, record)
    assert page.of("article", "bad seen") and "a.mp4 is gone" in page.of("div", "see broken")[0][1]


def test_the_terminal_draws_a_video_of_several_time_steps(chat):
    script = film(chat)
    said = draw_record(script, chat).renderable.plain
    assert "112 x 56 px, 4 x 2 x 6 = 48 tokens" in said and said.count("8 tokens ") == 6


def test_a_page_reads_one_record_more_than_it_shows():
    read = []

    def found():
        for number in range(9):
            read.append(number)
            yield Found(f"train.json[{number}]", says(f"train.json[{number}]", "q", "a"), [])

    cut = cut_out(found(), Tally(), 2, 3, lambda done, total: None)
    assert [of.where for of in cut.found] == ["train.json[2]", "train.json[3]", "train.json[4]"]
    assert cut.more and len(read) == 6
    assert not cut_out(found(), Tally(), 5, 4, lambda done, total: None).more
    with pytest.raises(UserError, match=r"there is no record 9\n.*the last one is train.json\[8\]"):
        cut_out(found(), Tally(), 9, 4, lambda done, total: None)


def test_the_wrong_folder_is_said_once_above_the_cards(chat, talk, tmp_path):
    page = of_file(chat, talk(["<img>a.png</img>q", "a"], ["<img>b.png</img>q", "a"]))
    assert page.of("main")[0][1].lstrip().startswith(f"{tmp_path} none of the 2 pictures is in this folder")


def in_browser(page: Path) -> dict:
    """What tests/data/look_at_page.js finds."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    node = shutil.which("node")
    wanted = "require.resolve('playwright-core'); require.resolve('axe-core')"
    if not browser or not node or subprocess.run([node, "-e", wanted], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("needs Chromium, node, and its packages playwright-core and axe-core")
    command = [node, str(ROOT / "tests" / "data" / "look_at_page.js"), browser, page.as_uri()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_browser_shows_it_offline_searches_filters_and_draws_the_grid(chat, talk, tmp_path):
    image = Image.new("RGB", (300, 200), "#eef")
    image.save(tmp_path / "a'b.png")
    meta = talk(
        ["<img>a'b.png</img>Which colour?", "Blue 👩‍👩‍👧‍👦."], [HOSTILE.replace("<|im_end|>", "").replace("<img", "img"), "Harmless."],
        ["<img>gone.png</img>q", "a"], ["q", "zebra"],
    )  # fmt: skip
    out = tmp_path / "page.html"
    tally = Tally()
    cut = cut_out(stream_records(meta, tmp_path, tally=tally), tally, 0, 200, lambda done, total: None)
    out.write_text(draw_page(meta.name, cut, chat).html, encoding="utf-8")
    seen = in_browser(out)
    assert seen["said"] == [] and seen["asked"] == [] and seen["alerts"] == 0  # the console, the network, scripts of strangers
    assert seen["cards"] == 4 and seen["pictures"] == [[308, 196]]
    assert seen["search"] == {"zebra": ["train.json[3]"], "A'B.PNG": ["train.json[0]"], "no such word": []}
    assert seen["kinds"] == {
        "problems": ["train.json[2]"], "media": ["train.json[0]"], "text": ["train.json[1]", "train.json[3]"],
        "all": [f"train.json[{number}]" for number in range(4)],
    }  # fmt: skip
    assert seen["grid"] == ["0", "1"]  # opacity, before and under the pointer
    assert seen["enlarged"] == [True, False]  # by the keyboard, and after Escape
    (script,) = chat.write_scripts(cut.found[1].record)
    assert seen["texts"][1] == chat.said(script.ids).replace(
        "\0", "␀"
    )  # a browser makes one letter of \r\n unless it is kept from it
    (script,) = chat.write_scripts(cut.found[3].record)
    assert seen["tokens"] == [chat.said([token]) for token in script.ids]
    assert seen["violations"] == {"light": [], "dark": []}  # of accessibility, by axe
