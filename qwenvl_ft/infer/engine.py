"""Answers a conversation with a model, through the same template, the same loading of pictures and the same resize as training.

    engine = Engine.open(Path("data/tiny"))
    engine.ask([{"role": "user", "content": [{"type": "image", "image": "chart.png"}, {"type": "text", "text": "read"}]}])

A conversation is a question, a list of messages as messages.py reads them, or a list of Turns as meta.py does.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoProcessor, TextIteratorStreamer
from transformers.video_utils import VideoMetadata

from qwenvl_ft.data.chat import Chat, open_chat
from qwenvl_ft.data.geometry import Limits
from qwenvl_ft.data.pictures import load
from qwenvl_ft.data.records import Media, Turn
from qwenvl_ft.data.videos import Film, Picture, bounded
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.adapter import check_adapter
from qwenvl_ft.folders.base import check_base
from qwenvl_ft.folders.problems import broken_weights, pointers
from qwenvl_ft.folders.runs import holds_processor, run_folder_of
from qwenvl_ft.folders.tensors import OLD_KEYS
from qwenvl_ft.infer.messages import Message, read_messages
from qwenvl_ft.model.load import load_base

MAX_NEW_TOKENS = 512
Conversation = str | Sequence[Turn | Message | dict[str, Any]]


@dataclass(frozen=True)
class Engine:
    """A model on its device. `blank` shows it white pictures of the same size: what it then still knows, it did not see.

    `adapter` is PEFT's name for this engine's adapter where several share a model: see `open_beside`.
    """

    model: Any
    processor: Any
    chat: Chat
    blank: bool = False
    adapter: str | None = None

    @classmethod
    def open(cls, model_dir: Path | str, adapter: Path | str | None = None, blank: bool = False) -> "Engine":
        """Loads model and adapter. With an adapter its own processor is used, with the limits that training used."""
        model_dir, adapter = Path(model_dir), Path(adapter) if adapter else None
        chat = open_chat(model_dir)
        if problems := [*pointers(model_dir), *broken_weights(model_dir)]:
            raise UserError(*problems)
        if adapter:
            check_adapter(adapter)
        processor = _processor(model_dir, adapter)
        model = load_base(model_dir, "auto")
        if adapter:
            model = _with_adapter(model, adapter, "default", model_dir)
        return cls(model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), processor, chat, blank)

    def limits(self, kind: str) -> Limits:
        """What the processor does to an image, or to each frame of a video."""
        media = self.processor.image_processor if kind == "image" else self.processor.video_processor
        return Limits(media.patch_size, media.merge_size, media.size["shortest_edge"], media.size["longest_edge"])

    def inputs(self, conversations: Sequence[Conversation]) -> Any:
        """The model's inputs for a batch, on its device, padded on the left. Raises UserError for what cannot be opened."""
        opened = [[self._open(turn) for turn in opened_messages(conversation)] for conversation in conversations]
        texts = [self.chat.render(turns, answer_next=True) for turns in opened]
        parts = [part for turns in opened for turn in turns for part in turn.parts]
        pictures = [part.image for part in parts if isinstance(part, Picture)]
        films = [part for part in parts if isinstance(part, Film)]
        # A film's own rate must come with it: without, its timestamps are silently those of 24 frames a second.
        metadata = [
            VideoMetadata(total_num_frames=film.num_frames, fps=film.fps, frames_indices=list(film.indices)) for film in films
        ]
        video = {"videos": [list(film.frames) for film in films], "video_metadata": metadata, "do_sample_frames": False}
        inputs = self.processor(text=texts, images=pictures or None, **(video if films else {}), padding=True, return_tensors="pt")
        inputs.pop("video_metadata", None)
        return inputs.to(self.model.device)

    def _open(self, turn: Turn | Message) -> Message:
        """The turn with its pictures loaded, blank if so wished; a control token in its text becomes plain text."""
        parts: list[str | Picture | Film] = []
        for part in turn.parts:
            if isinstance(part, str):
                for token in self.processor.tokenizer.all_special_tokens:
                    part = part.replace(token, f"{token[0]}\u200b{token[1:]}")  # a space of no width, so that it is no token
            else:
                if isinstance(part, Media):
                    part = Picture(load(part.path, str(part.path)))
                part = bounded(part, self.limits(part.kind))
                if self.blank:
                    part = _blank(part)
            parts.append(part)
        return Message(turn.role, tuple(parts))

    @torch.inference_mode()
    def ask_many(self, conversations: Sequence[Conversation], max_new_tokens: int = MAX_NEW_TOKENS) -> list[str]:
        """The greedy answer to each conversation, generated as one batch; equal to asking them one by one."""
        inputs = self.inputs(conversations)
        out = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return self.processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def ask(self, conversation: Conversation, max_new_tokens: int = MAX_NEW_TOKENS) -> str:
        """The greedy answer to one conversation."""
        return self.ask_many([conversation], max_new_tokens)[0]

    def stream(self, conversation: Conversation, max_new_tokens: int = MAX_NEW_TOKENS) -> Iterator[str]:
        """The greedy answer in pieces, as they are generated."""
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        settings = dict(self.inputs([conversation]), max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
        errors: list[BaseException] = []

        def generate() -> None:
            try:
                with torch.inference_mode():
                    self.model.generate(**settings)
            except BaseException as error:
                errors.append(error)
                streamer.end()
                raise

        thread = Thread(target=generate, daemon=True)
        thread.start()
        yield from streamer
        thread.join()
        if errors:
            raise errors[0]


def open_beside(model_dir: Path, adapters: Mapping[str, Path]) -> dict[str | None, Engine]:
    """The base, under None, and each adapter by its name, on one copy of the base's weights.

    Whoever runs them must switch the model to `engine.adapter` first, as a Batcher does. Raises UserError.
    """
    for folder in adapters.values():
        check_adapter(folder)
    base = Engine.open(model_dir)
    model, engines = base.model, {None: base}
    for number, (name, folder) in enumerate(adapters.items()):
        slot = f"adapter_{number}"  # PEFT takes no name with a dot
        model = _with_adapter(model, folder, slot, model_dir)
        engines[name] = replace(base, processor=_processor(model_dir, folder), adapter=slot)
    model = model.to(base.model.device).eval()
    return {name: replace(engine, model=model) for name, engine in engines.items()}


def _with_adapter(model: Any, folder: Path, name: str, model_dir: Path) -> Any:
    """The model with one more adapter. Raises UserError for one that does not fit or was trained on another base."""
    check_base(folder, model_dir)
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(folder, name, key_mapping=OLD_KEYS)
            return model
        return PeftModel.from_pretrained(model, folder, adapter_name=name, key_mapping=OLD_KEYS)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            Problem(str(folder), f"does not fit the base {model_dir}", "give the base that it was trained on")
        ) from error


def _processor(model_dir: Path, adapter: Path | None) -> Any:
    """The adapter's own processor, if it has one: an adapter of another tool has none."""
    own = adapter and run_folder_of(adapter)
    processor = AutoProcessor.from_pretrained(own if own and holds_processor(own) else model_dir)
    if hasattr(processor.video_processor, "cap_pixels_per_frame"):
        processor.video_processor.cap_pixels_per_frame = True  # as qwen_vl_utils does; unset, it is a warning and no bound
    processor.tokenizer.padding_side = "left"  # is not saved with a tokenizer; answers start at the right edge
    return processor


def opened_messages(conversation: Conversation) -> Sequence[Turn | Message]:
    """Messages as they were sent are read and their media opened, a text alone is the user's; Turns and Messages stay."""
    if isinstance(conversation, str):
        return [Message("user", (conversation,))]
    turns = [turn for turn in conversation if not isinstance(turn, dict)]
    return turns if turns and len(turns) == len(conversation) else read_messages(conversation)


def _blank(part: Picture | Film) -> Picture | Film:
    if isinstance(part, Picture):
        return Picture(Image.new("RGB", part.image.size, "white"))
    return replace(part, frames=tuple(Image.new("RGB", frame.size, "white") for frame in part.frames))
