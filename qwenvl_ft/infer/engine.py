"""Answers a conversation with a model, through the same template, the same loading of pictures and the same resize as training.

    engine = Engine.open("data/tiny")
    engine.ask([{"role": "user", "content": [{"type": "image", "image": "chart.png"}, {"type": "text", "text": "read"}]}])

A conversation is a question, a list of messages as messages.py reads them, a list of Turns as a record has them, or a Record, which
brings its tools, too. torch is imported once a model is opened, so that `from qwenvl_ft import Engine` costs nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any, NamedTuple

from PIL import Image

from qwenvl_ft.data.boxes import read_answer
from qwenvl_ft.data.chat import Chat, Script, open_chat
from qwenvl_ft.data.geometry import reading_of
from qwenvl_ft.data.reading import AS_FOUND, Reading
from qwenvl_ft.data.records import Box, Medium, Picture, Record, Turn, Video
from qwenvl_ft.data.template import split_thought
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.adapter import check_base, read_header
from qwenvl_ft.folders.model import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_model_json
from qwenvl_ft.folders.problems import check_adapter, check_model
from qwenvl_ft.folders.runs import processor_folder
from qwenvl_ft.infer.decoding import read_decoding
from qwenvl_ft.infer.detokenizer import Detokenizer
from qwenvl_ft.infer.messages import read_messages
from qwenvl_ft.values import Quantization, Thinking

MAX_NEW_TOKENS = 512
Conversation = str | Record | Sequence[Turn | dict[str, Any]]


@dataclass(frozen=True)
class Answer:
    """What was answered; `cut`: by max_new_tokens, before the model ended it; the boxes in it as `read_answer` reads them."""

    text: str
    cut: bool
    boxes: tuple[Box, ...] = ()


class ChatSettings(NamedTuple):
    """How a model is asked in place of what its processor and its template say, which is as in training; None: as they say."""

    min_pixels: int | None = None
    max_pixels: int | None = None
    thinking: Thinking | None = None
    video_max_pixels: int | None = None
    reading: Reading | None = None  # how videos are drawn that do not say it themselves

    def open(self, model_dir: Path, adapter: Path | None = None) -> tuple[Chat, Reading]:
        """Reads it from a model's folder and its adapter's. Raises UserError as `open_chat` does."""
        chat = open_chat(model_dir, self.min_pixels, self.max_pixels, self.thinking, self.video_max_pixels, adapter)
        return chat, self.reading or reading_of(processor_folder(model_dir, adapter))


AS_TRAINED = ChatSettings()


@dataclass(frozen=True)
class Engine:
    """A model on its device.

    `adapter` is PEFT's name for this engine's adapter where several share a model: see `open_beside`.
    """

    model: Any
    processor: Any
    chat: Chat
    adapter: str | None = None
    reading: Reading = AS_FOUND

    @classmethod
    def open(
        cls, model_dir: Path | str, adapter: Path | str | None = None, min_pixels: int | None = None,
        max_pixels: int | None = None, thinking: Thinking | None = None, video_max_pixels: int | None = None,
        reading: Reading | None = None, quantization: Quantization = "none", dtype: str = "auto",
    ) -> "Engine":  # fmt: skip
        """Loads model and adapter, onto the GPU if there is one, onto several where one is too small. Pictures and videos are seen
        within the limits of the adapter's own processor, which are training's, else of the model's, and prompts end as training's
        did; what is given of ChatSettings replaces that. `quantization` and `dtype` hold the model as training with these settings
        does. Raises UserError for what is wrong with either folder.
        """
        model_dir, adapter = Path(model_dir), Path(adapter) if adapter else None
        check_folders(model_dir, [adapter] if adapter else [])
        chat, drawn = ChatSettings(min_pixels, max_pixels, thinking, video_max_pixels, reading).open(model_dir, adapter)
        import torch
        from transformers import GenerationConfig

        from qwenvl_ft.model.load import add_adapter, limited, load_base, open_processor
        from qwenvl_ft.model.spread import onto

        processor = limited(open_processor(model_dir, adapter), chat)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        quantized = quantization != "none"  # whose scales do not move any more
        model = load_base(model_dir, dtype, device=device if quantized else None, quantization=quantization)
        # In place of what the folder's file made of it, so that nothing else of that file has a say.
        model.generation_config = GenerationConfig(**read_decoding(model_dir, chat.tokenizer).settings())
        if adapter:
            model = add_adapter(model, adapter, "default", model_dir)
        return cls((model if quantized else onto(model, device)).eval(), processor, chat, reading=drawn)

    def inputs(self, conversations: Sequence[Conversation], thinking: bool | None = None) -> Any:
        """The model's inputs for a batch, on its device, padded on the left: ids as `Chat.asking` writes them, placeholders at
        their real number of tokens, pixels as training has them. Raises UserError for what cannot be opened or kept within its
        bounds, ValueError for what the processor refuses.
        """
        return self.inputs_of(self.scripts(conversations, thinking))

    def scripts(self, conversations: Sequence[Conversation], thinking: bool | None = None) -> list[Script]:
        """What asks for the answers. Raises as `inputs` does."""
        talks = [turns_of(conversation, self.reading) for conversation in conversations]
        tools = [conversation.tools if isinstance(conversation, Record) else () for conversation in conversations]
        return [self.chat.asking(turns, thinking, known) for turns, known in zip(talks, tools, strict=True)]

    def inputs_of(self, scripts: Sequence[Script]) -> Any:
        """`inputs` of scripts."""
        import torch
        from transformers import BatchFeature

        from qwenvl_ft.data.rows import as_floats, pixels, seconds_a_step

        media = [medium for script in scripts for medium in script.media]
        rows = [script.widened()[0] for script in scripts]
        width = max(map(len, rows))
        pad = self.processor.tokenizer.pad_token_id
        ids = [[pad] * (width - len(row)) + row for row in rows]
        inputs = {
            "input_ids": ids,
            "attention_mask": [[0] * (width - len(row)) + [1] * len(row) for row in rows],
            "mm_token_type_ids": self.processor.create_mm_token_type_ids(ids),
        }
        if films := [medium for medium in media if isinstance(medium, Video)]:
            inputs["second_per_grid_ts"] = [seconds_a_step(film, self.chat.video_limits.step_frames) for film in films]
        known = {key: torch.tensor(value) for key, value in inputs.items() if key in self.processor.model_input_names}
        return BatchFeature(known | as_floats(pixels(media, self.chat, self.processor))).to(self.model.device)

    def _begun(self, scripts: Sequence[Script]) -> Any:
        """The inputs, what several scripts begin with read already. Linear attention has a state in place of keys and values, in
        which no padding may stand between a prefix and a rest: there each is read whole."""
        from qwenvl_ft.infer.shared_prefix import prefixes, read_prefixes

        found = prefixes(scripts)
        if self.chat.family.linear_attention or len(found) == len(scripts):
            return self.inputs_of(scripts)
        return read_prefixes(self.model, self.processor, self.chat, scripts, found)

    def ask_many(
        self, conversations: Sequence[Conversation], max_new_tokens: int = MAX_NEW_TOKENS, thinking: bool | None = None
    ) -> list[str]:
        """The greedy answer to each conversation, generated as one batch; equal to asking them one by one."""
        return [answer.text for answer in self.answer_many(conversations, max_new_tokens, thinking)]

    def answer_many(
        self, conversations: Sequence[Conversation], max_new_tokens: int = MAX_NEW_TOKENS, thinking: bool | None = None
    ) -> list[Answer]:
        """`ask_many`, with whether each answer was cut."""
        import torch

        talks = [of if isinstance(of, Record) else turns_of(of, self.reading) for of in conversations]
        scripts = self.scripts(talks, thinking)
        with torch.inference_mode():
            inputs = self._begun(scripts)
            out = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        asked = inputs["input_ids"].tolist()
        said = out[:, len(asked[0]) :].tolist()
        texts = [Detokenizer(self.chat, prompt).add(ids, whole=True) for prompt, ids in zip(asked, said, strict=True)]
        answered = zip(talks, texts, said, strict=True)
        return [Answer(text, self._cut(ids), tuple(self.boxes(turns_of(talk), text))) for talk, text, ids in answered]

    def boxes(self, turns: Sequence[Turn], answer: str) -> list[Box]:
        """The boxes and points that an answer to these turns gives, in px of their last picture."""
        return read_answer(split_thought(answer)[1], self.chat.family.boxes, self.chat.seen(turns))

    def _cut(self, ids: Sequence[int]) -> bool:
        """Whether an answer's ids have no end."""
        return set(self.model.generation_config.eos_token_id).isdisjoint(ids)

    def ask(self, conversation: Conversation, max_new_tokens: int = MAX_NEW_TOKENS, thinking: bool | None = None) -> str:
        """The greedy answer to one conversation."""
        return self.ask_many([conversation], max_new_tokens, thinking)[0]

    def stream(
        self, conversation: Conversation, max_new_tokens: int = MAX_NEW_TOKENS, thinking: bool | None = None,
        on_cut: Callable[[], None] = lambda: None,
    ) -> Iterator[str]:  # fmt: skip
        """The greedy answer in pieces, as they are generated; `on_cut` is called behind an answer that was cut."""
        import torch

        inputs = self.inputs([conversation], thinking)
        tokens = _Tokens()
        text = Detokenizer(self.chat, inputs["input_ids"][0].tolist())
        settings = dict(inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=tokens)
        errors: list[BaseException] = []

        def generate() -> None:
            try:
                with torch.inference_mode():
                    self.model.generate(**settings)
            except BaseException as error:
                errors.append(error)
                tokens.end()
                raise

        thread = Thread(target=generate, daemon=True)
        thread.start()
        for ids in tokens:
            if piece := text.add(ids):
                yield piece
        if piece := text.add([], whole=True):
            yield piece
        thread.join()
        if errors:
            raise errors[0]
        if self._cut(text.ids):
            on_cut()


