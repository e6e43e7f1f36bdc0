"""Activations that are kept, and those that are recomputed: equal results to the bit, and what is counted is what memory holds."""

import json

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoProcessor
from transformers.modeling_layers import GradientCheckpointingLayer

from qwenvl_ft.data.chat import open_chat
from qwenvl_ft.data.families import feature_width
from qwenvl_ft.data.features import Features
from qwenvl_ft.data.packing import PackedRows
from qwenvl_ft.data.prepare import prepare
from qwenvl_ft.data.rows import FEATURES, KEYS, Rows
from qwenvl_ft.model.load import add_lora, limited, load_base, trainable
from qwenvl_ft.model.loss import summed_loss
from qwenvl_ft.train import activations, loop, memory, setup
from qwenvl_ft.train.activations import Saved, recompute
from tests.model.test_trees import GROUPS, records
from tests.runs import config, few_records, run, same


class Alive(TorchDispatchMode):
    """The bytes of all storages that torch makes meanwhile and that something still holds: now, and at most, if that is wanted."""

    def __init__(self, known, peak=False):
        super().__init__()
        self.known = {StorageWeakRef(tensor.untyped_storage()) for tensor in known}
        self.made, self.peak = {}, 0 if peak else None

    def now(self):
        self.made = {storage: size for storage, size in self.made.items() if not storage.expired()}
        return sum(self.made.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := StorageWeakRef(tensor.untyped_storage())) not in self.known:
                self.made[storage] = tensor.untyped_storage().nbytes()
        if self.peak is not None:
            self.peak = max(self.peak, self.now())
        return result


@pytest.fixture(scope="module")
def job(family_model, tmp_path_factory):
    """(rows: one of trees of pictures and films; the same with features that are kept)"""
    chat, folder = open_chat(family_model, video_max_pixels=160_000), tmp_path_factory.mktemp("job")
    scripts = [chat.write_scripts(record)[-1] for record in records(folder)]
    members, firsts = np.arange(sum(GROUPS)), np.cumsum([0, *GROUPS[:-1]])
    signed = np.where(np.isin(members, firsts), members, ~members)
    tree = PackedRows(np.array([0, len(members)]), signed, [(0, 0), (1, len(members))])
    processor = limited(AutoProcessor.from_pretrained(family_model), chat)
    features = Features(folder / "features" / "one", 1, feature_width(family_model), torch.float32)
    return [Rows(scripts, tree, chat, processor, features=of) for of in (None, features)]


def lora(family_model, rows, on):
    """A model whose LoRA does something, with dropout."""
    model = add_lora(load_base(family_model, "float32", "varlen"), rows.chat.family, on, 4, 8, 0.1, 0)
    for name, parameter in trainable(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


@pytest.mark.parametrize("on", [["language"], ["language", "vision"]])
def test_recomputed_kept_or_some_of_each_the_bits_are_the_same_and_as_many_bytes_stay_as_are_counted(on, job, family_model):
    """With dropout, in trees, with a tower that trains and one whose features are kept. The bytes are counted by torch's own
    dispatch, without the hooks that the measurement has."""
    rows, seeing = job
    model, trains, row = lora(family_model, rows, on), "vision" in on, rows[0]
    assert KEYS in row
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]

    def loss(row=row, keep=None):
        torch.manual_seed(7)
        return summed_loss(model, model, row, trains, keep)

    def gradients(row=row):
        model.zero_grad()
        (found := loss(row)).backward()
        return [found, *(parameter.grad for parameter in trainable(model).values())]

    expected = gradients()
    recompute(model)
    for layer in layers:
        layer.gradient_checkpointing = False
    saved = Saved(model, layers)
    with saved.counted():
        held = loss()
        beside = saved.beside()
    used = [layer for layer in layers if saved.layers[layer]]
    assert len(used) == (4 if trains else 2), "a frozen tower keeps nothing"
    for number in (0, 1, len(used)):
        for at, layer in enumerate(used):
            layer.gradient_checkpointing = at < number
        assert all(map(torch.equal, gradients(), expected))
        with Alive([*model.parameters(), *model.buffers(), *(of for of in row.values() if isinstance(of, torch.Tensor))]) as alive:
            held = loss()
        counted = beside + sum(saved.layers[layer] for layer in used[number:])
        # The gated delta rule works out the state behind a piece, too, and lets go of what that saved where nothing goes on from it.
        assert alive.now() <= counted < (1.15 if rows.chat.family.linear_attention else 1.1) * alive.now()
        if number == 1 and not trains:
            with torch.no_grad():
                loss(seeing[0], lambda made: seeing.features.write(0, made))
            assert FEATURES in seeing[0] and all(map(torch.equal, gradients(seeing[0]), expected))
    del held


