"""An evaluation by answers: the model that trains is asked a sample of the held-out questions, as `qwenvl-ft eval` asks them.

>>> answers = Answers(config, processor, held_out)  # eval_metric: exact, eval_samples: 200
>>> answers.score(run, [], signals)
Scored(value=0.62, questions=200, cut=3)
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from transformers import GenerationConfig

from qwenvl_ft.config import Config
from qwenvl_ft.data.meta_file import read_records
from qwenvl_ft.data.prepare import Prepared
from qwenvl_ft.data.reading import Reading
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.evaluate.metrics import METRICS, Prediction
from qwenvl_ft.evaluate.scoring import Question, Sheet, answered, batches, box_facts, prediction, wanted_boxes
from qwenvl_ft.infer.decoding import read_decoding
from qwenvl_ft.infer.engine import Engine
from qwenvl_ft.model.attention import attending_with_cache
from qwenvl_ft.train.launch import Signals
from qwenvl_ft.train.memory import what_lacks
from qwenvl_ft.train.state import Run
from qwenvl_ft.values import BATCH_SIZE


class Scored(NamedTuple):
    """The metric's value, of how many questions over all processes, and how many answers were cut."""

    value: float
    questions: int
    cut: int


class Answers:
    """The questions: those that `qwenvl-ft eval --limit EVAL_SAMPLES --seed SEED` asks, with their media where media_position has
    them.

    Raises UserError where the model's folder has settings of answers that are not followed here, and for a metric that what is
    wanted has no worth by.
    """

    def __init__(self, config: Config, processor: Any, held_out: Prepared):
        assert config.eval_meta_file
        self.place, self.metric = f"eval_metric: {config.eval_metric}", METRICS[config.eval_metric]
        self.max_new_tokens, chat, reading = config.eval_max_new_tokens, held_out.chat, Reading.of(config)
        self.decoding = read_decoding(config.model, chat.tokenizer)
        found = read_records(config.eval_meta_file, config.held_out_dir, reading=reading, seed=config.seed)
        records = found.records  # what is wrong with others is said
        sheet = Sheet.of(records, chat, config.eval_samples, config.seed)
        self.questions = [sheet.asked[number] for number in sheet.chosen]
        self.engine = Engine(None, processor, chat, reading=reading)  # without a model, until one is asked
        perfect = self.value_of([_perfect(question, self.engine) for question in self.questions])
        if math.isnan(perfect) or (not self.metric.is_error and not perfect):
            what = "says nothing of these questions: the wanted answers themselves are worth nothing by it"
            raise UserError(Problem(self.place, what, "take another metric, such as relaxed or anls, or loss"))

    def value_of(self, predictions: Sequence[Prediction]) -> float:
        """NaN where none of them can be scored. Raises UserError for classes that are none."""
        try:
            return float(self.metric.value(self.metric.counts(predictions).sum(0)))
        except UserError as error:  # which names an option of `eval`
            raise UserError(Problem(self.place, error.problems[0].what, "take another metric")) from error

    def score(self, run: Run, broken: Sequence[Problem], signals: Signals) -> Scored | None:
        """What the answers come to, each process giving its share of them; None where all gave up between two batches, for a
        signal. Records whose pictures are `broken` are not asked about, as they teach nothing."""
        left_out = tuple(f"{problem.where}." for problem in broken)
        asked = [question for question in self.questions if not question[0].where.startswith(left_out)]
        world, rank = run.accelerator.num_processes, run.accelerator.process_index
        mine, found = asked[rank::world], list[Prediction]()
        run.model.eval()
        run.bare.get_base_model().generation_config = GenerationConfig(**self.decoding.settings())
        engine = replace(self.engine, model=run.bare)
        passes = answered(mine, batches(engine, BATCH_SIZE, self.max_new_tokens)([record for record, _ in mine]), engine)
        with attending_with_cache(run.bare):
            for _ in range(0, len(asked[::world]), BATCH_SIZE):  # the first process has most of them
                if signals.stop(run.accelerator, midway=True):
                    return None
                try:
                    found += next(passes, {}).values()
                except torch.OutOfMemoryError as error:
                    what = f"{BATCH_SIZE} questions and their answers do not fit: {what_lacks(error)}"
                    fix = "lower eval_max_new_tokens or max_pixels, or set eval_metric: loss and ask later with `qwenvl-ft eval`"
                    raise UserError(Problem(self.place, what, fix)) from error
        found = gather_object(found)
        value = self.value_of(found)
        if math.isnan(value):
            what = f"none of the {len(self.questions)} questions is left to score: their pictures break"
            raise UserError(Problem(self.place, what, "mend the pictures that are named, or take another eval_metric"))
        return Scored(value, len(found), sum(of["cut"] for of in found))


def _perfect(question: Question, engine: Engine) -> Prediction:
    """The prediction of a model that answers what is wanted."""
    boxes = wanted_boxes(question, engine)
    return prediction(question, question[1], False) | box_facts(boxes, boxes)
