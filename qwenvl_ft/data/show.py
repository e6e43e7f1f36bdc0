"""A record as the model sees it."""

from typing import Any

from qwenvl_ft.console import Drawing, draw_panel
from qwenvl_ft.data.chat import IGNORE, PICTURE, Chat, Script


def draw_record(script: Script, chat: Chat) -> Drawing:
    """The record as the model sees it: pictures as blocks with their tokens, what is taught in green."""
    pieces: list[tuple[str, str]] = []
    pictures = iter(zip(script.pictures, script.grids, script.picture_tokens, strict=True))
    runs: list[tuple[bool, list[int]]] = []
    for token, label in zip(script.ids, script.labels, strict=True):
        if token == script.picture_id:
            runs.append((False, [token]))
        elif runs and runs[-1][0] == (label != IGNORE) and runs[-1][1][0] != script.picture_id:
            runs[-1][1].append(token)
        else:
            runs.append((label != IGNORE, [token]))
    for is_taught, ids in runs:
        if ids[0] == script.picture_id:
            picture, (_, rows, columns), tokens = next(pictures)
            merge = chat.limits.merge_size
            size = f"{picture.width} x {picture.height} px, {columns // merge} x {rows // merge} = {tokens} tokens"
            pieces.append((f" ▦ {picture.name}: {size} ", "#101010 on #5fd7d7"))
        else:
            said = chat.said(ids)
            pieces.append((said, "bold green" if is_taught else "" if "<|" not in said else "bright_black"))
    taught = sum(label != IGNORE for label in script.labels)
    return draw_panel(pieces, script.where, f"{script.length} tokens, {taught} taught (green); {PICTURE} widened")


def facts_of(script: Script, chat: Chat) -> dict[str, Any]:
    """What `qwenvl-ft show --json` prints: ids and labels with pictures at their real number of tokens."""
    ids, labels = script.widened()
    taught = chat.taught_texts(script)
    return {"ids": ids, "labels": labels, "text": chat.said(ids), "taught": taught, "grids": script.grids}
