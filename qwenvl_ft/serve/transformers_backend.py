"""Answers requests with the models of this process, many at a time."""

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from qwenvl_ft.data.records import Turn
from qwenvl_ft.errors import UserError
from qwenvl_ft.infer.engine import Engine, check_mergers
from qwenvl_ft.infer.prefix_cache import PREFIX_BYTES, shown_hash
from qwenvl_ft.serve.api import (
    ApiError,
    ChatRequest,
    Piece,
    Pieces,
    Usage,
    invalid_adapter,
    model_failed,
    model_stopped,
    no_thoughts,
    unknown_model,
)
from qwenvl_ft.serve.batching import Batcher, Request
from qwenvl_ft.serve.open_request import Opener, check_length, invalid_messages
from qwenvl_ft.serve.schema import Grammar, Grammars, schema_of

AHEAD = 4  # requests opened while others are answered; more would only hold pictures in memory


class TransformersBackend:
    """Engines by the names that they are served under; the first is for those who name none. They share one model.

    `opens(engine, folder, slot)` puts one more adapter beside an engine; `folders` are those of the adapters that are here.
    """

    def __init__(self, engines: Mapping[str, Engine], opener: Opener, max_batch: int, prefix_bytes: int = PREFIX_BYTES,
                 opens: Callable[[Engine, Path, str], Engine] | None = None,
                 folders: Mapping[str, Path] | None = None):  # fmt: skip
        self.engines, self.opener, self.bounds = dict(engines), opener, opener.bounds
        self.opens, self.folders = opens, dict(folders or {})
        self.num_slots, self.using = len(engines), Counter[str]()  # requests by the name that they asked
        self.names = list(engines)
        self.passes = frozenset({"response_format"})
        self.batcher = Batcher(next(iter(engines.values())), max_batch, prefix_bytes)
        first, ends = self.batcher.chat, sorted(self.batcher.ends)
        self.grammars = Grammars(first, ends, self.batcher.model.config.get_text_config().vocab_size)
        self.processing = threading.Lock()  # a processor's tokenizer is not for two threads
        self.changing = asyncio.Lock()  # one adapter comes or goes at a time: two of one name would both find it free
        self.opened = asyncio.Semaphore(max_batch + AHEAD)

    async def answer(self, chat: ChatRequest, request_id: str, until: float) -> Pieces:
        """Opens the pictures, puts the request into the batch and hands on what the batch's thread says."""
        if (engine := self.engines.get(chat.model)) is None:
            raise unknown_model(self.names)
        if not self.batcher.alive:
            raise model_stopped()
        self.using[chat.model] += 1
        try:
            async with aclosing(self._answer(engine, chat, request_id, until)) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            self.using[chat.model] -= 1

    async def _answer(self, engine: Engine, chat: ChatRequest, request_id: str, until: float) -> Pieces:
        async with self.opened:
            inputs, shown, usage, grammar = await self.opener.open(chat, until, partial(self._inputs, engine, chat), engine.reading)
            loop, pieces = asyncio.get_running_loop(), asyncio.Queue[tuple[str, str | None, Usage]]()

            def on_piece(text: str, finish: str | None) -> None:
                loop.call_soon_threadsafe(
                    pieces.put_nowait, (text, finish, replace(usage, output=len(request.ids), cached=request.cached))
                )

            request = Request(inputs, engine.adapter, chat.sampling, on_piece, request_id, shown, grammar)
            del inputs  # the request lets go of its pixels early
            self.batcher.submit(request)
            try:
                finish = None
                while finish is None:
                    text, finish, so_far = await pieces.get()
                    if finish == "error":
                        raise model_failed()
                    yield Piece(text, finish, so_far)
            finally:
                request.cancel()

    def _inputs(self, engine: Engine, chat: ChatRequest, messages: Sequence[Turn]) -> tuple[Any, str, Usage, Grammar | None]:
        if chat.thinking and not engine.chat.thinks:
            raise no_thoughts()
        schema = schema_of(chat.more["response_format"]) if chat.more else None
        grammar = None if schema is None else self.grammars.grammar(schema)
        try:
            with self.processing:
                (script,) = engine.scripts([messages], chat.thinking)
                check_length(script.length, sum(script.counts), self.bounds)  # before gigabytes are made of it
                inputs = engine.inputs_of([script])
        except ValueError as error:
            raise ApiError(400, "invalid_messages", "the model's processor refuses these messages") from error
        except UserError as error:  # the template refuses this order of roles, or the processor these bounds
            raise invalid_messages(error) from error
        ids, config = inputs["input_ids"], engine.model.config
        usage = Usage(ids.shape[1], 0, int((ids == config.image_token_id).sum()), int((ids == config.video_token_id).sum()))
        if grammar and engine.chat.opens_thought(script.ids):
            raise ApiError(400, "unsupported_parameter", "response_format: a thought comes first here: send enable_thinking false")
        return inputs, shown_hash(script), usage, grammar

    async def load_adapter(self, name: str, folder: str) -> None:
        """Serves one more adapter; the batch waits while its weights are read. Raises ApiError."""
        async with self.changing:
            if self.opens is None:
                raise ApiError(400, "unsupported_parameter", "no adapters can be added here")
            if name in self.engines:
                raise ApiError(400, "exists", f"{name} is served already: take it away first")
            self.num_slots += 1
            beside, path, slot = self.engines[self.names[0]], Path(folder), f"adapter_{self.num_slots}"
            try:
                await asyncio.to_thread(check_mergers, [*self.folders.values(), path]) if path.is_dir() else None
                engine = await asyncio.wrap_future(self.batcher.call(partial(self._add, beside, path, slot)))
            except UserError as error:
                raise invalid_adapter(error) from error
            self.engines[name], self.folders[name] = engine, path
            self.names.append(name)

    async def unload_adapter(self, name: str) -> None:
        """Ends serving an adapter once those who asked it have their answers. Raises ApiError."""
        async with self.changing:
            if name not in self.folders:
                raise ApiError(
                    404, "model_not_found", f"no adapter of this name is served here, but {', '.join(self.folders) or 'none'}"
                )
            slot = self.engines.pop(name).adapter
            del self.folders[name]
            self.names.remove(name)
            while self.using[name]:
                await asyncio.sleep(0.05)
            await asyncio.wrap_future(self.batcher.call(partial(self._drop, slot)))

    def _add(self, beside: Engine, folder: Path, slot: str) -> Engine:
        assert self.opens
        engine = self.opens(replace(beside, model=self.batcher.model), folder, slot)
        self.batcher.model = engine.model
        return engine

    def _drop(self, slot: str | None) -> None:
        model = self.batcher.model
        if len(model.peft_config) == 1:  # without any adapter PEFT's wrapper answers nothing
            self.batcher.model = model.unload()
            return
        # First another is switched on: PEFT would keep the name of the one that is gone.
        model.set_adapter(next(other for other in model.peft_config if other != slot), inference_mode=True)
        model.delete_adapter(slot)

    async def close(self) -> None:
        """Finishes what has begun."""
        await asyncio.to_thread(self.batcher.close)
        self.opener.close()

    def status(self) -> dict[str, float]:
        """Requests in the batch and waiting for it."""
        queued = len(self.batcher.waiting) + self.batcher.sent.qsize()
        return {"active": self.batcher.active, "queued": queued, "alive": self.batcher.alive}
