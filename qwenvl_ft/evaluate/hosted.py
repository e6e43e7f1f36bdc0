"""Asks models that run elsewhere: behind an OpenAI-compatible address, or DashScope's, each through its makers' own client.

    http://127.0.0.1:8000/v1#tiny                            the model's name behind #; needless where one is served
    https://OPENAI_API_KEY@api.openai.com/v1#gpt-4o          before @ the NAME of the variable that has the key
    dashscope:qwen-vl-max                                    its key is in DASHSCOPE_API_KEY

A service that is busy, fails or cannot be reached is asked again, later each time; one that will not answer this key or knows no
such model is not, and neither is one that stays busy: what was answered is kept. A question that is refused is kept with its error,
and counts as answered wrong.
"""

import base64
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from io import BytesIO
from pathlib import Path
from random import random
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any, NamedTuple

from PIL import Image

from qwenvl_ft.data import sources
from qwenvl_ft.data.pictures import ORIENTATION, opened
from qwenvl_ft.data.records import Box, Picture, Record, Video
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.evaluate.scoring import Replies, Reply
from qwenvl_ft.infer.engine import Answer

TRIES = 7
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
ANSWER_WITHIN_S = 300
SENT_AS_THEY_ARE = {"PNG": "png", "JPEG": "jpeg", "WEBP": "webp"}
NEEDS = "pip install '.[compare]' in the checkout"
TOO_MANY = 429
# Of an account, not of a question. Source: DashScope's list of error codes; HTTP's 401 to 404 but for 403's content filters.
STOPS = {401, 402, 403, 404}
OF_ACCOUNT = {"Arrearage", "AccessDenied", "Model.AccessDenied", "InvalidApiKey"}
OF_CONTENT = ("inspection", "content_filter", "content_policy")


class Said(NamedTuple):
    """What a service answered: the text, whether it was cut, tokens of question and answer; or the error of this question."""

    text: str
    cut: bool = False
    tokens: tuple[int, int] = (0, 0)
    error: str = ""


class Busy(Exception):
    """The service may answer later."""


class Stopped(Exception):
    """The service will not answer."""


class Hosted(NamedTuple):
    """A model elsewhere: its name, in which there is no key, and how one question is asked. `ask` raises Busy and Stopped."""

    name: str
    ask: Callable[[Record, int], Said]


def is_hosted(spec: str) -> bool:
    """Whether a text names a model that runs elsewhere."""
    return spec.startswith(("http://", "https://", "dashscope:"))


def open_hosted(spec: str) -> Hosted:
    """The model that a text names. Raises UserError where its client is not installed, its key not there, or its name not clear."""
    if spec.startswith("dashscope:"):
        return _dashscope(spec.removeprefix("dashscope:"))
    return _openai(spec)


def askable(records: Sequence[Record]) -> None:
    """Raises UserError for records that are not sent elsewhere."""
    problems = []
    for record in records:
        parts = [part for turn in record.turns for part in turn.parts]
        calls = record.tools or any(turn.calls for turn in record.turns)
        videos, boxes = (any(isinstance(part, kind) for part in parts) for kind in (Video, Box))
        for there, what in ((calls, "tools"), (videos, "a video"), (boxes, "boxes, which each family writes its own way")):
            if there:
                problems.append(Problem(record.where, f"has {what}", "compare models in folders on it", kind=what))
    if problems:
        raise UserError(*problems)


def replies_of(hosted: Hosted, concurrency: int, max_new_tokens: int) -> Replies:
    """What a model elsewhere says, as it says it, to `concurrency` questions at a time. How often each was asked again is kept.

    Raises UserError where the service will not answer, once what it had answered was handed out.
    """

    def replies(asked: Sequence[Record]) -> Iterator[list[Reply]]:
        ended = Event()

        def one(index: int) -> Reply | None:
            retries = 0
            while not ended.is_set():
                try:
                    said = hosted.ask(asked[index], max_new_tokens)
                except Busy as busy:
                    retries += 1
                    if retries == TRIES:
                        ended.set()
                        raise Stopped(f"is still busy after {TRIES} tries: {busy}") from busy
                    # The half that is chance keeps those who failed together from coming back together.
                    ended.wait(min(FIRST_WAIT_S * 2 ** (retries - 1), LONGEST_WAIT_S) * (0.5 + random() / 2))
                except Stopped:
                    ended.set()
                    raise
                else:
                    facts = {"tokens": list(said.tokens)} | ({"retries": retries} if retries else {})
                    return index, Answer(said.text, said.cut), facts | ({"error": said.error} if said.error else {})
            return None

        stopped = None
        with ThreadPoolExecutor(concurrency) as pool:
            try:
                for done in as_completed([pool.submit(one, index) for index in range(len(asked))]):
                    try:
                        reply = done.result()
                    except Stopped as error:  # those that are being answered meanwhile are paid for, and waited for
                        stopped = error
                    else:
                        if reply:
                            yield [reply]
            finally:
                ended.set()
        if stopped:
            fix = "mend that, or come back later: the same command asks only what is missing"
            raise UserError(Problem(hosted.name, str(stopped), fix)) from stopped

    return replies


# ---- OpenAI ----


def read_address(spec: str) -> tuple[str, str, str | None]:
    """The URL of an address, its key, which may be empty, and the model's name where there is one. Raises UserError."""
    match = re.fullmatch(r"(https?://)(?:([^/@]*)@)?([^@#]+?)/?(?:#(.+))?", spec)
    if not match:
        raise UserError(Problem("a model's address", "cannot be read", "write http://HOST/v1#MODEL"))
    scheme, variable, place, model = match.groups()
    url = scheme + place
    if variable and variable not in os.environ:
        what = "names before @ no variable of the environment"  # which may be the key itself: it is not shown
        raise UserError(Problem(url, what, "export the key as a variable, and write the variable's name before @"))
    return url, os.environ[variable] if variable else "", model


