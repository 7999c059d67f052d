"""Changes to Triton's interpreter, for tests: a third of its time, and the rounding of a GPU.

Each does nothing where the interpreter's inside is another one than it knows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np


def replace_once() -> None:
    """At every call of one kernel function by another it looks through all of ``triton.language``
    for what it has to replace, and finds that it has replaced all of it already: once a launch is
    enough."""
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


def check_overflow_at_once() -> None:
    """Whether a sum, difference or product of integers fits its type it asks in six operations of
    the language, and forgets the answer unless it debugs. One of numpy, which raises."""
    from triton.language import semantic

    name = "binary_op_sanitize_overflow_impl"
    if not hasattr(semantic.TritonSemantic, name):
        return
    operations = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def check(_: Any, lhs: Any, rhs: Any, binary_op: Any) -> None:
        kind = lhs.type.scalar
        if kind.int_bitwidth >= 64:
            return
        wide = [x.handle.data.astype(np.int64) for x in (lhs, rhs)]
        exact = operations[binary_op.__name__](*wide)
        if exact.max() > kind.get_int_max_value() or exact.min() < kind.get_int_min_value():
            raise OverflowError(f"{kind} overflows in {binary_op.__name__}")

    setattr(semantic.TritonSemantic, name, check)


def remember_types() -> None:
    """It makes a table of all types whenever it wants to know numpy's name for one."""
    from triton.runtime import interpreter

    look_up: Callable[[Any], Any] | None = getattr(interpreter, "_get_np_dtype", None)
    if look_up is None:
        return
    known: dict[str, Any] = {}

    def remembered(kind: Any) -> Any:
        scalar = str(kind.scalar)
        if scalar not in known:
            known[scalar] = look_up(kind)
        return known[scalar]

    interpreter._get_np_dtype = remembered


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
