"""Exit codes of the command, and the one place where an error becomes a message and a code."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console

BAD_DATA = 3
BAD_MODEL = 4
BAD_OUTPUT = 5
INTERRUPTED = 130

EXIT_CODES = """\
Exit codes: 0 done; 1 a missing package, or an error that should not happen (with a traceback); \
2 wrong options; 3 the data can't be used (file, column, label); 4 the model can't be used; 5 the \
output folder can't be used; 130 interrupted."""


# What the commands import only when they need it, by the extra that brings it.
NEEDED = {
    "cli": ("transformers", "accelerate", "datasets", "matplotlib", "psutil"),
    "diagnose": ("captum", "jinja2", "scipy"),
}


@contextmanager
def exit_codes(resumes: bool = False, extras: tuple[str, ...] = ("cli",)) -> Iterator[None]:
    """Say what is wrong in one line and exit with its code; bugs keep their traceback.
    ``resumes``: the command goes on from a saved stage when it is given again. ``extras``: whose
    packages it needs, sooner or later: a missing one is said before any work."""
    for extra in extras:
        missing = [name for name in NEEDED[extra] if importlib.util.find_spec(name) is None]
        if missing:
            names = " and ".join(missing)
            _say(f"error: this command needs {names}: pip install 'fastattn[{extra}]'")
            raise typer.Exit(1)
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


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """What can't be written is the fault of ``folder``, not of the command.

    Raises:
        OutputError
    """
    from fastattn.recipes.errors import OutputError

    try:
        yield
    except OSError as error:
        where = error.filename or folder
        raise OutputError(f"can't write {where}: {error.strerror or error}") from error


def _say(message: str) -> None:
    Console(file=sys.stderr, soft_wrap=True).print(message, markup=False, highlight=False)
