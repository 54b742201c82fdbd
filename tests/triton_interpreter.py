"""Repairs of Triton's CPU interpreter, triton 3.6 to 3.9. Call `repair()` before a kernel is defined.

Upstream's interpreter multiplies the bit patterns of bfloat16 operands in ``tl.dot``, truncates float32 to
bfloat16 where GPUs round to nearest even, and in 3.6 takes ``int()`` of one-element arrays, which NumPy
2.4 refuses. Without these the kernels could be tested in float32 alone.
"""

import dataclasses
import functools

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def repair() -> None:
    builder = interpreter.InterpreterBuilder
    create_dot, cast, fp_to_fp = builder.create_dot, builder.cast_impl, builder.create_fp_to_fp
    patch_lang_tensor = interpreter._patch_lang_tensor

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle(
            (x.data.astype(np.uint32) << 16).view(np.float32), tl.float32
        )

    def dot(self, a, b, d, *rest):
        return create_dot(self, widened(a), widened(b), d, *rest)

    def rounded(self, x, dtype):
        if x.dtype.scalar != tl.float32 or dtype.scalar != tl.bfloat16:
            return cast(self, x, dtype)
        bits = np.ascontiguousarray(x.data).view(np.uint32)
        half = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        half = np.where(np.isnan(x.data), np.uint16(0x7FC0), half)
        return interpreter.TensorHandle(half.reshape(x.data.shape), tl.bfloat16)

    def rounded_fp_to_fp(self, x, dtype, rounding):
        if rounding is None and x.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            return rounded(self, x, dtype)
        return fp_to_fp(self, x, dtype, rounding)

    def patch_index(tensor, scope):
        patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    patch_lang = interpreter._patch_lang
    patched: set[tuple[int, ...]] = set()

    def patch_lang_once(fn):
        # upstream looks for every builtin of the language at every call of a helper, a third of a test's time
        languages = tuple(id(x) for x in fn.__globals__.values() if x is tl or x is tl.core)
        if languages in patched:
            return interpreter._LangPatchScope()
        scope = patch_lang(fn)
        if not patched:
            # the kernel's, which upstream takes back when the grid is done; what helpers patch it leaves
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        patched.add(languages)
        return scope

    interpreter._patch_lang = patch_lang_once
    # upstream makes a dictionary of all types at every operation
    np_dtype = functools.cache(interpreter._get_np_dtype)
    interpreter._get_np_dtype = lambda x: np_dtype(tl.uint64 if x.scalar.is_ptr() else x.scalar)
    check_overflow(False)
    builder.create_dot = dot
    builder.cast_impl = rounded
    builder.create_fp_to_fp = rounded_fp_to_fp
    interpreter._patch_lang_tensor = patch_index


def check_overflow(is_on: bool) -> None:
    """Whether integer sums and products that overflow fail: each is computed in int64 too, a third of a kernel's time."""
    builder = interpreter.interpreter_builder
    # without debug upstream computes the check and ignores its result
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=is_on, debug=is_on)
