"""The command's table of contents: each subcommand is a module of its own."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import typer

from fastattn.cli.compare import compare
from fastattn.cli.compress import compress
from fastattn.cli.diagnose import diagnose
from fastattn.cli.exits import EXIT_CODES
from fastattn.cli.info import info
from fastattn.cli.linearize import linearize

app = typer.Typer(
    name="fastattn",
    help="Linear attention for the Transformer you have.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def flowing(function: Callable[..., Any]) -> str:
    """Its docstring without line breaks inside paragraphs, which the help would keep."""
    return re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.getdoc(function) or "")


app.command(help=flowing(info))(info)
for command in (linearize, compress, compare, diagnose):
    app.command(help=flowing(command), epilog=EXIT_CODES)(command)
