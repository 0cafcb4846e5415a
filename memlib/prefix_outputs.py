"""The outputs of a network's frozen prefix, kept for every example where they fit: what retraining begins from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from memlib.batches import model_inputs
from memlib.chunks import ChunkSize, run_if_it_fits, run_in_chunks
from memlib.prefixes import Suffix, run_prefix

BatchSource = Callable[[Int64[Tensor, " b"]], Tensor]  # positions -> logits


class PrefixOutputs:
    """Gives the logits of examples by their positions; the frozen prefix's outputs are kept as long as they fit.

    model: with the prefix, in evaluation mode. suffix: the rest of it, in which groups may learn.
    at_once: examples of a forward pass of the prefix alone. budget: bytes of outputs to keep.
    """

    def __init__(self, model: nn.Module, suffix: Suffix, device: torch.device, *, at_once: int, budget: int) -> None:
        self._model, self._suffix, self._device = model, suffix, device
        self._at_once, self._left = at_once, budget
        self._kept: list[tuple[Tensor, dict[str, Tensor] | None]] = []

    def source(self, images: Tensor) -> BatchSource:
        """Return where to get the logits of these images; images given again (the same tensor) are run once."""
        known = [outputs for given, outputs in self._kept if given is images]
        kept = known[0] if known else self._keep(images)
        self._kept.append((images, kept))

        def logits(positions: Int64[Tensor, " b"]) -> Tensor:
            inputs = model_inputs(images[positions.to(images.device)], self._device)
            if kept is None:
                boundary = self._run(inputs)
            else:
                boundary = {name: outputs[positions.to(outputs.device)] for name, outputs in kept.items()}
            return self._suffix(boundary, inputs)

        return logits

    def _keep(self, images: Tensor) -> dict[str, Tensor] | None:
        """Return the prefix outputs of all images, None where they do not fit or are not one an example."""
        few = self._run(model_inputs(images[:2], self._device))
        n_bytes = sum(output.nbytes for output in few.values()) // len(images[:2]) * len(images)
        if not few or n_bytes > self._left or any(len(output) != len(images[:2]) for output in few.values()):
            return None
        kept = run_if_it_fits(lambda: {name: _empty_like(output, len(images)) for name, output in few.items()})
        if kept is None:
            return None
        self._left -= n_bytes

        def work(chunk: slice) -> tuple[slice, dict[str, Tensor]]:
            return chunk, self._run(model_inputs(images[chunk], self._device))

        for chunk, outputs in run_in_chunks(len(images), ChunkSize(self._at_once), work):
            for name, output in outputs.items():
                kept[name][chunk] = output
        return kept

    def _run(self, inputs: Tensor) -> dict[str, Tensor]:
        return run_prefix(self._model, self._suffix.crossing, inputs)


def _empty_like(output: Tensor, n: int) -> Tensor:
    layout = torch.channels_last if output.dim() == 4 else torch.contiguous_format
    return torch.empty(n, *output.shape[1:], dtype=output.dtype, device=output.device, memory_format=layout)
