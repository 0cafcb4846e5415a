"""The two numeric paths: bfloat16 where the device multiplies matrices in it faster, else float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from memlib.config import Precision


def resolve_precision(precision: Precision, device: torch.device) -> Literal["float32", "bfloat16"]:
    """Return the precision training uses on `device`; `auto` chooses the faster one.

    The answer follows from the kind of device alone, so all nodes of a kind agree and an interrupted run
    continues as it began; a timing would not promise that. So a GPU that only emulates bfloat16 (a T4) is given it,
    too: beside newer ones, which take its work over, all runs are in one precision.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    return "bfloat16" if has_fast_bfloat16(getattr(torch.cpu, "get_capabilities", dict)()) else "float32"


def has_fast_bfloat16(capabilities: Mapping[str, object]) -> bool:
    """Return whether a CPU with these capabilities (`torch.cpu.get_capabilities`) multiplies faster in bfloat16.

    It does with matrix tiles (AMX), and with AMD's AVX-512 dot products, measured at 2.2 times the float32
    rate; an Intel CPU without tiles was measured at half of it (docs/performance.md).
    """
    if capabilities.get("amx_bf16") and capabilities.get("amx_tile"):
        return True
    return bool(capabilities.get("avx512_bf16")) and str(capabilities.get("cpu_name", "")).startswith("AMD")


@contextmanager
def autocast(precision: Precision, device: torch.device) -> Iterator[None]:
    """Run a block's forward pass in `precision`; parameters stay float32.

    On a CPU attention in bfloat16 is spelled out: the backward pass of the fused one was measured 9 times slower than
    in float32 there (docs/performance.md).
    """
    enabled = resolve_precision(precision, device) == "bfloat16"
    with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
        if enabled and device.type == "cpu":
            with sdpa_kernel(SDPBackend.MATH):
                yield
        else:
            yield


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
