"""The commands. Each reads its arguments, calls one function and prints; torch is imported inside those that need it.

Exit code 0: fine. 1: problems, each printed with where, what and fix. 2: wrong usage.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.show import (
    counting,
    draw_counts,
    draw_plan,
    draw_record,
    facts_of,
    print_drawing,
    print_json,
    print_line,
    print_problems,
    save_svg,
)

app = typer.Typer(
    name="qwenvl-ft", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
    help="LoRA fine-tuning for Qwen-VL models: validate-meta, show and plan before the GPU; train; eval, export and ask after.",
)  # fmt: skip

Meta = Annotated[Path, typer.Argument(help="The meta-file: a JSON array or JSON lines of conversations.")]
DataDir = Annotated[Path, typer.Option("--data-dir", help="The folder that the <img> tags' file names are resolved against.")]
ModelArgument = Annotated[Path, typer.Argument(help="The model's folder.")]
ConfigFile = Annotated[Path, typer.Option("--config", help="The settings, such as configs/lora.yaml.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document for a program.")]
Adapter = Annotated[Path | None, typer.Option("--adapter", help="The output_dir of a training run.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings in place of the file's: key=value ...")]


@app.command("validate-meta")
def validate_meta(
    meta: Meta,
    data_dir: DataDir,
    model: Annotated[Path | None, typer.Option("--model", help="Count tokens as this model would.")] = None,
    as_json: Json = False,
) -> None:
    """Check a meta-file and its pictures: every problem in one run, with its place and its fix.

    Reads picture headers only and never imports torch, so a million records take minutes.

    Example: validate-meta data/sample/train.json --data-dir data/sample/images --model data/tiny
    """
    from qwenvl_ft.chat import open_chat
    from qwenvl_ft.meta import num_records, read_meta

    chat = open_chat(model) if model else None
    with counting("reading records") as on_record:
        records, problems = read_meta(meta, data_dir, on_record)
    total = num_records(meta, records, problems)
    tokens = None
    if chat:  # imported here, since it brings the whole config with it: a third of the time of a run without a model
        from qwenvl_ft.prepare import token_counts, write_scripts

        tokens = token_counts([script.length for script in write_scripts(chat, records, problems)])
    refused = {problem.where for problem in problems}
    report: dict[str, Any] = {
        "records": total,
        "used": sum(record.where not in refused for record in records),
        "pictures": sum(len(record.pictures) for record in records),
        "tokens": tokens,
        "problems": [vars(problem) for problem in problems],
    }
    if as_json:
        print_json(report)
    else:
        facts = [("records", f"{report['records']:,}, {report['used']:,} good"), ("pictures", f"{report['pictures']:,}")]
        if tokens := report["tokens"]:
            facts.append(
                ("tokens", f"{tokens['total']:,} ({tokens['min']:,} to {tokens['max']:,} a record, median {tokens['median']:,})")
            )
        print_drawing(draw_counts(str(meta), facts))
        if problems:
            print_problems(problems)
    if problems:
        raise typer.Exit(1)


@app.command()
def show(
    meta: Meta,
    number: Annotated[int, typer.Argument(help="Which record, counted from 0.")],
    data_dir: DataDir,
    model: Annotated[Path, typer.Option("--model", help="The model's folder.")],
    svg: Annotated[Path | None, typer.Option("--svg", help="Write the drawing to this picture file, too.")] = None,
    as_json: Json = False,
) -> None:
    """Show a record as the model sees it: pictures as blocks with their tokens, what is taught in green.

    Example: qwenvl-ft show data/sample/train.json 0 --data-dir data/sample/images --model data/tiny
    """
    from qwenvl_ft.chat import open_chat
    from qwenvl_ft.meta import read_meta

    chat = open_chat(model)
    with counting("reading records") as on_record:
        records, problems = read_meta(meta, data_dir, on_record)
    in_array, in_lines = f"{meta.name}[{number}]", f"{meta.name}:{number + 1}"
    found = [record for record in records if record.where in (in_array, in_lines)]
    if not found:
        mine = [problem for problem in problems if f"{problem.where}.".startswith((in_array, f"{in_lines}.", f"{in_lines}:"))]
        if not mine and records:
            mine = [Problem(str(meta), f"has no record {number}", f"count from 0; the last good record is {records[-1].where}")]
        raise UserError(*(mine or problems))
    scripts = chat.write_scripts(found[0])
    if as_json:
        print_json(facts_of(scripts[-1], chat))  # where a template rewrites turns, the last example has the whole talk
        return
    for script in scripts:
        print_drawing(draw_record(script, chat))
    if svg:
        save_svg(draw_record(scripts[-1], chat), svg)


@app.command()
def plan(config: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Show what a training run would do: records, packed rows and how full they are, what is left out and why, steps.

    Example: qwenvl-ft plan --config configs/demo.yaml
    """
    from qwenvl_ft.config import load_config
    from qwenvl_ft.prepare import prepare

    settings = load_config(config, overrides or [])
    with counting("reading records") as on_record:
        prepared = prepare(settings, on_record=on_record)
    summary = prepared.summary(settings)
    if as_json:
        print_json(summary)
    else:
        print_drawing(draw_plan(summary))
        if prepared.problems:
            print_problems(prepared.problems)


