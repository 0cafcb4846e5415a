"""A GPU on machines without one: tensors that say they are on `cuda:0` and are computed on the CPU.

It refuses what a GPU refuses: operations on tensors of two devices, CPU tensors indexed from the GPU, NumPy.
So tests find what was left on the wrong device, and can compare what comes out bit by bit. What it cannot show:
the GPU's own kernels, their rounding, autocast, and memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
ACROSS_DEVICES = (aten.copy_.default, aten._to_copy.default, *INDEXING)


class OnGPU(torch.Tensor):
    """A tensor on the pretended GPU; `inner` is what it is computed with."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnGPU:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            requires_grad=inner.requires_grad,
        )
        made.inner = inner
        return made

    device = property(lambda self: GPU)  # autograd, in C++, takes it for a CPU tensor, and needs no GPU
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def __repr__(self) -> str:
        return f"OnGPU({self.inner!r})"

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(tensors, _context, _size, _stride):
        return OnGPU(tensors["inner"])

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in (torch.Tensor.numpy, torch.Tensor.__array__):
                raise TypeError("can't convert cuda:0 device type tensor to numpy")
            if func == torch.Tensor.data.__set__:
                args[0].inner = args[1].inner
            if func is torch.Tensor.tolist:
                return _to_cpu(args[0]).tolist()
            if func is torch.Tensor.cpu:
                return _to_cpu(args[0])
            if func is torch.Tensor.to and isinstance(args[0], OnGPU):
                return _move(*args, **kwargs)
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Pretending(TorchDispatchMode):
    """Sees what no `OnGPU` takes part in: tensors made on the GPU, or moved there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


@contextmanager
def pretended_gpu(*, free: int = 2**33) -> Iterator[torch.device]:
    """Run a block on a machine with a GPU of which `free` bytes of memory are free; gives the device."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "is_bf16_supported": lambda: True,
            "mem_get_info": lambda device: (free, 2 * free),
            "memory_reserved": lambda device: 0,
            "memory_allocated": lambda device: 0,
            "get_device_name": lambda device: "none at all",
            "device": nullcontext,
            "get_rng_state": lambda device: torch.empty(0),
            "set_rng_state": lambda state, device: None,
            "manual_seed": lambda seed: None,  # it draws from the CPU's stream, which is seeded beside it
        }.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda"): made on the CPU, then moved
        try:
            with _Pretending():
                yield GPU
        finally:
            torch._C._set_only_lift_cpu_tensors(lifted)


_leaving: list[bool] = []  # not empty while a tensor is moved to the CPU: kernels name the CPU for their own copies


def _to_cpu(tensor: torch.Tensor, **how: object) -> torch.Tensor:
    _leaving.append(True)
    try:
        return aten._to_copy(tensor, device=CPU, **how)
    finally:
        _leaving.pop()


def _move(tensor: OnGPU, *where: object, copy: bool = False, **how: object) -> torch.Tensor:
    """Do `tensor.to(...)`."""
    named = [w.device if isinstance(w, torch.Tensor) else w for w in where]
    device, dtype, _, layout = torch._C._nn._parse_to(*named, **how)
    kept = {"dtype": dtype or tensor.dtype, "memory_format": layout or torch.preserve_format}
    if device is not None and device.type == "cpu":
        return _to_cpu(tensor, **kept)
    return torch.Tensor.to(tensor, copy=copy, **kept)


def _run(func, args, kwargs):
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    on_gpu = [isinstance(tensor, OnGPU) for tensor in tensors]
    _check(func, tensors, on_gpu)
    inner_args, inner_kwargs = tree_map_only(OnGPU, lambda tensor: tensor.inner, (args, kwargs))
    device = kwargs.get("device")
    if device is not None:
        inner_kwargs["device"] = CPU
    found = func(*inner_args, **inner_kwargs)
    if device is not None and device.type == "cuda":
        stays = False
    elif func is aten.copy_.default:
        stays = not on_gpu[0]
    else:
        stays = not any(on_gpu) or (func is aten._to_copy.default and bool(_leaving))
    if stays:
        return found
    found = tree_map_only(torch.Tensor, OnGPU, found)
    return return_and_correct_aliasing(func, args, kwargs, found) if any(on_gpu) else found


def _check(func, tensors, on_gpu) -> None:
    """Refuse what a GPU refuses; single numbers may come from the CPU, and so may indices."""
    if func in INDEXING and any(on_gpu) and not on_gpu[0]:
        raise RuntimeError(f"{func}: indices should be on the same device as the indexed tensor (cpu)")
    strays = [tensor for tensor, there in zip(tensors, on_gpu, strict=True) if not there and tensor.dim() > 0]
    if any(on_gpu) and strays and func not in ACROSS_DEVICES:
        raise RuntimeError(
            f"{func}: expected all tensors to be on the same device, but found at least two, cuda:0 and cpu"
        )
