"""LoRA as one function against PEFT's own layers: loss, gradients, names; and what is left to PEFT."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from qwenvl_ft.data.families import family_of
from qwenvl_ft.model.load import add_lora, load_base, trainable
from qwenvl_ft.model.lora import FusedLora, fuse_lora, is_gated
from qwenvl_ft.model.loss import summed_loss
from tests.model.test_packing import make_job
from tests.train.test_activations import Alive


@pytest.fixture(scope="module")
def rows(family_model, tmp_path_factory):
    return make_job(family_model, tmp_path_factory.mktemp("job"))[1]


def make_model(model_dir, dropout=0.0, dtype="float32"):
    torch.manual_seed(0)
    model = add_lora(load_base(model_dir, dtype), family_of(model_dir), ["language", "vision", "merger"], 4, 6, dropout, 0)
    for name, parameter in trainable(model).items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def gradients(model, row, autocast=False):
    """Of the loss, a float64; of what trains, by name. The dropout's draws are the same each time."""
    model.zero_grad()
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = summed_loss(model, model, row, True)
    loss.backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is not None and "lora" not in name]
    return loss.item(), {name: parameter.grad for name, parameter in trainable(model).items()}


def in_float64(row):
    """So that what is left of a difference is an error of ours, and no rounding."""
    return {
        key: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in row.items()
    }


def flat(found):
    return torch.cat([gradient.flatten() for gradient in found.values()])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_losses_gradients_and_names_are_pefts(family_model, rows, dropout):
    model, row = make_model(family_model, dropout).double(), in_float64(rows[1])
    wanted, names = gradients(model, row), [*model.state_dict()]
    adapter = get_peft_model_state_dict(model)
    fuse_lora(model)
    assert [*model.state_dict()] == names and get_peft_model_state_dict(model).keys() == adapter.keys()
    results = [gradients(model, row)]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    results.append(gradients(model, row))
    for loss, found in results:
        assert loss == pytest.approx(wanted[0], rel=1e-12) and found.keys() == wanted[1].keys()
        assert (flat(found) - flat(wanted[1])).norm() < 1e-12 * flat(wanted[1]).norm()


def test_in_bfloat16_it_is_as_near_to_float32_as_pefts_with_autocast(family_model, rows):
    """What autocast does is done inside: nothing here runs under it. The weights of the adapter stay float32."""
    model = make_model(family_model, dtype="bfloat16")
    (exact := make_model(family_model)).load_state_dict(model.state_dict())
    (_, truth), (_, peft) = gradients(exact, rows[1]), gradients(model, rows[1], autocast=True)
    fuse_lora(model)
    _, found = gradients(model, rows[1])
    assert {of.dtype for of in found.values()} == {torch.float32}
    ours, theirs = ((flat(of) - flat(truth)).norm() / flat(truth).norm() for of in (found, peft))
    assert ours < 1.2 * theirs < 0.2


def layer(**settings):
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(8, 6)), LoraConfig(target_modules=["0"], r=2, init_lora_weights=False, **settings)
    )
    return model, model.base_model.model[0]


X = torch.linspace(-1, 1, 24).view(1, 3, 8)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"lora_dropout": 0.5}])
def test_the_plain_kinds_are_one_function_and_exact(settings):
    """In float64, where PEFT's order of sums shows only in the 15th digit."""
    model = layer(**settings)[0].double()
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        model.zero_grad()
        x = X.double().requires_grad_()
        (y := model(x)).pow(2).sum().backward()
        results.append([y.detach(), x.grad, *(parameter.grad.clone() for parameter in trainable(model).values())])
        fuse_lora(model)
    assert "_LoraLinear" in y.grad_fn.name() and len(results[0]) == 4
    assert all(torch.allclose(ours, peft, rtol=1e-13, atol=1e-13) for peft, ours in zip(*results, strict=True))


def dora():
    return layer(use_dora=True)[0]


def with_a_bias():
    return layer(lora_bias=True)[0]


