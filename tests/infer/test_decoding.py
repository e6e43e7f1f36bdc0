"""One rule of decoding for ask, eval, serve, what vLLM is sent, and plain transformers on the merged folder."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from qwenvl_ft.errors import UserError
from qwenvl_ft.export.merge import export
from qwenvl_ft.infer.decoding import CHANGES, read_decoding
from qwenvl_ft.infer.engine import Engine
from qwenvl_ft.serve.api import ChatRequest, Sampling
from qwenvl_ft.serve.batching import Batcher
from qwenvl_ft.serve.vllm_backend import write_request
from tests.conftest import TINY
from tests.serve.test_batching import mixed, submit
from tests.serving import random_adapter

TOKENS = 24
TOKENIZER = Tokenizer.from_file(str(TINY / "tokenizer.json"))
END_OF_TEXT, IM_END = map(TOKENIZER.token_to_id, ("<|endoftext|>", "<|im_end|>"))
# What Qwen2.5-VL ships, but for a penalty that the tiny base feels, and a base's only end.
SHIPPED = {"do_sample": True, "temperature": 1e-6, "top_k": 3, "repetition_penalty": 1.4, "eos_token_id": END_OF_TEXT}
# What transformers 5.23 knows and what changes no greedy answer of ours, or is named by every command itself.
HARMLESS = {
    "eos_token_id", "repetition_penalty", "pad_token_id",  # the rule
    "do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",  # of sampling
    "renormalize_logits", "max_length", "max_new_tokens",
    "early_stopping", "length_penalty", "diversity_penalty", "low_memory",  # of beams
    "bos_token_id", "decoder_start_token_id", "is_assistant",  # of models with an encoder, of assistants
    "use_cache", "cache_implementation", "cache_config", "max_cache_len", "compile_config", "disable_compile", "prefill_chunk_size",
    "continuous_batching_config",
    "output_attentions", "output_hidden_states", "output_logits", "output_scores", "return_dict_in_generate",
    "transformers_version", "_from_model_config",
    # Guesses that the model itself checks: faster, the same answer.
    "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_confidence_threshold", "assistant_early_exit",
    "assistant_lookbehind", "target_lookbehind", "num_assistant_tokens", "num_assistant_tokens_schedule", "speculation_type",
    "use_mtp",
}  # fmt: skip


def base_with(folder, settings):
    """The tiny base with this generation_config.json; None: without any."""
    shutil.copytree(TINY, folder)
    (folder / "generation_config.json").unlink()
    if settings is not None:
        (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def served(engine, talks, **how):
    """What the server's batch answers."""
    batcher = Batcher(engine, len(talks))
    asked = [submit(batcher, engine, talk, TOKENS, **how) for talk in talks]
    assert all(heard.done.wait(60) for _, heard in asked)
    batcher.close()
    return ["".join(heard.pieces) for _, heard in asked]


def plainly(model, processor, engine, talks, **how):
    """What plain `generate` answers to the engine's inputs."""
    answers = []
    for talk in talks:
        inputs = engine.inputs([talk])
        out = model.generate(**inputs, max_new_tokens=TOKENS, **how)[0, inputs["input_ids"].shape[1] :]
        answers.append(processor.decode(out, skip_special_tokens=True))
    return answers


def test_ask_batches_and_serve_answer_alike_under_the_folders_penalty_and_end(tmp_path):
    """`serve` knew nothing of repetition_penalty; a base whose only end was <|endoftext|> never stopped."""
    engine = Engine.open(base_with(tmp_path / "base", SHIPPED))
    talks = mixed(6)
    single = [engine.ask(talk, TOKENS) for talk in talks]
    assert engine.ask_many(talks, TOKENS) == single, "the padding is not penalised"
    assert "".join(engine.stream(talks[0], TOKENS)) == single[0]
    assert served(engine, talks) == single
    stock = AutoModelForImageTextToText.from_pretrained(TINY)
    assert plainly(stock, engine.processor, engine, talks, repetition_penalty=1.4, do_sample=False) == single
    unpenalised = served(engine, talks, repetition_penalty=1.0)
    assert unpenalised == plainly(stock, engine.processor, engine, talks, do_sample=False) != single
    assert served(Engine.open(TINY), talks, repetition_penalty=1.4) == single, "a request's own penalty replaces the folder's"


def test_a_base_whose_end_is_endoftext_stops_at_im_end(tmp_path):
    for number, settings in enumerate((SHIPPED, {"eos_token_id": [END_OF_TEXT]})):
        folder = base_with(tmp_path / f"base{number}", settings)
        engine = Engine.open(folder)
        assert set(read_decoding(folder, TOKENIZER).ends) == {END_OF_TEXT, IM_END} == Batcher(engine, 1).ends
        inputs = engine.inputs([mixed(1)[0]])
        out = engine.model.generate(**inputs, max_new_tokens=400)[0, inputs["input_ids"].shape[1] :].tolist()
        assert out[-1] == IM_END and out.count(IM_END) == 1


