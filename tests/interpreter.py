"""Triton's interpreter in half of its time.

At every call of one kernel function by another it looks through all of ``triton.language`` for
what it has to replace, and finds that it has replaced all of it already.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any


def replace_once() -> None:
    """Lets the interpreter look once a launch. Does nothing where its inside is another one."""
    from triton import language
    from triton.runtime import interpreter

    patch: Callable[[Any], Any] | None = getattr(interpreter, "_patch_lang", None)
    scope = getattr(interpreter, "_LangPatchScope", None)
    if patch is None or scope is None:
        return

    @cache
    def seen_by(function: Any) -> list[ModuleType]:
        modules = (language, language.core)
        return [m for m in modules if any(m is value for value in function.__globals__.values())]

    def patch_what_is_not(function: Any) -> Any:
        if any(language.core.is_builtin(module.load) for module in seen_by(function)):
            return patch(function)
        return scope()  # nothing to undo

    interpreter._patch_lang = patch_what_is_not
