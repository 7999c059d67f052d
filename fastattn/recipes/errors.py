"""What can be wrong with what a user hands to a recipe: one class per thing to put right.

The command line turns each class into an exit code, so a script can tell them apart.
"""

from __future__ import annotations


class RecipeError(ValueError):
    """The user can put this right; the message says how. Never raised for a bug of ours."""


class DataError(RecipeError):
    """A data file, a column or a label is missing or can't be used."""


class ModelError(RecipeError):
    """The model is missing, not supported, or does not fit the data."""


class OutputError(RecipeError):
    """The output folder can't be written to, or holds something else."""