@app.command()
def train(config: ConfigFile, overrides: Overrides = None) -> None:
    """Train LoRA. The same as: accelerate launch train.py --config FILE [key=value ...]

    Example: qwenvl-ft train --config configs/demo.yaml output_dir=runs/first learning_rate=5e-5
    """
    from qwenvl_ft.config import load_config

    settings = load_config(config, overrides or [])
    from qwenvl_ft.training import train as run

    run(settings)


@app.command("eval")
def evaluate(
    model: ModelArgument,
    meta: Meta,
    data_dir: DataDir,
    adapter: Adapter = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where every prediction goes; default predictions.json beside the adapter or here.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at a time.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="An answer is cut here.")] = 128,
    blank: Annotated[
        bool, typer.Option("--blank", help="Show white pictures of the same size: what is still right was not seen.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Ask every question of a meta-file; exact and relaxed accuracy, every prediction in a file.

    Relaxed is ChartQA's rule: numbers within 5 %. Each assistant turn is a question, the turns before it as they stand in
    the record. An empty answer is wrong.

    Example: qwenvl-ft eval data/tiny data/sample/eval.json --data-dir data/sample/images --adapter runs/demo
    """
    from qwenvl_ft.checkpoint import write_json
    from qwenvl_ft.meta import read_meta

    records, problems = read_meta(meta, data_dir)
    if problems:
        raise UserError(*problems)
    from qwenvl_ft.engine import Engine
    from qwenvl_ft.evaluate import evaluate as run

    engine = Engine.open(model, adapter, blank)
    with counting("answering") as on_answer:
        scores, predictions = run(engine, records, batch_size, max_new_tokens, on_answer)
    target = out or (adapter or Path()) / ("predictions_blank.json" if blank else "predictions.json")
    write_json(target, predictions)
    scores["predictions"] = str(target)
    if as_json:
        print_json(scores)
    else:
        facts = [
            (name.replace("_", " "), f"{value:.1%}" if isinstance(value, float) else str(value)) for name, value in scores.items()
        ]
        print_drawing(
            draw_counts(f"{model}{' + ' + str(adapter) if adapter else ''} on {meta}{', blank pictures' if blank else ''}", facts)
        )


@app.command()
def export(
    adapter: Annotated[Path, typer.Option("--adapter", help="The output_dir of a training run.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write the merged model to; must not exist.")],
    model: Annotated[Path | None, typer.Option("--model", help="The base, if it has moved since training.")] = None,
) -> None:
    """Merge an adapter into its base and prove that the merged model says what base and adapter say.

    Example: qwenvl-ft export --adapter runs/demo --out runs/demo-merged
    """
    from qwenvl_ft.export import export as run
    from qwenvl_ft.export import prove_on_training_record

    with counting("merging shards") as on_shard:
        base = run(adapter, out, model, on_shard)
    difference, largest, where = prove_on_training_record(out, base, adapter)
    print_line(f"merged into {out}; on {where} its logits differ by at most {difference:.2g} (largest logit {largest:.1f})")


@app.command()
def ask(
    model: ModelArgument,
    question: Annotated[str, typer.Argument(help="What to ask.")],
    image: Annotated[list[Path] | None, typer.Option("--image", help="A picture to ask about; may be given several times.")] = None,
    adapter: Adapter = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The answer is cut here.")] = 512,
) -> None:
    """Ask a model a question about pictures, or about none; the answer comes as it is generated.

    Example: qwenvl-ft ask data/tiny --image data/sample/images/two_col_103562.png "read"
    """
    from qwenvl_ft.engine import Engine
    from qwenvl_ft.meta import Turn

    pictures = [Engine.picture(path) for path in image or []]
    engine = Engine.open(model, adapter)
    for piece in engine.stream([Turn("user", (*pictures, question))], max_new_tokens):
        sys.stdout.write(piece)
        sys.stdout.flush()
    print_line("")


def main(arguments: list[str] | None = None) -> None:
    """The console script `qwenvl-ft`."""
    try:
        app(arguments)
    except UserError as error:
        print_problems(error.problems)
        sys.exit(1)


def validate_meta_main() -> None:
    """The console script `validate-meta`."""
    main(["validate-meta", *sys.argv[1:]])