class _Tokens:
    """What `generate` calls a streamer: an iterator over the ids of each call but the first, which are the prompt's."""

    def __init__(self) -> None:
        self.queue: Queue[list[int] | None] = Queue()
        self.skipped = False

    def put(self, ids: Any) -> None:
        if self.skipped:
            self.queue.put(ids.tolist())
        self.skipped = True

    def end(self) -> None:
        self.queue.put(None)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.queue.get, None)


def open_beside(model_dir: Path, adapters: Mapping[str, Path], settings: ChatSettings = AS_TRAINED) -> dict[str | None, Engine]:
    """The base, under None, and each adapter by its name, on one copy of the base's weights, each with its own limits of pixels
    and its own way of asking, but where `settings` replace them.

    Whoever runs them must switch the model to `engine.adapter` first, as a Batcher does. Raises UserError.
    """
    check_folders(model_dir, adapters.values())
    check_mergers(adapters.values())
    base = last = Engine.open(model_dir, None, *settings)
    engines: dict[str | None, Engine] = {None: base}
    for number, (name, folder) in enumerate(adapters.items()):
        engines[name] = last = open_adapter(last, model_dir, folder, f"adapter_{number}", settings)  # PEFT takes no name with a dot
    return {name: replace(engine, model=last.model) for name, engine in engines.items()}


