"""What `qwenvl-ft doctor` finds, finding by finding, in folders of a few bytes; and what it says of the machine."""

import json
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qwenvl_ft.cli.main import main
from qwenvl_ft.folders.adapter import BASE, base_fingerprint
from qwenvl_ft.folders.whole import seal
from qwenvl_ft.hub import environment
from qwenvl_ft.hub.doctor import examine
from tests.conftest import ROOT

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 5\n"
LAYER = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
BLOCK = "base_model.model.model.visual.blocks.0.attn.qkv"
MERGER = "base_model.model.model.visual.merger.mlp.0"


def lora(*modules: str, rank: int = 4) -> dict[str, np.ndarray]:
    return {f"{module}.lora_{side}.weight": np.ones(shape, np.float32)
            for module in modules for side, shape in (("A", (rank, 6)), ("B", (6, rank)))}  # fmt: skip


def save_base(folder) -> None:
    """Two shards with the modules that the adapters here change, under the names of a released checkpoint."""
    names = ("model.layers.0.self_attn.q_proj", "visual.blocks.0.attn.qkv"), ("visual.merger.mlp.0", "model.embed_tokens")
    for number, modules in enumerate(names, 1):
        save_file({f"{name}.weight": np.ones((6, 6), np.float32) for name in modules}, folder / f"model-{number}.safetensors")
    index = {f"{name}.weight": f"model-{number}.safetensors" for number, modules in enumerate(names, 1) for name in modules}
    write(folder, **{"model.safetensors.index__json": {"weight_map": index}})


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
    save_base(folder)
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
    "holds no config.json, so it is not": lambda folder: (folder / "config.json").unlink(),
    "is no JSON object": lambda folder: (folder / "config.json").write_text("[1"),
    "is not one of qwen2_vl": lambda folder: write(folder, config__json={"model_type": "llava"}),
    "model-2.safetensors is missing": lambda folder: (folder / "model-2.safetensors").unlink(),
    "lacks 1 tensors that model.safetensors.index.json names, such as visual.blocks.0.attn.qkv.weight":
        lambda folder: save_file({"model.layers.0.self_attn.q_proj.weight": np.ones(3, np.float32)}, folder / "model-1.safetensors"),
    "index.json: is no index of": lambda folder: write(folder, **{"model.safetensors.index__json": {"weight_map": {"a": 1}}}),
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
    write(adapter, adapter_config__json={"peft_type": "LORA", "r": rank, "lora_alpha": 8, "base_model_name_or_path": str(model)})
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
    assert "or try --enable-tower-connector-lora (experimental), where `vllm serve --help` lists it" in found.facts["vLLM"]


@pytest.mark.parametrize(("settings", "rank"), [({"use_dora": True}, 4), ({"modules_to_save": ["lm_head"]}, 4), ({}, 600)])
def test_more_than_plain_lora_must_be_merged_first(adapter, model, settings, rank):
    save_file(lora(LAYER, rank=rank), adapter / "adapter_model.safetensors")
    write(
        adapter,
        adapter_config__json={"peft_type": "LORA", "r": rank, "lora_alpha": 8, "base_model_name_or_path": str(model), **settings},
    )
    assert "does not take" in examine(adapter).facts["vLLM"] and "merge first" in examine(adapter).facts["vLLM"]


def put(folder, tensors) -> None:
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / BASE).unlink(missing_ok=True)  # a foreign one, which nothing else compares with the base


MISFITS = {
    "2 tensors have no module in": lambda folder: put(folder, lora(LAYER.replace("layers.0", "layers.33"))),
    "1 tensors do not fit the sizes of": lambda folder: put(folder, lora(LAYER) | {f"{LAYER}.lora_B.weight": np.ones((7, 4), np.float32)}),
    "1 tensors hold NaN or infinity": lambda folder: put(folder, lora(LAYER) | {f"{LAYER}.lora_A.weight": np.full((4, 6), np.nan, np.float32)}),
}  # fmt: skip


@pytest.mark.parametrize("complaint", MISFITS)
def test_a_foreign_adapter_is_held_against_its_base(adapter, complaint):
    MISFITS[complaint](adapter)
    (only,) = complaints(adapter)
    assert complaint in only and LAYER.split(".layers")[0] in only


def test_an_infinity_in_bfloat16_is_found(adapter):
    import torch
    from safetensors.torch import save_file as save_torch

    tensors = {key: torch.from_numpy(value).bfloat16() for key, value in lora(LAYER).items()}
    save_torch(tensors, adapter / "adapter_model.safetensors")
    assert complaints(adapter) == []
    tensors[f"{LAYER}.lora_B.weight"][5, 3] = float("inf")
    save_torch(tensors, adapter / "adapter_model.safetensors")
    assert f"hold NaN or infinity ({LAYER}.lora_B.weight)" in complaints(adapter)[0]


def test_a_quantized_base_is_not_compared(adapter, model):
    """Its files hold other keys and shapes, and vLLM takes adapters on it."""
    write(model, config__json={"model_type": "qwen2_vl", "quantization_config": {"bits": 4}})
    put(adapter, lora(LAYER.replace("layers.0", "layers.33")))
    assert complaints(adapter) == []


def test_lora_on_lm_head_is_known(adapter):
    """It was said to belong to no module; tied to the embeddings, it has no file of its own."""
    put(adapter, lora(LAYER, "base_model.model.lm_head"))
    found = examine(adapter)
    assert found.problems == [] and found.facts["on"] == "language, lm_head"
    assert found.facts["vLLM"].startswith("does not take LoRA on lm_head; merge first: ")


