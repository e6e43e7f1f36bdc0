"""Downloads by the hubs' real clients from a hub on loopback that cuts, flips and forgets."""

import errno
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save

from qwenvl_ft.cli.main import main
from qwenvl_ft.config import Config, load_config
from qwenvl_ft.errors import UserError
from qwenvl_ft.hub.clients import push, pushable, read_source
from qwenvl_ft.hub.data_sets import local, with_local_data
from qwenvl_ft.hub.download import alone, download, read_manifest, with_local_model
from tests.conftest import ROOT, SAMPLE, TINY
from tests.fakehub import FIRST, SECOND, FakeHub
from tests.serving import random_adapter

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 5\n"
SHARDS = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
INDEX = "model.safetensors.index.json"


def tiny_repo() -> dict[str, bytes]:
    """The files of a model in two shards, one of them too large for a single read."""
    weights = {SHARDS[0]: {"a": np.arange(900_000, dtype=np.float32)}, SHARDS[1]: {"b": np.ones(5, np.float32)}}
    index = {"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}
    return {
        "config.json": b'{"model_type": "qwen2_vl"}', "preprocessor_config.json": b"{}", "tokenizer.json": b"{}",
        "chat_template.jinja": "模板".encode(), INDEX: json.dumps(index).encode(), "deeper/notes.txt": b"hello",
        **{name: save(tensors) for name, tensors in weights.items()},
    }  # fmt: skip


@pytest.fixture(params=["modelscope", "hf"])
def kind(request):
    return request.param


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The hub, and both clients turned to it, without patience; what they keep of their own goes to a folder of the test."""
    fake = FakeHub(tiny_repo())
    for name in ("HF_TOKEN", "MODELSCOPE_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", fake.url)
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    from huggingface_hub import constants, file_download
    from modelscope_hub import _download as modelscope
    from modelscope_hub import _legacy_api as modelscope_lists

    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, fake.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", fake.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)  # of 10 MB, which is what a cut may cost at most
    get = file_download.http_get
    monkeypatch.setattr(file_download, "http_get", lambda *of, **named: get(*of, **{**named, "_nb_retries": 0}))
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr(modelscope, "DOWNLOAD_RETRY_TIMES", 0)
    monkeypatch.setattr(modelscope_lists, "REPO_TREE_PAGE_MAX_ATTEMPTS", 1)
    monkeypatch.setattr(modelscope, "DOWNLOAD_INTEGRITY_RETRY_BACKOFF", 0)
    look_up = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *of, **named: look_up(on_loopback(host), *of, **named))
    yield fake
    fake.close()


def on_loopback(host):
    assert host in ("127.0.0.1", "localhost"), f"a test dials {host}"
    return host


@pytest.fixture
def bring(kind, tmp_path):
    """Downloads into the folder `model`; (manifest, what was said)."""

    def bring(*names: str, revision: str | None = None, repo: str = "org/tiny"):
        said: list[str] = []
        source = read_source(f"{kind}:{repo}")._replace(revision=revision)
        return download(source, tmp_path / "model", names, said.append), "\n".join(said)

    return bring


def equal(folder, files) -> bool:
    return all((folder / name).read_bytes() == content for name, content in files.items())


def test_a_download_is_whole_and_recorded(hub, bring, kind, tmp_path):
    manifest, said = bring()
    assert equal(tmp_path / "model", hub.files)
    assert manifest == read_manifest(tmp_path / "model") and manifest["complete"]
    assert (manifest["hub"], manifest["repo"], manifest["commit"]) == (kind, "org/tiny", FIRST)
    assert manifest["files"] == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "checked": "hash"}
        for name, content in hub.files.items()
    }
    assert all(name in said for name in hub.files)
    assert sorted(path.name for path in (tmp_path / "model" / ".download").iterdir()) == ["manifest.json"]


def test_a_bad_line_costs_what_the_clients_say(hub, bring, kind, tmp_path):
    """ModelScope's client goes on in the middle of a shard in the next run, too; Hugging Face's within the same run only."""
    hub.cut[SHARDS[0]] = 2_000_000
    with pytest.raises(UserError, match="the hub does not answer"):
        bring()
    assert not (tmp_path / "model" / SHARDS[0]).exists()
    assert not read_manifest(tmp_path / "model")["complete"]
    hub.cut.clear()
    hub.asked.clear()
    bring()
    assert equal(tmp_path / "model", hub.files)
    start = dict(hub.asked)[SHARDS[0]]
    if kind == "hf":
        assert start is None
    else:
        assert start and 0 < int(start.removeprefix("bytes=").split("-")[0]) <= 2_000_000


def test_a_kill_costs_one_file_of_hugging_face_and_no_file_of_modelscope(hub, bring, kind, tmp_path):
    """SIGKILL in the middle of a shard. What Hugging Face's client leaves of it under a name of its own, gigabytes that nobody
    would read again, is taken away by the next run."""
    hub.cut[SHARDS[0]], hub.stalled = 2_000_000, {SHARDS[0]}
    code = "import sys; from qwenvl_ft.cli.main import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "download", "org/tiny", "--hub", kind, "--local-dir", str(tmp_path / "model")]
    chunk = "import huggingface_hub.constants as of; of.DOWNLOAD_CHUNK_SIZE = 100_000; "
    command[2] = (chunk if kind == "hf" else "") + code
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    parts = tmp_path / "model" / ".download" / "parts"
    try:
        assert hub.reached.wait(60)
        before = hub.files.keys() - (SHARDS if kind == "hf" else SHARDS[:1])  # one after another there, side by side here
        while not all((parts / name).is_file() for name in before):
            assert process.poll() is None
        while not (cut := [path for path in parts.rglob("*.incomplete") if path.stat().st_size > 1_000_000]):
            assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    assert not (tmp_path / "model" / SHARDS[0]).exists() and not read_manifest(tmp_path / "model")["complete"]
    hub.cut.clear()
    hub.stalled.clear()
    hub.asked.clear()
    if kind == "hf":
        hub.flipped.add(SHARDS[1])  # so that this run does not end whole, which would take all parts away
        with pytest.raises(UserError, match="another hash than"):
            bring()
    else:
        bring()
    assert not any(path.exists() for path in cut) and (tmp_path / "model" / SHARDS[0]).read_bytes() == hub.files[SHARDS[0]]
    assert not before & dict(hub.asked).keys(), "what had come before the kill does not come again"
    assert (dict(hub.asked)[SHARDS[0]] is None) == (kind == "hf")


@pytest.mark.parametrize("name", [SHARDS[0], "config.json"])
def test_a_flipped_byte_is_found_and_repaired(hub, bring, tmp_path, name):
    """The size stays, so that Hugging Face's own client keeps the file."""
    bring()
    path = tmp_path / "model" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    hub.asked.clear()
    _, said = bring()
    assert f"{name} is here but not as the hub lists it" in said
    assert equal(tmp_path / "model", hub.files) and [asked for asked, _ in hub.asked] == [name]


@pytest.mark.parametrize("name", [SHARDS[1], "config.json"])
def test_a_file_that_comes_damaged_does_not_get_its_name(hub, bring, tmp_path, name):
    hub.flipped.add(name)
    with pytest.raises(UserError, match=r"another (file|hash) than"):
        bring()
    assert not (tmp_path / "model" / name).exists() and not read_manifest(tmp_path / "model")["complete"]
    assert (tmp_path / "model" / SHARDS[0]).is_file(), "the others are there"
    hub.flipped.clear()
    bring()
    assert equal(tmp_path / "model", hub.files)


def test_the_commit_is_pinned_until_another_is_asked_for(hub, bring, kind, tmp_path):
    bring()
    second = {name: content for name, content in hub.files.items() if name != "deeper/notes.txt"} | {"config.json": b'{"new": 1}'}
    hub.commits[SECOND], hub.branch = second, SECOND
    assert bring()[0]["commit"] == FIRST, "not moved by a new commit on the branch"
    (tmp_path / "model" / "own.txt").write_text("mine")
    manifest, _ = bring(revision={"hf": "main", "modelscope": "master"}[kind])
    assert manifest["commit"] == SECOND and manifest["files"].keys() == second.keys()
    assert equal(tmp_path / "model", second) and not (tmp_path / "model" / "deeper" / "notes.txt").exists()
    assert (tmp_path / "model" / "own.txt").exists()
    assert bring(revision=FIRST)[0]["commit"] == FIRST


def test_a_switch_of_revision_that_fails_takes_nothing_away(hub, bring, tmp_path, monkeypatch):
    """The old shards were deleted first; then the disk was too small for the new ones, or the line broke."""
    bring()
    second = {name: content for name, content in hub.files.items() if not name.startswith("model")}
    hub.commits[SECOND] = second | {"model.safetensors": save({"a": np.arange(900_001, dtype=np.float32)})}
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
        with pytest.raises(UserError, match="are to come"):
            bring(revision=SECOND)
    assert equal(tmp_path / "model", hub.files) and read_manifest(tmp_path / "model")["complete"]
    hub.cut["model.safetensors"] = 1000
    with pytest.raises(UserError, match="does not answer"):
        bring(revision=SECOND)
    assert equal(tmp_path / "model", hub.files) and not read_manifest(tmp_path / "model")["complete"]
    hub.cut.clear()
    manifest, _ = bring()
    assert manifest["commit"] == SECOND and manifest["files"].keys() == hub.commits[SECOND].keys()
    assert not any((tmp_path / "model" / name).exists() for name in [*SHARDS, INDEX]), "deleted once all is there"


def test_a_wrong_repository_or_revision_is_said_and_leaves_nothing(hub, bring, kind, tmp_path, capsys):
    with pytest.raises(UserError, match="is not there, or only for those who are logged in"):
        bring(repo="org/tinny")
    with pytest.raises(UserError, match=r"no such revision|is not there"):
        bring(revision="3" * 40)
    with pytest.raises(SystemExit, match="1"):
        main(["download", "org/tinny", "--hub", kind, "--local-dir", str(tmp_path / "other")])
    error = capsys.readouterr().err
    assert "org/tinny" in error and "fix: check ORG/NAME" in error and "Traceback" not in error
    with pytest.raises(SystemExit, match="1"):
        main(
            [
                "download",
                f"{'hf' if kind == 'modelscope' else 'modelscope'}:org/tiny",
                "--hub",
                kind,
                "--local-dir",
                str(tmp_path / "other"),
            ]
        )
    assert f"is not on the hub that --hub {kind} names" in capsys.readouterr().err
    assert not (tmp_path / "other").exists() and not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "text", ["hf:tiny", "hf:", "modelscope:a/b/c", "hf:../x", "hf:https://h/a/b/blob/main/x.py", "hf:https://h/../x"]
)
def test_what_names_no_repository_is_refused(text):
    with pytest.raises(UserError, match="names no repository"):
        read_source(text)


