"""The command `board`. Whatever needs a server is imported inside it."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from qwenvl_ft.cli.serve import bind, callers_key
from qwenvl_ft.console import counting, print_line
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.cache import cache_folder
from qwenvl_ft.folders.objects import address_of


def board(
    context: typer.Context,
    runs: Annotated[Path, typer.Argument(help="The folder with the output_dirs of runs.")] = Path("runs"),
    host: Annotated[str, typer.Option(help="Where to listen; anywhere but on this machine needs --api-key-env.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8080,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="VAR", help="The environment variable that holds the key, which browsers ask for.")
    ] = None,
    export: Annotated[
        Path | None, typer.Option("--export", help="Write the pages of runs and answers into this new folder instead, as files.")
    ] = None,
    lang: Annotated[Literal["en", "zh"], typer.Option(help="The language of --export; a browser says its own.")] = "en",
) -> None:
    """Show runs, their curves and their answers in a browser; start, stop and go on with runs there.

    Example: qwenvl-ft board runs
    """
    key = callers_key(api_key_env, host)
    if address := address_of(runs):
        here = cache_folder() / "runs"
        fix = f"give {here}, where runs of this machine work that are sent there, or the folder that you have copied others to"
        raise UserError(Problem(address, "is on an object server, and the board reads folders of this machine", fix))
    if not runs.is_dir():
        raise UserError(Problem(str(runs), "is no folder", "make it, or give the one in which your output_dirs lie"))
    if export:
        from qwenvl_ft.board.export import export as write

        with counting("writing pages") as on_page:
            number = write(runs, export, lang, on_page)
        print_line(f"{number:,} pages are in {export}; begin with {export / 'index.html'}")
        return
    listening = context.with_resource(bind(host, port))
    import uvicorn

    from qwenvl_ft.board.app import make_app

    at, number = listening.getsockname()[:2]
    print_line(f"the board of {runs} is at http://{f'[{at}]' if ':' in at else at}:{number}; stop with Ctrl-C, runs go on")
    config = uvicorn.Config(make_app(runs, key), ws="none", log_level="warning", access_log=False, server_header=False,
                            timeout_graceful_shutdown=5)  # fmt: skip
    uvicorn.Server(config).run(sockets=[listening])
