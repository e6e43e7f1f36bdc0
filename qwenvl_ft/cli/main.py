"""The console scripts. A command reads its arguments, calls one function and prints; its errors end here.

Exit code 0: fine. 1: problems, each printed with where, what and fix. 2: wrong usage.
"""

import logging
import os
import sys
import warnings
from typing import Annotated

import typer

import qwenvl_ft
from qwenvl_ft.cli import board, data, evaluation, hub, init, launch, model, pai, serve
from qwenvl_ft.console import print_line, print_problems
from qwenvl_ft.errors import UserError

app = typer.Typer(
    name="qwenvl-ft", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
    help="LoRA fine-tuning for Qwen-VL models: validate-meta, show, convert, plan before the GPU; train; eval, compare, export, "
    "ask after.",
)  # fmt: skip
for command in (init.init, data.validate_meta, data.show, data.convert, data.plan,
                model.train, evaluation.evaluate, evaluation.compare, model.export, model.ask, hub.download, hub.doctor,
                serve.serve, board.board, launch.launch):  # fmt: skip
    # Of `--learning_rate 1e-4` the config says what to write; click would say "no such option".
    lenient = {"ignore_unknown_options": True} if command in (data.plan, model.train) else None
    app.command("eval" if command is evaluation.evaluate else None, context_settings=lenient)(command)
app.add_typer(pai.app)


def _say_version(wanted: bool) -> None:
    if wanted:
        print_line(f"qwenvl-ft {qwenvl_ft.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Say which one this is.")
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """The console script `qwenvl-ft`, and under that name what scripts start."""
    # Of transformers, about names that peft and we call it by: nothing that a user could mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # Of bitsandbytes, which peft imports: that one more package would answer quicker on this CPU, by what is not used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        app(arguments, prog_name="qwenvl-ft")
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # all processes of a run on this machine find the same
            print_problems(error.problems)
        sys.exit(1)


def validate_meta_main() -> None:
    """The console script `validate-meta`."""
    main(["validate-meta", *sys.argv[1:]])
