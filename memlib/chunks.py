"""Work on many items in chunks that fit into memory, found by trying: a chunk that does not fit is halved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from memlib.errors import InputError

T = TypeVar("T")

CPU_BUDGET = 256 * 2**20  # bytes; larger chunks leave the caches and were measured no faster
SHARE_OF_FREE_MEMORY = 0.25  # of a GPU
PIXELS = 64 * 64  # of an image; of larger ones fewer make a chunk
OUT_OF_MEMORY = ("can't allocate memory", "bad_alloc", "STATUS_ALLOC_FAILED")  # PyTorch, C++, cuBLAS and cuDNN


@dataclass
class ChunkSize:
    """How many items go into one chunk; `run_in_chunks` halves it when memory runs out."""

    items: int


def memory_budget(device: torch.device) -> int:
    """Return the bytes that a chunk's activations and their gradients may take unless the caller says otherwise."""
    if device.type != "cuda":
        return CPU_BUDGET
    return int(SHARE_OF_FREE_MEMORY * free_memory(device))


def free_memory(device: torch.device) -> int:
    """Return the bytes of a GPU that this process can have: what is free, and what PyTorch holds back unused."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def images_at_once(images: Tensor, most: int, device: torch.device | None = None) -> int:
    """Return how many images (or model inputs) go into one forward pass: `most`, and fewer of more than 64 x 64 pixels.

    For there the activations of many do not fit, and a CPU's lack of memory ends a process instead of raising. A GPU's
    raises, so on such a `device` it is `most`; None where the answer must not depend on it.

    Raises:
        InputError: `most` is below 1.
    """
    if most < 1:
        raise InputError(f"{most} images are to be computed at once; give at least 1.")
    if device is not None and device.type == "cuda":
        return most
    return max(1, min(most, most * PIXELS // max(1, math.prod(images.shape[2:]))))


def run_in_chunks(n: int, size: ChunkSize, work: Callable[[slice], T]) -> Iterator[T]:
    """Yield `work`'s results for consecutive chunks of n items, in order; `size` keeps what was found to fit.

    What does not fit is known where the allocator refuses: on a GPU, and on a CPU whose memory is limited to a process.

    Raises:
        InputError: not even one item fits into memory.
    """
    start = 0
    while start < n:
        stop = min(start + size.items, n)
        result = run_if_it_fits(work, slice(start, stop))
        if result is not None:
            yield result
            start = stop
        elif stop - start == 1:
            raise InputError("one example at a time does not fit into memory; use a smaller model or another device.")
        else:
            size.items = (stop - start) // 2


def run_if_it_fits(work: Callable[..., T], *arguments: object) -> T | None:
    """Return the work's result, None if memory ran out; by then everything the attempt held is free again."""
    try:
        return work(*arguments)
    except MemoryError:
        return None
    except RuntimeError as error:  # torch.OutOfMemoryError is one; CPU allocators and CUDA's libraries raise plain ones
        if not isinstance(error, torch.OutOfMemoryError) and not any(text in str(error) for text in OUT_OF_MEMORY):
            raise
        return None
