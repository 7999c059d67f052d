"""``python -m fastattn.cli``: the command without the console script."""

from fastattn.cli import main

if __name__ == "__main__":
    main()
