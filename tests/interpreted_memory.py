"""Watches what Triton's interpreter reads and writes, as compute-sanitizer does on a GPU.

Programs of a launch run in any order and at the same time on a GPU, and so do the threads of one. In the interpreter
they take turns, so that a kernel that depends on the order is right there. An access counts as an error if it

- lies outside of all tensors that the launch was given, or not at a multiple of its size;
- has a mask of integers, as one of a scalar and a tensor is there, which Triton's interpreter refuses since 3.9;
- reads what another program writes in the same launch, or what the same one wrote, for which its threads would have to
  wait for one another;
- writes what another program reads or writes, or one place twice; atomics may meet atomics alone.

A program may write to where it has read: an update in place has read all before it stores. Loads give NaN, or a large
integer, where they are masked and nothing is said of what comes then.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import triton
from triton.runtime import interpreter

_SEVERAL = -1  # in place of a program's number
_BFLOAT16_NAN = 0x7FC0


class _Region:
    """Memory of one tensor, or of several that overlap: which program has read and written each element."""

    def __init__(self, first: int, end: int, itemsize: int) -> None:
        self.first, self.end, self.itemsize = first, end, itemsize
        count = (end - first) // itemsize
        self.reader, self.writer = np.zeros(count, np.int32), np.zeros(count, np.int32)
        self.by_atomics = np.zeros(count, bool)


def _extents(values: Any) -> Iterator[tuple[int, int, int]]:
    """First byte, end and element size of the tensors in a launch's arguments."""
    for value in values:
        if isinstance(value, tuple):
            yield from _extents(value)
        elif hasattr(value, "data_ptr") and value.numel() > 0:
            last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
            first, itemsize = value.data_ptr(), value.element_size()
            yield first, first + (last + 1) * itemsize, itemsize


def _poison(dtype: Any, shape: tuple[int, ...]) -> Any:
    numpy_dtype = np.dtype(interpreter._get_np_dtype(dtype))
    if dtype.is_bf16():
        return np.full(shape, _BFLOAT16_NAN, numpy_dtype)
    if dtype.is_floating():
        return np.full(shape, np.nan, numpy_dtype)
    return np.full(shape, True if numpy_dtype == np.bool_ else np.iinfo(numpy_dtype).max // 3, numpy_dtype)


class Watch:
    """The errors of all launches since ``install``: ``errors`` counts them by what is wrong and where."""

    def __init__(self) -> None:
        self.errors: Counter[str] = Counter()
        self._regions: list[_Region] = []
        self._firsts = self._ends = np.zeros(0, np.uint64)
        self._program = 0

    def install(self, patch: pytest.MonkeyPatch) -> None:
        builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
        arguments, place, load, store, atomic = (
            executor._init_args_hst,
            builder.set_grid_idx,
            builder.create_masked_load,
            builder.create_masked_store,
            builder.create_atomic_rmw,
        )

        def begin(launched: Any, *given: Any) -> Any:
            positional, named = arguments(launched, *given)
            self._begin([*positional, *named.values()])
            return positional, named

        def set_program(this: Any, x: int, y: int, z: int) -> None:
            columns, rows, _ = this.grid_dim
            self._program = 1 + x + columns * (y + rows * z)
            place(this, x, y, z)

        def masked_load(this: Any, pointers: Any, mask: Any, other: Any, *rest: Any) -> Any:
            self._load(pointers, mask)
            if other is None and not mask.data.all():
                dtype = pointers.get_element_ty()
                other = interpreter.TensorHandle(_poison(dtype, pointers.data.shape), dtype)
            return load(this, pointers, mask, other, *rest)

        def masked_store(this: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self._store(pointers, mask)
            return store(this, pointers, value, mask, *rest)

        def atomic_update(this: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self._update(pointers, mask)
            return atomic(this, operation, pointers, value, mask, *rest)

        patch.setattr(executor, "_init_args_hst", begin)
        patch.setattr(builder, "set_grid_idx", set_program)
        patch.setattr(builder, "create_masked_load", masked_load)
        patch.setattr(builder, "create_masked_store", masked_store)
        patch.setattr(builder, "create_atomic_rmw", atomic_update)

    def _begin(self, values: list[Any]) -> None:
        merged: list[tuple[int, int, int]] = []
        for first, end, itemsize in sorted(_extents(values)):
            if merged and first < merged[-1][1]:
                before = merged.pop()
                merged.append((before[0], max(end, before[1]), min(itemsize, before[2])))
            else:
                merged.append((first, end, itemsize))
        self._regions = [_Region(*region) for region in merged]
        self._firsts = np.array([region.first for region in self._regions], np.uint64)
        self._ends = np.array([region.end for region in self._regions], np.uint64)

    def _error(self, what: str) -> None:
        not_ours = (__file__, str(Path(triton.__file__).parent))
        frames = [frame for frame in traceback.extract_stack() if not frame.filename.startswith(not_ours)]
        self.errors[f"{what}: {Path(frames[-1].filename).name}:{frames[-1].lineno}, {frames[-1].line}"] += 1

    def _elements(self, pointers: Any, mask: Any) -> Iterator[tuple[_Region, Any]]:
        """The regions that an access goes to, with the numbers of the elements there."""
        itemsize = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
        if mask.data.dtype != np.bool_:
            self._error("a mask that is not of booleans")
        addresses, live = np.broadcast_arrays(pointers.data, mask.data)
        addresses = addresses[live.astype(bool)].astype(np.uint64)
        if addresses.size == 0:
            return
        if (addresses % np.uint64(itemsize)).any():
            self._error("not aligned")
        number = np.searchsorted(self._firsts, addresses, side="right") - 1
        inside = number >= 0
        inside[inside] = addresses[inside] + np.uint64(itemsize) <= self._ends[number[inside]]
        if not inside.all():
            self._error("outside of the launch's tensors")
        for i in np.unique(number[inside]):
            region = self._regions[i]
            offset = addresses[inside & (number == i)] - np.uint64(region.first)
            yield region, (offset // np.uint64(region.itemsize)).astype(np.int64)

    def _load(self, pointers: Any, mask: Any) -> None:
        for region, at in self._elements(pointers, mask):
            writer, reader = region.writer[at], region.reader[at]
            if (writer == self._program).any():
                self._error("reads what it wrote, without a barrier")
            if ((writer != 0) & (writer != self._program)).any():
                self._error("reads what another program writes")
            if region.by_atomics[at].any():
                self._error("reads what atomics change")
            region.reader[at] = np.where((reader == 0) | (reader == self._program), self._program, _SEVERAL)

    def _store(self, pointers: Any, mask: Any) -> None:
        for region, at in self._elements(pointers, mask):
            writer, reader = region.writer[at], region.reader[at]
            if np.unique(at).size < at.size or (writer == self._program).any():
                self._error("writes a place twice")
            if ((writer != 0) & (writer != self._program)).any():
                self._error("writes what another program writes")
            if ((reader != 0) & (reader != self._program)).any():
                self._error("writes what another program reads")
            if region.by_atomics[at].any():
                self._error("writes what atomics change")
            region.writer[at] = self._program

    def _update(self, pointers: Any, mask: Any) -> None:
        for region, at in self._elements(pointers, mask):
            if region.writer[at].any() or region.reader[at].any():
                self._error("changes by atomics what is read or written")
            region.by_atomics[at] = True
