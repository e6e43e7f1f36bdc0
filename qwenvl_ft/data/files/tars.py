"""WebDataset: a tar whose files of one name, but for what follows its first dot, are one sample. It is not unpacked.

000.jpg 000.json 001.jpg 001.txt: the json is an entry in any form; a text is what is said of the picture. A json
beside a text that is no talk, such as img2dataset's with the URL and the size, is not read, which is counted.
"""

import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qwenvl_ft.data import sources
from qwenvl_ft.data.files.entry import Entry
from qwenvl_ft.data.files.json_text import NOT_UTF8, line_problem
from qwenvl_ft.data.formats.json_entries import parse
from qwenvl_ft.data.formats.rows import QUESTION
from qwenvl_ft.data.magic import PICTURE_ENDINGS
from qwenvl_ft.data.records import InTar
from qwenvl_ft.errors import Problem

VIDEOS = ("mp4", "mkv", "webm", "mov", "avi", "m4v", "mpeg", "mpg", "ts", "flv")
TEXTS = ("txt", "text", "caption")
TALKS = frozenset((*QUESTION, "conversations", "messages", "conversation", "texts"))  # one of these keys has a json that is a talk
NAMING = ("image", "images", "video", "videos", "image_url", "video_url")  # keys that name a medium
AGAIN = "copy it again from its source, or pack it again"
BLOCK = 512


def tar_entries(file: Path, name: str) -> Iterator[Entry]:
    """Each sample as NAME:key, in the order of their first files."""
    samples: dict[str, dict[str, InTar]] = {}
    odd: list[Problem] = []
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                folder, slash, base = member.name.rpartition("/")
                key, _, ending = base.partition(".")
                if not member.isreg() or member.issparse():
                    odd.append(Problem(f"{name}:{member.name}", "is no plain file in the tar", "pack the file itself, not a link"))
                elif not key or not ending:
                    fix = "pack a sample as KEY.jpg and KEY.json"
                    odd.append(Problem(f"{name}:{member.name}", "has no name of the form KEY.ENDING", fix))
                else:
                    found = samples.setdefault(folder + slash + key, {})
                    if ending.lower() in found:
                        what = f"holds {member.name} twice"
                        odd.append(Problem(f"{name}:{folder + slash + key}", what, "pack each file once"))
                    found[ending.lower()] = InTar(file, member.name, member.offset_data, member.size)
            end = tar.offset
        _check_end(file, end)
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        yield Entry("", Problem(name, f"is a damaged tar archive: {error}", AGAIN))
        return
    for problem in odd:
        yield Entry("", problem)
    if not samples and not odd:
        yield Entry("", Problem(name, "holds no files", "pack samples as KEY.jpg and KEY.json"))
    for key, members in samples.items():
        yield _sample(f"{name}:{key}", members)


def _check_end(file: Path, end: int) -> None:
    """Raises ValueError where the headers end otherwise than with a block of zeros and nothing but zeros behind it."""
    with file.open("rb") as opened:
        opened.seek(end)
        mark = opened.read(BLOCK)
        if len(mark) < BLOCK:
            raise ValueError("it ends without its end mark, so it was cut off")
        if mark.strip(b"\0"):
            raise ValueError(f"at byte {end:,} stands no header of a file")
        while more := opened.read(1 << 20):
            if more.strip(b"\0"):
                raise ValueError("it goes on behind its end mark, as if tars were joined: `tar -A` joins them")


def _sample(where: str, members: dict[str, InTar]) -> Entry:
    kinds = (("image", PICTURE_ENDINGS), ("video", VIDEOS), ("text", TEXTS), ("json", ("json",)))
    of_kind = {kind: [of for ending, of in members.items() if ending.rpartition(".")[2] in endings] for kind, endings in kinds}
    media = [*of_kind["image"], *of_kind["video"]]
    beside = {of.name: of for of in media} | {of.name.rpartition("/")[2]: of for of in media}
    known = {of.name for found in of_kind.values() for of in found}
    if unknown := [of.name for of in members.values() if of.name not in known]:
        ending = unknown[0].rpartition(".")[2]
        what = f"holds {', '.join(unknown)}, which {'is' if len(unknown) == 1 else 'are'} not read"
        fix = f"pack the tar without .{ending}: pictures, films, json and txt are read"
        return Entry(where, Problem(where, what, fix, kind=f"a member .{ending}"))
    told = [*of_kind["json"], *of_kind["text"]]
    if not told or max(len(of_kind["json"]), len(of_kind["text"])) > 1:
        what = f"has {len(of_kind['json'])} json and {len(of_kind['text'])} txt"
        return Entry(where, Problem(where, what, "pack one json, or one txt, with each sample"))
    try:
        value = None
        if of_kind["json"]:
            read = of_kind["json"][0]
            value = parse(sources.read(read).decode("utf-8-sig"))
        if of_kind["text"]:
            if isinstance(value, list) or (isinstance(value, dict) and TALKS & value.keys()):
                what, fix = "has a json that is a talk, and a txt", "pack the sample with one of them"
                return Entry(where, Problem(where, what, fix))
            read = of_kind["text"][0]
            text = sources.read(read).decode("utf-8-sig")
            tagged = [("img", of.name) for of in of_kind["image"]] + [("video", of.name) for of in of_kind["video"]]
            if not tagged:
                return Entry(where, Problem(where, "is a text without a picture", "pack its picture, too"))
            shown = "".join(f"<{tag}>{of}</{tag}>" for tag, of in tagged)
            turns = [{"from": "user", "value": shown}, {"from": "assistant", "value": text.strip()}]
            return Entry(where, {"conversations": turns}, beside, has_unread=bool(of_kind["json"]))
    except UnicodeDecodeError:
        return Entry(where, Problem(f"{where}.{read.name.rpartition('.')[2]}", *NOT_UTF8))
    except OSError as error:
        return Entry(where, Problem(where, str(error), AGAIN))
    except ValueError as error:
        return Entry(where, line_problem(error, where))
    if isinstance(value, dict) and not _names_media(value, beside):
        value |= {
            (kind if len(of_kind[kind]) == 1 else f"{kind}s"): of_kind[kind][0] if len(of_kind[kind]) == 1 else of_kind[kind]
            for kind in ("image", "video")
            if of_kind[kind]
        }
    return Entry(where, value, beside)


def _names_media(value: Any, beside: Mapping[str, InTar]) -> bool:
    if isinstance(value, dict):
        return any((key in NAMING and bool(held)) or _names_media(held, beside) for key, held in value.items())
    if isinstance(value, list):
        return any(_names_media(held, beside) for held in value)
    return isinstance(value, str) and (value in beside or "</img>" in value or "</video>" in value)
