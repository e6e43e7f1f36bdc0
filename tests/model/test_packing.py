"""A joined row against its records run one by one, and what happens to each rule of joining when it is broken."""

import copy

import pytest
import torch
from torch.nn import functional

from qwenvl_ft.data.chat import IGNORE, open_chat
from qwenvl_ft.data.families import family_of
from qwenvl_ft.data.meta_file import read_records
from qwenvl_ft.data.rows import Rows, as_floats, join
from qwenvl_ft.errors import UserError
from qwenvl_ft.model import head
from qwenvl_ft.model.attention import attention, attention_of, by_kernel
from qwenvl_ft.model.load import PatchEmbedding, add_lora, limited, load_base, trainable
from qwenvl_ft.model.loss import summed_loss, taught, vision_features

TALKS = [
    ["<img>a.png</img>\nWhat?", "A chart of three bars."],
    ["Hello", "Hi there!", "<img>b.png</img>\n<img>c.jpg</img>\nBoth?", "two of them"],
    ["No picture here", "none"],
]


@pytest.fixture(scope="module")
def job(family_model, tmp_path_factory):
    """(model with LoRA that does something, its rows: the three records together, then each alone)."""
    return make_job(family_model, tmp_path_factory.mktemp("job"))


def make_job(model_dir, folder):
    import json

    import numpy as np
    from PIL import Image
    from transformers import AutoProcessor

    random = np.random.default_rng(0)
    for name, (width, height) in {"a.png": (168, 112), "b.png": (90, 200), "c.jpg": (61, 47)}.items():
        Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / name)
    records = [
        {"conversations": [{"from": ("user", "assistant")[n % 2], "value": text} for n, text in enumerate(talk)]} for talk in TALKS
    ]
    (folder / "train.json").write_text(json.dumps(records))
    records, problems, _ = read_records(folder / "train.json", folder)
    assert not problems
    chat = open_chat(model_dir)
    scripts = [chat.write_scripts(record)[-1] for record in records]
    processor = AutoProcessor.from_pretrained(model_dir)
    return make_model(model_dir), Rows(scripts, [[0, 1, 2], [0], [1], [2]], chat, limited(processor, chat))


