"""Records, pictures and checkpoints on an object server: a run is the one that it would be with all of them here."""

import json
import subprocess
import sys
import textwrap

import pytest
from safetensors.torch import load

from qwenvl_ft.cli.main import main
from qwenvl_ft.errors import UserError
from qwenvl_ft.folders import objects
from qwenvl_ft.folders.objects import Objects
from qwenvl_ft.folders.remote_run import RemoteRun
from qwenvl_ft.folders.runs import checkpoints, newest
from qwenvl_ft.folders.whole import write_whole
from qwenvl_ft.train.launch import start
from tests.objects import BUCKET, KEYS, Cut, Server
from tests.runs import BASE, ROOT, adapter, config, few_records, same
from tests.train.conftest import SETTINGS

pytest.importorskip("s3fs", reason="the extra s3 is not installed")
pytest.importorskip("moto", reason="moto, the object server of these tests, is not installed")


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.moto.stop()


@pytest.fixture
def bucket(server, monkeypatch):
    server.reset()
    server.attach(monkeypatch)
    monkeypatch.setattr(objects, "PAUSES", (0.01,) * 4)
    return server.fs


def train(folder, monkeypatch, machine, **settings):
    """`qwenvl-ft train` on a machine whose disks hold nothing but the base; its exit code."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / machine))
    values = {
        **BASE,
        **SETTINGS,
        "save_total_limit": 1,
        "train_meta_file": f"s3://{BUCKET}/data/few.json",
        "train_data_dir": f"s3://{BUCKET}/data/images",
    }
    (folder / "lora.yaml").write_text("\n".join(f"{key}: {value}" for key, value in {**values, **settings}.items()))
    with pytest.raises(SystemExit) as ended:
        main(["train", "--config", str(folder / "lora.yaml")])
    return ended.value.code


def test_a_run_whose_machine_and_connection_are_lost_goes_on_elsewhere_as_if_nothing_was(
    bucket, server, plain, tmp_path, monkeypatch, capsys
):
    """The connection dies amid the second checkpoint, as at a SIGKILL: half of it is there, without its manifest."""
    local = adapter(plain)
    bucket.put_file(str(few_records(tmp_path)), f"{BUCKET}/data/few.json")
    names = {name.split("</img>")[0] for name in few_records(tmp_path).read_text().split("<img>")[1:]}
    for name in names:
        bucket.put_file(str(ROOT / "data/sample/images" / name), f"{BUCKET}/data/images/{name}")
    address = f"s3://{BUCKET}/runs/first"

    dying = Cut(server.port, last=f"PUT /{BUCKET}/runs/first/checkpoint-4/optimizer".encode())
    server.attach(monkeypatch, dying.port)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    assert train(tmp_path, monkeypatch, "one", output_dir=address) == 1
    said = capsys.readouterr().err
    assert f"{address}/checkpoint-4/optimizer.safetensors: cannot be reached" in said and "Traceback" not in said
    half = {name.rpartition("/")[2] for name in bucket.find(f"{BUCKET}/runs/first/checkpoint-4")}
    assert "adapter_model.safetensors" in half and "MANIFEST.json" not in half

    assert train(tmp_path, monkeypatch, "two", output_dir=address) == 1  # the server is still out of reach
    cutting = Cut(server.port, num_bytes=150_000)
    server.attach(monkeypatch, cutting.port)
    assert train(tmp_path, monkeypatch, "two", output_dir=address) == 1
    assert "already holds checkpoint-2" in capsys.readouterr().err
    assert train(tmp_path, monkeypatch, "two", output_dir=address, resume="true") == 0
    assert cutting.cuts
    assert same(load(bucket.cat_file(f"{BUCKET}/runs/first/adapter_model.safetensors")), local)
    there = {name.split("/")[3] for name in bucket.find(f"{BUCKET}/runs/first") if "checkpoint-" in name}
    assert there == {"checkpoint-4"}  # save_total_limit

    out = next((tmp_path / "two/qwenvl_ft/runs").iterdir())
    assert same(adapter(out), local) and "going on from" in capsys.readouterr().out
    kept = [path.read_text(errors="ignore") for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(KEYS["AWS_SECRET_ACCESS_KEY"] in text for text in [*kept, said])
    assert json.loads((out / "plan.json").read_text())["files"][0]["meta"] == f"s3://{BUCKET}/data/few.json"
    assert f"train_data_dir: s3://{BUCKET}/data/images" in (out / "config.yaml").read_text()


def test_a_process_killed_at_any_moment_of_sending_a_checkpoint_leaves_it_whole_or_not_there(bucket, server, tmp_path):
    def write(folder):
        for name in ("adapter_model.safetensors", "optimizer.safetensors", "state.json"):
            (folder / name).write_text(name * 100)

    kept = RemoteRun(Objects(f"s3://{BUCKET}/run"), tmp_path)
    write_whole(kept.scratch / "checkpoint-7", write)
    killed = """
        import os, signal, sys
        from itertools import count
        from pathlib import Path
        from qwenvl_ft.folders.objects import Objects
        from qwenvl_ft.folders.remote_run import RemoteRun
        import s3fs

        class Killed(Objects):
            def put(self, path, name):
                if next(numbers) == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                super().put(path, name)

        for at in range(5):
            numbers = count()
            if not os.fork():
                run = RemoteRun(Objects("s3://bucket/run"), Path(sys.argv[1]))
                sent = RemoteRun(Killed(f"s3://bucket/run{at}"), Path(sys.argv[1]))
                sent._put(run.scratch / "checkpoint-7", "checkpoint-7")
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.wait()[1]) == (-9 if at < 4 else 0)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(killed), str(tmp_path)], check=True, cwd=ROOT)
    for at in range(5):
        back = RemoteRun(Objects(f"s3://{BUCKET}/run{at}"), tmp_path / str(at))
        back.bring_back(resume=True)
        found = newest(back.scratch)[0]
        assert (found and found.name) == ("checkpoint-7" if at == 4 else None)
        assert len(bucket.find(f"{BUCKET}/run{at}")) == at


