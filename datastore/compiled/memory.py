"""Memory that other processes and the kernel also write: atomics, unaligned header fields, copies, prefetches.

Numba hoists plain loads out of loops and LLVM may reorder plain stores; words shared with another process go through
`load_acquire`, `store_release` and `compare_and_swap`. Header fields sit at any byte, so they are read with one unaligned
load each (byte-by-byte assembly measured 3 to 5 times slower through Numba's index checks).

Every function takes an array and an index in *elements* of that array; in the checked mode (NUMBA_BOUNDSCHECK=1) an access
outside the array raises IndexError as ordinary indexing does.
"""

from __future__ import annotations

import platform
import sys
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from datastore.base import CHECKED
from datastore.compiled import INTERPRETED, inline

U16, U32, U64 = np.uint16, np.uint32, np.uint64


def _pointer(context: Any, builder: Any, signature: Any, arguments: Any, bits: int) -> Any:
    """Return the LLVM pointer to element `arguments[1]` of the array `arguments[0]`, as a pointer to `bits` wide integers."""
    array = signature.args[0]
    data = context.make_array(array)(context, builder, arguments[0]).data
    index = context.cast(builder, arguments[1], signature.args[1], types.intp)
    element = builder.gep(data, [index])
    return builder.bitcast(element, ir.IntType(bits).as_pointer())


def _bits(array: Any) -> int:
    return int(array.dtype.bitwidth)


@intrinsic
def _load_acquire(typingctx, array, index):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        bits = _bits(signature.args[0])
        return builder.load_atomic(_pointer(context, builder, signature, arguments, bits), "acquire", bits // 8)

    return array.dtype(array, index), generate


@intrinsic
def _store_release(typingctx, array, index, value):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        bits = _bits(signature.args[0])
        builder.store_atomic(arguments[2], _pointer(context, builder, signature, arguments, bits), "release", bits // 8)
        return context.get_dummy_value()

    return types.void(array, index, array.dtype), generate


@intrinsic
def _compare_and_swap(typingctx, array, index, expected, desired):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        pointer = _pointer(context, builder, signature, arguments, _bits(signature.args[0]))
        pair = builder.cmpxchg(pointer, arguments[2], arguments[3], "acq_rel", "acquire")
        return builder.extract_value(pair, 0)

    return array.dtype(array, index, array.dtype, array.dtype), generate


@intrinsic
def _fetch_add(typingctx, array, index, delta):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        pointer = _pointer(context, builder, signature, arguments, _bits(signature.args[0]))
        return builder.atomic_rmw("add", pointer, arguments[2], "acq_rel")

    return array.dtype(array, index, array.dtype), generate


def _unaligned_load(bits: int, kind: Any) -> Any:
    @intrinsic
    def load(typingctx, array, index):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            instruction = builder.load(_pointer(context, builder, signature, arguments, bits))
            instruction.align = 1
            return instruction

        return kind(array, index), generate

    return load


def _unaligned_store(bits: int, kind: Any) -> Any:
    @intrinsic
    def store(typingctx, array, index, value):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            instruction = builder.store(arguments[2], _pointer(context, builder, signature, arguments, bits))
            instruction.align = 1
            return context.get_dummy_value()

        return types.void(array, index, kind), generate

    return store


def _byte_swap(bits: int, kind: Any) -> Any:
    @intrinsic
    def swap(typingctx, value):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            return builder.bswap(arguments[0])

        return kind(kind), generate

    return swap


_load16, _load32, _load64 = (_unaligned_load(n, k) for n, k in ((16, types.uint16), (32, types.uint32), (64, types.uint64)))
_store16, _store32, _store64 = (_unaligned_store(n, k) for n, k in ((16, types.uint16), (32, types.uint32), (64, types.uint64)))
_swap16, _swap32 = (_byte_swap(n, k) for n, k in ((16, types.uint16), (32, types.uint32)))


@intrinsic
def _copy(typingctx, target, target_at, source, source_at, count):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        def address(array_at: int) -> Any:
            array, index = signature.args[array_at], signature.args[array_at + 1]
            data = context.make_array(array)(context, builder, arguments[array_at]).data
            offset = context.cast(builder, arguments[array_at + 1], index, types.intp)
            return builder.bitcast(builder.gep(data, [offset]), ir.IntType(8).as_pointer())

        size = context.cast(builder, arguments[4], signature.args[4], types.int64)
        size = builder.mul(size, ir.Constant(ir.IntType(64), signature.args[0].dtype.bitwidth // 8))
        pointer = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, pointer, ir.IntType(64), ir.IntType(1)])
        function = builder.module.globals.get("llvm.memmove.p0.p0.i64")
        if function is None:
            function = ir.Function(builder.module, kind, "llvm.memmove.p0.p0.i64")
        builder.call(function, [address(0), address(2), size, ir.Constant(ir.IntType(1), 0)])
        return context.get_dummy_value()

    return types.void(target, target_at, source, source_at, count), generate


@intrinsic
def _prefetch(typingctx, array, index):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        pointer = _pointer(context, builder, signature, arguments, 8)
        word = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), word, word, word])
        function = builder.module.globals.get("llvm.prefetch.p0")
        if function is None:
            function = ir.Function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [pointer] + [ir.Constant(word, n) for n in (1, 3, 1)])
        return context.get_dummy_value()

    return types.void(array, index), generate