def test_a_source_may_name_a_revision_and_a_path_is_none():
    assert read_source("hf:Qwen/Qwen2-VL-2B-Instruct@v1") == ("hf", "Qwen/Qwen2-VL-2B-Instruct", "v1")
    for page in ("https://hub.example/models/Qwen/Qwen2.5-VL", "https://hub.example/Qwen/Qwen2.5-VL/", "http://h/Qwen/Qwen2.5-VL/summary",
                 "https://hub.example/Qwen/Qwen2.5-VL.git", "https://h/datasets/Qwen/Qwen2.5-VL/files?a=b#c"):  # fmt: skip
        assert read_source(f"modelscope:{page}") == ("modelscope", "Qwen/Qwen2.5-VL", None), page
    assert read_source("hf:https://hub.example/Qwen/Qwen2-VL/tree/v1") == ("hf", "Qwen/Qwen2-VL", "v1")
    assert read_source("models/Qwen2-VL") is None and read_source("C:/models/a") is None


def test_a_shard_that_the_hub_does_not_have_is_named(hub, bring):
    del hub.files[SHARDS[1]]
    with pytest.raises(UserError, match=f"{SHARDS[1]} is missing"):
        bring()


def test_a_pointer_on_the_hub_is_named(hub, bring):
    """Someone pushed without git-lfs: the hash is as listed, and still it is no model."""
    hub.files[SHARDS[1]] = POINTER
    with pytest.raises(UserError, match=f"only a pointer stands for {SHARDS[1]}"):
        bring()


