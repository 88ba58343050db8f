"""Compiled kernels: how they are compiled, and the machine operations numba lacks.

Addresses are plain `int64`; a kernel that takes one trusts it, so its Python caller checks first.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.compiler_lock import global_compiler_lock
from numba.extending import intrinsic

# A child forked while another thread compiles would wait for ever for that thread to end.
os.register_at_fork(
    before=global_compiler_lock.acquire,
    after_in_parent=global_compiler_lock.release,
    after_in_child=global_compiler_lock.release,
)

_PACKAGE = Path(__file__).resolve().parent


def _source_stamp() -> str:
    """Digest of all modules that kernels may stand in or take a constant from.

    numba itself looks at the module a kernel stands in only, but a kernel inlines what it calls.
    """
    digest = hashlib.blake2s(digest_size=8)
    parts = ("spec", "store", "ram", "gpu", "sizing")
    folders = (_PACKAGE, *(_PACKAGE / part for part in parts))
    for path in sorted(path for folder in folders for path in folder.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _cache_dir() -> str | None:
    """A writable directory for compiled code, or None: then every process compiles anew."""
    candidates = [
        os.environ.get("ENGRAM_CACHE_DIR"),
        os.environ.get("CACHE_DIRECTORY"),
        (os.environ.get("XDG_CACHE_HOME") or "~/.cache") + "/engram",
    ]
    for candidate in filter(None, candidates):
        try:
            path = Path(candidate).expanduser() / f"kernels-{_source_stamp()}"
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except (OSError, RuntimeError):  # not writable, or a user without a home
            continue
        if os.access(path, os.W_OK):
            return str(path)
    return None


_CACHE_DIR = _cache_dir()

CACHED = _CACHE_DIR is not None
"""Whether compiled kernels are kept for later processes."""

COMPILES = _CACHE_DIR is None or not any(Path(_CACHE_DIR).iterdir())
"""Whether this process compiles kernels anew, which takes up to a minute."""


def kernel(function: Callable[..., Any]) -> Any:
    """Compile `function` on first use: without the interpreter lock, cached where possible.

    Loops in kernels check no bounds and division follows NumPy (no exception), so that a kernel
    can neither raise nor need the interpreter.
    """
    with _cache() as cached:
        return numba.njit(nogil=True, error_model="numpy", cache=cached)(function)


def callback(signature: str) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function for C code to call, at once; rules as for `kernel`."""

    def decorate(function: Callable[..., Any]) -> Any:
        with _cache() as cached:
            return numba.cfunc(signature, nogil=True, error_model="numpy", cache=cached)(function)

    return decorate


@contextmanager
def _cache() -> Iterator[bool]:
    """While decorating: numba's cache in our place, and whether there is one.

    The setting is put back at once, because other users of numba in this process have caches of
    their own.
    """
    if _CACHE_DIR is None:
        yield False
        return
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = _CACHE_DIR
    try:
        yield True
    finally:
        numba.config.CACHE_DIR = before


def _pointer(builder: ir.IRBuilder, address: ir.Value, bits: int) -> ir.Value:
    return builder.inttoptr(address, ir.IntType(bits).as_pointer())


def _loader(bits: int, result: types.Integer) -> Any:
    @intrinsic
    def load(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.load(_pointer(builder, args[0], bits), align=1)

        return result(types.int64), codegen

    return load


def _storer(bits: int, value: types.Integer) -> Any:
    @intrinsic
    def store(typingctx: Any, address: Any, word: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.store(args[1], _pointer(builder, args[0], bits), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, value), codegen

    return store


load_u8: Any = _loader(8, types.uint8)
load_u32: Any = _loader(32, types.uint32)
load_u64: Any = _loader(64, types.uint64)
store_u8: Any = _storer(8, types.uint8)
store_u32: Any = _storer(32, types.uint32)
store_u64: Any = _storer(64, types.uint64)


@intrinsic
def _copy_bytes(typingctx: Any, target: Any, source: Any, count: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        cgutils.raw_memcpy(
            builder, _pointer(builder, args[0], 8), _pointer(builder, args[1], 8), args[2], 1
        )
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def _multiply_high(typingctx: Any, left: Any, right: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = ir.IntType(128)
        product = builder.mul(builder.zext(args[0], wide), builder.zext(args[1], wide))
        return builder.trunc(builder.lshr(product, ir.Constant(wide, 64)), ir.IntType(64))

    return types.uint64(types.uint64, types.uint64), codegen


@intrinsic
def _prefetch(typingctx: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = builder.module.declare_intrinsic(
            "llvm.prefetch", [byte], ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
        )
        builder.call(function, [builder.inttoptr(args[0], byte), flag(0), flag(3), flag(1)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


def _atomic_loader(ordering: str) -> Any:
    @intrinsic
    def load(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.load_atomic(_pointer(builder, args[0], 64), ordering, align=8)

        return types.uint64(types.int64), codegen

    return load


def _atomic_storer(ordering: str) -> Any:
    @intrinsic
    def store(typingctx: Any, address: Any, word: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.store_atomic(args[1], _pointer(builder, args[0], 64), ordering, align=8)
            return context.get_dummy_value()

        return types.void(types.int64, types.uint64), codegen

    return store


def _fencer(ordering: str) -> Any:
    @intrinsic
    def fence(typingctx: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.fence(ordering)
            return context.get_dummy_value()

        return types.void(), codegen

    return fence


@intrinsic
def _compare_exchange(typingctx: Any, address: Any, expected: Any, word: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(builder, args[0], 64)
        result = builder.cmpxchg(pointer, args[1], args[2], "seq_cst", "monotonic")
        return builder.extract_value(result, 1)

    return types.boolean(types.int64, types.uint64, types.uint64), codegen


@intrinsic
def _add_atomic(typingctx: Any, address: Any, increment: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _pointer(builder, args[0], 64), args[1], "monotonic")

    return types.uint64(types.int64, types.uint64), codegen


@intrinsic
def _pause(typingctx: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        name, operands = _PAUSES.get(platform.machine(), (None, []))
        if name is not None:
            kind = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
            builder.call(builder.module.declare_intrinsic(name, (), kind), operands)
        return context.get_dummy_value()

    return types.void(), codegen


_PAUSES = {
    "x86_64": ("llvm.x86.sse2.pause", []),
    "aarch64": ("llvm.aarch64.hint", [ir.Constant(ir.IntType(32), 1)]),
}

load_relaxed: Any = _atomic_loader("monotonic")
load_acquire: Any = _atomic_loader("acquire")
store_relaxed: Any = _atomic_storer("monotonic")
store_release: Any = _atomic_storer("release")
"""Atomic loads and stores of the 8-byte word at an address that is a multiple of 8."""

fence_acquire: Any = _fencer("acquire")
fence_release: Any = _fencer("release")
fence_full: Any = _fencer("seq_cst")
"""Memory fences, of the processor and of the compiler."""

compare_exchange: Any = _compare_exchange
"""`compare_exchange(address, expected, word)`: whether `word` replaced `expected` there."""

add_atomic: Any = _add_atomic
"""`add_atomic(address, increment)`: add to the word there; what it was before."""

pause: Any = _pause
"""`pause()`: tell the processor that this is a loop that waits."""

prefetch: Any = _prefetch
"""Ask the processor for the line at an address; harmless whatever the address."""

copy_bytes: Any = _copy_bytes
"""`copy_bytes(target, source, count)`: memcpy between two addresses that do not overlap."""

multiply_high: Any = _multiply_high
"""`multiply_high(a, b)`: the upper 64 bits of the 128-bit product of two uint64."""
