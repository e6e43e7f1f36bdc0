"""A run in bfloat16 multiplies in bfloat16, however it is launched: counted where torch hands the matrices to its kernels."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from qwenvl_ft.train import setup
from qwenvl_ft.train.dtypes import Multiplications
from qwenvl_ft.train.origin import Origin
from tests.forked import train_two
from tests.runs import ROOT, adapter, config, difference, metrics, run

SETTINGS = {"dtype": "bfloat16", "max_steps": 2, "save_steps": 2, "rows_per_step": 4, "lora_dropout": 0.1, "max_grad_norm": 1e9}
SLOW = "multiplications ran in float32 and not in bfloat16"


class Attention(nn.Module):
    def forward(self, x):
        return functional.scaled_dot_product_attention(*[x.view(1, 1, -1, 2)] * 3)


class Net(nn.Module):
    """A product in bfloat16; in float32 one, attention, and a product that sums nothing."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 4, bias=False, dtype=torch.bfloat16)])
        self.high, self.attends = nn.Linear(4, 2), Attention()

    def forward(self, x):
        y = self.high(self.layers[0](x).float())
        return self.attends(y).sum() + (torch.ones(16, 1) @ torch.ones(1, 16)).sum()


def test_multiplications_are_counted_by_dtype_and_those_in_float32_by_who_asks_for_them():
    net, x = Net(), torch.randn(16, 8, dtype=torch.bfloat16)
    with (counted := Multiplications(net)):
        net(x).backward()
    low, high, attended = 2 * 16 * 8 * 4, 2 * 16 * 4 * 2, 4 * 16 * 2 * 16
    assert counted.flops == {torch.bfloat16: 2 * low, torch.float32: 3 * high + 2 * attended}  # x asks for no gradient
    assert counted.in_float32 == {"high": high, "attends": attended, "the backward pass": 2 * high + attended}
    assert counted.problem() == f"70.4% of the first step's {SLOW}: high, attends, the backward pass"


def noted(folder):
    """A fault that notes of each process in what its first step multiplies, how often it exchanges gradients in it, and which share
    of the base it holds once that is loaded."""

    def start(rank):
        notes = {"exchanges": 0}

        def load_base(*args, stock=setup.load_base, **named):
            model = stock(*args, **named)
            whole = sum(getattr(of, "ds_numel", of.numel()) for of in model.parameters())
            notes["share"] = sum(getattr(of, "ds_tensor", of).numel() for of in model.parameters()) / whole
            assert not [of for of in model.parameters() if hasattr(of, "ds_tensor") and of.numel()]
            return model

        def exchange(state, bucket):
            notes["exchanges"] += bucket.is_last()
            return allreduce_hook(state, bucket)

        def wrapped(self, *args, stock=DistributedDataParallel.__init__, **named):
            stock(self, *args, **named)
            self.register_comm_hook(None, exchange)

        def problem(self, stock=Multiplications.problem):
            notes["flops"] = {str(dtype): flops for dtype, flops in self.flops.items()}
            with open(f"{folder}/{rank}.json", "w") as file:
                json.dump(notes, file)
            return stock(self)

        setup.load_base, Multiplications.problem, DistributedDataParallel.__init__ = load_base, problem, wrapped

    return start


def stock_layers():
    """A fault that leaves PEFT's layers as they are."""

    def start(rank):
        setup.fuse_lora = lambda model: None

    return start


def said_in(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("[01].json"))]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A run of one process in bfloat16."""
    folder = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(ROOT)
        for of, name in ((Multiplications, "problem"), (setup, "load_base"), (DistributedDataParallel, "__init__")):
            patched.setattr(of, name, getattr(of, name))  # which go back to what they were
        noted(folder)(0)
        run(folder, **SETTINGS)
    return folder


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_two_processes_multiply_in_bfloat16_as_one_does_and_learn_the_same(zero_stage, one, tmp_path, forks):
    """ZeRO-2 ran the adapters in float32, since DeepSpeed's engine switches autocast off; ZeRO-3 all, which it had loaded so."""
    folder = train_two(forks, tmp_path, zero_stage, fault=("tests.train.test_dtypes", "noted", str(tmp_path)), **SETTINGS)
    (alone,), both = said_in(one), said_in(tmp_path)
    assert alone["flops"].keys() == both[0]["flops"].keys() == both[1]["flops"].keys() == {"torch.bfloat16"}
    assert sum(of["flops"]["torch.bfloat16"] for of in both) == alone["flops"]["torch.bfloat16"]
    assert SLOW not in (tmp_path / "log").read_text()
    assert alone["share"] == 1 and [of["share"] for of in both] == pytest.approx([0.5 if zero_stage == 3 else 1] * 2, abs=0.01)
    assert [of["exchanges"] for of in both] == [not zero_stage] * 2  # of two rows each
    losses = [[line["loss"] for line in metrics(of)] for of in (one / "run", folder)]
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
    if zero_stage != 3:  # where layers run as PEFT has them, which rounds more often, and Adam makes the sign of all that is small
        assert difference(adapter(one / "run"), adapter(folder)) < 1e-3


def test_adapters_that_multiply_in_float32_are_named(tmp_path, forks):
    codes, said = forks.train(tmp_path, 2, fault=("tests.train.test_dtypes", "stock_layers"), **SETTINGS)
    assert codes == [0, 0] and said.count(SLOW) == 1, said[-3000:]
    assert "q_proj.lora_A.default, q_proj.lora_B.default" in said


@pytest.mark.parametrize(
    "how", [{"lora_on": {"language": {}, "merger": {"full": True}}}, {"use_dora": True}], ids=["merger", "dora"]
)
def test_what_is_no_plain_lora_multiplies_in_bfloat16_too(how, tmp_path, capsys):
    """Of a merger that is trained in full the weights are in float32."""
    run(tmp_path, **SETTINGS | {"max_steps": 1} | how)
    assert SLOW not in capsys.readouterr().out


@pytest.mark.parametrize(("device", "dtype", "told"), [("cuda", "auto", True), ("cuda", "float32", False), ("cpu", "auto", False)])
def test_a_gpu_that_has_no_bfloat16_is_said_to_be_why(device, dtype, told, tmp_path, capsys):
    """torch says that it has, and emulates it."""
    accelerator = SimpleNamespace(num_processes=1, device=torch.device(device))
    bare = SimpleNamespace(config=SimpleNamespace(_attn_implementation="sdpa"))
    settings, origin = config(tmp_path, dtype=dtype), Origin({}, None, None)
    setup.report_start(SimpleNamespace(config=settings, origin=origin, accelerator=accelerator, bare=bare, bf16=False), (1, 2))
    said = capsys.readouterr().out
    assert f"1 x {device}, float32" in said and ("this GPU has no bfloat16" in said) == told