def two():
    model, linear = layer()
    model.add_adapter("other", LoraConfig(target_modules=["0"], r=3, init_lora_weights=False))
    linear.set_adapter(["default", "other"])
    return model


def merged():
    model, linear = layer()
    linear.merge()
    return model


def disabled():
    model, linear = layer()
    linear.enable_adapters(False)
    return model


def hooked():
    """As ZeRO-3 does, which brings the weights when the module that holds them is called."""
    model, linear = layer()
    linear.lora_B["default"].register_forward_hook(lambda module, args, out: 2 * out)
    return model


@pytest.mark.parametrize("make", [dora, with_a_bias, two, merged, disabled, hooked])
def test_other_kinds_are_left_to_peft(make):
    model = make()
    plain = copy.deepcopy(model)
    fuse_lora(model)
    assert isinstance(model.base_model.model[0], FusedLora) and torch.equal(model(X), plain(X))


def test_what_is_left_to_peft_runs_in_the_dtype_of_the_base():
    """DeepSpeed's engine switches autocast off, and PEFT's adapters are float32."""
    model = hooked()
    model.base_model.model[0].base_layer.bfloat16()
    fuse_lora(model)
    seen = []
    model.base_model.model[0].lora_A["default"].register_forward_hook(
        lambda module, args, out: seen.append((args[0].dtype, out.dtype))
    )
    with torch.autocast("cpu", enabled=False):
        model(X.bfloat16())
    assert seen == [(torch.bfloat16, torch.bfloat16)]


def test_what_gate_and_up_come_to_is_made_again_to_the_same_bits(family_model, rows):
    """Against the same layers without that: of each MLP two tensors of its width stay in place of four."""
    model = make_model(family_model)
    fuse_lora(model)
    mlps = [of for of in model.modules() if is_gated(of)]
    assert all(layer.mlp in mlps for layer in model.get_decoder().layers)
    found, kept, widths = [], [], []
    for mlp in mlps:
        mlp.gate_proj.register_forward_hook(lambda layer, inputs, out: widths.append(out.numel()))
    for _ in range(2):
        widths[:] = []
        with Alive([*model.parameters(), *model.buffers()]) as alive:
            loss = summed_loss(model, model, rows[1], True)
        kept.append(alive.now())
        model.zero_grad()
        loss.backward()
        found.append((loss.detach(), flat({name: of.grad.clone() for name, of in trainable(model).items()})))
        for mlp in mlps:
            mlp.__dict__.pop("forward", None)  # the class's own is left
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert kept[1] - kept[0] == 2 * 4 * sum(widths) > 0


@pytest.mark.parametrize("recomputed", [False, True])
def test_the_last_mlp_runs_on_taught_tokens_alone_and_losses_and_gradients_stay(family_model, rows, recomputed):
    model, row = make_model(family_model).double(), in_float64(rows[1])
    if recomputed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    last, seen = model.get_decoder().layers[-1], []
    last.mlp.register_forward_pre_hook(lambda mlp, inputs: seen.append(inputs[0].shape[1]))
    found = gradients(model, row)
    taught = int((row["labels"] != -100).sum())
    assert seen == [taught] * (1 + recomputed) and taught < row["labels"].shape[1]
    last.mlp._forward_pre_hooks.clear()
    last.mlp._forward_hooks.clear()
    last.mlp.register_forward_pre_hook(lambda mlp, inputs: seen.append(inputs[0].shape[1]))
    loss, wanted = gradients(model, row)
    assert seen[-1] == row["labels"].shape[1]
    assert found[0] == pytest.approx(loss, rel=1e-12) and found[1].keys() == wanted.keys()
    assert (flat(found[1]) - flat(wanted)).norm() < 1e-12 * flat(wanted).norm()


def test_asked_for_logits_a_model_runs_its_last_layer_whole(family_model, rows):
    """Right behind a row, too."""
    model = make_model(family_model)
    inputs = {"input_ids": torch.arange(3, 12)[None]}
    before = model(**inputs).logits
    gradients(model, rows[1])
    assert torch.equal(model(**inputs).logits, before)
