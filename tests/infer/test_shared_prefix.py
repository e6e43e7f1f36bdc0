"""Questions that begin alike, answered from one reading of that: against transformers' own generate, each alone."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from qwenvl_ft.data.meta_file import read_records
from qwenvl_ft.data.packing import LEAST_SHARED
from qwenvl_ft.infer.batch_file import BATCHES_AHEAD, answer_file
from qwenvl_ft.infer.engine import Engine
from qwenvl_ft.infer.shared_prefix import prefixes
from qwenvl_ft.serve.batching import Batcher
from tests.conftest import SAMPLE, TINY
from tests.evaluate.asking import predictions_of
from tests.serve.test_batching import submit
from tests.serving import CHARTS, random_adapter

NOISE = np.random.default_rng(0)
LONG = "What colour has the first thing that you see in it, and why, do you think, is it there at all?"
RULES = "You answer in few words. " * 30


def noise(width, height):
    return {"image": Image.fromarray(NOISE.integers(0, 255, (height, width, 3), dtype=np.uint8))}


def user(*parts):
    return {"role": "user", "content": list(parts)}


@pytest.fixture(scope="module")
def talks():
    """One picture, two, a film, a long system prompt, each with several questions, and some that share nothing, mixed."""
    a, b, c = noise(336, 280), noise(280, 300), noise(400, 290)
    film = {"video": [noise(224, 224)["image"] for _ in range(6)], "fps": 2.0}
    system = {"role": "system", "content": RULES}
    return [
        [user(a, "What is it?")], [user(a, LONG)], [user(b, c, "Which is larger?")], [user("hello")], [user(a, "no")],
        [user(b, c, "Which?")], [user(film, "What happens?")], [system, user("Who are you?")], [user(film, LONG)],
        [user(a, "What is it?"), {"role": "assistant", "content": "A chart."}, user("Sure?")], [user(b, "What is it?")],
        [system, user(LONG)], [system, user(a, "no")],
    ]  # fmt: skip


def alone(engine, talk, tokens):
    """What transformers generates for this one."""
    inputs = engine.inputs([talk])
    out = engine.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    return engine.chat.answered(out)


class Seen:
    """Counts what a model's towers are given while it answers."""

    def __init__(self, engine):
        inner = engine.model.model
        self.patches, self.longest = 0, 0
        self.hooks = [inner.visual.register_forward_pre_hook(self.look), inner.language_model.register_forward_pre_hook(
            self.read, with_kwargs=True)]  # fmt: skip

    def look(self, _, arguments):
        self.patches += len(arguments[0])

    def read(self, _, arguments, named):
        self.longest = max(self.longest, named["inputs_embeds"].shape[:2].numel())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


@pytest.fixture(scope="module")
def family(family_model, talks):
    """A family's engine, and what it answers to each talk alone."""
    engine = Engine.open(family_model)
    expected = [alone(engine, talk, 6) for talk in talks]
    assert len(set(expected)) > len(talks) / 2
    return engine, expected


def test_every_family_answers_what_it_answers_alone_and_looks_once(family, talks):
    engine, expected = family
    whole = engine.inputs(talks)
    with Seen(engine) as seen:
        assert engine.ask_many(talks, 6) == expected
    shown = sum(len(whole[name]) for name in ("pixel_values", "pixel_values_videos"))
    scripts = engine.scripts(talks)
    found = prefixes(scripts)
    if engine.chat.family.linear_attention:
        assert seen.patches == shown and seen.longest == whole["input_ids"].numel()
        return
    assert sorted(place for of in found for place in of.places) == [*range(len(talks))]
    once = [medium for of in found for medium in scripts[of.places[0]].media]
    assert len(once) < 0.7 * sum(len(script.media) for script in scripts)
    assert 0 < seen.patches < 0.7 * shown and seen.longest < 0.7 * whole["input_ids"].numel()


@pytest.mark.parametrize("max_batch", [1, 16])
def test_every_family_serves_what_it_answers_alone_and_looks_once(family, talks, max_batch):
    """In turn, and while others are answered."""
    engine, expected = family
    batcher = Batcher(engine, max_batch)
    with Seen(engine) as seen:
        asked = [submit(batcher, engine, talk, 6) for talk in talks]
        assert all(heard.done.wait(100) for _, heard in asked)
        batcher.close()
    assert ["".join(heard.pieces) for _, heard in asked] == expected
    requests, scripts = [request for request, _ in asked], engine.scripts(talks)
    if engine.chat.family.linear_attention:
        assert not any(request.cached for request in requests)
        return
    media = [place for place, script in enumerate(scripts) if script.media]
    firsts = [place for place in media if not any(scripts[place].shared_with(before) for before in scripts[:place])]
    assert [place for place in media if not requests[place].cached] == firsts
    assert seen.patches == sum(math.prod(grid) for place in firsts for grid in scripts[place].grids)


