"""``python -m fastattn`` is the command ``fastattn``."""

from fastattn.cli import main

main()
