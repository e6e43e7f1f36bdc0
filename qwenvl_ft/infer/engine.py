"""Answers a conversation with a model, through the same template, the same loading of pictures and the same resize as training.

    engine = Engine.open("data/tiny")
    engine.ask([{"role": "user", "content": [{"type": "image", "image": "chart.png"}, {"type": "text", "text": "read"}]}])

A conversation is a question, a list of messages as messages.py reads them, or a list of Turns as a record has them. torch is
imported once a model is opened, so that `from qwenvl_ft import Engine` costs nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any

from PIL import Image

from qwenvl_ft.data.chat import Chat, open_chat
from qwenvl_ft.data.geometry import Limits, read_limits
from qwenvl_ft.data.pictures import bounded, opened
from qwenvl_ft.data.records import Medium, Part, Picture, Turn, Video, as_text
from qwenvl_ft.folders.adapter import check_base
from qwenvl_ft.folders.problems import check_adapter, check_model
from qwenvl_ft.folders.runs import processor_folder
from qwenvl_ft.infer.decoding import read_decoding
from qwenvl_ft.infer.messages import read_messages

MAX_NEW_TOKENS = 512
Conversation = str | Sequence[Turn | dict[str, Any]]


@dataclass(frozen=True)
class Answer:
    """What was answered; `cut`: by max_new_tokens, before the model ended it."""

    text: str
    cut: bool


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
    def open(cls, model_dir: Path | str, adapter: Path | str | None = None, blank: bool = False,
             min_pixels: int | None = None, max_pixels: int | None = None) -> "Engine":  # fmt: skip
        """Loads model and adapter, onto the GPU if there is one. Pictures are seen within the limits of the adapter's own
        processor, which are training's, else of the model's; the bounds replace them. Raises UserError for what is wrong with
        either folder.
        """
        model_dir, adapter = Path(model_dir), Path(adapter) if adapter else None
        chat = check_folders(model_dir, [adapter] if adapter else [])
        import torch
        from transformers import GenerationConfig

        from qwenvl_ft.model.load import add_adapter, load_base, open_processor

        processor = limited(open_processor(model_dir, adapter), model_dir, adapter, min_pixels, max_pixels)
        model = load_base(model_dir, "auto")
        # In place of what the folder's file made of it, so that nothing else of that file has a say.
        model.generation_config = GenerationConfig(**read_decoding(model_dir, chat.tokenizer).settings())
        if adapter:
            model = add_adapter(model, adapter, "default", model_dir)
        return cls(model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), processor, chat, blank)

    def limits(self, kind: str) -> Limits:
        """What the processor does to an image, or to each frame of a video."""
        media = self.processor.image_processor if kind == "image" else self.processor.video_processor
        return Limits(media.patch_size, media.merge_size, media.size["shortest_edge"], media.size["longest_edge"])

    def inputs(self, conversations: Sequence[Conversation]) -> Any:
        """The model's inputs for a batch, on its device, padded on the left. Raises UserError for what cannot be opened."""
        from transformers.video_utils import VideoMetadata

        talks = [[self._ready(turn) for turn in turns_of(conversation)] for conversation in conversations]
        texts = [self.chat.render(turns, answer_next=True) for turns in talks]
        media = [medium for turns in talks for turn in turns for medium in turn.media]
        pictures = [medium.source for medium in media if isinstance(medium, Picture)]
        videos = [medium for medium in media if isinstance(medium, Video)]
        # A video's own rate must come with it: without, its timestamps are silently those of 24 frames a second.
        metadata = [VideoMetadata(total_num_frames=of.num_frames, fps=of.fps, frames_indices=list(of.indices)) for of in videos]
        video = {"videos": [list(of.frames) for of in videos], "video_metadata": metadata, "do_sample_frames": False}
        inputs = self.processor(text=texts, images=pictures or None, **(video if videos else {}), padding=True, return_tensors="pt")
        inputs.pop("video_metadata", None)
        return inputs.to(self.model.device)

    def _ready(self, turn: Turn) -> Turn:
        """The turn as it is shown: its texts without control tokens, its pictures open, at their own bounds, blank if so wished."""
        parts: list[Part] = []
        for part in turn.parts:
            if isinstance(part, str):
                parts.append(as_text(part))
                continue
            medium = bounded(part, self.limits(part.kind))
            if isinstance(medium, Picture):
                medium = Picture.of(opened(medium))
            parts.append(_blank(medium) if self.blank else medium)
        return Turn(turn.role, tuple(parts))

    def ask_many(self, conversations: Sequence[Conversation], max_new_tokens: int = MAX_NEW_TOKENS) -> list[str]:
        """The greedy answer to each conversation, generated as one batch; equal to asking them one by one."""
        return [answer.text for answer in self.answer_many(conversations, max_new_tokens)]

    def answer_many(self, conversations: Sequence[Conversation], max_new_tokens: int = MAX_NEW_TOKENS) -> list[Answer]:
        """`ask_many`, with whether each answer was cut."""
        import torch

        inputs = self.inputs(conversations)
        with torch.inference_mode():
            out = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answers: list[str] = self.processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [Answer(text, cut) for text, cut in zip(answers, self._cut(out, inputs), strict=True)]

    def _cut(self, out: Any, inputs: Any) -> list[bool]:
        """Of each row that was generated, whether it has no end."""
        ends = set(self.model.generation_config.eos_token_id)
        return [ends.isdisjoint(ids) for ids in out[:, inputs["input_ids"].shape[1] :].tolist()]

    def ask(self, conversation: Conversation, max_new_tokens: int = MAX_NEW_TOKENS) -> str:
        """The greedy answer to one conversation."""
        return self.ask_many([conversation], max_new_tokens)[0]

    def stream(self, conversation: Conversation, max_new_tokens: int = MAX_NEW_TOKENS,
               on_cut: Callable[[], None] = lambda: None) -> Iterator[str]:  # fmt: skip
        """The greedy answer in pieces, as they are generated; `on_cut` is called behind an answer that was cut."""
        import torch
        from transformers import TextIteratorStreamer

        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        inputs = self.inputs([conversation])
        settings = dict(inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
        generated: list[Any] = []
        errors: list[BaseException] = []

        def generate() -> None:
            try:
                with torch.inference_mode():
                    generated.append(self.model.generate(**settings))
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
        if self._cut(generated[0], inputs)[0]:
            on_cut()


def open_beside(model_dir: Path, adapters: Mapping[str, Path], min_pixels: int | None = None,
                max_pixels: int | None = None) -> dict[str | None, Engine]:  # fmt: skip
    """The base, under None, and each adapter by its name, on one copy of the base's weights, each with its own limits of pixels
    but where the bounds replace them.

    Whoever runs them must switch the model to `engine.adapter` first, as a Batcher does. Raises UserError.
    """
    check_folders(model_dir, adapters.values())
    from qwenvl_ft.model.load import add_adapter, open_processor

    base = Engine.open(model_dir, min_pixels=min_pixels, max_pixels=max_pixels)
    model = base.model
    engines: dict[str | None, Engine] = {None: base}
    for number, (name, folder) in enumerate(adapters.items()):
        slot = f"adapter_{number}"  # PEFT takes no name with a dot
        model = add_adapter(model, folder, slot, model_dir)
        processor = limited(open_processor(model_dir, folder), model_dir, folder, min_pixels, max_pixels)
        engines[name] = replace(base, processor=processor, adapter=slot)
    model = model.to(base.model.device).eval()
    return {name: replace(engine, model=model) for name, engine in engines.items()}


def limited(processor: Any, model_dir: Path, adapter: Path | None, min_pixels: int | None, max_pixels: int | None) -> Any:
    """The processor, its pictures within these bounds where there are any. Raises UserError for bounds that cross."""
    if min_pixels or max_pixels:
        from qwenvl_ft.model.load import limited_image_processor

        limited_image_processor(processor, read_limits(processor_folder(model_dir, adapter), min_pixels, max_pixels))
    return processor


def check_folders(model_dir: Path, adapters: Iterable[Path]) -> Chat:
    """Says what is wrong with a model's folder and with adapters of it before torch is imported, which takes seconds."""
    check_model(model_dir)
    chat = open_chat(model_dir)
    read_decoding(model_dir, chat.tokenizer)
    for adapter in adapters:
        check_adapter(adapter)
        check_base(adapter, model_dir)
    return chat


def turns_of(conversation: Conversation) -> Sequence[Turn]:
    """Messages as they were sent are read and their media opened, a text alone is the user's; Turns stay."""
    if isinstance(conversation, str):
        return [Turn("user", (conversation,))]
    turns = [turn for turn in conversation if isinstance(turn, Turn)]
    return turns if turns and len(turns) == len(conversation) else read_messages(conversation)


def _blank(medium: Medium) -> Medium:
    if isinstance(medium, Picture):
        return Picture.of(Image.new("RGB", (medium.width, medium.height), "white"))
    return replace(medium, frames=tuple(Image.new("RGB", frame.size, "white") for frame in medium.frames))
