"""What `qwenvl-ft doctor` finds, finding by finding, in folders of a few bytes; and what it says of the machine."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qwenvl_ft import machine
from qwenvl_ft.checkpoint import seal
from qwenvl_ft.cli import main
from qwenvl_ft.doctor import examine
from qwenvl_ft.prepare import BASE, base_fingerprint
from tests.conftest import ROOT

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 5\n"
LAYER = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
BLOCK = "base_model.model.model.visual.blocks.0.attn.qkv"
MERGER = "base_model.model.model.visual.merger.mlp.0"


def lora(*modules: str, rank: int = 4) -> dict[str, np.ndarray]:
    return {f"{module}.lora_{side}.weight": np.ones(shape, np.float32)
            for module in modules for side, shape in (("A", (rank, 6)), ("B", (6, rank)))}  # fmt: skip


def write(folder, **files) -> None:
    """JSON files, `a__b` for a.b."""
    folder.mkdir(exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(json.dumps(value))


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "base"
    size = {"shortest_edge": 3136, "longest_edge": 1003520}
    write(folder, config__json={"model_type": "qwen2_vl", "dtype": "bfloat16"}, tokenizer__json={},
          preprocessor_config__json={"patch_size": 14, "merge_size": 2, "size": size})  # fmt: skip
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    save_file({"a": np.ones(3, np.float32)}, folder / "model-1.safetensors")
    save_file({"b": np.ones(3, np.float32)}, folder / "model-2.safetensors")
    write(folder, **{"model.safetensors.index__json": {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}})
    return folder


@pytest.fixture
def adapter(model, tmp_path):
    folder = tmp_path / "adapter"
    write(folder, adapter_config__json={"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": str(model)})
    save_file(lora(LAYER), folder / "adapter_model.safetensors")
    write(folder, **{BASE: base_fingerprint(model)})
    return folder


def complaints(folder) -> list[str]:
    return [f"{problem.where}: {problem.what}" for problem in examine(folder).problems]


def test_a_whole_model_is_servable(model):
    found = examine(model)
    assert found.problems == [] and found.facts["vLLM"] == f"vllm serve {model}"
    assert (found.facts["model_type"], found.facts["stored as"]) == ("qwen2_vl", "bfloat16")


MODEL_DAMAGE = {
    "config.json is missing": lambda folder: (folder / "config.json").unlink(),
    "is no JSON object": lambda folder: (folder / "config.json").write_text("[1"),
    "is not one of qwen2_vl": lambda folder: write(folder, config__json={"model_type": "llava"}),
    "model-2.safetensors is missing": lambda folder: (folder / "model-2.safetensors").unlink(),
    "is no index of safetensors": lambda folder: write(folder, **{"model.safetensors.index__json": {}}),
    "model-1.safetensors: is not a whole safetensors file": lambda folder: cut(folder / "model-1.safetensors"),
    "only a pointer stands for model-1.safetensors": lambda folder: (folder / "model-1.safetensors").write_bytes(POINTER),
    "holds no safetensors": lambda folder: [path.unlink() for path in folder.glob("model*")],
    "its weights are pickles": lambda folder: [path.rename(path.with_suffix(".bin")) for path in folder.glob("model*")],
    "holds no chat template": lambda folder: (folder / "chat_template.jinja").unlink(),
    "holds no tokenizer.json": lambda folder: (folder / "tokenizer.json").unlink(),
    "holds no preprocessor_config.json or": lambda folder: (folder / "preprocessor_config.json").unlink(),
    "with patch_size and limits": lambda folder: write(folder, preprocessor_config__json={}),
    "config.json is damaged": lambda folder: (seal(folder, {}), write(folder, config__json={"model_type": "qwen2_vl"})),
}  # fmt: skip


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


@pytest.mark.parametrize("complaint", MODEL_DAMAGE)
def test_what_is_wrong_with_a_model_is_said_once(model, complaint):
    MODEL_DAMAGE[complaint](model)
    found = examine(model)
    (only,) = [problem for problem in found.problems if complaint in f"{problem.where}: {problem.what}"]
    assert len(found.problems) == 1 and only.fix and found.facts["vLLM"] == "mend the problems first"


def test_everything_wrong_comes_at_once(model):
    for name in ("config.json", "model-2.safetensors", "tokenizer.json", "chat_template.jinja"):
        (model / name).unlink()
    assert len(complaints(model)) == 4


def test_a_git_clone_is_called_one(model):
    (model / ".git").mkdir()
    (model / "tokenizer.json").write_bytes(POINTER)
    (only,) = complaints(model)
    assert "is a git clone made without git-lfs: only a pointer stands for tokenizer.json" in only


def test_templates_of_transformers_4_count(model):
    (model / "chat_template.jinja").unlink()
    write(model, tokenizer_config__json={"chat_template": "{{ messages }}"})
    assert complaints(model) == []


def test_a_downloaded_model_is_held_against_its_record(model):
    (model / ".download").mkdir()
    record = {"files": {"tokenizer.json": {"bytes": 2, "sha256": "0" * 64}}}
    (model / ".download" / "manifest.json").write_text(json.dumps(record))
    (only,) = complaints(model)
    assert "tokenizer.json: is not as it was downloaded" in only


def test_a_quantized_model_is_noted(model):
    write(model, config__json={"model_type": "qwen2_vl", "quantization_config": {"bits": 4}})
    assert "full precision only" in examine(model).facts["training"]


def test_what_is_no_folder_and_what_is_an_unfinished_run_are_said(tmp_path):
    assert "is not a folder" in complaints(tmp_path / "nowhere")[0]
    (tmp_path / "checkpoint-20").mkdir()
    assert "did not finish; its newest checkpoint is checkpoint-20" in complaints(tmp_path)[0]


@pytest.mark.parametrize(("rank", "flag"), [(4, 8), (16, 16), (40, 64), (512, 512)])
def test_a_language_adapter_is_servable_as_it_is(adapter, model, rank, flag):
    save_file(lora(LAYER, rank=rank), adapter / "adapter_model.safetensors")
    write(adapter, adapter_config__json={"r": rank, "base_model_name_or_path": str(model)})
    found = examine(adapter)
    assert found.problems == [] and found.facts["on"] == "language"
    assert found.facts["vLLM"] == f"vllm serve {model} --enable-lora --lora-modules NAME={adapter} --max-lora-rank {flag}"
    assert "at the base's resolution" in found.facts["processor"]


@pytest.mark.parametrize(
    ("modules", "on"), [((LAYER, BLOCK), "vision"), ((LAYER, MERGER), "merger"), ((BLOCK, MERGER), "vision and merger")]
)
def test_an_adapter_of_the_tower_must_be_merged_first(adapter, modules, on):
    """vLLM loads it, leaves these tensors out and answers as if nothing had been learnt of pictures."""
    save_file(lora(*modules), adapter / "adapter_model.safetensors")
    found = examine(adapter)
    assert found.problems == []
    assert found.facts["vLLM"].startswith(f"leaves out LoRA on {on}; merge first: qwenvl-ft export --adapter {adapter}")


@pytest.mark.parametrize(("settings", "rank"), [({"use_dora": True}, 4), ({"modules_to_save": ["lm_head"]}, 4), ({}, 600)])
def test_more_than_plain_lora_must_be_merged_first(adapter, model, settings, rank):
    save_file(lora(LAYER, rank=rank), adapter / "adapter_model.safetensors")
    write(adapter, adapter_config__json={"r": rank, "base_model_name_or_path": str(model), **settings})
    assert "does not take" in examine(adapter).facts["vLLM"] and "merge first" in examine(adapter).facts["vLLM"]


def renamed(folder, change) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({change(key): tensor for key, tensor in tensors.items()}, folder / "adapter_model.safetensors")


ADAPTER_DAMAGE = {
    "adapter_config.json is missing": lambda folder: (folder / "adapter_config.json").unlink(),
    "adapter_config.json: is no JSON object": lambda folder: (folder / "adapter_config.json").write_text("{"),
    "adapter_model.safetensors is missing": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "its weights are a pickle": lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
    "adapter_model.safetensors: is not a whole": lambda folder: cut(folder / "adapter_model.safetensors"),
    "only a pointer stands for adapter_model": lambda folder: (folder / "adapter_model.safetensors").write_bytes(POINTER),
    "have the names of transformers 4": lambda folder: renamed(folder, lambda key: key.replace("language_model.", "")),
    "belong to no module of a Qwen-VL model": lambda folder: renamed(folder, lambda key: key.replace("base_model.model.", "")),
    "lack their other half": lambda folder: drop_a_half(folder),
    "holds no tensors": lambda folder: save_file({}, folder / "adapter_model.safetensors"),
    "its tensors have rank 5, adapter_config.json says 4":
        lambda folder: save_file(lora(LAYER, rank=5), folder / "adapter_model.safetensors"),
    "names no base model": lambda folder: write(folder, adapter_config__json={"r": 4}),
    "is not the base that this adapter was trained on": lambda folder: write(folder, **{BASE: {"config": "other"}}),
    "model-2.safetensors is missing": lambda folder: (folder.parent / "base" / "model-2.safetensors").unlink(),
    "tokenizer.json is damaged": lambda folder: (write(folder, tokenizer__json={}), seal(folder, {}), write(folder, tokenizer__json=1)),
}  # fmt: skip


def drop_a_half(folder) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({key: tensor for key, tensor in tensors.items() if "lora_A" in key}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("complaint", ADAPTER_DAMAGE)
def test_what_is_wrong_with_an_adapter_is_said(adapter, complaint):
    assert complaints(adapter) == []
    ADAPTER_DAMAGE[complaint](adapter)
    said = complaints(adapter)
    assert len([line for line in said if complaint in line]) == 1, said
    alone = complaint not in ("adapter_config.json is missing", "adapter_config.json: is no JSON object", "names no base model")
    assert len(said) == 1 or not alone, said


def test_an_adapter_whose_base_is_gone_needs_a_processor_of_its_own(adapter, model):
    shutil.rmtree(model)
    said = complaints(adapter)
    assert "is not here" in said[0] and any("chat template" in line for line in said)


def test_the_names_of_transformers_4_are_really_lost(adapter, tmp_path):
    """The authority is PEFT on the transformers that is installed: it loads nothing, with a warning at most."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    class Inner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.language_model = torch.nn.ModuleDict(
                {"layers": torch.nn.ModuleList([torch.nn.ModuleDict({"q_proj": torch.nn.Linear(6, 6)})])}
            )

    def base():
        outer = torch.nn.Module()
        outer.model = Inner()
        outer.config = {}
        return outer

    get_peft_model(base(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(tmp_path / "real")
    renamed(tmp_path / "real", lambda key: key.replace("language_model.", ""))
    assert any("names of transformers 4" in line for line in complaints(tmp_path / "real"))
    with pytest.warns(UserWarning, match="missing adapter keys"):
        loaded = PeftModel.from_pretrained(base(), tmp_path / "real")
    trained = load_file(tmp_path / "real" / "adapter_model.safetensors").values()
    assert not any(np.array_equal(value, tensor) for value in loaded.state_dict().values() for tensor in trained)


def test_the_command_says_it_and_exits_with_one(adapter, model, capsys, monkeypatch):
    monkeypatch.setattr(machine, "MIN_DISK", 0)
    monkeypatch.setattr(machine, "MIN_SHM", 0)
    main_exits(0, "doctor", str(adapter))
    out, err = capsys.readouterr()
    assert "--max-lora-rank 8" in out and "transformers" in out and err == ""
    (model / "model-2.safetensors").unlink()
    main_exits(1, "doctor", str(adapter))
    assert "model-2.safetensors is missing" in capsys.readouterr().err
    main_exits(1, "doctor", str(model), "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["problems"][0]["fix"] and report["folder"]["is"] == "a model" and report["machine"]["torch"]


def main_exits(code: int, *arguments: str) -> None:
    try:
        main(list(arguments))
    except SystemExit as exit:
        assert (exit.code or 0) == code
    else:
        assert code == 0


def test_the_doctor_does_not_import_torch_where_no_gpu_is(adapter):
    code = "import sys; from qwenvl_ft import machine; machine.gpus = lambda: []; from qwenvl_ft.doctor import examine; " \
           "examine(machine.Path(sys.argv[1])); machine.machine(machine.Path()); assert not {'torch', 'transformers'} & sys.modules.keys()"  # fmt: skip
    subprocess.run([sys.executable, "-c", code, str(adapter)], check=True, cwd=ROOT)


def test_the_machine_is_described(monkeypatch):
    from importlib.metadata import version

    monkeypatch.setattr(machine, "gpus", lambda: [])
    facts = machine.machine(ROOT).facts
    assert facts["GPUs"] == "none" and facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["peft"] == version("peft") and facts["vllm"] is None
    assert facts["free disk"].endswith("GiB") and facts["/dev/shm"].endswith("GiB")


def test_gpus_are_read_from_the_driver(monkeypatch):
    said = "NVIDIA H100 80GB HBM3, 81559 MiB, 81000 MiB, 9.0\nTesla T4, 15360 MiB, 15000 MiB, 7.5\n"
    monkeypatch.setattr(machine.subprocess, "run", lambda *of, **named: subprocess.CompletedProcess(of, 0, said, ""))
    found = machine.machine(ROOT)
    assert found.facts["GPUs"] == [
        "NVIDIA H100 80GB HBM3, 81559 MiB, 81000 MiB free, bf16", "Tesla T4, 15360 MiB, 15000 MiB free, no bf16",
    ]  # fmt: skip
    import torch

    missing = torch.cuda.device_count() < 2  # a torch for CPUs on a machine with GPUs trains on the CPU without a word
    assert any("of 2 GPUs" in problem.what for problem in found.problems) == missing


def test_small_shared_memory_a_full_disk_and_old_packages_are_problems(monkeypatch):
    monkeypatch.setattr(machine, "gpus", lambda: [])
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 36, 64 << 20))
    monkeypatch.setattr(machine, "version", lambda name: {"peft": "0.5", "av": None}.get(name, "9999"))
    problems = {problem.where: problem for problem in machine.machine(ROOT).problems}
    assert problems.keys() == {"peft", "av", "free disk", "/dev/shm"}
    assert problems["peft"].what == "is 0.5, >=0.21 is needed" and problems["av"].what.startswith("is not installed")
    assert "--shm-size" in problems["/dev/shm"].fix
