"""An answer's text as its tokens come: half a character waits for its rest, ends are left out, boxes and references stay."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from qwenvl_ft.data.chat import Chat
from qwenvl_ft.data.template import OPEN_THOUGHT


@dataclass
class Detokenizer:
    """The text of one answer. `prompt` are the ids that asked for it: what they have opened, the text begins with."""

    chat: Chat
    prompt: Sequence[int] = ()
    ids: list[int] = field(default_factory=list)
    window: tuple[int, int] = (0, 0)  # of ids: those in the text that the next ones are decoded with, those in the text
    begun: bool = False

    def add(self, ids: Sequence[int], whole: bool = False) -> str:
        """The text that has become certain with these ids; with `whole` all of the rest."""
        self.ids += ids
        opening = OPEN_THOUGHT if not self.begun and self.chat.opens_thought(self.prompt) else ""
        self.begun = True
        start, end = self.window
        before, after = self.chat.answered(self.ids[start:end]), self.chat.answered(self.ids[start:])
        if not whole and after.endswith("\ufffd"):
            return opening
        self.window = end, len(self.ids)
        return opening + after[len(before) :]
