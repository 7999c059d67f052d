"""The command ``fastattn``. ``main`` is its entry point; see ``fastattn --help``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; says what to install where its few packages are missing."""
    try:
        from fastattn.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"the fastattn command needs {error.name}: pip install 'fastattn[cli]'")
    app()