def test_a_git_clone_without_lfs_is_made_whole(hub, bring, tmp_path):
    """Only what is not there yet travels."""
    for name, content in hub.files.items():
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_bytes(POINTER if name in SHARDS else content)
    bring()
    assert equal(tmp_path / "model", hub.files) and {name for name, _ in hub.asked} == set(SHARDS)


def test_one_file_or_a_pattern(hub, bring, tmp_path):
    manifest, _ = bring("config.json", "model-*")
    assert manifest["files"].keys() == {"config.json", *SHARDS} and not manifest["complete"]
    assert not (tmp_path / "model" / "tokenizer.json").exists()
    with pytest.raises(UserError, match=r"did you mean tokenizer\.json"):
        bring("tokeniser.json")
    manifest, _ = bring()
    assert manifest["complete"] and bring("config.json")[0]["complete"]


def test_another_model_in_the_folder_is_not_written_over(hub, bring, tmp_path):
    bring()
    other = "hf" if read_manifest(tmp_path / "model")["hub"] == "modelscope" else "modelscope"
    with pytest.raises(UserError, match="holds"):
        download(read_source(f"{other}:org/tiny"), tmp_path / "model", (), print)


@pytest.mark.parametrize(
    "name", ["../escaped", "/{}/escaped", "//{}/escaped", "a/../../escaped", "link/escaped", ".download/x", "a\0"]
)
def test_a_path_that_leaves_the_folder_is_refused(hub, bring, tmp_path, name):
    """`//tmp/x` is absolute, and its first part is `//`."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "link").symlink_to(tmp_path)
    hub.files[name.format(str(tmp_path).strip("/"))] = b"!"
    with pytest.raises(UserError, match="no use for"):
        bring()
    assert not (tmp_path / "escaped").exists() and hub.asked == []


@pytest.mark.parametrize("name", ["../victim.txt", "/{}/victim.txt", "//{}/victim.txt"])
def test_a_record_that_names_a_file_outside_is_none(hub, bring, tmp_path, name):
    """Files that the record has and the hub has not are deleted, and the record may have come with the folder."""
    bring()
    victim = tmp_path / "victim.txt"
    victim.write_text("precious")
    path = tmp_path / "model" / ".download" / "manifest.json"
    record = json.loads(path.read_text())
    record["files"][name.format(str(tmp_path).strip("/"))] = {"bytes": 1, "sha256": "0"}
    path.write_text(json.dumps(record))
    assert read_manifest(tmp_path / "model")["files"] == {}
    assert bring()[0]["complete"] and victim.read_text() == "precious"


def test_a_folder_that_cannot_be_written_is_said(hub, kind, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="1"):
        main(["download", "org/tiny", "--hub", kind, "--local-dir", str(tmp_path / "file" / "model")])
    assert "cannot be written (Not a directory)" in capsys.readouterr().err


def test_a_record_that_is_damaged_is_made_again(hub, bring, tmp_path):
    bring()
    (tmp_path / "model" / ".download" / "manifest.json").write_text('{"files": {"a": {}}}')
    hub.asked.clear()
    assert bring()[0]["complete"] and hub.asked == []


def test_too_little_disk_is_said_before_a_byte_comes(hub, bring, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(UserError, match="are to come"):
        bring()
    assert hub.asked == [] and not (tmp_path / "model" / ".download").exists()


def test_what_has_come_needs_no_disk(hub, bring, kind, tmp_path, monkeypatch):
    """A resume on a nearly full disk: most of the large shard lies there already; of Hugging Face, only if it is whole."""
    name, after = (SHARDS[1], 50) if kind == "hf" else (SHARDS[0], 3_000_000)
    hub.cut[name] = after
    with pytest.raises(UserError, match="does not answer"):
        bring()
    hub.cut.clear()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1_000_000))
    assert bring()[0]["complete"] and equal(tmp_path / "model", hub.files)


def test_a_disk_that_fills_up_is_not_called_the_hub(hub, bring, kind, monkeypatch, tmp_path):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if kind == "hf":
        from huggingface_hub import file_download as client
    else:
        from modelscope_hub import _download as client

    def refuse(*of, **named):
        raise full

    monkeypatch.setattr(client, "http_get" if kind == "hf" else "open", refuse, raising=False)
    with pytest.raises(
        UserError, match=r"takes no more \(No space left on device\): 0\.00 GB are to come, .* GB are free"
    ) as caught:
        bring()
    assert len(caught.value.problems) == 1 and "hub does not" not in str(caught.value)
    assert "free some space" in caught.value.problems[0].fix


@pytest.mark.parametrize("left", ["whole", "wrong", "too long"])
def test_a_part_that_is_as_long_as_the_file_or_longer_costs_no_range(hub, bring, kind, tmp_path, left):
    """A whole one is only hashed; a hub answers a Range beyond the end with 416, at every further try."""
    parts = tmp_path / "model" / ".download" / "parts"
    parts.mkdir(parents=True)
    content = hub.files[SHARDS[0]]
    bad = content[:-1] + bytes([content[-1] ^ 1])
    (parts / (SHARDS[0] + (".incomplete" if kind == "modelscope" else ""))).write_bytes(
        {"whole": content, "wrong": bad, "too long": content + b"more"}[left]
    )
    assert bring()[0]["complete"] and equal(tmp_path / "model", hub.files)
    assert [asked for name, asked in hub.asked if name == SHARDS[0]] == ([] if left == "whole" else [None])


def test_what_is_checked_by_size_alone_is_said(hub, bring, kind, tmp_path, capsys):
    """ModelScope may list a file without its hash; the byte that this test flips nobody can see then."""
    if kind == "hf":
        pytest.skip("Hugging Face lists a hash of every file")
    hub.unhashed |= {"deeper/notes.txt", SHARDS[1]}
    hub.flipped.add("deeper/notes.txt")
    manifest, said = bring()
    assert (
        "deeper/notes.txt, 5 bytes, size as listed, no hash listed" in said
        and f"{SHARDS[0]}, {len(hub.files[SHARDS[0]]):,} bytes, hash as listed" in said
    )
    assert {name for name, of in manifest["files"].items() if of["checked"] == "size"} == hub.unhashed
    hub.flipped.clear()
    main_ends_well("download", "org/tiny", "--hub", kind, "--local-dir", str(tmp_path / "model"))
    assert f"complete, 2 of {len(hub.files)} files by size only: the hub lists no hash of them, at {FIRST}" in " ".join(
        capsys.readouterr().out.split()
    )


def test_the_recorded_hash_stands_in_for_one_that_is_not_listed(hub, bring, kind, tmp_path):
    """A second run promises to look at every byte; what was half there before is not gone on with, for nothing could tell."""
    if kind == "hf":
        pytest.skip("Hugging Face lists a hash of every file")
    hub.unhashed |= set(hub.files)
    part = tmp_path / "model" / ".download" / "parts" / f"{SHARDS[0]}.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"of another commit")
    bring()
    assert equal(tmp_path / "model", hub.files)
    path = tmp_path / "model" / SHARDS[0]
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    hub.asked.clear()
    bring()
    assert equal(tmp_path / "model", hub.files) and [name for name, _ in hub.asked] == [SHARDS[0]]
    hub.asked.clear()
    hub.commits[SECOND] = hub.files | {"deeper/notes.txt": b"olleh"}  # as long as before
    bring(revision=SECOND)
    assert equal(tmp_path / "model", hub.commits[SECOND])


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [(403, "GatedRepo", "is not open to everyone"), (401, "", "logged in|refuses"), (500, "", "does not answer")],
)
def test_what_all_files_would_meet_is_said_once(hub, bring, status, code, said, monkeypatch):
    hub.refusal = (status, {"X-Error-Code": code} if code else {"X-Error-Message": "Invalid credentials in Authorization header"})
    with pytest.raises(UserError, match=said) as caught:
        bring()
    assert len(caught.value.problems) == 1


def test_the_token_goes_to_the_hub_alone(hub, bring, tmp_path, monkeypatch):
    """The files themselves come from another host, with a signed address; a part goes on there, too."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms-secret")
    hub.elsewhere = True
    hub.cut[SHARDS[0]] = 2_000_000
    with pytest.raises(UserError, match="does not answer"):
        bring()
    hub.cut.clear()
    bring()
    assert equal(tmp_path / "model", hub.files) and set(hub.secrets) == {None}