def test_a_base_on_a_hub_is_no_problem(adapter, model, capsys, monkeypatch):
    """vLLM fetches it; nothing here can be compared with it."""
    monkeypatch.setattr(environment, "MIN_DISK", 0)
    monkeypatch.setattr(environment, "MIN_SHM", 0)
    shutil.rmtree(model)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "Qwen/Qwen2-VL-2B-Instruct"}
    write(adapter, adapter_config__json=settings)
    assert "its base Qwen/Qwen2-VL-2B-Instruct is not here" in complaints(adapter)[0], "trained here, on a folder"
    (adapter / BASE).unlink()
    main_exits(0, "doctor", str(adapter))
    out = " ".join(capsys.readouterr().out.split())
    assert "taken for a hub's name" in out and "vllm serve Qwen/Qwen2-VL-2B-Instruct --enable-lora" in out
    write(adapter, adapter_config__json={"r": 4})
    main_exits(1, "doctor", str(adapter))
    assert "base not told" in " ".join(capsys.readouterr().out.split())


def test_printed_commands_can_be_pasted(adapter, model, tmp_path):
    spaced = adapter.rename(tmp_path / "my adapter")
    command = shlex.split(examine(spaced).facts["vLLM"])
    assert command[:3] == ["vllm", "serve", str(model)] and f"NAME={spaced}" in command
    save_file(lora(BLOCK), spaced / "adapter_model.safetensors")
    assert shlex.split(examine(spaced).facts["vLLM"].split("merge first: ")[1])[3] == str(spaced)
    assert shlex.split(examine(model.rename(tmp_path / "my base")).facts["vLLM"])[2] == str(tmp_path / "my base")


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
    "adapter was trained on": lambda folder: write(folder, **{BASE: {"config": "other", "sha256": {}}}),
    "as older versions did, and a sample proves nothing": lambda folder: write(folder, **{BASE: {"config": "", "weights": {}}}),
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
    monkeypatch.setattr(environment, "MIN_DISK", 0)
    monkeypatch.setattr(environment, "MIN_SHM", 0)
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
    code = "import sys; from qwenvl_ft.hub import environment; environment.gpus = lambda: []; from qwenvl_ft.hub.doctor import examine; " \
           "examine(environment.Path(sys.argv[1])); environment.environment(environment.Path()); assert not {'torch', 'transformers'} & sys.modules.keys()"  # fmt: skip
    subprocess.run([sys.executable, "-c", code, str(adapter)], check=True, cwd=ROOT)


def test_the_machine_is_described(monkeypatch):
    from importlib.metadata import version

    monkeypatch.setattr(environment, "gpus", lambda: [])
    facts = environment.environment(ROOT).facts
    assert facts["GPUs"] == "none" and facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["peft"] == version("peft") and facts["vllm"] is None
    assert facts["free disk"].endswith("GiB") and facts["/dev/shm"].endswith("GiB")


def test_gpus_are_read_from_the_driver(monkeypatch):
    said = "NVIDIA H100 80GB HBM3, 81559 MiB, 81000 MiB, 9.0\nTesla T4, 15360 MiB, 15000 MiB, 7.5\n"
    monkeypatch.setattr(environment.subprocess, "run", lambda *of, **named: subprocess.CompletedProcess(of, 0, said, ""))
    found = environment.environment(ROOT)
    assert found.facts["GPUs"] == [
        "NVIDIA H100 80GB HBM3, 81559 MiB, 81000 MiB free, bf16", "Tesla T4, 15360 MiB, 15000 MiB free, no bf16",
    ]  # fmt: skip
    import torch

    missing = torch.cuda.device_count() < 2  # a torch for CPUs on a machine with GPUs trains on the CPU without a word
    assert any("of 2 GPUs" in problem.what for problem in found.problems) == missing


@pytest.mark.parametrize(
    ("said", "cards"),
    [
        ("NVIDIA GB10, [N/A], [N/A], [N/A]\n", ["NVIDIA GB10, memory not told, bf16 not told"]),
        ("NVIDIA GB10, [N/A], [N/A], 12.1\n", ["NVIDIA GB10, memory not told, bf16"]),
        ("No devices were found\n", "none"),
    ],
)
def test_a_driver_that_tells_little_is_taken_at_its_word(monkeypatch, said, cards):
    """`float("[N/A]")` ended in a traceback."""
    monkeypatch.setattr(environment.subprocess, "run", lambda *of, **named: subprocess.CompletedProcess(of, 0, said, ""))
    assert environment.environment(ROOT).facts["GPUs"] == cards


@pytest.mark.parametrize(("system", "told"), [("Darwin", "not needed"), ("Linux", "0.0 GiB")])
def test_only_linux_needs_its_shared_memory(monkeypatch, tmp_path, system, told):
    monkeypatch.setattr(environment, "gpus", lambda: [])
    monkeypatch.setattr(environment, "SHM", tmp_path / "none")
    monkeypatch.setattr(environment.platform, "system", lambda: system)
    found = environment.environment(ROOT)
    assert found.facts["/dev/shm"] == told
    assert ("/dev/shm" in {problem.where for problem in found.problems}) == (system == "Linux")


def test_small_shared_memory_a_full_disk_and_old_packages_are_problems(monkeypatch):
    monkeypatch.setattr(environment, "gpus", lambda: [])
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 36, 64 << 20))
    here = environment.version
    monkeypatch.setattr(environment, "version", lambda name: {"peft": "0.5", "av": None}.get(name, here(name)))
    problems = {problem.where: problem for problem in environment.environment(ROOT).problems}
    assert problems.keys() == {"peft", "av", "free disk", "/dev/shm"}
    assert problems["peft"].what.startswith("is 0.5, ") and ">=0.21" in problems["peft"].what
    assert problems["av"].what.startswith("is not installed")
    assert "--shm-size" in problems["/dev/shm"].fix