def open_adapter(beside: Engine, model_dir: Path, folder: Path, slot: str, settings: ChatSettings = AS_TRAINED) -> Engine:
    """One more adapter on the weights of an engine, as `slot`; the model is wrapped where it was the first. Raises UserError."""
    from qwenvl_ft.model.load import add_adapter, limited, open_processor
    from qwenvl_ft.model.spread import is_spread

    model = add_adapter(beside.model, folder, slot, model_dir).eval()  # PEFT puts it where the weights lie that it is added to
    model = model if is_spread(model) else model.to(beside.model.device)
    chat, reading = settings.open(model_dir, folder)
    processor = limited(open_processor(model_dir, folder), chat)
    return replace(beside, model=model, processor=processor, chat=chat, adapter=slot, reading=reading)


def check_mergers(adapters: Iterable[Path]) -> None:
    """Raises UserError for an adapter that holds the merger beside one with LoRA on it, which PEFT leaves out without a word."""
    on_merger = {folder: any(of.key.find("merger") > 0 for of in read_header(folder / ADAPTER_WEIGHTS)[1]) for folder in adapters}
    hold = {folder: bool(read_model_json(folder / ADAPTER_CONFIG).get("modules_to_save")) for folder in on_merger}
    holding = [folder for folder in hold if hold[folder]]
    if holding and (others := [folder for folder, on in on_merger.items() if on and not hold[folder]]):
        raise UserError(Problem(str(holding[0]), f"holds the merger, of which {others[0]} trains LoRA: PEFT cannot hold both",
                                "serve them one by one, or export one of them"))  # fmt: skip


def check_folders(model_dir: Path, adapters: Iterable[Path]) -> Chat:
    """Says what is wrong with a model's folder and with adapters of it before torch is imported, which takes seconds."""
    check_model(model_dir)
    chat = open_chat(model_dir)
    read_decoding(model_dir, chat.tokenizer)
    for adapter in adapters:
        check_adapter(adapter)
        check_base(adapter, model_dir)
    return chat


def turns_of(conversation: Conversation, reading: Reading = AS_FOUND) -> Sequence[Turn]:
    """Messages as they were sent are read and their media opened, a text alone is the user's; Turns stay."""
    if isinstance(conversation, Record):
        return conversation.turns
    if isinstance(conversation, str):
        return [Turn("user", (conversation,))]
    turns = [turn for turn in conversation if isinstance(turn, Turn)] if isinstance(conversation, list | tuple) else []
    return turns if turns and len(turns) == len(conversation) else read_messages(conversation, reading=reading)


def blank(medium: Medium) -> Medium:
    """White, of the same size."""
    white = Image.new("RGB", (medium.width, medium.height), "white")
    if isinstance(medium, Picture):
        return replace(medium, source=white)
    return replace(medium, source=(white,) * len(medium.indices))
