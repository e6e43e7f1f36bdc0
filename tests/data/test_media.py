"""URLs and base64 in a meta-file: refused with the key that allows them, and then brought once, under their hash. On loopback."""

import base64
import hashlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import pytest
from PIL import Image

from qwenvl_ft.cli.main import main
from qwenvl_ft.data.brought import bring
from qwenvl_ft.data.media import Media
from qwenvl_ft.data.meta_file import read_records
from qwenvl_ft.data.pictures import opened
from qwenvl_ft.data.reading import AS_FOUND
from qwenvl_ft.errors import UserError

FETCH = replace(AS_FOUND, fetch_media=True)


def png(width: int) -> bytes:
    file = BytesIO()
    Image.new("RGB", (width, 20), "red").save(file, "PNG")
    return file.getvalue()


class Site(BaseHTTPRequestHandler):
    asked: list[str] = []

    def do_GET(self):
        self.asked.append(self.path)
        self.send_response(200 if self.path.endswith(".png") else 404)
        self.end_headers()
        self.wfile.write(png(30))

    def log_message(self, *_):
        pass


@pytest.fixture
def site(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Site.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def meta(tmp_path, *names: str):
    talks = [
        {"messages": [{"role": "user", "content": [{"type": "image", "image": name}, {"type": "text", "text": "q"}]},
                      {"role": "assistant", "content": "a"}]} for name in names
    ]  # fmt: skip
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, talks)))
    return tmp_path / "train.jsonl"


def data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def test_they_are_refused_and_the_key_is_named(site, tmp_path):
    _, problems, _ = read_records(meta(tmp_path, f"{site}/a.png", data_url(png(30))))
    assert len(problems) == 2 and all("fetch_media: true" in problem.fix for problem in problems) and not Site.asked


def test_they_are_brought_once_and_kept_under_their_hash(site, tmp_path):
    file = meta(tmp_path, f"{site}/a.png", f"{site}/a.png", data_url(png(40)), f"{site}/b.png")
    for _ in range(2):
        records, problems, _ = read_records(file, reading=FETCH)
        assert not problems and Site.asked == ["/a.png", "/b.png"]
        pictures = [record.pictures[0] for record in records]
        wanted = [hashlib.sha256(png(width)).hexdigest() for width in (30, 30, 40, 30)]
        assert [picture.source.name for picture in pictures] == wanted
        assert pictures[0].source.parent == tmp_path / "cache" / "qwenvl_ft" / "media"
        assert [opened(picture).size for picture in pictures] == [(30, 20), (30, 20), (40, 20), (30, 20)]


def test_what_was_damaged_in_the_cache_is_brought_again(site, tmp_path):
    path = bring(f"{site}/a.png", "here")
    path.write_bytes(png(31))
    assert bring(f"{site}/a.png", "here").read_bytes() == png(30) and len(Site.asked) == 2


def test_base64_may_stand_in_lines_and_need_not_be_named(site):
    """What a meta-file took in lines a question did not, and what a question took unnamed a meta-file did not: two readers."""
    lines, unnamed = f"data:image/png;base64,{base64.encodebytes(png(30)).decode()}", data_url(png(30)).replace(";base64", "")
    assert [bring(url, "here").read_bytes() for url in (lines, unnamed)] == [png(30)] * 2


def test_several_at_once_do_not_meet_half_a_file(site):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda at: bring(f"{site}/{at % 2}.png", "here").read_bytes(), range(40)))
    assert set(found) == {png(30)}


@pytest.mark.parametrize(("name", "what"), [
    ("SITE/no.txt", "answered with status 404"), ("http://127.0.0.1:1/a.png", "cannot be reached"), ("ftp://x/a.png", "is no http"),
    ("file:///etc/passwd", "/etc/passwd lies outside"), ("data:image/png;base64,@@@", "is no base64"), ("data:image/png,abc", "is no base64"),
    (data_url(b"no picture"), "is not a picture"), ("s3://bucket/a.png", "is no http"),
])  # fmt: skip
def test_what_cannot_be_brought_is_a_problem_of_its_record(name, what, site, tmp_path):
    _, (problem,), _ = read_records(meta(tmp_path, name.replace("SITE", site)), reading=FETCH)
    assert problem.where.startswith("train.jsonl:1") and what in problem.what and problem.fix


def test_a_file_url_is_read_like_the_path_that_it_names(tmp_path):
    """It was told to set fetch_media, and then to be no URL."""
    path = tmp_path / "a %20?b.png"
    path.write_bytes(png(30))
    media = Media(tmp_path, AS_FOUND)
    for name in (
        f"file://{path}",
        path.as_uri(),
        "file://a %20?b.png",
        "file://a%20%2520%3Fb.png",
        path.as_uri().replace("file://", "file://localhost"),
    ):
        assert media.picture(name, "here").source == path, name


def test_the_commands_bring_them_when_asked_to(site, tmp_path, capsys):
    command = ["validate-meta", str(meta(tmp_path, f"{site}/a.png"))]
    for options, code in (([], 1), (["--fetch-media"], 0)):
        with pytest.raises(SystemExit) as exit:
            main([*command, *options])
        assert exit.value.code == code, capsys.readouterr()


def test_a_film_by_name_by_its_frames_and_by_their_folder(tmp_path):
    import av

    (tmp_path / "frames").mkdir()
    frames = [Image.new("RGB", (64, 48), (20 * number, 0, 0)) for number in range(12)]
    for number, frame in enumerate(frames):
        frame.save(tmp_path / "frames" / f"{number}.png")
    with av.open(tmp_path / "a.mp4", "w") as film:
        stream = film.add_stream("mpeg4", 4)
        stream.width, stream.height = 64, 48
        for frame in frames:
            film.mux(stream.encode(av.VideoFrame.from_image(frame)))
        film.mux(stream.encode(None))
    media = Media(tmp_path, AS_FOUND)
    assert media.video("a.mp4", "here", {}).source == tmp_path / "a.mp4"
    paths = tuple(tmp_path / "frames" / f"{number}.png" for number in range(12))
    listed = media.video([f"frames/{number}.png" for number in range(12)], "here", {})
    assert listed.source == paths and media.video("frames", "here", {}) == listed and (listed.width, listed.height) == (64, 48)
    for name in ("no.mp4", "../a.mp4", ["frames/0.png", "no.png"]):
        with pytest.raises(UserError):
            media.video(name, "here", {})


def test_a_picture_that_a_name_holds_is_not_remembered_by_it(site, tmp_path):
    """Fifty thousand such names were kept in each process, the files in base64 with them: gigabytes."""
    media = Media(tmp_path, FETCH)
    noise = BytesIO()
    Image.effect_noise((80, 80), 90).save(noise, "PNG")
    assert media.picture("data:image/png;base64," + base64.b64encode(noise.getvalue()).decode(), "here").width == 80
    assert not media.seen


def test_frames_of_a_folder_may_not_be_links_out_of_it(tmp_path):
    """A picture that is one was refused by name, and shown as a frame."""
    (tmp_path / "data" / "film").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(tmp_path / "secret.png")
    Image.new("RGB", (40, 40)).save(tmp_path / "data" / "own.png")
    (tmp_path / "data" / "film" / "1.png").symlink_to(tmp_path / "data" / "own.png")
    (tmp_path / "data" / "film" / "2.png").symlink_to(tmp_path / "data" / "own.png")
    media = Media(tmp_path / "data", AS_FOUND)
    assert len(media.video("film", "here", {}).source) == 2
    (tmp_path / "data" / "film" / "3.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(UserError, match=r"film/3\.png lies outside"):
        media.video("film", "here", {})
