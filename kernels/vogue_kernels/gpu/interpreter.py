"""Repairs of bfloat16 in Triton's interpreter (3.9 and before), imported only under TRITON_INTERPRET=1.

The interpreter keeps bfloat16 as uint16: tl.dot multiplies these as the integers they are, and casts cut digits off,
where a GPU rounds to the nearest, ties to even.
"""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_cast_impl, _create_dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot


def cast_impl(self, source, dtype):
    kinds = source.dtype.scalar, dtype.scalar
    if kinds == (tl.bfloat16, tl.float32):
        return TensorHandle((source.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
    if kinds == (tl.float32, tl.bfloat16):
        bits = np.ascontiguousarray(source.data).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return TensorHandle(np.where(np.isnan(source.data), 0x7FC0, rounded).astype(np.uint16), tl.bfloat16)
    return _cast_impl(self, source, dtype)


def create_dot(self, a, b, *rest):
    a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    return _create_dot(self, a, b, *rest)


InterpreterBuilder.cast_impl = cast_impl  # pyright: ignore[reportAttributeAccessIssue]
InterpreterBuilder.create_dot = create_dot  # pyright: ignore[reportAttributeAccessIssue]
