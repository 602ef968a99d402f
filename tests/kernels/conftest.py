"""Where the kernels run: on the GPU if there is one, else in Triton's interpreter on CPU tensors."""

from __future__ import annotations

import pytest
import torch

ON_GPU = torch.cuda.is_available()
pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture(scope="session")
def device() -> str:
    """The device of the kernels' operands."""
    return "cuda" if ON_GPU else "cpu"


@pytest.fixture(scope="session", autouse=True)
def _interpreter() -> None:
    if ON_GPU:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    assert isinstance(tl.zeros, interpreter.InterpretedFunction), (
        "Triton was imported before TRITON_INTERPRET was set; run the whole suite with TRITON_INTERPRET=1"
    )
    _teach_bf16_products(interpreter)


def _teach_bf16_products(interpreter) -> None:
    """The interpreter keeps bf16 as its 16 bits and would multiply those as integers: widen them first, as the hardware
    does."""
    import numpy as np
    import triton.language as tl

    builder = interpreter.interpreter_builder
    original = builder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(a, b, d, *rest):
        return original(widened(a), widened(b), d, *rest)

    builder.create_dot = create_dot
