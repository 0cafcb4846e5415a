"""Named random streams: every random choice of a run follows from its seed.

A stream is named by what it is for ("label_noise", "order", ...) and, where it repeats, by an
index such as the epoch. A new stream shifts no other, and an interrupted run finds each of its
streams again without having stored any state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def stream_seed(seed: int, name: str, *index: int) -> int:
    """Return the 63-bit seed of the stream `name` (and `index`, such as the epoch) of a run.

    Of it torch's CPU generator takes the lower 32 bits, so that two given streams coincide with probability 2**-32.
    """
    text = "/".join([str(seed), name, *map(str, index)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stream(seed: int, name: str, *index: int) -> torch.Generator:
    """Return a CPU generator at the start of the stream `name` of a run."""
    return torch.Generator().manual_seed(stream_seed(seed, name, *index))


@contextmanager
def global_stream(seed: int, name: str, *index: int, device: torch.device) -> Iterator[None]:
    """Run a block on a stream of its own where code only knows torch's global one.

    Initialization and `nn.Dropout` draw from the global stream; inside this block they draw from
    the named one, and afterwards the global stream of the CPU and of `device` is as it was.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        # torch.manual_seed would also seed every other device, whose state is not restored
        torch.default_generator.manual_seed(stream_seed(seed, name, *index))
        for cuda in devices:
            with torch.cuda.device(cuda):
                torch.cuda.manual_seed(stream_seed(seed, name, *index))
        yield
