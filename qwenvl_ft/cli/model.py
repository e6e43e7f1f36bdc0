"""Commands that run a model: train, export, ask. torch is imported inside them."""

import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

import qwenvl_ft
from qwenvl_ft.cli.options import (
    LORA_YAML,
    Adapter,
    ConfigFile,
    Json,
    MaxPixels,
    MinPixels,
    ModelArgument,
    Overrides,
    SettingsOf,
    ThinkingOption,
    note_quantized,
    own_reading,
    read_chat_settings,
    read_reading,
    read_settings,
)
from qwenvl_ft.console import counting, print_json, print_line, print_note
from qwenvl_ft.errors import UserError


def train(overrides: Overrides = None, config: ConfigFile = LORA_YAML) -> None:
    """Train LoRA. The same as: accelerate launch train.py --config FILE [key=value ...]

    Example: qwenvl-ft train --config configs/demo.yaml output_dir=runs/first learning_rate=5e-5
    """
    from qwenvl_ft.cloud.job import Outputs, job_settings, launcher, own_words

    words = own_words(overrides or [], os.environ)
    if arguments := launcher(os.environ, ["train", "--config", str(config), *words]):
        places = os.pathsep.join([str(Path(qwenvl_ft.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        os.execve(sys.executable, [sys.executable, *arguments], os.environ | {"PYTHONPATH": places})
    named, of_job = job_settings(os.environ)
    of_job_alone = config == LORA_YAML and (named or (of_job and not config.exists()))
    settings = read_settings(named if of_job_alone else config, words, print_line, of_job)
    outputs = Outputs.of(os.environ)
    is_scratch = bool(outputs and settings.output_dir == outputs.scratch)
    if outputs and is_scratch and os.environ.get("LOCAL_RANK", "0") == "0":
        outputs.bring_back()
    from qwenvl_ft.folders.cache import cache_folder
    from qwenvl_ft.folders.remote_run import RemoteRun

    on_saved = outputs.keep if outputs and is_scratch else None
    if remote := RemoteRun.of(settings.output_dir, cache_folder()):
        if os.environ.get("LOCAL_RANK", "0") == "0":
            remote.bring_back(settings.resume)
        settings, on_saved = settings.model_copy(update={"output_dir": remote.scratch}), remote.keep
    from qwenvl_ft.data.prepare import make_ready

    with counting("reading records") as on_record:
        ready = make_ready(settings, on_record)
    from qwenvl_ft.train.loop import train as run

    run(settings, ready, on_saved)
    if remote and os.environ.get("RANK", "0") == "0":
        remote.deliver()
    if outputs and os.environ.get("RANK", "0") == "0":
        outputs.deliver(settings.output_dir)


def export(
    adapter: Annotated[Path, typer.Option("--adapter", help="The output_dir of a training run.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write the merged model to; must not exist.")],
    model: Annotated[Path | None, typer.Option("--model", help="The base, if it has moved since training.")] = None,
    verify: Annotated[
        int, typer.Option(min=0, help="Training records to compare with base and adapter; 0: none, and no model is loaded.")
    ] = 1,
    push: Annotated[str | None, typer.Option("--push", help="Upload it then, to modelscope:ORG/NAME or hf:ORG/NAME.")] = None,
    as_json: Json = False,
) -> None:
    """Merge an adapter into its base and prove that the merged model says what base and adapter say.

    The merge streams: memory does not grow with the model. The proof loads it, once with the adapter and once merged; what
    cannot be proven is not written.

    Example: qwenvl-ft export --adapter runs/demo --out runs/demo-merged
    """
    from qwenvl_ft.folders.problems import check_adapter
    from qwenvl_ft.hub import clients as hubs

    if push:
        check_adapter(adapter)  # no repository is made for one that is not there
        hubs.pushable(push)  # what is wrong with it is said before the merge
    from qwenvl_ft.evaluate.card import proven
    from qwenvl_ft.export.merge import export as run

    with counting("merging bytes") as on_bytes:
        proofs = run(adapter, out, model, verify, on_bytes)
    if push:
        hubs.push(push, out)
    if as_json:
        print_json({"merged": str(out), "proofs": proofs})
        return
    print_line(f"merged into {out}" + (f" and pushed to {push}" if push else ""))
    for proof in proofs:
        print_line(proven(proof))


def ask(
    model: ModelArgument,
    question: Annotated[str | None, typer.Argument(help="What to ask; without it, a chat: a line is a question.")] = None,
    image: Annotated[list[str] | None, typer.Option("--image", help="A picture: file or URL; may be given several times.")] = None,
    video: Annotated[
        list[str] | None, typer.Option("--video", help="A video: file, URL or folder of frames; may be given several times.")
    ] = None,
    fps: Annotated[float | None, typer.Option("--fps", help="Frames taken from each second of a video; 2 if not given.")] = None,
    adapter: Adapter = None,
    config: SettingsOf = None,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    thinking: ThinkingOption = None,
    questions: Annotated[
        Path | None, typer.Option("--jsonl", help='Answer a file instead, a line each: {"messages": [...]}; needs --out.')
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Where the answers to --jsonl go; a second run goes on there.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Lines of --jsonl answered at a time.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The answer is cut here.")] = 512,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the answer as one JSON document, its boxes and points in px of the last picture.")
    ] = False,
) -> None:
    """Ask a model about pictures or videos, or about none; the answer comes as it is generated.

    Example: qwenvl-ft ask data/tiny --image data/sample/images/two_col_103562.png "read"
    """
    if bool(questions) != bool(out) or (questions and (question or image or video)):
        raise typer.BadParameter("they go together, without a question, --image or --video", param_hint="--jsonl and --out")
    if as_json and not question:
        raise typer.BadParameter("prints the answer to one question: give it", param_hint="--json")
    from qwenvl_ft.infer.engine import check_folders

    check_folders(model, [adapter] if adapter else [])
    note_quantized([adapter] if adapter else [])
    chat_settings = read_chat_settings(config, min_pixels, max_pixels, thinking)
    if questions and out:
        from qwenvl_ft.infer.batch_file import answer_file, read_answers, read_questions, who_answers

        lines = read_questions(questions)
        read_answers(out)  # what is wrong with it is said before the model is loaded
        from qwenvl_ft.infer.engine import Engine

        engine = Engine.open(model, adapter, *chat_settings)
        print_note(*engine.chat.notes)
        who = who_answers(model, adapter, engine)
        with counting("answering") as on_answer:
            before, problems = answer_file(engine, lines, out, batch_size, max_new_tokens, on_answer, who)
        if problems:
            raise UserError(*problems)
        cut = sum(line.get("cut", False) for line in read_answers(out))
        print_line(f"{len(lines)} answers in {out}" + (f", {before} of them from before" if before else "")
                   + (f", {cut} of them cut by --max-new-tokens" if cut else ""))  # fmt: skip
        return
    from qwenvl_ft.data.media_position import beside
    from qwenvl_ft.data.records import Turn
    from qwenvl_ft.infer.engine import Engine
    from qwenvl_ft.infer.messages import read_messages

    media: list[dict[str, Any]] = [{"type": "image", "image": source} for source in image or []]
    media += [{"type": "video", "video": _film(source)} | ({"fps": fps} if fps else {}) for source in video or []]
    reading = read_reading(config, False, own=own_reading([(model, adapter)]))
    # Before torch is imported.
    shown = read_messages([{"role": "user", "content": media}], reading=reading)[0].parts if media else ()
    engine = Engine.open(model, adapter, *chat_settings)
    print_note(*engine.chat.notes)
    talk: list[Turn] = []
    if question and as_json:
        from qwenvl_ft.data.boxes import facts_of

        (said,) = engine.answer_many([[Turn("user", beside(shown, question, reading.media_position))]], max_new_tokens)
        print_json({"answer": said.text, "cut": said.cut, "boxes": [facts_of(box) for box in said.boxes]})
        return
    for asked in [question] if question else chat_lines():
        talk.append(Turn("user", beside(shown, asked, reading.media_position)))
        shown, answer = (), ""
        was_cut: list[bool] = []
        for piece in engine.stream(talk, max_new_tokens, on_cut=partial(was_cut.append, True)):
            answer += piece
            sys.stdout.write(piece)
            sys.stdout.flush()
        print_line("")
        if was_cut:
            print_note(f"cut after {max_new_tokens} tokens: --max-new-tokens raises that")
        talk.append(Turn("assistant", (answer,)))


def _film(source: str) -> str | list[Path]:
    """A film's file or URL; of a folder its frames."""
    from qwenvl_ft.data.sources import frames_of

    return frames_of(Path(source)) if os.path.isdir(source) else source


def chat_lines() -> Iterator[str]:
    """What the user types, a line at a time, until an empty one or the end of the input."""
    if sys.stdin.isatty():
        print_line("Ask; an empty line ends the chat.")
    while True:
        sys.stdout.write("> " if sys.stdin.isatty() else "")
        sys.stdout.flush()
        if not (line := sys.stdin.readline().strip()):
            return
        yield line
