"""The two numeric paths: bfloat16 where the device multiplies matrices in it faster, else float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal

import torch

from memlib.config import Precision


def resolve_precision(precision: Precision, device: torch.device) -> Literal["float32", "bfloat16"]:
    """Return the precision training uses on `device`; `auto` chooses the faster one.

    A CPU counts as having bfloat16 only with matrix tiles (AMX): its AVX-512 dot products alone
    were measured slower than float32 (docs/performance.md).
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return "bfloat16" if capabilities.get("amx_bf16") and capabilities.get("amx_tile") else "float32"


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which a forward pass runs in `precision`; parameters stay float32."""
    enabled = resolve_precision(precision, device) == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Run a block in which float32 means float32: no TF32 in a GPU's convolutions, which torch allows by default."""
    if device.type != "cuda":
        yield
        return
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