def test_an_adapter_on_both_towers_answers_what_it_answers_alone(talks, tmp_path):
    engine = Engine.open(TINY, random_adapter(TINY, tmp_path / "one", 0))
    assert len(prefixes(engine.scripts(talks))) < len(talks)
    assert engine.ask_many(talks, 6) == [alone(engine, talk, 6) for talk in talks]


def test_what_scripts_begin_with_is_common_to_them_all_and_ends_before_their_last(talks):
    engine = Engine.open(TINY)
    same = [user(noise(336, 280), "again")]
    scripts = engine.scripts([*talks, same, same])
    found = prefixes(scripts)
    for of in found:
        rows = [scripts[place].widened()[0] for place in of.places]
        assert all(row[: of.tokens] == rows[0][: of.tokens] and of.tokens < len(row) for row in rows)
        assert all(scripts[place].media == scripts[of.places[0]].media for place in of.places)
        assert of.tokens >= LEAST_SHARED or len(of.places) == 1
    assert found[-1].places == [len(talks), len(talks) + 1] and found[-1].tokens == scripts[-1].length - 1


def test_a_little_in_common_does_not_spoil_what_others_share(talks):
    """All begin with the same rules, the first three with a document behind them."""
    document = "The price of the red car was twelve, the blue one's nine, and nobody asked. " * 40
    texts = [f"{document}Red?", f"{document}Blue?", "Who are you?", f"{document}Nobody?"]
    asked = [[{"role": "system", "content": RULES}, user(text)] for text in texts]
    found = prefixes(Engine.open(TINY).scripts(asked))
    assert [of.places for of in found] == [[0, 1, 3], [2]]


class Noted(Engine):
    """Notes the size of its batches' groups."""

    def answer_many(self, conversations, max_new_tokens=12, thinking=None):
        batches.append([of.places for of in prefixes(self.scripts(conversations))])
        return super().answer_many(conversations, max_new_tokens, thinking)


batches: list = []


@pytest.fixture
def noted():
    batches.clear()
    plain = Engine.open(TINY)
    return Noted(plain.model, plain.processor, plain.chat)


def test_a_file_of_questions_asks_those_about_a_picture_together_and_keeps_their_order(noted, tmp_path):
    asked = [[user({"image": str(CHARTS[number % 3])}, f"{number} {'why ' * number}?")] for number in range(9)]
    lines = [(number, {"messages": talk}) for number, talk in enumerate(asked, 1)]
    expected, out, seen = [alone(noted, talk, 6) for talk in asked], tmp_path / "out", []

    def on_answer(done, total):
        seen.append((done, len(out.read_text().splitlines())))

    assert answer_file(noted, lines, out, 3, 6, on_answer) == (0, [])
    assert batches == [[[0, 1, 2]]] * 3 and seen == [(3, 1), (6, 2), (9, 9)], "an answer waits for those before it"
    said = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["line"] for line in said] == [*range(1, 10)] and [line["answer"] for line in said] == expected
    out.write_text("".join(out.read_text().splitlines(keepends=True)[:2]))
    assert answer_file(noted, lines, out, 3, 6, on_answer) == (2, [])
    assert [json.loads(line) for line in out.read_text().splitlines()] == said


def test_questions_are_not_looked_for_without_end(noted, tmp_path):
    """What waits to be written is bounded, and lost where a run is killed."""
    picture, out, seen = {"image": str(CHARTS[0])}, tmp_path / "out", []
    asked = [[user(picture, "a")], *([user("b")] for _ in range(BATCHES_AHEAD - 1)), [user(picture, "c")]]
    lines = [(number, {"messages": talk}) for number, talk in enumerate(asked, 1)]

    def on_answer(done, total):
        seen.append((done, len(out.read_text().splitlines())))

    answer_file(noted, lines, out, 1, 1, on_answer)
    assert seen == [(number, number) for number in range(1, len(lines) + 1)]


def test_eval_asks_the_questions_about_a_picture_together_whatever_their_length(noted, tmp_path):
    names = [path.name for path in CHARTS[:3]]
    talk = [{"image": names[number % 3], "conversations": [
        {"from": "user", "value": f"<image>{'why ' * number}?"}, {"from": "assistant", "value": "so"}]} for number in range(9)]  # fmt: skip
    (tmp_path / "meta.json").write_text(json.dumps(talk))
    records, problems, _ = read_records(tmp_path / "meta.json", SAMPLE / "images")
    assert not problems
    predictions = predictions_of(noted, records, 3, 6)
    assert batches == [[[0, 1, 2]]] * 3
    assert [line["answer"] for line in predictions] == [alone(noted, record.turns[:1], 6) for record in records]
