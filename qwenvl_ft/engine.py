"""Answers a conversation with a model, through the same template, the same loading of pictures and the same resize as training.

engine = Engine.open(Path("data/tiny"))
engine.ask([Turn("user", (engine.picture(Path("chart.png")), "read"))])
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from safetensors import safe_open
from transformers import AutoProcessor, TextIteratorStreamer

from qwenvl_ft.chat import Chat, open_chat
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.media import load, size_of
from qwenvl_ft.meta import Media, Turn
from qwenvl_ft.model import load_base

MAX_NEW_TOKENS = 512


@dataclass(frozen=True)
class Engine:
    """A model on its device. `blank` shows it white pictures of the same size: what it then still knows, it did not see."""

    model: Any
    processor: Any
    chat: Chat
    blank: bool = False

    @classmethod
    def open(cls, model_dir: Path, adapter: Path | None = None, blank: bool = False) -> "Engine":
        """Loads model and adapter. With an adapter its own processor is used, with the limits that training used."""
        chat = open_chat(model_dir)
        source = model_dir
        if adapter:
            check_adapter(adapter)
            if (adapter / "processor_config.json").is_file():  # else an adapter of another tool, or a checkpoint of ours
                source = adapter
        processor = AutoProcessor.from_pretrained(source)
        processor.tokenizer.padding_side = "left"  # is not saved with a tokenizer; answers start at the right edge
        model = load_base(model_dir, "auto")
        if adapter:
            model = PeftModel.from_pretrained(model, adapter)
        return cls(model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), processor, chat, blank)

    @staticmethod
    def picture(path: Path) -> Media:
        """A picture file as a part of a turn. Raises UserError where it cannot be read."""
        if not path.is_file():
            raise UserError(Problem(str(path), "is not a file", "give the path of a picture"))
        height, width = size_of(path, str(path))
        return Media(path, height, width)

    def inputs(self, conversations: Sequence[Sequence[Turn]]) -> Any:
        """The model's inputs for a batch, on its device, padded on the left."""
        texts = [self.chat.render(turns, answer_next=True) for turns in conversations]
        media = [part for turns in conversations for turn in turns for part in turn.parts if isinstance(part, Media)]
        pictures = [load(item.path, str(item.path)) for item in media]
        if self.blank:
            pictures = [Image.new("RGB", picture.size, "white") for picture in pictures]
        inputs = self.processor(text=texts, images=pictures or None, padding=True, return_tensors="pt")
        return inputs.to(self.model.device)

    @torch.inference_mode()
    def ask_many(self, conversations: Sequence[Sequence[Turn]], max_new_tokens: int = MAX_NEW_TOKENS) -> list[str]:
        """The greedy answer to each conversation, generated as one batch; equal to asking them one by one."""
        inputs = self.inputs(conversations)
        out = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return self.processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def ask(self, turns: Sequence[Turn], max_new_tokens: int = MAX_NEW_TOKENS) -> str:
        """The greedy answer to one conversation."""
        return self.ask_many([turns], max_new_tokens)[0]

    def stream(self, turns: Sequence[Turn], max_new_tokens: int = MAX_NEW_TOKENS) -> Iterator[str]:
        """The greedy answer in pieces, as they are generated."""
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        settings = dict(self.inputs([turns]), max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
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


def check_adapter(adapter: Path) -> None:
    """Raises UserError unless the folder holds a PEFT adapter whose tensors can be read."""
    weights = adapter / "adapter_model.safetensors"
    if not (adapter / "adapter_config.json").is_file() or not weights.is_file():
        raise UserError(Problem(str(adapter), "holds no adapter_config.json with adapter_model.safetensors",
                                "give the output_dir of a finished run"))  # fmt: skip
    try:
        with safe_open(weights, "pt") as file:
            file.keys()
    except Exception as error:
        raise UserError(Problem(str(weights), "is not a whole safetensors file", "copy it again or train again")) from error