def test_an_adapter_is_whole_with_its_two_files(hub, bring):
    weights = save({"base_model.model.a.lora_A.weight": np.ones((2, 2), np.float32)})
    hub.commits[FIRST] = {"adapter_config.json": b'{"r": 2}', "adapter_model.safetensors": weights}
    assert bring()[0]["complete"]
    hub.commits[SECOND] = {"adapter_config.json": b'{"r": 2}', "README.md": b"#"}
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is missing"):
        bring(revision=SECOND)


def test_who_waits_for_another_download_is_told(tmp_path):
    """Two commands for the same folder: the second stood there without a word. A lock is a file that is open for writing: on
    NFS a folder, opened to read, cannot be locked alone."""
    said: list[str] = []
    entered = threading.Event()

    def second():
        with alone(tmp_path / "model", said.append):
            entered.set()

    with alone(tmp_path / "model", print):
        lock = tmp_path / "model" / ".download" / "lock"
        with lock.open("r+") as held, pytest.raises(BlockingIOError):
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        thread = threading.Thread(target=second)
        thread.start()
        while not said:
            assert thread.is_alive()
        assert not entered.is_set() and "waiting for it to end" in said[0]
    thread.join()
    assert entered.is_set() and len(said) == 1 and not (tmp_path / "model").exists()


