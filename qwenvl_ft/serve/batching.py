"""Generates for many requests at once: a new one joins between two tokens, a finished one leaves.

A request is read alone (its picture never waits for another's) and its keys and values join the batch, padded on the left. Of one
that begins like one before it, with the same media and for the same adapter, only the rest is read.
One thread owns the model. Base and adapters share its weights; each has a batch of its own and they take turns.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from queue import Empty, Queue
from threading import Thread
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch.nn import functional
from transformers import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from qwenvl_ft.errors import UserError
from qwenvl_ft.infer.detokenizer import Detokenizer
from qwenvl_ft.infer.engine import Engine
from qwenvl_ft.infer.prefix_cache import PREFIX_BYTES, Prefixes, Prompt
from qwenvl_ft.serve.api import Sampling, model_stopped
from qwenvl_ft.serve.schema import Grammar

log = logging.getLogger("qwenvl_ft.serve")
T = TypeVar("T")
_Job = tuple[Callable[[], Any], Future[Any]]


@dataclass(eq=False)
class Request:
    """One answer under way. `on_piece(text, finish)` is called in the batch's thread: finish is None until the last piece.

    finish: stop, length, or error. `ids` grows by a token at a time, the end's own left out. `shown` names the media,
    so that what was read of the same is used; None: it is not. `grammar` says which words may come.
    """

    inputs: Any
    adapter: str | None
    sampling: Sampling
    on_piece: Callable[[str, str | None], None]
    name: str = ""
    shown: str | None = None
    grammar: Grammar | None = None
    cached: int = 0  # tokens of the prompt that were not read again
    cancelled: bool = False
    ids: list[int] = field(default_factory=list)
    detokenizer: Detokenizer | None = None
    prompt_S: torch.Tensor | None = None  # its ids, kept where a penalty on repetition asks for them
    text: str = ""
    sent: int = 0  # characters of the text
    rng: torch.Generator | None = None

    def cancel(self) -> None:
        """Ends it at the next token, without a last piece; its pixels are let go of now."""
        self.cancelled = True
        self.inputs = None


class _Batch:
    """The requests of one adapter that are being answered; their keys and values end at the same column.

    Axes: B = requests, S = tokens kept, H = heads, D = head size.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.cache: Any = None  # per layer (B, H, S, D)
        self.mask_BS = torch.zeros(0, 0, dtype=torch.long)
        self.next_B = torch.zeros(0, dtype=torch.long)  # position of the next token
        self.last_B = torch.zeros(0, dtype=torch.long)  # the token that was drawn last

    def join(self, request: Request, cache: Any, token: int, position: int, device: Any) -> None:
        mask = torch.ones(1, cache.get_seq_length(), dtype=torch.long, device=device)
        next_B, last_B = torch.tensor([position], device=device), torch.tensor([token], device=device)
        if self.requests:
            for mine, other in zip(self.cache.layers, cache.layers, strict=True):
                mine.keys, mine.values = _stack(mine.keys, other.keys), _stack(mine.values, other.values)
            width = max(self.mask_BS.shape[1], mask.shape[1])
            mask = torch.cat([functional.pad(rows, (width - rows.shape[1], 0)) for rows in (self.mask_BS, mask)])
            cache, next_B, last_B = self.cache, torch.cat([self.next_B, next_B]), torch.cat([self.last_B, last_B])
        self.cache, self.mask_BS, self.next_B, self.last_B = cache, mask, next_B, last_B
        self.requests.append(request)

    def keep(self, rows: Sequence[int]) -> None:
        """Drops every other request, and the columns that only they needed."""
        if len(rows) == len(self.requests):
            return
        self.requests = [self.requests[row] for row in rows]
        if not rows:
            self.cache = None
            return
        at = torch.tensor(rows, device=self.mask_BS.device)
        mask = self.mask_BS[at]
        start = int(mask.any(0).int().argmax())
        self.mask_BS, self.next_B, self.last_B = mask[:, start:], self.next_B[at], self.last_B[at]
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[at, :, start:], layer.values[at, :, start:]