def hooks_of(model):
    return [[*module._forward_hooks.values(), *module._forward_pre_hooks.values()] for module in model.modules()]


def with_free(monkeypatch, free):
    """So many bytes are free, and all of them may be taken."""
    monkeypatch.setattr(activations, "free_bytes", lambda device, processes: free)
    monkeypatch.setitem(activations.USABLE, "cpu", 1)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Settings of a run of one step, which takes all of its few rows."""
    meta = few_records(tmp_path_factory.mktemp("small"), 2)
    return {"train_meta_file": meta, "max_steps": 1, "lora_dropout": 0.1, "lora_on": ["language", "vision"]}


@pytest.fixture(scope="module")
def measured(small, tmp_path_factory):
    """What was found about it, and the adapter that it ends with where nothing is recomputed."""
    folder, found = tmp_path_factory.mktemp("measured"), []

    def watched(of, stock=setup.keep_what_fits):
        state, hooks = torch.random.get_rng_state(), hooks_of(of.bare)
        found.append(stock(of))
        assert torch.random.get_rng_state().equal(state) and all(parameter.grad is None for parameter in of.bare.parameters())
        assert hooks_of(of.bare) == hooks
        return found[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "keep_what_fits", watched)
        run(folder, "auto", gradient_checkpointing="auto", **small)
    assert found[0].kept == found[0].layers == 6
    return found[0], run(folder, **small)


@pytest.mark.parametrize("recomputed", [0, 1, 6])
def test_as_many_layers_are_kept_as_there_is_memory_for_and_no_more_of_it_is_taken(
    recomputed, small, measured, tmp_path, monkeypatch, capsys
):
    (*_, tokens, most, _), plain = measured
    free = {0: most, 1: most - 1, 6: 0}[recomputed]
    with_free(monkeypatch, free)
    flags, peaks = [], []

    def watched(of, *rest, stock=loop.train_step):
        flags.extend(block.gradient_checkpointing for block in of.bare.modules() if isinstance(block, GradientCheckpointingLayer))
        with Alive([*of.bare.parameters(), *of.bare.buffers()], peak=True) as alive:
            taught = stock(of, *rest)
        peaks.append(alive.peak)
        return taught

    monkeypatch.setattr(loop, "train_step", watched)
    assert same(run(tmp_path, gradient_checkpointing="auto", **small), plain)
    assert flags == [True] * recomputed + [False] * (6 - recomputed), "the last ones' are let go first"
    assert recomputed == 6 or 0.75 * most < peaks[0] <= most
    (said,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("activations"))
    assert said.startswith(f"activations of {6 - recomputed} of 6 layers are kept" + ", 1 recomputed" * (recomputed == 1))
    assert f"of {tokens:,} tokens" in said
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert results["activations"] == {"layers": 6, "kept": 6 - recomputed}


def test_where_nobody_knows_how_much_is_free_all_is_recomputed(small, measured, tmp_path, monkeypatch, capsys):
    with_free(monkeypatch, None)
    assert same(run(tmp_path, gradient_checkpointing="auto", **small), measured[1])
    assert "0 of 6 layers are kept, 6 recomputed: how much memory is free is not known here" in capsys.readouterr().out


def test_the_heaviest_rows_are_those_of_most_tokens_of_most_keys_and_of_most_pictures(tmp_path):
    settings = config(tmp_path, train_meta_file=few_records(tmp_path, 40))
    prepared = prepare(settings)
    assert prepared.shares
    rows = range(len(prepared.plan.rows))

    def keys(row):
        return sum(prepared.scripts.lengths[number : number + 1].sum() for number in prepared.plan.rows[row])

    by = [max(rows, key=of) for of in (prepared.tokens, keys, lambda row: prepared.media_tokens[row])]
    assert prepared.heaviest(False) == sorted({*by[:2]}) and prepared.heaviest(True) == sorted({*by})
    assert len(set(by)) > 1


def test_no_more_is_kept_than_a_card_of_fit_would_hold(small, measured, tmp_path, capsys):
    """Of 1.6 GiB the driver keeps one, and CUDA the rest."""
    assert same(run(tmp_path, gradient_checkpointing="auto", fit=1.6, **small), measured[1])
    assert "0 of 6 layers are kept, 6 recomputed" in capsys.readouterr().out


GIB = 2**30
LIMITS = {  # the lines of /proc/self/cgroup, the files of groups by their folder, and what is left
    "version 2": ("0::/a/b", {"a": ("max", 9 * GIB, 0), "a/b": (8 * GIB, 5 * GIB, GIB)}, [4 * GIB]),
    "a limit above": ("0::/a/b", {"a": (6 * GIB, 5 * GIB, GIB), "a/b": ("max", 5 * GIB, 0)}, [2 * GIB]),
    "a container, whose group is the root there": ("0::/docker/abc", {"": (8 * GIB, 5 * GIB, 0)}, [3 * GIB]),
    "version 1": ("4:memory,hugetlb:/a\n1:cpu:/a\n0::/", {"memory/a": (8 * GIB, 5 * GIB, GIB)}, [4 * GIB]),
    "no limit": ("0::/", {"": ("max", 5 * GIB, 0)}, []),
    "no group": ("", {}, []),
}


@pytest.mark.parametrize("case", LIMITS)
def test_the_limits_of_a_container_are_read(case, tmp_path, monkeypatch):
    lines, groups, left = LIMITS[case]
    own, root, meminfo = (tmp_path / name for name in ("cgroup", "root", "meminfo"))
    own.write_text(lines)
    for folder, (limit, usage, cache) in groups.items():
        names = memory.CGROUP_FILES[folder.partition("/")[0] if folder.startswith("memory") else ""]
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / names[0]).write_text(f"{limit}\n")
        (root / folder / names[1]).write_text(f"{usage}\n")
        (root / folder / "memory.stat").write_text(f"anon 7\n{names[2]} {cache}\n")
    assert [*memory.left_by_limits(root, own)] == left
    meminfo.write_text(f"MemTotal: 99 kB\nMemAvailable: {6 * 2**20} kB\n")
    for name, path in {"CGROUPS": root, "OWN_CGROUP": own, "MEMINFO": meminfo}.items():
        monkeypatch.setattr(memory, name, path)
    assert memory.free_bytes(torch.device("cpu"), 2) == min(left + [6 * GIB]) // 2
    meminfo.unlink()
    assert memory.free_bytes(torch.device("cpu"), 2) is None


def test_of_a_gpu_what_torch_holds_and_does_not_use_is_free_too(monkeypatch):
    for name, value in {"mem_get_info": (GIB, 9 * GIB), "memory_reserved": 5 * GIB, "memory_allocated": 3 * GIB}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert memory.free_bytes(torch.device("cuda"), 8) == 3 * GIB
    assert memory.free_bytes(torch.device("meta"), 1) is None
