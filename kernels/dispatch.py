"""The choice of an implementation: always by name, never by what happens to import."""

import os

import torch

IMPLEMENTATIONS = ("eager", "triton")


def use_triton(impl: str, tensor: torch.Tensor) -> bool:
    """Whether `impl` names the Triton kernels, after checking that they can run on `tensor`.

    Raises:
        ValueError: `impl` is unknown, or the kernels cannot run on `tensor`'s device or dtype.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r} is unknown; expected one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "eager":
        return False
    if not tensor.is_cuda and not interpreted():
        raise ValueError(
            f"impl='triton' got a tensor on {tensor.device}, expected cuda: use impl='eager', or set "
            "TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's interpreter"
        )
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"impl='triton' got {tensor.dtype}, expected float32, bfloat16 or float16")
    return True


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels: TRITON_INTERPRET is set, read as Triton reads it."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