def test_a_lock_whose_file_is_gone_is_not_held(tmp_path):
    """Whoever ends takes the empty folder and the lock's file away. If one who waited took that for the lock, a third could come in
    by a new file."""
    inside, most = [], []

    def worker():
        for _ in range(30):
            with alone(tmp_path / "model", lambda line: None):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=worker) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 120 and max(most) == 1 and not (tmp_path / "model").exists()


def test_a_complete_folder_needs_no_hub(hub, bring, tmp_path, monkeypatch):
    """HF_HUB_OFFLINE, or a cable that is out."""
    from huggingface_hub import constants

    bring()
    hub.close()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    manifest, said = bring()
    assert manifest["complete"] and "every hash is as recorded" in said
    (tmp_path / "model" / SHARDS[1]).write_bytes(b"short")
    with pytest.raises(UserError, match=f"{SHARDS[1]}: is missing or damaged"):
        bring()


def test_a_folder_without_a_record_is_taken_offline_if_it_looks_whole(hub, bring, tmp_path):
    bring()
    shutil.rmtree(tmp_path / "model" / ".download")
    hub.close()
    assert "looks whole" in bring()[1]
    (tmp_path / "model" / SHARDS[1]).unlink()
    with pytest.raises(UserError, match=f"{SHARDS[1]} is missing"):
        bring()


