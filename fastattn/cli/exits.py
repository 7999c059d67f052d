"""Exit codes of the command, and the one place where an error becomes a message and a code."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

BAD_DATA = 3
BAD_MODEL = 4
BAD_OUTPUT = 5
INTERRUPTED = 130

EXIT_CODES = """\
Exit codes: 0 done; 1 an error that should not happen (with a traceback); 2 wrong options; \
3 the data can't be used (file, column, label); 4 the model can't be used; 5 the output folder \
can't be used; 130 interrupted."""


@contextmanager
def exit_codes(resumes: bool = False) -> Iterator[None]:
    """Say what is wrong in one line and exit with its code; bugs keep their traceback.
    ``resumes``: the command goes on from a saved stage when it is given again."""
    from fastattn.recipes.errors import DataError, ModelError, OutputError

    codes = {DataError: BAD_DATA, ModelError: BAD_MODEL, OutputError: BAD_OUTPUT}
    try:
        yield
    except (DataError, ModelError, OutputError) as error:
        _say(f"error: {error}")
        raise typer.Exit(codes[type(error)]) from None
    except KeyboardInterrupt:
        hint = ": the same command goes on from the last saved stage" if resumes else ""
        _say(f"interrupted{hint}")
        raise typer.Exit(INTERRUPTED) from None


def _say(message: str) -> None:
    Console(file=sys.stderr, soft_wrap=True).print(message, markup=False, highlight=False)
