"""The loop: one division, one result for one process and two, going on where a run was cut off, stopping rather than spoiling."""

import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import time

import accelerate
import pytest
import torch
from PIL import Image, ImageOps
from torch import nn

from qwenvl_ft.cli.main import main
from qwenvl_ft.data.chat import Chat
from qwenvl_ft.errors import NonFiniteLoss, UserError
from qwenvl_ft.folders.whole import seal
from qwenvl_ft.model.load import limited
from qwenvl_ft.train import setup, state
from qwenvl_ft.train.loop import learning_rate
from qwenvl_ft.train.output_dir import print_next
from qwenvl_ft.train.state import Run
from tests.runs import BASE, ROOT, adapter, config, difference, launch, metrics, run, same
from tests.serving import wait_for
from tests.train.conftest import SETTINGS


def test_a_step_divides_once_by_the_tokens_taught_in_all_rows(tmp_path):
    """Against AdamW on the plain mean over all taught tokens of the step, computed here without the loop.

    transformers' Trainer takes the mean of the rows' means for Qwen2.5-VL and 3-VL: short answers would count more.
    """
    from peft import get_peft_model_state_dict
    from transformers import AutoProcessor

    from qwenvl_ft.data.prepare import prepare, schedule
    from qwenvl_ft.data.rows import Rows
    from qwenvl_ft.model.load import add_lora, load_base, trainable
    from qwenvl_ft.model.lora import fuse_lora
    from qwenvl_ft.model.loss import summed_loss

    settings = config(tmp_path, max_steps=1, max_grad_norm=1e9, lr_scheduler_type="constant", warmup_ratio=0.0)
    prepared = prepare(settings)
    ((_, step),) = schedule(prepared, settings)
    counts = [prepared.taught_tokens(row) for row in step]
    assert len(step) == 2 and counts[0] != counts[1]  # else a mean of means would be the same
    processor = AutoProcessor.from_pretrained(settings.model)
    rows = Rows(prepared.scripts, prepared.plan.rows, prepared.chat, limited(processor, prepared.chat))
    model = add_lora(load_base(settings.model, "float32", "varlen"), prepared.chat.family, ["language"], 4, 8, 0.0, settings.seed)
    fuse_lora(model)  # AdamW's first step is its gradient's sign: where that is about 0, any other order of sums would show
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=settings.learning_rate, weight_decay=0.0)
    loss = sum(summed_loss(model, model, rows[row], False) for row in step) / sum(counts)
    loss.backward()
    norm = torch.stack([of.grad.norm() for of in trainable(model).values()]).norm().item()
    optimizer.step()

    trained = run(tmp_path, max_steps=1, max_grad_norm=1e9, lr_scheduler_type="constant", warmup_ratio=0.0)
    (line,) = metrics(tmp_path / "run")
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-6) and line["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert difference(get_peft_model_state_dict(model), trained) < 1e-4


def test_the_same_run_gives_the_same_bits(plain, tmp_path):
    assert same(adapter(plain), run(tmp_path, **SETTINGS))


def test_a_killed_run_goes_on_to_the_same_bits(plain, tmp_path):
    process = launch(tmp_path, "run", "--num_processes", "1", wait=False, **SETTINGS)
    deadline = time.monotonic() + 200
    while not (tmp_path / "run" / "checkpoint-2").is_dir():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert same(adapter(plain), run(tmp_path, **SETTINGS, resume=True))
    assert [line["loss"] for line in metrics(plain)] == [line["loss"] for line in metrics(tmp_path / "run")]


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C (SIGINT)")])
def test_a_signal_saves_at_the_end_of_the_step_and_leaves_no_final_adapter(number, name, plain, tmp_path, monkeypatch, capsys):
    """Ctrl-C reaches every process of a run: two SIGINT, 2 each, were summed up to signal 4."""
    backward, reduce = Run.backward, accelerate.Accelerator.reduce
    monkeypatch.setattr(accelerate.Accelerator, "reduce", lambda self, total: 2 * reduce(self, total))  # as two would

    def interrupted(self, loss, last):
        os.kill(os.getpid(), number)
        monkeypatch.setattr(Run, "backward", backward)
        return backward(self, loss, last)

    monkeypatch.setattr(Run, "backward", interrupted)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, **SETTINGS)
    assert stopped.value.code == 128 + number
    assert f"stopped by {name} after step 1; go on with resume=true" in capsys.readouterr().out
    monkeypatch.undo()
    os.chdir(ROOT)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()
    assert same(adapter(plain), run(tmp_path, **SETTINGS, resume=True))


