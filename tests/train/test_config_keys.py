"""Every config key changes what a run does: one change each, and where it shows."""

import json
import logging

import pytest

from qwenvl_ft.config import Config
from tests.conftest import TINY
from tests.runs import adapter, config, few_records, metrics, run, same

# Keys that change the trained weights, and a value that does.
CHANGES_THE_WEIGHTS = {
    "max_pixels": 16 * 28 * 28, "min_pixels": 110 * 28 * 28, "row_tokens": 1400, "lora_on": ["language", "merger"], "lora_rank": 2,
    "lora_targets": ["q_proj"], "lora_alpha": 4, "lora_dropout": 0.3, "max_steps": 1, "rows_per_step": 1, "learning_rate": 1e-4, "lr_scheduler_type": "constant",
    "warmup_ratio": 0.6, "weight_decay": 20.0, "max_grad_norm": 1e-7, "seed": 7, "dtype": "bfloat16",
    "share_prefix": "off",
}  # fmt: skip
# Keys that show elsewhere, each in a test below or in the named one.
SHOWS_ELSEWHERE = {
    "model": "test_export", "train_meta_file": "test_training", "train_data_dir": "test_meta", "output_dir": "test_training",
    "cache_features": "test_features", "resume": "test_training", "run_name": "test_training",
    "ddp_timeout": "test_two_processes", "shard_base": "test_ways",
    "thinking": "test_thinking", "boxes": "test_boxes", "media_position": "test_media_position", "fetch_media": "test_media", "format": "test_forms", "columns": "test_forms",
    "use_rslora": "test_tuning", "use_dora": "test_tuning", "loraplus_lr_ratio": "test_tuning", "init_lora_weights": "test_tuning",
    "init_adapter": "test_tuning", "keep_best": "test_tuning", "early_stopping_patience": "test_tuning",
    "eval_metric": "test_answers", "eval_samples": "test_answers", "eval_max_new_tokens": "test_answers",
    "quantization": "test_quantization", "fit": "test_activations",
    "video_fps": "test_videos", "video_max_frames": "test_videos", "video_max_pixels": "test_videos",
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("key", CHANGES_THE_WEIGHTS)
def test_the_key_changes_the_weights(key, plain, tmp_path):
    assert not same(plain, run(tmp_path, **{key: CHANGES_THE_WEIGHTS[key]}))


def test_epochs_are_how_often_every_record_is_seen(tmp_path):
    run(tmp_path, max_steps=None, num_train_epochs=2, rows_per_step=3)
    rows = json.loads((tmp_path / "run" / "plan.json").read_text())["rows"]
    assert len(metrics(tmp_path / "run")) == 2 * -(-rows // 3)


def test_gradient_checkpointing_is_switched_on_and_changes_no_result(plain, tmp_path, monkeypatch):
    import transformers

    switched = []
    stock = transformers.PreTrainedModel.gradient_checkpointing_enable
    monkeypatch.setattr(transformers.PreTrainedModel, "gradient_checkpointing_enable",
                        lambda self, *args: (switched.append(args), stock(self, *args))[1])  # fmt: skip
    trained = run(tmp_path, gradient_checkpointing=True)
    assert switched and same(trained, plain)


def test_attention_is_the_one_asked_for():
    from qwenvl_ft.model.attention import attention_of
    from qwenvl_ft.model.load import load_base

    for asked, got in {"eager": "eager", "sdpa": "sdpa", "auto": "varlen", "varlen": "varlen"}.items():
        assert attention_of(load_base(TINY, "float32", asked, packed=True)) == got
    assert attention_of(load_base(TINY, "float32")) == "sdpa"


def test_trees_are_run_by_varlen_and_what_keeps_records_from_them_is_said(tmp_path, monkeypatch):
    from qwenvl_ft.data.prepare import prepare
    from qwenvl_ft.train import setup

    def planned(**settings):
        """(whether rows hold trees, the note about them, what is said to be paid for)"""
        known = config(tmp_path, **settings)
        prepared = prepare(known)
        summary = prepared.summary(known)
        paid, total = summary["paid"], sum(prepared.tokens(row) for row in range(summary["rows"]))
        assert paid["tokens"] == total and (total < summary["tokens"]["total"]) == (paid["media"] < paid["media_shown"])
        return prepared.shares, " ".join(note for note in summary["notes"] if "share a prefix" in note)

    assert planned() == (True, "") and planned(attn_implementation="varlen") == (True, "")
    reasons = {"share_prefix": "off", "lora_dropout": 0.1, "attn_implementation": "sdpa"}
    for key, value in reasons.items():
        shares, note = planned(**{key: value})
        assert not shares and f"{key} is {value}" in note
    taken, load = [], setup.load_base

    def note(model, dtype, attention, packed, device, quantization):
        taken.append(attention)
        return load(model, dtype, attention, packed, device, quantization)

    monkeypatch.setattr(setup, "load_base", note)
    run(tmp_path, max_steps=1)
    run(tmp_path, "other", max_steps=1, share_prefix="off")
    assert taken == ["varlen", "auto"], "auto may be flash_attention_2, which runs no trees"


def test_workers_build_the_rows_and_change_no_result(plain, tmp_path, monkeypatch):
    import torch.utils.data

    import qwenvl_ft.train.state

    asked = []

    class Loader(torch.utils.data.DataLoader):
        def __init__(self, *args, num_workers, **kwargs):
            asked.append(num_workers)
            super().__init__(*args, num_workers=num_workers, **kwargs)

    monkeypatch.setattr(qwenvl_ft.train.state, "DataLoader", Loader)
    assert same(plain, run(tmp_path, dataloader_num_workers=2)) and asked == [2]


def test_checkpoints_come_when_they_are_due_and_the_oldest_go(tmp_path):
    run(tmp_path, save_steps=1, save_total_limit=2)
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


def test_evaluation_comes_when_it_is_due(tmp_path):
    few = few_records(tmp_path, 3)
    held_out = tmp_path / "held_out.json"
    held_out.write_text(few.read_text())
    run(tmp_path, eval_meta_file=held_out, eval_steps=2)
    assert ["eval_loss" in line for line in metrics(tmp_path / "run")] == [False, True, True]
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert results["eval_losses"].keys() == {"2", "3"}


def test_evaluation_pictures_may_lie_elsewhere(tmp_path):
    from qwenvl_ft.data.prepare import prepare
    from qwenvl_ft.errors import UserError

    few = few_records(tmp_path)
    (tmp_path / "nothing").mkdir()
    assert prepare(config(tmp_path, eval_meta_file=few), evaluation=True).num_records
    with pytest.raises(UserError, match="pictures is in this folder"):
        prepare(config(tmp_path, eval_meta_file=few, eval_data_dir=tmp_path / "nothing"), evaluation=True)


def test_bad_records_stop_the_run_or_are_counted(tmp_path):
    from qwenvl_ft.data.prepare import prepare
    from qwenvl_ft.errors import UserError

    records = json.loads(few_records(tmp_path).read_text())
    records[1]["conversations"][1]["value"] = ""
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(records))
    with pytest.raises(
        UserError, match=r"bad\.json\[1\]\.conversations\[1\]: the assistant's turn is empty(.|\n)*on_bad_record: skip"
    ):
        prepare(config(tmp_path, train_meta_file=bad))
    settings = config(tmp_path, train_meta_file=bad, on_bad_record="skip", row_tokens=400)
    summary = prepare(settings).summary(settings)
    reasons = [problem["what"] for problem in summary["skipped"]]
    assert summary["records"] == 8 and summary["used"] == 8 - len(reasons)
    assert "the assistant's turn is empty" in reasons and any("a row holds 400" in reason for reason in reasons)


def test_a_line_of_progress_comes_at_the_first_step_and_when_it_is_due(tmp_path, capsys):
    run(tmp_path, logging_steps=2)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("step ")] == ["1/3", "2/3", "3/3"]


def test_tensorboard_is_reported_to_when_asked(tmp_path):
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    run(tmp_path, report_to=["tensorboard"])
    assert list((tmp_path / "run").glob("qwenvl_ft/**/events.out.tfevents.*"))


def test_every_key_has_a_test():
    here = set(CHANGES_THE_WEIGHTS) | set(SHOWS_ELSEWHERE) | {
        "num_train_epochs", "gradient_checkpointing", "attn_implementation", "dataloader_num_workers", "save_steps",
        "save_total_limit", "eval_meta_file", "eval_steps", "eval_data_dir", "on_bad_record", "logging_steps", "report_to",
    }  # fmt: skip
    assert here == set(Config.model_fields)


def test_the_adapter_of_a_run_has_peft_s_own_files(tmp_path):
    run(tmp_path)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    wanted = "adapter_config.json adapter_model.safetensors processor_config.json chat_template.jinja config.yaml plan.json packed.jsonl metrics.jsonl loss.svg"
    assert {*wanted.split(), "all_results.json"} <= names and ".incoming" not in names
    assert adapter(tmp_path / "run")