def _openai(spec: str) -> Hosted:
    url, key, model = read_address(spec)
    try:
        import openai
    except ImportError as error:
        raise UserError(Problem(url, "needs the package openai", NEEDS)) from error
    client = openai.OpenAI(base_url=url, api_key=key or "none", max_retries=0, timeout=ANSWER_WITHIN_S)

    if model is None:
        try:
            served = [one.id for one in client.models.list()]
        except openai.APIError as error:
            what = f"does not say what it serves: {_hidden(error.message, key)}"
            raise UserError(Problem(url, what, f"write the model's name behind it: {url}#MODEL")) from error
        if len(served) != 1:
            raise UserError(Problem(url, f"serves {', '.join(served[:10])}", f"write one behind it: {url}#MODEL"))
        model = served[0]

    def ask(record: Record, max_new_tokens: int) -> Said:
        messages: Any = [
            {"role": turn.role, "content": [_openai_part(part) for part in turn.parts] if turn.media else turn.text}
            for turn in record.turns
        ]
        try:
            done = client.chat.completions.create(model=model, messages=messages, max_tokens=max_new_tokens, temperature=0)
        except openai.APIError as error:
            text = _hidden(error.message, key)
            if not isinstance(error, openai.APIStatusError):  # no answer at all
                raise Busy(text) from error
            return _refused(error.status_code, str(error.code), text)
        usage = (done.usage.prompt_tokens, done.usage.completion_tokens) if done.usage else (0, 0)
        return Said(done.choices[0].message.content or "", done.choices[0].finish_reason == "length", usage)

    return Hosted(f"{url}#{model}", ask)


def _openai_part(part: Any) -> dict[str, Any]:
    if isinstance(part, Picture):
        content, kind = file_of(part)
        return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{base64.b64encode(content).decode()}"}}
    return {"type": "text", "text": part}


# ---- DashScope ----


def _dashscope(model: str) -> Hosted:
    name = f"dashscope:{model}"
    key = os.environ.get("DASHSCOPE_API_KEY", "")
    if not model or not key:
        what, fix = ("names no model", "write dashscope:qwen-vl-max") if not model else ("needs a key", "export DASHSCOPE_API_KEY")
        raise UserError(Problem(name, what, fix))
    try:
        from dashscope import MultiModalConversation
        from dashscope.common.error import DashScopeException
        from requests import RequestException
    except ImportError as error:
        raise UserError(Problem(name, "needs the package dashscope", NEEDS)) from error

    def ask(record: Record, max_new_tokens: int) -> Said:
        with TemporaryDirectory() as folder:  # whose files the client uploads; two of one name would be one there
            messages = [
                {"role": turn.role, "content": [_dashscope_part(part, Path(folder)) for part in turn.parts]}
                for turn in record.turns
            ]
            try:
                done: Any = MultiModalConversation.call(
                    model=model, messages=messages, api_key=key, max_tokens=max_new_tokens, temperature=0.0,
                    request_timeout=ANSWER_WITHIN_S,
                )  # fmt: skip
            except (RequestException, DashScopeException) as error:  # of the upload, whose status the client keeps to itself
                text = _hidden(f"{type(error).__name__}: {error}", key)
                raise (Stopped if any(code in text for code in OF_ACCOUNT) else Busy)(text) from error
        if done.status_code != 200:
            return _refused(done.status_code, str(done.code), _hidden(str(done.message), key))
        choice = done.output.choices[0]
        parts = choice.message.content
        text = parts if isinstance(parts, str) else "".join(part.get("text", "") for part in parts)
        return Said(text, choice.finish_reason == "length", (done.usage.input_tokens, done.usage.output_tokens))

    return Hosted(name, ask)


def _dashscope_part(part: Any, folder: Path) -> dict[str, str]:
    if not isinstance(part, Picture):
        # The client uploads a text that is the name of a file here.
        is_name = part.startswith(("file://", "oss://")) or os.path.isfile(os.path.expanduser(part))
        return {"text": f" {part}" if is_name else part}
    content, kind = file_of(part)
    path = folder / f"{len(list(folder.iterdir()))}.{kind}"
    path.write_bytes(content)
    return {"image": path.as_uri()}


# ---- both ----


def _refused(status: int, code: str, message: str) -> Said:
    """What a service says that does not answer a question; raises Busy and Stopped where it is not about the question."""
    text = f"{status} {code}: {message}"[:300]
    if status == TOO_MANY or status >= 500:
        raise Busy(text)
    of_content = any(word in code.lower() for word in OF_CONTENT)
    if (status in STOPS and not of_content) or code in OF_ACCOUNT:
        raise Stopped(f"will not answer: {text}")
    return Said("", error=text)


def _hidden(text: str, key: str) -> str:
    return text.replace(key, "...") if key else text


def file_of(picture: Picture) -> tuple[bytes, str]:
    """(content, kind) of the file that shows a picture as training sees it: its own where every client sees that, else a PNG."""
    if not isinstance(picture.source, Image.Image):
        content = sources.read(picture.source)
        with Image.open(BytesIO(content)) as image:
            upright = image.getexif().get(ORIENTATION, 1) == 1
            if (kind := SENT_AS_THEY_ARE.get(image.format or "")) and upright and image.mode in ("RGB", "L"):
                return content, kind
    found = BytesIO()
    opened(picture).save(found, "PNG")
    return found.getvalue(), "png"