def test_an_output_dir_that_no_run_may_have_is_refused(bucket, tmp_path):
    bucket.pipe_file(f"{BUCKET}/else/notes.txt", b"not of a run")
    with pytest.raises(UserError, match="holds files and none of a run"):
        RemoteRun.of(f"s3://{BUCKET}/else", tmp_path).bring_back(resume=True)
    with pytest.raises(UserError, match="give that as init_adapter"):
        RemoteRun.of(f"s3://{BUCKET}/run", tmp_path).bring_back(resume="weights")
    with pytest.raises(UserError, match="is not written to"):
        RemoteRun.of("https://host/run", tmp_path)
    with pytest.raises(UserError, match="is no folder"):  # in Python, where nobody would send what is saved
        start(config(tmp_path, output_dir=f"s3://{BUCKET}/run"))
    assert RemoteRun.of(tmp_path, tmp_path) is None


def test_a_checkpoint_that_could_not_be_sent_stays_for_the_run_that_goes_on_here(bucket, tmp_path):
    here = RemoteRun.of(f"s3://{BUCKET}/run", tmp_path)
    for step in (1, 2):
        write_whole(here.scratch / f"checkpoint-{step}", lambda folder: (folder / "state.json").write_text("{}") and None)
    here.keep(here.scratch / "checkpoint-1")
    here.bring_back(resume=True)
    assert [folder.name for folder in checkpoints(here.scratch)] == ["checkpoint-1", "checkpoint-2"]
    bucket.rm(f"{BUCKET}/run", recursive=True)
    here.bring_back(resume=False)  # a run that begins there finds nothing of an old one
    assert checkpoints(here.scratch) == []