def make_model(model_dir, tower="language", attention="auto"):
    model = add_lora(load_base(model_dir, "float32", attention), family_of(model_dir), [tower], 4, 8, 0.0, 0)
    for name, parameter in trainable(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def gradients(model, rows, which, tower_trains=False):
    model.zero_grad()
    loss = sum(summed_loss(model, model, rows[index], tower_trains) for index in which)
    loss.backward()
    return loss.item(), torch.cat([parameter.grad.flatten() for parameter in trainable(model).values()])


def test_a_joined_row_has_the_loss_and_the_gradients_of_its_records(job):
    model, rows = job
    (packed, packed_gradients), (single, single_gradients) = gradients(model, rows, [0]), gradients(model, rows, [1, 2, 3])
    assert packed == pytest.approx(single, rel=1e-5)
    assert (packed_gradients - single_gradients).abs().max() < 1e-4 * single_gradients.abs().max()


@pytest.mark.parametrize("on", ["language", "vision"])
def test_attention_by_segments_is_that_of_records_one_by_one(job, family_model, on):
    """Against transformers' own, in the vision tower and its windows, too; and no token is let see another record's."""
    _, rows = job
    varlen, stock = (make_model(family_model, on, attention) for attention in ("varlen", "sdpa"))
    results = [gradients(model, rows, of, on == "vision") for model, of in ((varlen, [0]), (stock, [1, 2, 3]))]
    (packed, packed_gradients), (single, single_gradients) = results
    assert attention_of(varlen) == "varlen" and attention_of(stock) == "sdpa"
    assert packed == pytest.approx(single, rel=1e-5)
    assert (packed_gradients - single_gradients).abs().max() < 1e-4 * single_gradients.abs().max()


def test_what_a_record_says_and_shows_changes_nothing_of_the_others(job, family_model):
    """Linear attention passed its state and three tokens of its convolution on to the record behind, without a word."""
    model, row = make_model(family_model, attention="varlen").eval(), job[1][0]
    bounds, first = row["cu_seq_lens_q"].tolist(), len(job[1][1]["pixel_values"])
    for changed, patches in enumerate([slice(first), slice(first, None), slice(0)]):
        said = slice(bounds[changed + 1] - 8, bounds[changed + 1])
        other = {key: row[key].clone() for key in ("input_ids", "pixel_values")}
        other["input_ids"][:, said] = row["input_ids"][:, said].roll(3, -1)
        other["pixel_values"][patches] = 255 - row["pixel_values"][patches]
        inside = torch.zeros_like(row["labels"], dtype=torch.bool)
        inside[:, slice(*bounds[changed : changed + 2])] = True
        taught_of = [{"labels": row["labels"].masked_fill(of, IGNORE)} for of in (inside, ~inside)]
        with torch.no_grad():
            before, after = (
                [summed_loss(model, model, row | change | of, False).item() for of in taught_of] for change in ({}, other)
            )
        assert after[0] == pytest.approx(before[0], rel=1e-6) and abs(after[1] - before[1]) > 1e-5 * before[1], changed


def test_a_row_of_several_records_runs_the_modules_that_a_row_of_one_does_in_their_order(job):
    """Under ZeRO-3 each that runs is a wait for the others: in Qwen3.5 two processes, one of them with one record, never came back."""
    model, rows = job
    ran, hooks = [], [module.register_forward_pre_hook(lambda module, _: ran.append(module)) for module in model.modules()]
    for number in (0, 2):
        ran.append(None)
        summed_loss(model, model, rows[number], False)
    for hook in hooks:
        hook.remove()
    second = ran.index(None, 1)
    assert ran[1:second] == ran[second + 1 :] and len(ran) > 20


@pytest.mark.parametrize("torch_2_11", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_the_kernel_for_a_gpu_is_asked_for_what_is_computed_without_one(causal, torch_2_11, monkeypatch):
    """Its stand-in has the arguments of torch 2.11, or of newer ones, and attends as their documentation says."""
    torch.manual_seed(0)
    module = torch.nn.Identity()
    module.num_key_value_groups = 2
    query, key, value = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    bounds = torch.tensor([0, 4, 5, 9], dtype=torch.int32)

    def old(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
        assert query.shape == (9, 4, 8) and key.shape == value.shape == (9, 2, 8) and max_q == max_k == 4
        parts = []
        for start, end in zip(cu_seq_q.tolist(), cu_seq_k[1:].tolist(), strict=False):
            own = [of[start:end].transpose(0, 1) for of in (query, key, value)]
            right = window_size == (-1, 0)
            parts.append(functional.scaled_dot_product_attention(*own, scale=scale, is_causal=right, enable_gqa=True))
        return torch.cat([part.transpose(0, 1) for part in parts])

    def new(*states, enable_gqa=False, **more):
        assert enable_gqa
        return old(*states, **more)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", old if torch_2_11 else new)
    wanted, _ = attention(module, query, key, value, None, scaling=0.3, is_causal=causal, cu_seq_lens_q=bounds)
    assert torch.allclose(by_kernel(query, key, value, (bounds, bounds), (4, 4), 0.3, causal), wanted, atol=1e-6)


def test_a_sliding_window_is_refused_rather_than_passed_over():
    states = torch.zeros(1, 1, 4, 8)
    with pytest.raises(UserError, match="within 2 tokens only"):
        attention(torch.nn.Identity(), states, states, states, None, is_causal=True, sliding_window=2)


def test_a_blank_picture_for_a_row_without_one_changes_nothing(job):
    model, rows = job
    looking = copy.copy(rows)
    looking.always_look = True
    assert "pixel_values" not in rows[3] and looking[3]["pixel_values"].shape[0] == 4
    assert all(torch.equal(looking[0][key], rows[0][key]) for key in ("input_ids", "pixel_values"))
    (loss, blank_gradients), (wanted, wanted_gradients) = gradients(model, looking, [3]), gradients(model, rows, [3])
    assert loss == pytest.approx(wanted, rel=1e-5)
    assert (blank_gradients - wanted_gradients).abs().max() < 1e-4 * wanted_gradients.abs().max()


def broken(row, rule):
    """The row with one rule of joining broken."""
    row = dict(row)
    if rule == "an attention mask of ones":
        row["attention_mask"] = torch.ones_like(row["input_ids"])
    if rule == "no text row of positions":
        row["position_ids"] = row["position_ids"][1:]
    if rule == "positions that go on from record to record":
        row["position_ids"] = torch.arange(row["input_ids"].shape[1]).expand(4, 1, -1)
    return row


@pytest.mark.parametrize(
    "rule", ["an attention mask of ones", "no text row of positions", "positions that go on from record to record"]
)
def test_a_broken_rule_changes_the_loss_without_a_word(job, rule):
    model, rows = job
    with torch.no_grad():
        right = summed_loss(model, model, rows[0], False).item()
        wrong = summed_loss(model, model, broken(rows[0], rule), False).item()
    assert abs(wrong - right) > 1e-4 * right


def test_a_cache_would_let_records_see_each_other(job):
    """transformers ignores the packed positions when use_cache is on; `summed_loss` turns it off."""
    model, rows = job
    row = rows[0]
    keep = taught(row["labels"])
    inputs = {key: value for key, value in row.items() if key not in ("labels", "pixel_values", "image_grid_thw", "scales")}

    def loss(use_cache):
        with torch.no_grad():
            features = vision_features(model, row, False)
            logits = model(**inputs, mm_encoder_outputs=features, use_cache=use_cache, logits_to_keep=keep).logits
        return functional.cross_entropy(logits, row["labels"][:, 1:][keep[:, :-1]], reduction="sum").item()

    with torch.no_grad():
        right = summed_loss(model, model, row, False).item()
    assert loss(False) == pytest.approx(right, rel=1e-6)
    assert abs(loss(True) - right) > 1e-4 * right


def test_the_first_label_of_each_record_is_ignored():
    """Kept, it would teach the last token of one record to predict the first of the next."""
    example = {"input_ids": torch.tensor([5, 6]), "labels": torch.tensor([5, 6]), "position_ids": torch.arange(2).expand(4, 2)}
    assert join([example, example])["labels"].tolist() == [[IGNORE, 6, IGNORE, 6]]


def test_positions_equal_the_models_own(job):
    model, rows = job
    inner = model.base_model.model.model
    for script in rows.scripts:
        example = rows.example(script)
        kinds = (example["input_ids"] == script.placeholders[0]).int()
        wanted, _ = inner.get_rope_index(example["input_ids"][None], kinds[None], example.get("image_grid_thw"))
        assert torch.equal(example["position_ids"][1:], wanted[:, 0])
        assert torch.equal(example["position_ids"][0], torch.arange(script.length))


def test_the_loss_is_that_of_the_models_own_forward(job):
    """One record through the stock forward, positions and all left to the model."""
    model, rows = job
    script = rows.scripts[1]
    example = as_floats(rows.example(script))
    kinds = (example["input_ids"] == script.placeholders[0]).int()[None]
    with torch.no_grad():
        stock = model(
            input_ids=example["input_ids"][None], labels=example["labels"][None], mm_token_type_ids=kinds,
            attention_mask=torch.ones_like(kinds), pixel_values=example["pixel_values"], image_grid_thw=example["image_grid_thw"],
        ).loss.item()  # fmt: skip
        ours = summed_loss(model, model, rows[2], False).item()
    assert ours / (example["labels"] != IGNORE).sum().item() == pytest.approx(stock, rel=1e-5)


def test_the_loss_a_few_tokens_at_a_time_is_the_one_of_all_and_keeps_no_logits(job, monkeypatch):
    model, rows = job
    row = rows[1]
    keep = taught(row["labels"])
    inputs = {key: value for key, value in row.items() if key not in ("labels", "pixel_values", "image_grid_thw", "scales")}
    features = vision_features(model, row, False)
    model.zero_grad()
    logits = model(**inputs, mm_encoder_outputs=features, use_cache=False, logits_to_keep=keep).logits
    plain = functional.cross_entropy(logits, row["labels"][:, 1:][keep[:, :-1]], reduction="sum")
    (plain * 0.5).backward()
    wanted = {name: parameter.grad.clone() for name, parameter in trainable(model).items()}
    for chunk in (1, 3, int(keep.sum()), 1000):
        monkeypatch.setattr(head, "CHUNK", chunk)
        saved = []

        def note(tensor, saved=saved):
            saved.append(tensor.shape)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = summed_loss(model, model, row, False)
        assert (tuple(logits.shape[-2:]) in [tuple(shape[-2:]) for shape in saved]) == (chunk >= logits.shape[-2])
        model.zero_grad()
        (loss * 0.5).backward()
        assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
        for name, parameter in trainable(model).items():
            assert (parameter.grad - wanted[name]).abs().max() <= 1e-4 * wanted[name].abs().max()


def test_a_row_that_teaches_nothing_has_no_loss_and_a_gradient_of_zeros(job):
    """Where processes exchange gradients, one without any would leave the others waiting."""
    model, rows = job
    row = dict(rows[1])
    row["labels"] = torch.full_like(row["labels"], IGNORE)
    model.zero_grad()
    loss = summed_loss(model, model, row, False)
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in trainable(model).values())


def test_a_frozen_tower_costs_no_backward_and_changes_no_gradient(job):
    model, rows = job
    assert not vision_features(model, rows[1], trains=False)["image"].pooler_output[0].requires_grad
    model.zero_grad()
    summed_loss(model, model, rows[1], tower_trains=False).backward()
    without = [parameter.grad.clone() for parameter in trainable(model).values()]
    model.zero_grad()
    summed_loss(model, model, rows[1], tower_trains=True).backward()
    assert all(torch.equal(a, parameter.grad) for a, parameter in zip(without, trainable(model).values(), strict=True))


@pytest.mark.parametrize("tower", ["language", "vision", "merger"])
def test_every_lora_tensor_of_every_tower_gets_a_gradient(job, family_model, tower):
    model, rows = make_model(family_model, tower), job[1]
    names = set(trainable(model))
    assert names and all((".visual." in name) == (tower != "language") for name in names)
    assert all(("merger" in name) == (tower == "merger") for name in names)
    summed_loss(model, model, rows[2], tower_trains=tower != "language").backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trainable(model).values())


def test_the_patch_embedding_as_a_matmul_is_the_convolution():
    conv = torch.nn.Conv3d(3, 8, (2, 14, 14), (2, 14, 14))
    patches = torch.randn(5, 3, 2, 14, 14)
    assert torch.allclose(PatchEmbedding.like(conv)(patches), conv(patches), atol=1e-5)
    assert PatchEmbedding.like(conv).state_dict().keys() == conv.state_dict().keys()