def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_the_records(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "summed_loss", lambda *args: torch.tensor(float("nan"), requires_grad=True))
    with pytest.raises(NonFiniteLoss, match=r"few\.json\[\d\]"):
        run(tmp_path)
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_a_base_without_its_weights_is_said_before_anything_is_loaded(tmp_path):
    """A folder with all but the weights, as `download --file '*.json'` leaves it, ended in a traceback of transformers."""
    shutil.copytree(ROOT / "data/tiny", tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(UserError, match="holds no safetensors"):
        run(tmp_path, model=tmp_path / "base")
    assert not (tmp_path / "run").exists()


def test_what_one_process_alone_met_is_said_by_that_one(tmp_path, monkeypatch, capsys):
    """The command line prints the problems of the first process of a machine only; this row was another's."""
    monkeypatch.setattr(state, "summed_loss", lambda *args: torch.tensor(float("nan"), requires_grad=True))
    monkeypatch.setattr(accelerate.Accelerator, "is_local_main_process", False)
    with pytest.raises(NonFiniteLoss):
        run(tmp_path)
    assert "few.json[" in capsys.readouterr().err


@pytest.mark.parametrize(("first", "error"), [(True, NonFiniteLoss), (False, SystemExit)])
def test_what_all_processes_meet_is_said_by_the_first(first, error, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(accelerate.Accelerator, "clip_grad_norm_", lambda *args: torch.tensor(float("inf")))
    monkeypatch.setattr(accelerate.Accelerator, "is_local_main_process", first)
    with pytest.raises(error) as stopped:
        run(tmp_path)
    assert "few.json[" not in capsys.readouterr().err  # the command line prints it
    assert getattr(stopped.value, "code", 1) == 1


def test_an_output_dir_that_holds_something_else_is_refused_before_a_record_is_read(tmp_path):
    """Records and model were read first, and then the run was mixed into the user's files."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="holds files and none of a run"):
        run(tmp_path, train_meta_file=tmp_path / "no.json")
    with pytest.raises(UserError, match="is no folder to write to"):
        run(tmp_path, name="run/thesis.tex", train_meta_file=tmp_path / "no.json")
    with pytest.raises(UserError, match="output_dir: /proc/run: "):
        run(tmp_path, name="/proc/run")


def test_an_attention_that_is_not_installed_is_said_in_words(tmp_path):
    """It ended in transformers' ImportError."""
    with pytest.raises(UserError, match=r"flash_attention_2: cannot run here: (.|\n)*attn_implementation=auto"):
        run(tmp_path, attn_implementation="flash_attention_2")


def test_wandb_without_a_key_is_said_before_the_model_is_loaded(tmp_path, monkeypatch):
    """Its UsageError came after minutes of loading."""
    import wandb

    wandb.teardown()  # it keeps the environment that it met first, here and for the tests after this one
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "NETRC", "WANDB_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setattr(setup, "load_base", None)
    with pytest.raises(UserError, match=r"report_to: wandb: No API key(.|\n)*`wandb login`, or set WANDB_MODE=offline"):
        run(tmp_path, report_to=["wandb"])
    wandb.teardown()


def test_without_held_out_records_the_proposed_eval_says_what_it_is_worth(tmp_path, capsys):
    settings = config(tmp_path)
    print_next(settings)
    line = next(line for line in capsys.readouterr().out.splitlines() if " eval " in line)
    assert line.endswith("  # the training records: how it does on others it does not say")
    print_next(settings.model_copy(update={"eval_meta_file": settings.train_meta_file}))
    assert "#" not in capsys.readouterr().out


def test_the_proposed_eval_reads_the_same_file_alike(tmp_path, capsys):
    """What `columns` leaves out was lost from the run's settings, and records that were skipped ended the eval."""
    said = {"question": "<img>two_col_103562.png</img>What?", "answer": "A chart", "source": "mine"}
    broken = {"question": "<img>none.png</img>What?", "answer": "A chart", "source": "mine"}
    (tmp_path / "own.json").write_text(json.dumps([said, broken, said | {"answer": "Titles"}]))
    columns = {"source": None}
    run(tmp_path, train_meta_file=tmp_path / "own.json", columns=columns, on_bad_record="skip", max_steps=1)
    command = next(line for line in capsys.readouterr().out.splitlines() if " eval " in line).split("  # ")[0]
    with pytest.raises(SystemExit) as ended:
        main([*shlex.split(command)[1:], "--max-new-tokens", "2", "--json"])
    printed = capsys.readouterr()
    assert ended.value.code == 0 and json.loads(printed.out)["skipped"] == 1
    assert json.loads(printed.out)["questions"] == 2 and "none.png" in printed.err
    with pytest.raises(SystemExit):
        main([*shlex.split(command.split(" --config")[0])[1:]])
    assert "source" in capsys.readouterr().err


def test_a_folder_with_checkpoints_is_not_trained_into_unasked(plain, tmp_path):
    run(tmp_path, save_steps=1)
    with pytest.raises(UserError, match="resume=true"):
        run(tmp_path)


def test_resume_refuses_another_run_and_says_what_changed(tmp_path):
    run(tmp_path, save_steps=1)
    with pytest.raises(UserError, match=r"learning_rate was 0.001 and is now 0.002"):
        run(tmp_path, resume=True, learning_rate=2e-3)


def test_resume_says_in_words_what_else_changed_and_each_cause_once(tmp_path):
    """It said: training records was fc104f17 and is now b476d21a; and the same of the pictures and the packed rows."""

    def said(**settings):
        with pytest.raises(UserError) as refused:
            run(tmp_path, resume=True, **settings)
        return [problem.what for problem in refused.value.problems]

    run(tmp_path, save_steps=1)
    fewer = tmp_path / "fewer.json"
    fewer.write_text(json.dumps(json.loads((tmp_path / "few.json").read_text())[:6]))
    assert said(train_meta_file=fewer) == ["the training records changed: 8 before, 6 now"]
    assert said(train_meta_file=fewer, seed=7) == ["seed was 42 and is now 7", "the training records changed: 8 before, 6 now"]
    assert said(row_tokens=1400) == ["row_tokens was 700 and is now 1400"]
    unshared = "share_prefix was auto and is now off, by itself or by attn_implementation"
    assert said(share_prefix="off") == [unshared] == said(attn_implementation="sdpa")
    assert said(media_position="last") == ["media_position was as_written and is now last"]
    assert said(lora_dropout=0.1) == ["lora_dropout was 0.0 and is now 0.1"]
    assert said(max_pixels=8 * 28 * 28) == ["pictures are seen in other sizes: min_pixels or max_pixels changed"]
    shutil.copytree(ROOT / "data/sample/images", tmp_path / "images")
    assert said(train_data_dir=tmp_path / "images") == ["the pictures changed: their folder, names or sizes"]
    shutil.copytree(ROOT / "data/tiny", tmp_path / "model")
    facts = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(facts | {"note": "another"}))
    assert said(model=tmp_path / "model") == ["the base model changed: its config.json or its weights"]


def test_resume_sees_other_sizes_of_pictures_where_the_same_records_share_rows(tmp_path):
    """It compared which records share a row: with a record a row, as Qwen3.5 has it, any max_pixels would do. And it went on."""
    (one := tmp_path / "one.json").write_text(json.dumps(json.loads((ROOT / "data/sample/train.json").read_text())[:1]))
    settings = {"train_meta_file": one, "max_steps": 2, "save_steps": 1}
    run(tmp_path, **settings)
    with pytest.raises(UserError, match="seen in other sizes: min_pixels or max_pixels changed"):
        run(tmp_path, resume=True, max_pixels=8 * 28 * 28, **settings)


def test_resume_sees_what_changed_under_the_same_names_and_sizes(tmp_path):
    """It compared names and sizes of pictures, and 4 KiB of each tensor of the base; the processor not at all. And it went on."""
    pictures, base = tmp_path / "images", tmp_path / "base"
    shutil.copytree(ROOT / "data/sample/images", pictures)
    shutil.copytree(ROOT / "data/tiny", base)
    few = tmp_path / "few.json"
    settings = {"train_data_dir": pictures, "model": base, "eval_meta_file": tmp_path / "held_out.json", "max_steps": 1}
    shutil.copy(config(tmp_path).train_meta_file, tmp_path / "held_out.json")
    run(tmp_path, **settings)

    def said(path, change):
        before, times = path.read_bytes(), path.stat()
        change(path)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        with pytest.raises(UserError) as refused:
            run(tmp_path, **settings, resume=True)
        path.write_bytes(before)
        return [problem.what for problem in refused.value.problems]

    def invert(path):
        with Image.open(path) as picture:
            ImageOps.invert(picture.convert("RGB")).save(path, picture.format)

    def last_value(path):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1  # of a tensor of which the middle was looked at
        path.write_bytes(content)

    def mean(path):
        content = json.loads(path.read_text())
        content["image_processor"]["image_mean"] = [0.1, 0.2, 0.3]
        path.write_text(json.dumps(content))

    def another_answer(path):
        content = json.loads(path.read_text())
        content[0]["conversations"][1]["value"] += " and more"
        path.write_text(json.dumps(content))

    name = re.search(r"<img>(.*?)</img>", few.read_text())[1]
    of_both = "the records or pictures of the evaluation changed, so its losses could not be compared"
    contents = "the pictures changed: what is in them, under the same names and in the same sizes"
    assert said(pictures / name, invert) == [contents, of_both]
    assert said(base / "model.safetensors", last_value) == ["the base model changed: its config.json or its weights"]
    assert said(base / "processor_config.json", mean) == ["the base model's processor changed: its settings of pictures"]
    assert said(tmp_path / "held_out.json", another_answer) == [of_both]
    trained = adapter(tmp_path / "run")
    assert same(trained, run(tmp_path, **settings, resume=True))  # all is as it was


def test_resume_sees_pictures_that_have_swapped_their_names(tmp_path):
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (112, 112), color).save(tmp_path / name)
        os.utime(tmp_path / name, ns=(10**18, 10**18))
    talk = [{"conversations": [{"from": "user", "value": f"<img>{name}.png</img>colour?"},
                               {"from": "assistant", "value": word}]} for name, word in (("a", "red"), ("b", "blue"))]  # fmt: skip
    (tmp_path / "talk.json").write_text(json.dumps(talk))
    settings = {"train_meta_file": tmp_path / "talk.json", "train_data_dir": tmp_path, "max_steps": 1}
    run(tmp_path, **settings)
    (tmp_path / "a.png").rename(tmp_path / "c"), (tmp_path / "b.png").rename(tmp_path / "a.png")
    (tmp_path / "c").rename(tmp_path / "b.png")
    with pytest.raises(UserError, match="the pictures changed: what is in them"):
        run(tmp_path, **settings, resume=True)


