"""Repairs to Triton's interpreter (TRITON_INTERPRET=1), so that the kernels themselves need not know of it.

bfloat16: the interpreter's arrays hold it as uint16; casts to it truncate, and a matrix product multiplies the
integers.
Products in float32: the bits of an element are NumPy's of the whole tile's shape. On a GPU they depend on the element's
row and column alone, and kernels with tiles of different shapes rely on that.
Integer sums: each is computed and compared again in 64 bits, to find overflow, for half of a kernel's time.
Loop bounds: scalars are arrays of one element, which NumPy since 2.4 does not convert to an index.
Functions that a kernel calls: for each call the interpreter replaces the language anew, for a third of a kernel's time;
once at its launch is enough.
"""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

_Builder = interpreter.InterpreterBuilder
_stock_cast, _stock_dot = _Builder.cast_impl, _Builder.create_dot
_stock_patch, _stock_lang = interpreter._patch_lang_tensor, interpreter._patch_lang
_running = types.SimpleNamespace()  # has an attribute while a kernel runs


def install() -> None:
    """Repair the interpreter, if it is in use."""
    if triton.knobs.runtime.interpret:
        _Builder.cast_impl, _Builder.create_dot = _cast, _dot
        interpreter._patch_lang_tensor = _patch_lang_tensor
        interpreter._patch_lang = _patch_lang
        builder = interpreter.interpreter_builder
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _cast(self: Any, src: Any, dst_type: Any) -> Any:
    source, target = src.dtype.scalar, dst_type.scalar
    if source == tl.bfloat16 and target == tl.float32:
        return interpreter.TensorHandle((src.data.astype(np.uint32) << 16).view(np.float32), target)
    if source == tl.float32 and target == tl.bfloat16:  # to nearest, ties to even, as devices do
        bits = np.ascontiguousarray(src.data).view(np.uint32)
        rounded = np.where(np.isnan(src.data), 0x7FC0, (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16)
        return interpreter.TensorHandle(rounded.astype(np.uint16), target)
    return _stock_cast(self, src, dst_type)


def _dot(self: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
    if a.dtype.scalar == tl.float32:
        rows, columns = np.ascontiguousarray(a.data), np.ascontiguousarray(b.data.T)
        return interpreter.TensorHandle(np.einsum("mk,nk->mn", rows, columns) + d.data, d.dtype.scalar)
    a, b = (_cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    return _stock_dot(self, a, b, d, *precision)


def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
    _stock_patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _patch_lang(function: Any) -> Any:
    if vars(_running):
        return interpreter._LangPatchScope()
    names = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})  # those that any function can know it by
    scope = _stock_lang(names)
    scope.set_attr(_running, "kernel", function)  # goes with the rest
    return scope