@intrinsic
def _trailing_zeros(typingctx, value):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), generate


@intrinsic
def _leading_zeros(typingctx, value):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.ctlz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), generate


@intrinsic
def _fence(typingctx):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        builder.fence("acq_rel")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _pause(typingctx):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        if _X86:
            name = "llvm.x86.sse2.pause"
            function = builder.module.globals.get(name)
            if function is None:
                function = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), []), name)
            builder.call(function, [])
        return context.get_dummy_value()

    return types.void(), generate


_X86 = platform.machine() in ("x86_64", "AMD64")


@inline
def _check(array: np.ndarray, index: int, count: int) -> None:
    if CHECKED and (np.int64(index) < 0 or np.int64(index) + np.int64(count) > array.size):
        raise IndexError("access outside the array")


@inline
def load_acquire(array: np.ndarray, index: int) -> Any:
    """Return element `index` of a shared uint32 or uint64 array; later accesses are not moved before it."""
    _check(array, index, 1)
    return _load_acquire(array, index)


@inline
def store_release(array: np.ndarray, index: int, value: int) -> None:
    """Store `value` to element `index` of a shared array; earlier accesses are not moved behind it."""
    _check(array, index, 1)
    _store_release(array, index, array.dtype.type(value))


@inline
def compare_and_swap(array: np.ndarray, index: int, expected: int, desired: int) -> Any:
    """Store `desired` if element `index` is `expected`; return the value found (success: it equals `expected`)."""
    _check(array, index, 1)
    return _compare_and_swap(array, index, array.dtype.type(expected), array.dtype.type(desired))


@inline
def fetch_add(array: np.ndarray, index: int, delta: int) -> Any:
    """Add `delta` to element `index` atomically; return the value before."""
    _check(array, index, 1)
    return _fetch_add(array, index, array.dtype.type(delta))


@inline
def fence() -> None:
    """Keep earlier accesses before and later ones behind this point, except a store before a later load.

    It orders plain accesses, which the compiler may otherwise move past a release store: a process killed at any
    instruction leaves a prefix of the stores. No instruction on x86.
    """
    _fence()


@inline
def load16(frame: np.ndarray, at: int) -> Any:
    """Return the 16-bit integer, in host byte order, at byte `at` of a uint8 array."""
    _check(frame, at, 2)
    return _load16(frame, at)


@inline
def load32(frame: np.ndarray, at: int) -> Any:
    """Return the 32-bit integer, in host byte order, at byte `at` of a uint8 array."""
    _check(frame, at, 4)
    return _load32(frame, at)


@inline
def load64(frame: np.ndarray, at: int) -> Any:
    """Return the 64-bit integer, in host byte order, at byte `at` of a uint8 array."""
    _check(frame, at, 8)
    return _load64(frame, at)


@inline
def store16(frame: np.ndarray, at: int, value: int) -> None:
    """Store a 16-bit integer, in host byte order, at byte `at` of a uint8 array."""
    _check(frame, at, 2)
    _store16(frame, at, U16(value))


@inline
def store32(frame: np.ndarray, at: int, value: int) -> None:
    """Store a 32-bit integer, in host byte order, at byte `at` of a uint8 array."""
    _check(frame, at, 4)
    _store32(frame, at, U32(value))