def test_without_the_hub_nothing_is_claimed_of_it(hub, bring, kind, tmp_path, capsys):
    """`--file x` said that the repository has no such file, `--revision v9.9` that a folder made by hand is complete."""
    hub.close()
    with pytest.raises(UserError, match="does not answer") as caught:
        bring("tokenizer.json")
    assert "no such file" not in str(caught.value)
    for name, content in hub.files.items():
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_bytes(content)
    with pytest.raises(UserError, match="does not answer"):
        bring(revision="v9.9")
    main_ends_well("download", "org/tiny", "--hub", kind, "--local-dir", str(tmp_path / "model"))
    assert "at a revision that is not recorded" in " ".join(capsys.readouterr().out.split())


def settings(tmp_path, model: str) -> Config:
    return Config(model=model, train_meta_file="a.json", train_data_dir=".", output_dir=tmp_path)


def test_a_config_may_name_a_hub(hub, kind, tmp_path, monkeypatch):
    """The model is brought on first use; the second does not ask the hub, and the config that is kept names the folder."""
    monkeypatch.chdir(tmp_path)
    config = settings(tmp_path, f"{kind}:org/tiny")
    here = with_local_model(config, print)
    assert str(here.model) == f"models/{kind}/org/tiny" and equal(tmp_path / here.model, hub.files)
    hub.close()
    hub.asked.clear()
    assert with_local_model(config, print) == here and hub.asked == []
    kept = tmp_path / "config.yaml"
    kept.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in here.model_dump(mode="json").items()))
    assert load_config(kept) == here == with_local_model(here, print)


def test_two_models_of_one_name_get_a_folder_each(hub, kind, tmp_path, monkeypatch):
    """hf:org/tiny, then modelscope:org/tiny: the second found the first in models/tiny and named an option of another command."""
    monkeypatch.chdir(tmp_path)
    other = {"hf": "modelscope", "modelscope": "hf"}[kind]
    folders = [with_local_model(settings(tmp_path, f"{hub}:org/tiny"), print).model for hub in (other, kind)]
    assert len(set(folders)) == 2


def test_what_the_download_command_brought_is_not_brought_again(hub, kind, tmp_path, monkeypatch):
    """Its example puts it into models/NAME; a folder that is whole may lie on a disk that nobody may write to."""
    monkeypatch.chdir(tmp_path)
    main_ends_well("download", "org/tiny", "--hub", kind, "--local-dir", "models/tiny")
    hub.close()
    assert str(with_local_model(settings(tmp_path, f"{kind}:org/tiny"), print).model) == "models/tiny"


@pytest.mark.parametrize("model", ["Qwen/Qwen2-VL-2B-Instruct", "HF:Qwen/Qwen2-VL-2B-Instruct", "huggingface:Qwen/x"])
def test_a_hub_that_is_not_named_rightly_is_hinted_at(tmp_path, model):
    with pytest.raises(UserError, match="is no folder") as caught:
        with_local_model(settings(tmp_path, model), print)
    assert "modelscope:ORG/NAME or hf:ORG/NAME" in caught.value.problems[0].fix


def test_plan_and_train_bring_the_model(hub, kind, tmp_path, monkeypatch, capsys):
    """`plan` needs its tokenizer; `train`, of which only the start is seen here, gets the folder."""
    whole = {path.name: path.read_bytes() for path in TINY.iterdir() if path.suffix != ".safetensors"}
    hub.commits[FIRST] = whole | {"model.safetensors": save({"a": np.ones(2, np.float32)})}
    monkeypatch.chdir(tmp_path)
    paths = {"train_meta_file": SAMPLE / "train.json", "eval_meta_file": SAMPLE / "eval.json", "train_data_dir": SAMPLE / "images"}
    overrides = [f"model={kind}:org/tiny", *(f"{key}={path}" for key, path in paths.items())]
    main_ends_well("plan", "--config", str(ROOT / "configs/demo.yaml"), *overrides, "--json")
    assert json.loads(capsys.readouterr().out)["rows"] > 0 and equal(tmp_path / "models" / kind / "org" / "tiny", hub.files)
    trained: list[Config] = []
    monkeypatch.setitem(
        sys.modules, "qwenvl_ft.train.loop", SimpleNamespace(train=lambda config, ready, on_saved: trained.append(config))
    )
    main_ends_well("train", "--config", str(ROOT / "configs/demo.yaml"), *overrides)
    assert [str(config.model) for config in trained] == [f"models/{kind}/org/tiny"]


