"""A command line, as the tests of the commands run it."""

import pytest

from qwenvl_ft.cli.main import main


@pytest.fixture
def run(capsys):
    """(exit code, standard output, standard error) of a command line."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code: int | str | None = 0
        try:
            main(list(arguments))
        except SystemExit as exit:
            code = exit.code
        out, err = capsys.readouterr()
        return int(code or 0), out, err

    return run