def test_resume_sees_that_another_answer_is_taught_in_the_same_words(tmp_path, monkeypatch):
    """The records' ids alone were compared, not which of them are taught."""
    run(tmp_path, max_steps=1)
    write = Chat.write_scripts

    def untaught(chat, record):
        scripts = write(chat, record)
        if record.where == "few.json[0]":
            labels = scripts[0].labels
            labels[labels.index(next(label for label in labels if label != -100))] = -100
        return scripts

    monkeypatch.setattr(Chat, "write_scripts", untaught)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # where no table is yet
    with pytest.raises(UserError, match="the training records changed"):
        run(tmp_path, max_steps=1, resume=True)


def test_a_checkpoint_of_another_version_is_refused_in_words(tmp_path):
    """Its steps took other rows: going on from it would repeat some and miss others."""
    run(tmp_path, max_steps=1)
    folder = tmp_path / "run" / "checkpoint-1"
    facts = json.loads((folder / "state.json").read_text())
    del facts["form"]
    (folder / "state.json").write_text(json.dumps(facts))
    seal(folder, {})
    with pytest.raises(UserError, match="was written by another version of this tool"):
        run(tmp_path, max_steps=1, resume=True)


def test_resume_passes_over_a_damaged_checkpoint(tmp_path):
    whole = run(tmp_path, save_steps=1)
    damaged = tmp_path / "run" / "checkpoint-3" / "optimizer.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    (tmp_path / "run" / "adapter_model.safetensors").unlink()
    assert same(whole, run(tmp_path, save_steps=1, resume=True))


