"""Work on many items in chunks that fit into memory, found by trying: a chunk that does not fit is halved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from memlib.errors import InputError

T = TypeVar("T")

CPU_BUDGET = 256 * 2**20  # bytes; larger chunks leave the caches and were measured no faster
SHARE_OF_FREE_MEMORY = 0.25  # of a GPU
OUT_OF_MEMORY = ("can't allocate memory", "bad_alloc", "STATUS_ALLOC_FAILED")  # PyTorch, C++, cuBLAS and cuDNN


@dataclass
class ChunkSize:
    """How many items go into one chunk; `run_in_chunks` halves it when memory runs out."""

    items: int


def memory_budget(device: torch.device) -> int:
    """Return the bytes that a chunk's activations and their gradients may take unless the caller says otherwise."""
    if device.type != "cuda":
        return CPU_BUDGET
    free, _ = torch.cuda.mem_get_info(device)
    return int(SHARE_OF_FREE_MEMORY * free)


def run_in_chunks(n: int, size: ChunkSize, work: Callable[[slice], T]) -> Iterator[T]:
    """Yield `work`'s results for consecutive chunks of n items, in order; `size` keeps what was found to fit.

    Raises:
        InputError: not even one item fits into memory.
    """
    start = 0
    while start < n:
        stop = min(start + size.items, n)
        result = _try(work, slice(start, stop))
        if result is not None:
            yield result
            start = stop
        elif stop - start == 1:
            raise InputError("one example at a time does not fit into memory; use a smaller model or another device.")
        else:
            size.items = (stop - start) // 2


def _try(work: Callable[[slice], T], chunk: slice) -> T | None:
    """Return the result, None if memory ran out; by then everything the attempt held is free again."""
    try:
        return work(chunk)
    except MemoryError:
        return None
    except RuntimeError as error:  # torch.OutOfMemoryError is one; CPU allocators and CUDA's libraries raise plain ones
        if not isinstance(error, torch.OutOfMemoryError) and not any(text in str(error) for text in OUT_OF_MEMORY):
            raise
        return None
