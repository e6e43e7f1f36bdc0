"""The batcher against transformers' own generate, one conversation at a time."""

import threading
from concurrent.futures import Future

import pytest

from qwenvl_ft.infer.engine import Engine
from qwenvl_ft.infer.prefix_cache import shown_hash
from qwenvl_ft.serve.api import ApiError, Sampling
from qwenvl_ft.serve.batching import Batcher, Request
from tests.conftest import TINY
from tests.serving import CHARTS, data_url, tiny_engines, wait_for


def mixed(count: int) -> list[list[dict]]:
    """Conversations of every shape: a picture, two, none, frames, base64, several turns."""
    a, b, c = CHARTS[:3]
    shapes = [
        [{"type": "image", "image": str(a)}, {"type": "text", "text": "read"}],
        [{"type": "image", "image": str(a)}, {"type": "image", "image": str(b)}, {"type": "text", "text": "Which is larger?"}],
        [{"type": "text", "text": "Who are you?"}],
        [{"type": "video", "video": [str(c)] * 4, "fps": 1.0}, {"type": "text", "text": "Describe this video."}],
        [{"type": "image_url", "image_url": {"url": data_url(b)}}, {"type": "text", "text": "read the chart, please"}],
    ]
    talks = [[{"role": "user", "content": shapes[number % len(shapes)]}] for number in range(count)]
    for number, talk in enumerate(talks):
        if number % 3 == 2:
            talk += [{"role": "assistant", "content": f"It is {number}."}, {"role": "user", "content": "And now?"}]
        if number % 4 == 1:
            talk.insert(0, {"role": "system", "content": "Answer in a word."})
    return talks


class Heard:
    """What a request says."""

    def __init__(self):
        self.pieces, self.finish, self.done = [], None, threading.Event()

    def __call__(self, text, finish):
        self.pieces.append(text)
        if finish:
            self.finish = finish
            self.done.set()


def submit(batcher: Batcher, engine: Engine, talk, tokens: int = 24, **how) -> tuple[Request, Heard]:
    heard = Heard()
    (script,) = engine.scripts([talk])
    inputs = engine.inputs_of([script])
    request = Request(inputs, engine.adapter, Sampling(max_new_tokens=tokens, **how), heard, shown=shown_hash(script))
    batcher.submit(request)
    return request, heard


def alone(engine: Engine, talk, tokens: int = 24) -> list[int]:
    """The ids that transformers generates for this one, the end left out."""
    inputs = engine.inputs([talk])
    out = engine.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    ends = set(engine.model.generation_config.eos_token_id)
    return out[:-1] if out[-1] in ends else out


@pytest.fixture(scope="module")
def engine():
    return Engine.open(TINY)


def test_sixteen_mixed_requests_get_the_tokens_that_each_gets_alone(engine):
    talks = mixed(16)
    expected = [alone(engine, talk) for talk in talks]
    batcher = Batcher(engine, max_batch=16)
    asked = [submit(batcher, engine, talk) for talk in talks]
    assert all(heard.done.wait(60) for _, heard in asked)
    batcher.close()
    assert [request.ids for request, _ in asked] == expected
    for (request, heard), ids in zip(asked, expected, strict=True):
        assert "".join(heard.pieces) == engine.processor.decode(ids, skip_special_tokens=True)
        assert heard.finish == ("length" if len(request.ids) == 24 else "stop")


def test_requests_that_come_while_others_are_answered_get_the_same(engine):
    talks = mixed(9)
    expected = [alone(engine, talk, 40) for talk in talks]
    batcher = Batcher(engine, max_batch=3)
    asked = []
    for talk in talks:  # each joins a batch that has moved on
        asked.append(submit(batcher, engine, talk, 40))
        steps = batcher.steps
        wait_for(lambda steps=steps: batcher.steps > steps + 1 or not batcher.active)
    assert all(heard.done.wait(60) for _, heard in asked)
    batcher.close()
    assert [request.ids for request, _ in asked] == expected


def test_every_family_batches(family_model):
    engine = Engine.open(family_model)
    talks = mixed(5)
    expected = [alone(engine, talk, 8) for talk in talks]
    batcher = Batcher(engine, max_batch=5)
    asked = [submit(batcher, engine, talk, 8) for talk in talks]
    assert all(heard.done.wait(100) for _, heard in asked)
    batcher.close()
    assert [request.ids for request, _ in asked] == expected


def test_base_and_adapters_take_turns_on_one_model(tmp_path):
    engines = tiny_engines(tmp_path)
    talks = mixed(4)
    expected = {}
    for name in engines:  # each on a model of its own
        own = Engine.open(TINY, tmp_path / name if name != "tiny" else None)
        expected[name] = [alone(own, talk) for talk in talks]
    assert expected["tiny"] != expected["one"] != expected["two.b"]
    batcher = Batcher(engines["tiny"], max_batch=16)
    asked = [(name, number, submit(batcher, engines[name], talk)) for number, talk in enumerate(talks) for name in engines]
    assert all(heard.done.wait(60) for _, _, (_, heard) in asked)
    batcher.close()
    assert all(request.ids == expected[name][number] for name, number, (request, _) in asked)


