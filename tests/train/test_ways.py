"""Each family by each way of sharing work and weights over two processes: rows with and without pictures, and going on."""

import json
import shutil
from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType

from qwenvl_ft.train.sharded import shard_problem
from tests.forked import train_two
from tests.runs import ROOT, adapter, config, distance, run, same
from tests.tiny import make_family
from tests.train.conftest import SETTINGS

WAYS = {"DDP": (0, {}), "ZeRO-2": (2, {}), "ZeRO-3": (3, {}), "FSDP2": (0, {"shard_base": True})}


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen3_5_moe"])
def alone(request, tmp_path_factory):
    """One process's run on rows of which some have no picture; its settings."""
    folder = tmp_path_factory.mktemp("alone")
    records = json.loads((ROOT / "data/sample/train.json").read_text())
    asked = {"from": "user", "value": f"Repeat: {'never again, ' * 52}"}
    plain = [{"conversations": [asked, {"from": "assistant", "value": f"once more {number}"}]} for number in range(3)]
    (folder / "mixed.json").write_text(json.dumps([*plain, *records[:2]]))
    experts = {"lora_on": {"language": {"rank": 4}, "experts": {"rank": 2}}} if request.param.endswith("moe") else {}
    settings = {
        "model": make_family(request.param, folder / "model", light=True), "train_meta_file": folder / "mixed.json",
        "max_pixels": 16 * 32 * 32, "row_tokens": 600, "max_steps": 2, "save_steps": 1, "max_grad_norm": 1e9, **experts,
    }  # fmt: skip
    run(folder, **settings)
    rows = [json.loads(line) for line in (folder / "run" / "packed.jsonl").read_text().splitlines()]
    assert {any(number >= len(plain) for number in row) for row in rows} == {True, False}
    return folder / "run", settings


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_end_where_one_does_and_go_on_to_the_same_bits(way, alone, tmp_path, forks):
    folder, settings = alone
    zero_stage, more = WAYS[way]
    two = train_two(forks, tmp_path, zero_stage, **settings, **more)
    whole = adapter(two)
    assert distance(adapter(folder), whole) < 1e-5
    shutil.rmtree(two / "checkpoint-2")
    (two / "adapter_model.safetensors").unlink()
    train_two(forks, tmp_path, zero_stage, **settings, **more, resume=True)
    assert same(whole, adapter(two))


def held(folder):
    """Each process notes how many weights of the base's language layers it holds after each step, of how many that there are."""

    def start(rank):
        from qwenvl_ft.train import loop

        stock = loop.train_step

        def train_step(run, *of):
            taught = stock(run, *of)
            weights = [of for of in run.bare.get_decoder().layers.parameters() if not of.requires_grad]
            local = sum((of.to_local() if hasattr(of, "to_local") else of).numel() for of in weights)
            with open(f"{folder}/held-{rank}", "a") as file:
                file.write(f"{local / sum(of.numel() for of in weights)}\n")
            return taught

        loop.train_step = train_step

    return start


@pytest.mark.parametrize("recomputed", [True, False, "auto"])
def test_each_process_holds_its_share_of_the_base_alone(recomputed, plain, tmp_path, forks):
    """Recomputed layers are gathered once more. From a checkpoint of one process, and with rows that are held out."""
    shutil.copytree(plain, tmp_path / "run")
    for path in [*(tmp_path / "run").glob("adapter_*"), tmp_path / "run" / "checkpoint-4"]:
        path.unlink() if path.is_file() else shutil.rmtree(path)
    codes, said = forks.train(tmp_path, fault=("tests.train.test_ways", "held", str(tmp_path)), **SETTINGS, shard_base=True,
                              gradient_checkpointing=recomputed, resume=True)  # fmt: skip
    assert codes == [0, 0] and "2 x cpu, float32, the base shared out among them" in said, said[-3000:]
    assert distance(adapter(plain), adapter(tmp_path / "run")) < 1e-5
    for rank in range(2):
        assert [float(line) for line in (tmp_path / f"held-{rank}").read_text().split()] == [0.5, 0.5]


@pytest.mark.parametrize(("launched", "settings", "what"), [
    ((1, DistributedType.NO), {}, "one process has nobody to share with"),
    ((2, DistributedType.DEEPSPEED), {}, "DeepSpeed has ways of its own"),
    ((2, DistributedType.MULTI_GPU), {"quantization": "nf4"}, "quantized weights are not shared out"),
    ((2, DistributedType.MULTI_GPU), {"eval_metric": "exact", "eval_meta_file": "few.json"},
     "processes that answer other questions would wait for each other's share"),
])  # fmt: skip
def test_what_cannot_be_shared_out_is_refused(launched, settings, what, tmp_path):
    accelerator = SimpleNamespace(num_processes=launched[0], distributed_type=launched[1])
    assert shard_problem(config(tmp_path, **settings), accelerator).what == what
    assert shard_problem(config(tmp_path), SimpleNamespace(num_processes=2, distributed_type=DistributedType.MULTI_GPU)) is None