def main_ends_well(*arguments: str) -> None:
    with pytest.raises(SystemExit) as exit:
        main(list(arguments))
    assert not exit.value.code


def test_a_local_model_is_looked_at_before_it_is_loaded(tmp_path):
    """Without this a git clone without git-lfs ends in `header too large`."""
    for name, content in tiny_repo().items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    config = settings(tmp_path, str(tmp_path))
    assert with_local_model(config, print) is config
    (tmp_path / ".git").mkdir()
    (tmp_path / SHARDS[0]).write_bytes(POINTER)
    (tmp_path / SHARDS[1]).unlink()
    with pytest.raises(UserError, match=r"git clone made without git-lfs") as caught:
        with_local_model(config, print)
    assert [SHARDS[0] in caught.value.problems[0].what, SHARDS[1] in caught.value.problems[1].what] == [True, True]


def test_the_commands_obey_the_environment(hub, kind, tmp_path):
    """As a user types it, in a process of its own: endpoint and offline come from the environment, and no torch is imported."""
    code = "import sys; from qwenvl_ft.cli.main import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, "download", "org/tiny", "--hub", kind, "--local-dir", str(tmp_path / "model")]
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    done = subprocess.run(command, env=env, text=True, capture_output=True, cwd=ROOT)
    assert done.returncode == 0 and f"complete, at {FIRST}" in done.stdout, done.stderr
    assert equal(tmp_path / "model", hub.files)
    if kind == "hf":
        again = subprocess.run(command, env={**env, "HF_HUB_OFFLINE": "1"}, text=True, capture_output=True, cwd=ROOT)
        assert again.returncode == 0 and "HF_HUB_OFFLINE is set" in again.stdout
        command[-1] = str(tmp_path / "other")
        nothing = subprocess.run(command, env={**env, "HF_HUB_OFFLINE": "1"}, text=True, capture_output=True, cwd=ROOT)
        assert nothing.returncode == 1 and "HF_HUB_OFFLINE is set" in nothing.stderr and "Traceback" not in nothing.stderr


@pytest.fixture
def merged(hub, tmp_path, monkeypatch):
    """A folder to upload. Not in the tests: Hugging Face's faster way, which no fake can speak."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for name, content in hub.files.items():
        (tmp_path / "merged" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "merged" / name).write_bytes(content)
    return tmp_path / "merged"


def log_in(monkeypatch, token: str) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", token)


@pytest.mark.parametrize("taken", [False, True])
def test_a_merged_folder_is_pushed(hub, kind, merged, monkeypatch, capsys, taken):
    """Large files go their own way there, as LFS objects. The repository is made before the merge."""
    log_in(monkeypatch, "writer")
    hub.taken = taken
    where = f"{kind}:org/tiny"
    pushable(where)
    assert hub.pushed == {} and (hub.made_private or taken)
    push(where, merged)
    assert {name: hub.pushed.get(name) for name in hub.files} == hub.files and capsys.readouterr().out == ""


@pytest.fixture(scope="module")
def an_adapter(tmp_path_factory):
    return str(random_adapter(TINY, tmp_path_factory.mktemp("adapter"), 0))


def test_no_repository_is_made_for_an_adapter_that_is_not_there(hub, kind, monkeypatch, capsys):
    log_in(monkeypatch, "writer")
    with pytest.raises(SystemExit, match="1"):
        main(["export", "--adapter", "nowhere", "--out", "nowhere-merged", "--push", f"{kind}:org/tiny"])
    assert "holds no adapter_config.json" in capsys.readouterr().err and not hub.made_private


@pytest.mark.parametrize("token", [None, "", "reader"])
def test_who_may_not_write_is_told_before_the_merge(hub, kind, monkeypatch, capsys, token, an_adapter):
    """Hours of merging ended with `the hub does not answer: 401`."""
    if token is not None:
        log_in(monkeypatch, token)
    with pytest.raises(SystemExit, match="1"):
        main(["export", "--adapter", an_adapter, "--out", "nowhere-merged", "--push", f"{kind}:org/tiny"])
    error = " ".join(capsys.readouterr().err.split())
    tool = {"hf": "hf auth login", "modelscope": "modelscope login"}[kind]
    assert "org/tiny: may not be written to" in error and f"a token that may write there (`{tool}`)" in error
    assert "does not answer" not in error and "1 problem" in error and "Traceback" not in error


def test_what_is_readable_is_not_taken_for_writable(hub, kind, monkeypatch):
    """Hugging Face's client takes a repository that is there and that may be read for one that was made."""
    if kind == "modelscope":
        pytest.skip("its hub says it at the upload only")
    log_in(monkeypatch, "reader")
    hub.taken = True
    with pytest.raises(UserError, match="may not be written to"):
        pushable(f"{kind}:org/tiny")


