"""Meta-files, pictures, tars and tables at addresses are read as files here are, from copies that are those of the server."""

import io
import json
import tarfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from qwenvl_ft.cli.main import main
from qwenvl_ft.data.convert import convert
from qwenvl_ft.data.files.containers import files_of
from qwenvl_ft.data.kept import kept_table
from qwenvl_ft.data.meta_file import read_records
from qwenvl_ft.data.mirror import BOUND, Mirror, called, objects_folder, path_of
from qwenvl_ft.data.table import TableWriter
from qwenvl_ft.errors import UserError
from qwenvl_ft.folders import objects
from qwenvl_ft.folders.objects import Objects, address_of
from tests.conftest import SAMPLE, TINY
from tests.objects import BUCKET, Server

PICTURES = sorted((SAMPLE / "images").iterdir())[:3]
HOME = f"s3://{BUCKET}/data"


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("s3fs", reason="the extra s3 is not installed")
    pytest.importorskip("moto", reason="moto, the object server of these tests, is not installed")
    server = Server()
    yield server
    server.moto.stop()


@pytest.fixture
def bucket(server, monkeypatch, tmp_path):
    """The server's files; the user's cache is empty, and waiting takes no time."""
    server.reset()
    server.attach(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(objects, "PAUSES", (0.01,) * 2)
    fs = server.fs
    for picture in PICTURES:
        fs.put_file(str(picture), f"{BUCKET}/data/images/{picture.name}")
    fs.pipe_file(f"{BUCKET}/data/train.json", json.dumps([talk(picture.name) for picture in PICTURES]).encode())
    return fs


def talk(name):
    return {"conversations": [{"from": "user", "value": f"<img>{name}</img>\nWhat?"}, {"from": "assistant", "value": "A chart."}]}


def sizes(found):
    assert not found.problems, found.problems
    return [(record.pictures[0].height, record.pictures[0].width) for record in found.records]


LOCAL = [talk(picture.name) for picture in PICTURES]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """What the same records are as files."""
    meta = tmp_path_factory.mktemp("here") / "train.json"
    meta.write_text(json.dumps(LOCAL))
    return sizes(read_records(meta, SAMPLE / "images"))


def test_an_address_survives_pathlib_and_a_path_is_none():
    assert address_of(Path("s3://b/x")) == address_of("S3://b/x") == "s3://b/x"
    assert address_of("https://h:8/x") == "https://h:8/x" and address_of("data/train.json") is address_of("hf:a/b") is None


@pytest.mark.parametrize("meta", ["train.json", "", "tr*.json"])
def test_a_file_a_folder_and_a_pattern_are_read_with_pictures_elsewhere(bucket, here, meta):
    found = read_records(f"{HOME}/{meta}".rstrip("/"), f"{HOME}/images")
    assert sizes(found) == here
    assert {called(record.pictures[0].source) for record in found.records} == {f"{HOME}/images/{of.name}" for of in PICTURES}


def test_a_folder_is_converted_with_names_within_it(bucket, here, tmp_path):
    """The names were those within the folder above it, where nothing is looked up."""
    for picture in PICTURES:
        bucket.put_file(str(picture), f"{BUCKET}/set/{picture.name}")
    bucket.pipe_file(f"{BUCKET}/set/train.json", json.dumps(LOCAL).encode())
    convert(Path(f"s3://{BUCKET}/set"), tmp_path / "out.json")
    assert sizes(read_records(tmp_path / "out.json", SAMPLE / "images")) == here


def test_a_pattern_finds_what_glob_finds_in_folders(bucket, tmp_path):
    """Two stars were one, and files that are no records were brought."""
    here, names = tmp_path / "here", ["x.json", "a/y.json", "a/b/z.json", "a/b/readme.txt", "a/other.txt"]
    for name in names:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text("[]")
        bucket.pipe_file(f"{BUCKET}/deep/{name}", b"[]")
    top = f"s3://{BUCKET}/deep"
    for pattern in ("**/*.json", "a/**/*.json", "*/*", "**", "a/b/*.txt", "[xy]*.json", "**/b/z.*"):
        there = {str(path.relative_to(path_of(top))) for path in files_of(Path(f"{top}/{pattern}"))}
        assert there == {str(path.relative_to(here)) for path in files_of(here / pattern)}, pattern


def test_a_count_of_bytes_that_a_kill_left_empty_is_made_again(bucket):
    images = Mirror(f"{HOME}/images")
    images.bring([PICTURES[0].name])
    (objects_folder() / ".bytes").write_text("")
    images.bring([PICTURES[1].name])
    assert int((objects_folder() / ".bytes").read_text()) == sum(picture.stat().st_size for picture in PICTURES[:2])


def test_a_tar_and_a_table_with_their_pictures_within(bucket, here, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for number, picture in enumerate(PICTURES):
            for name, content in ((f"{number}.png", picture.read_bytes()), (f"{number}.txt", b"A chart.")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    rows = {"image": [of.read_bytes() for of in PICTURES], "question": ["What?"] * 3, "answer": ["A chart."] * 3}
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    for name in ("shard.tar", "rows.parquet"):
        bucket.put_file(str(tmp_path / name), f"{BUCKET}/packed/{name}")
        assert sizes(read_records(f"s3://{BUCKET}/packed/{name}")) == here


def test_what_changes_on_the_server_changes_here_and_what_goes_is_missed(bucket, here):
    read = partial(read_records, f"{HOME}/train.json", f"{HOME}/images")
    first = read()
    bucket.put_file(str(PICTURES[0]), f"{BUCKET}/data/images/{PICTURES[1].name}")
    assert sizes(read()) == [here[0], here[0], here[2]]
    bucket.rm_file(f"{BUCKET}/data/images/{PICTURES[1].name}")
    bucket.pipe_file(f"{BUCKET}/data/images/{PICTURES[1].name[:-4]}_.png", PICTURES[1].read_bytes())
    (problem,) = read().problems
    assert problem.where.startswith("train.json[1]") and problem.what == f"{PICTURES[1].name} is not in {HOME}/images"
    assert problem.fix == f"did you mean {PICTURES[1].name[:-4]}_.png?"
    assert not first.records[1].pictures[0].source.exists()


def test_a_table_that_is_kept_is_made_again_where_the_server_has_other_pictures(bucket):
    made = []

    def make(folder):
        mirror = Mirror(f"{HOME}/images")
        mirror.bring([PICTURES[0].name, "later.png"])
        from qwenvl_ft.data.packed import FileState

        writer = TableWriter(folder)
        writer.add_files([FileState.of(str(mirror.folder / name)) for name in (PICTURES[0].name, "later.png")])
        writer.close({"mirrors": [f"{HOME}/images"], "placeholders": []})
        made.append(folder.name)

    kept_table("one", make)
    kept_table("one", make)
    assert len(made) == 1
    bucket.put_file(str(PICTURES[1]), f"{BUCKET}/data/images/{PICTURES[0].name}")
    kept_table("one", make)
    bucket.put_file(str(PICTURES[1]), f"{BUCKET}/data/images/later.png")
    kept_table("one", make)
    assert len(made) == 3
    for picture in objects_folder().glob("s3/*/data/images/*"):
        picture.unlink()  # as another run may that needs the room: brought again, and the table is still true
    kept_table("one", make)
    assert len(made) == 3


def test_the_copies_stay_within_their_bound_and_a_living_process_keeps_its_own(bucket, monkeypatch):
    sizes = [picture.stat().st_size for picture in PICTURES]
    images = Mirror(f"{HOME}/images")
    there = lambda: {path.name for path in images.folder.glob("*")}  # noqa: E731
    images.bring([PICTURES[0].name])
    bound = sizes[0] + max(sizes[1:])
    monkeypatch.setenv(BOUND, str(bound / 2**30))
    with pytest.raises(UserError, match=f"raise {BOUND}"):
        images.bring([PICTURES[1].name, PICTURES[2].name])
    from qwenvl_ft.data import mirror

    assert there() == {PICTURES[0].name}
    mirror.MINE.pop(objects_folder() / ".used")[1].release()  # as when that process has ended
    Mirror(f"{HOME}/images").bring([PICTURES[1].name])
    mirror.MINE.pop(objects_folder() / ".used")[1].release()
    Mirror(f"{HOME}/images").bring([PICTURES[2].name])
    assert PICTURES[0].name not in there() and PICTURES[2].name in there()
    assert sum(path.stat().st_size for path in images.folder.iterdir()) <= bound
    monkeypatch.setenv(BOUND, "much")
    with pytest.raises(UserError, match="is no size"):
        Mirror(f"{HOME}/images").bring([PICTURES[0].name])


def test_a_server_that_refuses_or_is_gone_is_named_and_no_key_is(bucket, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        main(["validate-meta", f"s3://{BUCKET}/nothing.json"])
    assert f"s3://{BUCKET}/nothing.json: is not there" in capsys.readouterr().err
    monkeypatch.setattr(Objects, "fs", Refusing())
    (problem,) = read_records(f"{HOME}/train.json").problems
    assert problem.where == f"{HOME}/train.json" and problem.what.startswith("access is refused")
    assert "AWS_ACCESS_KEY_ID" in problem.fix and "nobody" not in str(problem)


class Refusing:
    """A file system that lets nobody in, and says too much."""

    def invalidate_cache(self):
        pass

    def info(self, path):
        raise PermissionError("the secret is words-nobody-may-see")


@pytest.mark.parametrize("address, environment, problem", [
    ("oss://bucket/train.json", {}, "nothing says which server has it: set OSS_ENDPOINT"),
    ("s3://bucket/train.json", {"AWS_ENDPOINT_URL": "no-url"}, "cannot be asked for (ValueError): mend the address, or its endpoint"),
    ("http://127.0.0.1:99999/train.json", {}, "cannot be asked for (ValueError): mend the address, then"),
])  # fmt: skip
def test_an_address_that_cannot_be_asked_for_says_what_to_mend_at_once(address, environment, problem, monkeypatch, tmp_path):
    """Such errors of the libraries once passed as they were, or were waited out."""
    pytest.importorskip({"oss": "ossfs", "s3": "s3fs"}.get(address.partition(":")[0], "aiohttp"))
    monkeypatch.delenv("OSS_ENDPOINT", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(objects.time, "sleep", lambda seconds: pytest.fail("waits"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error:
        Mirror(address).bring([""])
    (found,) = error.value.problems
    assert f"{found.what}: {found.fix}".startswith(problem)


def test_a_server_that_does_not_answer_is_waited_for_once_and_said_to_be(monkeypatch, tmp_path, capsys):
    """The table's name was asked of it first, a minute in vain and without a word, then the records."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(objects, "PAUSES", (0.01,) * 3)
    monkeypatch.setattr(objects, "PATIENCE_S", 0)
    address = "https://127.0.0.1:9/train.json"
    with pytest.raises(SystemExit):
        main(["plan", "--config", "configs/demo.yaml", f"model={TINY}", f"train_meta_file={address}"])
    assert (
        capsys.readouterr().err.count(f"{address} cannot be reached, or its connection is cut (ClientConnectorError); it is") == 1
    )


def test_a_web_server_s_files_are_read_and_a_signed_address_is_refused(tmp_path, here, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(objects, "PAUSES", (0.01,))
    (tmp_path / "train.json").write_text(json.dumps([*LOCAL, talk("lost.png")]))
    (tmp_path / "images").symlink_to(SAMPLE / "images")
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(quiet, directory=str(tmp_path))) as web:
        Thread(target=web.serve_forever, daemon=True).start()
        home = f"http://127.0.0.1:{web.server_port}"
        found = read_records(f"{home}/train.json", f"{home}/images")
        web.shutdown()
    (problem,) = found.problems
    assert problem.what == f"lost.png is not in {home}/images"
    assert sizes(found._replace(problems=[])) == here
    (problem,) = read_records(f"{home}/train.json", f"{home}/images").problems
    assert problem.where == f"{home}/train.json" and problem.what.startswith("cannot be reached")
    (problem,) = read_records("https://host/train.json?X-Amz-Signature=secret").problems
    assert problem.where == "https://host/train.json" and "secret" not in str(problem)


def test_a_web_address_is_asked_of_the_proxy_of_the_environment(tmp_path, here, monkeypatch):
    """A server whose folder has the name of a URL stands for the proxy."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(objects, "PAUSES", ())
    folder = tmp_path / "http:" / "host.invalid"
    folder.mkdir(parents=True)
    (folder / "train.json").write_text(json.dumps(LOCAL))
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(quiet, directory=str(tmp_path))) as web:
        Thread(target=web.serve_forever, daemon=True).start()
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{web.server_port}")
        assert sizes(read_records("http://host.invalid/train.json", SAMPLE / "images")) == here
        web.shutdown()