@inline
def store64(frame: np.ndarray, at: int, value: int) -> None:
    """Store a 64-bit integer, in host byte order, at byte `at` of a uint8 array."""
    _check(frame, at, 8)
    _store64(frame, at, U64(value))


@inline
def network16(frame: np.ndarray, at: int) -> Any:
    """Return the 16-bit integer in network byte order at byte `at` of a uint8 array."""
    _check(frame, at, 2)
    return _swap16(_load16(frame, at))


@inline
def network32(frame: np.ndarray, at: int) -> Any:
    """Return the 32-bit integer in network byte order at byte `at` of a uint8 array."""
    _check(frame, at, 4)
    return _swap32(_load32(frame, at))


@inline
def put_network16(frame: np.ndarray, at: int, value: int) -> None:
    """Store a 16-bit integer in network byte order at byte `at` of a uint8 array."""
    _check(frame, at, 2)
    _store16(frame, at, _swap16(U16(value)))


@inline
def put_network32(frame: np.ndarray, at: int, value: int) -> None:
    """Store a 32-bit integer in network byte order at byte `at` of a uint8 array."""
    _check(frame, at, 4)
    _store32(frame, at, _swap32(U32(value)))


@inline
def copy(target: np.ndarray, target_at: int, source: np.ndarray, source_at: int, count: int) -> None:
    """Copy `count` elements between two arrays of the same element size; the ranges may overlap."""
    _check(target, target_at, count)
    _check(source, source_at, count)
    _copy(target, target_at, source, source_at, count)


@inline
def prefetch(array: np.ndarray, index: int) -> None:
    """Ask for the cache line of element `index`, for writing; harmless wherever it points."""
    _prefetch(array, index)


@inline
def trailing_zeros(value: int) -> Any:
    """Return the number of zero bits below the lowest set bit of a uint64; 64 for zero."""
    return _trailing_zeros(U64(value))


@inline
def leading_zeros(value: int) -> Any:
    """Return the number of zero bits above the highest set bit of a uint64; 64 for zero."""
    return _leading_zeros(U64(value))


@inline
def pause() -> None:
    """Tell the processor that this is a spin loop."""
    _pause()


if INTERPRETED:  # the same contracts in plain Python: slow, in one thread only, for debuggers and the simulator's mutants

    def load_acquire(array: np.ndarray, index: int) -> Any:
        return array[index]

    def store_release(array: np.ndarray, index: int, value: int) -> None:
        array[index] = value

    def compare_and_swap(array: np.ndarray, index: int, expected: int, desired: int) -> Any:
        found = array[index]
        if found == expected:
            array[index] = desired
        return found

    def fetch_add(array: np.ndarray, index: int, delta: int) -> Any:
        found = array[index]
        array[index] = found + array.dtype.type(delta)
        return found

    def fence() -> None:
        pass

    def pause() -> None:
        pass

    def prefetch(array: np.ndarray, index: int) -> None:
        pass

    def trailing_zeros(value: int) -> Any:
        return (int(value) & -int(value)).bit_length() - 1 if value else 64

    def leading_zeros(value: int) -> Any:
        return 64 - int(value).bit_length()

    def network16(frame: np.ndarray, at: int) -> Any:
        return int.from_bytes(frame[at : at + 2].tobytes(), "big")

    def network32(frame: np.ndarray, at: int) -> Any:
        return int.from_bytes(frame[at : at + 4].tobytes(), "big")

    def put_network16(frame: np.ndarray, at: int, value: int) -> None:
        frame[at : at + 2] = np.frombuffer(int(value & 0xFFFF).to_bytes(2, "big"), np.uint8)

    def put_network32(frame: np.ndarray, at: int, value: int) -> None:
        frame[at : at + 4] = np.frombuffer(int(value & 0xFFFFFFFF).to_bytes(4, "big"), np.uint8)

    def load16(frame: np.ndarray, at: int) -> Any:
        return int.from_bytes(frame[at : at + 2].tobytes(), sys.byteorder)

    def load32(frame: np.ndarray, at: int) -> Any:
        return int.from_bytes(frame[at : at + 4].tobytes(), sys.byteorder)

    def load64(frame: np.ndarray, at: int) -> Any:
        return U64(int.from_bytes(frame[at : at + 8].tobytes(), sys.byteorder))

    def copy(target: np.ndarray, target_at: int, source: np.ndarray, source_at: int, count: int) -> None:
        target[target_at : target_at + count] = source[source_at : source_at + count].copy()