def test_an_upload_that_breaks_says_how_to_go_on(hub, kind, merged, monkeypatch):
    """The merged folder stands there finished, and `export` refuses to write it again."""
    log_in(monkeypatch, "writer")
    where = f"{kind}:org/tiny"
    pushable(where)

    def breaks(*of, **named):
        raise ConnectionError("reset by peer")

    from huggingface_hub import HfApi
    from modelscope_hub import HubApi

    for client in (HfApi, HubApi):
        monkeypatch.setattr(client, "upload_folder", breaks)
    spaced = merged.rename(merged.with_name("my merged"))
    with pytest.raises(UserError, match="does not answer") as caught:
        push(where, spaced)
    (problem,) = caught.value.problems
    command = shlex.split(problem.fix.split("finished folder: ")[1])
    assert command == [{"hf": "hf", "modelscope": "modelscope"}[kind], "upload", "org/tiny", str(spaced)]
    known = subprocess.run(
        [Path(sys.executable).parent / command[0], "upload", "--help"], capture_output=True, text=True
    ).stdout.lower()
    assert "repo_id" in known and "local_path" in known


@pytest.mark.parametrize("where", ["org/tiny", "hf:org/tiny@v1", "hf:tiny"])
def test_a_place_that_nothing_can_be_pushed_to_is_refused_first(where, capsys, an_adapter):
    with pytest.raises(UserError, match="names no repository"):
        pushable(where)
    with pytest.raises(SystemExit, match="1"):
        main(["export", "--adapter", an_adapter, "--out", "nowhere-merged", "--push", where])
    assert "names no repository" in capsys.readouterr().err


def test_a_data_set_of_a_hub_is_brought_once_and_read(hub, kind, tmp_path, monkeypatch, capsys):
    """Whole, one split of it, and a pattern; then without the hub."""
    monkeypatch.chdir(tmp_path)
    talk = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    hub.commits[FIRST] = {
        "README.md": b"x", "data/train-00000-of-00002.jsonl": json.dumps(talk).encode(), "other/more.json": json.dumps([talk] * 5).encode(),
        "data/train-00001-of-00002.jsonl": json.dumps(talk).encode(), "data/test-00000-of-00001.jsonl": json.dumps(talk).encode(),
    }  # fmt: skip

    def count(meta: str) -> int:
        with pytest.raises(SystemExit) as exit:
            main(["validate-meta", f"{kind}:org/tiny{meta}", "--json"])
        facts = json.loads(capsys.readouterr().out)
        assert exit.value.code == bool(facts["problems"])
        return facts["records"]

    assert count("#train") == 2 and count("#other/*.json") == 5 and count("#test") == 1
    asked = len(hub.asked)
    assert {name for name, _ in hub.asked} == {name for name in hub.files if name != "README.md"}
    hub.close()
    assert count("#train") == 2 and len(hub.asked) == asked
    test, out = f"{kind}:org/tiny#test", tmp_path / "out.jsonl"
    for command in (["convert", test, str(out)], ["validate-meta", str(out), "--against", test]):
        with pytest.raises(SystemExit) as exit:
            main(command)
        assert exit.value.code == 0, capsys.readouterr().err
    assert "1 record is in evaluation, too" in capsys.readouterr().out
    settings = {"model": TINY, "train_meta_file": [f"{kind}:org/tiny#train"], "output_dir": "out"}
    assert with_local_data(Config(**settings), print).train_meta_file[0].file.name == "*train*"


def test_a_data_set_of_several_folders_asks_for_one(hub, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub.commits[FIRST] = {"a/x.json": b"[1]", "b/x.json": b"[1]"}
    with pytest.raises(UserError, match=r"2 folders: a, b(.|\n)*#a/\*"):
        local(Path(f"{kind}:org/tiny"), print)
    hub.commits[SECOND] = {"a.png": b"1"}
    shutil.rmtree("datasets")
    with pytest.raises(UserError, match="no files of records"):
        local(Path(f"{kind}:org/tiny@{SECOND}#a.png"), print)
