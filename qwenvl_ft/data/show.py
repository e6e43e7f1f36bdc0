"""A record as the model sees it."""

from itertools import groupby, islice
from typing import Any

from qwenvl_ft.console import Drawing, draw_panel
from qwenvl_ft.data.chat import IGNORE, PICTURE, Chat, Script


def draw_record(script: Script, chat: Chat) -> Drawing:
    """The record as the model sees it: pictures as blocks with their tokens, what is taught in green."""
    pieces: list[tuple[str, str]] = []
    pictures = zip(script.media, script.grids, script.counts, strict=True)
    merge = chat.limits.merge_size
    tokens = zip(script.ids, script.labels, strict=True)
    for (is_picture, is_taught), run in groupby(tokens, lambda of: (of[0] in script.placeholders, of[1] != IGNORE)):
        ids = [token for token, _ in run]
        if not is_picture:
            said = chat.said(ids)
            pieces.append((said, "bold green" if is_taught else "" if "<|" not in said else "bright_black"))
            continue
        for picture, (_, rows, columns), count in islice(pictures, len(ids)):
            size = f"{picture.width} x {picture.height} px, {columns // merge} x {rows // merge} = {count} tokens"
            pieces.append((f" ▦ {picture.name}: {size} ", "#101010 on #5fd7d7"))
    taught = sum(label != IGNORE for label in script.labels)
    return draw_panel(pieces, script.where, f"{script.length} tokens, {taught} taught (green); {PICTURE} widened")


def facts_of(script: Script, chat: Chat) -> dict[str, Any]:
    """What `qwenvl-ft show --json` prints: ids and labels with pictures at their real number of tokens."""
    ids, labels = script.widened()
    taught = chat.taught_texts(script)
    return {"ids": ids, "labels": labels, "text": chat.said(ids), "taught": taught, "grids": script.grids}
