"""Two changes to Triton's interpreter, for tests: half of its time, and the rounding of a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np


def replace_once() -> None:
    """At every call of one kernel function by another it looks through all of ``triton.language``
    for what it has to replace, and finds that it has replaced all of it already: once a launch is
    enough. Does nothing where the interpreter's inside is another one."""
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


def cut_to_tf32() -> None:
    """Matrix units cut operands of TF32 off after ten bits, where numpy multiplies all of them."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    multiply = builder.create_dot

    def cut(operand: Any) -> Any:
        if operand.data.dtype != np.float32:
            return operand
        bits = operand.data.view(np.uint32) & np.uint32(0xFFFFE000)
        return interpreter.TensorHandle(bits.view(np.float32), operand.dtype)

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, *rest: Any) -> Any:
        if str(precision).endswith(".TF32"):
            a, b = cut(a), cut(b)
        return multiply(self, a, b, d, precision, *rest)

    builder.create_dot = create_dot
