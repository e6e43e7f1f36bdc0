"""Records that share a prefix, run as a tree: against each of them alone, and no branch sees another."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from qwenvl_ft.data import rows
from qwenvl_ft.data.chat import IGNORE, open_chat
from qwenvl_ft.data.packed import NUMBERS, pack_scripts
from qwenvl_ft.data.packing import PackedRows
from qwenvl_ft.data.pictures import size_of
from qwenvl_ft.data.records import Picture, Record, Turn
from qwenvl_ft.data.rows import KEYS, Rows
from qwenvl_ft.data.videos import measured
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.model.attention import Gathered
from qwenvl_ft.model.load import limited
from qwenvl_ft.model.loss import summed_loss
from tests import films
from tests.model.test_packing import gradients, make_model

SYSTEM = Turn("system", ("You answer in few words, and look twice before you do.",))
GROUPS = [4, 1, 2, 2, 2]  # records that share a prefix, as `records` has them
# Of each record the piece of the row that is its own: behind that of its beginning, where it has one to share.
PIECE_OF = [1, 2, 3, 4, 5, 7, 8, 10, 11, 13, 14]


def records(folder):
    """Four about two pictures, one alone, two about a film, two about a picture and a film, two of text with the same instructions."""
    noise = np.random.default_rng(0)
    for name, (width, height) in {"a.png": (168, 112), "b.png": (90, 200), "c.jpg": (61, 47)}.items():
        Image.fromarray(noise.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / name)
    a, b, c = (Picture(folder / name, *size_of(folder / name, "")) for name in ("a.png", "b.png", "c.jpg"))
    film = measured(films.write(folder / "film.mp4", 20, size=(112, 84)), "film")
    talks = [
        [((a, b), "What is it?"), "Two charts."],
        [((a, b), "What colour has the first?"), "Red"],
        [((a, b), "Which is wider, and by how much?"), "The first.", ((), "Sure?"), "Yes, by far."],
        [((a, b), "Which"), "None"],
        [((c,), "What is it?"), "A dot."],
        [((film,), "What happens?"), "It moves."],
        [((film,), "How long?"), "Two seconds"],
        [((c, film), "Is it in there?"), "No."],
        [((c, film), "Where is it?"), "Nowhere at all."],
        [SYSTEM, ((), "Hello"), "Hi!"],
        [SYSTEM, ((), "And who are you?"), "Nobody."],
    ]
    return [Record(f"r[{number}]", tuple(map(turn_of, talk))) for number, talk in enumerate(talks)]


def turn_of(said):
    if isinstance(said, Turn):
        return said
    return Turn("assistant", (said,)) if isinstance(said, str) else Turn("user", (*said[0], said[1]))


@pytest.fixture(scope="module")
def trees(family_model, tmp_path_factory):
    """All records as one row of trees."""
    chat = open_chat(family_model, video_max_pixels=160_000)
    scripts = [chat.write_scripts(record)[-1] for record in records(tmp_path_factory.mktemp("trees"))]
    members, firsts = np.arange(sum(GROUPS)), np.cumsum([0, *GROUPS[:-1]])
    packed = PackedRows(
        np.array([0, len(members)]), np.where(np.isin(members, firsts), members, ~members), [(0, 0), (1, len(members))]
    )
    return Rows(scripts, packed, chat, limited(AutoProcessor.from_pretrained(family_model), chat))


def alone(trees):
    """The same records, each a row."""
    return Rows(trees.scripts, [[number] for number in range(len(trees.scripts))], trees.chat, trees.processor)


@pytest.mark.parametrize("on", ["language", "vision"])
def test_trees_have_the_loss_and_the_gradients_of_their_records(trees, family_model, on):
    model, singles = make_model(family_model, on, "varlen"), alone(trees)
    loss, found = gradients(model, trees, [0], on == "vision")
    stock = make_model(family_model, on, "sdpa")
    wanted, expected = gradients(stock, singles, range(len(singles)), on == "vision")
    assert loss == pytest.approx(wanted, rel=1e-5)
    # A gated delta rule sums in chunks of 64 tokens, which begin elsewhere.
    assert (found - expected).abs().max() < (3e-5 if trees.chat.family.linear_attention else 1e-5) * expected.abs().max()
    assert trees[0]["input_ids"].numel() < sum(singles[number]["input_ids"].numel() for number in range(len(singles)))


def test_a_tree_pays_for_its_media_once_and_teaches_what_its_records_do(trees):
    row, singles = trees[0], alone(trees)
    pictures, grids = sum(len(of.get("image_grid_thw", ())) for of in singles), len(row["image_grid_thw"])
    assert (pictures, grids) == (4 * 2 + 1 + 2, 2 + 1 + 1) and len(row["video_grid_thw"]) == 2
    assert sum((single["labels"] != IGNORE).sum() for single in singles) == (row["labels"] != IGNORE).sum()
    pieces = row["cu_seq_lens_q"].tolist()
    assert all(row["labels"][0, start] == IGNORE for start in pieces[:-1]), "taught to whatever stands before it in the row"
    keys = row[KEYS].split(row["cu_seq_lens_k"].diff().tolist())
    for (start, end), seen in zip(pairwise(pieces), keys, strict=True):
        assert seen.tolist()[start - end :] == [*range(start, end)] and len(seen) <= row["max_length_k"]
    for number, script in enumerate(trees.scripts):  # what each record sees is the record, its positions those of it alone
        assert row["input_ids"][0, keys[PIECE_OF[number]]].tolist() == script.widened()[0]
        assert torch.equal(row["position_ids"][:, 0, keys[PIECE_OF[number]]], singles[number]["position_ids"][:, 0])


def test_an_attention_that_knows_no_trees_is_refused(trees, family_model):
    with pytest.raises(AssertionError, match="lose the trees"):
        summed_loss((model := make_model(family_model, attention="sdpa")), model, trees[0], False)


@pytest.mark.parametrize("rests", [4, 64])
def test_in_16_bits_what_many_records_add_to_their_beginning_is_not_rounded_off(rests):
    """It was summed in 16 bits: 1,000 ones came to 256."""
    torch.manual_seed(0)
    states, beginning = torch.randn(1, 2, 8 + rests, 4), torch.arange(8)
    places = torch.cat([torch.cat([beginning, torch.tensor([8 + number])]) for number in range(rests)])
    half, exact = states.bfloat16().requires_grad_(), states.double().requires_grad_()
    weights = torch.rand(1, 2, len(places), 4).bfloat16()
    (Gathered.apply(half, places) * weights).sum().backward()
    (exact.index_select(2, places) * weights.double()).sum().backward()
    assert (half.grad.double() - exact.grad).abs().max() <= 2**-8 * exact.grad.abs().max()


def test_records_share_a_beginning_that_others_stand_between(trees):
    """Two system prompts, or two instructions about one picture, in turn."""
    scripts = [trees.scripts[number] for number in (9, 0, 10, 1)]
    packed = pack_scripts(list(enumerate(scripts)), {medium: number for number, medium in enumerate(scripts[1].media)})
    back, shared = (packed.numbers[:, NUMBERS.index(name)].tolist() for name in ("back", "shared"))
    assert back[3] == 2 and shared[3] == scripts[3].shared_with(scripts[1]) > 0
    other = replace(scripts[0], ids=[scripts[0].ids[0] + 1, *scripts[0].ids[1:]])
    long = [replace(of, ids=of.ids[:5] * 20 + of.ids, labels=[IGNORE] * 100 + of.labels) for of in (scripts[0], other) * 2]
    packed = pack_scripts(list(enumerate(long)), {})
    assert packed.numbers[:, NUMBERS.index("back")].tolist() == [0, 0, 2, 2]
    assert (packed.numbers[2:, NUMBERS.index("shared")] >= 100).all()


def test_no_branch_sees_another(trees, family_model):
    """The text of one is changed; what each of the others comes to stays as it is."""
    model = make_model(family_model, attention="varlen").eval()

    def losses(scripts):
        """Of each record in the row of trees, the others untaught."""
        for number in range(len(scripts)):
            row = Rows(scripts, trees.rows, trees.chat, trees.processor)[0]
            own = row[KEYS].split(row["cu_seq_lens_k"].diff().tolist())[PIECE_OF[number]]
            row["labels"] = torch.full_like(row["labels"], IGNORE).index_copy(1, own, row["labels"][:, own])
            with torch.no_grad():
                yield summed_loss(model, model, row, False).item()

    changed = 2
    ids = list(trees.scripts[changed].ids)
    ids[-6:-3] = reversed(ids[-6:-3])
    ids[-12:-9] = reversed(ids[-12:-9])
    script = replace(trees.scripts[changed], ids=ids)
    other = [script if number == changed else of for number, of in enumerate(trees.scripts)]
    before, after = list(losses(trees.scripts)), list(losses(other))
    assert [number for number, (a, b) in enumerate(zip(before, after, strict=True)) if abs(a - b) > 1e-6 * abs(a)] == [changed]


def test_a_broken_picture_blanks_every_record_of_its_tree_and_no_other(trees, monkeypatch):
    whole = trees[0]
    skipping, stock = Rows(trees.scripts, trees.rows, trees.chat, trees.processor, skip=True), rows.pixels

    def breaking(media, chat, processor, where=""):
        if media == trees.scripts[0].media:
            raise UserError(Problem(where, "breaks", "mend it"))
        return stock(media, chat, processor, where)

    monkeypatch.setattr(rows, "pixels", breaking)
    with pytest.raises(UserError, match=r"r\[0\]"):
        trees[0]
    row, problems = skipping.build(0)
    assert [problem.where for problem in problems] == [f"r[{number}]" for number in range(GROUPS[0])]
    end = whole["cu_seq_lens_q"][PIECE_OF[4]]
    assert (row["labels"][0, :end] == IGNORE).all() and torch.equal(row["labels"][0, end:], whole["labels"][0, end:])
    assert all(torch.equal(row[key], whole[key]) for key in ("input_ids", "position_ids", "cu_seq_lens_q", KEYS, "image_grid_thw"))


def test_what_is_shared_ends_before_what_is_taught_and_holds_all_media(trees):
    first, *others = trees.scripts[: GROUPS[0]]
    same = replace(first, where="again")
    assert same.shared_with(first) == first.widened()[1].index(next(label for label in first.labels if label != IGNORE)) - 1
    assert all(sum(first.counts) < script.shared_with(first) == first.shared_with(script) for script in others)
    assert trees.scripts[4].shared_with(first) == 0
    answered = replace(first, labels=[*first.ids[:1], *first.labels[1:]])
    assert answered.shared_with(first) == 0, "its media lie behind what it teaches"