@pytest.mark.parametrize("settings", [None, {}, {"eos_token_id": None, "repetition_penalty": None, "no_repeat_ngram_size": 0}])
def test_a_folder_that_says_nothing_is_greedy_to_im_end(tmp_path, settings):
    decoding = read_decoding(base_with(tmp_path / "base", settings), TOKENIZER)
    assert IM_END in decoding.ends and decoding.repetition_penalty == 1


@pytest.mark.parametrize("key, value", [
    ("no_repeat_ngram_size", 3), ("suppress_tokens", [5]), ("min_new_tokens", 4), ("forced_eos_token_id", 7), ("num_beams", 4),
    ("bad_words_ids", [[5]]), ("repetition_penalty", 0), ("repetition_penalty", "1.1"), ("stop_strings", ["a"]),
])  # fmt: skip
def test_what_else_would_change_an_answer_is_refused_before_anything_is_loaded(tmp_path, key, value):
    """ask and eval obeyed it, serve did not, and vLLM knows none of them."""
    adapter, folder = random_adapter(TINY, tmp_path / "adapter", 1), base_with(tmp_path / "base", {key: value, "min_length": 9})
    for refuses in (lambda: Engine.open(folder), lambda: export(adapter, tmp_path / "out", folder, 0, lambda done, total: None)):
        with pytest.raises(UserError) as error:
            refuses()
        assert {problem.where for problem in error.value.problems} == {
            f"{folder}/generation_config.json: {of}" for of in (key, "min_length")
        }
    assert not (tmp_path / "out").exists()


def test_every_setting_that_transformers_knows_has_its_place_in_the_rule():
    assert GenerationConfig().to_dict().keys() == CHANGES.keys() | HARMLESS and not CHANGES.keys() & HARMLESS
    for key, idle in CHANGES.items():
        assert GenerationConfig()._get_default_generation_params().get(key) in (None, *idle), key


def test_plain_transformers_answers_for_the_merged_folder_as_ask_does(tmp_path):
    base, adapter, merged = base_with(tmp_path / "base", SHIPPED), tmp_path / "adapter", tmp_path / "merged"
    random_adapter(base, adapter, 1)
    export(adapter, merged, base, 0, lambda done, total: None)
    said = json.loads((merged / "generation_config.json").read_text())
    assert said["temperature"] == 0 and set(said["eos_token_id"]) == {END_OF_TEXT, IM_END} and said["repetition_penalty"] == 1.4
    talks, engine = mixed(4), Engine.open(merged)
    wanted = [engine.ask(talk, TOKENS) for talk in talks]
    model, processor = AutoModelForImageTextToText.from_pretrained(merged), AutoProcessor.from_pretrained(merged)
    assert plainly(model, processor, engine, talks) == wanted
    beside = Engine.open(base, adapter)
    assert isinstance(beside.model, PeftModel) and [beside.ask(talk, TOKENS) for talk in talks] == wanted


def test_vllm_is_told_every_setting_that_it_would_look_up(tmp_path):
    """Its top_k, min_p and penalty came from the model's file, its ends from the tokenizer's."""
    decoding = read_decoding(base_with(tmp_path / "base", SHIPPED), TOKENIZER)
    body = write_request(ChatRequest("tiny", [], Sampling()), [], decoding)
    wanted = {
        "temperature": 0,
        "top_p": 1,
        "top_k": -1,
        "min_p": 0,
        "repetition_penalty": 1.4,
        "stop_token_ids": [END_OF_TEXT, IM_END],
    }
    assert wanted.items() <= body.items()
    own = write_request(ChatRequest("tiny", [], Sampling(repetition_penalty=1.1, top_k=3)), [], decoding)
    assert (own["repetition_penalty"], own["top_k"]) == (1.1, 3)
    assert not {"repetition_penalty", "stop_token_ids"} & write_request(ChatRequest("tiny", [], Sampling()), [], None).keys()


def test_sampling_is_penalised_as_transformers_does(tmp_path):
    engine = Engine.open(base_with(tmp_path / "base", SHIPPED))
    talk = mixed(1)[0]
    assert served(engine, [talk], temperature=0.5, top_k=1) == [engine.ask(talk, TOKENS)]
    with torch.inference_mode():
        assert served(engine, [talk], temperature=1.5, seed=7) == served(engine, [talk], temperature=1.5, seed=7)