def _stack(mine: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Two (B, H, S, D) under each other, the shorter padded on its left."""
    width = max(mine.shape[2], other.shape[2])
    return torch.cat([functional.pad(tensor, (0, 0, width - tensor.shape[2], 0)) for tensor in (mine, other)])


class Batcher:
    """Answers requests with one model until `close`. `max_batch` of them are under way at a time, the rest wait. Of what was read
    last `prefix_bytes` are kept.

    `alive` turns false when an error that is nobody's request has ended the thread.
    """

    def __init__(self, engine: Engine, max_batch: int, prefix_bytes: int = PREFIX_BYTES):
        self.model: Any = engine.model
        # Linear attention keeps a state that cannot be padded: one request at a time.
        self.max_batch = 1 if engine.chat.family.linear_attention else max_batch
        # Nor can it be cut to what two prompts have in common.
        self.prefixes = Prefixes(0 if engine.chat.family.linear_attention else prefix_bytes)
        self.sent: Queue[Request | _Job | None] = Queue()  # None: nothing comes any more
        self.waiting: deque[Request] = deque()  # those that are taken from there and not yet in a batch
        self.batches: dict[str | None, _Batch] = {}
        self.chat = engine.chat
        self.ends = set(self.model.generation_config.eos_token_id)
        self.placeholders = (engine.chat.picture_id, engine.chat.video_id)
        self.inner: Any = (self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model).model
        self.adapter: str | None = ""  # the one that is switched on; "": not known
        self.steps = 0  # tokens' turns so far
        self.closed = False
        self.alive = True
        self.thread = Thread(target=self._run, name="batcher", daemon=True)
        self.thread.start()

    @property
    def active(self) -> int:
        """Requests under way."""
        return sum(len(batch.requests) for batch in list(self.batches.values()))

    def call(self, act: Callable[[], T]) -> "Future[T]":
        """Does something with the model between two tokens; what it makes of it is there once it is done."""
        future: Future[T] = Future()
        self.submit((act, future))
        return future

    def submit(self, what: Request | _Job) -> None:
        """Queues a request; its pieces come to its `on_piece`."""
        self.sent.put(what)
        if not self.alive:
            self._refuse_all()

    def close(self) -> None:
        """Finishes what was submitted, then ends."""
        self.sent.put(None)
        self.thread.join()

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            while not (self.closed and not self.waiting and not self.active):
                self._take()
                self._admit()
                for name, batch in list(self.batches.items()):
                    batch.keep([row for row, request in enumerate(batch.requests) if not request.cancelled])
                    if batch.requests:
                        with self._errors_of(batch.requests):
                            self._step(name, batch)
        finally:
            self.alive = False
            for request in chain(self.waiting, *(batch.requests for batch in self.batches.values())):
                self.sent.put(request)
            self._refuse_all()

    def _refuse_all(self) -> None:
        """Tells whoever sent something that nobody takes any more."""
        with suppress(Empty):
            while True:
                what = self.sent.get_nowait()
                if isinstance(what, Request):
                    what.on_piece("", "error")
                elif what and what[1].set_running_or_notify_cancel():
                    what[1].set_exception(model_stopped())

    def _take(self) -> None:
        """Takes what was sent: a job is done at once, a request waits. Sleeps while there is nothing to do."""
        with suppress(Empty):
            while not self.closed:
                what = self.sent.get(block=not self.active and not self.waiting)
                if what is None:
                    self.closed = True
                elif isinstance(what, Request):
                    self.waiting.append(what)
                elif what[1].set_running_or_notify_cancel():  # from here on it is not to be cancelled
                    self._do(*what)

    def _do(self, act: Callable[[], Any], future: "Future[Any]") -> None:
        try:
            with torch.inference_mode(False), torch.no_grad():
                future.set_result(act())
        except (UserError, RuntimeError, ValueError, KeyError, TypeError, OSError, AttributeError) as error:
            future.set_exception(error)
        except BaseException as error:  # it ends the thread, and whoever waits is told
            future.set_exception(error)
            raise
        self.adapter = ""  # whatever was switched on

    def _admit(self) -> None:
        """Lets those who wait into their batches while there is room."""
        while self.waiting and self.active < self.max_batch:
            if not self.waiting[0].cancelled:
                with self._errors_of([self.waiting[0]]):
                    self._prefill(self.waiting[0])
            self.waiting.popleft()  # not before: an error that ends the thread is told to all who wait

    @contextmanager
    def _errors_of(self, requests: Sequence[Request]) -> Iterator[None]:
        """An error of the model (a lack of memory, a shape) ends the requests that it concerns and no other."""
        try:
            yield
        except (RuntimeError, ValueError, IndexError, MemoryError, TypeError, KeyError, AttributeError):
            log.exception("the model failed on %s", ", ".join(request.name for request in requests))
            self.adapter = ""
            self.prefixes.clear()  # where memory was lacking, there is some
            for batch in self.batches.values():
                batch.keep([row for row, request in enumerate(batch.requests) if request not in requests])
            for request in requests:
                request.on_piece("", "error")

    def _switch(self, adapter: str | None) -> None:
        """The model answers as this adapter from here on; None: as the base."""
        if isinstance(self.model, PeftModel) and adapter != self.adapter:
            layers: Any = self.model.base_model
            if adapter is None:
                layers.disable_adapter_layers()
            else:
                layers.enable_adapter_layers()
                self.model.set_adapter(adapter, inference_mode=True)
        self.adapter = adapter

    def _prefill(self, request: Request) -> None:
        """The first token: all of the request's own, but what was read before."""
        if (inputs := request.inputs) is None:
            return
        self._switch(request.adapter)
        out, position = self._read(request, inputs)
        if request.sampling.seed is not None:
            request.rng = torch.Generator(self.model.device).manual_seed(request.sampling.seed)
        request.detokenizer = Detokenizer(self.chat, inputs["input_ids"][0].tolist())
        if self._penalty(request) != 1:
            request.prompt_S = inputs["input_ids"][0]
        request.inputs = None  # its pixels are not needed any more
        token = self._sample(request, out.logits[0, -1])
        if not self._tell(request, token):
            batch = self.batches.setdefault(request.adapter, _Batch())
            batch.join(request, out.past_key_values, token, position, self.model.device)

    def _read(self, request: Request, inputs: Any) -> tuple[Any, int]:
        """What the model makes of a prompt, and the position of the next token."""
        ids_S = inputs["input_ids"][0]
        ids = ids_S.tolist()
        shown = [at for at, token in enumerate(ids) if token in self.placeholders]
        prompt = Prompt(ids, max(shown, default=-1) + 1, request.shown or "", request.adapter)
        if begun := self.prefixes.begin(prompt) if request.shown is not None else None:
            request.cached, ahead, cache = begun
            positions_S = torch.arange(request.cached, len(ids), device=ids_S.device) + ahead
            rest = {"input_ids": ids_S[None, request.cached :], "position_ids": positions_S.expand(3, 1, -1)}
            out = self.model(**rest, past_key_values=cache, use_cache=True, logits_to_keep=1)
        else:
            out = self.model(**inputs, use_cache=True, logits_to_keep=1)
            # The model leaves behind by how much its positions differ from counting tokens: a picture takes fewer than it has.
            ahead = int(self.inner.rope_deltas) if shown else 0
        if request.shown is not None:
            self.prefixes.keep(prompt, ahead, out.past_key_values)
        return out, len(ids) + ahead

    def _step(self, adapter: str | None, batch: _Batch) -> None:
        """One more token for each request of a batch."""
        self.steps += 1
        batch.mask_BS = functional.pad(batch.mask_BS, (0, 1), value=1)
        self._switch(adapter)
        out = self.model(
            input_ids=batch.last_B[:, None],
            attention_mask=batch.mask_BS,
            position_ids=batch.next_B[None, :, None].expand(3, -1, -1),
            past_key_values=batch.cache,
            use_cache=True,
        )
        batch.next_B = batch.next_B + 1
        tokens = [self._sample(request, logits) for request, logits in zip(batch.requests, out.logits[:, -1], strict=True)]
        batch.last_B = torch.tensor(tokens, device=batch.next_B.device)
        done = [self._tell(request, token) for request, token in zip(batch.requests, tokens, strict=True)]
        batch.keep([row for row, ended in enumerate(done) if not ended])

    def _penalty(self, request: Request) -> float:
        """On repetition: the request's own, else the model's."""
        own = request.sampling.repetition_penalty
        return float(self.model.generation_config.repetition_penalty if own is None else own)

    def _sample(self, request: Request, logits: torch.Tensor) -> int:
        how, scores = request.sampling, logits.float()[None]
        if request.prompt_S is not None:  # of the prompt and the answer so far, as transformers' generate does
            ids_S = torch.cat([request.prompt_S, request.prompt_S.new_tensor(request.ids)])
            scores = RepetitionPenaltyLogitsProcessor(self._penalty(request))(ids_S[None], scores)
        if request.grammar:
            scores = request.grammar.mask(scores)
        token = self._draw(request, how, scores)
        if request.grammar:
            request.grammar.take(token)
        return token

    def _draw(self, request: Request, how: Sampling, scores: torch.Tensor) -> int:
        if how.temperature <= 0:
            return int(scores.argmax())
        scores = scores / max(how.temperature, 1e-4)
        if how.top_k > 0:
            scores = TopKLogitsWarper(how.top_k)(None, scores)
        scores = TopPLogitsWarper(how.top_p)(None, scores)
        return int(torch.multinomial(scores.softmax(-1), 1, generator=request.rng))

    def _tell(self, request: Request, token: int) -> bool:
        """Tells the request of its new token; whether that was its last."""
        how, finish = request.sampling, None
        ids = [] if token in self.ends else [token]
        request.ids += ids
        if not ids:
            finish = "stop"
        elif len(request.ids) >= how.max_new_tokens:
            finish = "length"
        if request.detokenizer:
            request.text += request.detokenizer.add(ids, whole=finish is not None)
        end = len(request.text)
        cut = min((at for word in how.stop if (at := request.text.find(word)) >= 0), default=math.inf)
        if cut < math.inf:
            end, finish = int(cut), "stop"
        elif finish is None:  # the beginning of a word that may stop it is held back
            end -= max((n for word in how.stop for n in range(1, len(word)) if request.text.endswith(word[:n])), default=0)
        if request.grammar and request.grammar.failed:
            log.warning("%s: the grammar failed: %s", request.name, request.grammar.failed)
            finish = "error"
        if end > request.sent or finish:
            new, request.sent = request.text[request.sent : end], end
            request.on_piece(new, finish)
        return finish is not None or request.cancelled