def test_a_cancelled_request_lets_go_of_its_pixels_while_it_still_waits(engine):
    """A full batch looks at those who wait only when one of its own is done."""
    batcher = Batcher(engine, 1)
    heard, never = Heard(), Heard()
    first, second = (
        Request(engine.inputs([talk]), None, Sampling(40), on_piece)
        for talk, on_piece in zip(mixed(2), (heard, never), strict=True)
    )
    batcher.submit(first)
    batcher.submit(second)
    second.cancel()
    assert second.inputs is None
    batcher.close()
    assert heard.finish and not never.pieces


def test_a_cancelled_request_stops_at_the_next_token_and_others_go_on(engine):
    engine = Engine(engine.model, engine.processor, engine.chat)
    talks = mixed(3)
    expected = alone(engine, talks[2], 60)
    batcher = Batcher(engine, max_batch=4)
    batcher.ends = set()  # they would talk for ever
    first, _ = submit(batcher, engine, talks[0], 100_000)
    second, heard = submit(batcher, engine, talks[2], 60)
    wait_for(lambda: first.ids)
    first.cancel()
    assert heard.done.wait(30)
    said = len(first.ids)
    batcher.close()
    assert len(first.ids) == said < 1000
    assert second.ids[: len(expected)] == expected


def test_an_error_of_the_model_ends_its_request_and_no_other(engine, caplog):
    batcher = Batcher(engine, max_batch=4)
    broken = Request({"input_ids": engine.inputs([mixed(3)[2]])["input_ids"] + 10**6}, None, Sampling(), Heard(), "number 7")
    batcher.submit(broken)
    request, heard = submit(batcher, engine, mixed(3)[2])
    assert heard.done.wait(30)
    batcher.close()
    assert broken.on_piece.finish == "error" and "number 7" in caplog.text
    assert request.ids == alone(engine, mixed(3)[2])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_whoever_waits_is_told_that_the_thread_has_died(engine, monkeypatch):
    """A job that came later was never done nor refused: whoever loaded an adapter waited for ever, and all others behind him."""
    batcher, gone = Batcher(engine, max_batch=2), Future()
    gone.cancel()  # by a caller who did not wait
    batcher.submit((lambda: pytest.fail("nobody waits for it"), gone))
    assert batcher.call(lambda: 5).result(30) == 5
    asked = [Request(engine.inputs([mixed(3)[2]]), None, Sampling(), Heard()) for _ in range(3)]

    def dies(request):
        for waiting in asked[1:]:
            batcher.submit(waiting)
        jobs.append(batcher.call(lambda: 6))
        raise SystemError

    jobs = []
    monkeypatch.setattr(batcher, "_prefill", dies)
    batcher.submit(asked[0])
    batcher.thread.join(30)
    asked.append(Request(None, None, Sampling(), Heard()))
    batcher.submit(asked[-1])
    for job in (*jobs, batcher.call(lambda: 7)):
        with pytest.raises(ApiError, match="has stopped"):
            job.result(30)
    assert [request.on_piece.finish for request in asked] == ["error"] * 4 and not batcher.alive


def test_a_stop_word_ends_an_answer_before_it_and_is_never_sent_in_part(engine):
    talk = mixed(1)[0]
    text = engine.processor.decode(alone(engine, talk), skip_special_tokens=True)
    word = text[3:6]
    batcher = Batcher(engine, max_batch=1)
    _, heard = submit(batcher, engine, talk, stop=(word, "never said"))
    assert heard.done.wait(30)
    batcher.close()
    assert "".join(heard.pieces) == text[: text.find(word)] and heard.finish == "stop"


def test_a_seed_draws_the_same_answer_whoever_is_beside_it(engine):
    talks = mixed(3)
    how = {"temperature": 1.5, "top_p": 0.95, "seed": 7}
    batcher = Batcher(engine, max_batch=3)
    one, heard = submit(batcher, engine, talks[0], **how)
    heard.done.wait(30)
    others = [submit(batcher, engine, talk, temperature=1.0) for talk in talks[1:]]
    again, heard = submit(batcher, engine, talks[0], **how)
    other, second = submit(batcher, engine, talks[0], **{**how, "seed": 8})
    assert heard.done.wait(30) and second.done.wait(30) and all(talker.done.wait(30) for _, talker in others)
    batcher.close()
    assert one.ids == again.ids != other.ids


def test_top_k_of_one_and_top_p_of_nothing_are_greedy(engine):
    talk = mixed(1)[0]
    batcher = Batcher(engine, max_batch=2)
    asked = [submit(batcher, engine, talk, temperature=2.0, **how) for how in ({"top_k": 1}, {"top_p": 0.0})]
    assert all(heard.done.wait(30) for _, heard in asked)
    batcher.close()
    assert [request.ids for request, _ in asked] == [alone(engine, talk)] * 2