def test_nothing_here_reads_a_pickle():
    """whole.py said that none is read, while resuming under DeepSpeed did."""
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "qwenvl_ft").rglob("*.py"))
    assert re.findall(r"torch\.load\(|\.load_checkpoint\(|pickle\.load|import pickle", source) == []


def test_the_losses_are_in_wandbs_offline_files(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_PROJECT", "a project")
    run(tmp_path, report_to=["wandb"], run_name="a name", save_steps=2)
    from wandb.proto.wandb_internal_pb2 import Record

    def held():
        (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
        return [Record.FromString(content) for content in logged(file.read_bytes())]

    wait_for(lambda: any(record.HasField("exit") for record in held()))  # wandb's own process writes it, the last of all
    records = held()
    losses = [
        float(item.value_json) for record in records for item in record.history.item if "loss" in (item.key, *item.nested_key)
    ]
    assert losses == pytest.approx([line["loss"] for line in metrics(tmp_path / "run")])
    assert ("a name", "a project") in [(record.run.display_name, record.run.project) for record in records]
    # It goes on as the same run there.
    (before,) = tmp_path.glob("wandb/offline-run-*")
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    run(tmp_path, report_to=["wandb"], run_name="a name", save_steps=2, resume=True)
    names = {path.name for path in tmp_path.glob("wandb/offline-run-*")}
    assert len(names) == 2 and {name.rsplit("-", 1)[-1] for name in names} == {before.name.rsplit("-", 1)[-1]}


def logged(content):
    """The records of wandb's file: a header of 7 bytes, then LevelDB's log of blocks of 32 KiB (crc, length, kind, part)."""
    whole, at = b"", 7
    while at + 7 < len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the record's only or last part
            yield whole
            whole = b""


def test_the_rate_warms_up_and_follows_its_schedule(tmp_path):
    def rates(**settings):
        return [learning_rate(step, 10, config(tmp_path, learning_rate=1.0, **settings)) for step in range(1, 11)]

    assert rates(lr_scheduler_type="constant", warmup_ratio=0.0) == [1.0] * 10
    assert rates(lr_scheduler_type="linear", warmup_ratio=0.2)[:3] == [0.5, 1.0, 1.0]
    cosine = rates(lr_scheduler_type="cosine", warmup_ratio=0.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0), 10)
    for rate in cosine:
        assert rate == pytest.approx(reference.get_last_lr()[0])
        reference.optimizer.step()
        reference.step()


def test_a_launch_that_is_not_what_was_asked_for_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were asked for"):
        run(tmp_path)


def test_held_out_loss_is_that_of_its_records(tmp_path):
    few = config(tmp_path).train_meta_file
    run(tmp_path, max_steps=1, learning_rate=1e-12, rows_per_step=100, eval_meta_file=few)
    (line,) = metrics(tmp_path / "run")
    assert line["eval_loss"] == pytest.approx(line["loss"], rel=1e-5)  # one step over all rows, before it learnt anything
    assert BASE["max_steps"] == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_changes_during_a_run_is_named(workers, tmp_path, monkeypatch):
    """From a worker it came as a text without problems, and the command line ended in a traceback."""
    shutil.copytree(ROOT / "data/sample/images", tmp_path / "images")

    def spoil(*_):
        for path in (tmp_path / "images").iterdir():
            path.write_bytes(b"")

    monkeypatch.setattr(setup, "write_settings", spoil)
    with pytest.raises(UserError) as error:
        run(tmp_path, train_data_dir=tmp_path / "images", dataloader_num_workers=workers)
    (problem,) = error.value.problems
    assert problem.where.startswith("few.json[") and problem.what.endswith("is empty")
    assert error.tb and not multiprocessing.active_children()
