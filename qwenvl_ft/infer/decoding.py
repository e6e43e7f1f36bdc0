"""How answers are decoded: one rule for `ask`, `eval`, `serve`, vLLM behind it and the merged folder. Needs no torch.

An answer takes the likeliest token each time unless a request asks for sampling (a temperature above 0). Of a model's
generation_config.json count the tokens that end an answer, to which <|im_end|> always belongs, and `repetition_penalty`, over
the prompt and the answer so far, which a request's own replaces. Sampling settings there count for nobody. What else there would
change an answer is refused, since some of those who read the folder would follow it and others would not.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from qwenvl_ft.data.chat import END
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.model import read_config, read_model_json

GENERATION_CONFIG = "generation_config.json"
# What would change the likeliest answer and is not done here, with the values that ask for nothing. Beside these transformers
# 5.23 knows settings of sampling, of lengths (a command and a request have their own), of outputs, speed and beams; a test sorts
# them all.
CHANGES: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,), "num_beam_groups": (1,), "penalty_alpha": (0,), "dola_layers": (), "constraints": (),
    "force_words_ids": (), "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,), "encoder_repetition_penalty": (1,),
    "bad_words_ids": ([],), "min_length": (0,), "min_new_tokens": (0,), "forced_bos_token_id": (), "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (), "suppress_tokens": ([],), "begin_suppress_tokens": ([],), "sequence_bias": ({}, []),
    "guidance_scale": (1,), "token_healing": (False,), "watermarking_config": (), "stop_strings": ([],), "max_time": (),
    "num_return_sequences": (1,), "assistant_ensemble_weight": (), "remove_invalid_values": (False,),
}  # fmt: skip


@dataclass(frozen=True)
class Decoding:
    """`ends` are the ids that end an answer, <|im_end|> among them; `pad` fills up a batch's shorter answers."""

    ends: tuple[int, ...]
    pad: int
    repetition_penalty: float = 1.0

    def settings(self) -> dict[str, Any]:
        """The rule as settings of `generate`."""
        return {"eos_token_id": list(self.ends), "pad_token_id": self.pad, "repetition_penalty": self.repetition_penalty}

    def file(self) -> dict[str, Any]:
        """The rule as a generation_config.json that transformers and vLLM follow to the same answers.

        A temperature of 0 is greedy for vLLM, which samples where the file says nothing; transformers samples only where
        `do_sample` says so, and warns of a temperature beside a `do_sample` of false.
        """
        return {"temperature": 0.0, **self.settings()}


def read_decoding(model_dir: Path, tokenizer: Tokenizer) -> Decoding:
    """What counts of a model's generation_config.json; of its config.json, where there is none.

    Raises UserError for every setting that would change answers and is not followed here.
    """
    path = model_dir / GENERATION_CONFIG
    settings = read_model_json(path) if path.is_file() else {}
    problems = [
        Problem(f"{path}: {key}", f"is {settings[key]}, which changes answers and is not done here", f"delete {key} from the file")
        for key, idle in CHANGES.items()
        if settings.get(key) is not None and settings[key] not in idle
    ]
    penalty = settings.get("repetition_penalty")
    penalty = 1.0 if penalty is None else penalty
    if isinstance(penalty, bool) or not isinstance(penalty, int | float) or not 0 < penalty < float("inf"):
        problems.append(Problem(f"{path}: repetition_penalty", f"is {penalty!r}", "set it to a number above 0, 1.0 for none"))
    config = read_config(model_dir)
    text = config.get("text_config") or {}
    said: Any = next((ids for of in (settings, config, text) if (ids := of.get("eos_token_id")) is not None), [])
    ends = [*(said if isinstance(said, list) else [said])]
    if (end := tokenizer.token_to_id(END)) is not None and end not in ends:
        ends.append(end)
    if not ends or not all(isinstance(token, int) for token in ends):
        problems.append(Problem(str(path), f"names no token that ends an answer, nor does the tokenizer know {END}",
                                "use the tokenizer of a Qwen-VL model"))  # fmt: skip
    if problems:
        raise UserError(*problems)
    pad = settings.get("pad_token_id")
    return Decoding(tuple(ends), pad if isinstance(pad, int) else ends[0], float(penalty))
