"""A question to a run's base and to what was tuned of it, at once: one copy of the weights, the adapter off and on.

Both see the same pixels and the same prompt, those of training.
"""

import base64
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

from qwenvl_ft.board.answers import as_webp
from qwenvl_ft.board.runs import Run
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.model import ADAPTER_WEIGHTS
from qwenvl_ft.folders.runs import checkpoints

if TYPE_CHECKING:
    from qwenvl_ft.data.records import Turn

MAX_NEW_TOKENS = 256
OnPiece = Callable[[str, str], None]  # told who says the next piece of an answer, and the piece


class Said(NamedTuple):
    """An answer, and whether it was cut."""

    text: str
    cut: bool


@dataclass
class Asking:
    """The model that was asked last, which stays loaded, one at a time."""

    lock: Lock = field(default_factory=Lock)
    key: Any = None
    engine: Any = None

    def ask(self, run: Run, question: str, picture: bytes, on_piece: OnPiece = lambda who, piece: None) -> dict[str, Any]:
        """What base and tuned say, `on_piece` told of it as it comes, and the picture as a URL.

        Raises UserError where there is no adapter or no picture in it, where the run does not say its model, and where that does
        not fit."""
        from qwenvl_ft.data.media_position import beside
        from qwenvl_ft.data.pictures import decode
        from qwenvl_ft.data.records import Picture, Turn

        if not question.strip():
            raise UserError(Problem("question", "is empty", "ask something"))
        if (adapter := adapter_of(run.folder)) is None:
            raise UserError(Problem(run.name, "has no adapter yet", "wait for its first checkpoint"))
        image = decode(picture, "picture") if picture else None
        shown = [Picture.of(image)] if image else []
        turns = [Turn("user", beside(shown, question, run.settings.get("media_position", "as_written")))]
        url = ""
        if image:
            url = f"data:image/webp;base64,{base64.b64encode(as_webp(image.copy())).decode()}"
        import torch

        from qwenvl_ft.train.memory import what_lacks

        try:
            with self.lock:
                return {"picture": url, "answers": self.both(run, adapter, turns, on_piece)}
        except torch.OutOfMemoryError as error:
            fix = "wait for the end of what trains, or send a smaller picture"
            problem = Problem(run.name, f"its model does not fit: {what_lacks(error)}", fix)
        self.drop()  # not above, where the error still holds what was loaded
        raise UserError(problem)

    def both(self, run: Run, adapter: Path, turns: "list[Turn]", on_piece: OnPiece) -> list[tuple[str, Said]]:
        """(who, what it said) of base and tuned."""
        engine = self.opened(run, adapter)

        def said(who: str) -> tuple[str, Said]:
            pieces, cut = list[str](), list[bool]()
            for piece in engine.stream(turns, MAX_NEW_TOKENS, on_cut=lambda: cut.append(True)):
                pieces.append(piece)
                on_piece(who, piece)
            return who, Said("".join(pieces), bool(cut))

        with engine.model.disable_adapter():
            base = said("base")
        return [base, said("tuned")]

    def opened(self, run: Run, adapter: Path) -> Any:
        """The engine of an adapter, loaded where it is not that of the last question, or a new one."""
        if not isinstance(model := run.settings.get("model"), str):
            what = "names no model, or cannot be read"
            raise UserError(Problem(str(run.folder / "config.yaml"), what, "write `model: FOLDER`, the base of its adapter"))
        key = adapter, (adapter / ADAPTER_WEIGHTS).stat().st_mtime_ns
        if key != self.key:
            from qwenvl_ft.infer.engine import Engine

            self.key = self.engine = None  # two would not fit
            self.engine, self.key = Engine.open(Path(model), adapter), key
        return self.engine

    def drop(self) -> None:
        """Lets go of the model, once what is being asked is answered: who trains needs its memory."""
        with self.lock:
            self.key = self.engine = None
            if torch := sys.modules.get("torch"):
                gc.collect()
                torch.cuda.empty_cache()


def adapter_of(folder: Path) -> Path | None:
    """A run's adapter: that of its end, else its newest checkpoint; None where there is neither."""
    found = [folder, *reversed(checkpoints(folder))]
    return next((adapter for adapter in found if (adapter / ADAPTER_WEIGHTS).is_file()), None)
