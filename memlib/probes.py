"""Whether a network still computes what it computed when its state was kept.

A state dictionary fits any code with the same names and shapes: another activation, padding or epsilon of a newer
timm, an edited model, would be measured as if it were the network that was trained. So a kept state carries the
logits of a few training images, and whoever measures the network later compares.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor, nn

from memlib.datasets import ImageSet
from memlib.errors import InputError
from memlib.evaluation import predict_logits
from memlib.example_tied_dropout import dropout_layers, dropout_mode

FACT = "probe"
N_IMAGES = 8  # the first of the training set
TOLERANCE = 1e-3  # of the largest logit, as `bench/gpu_checks.py` holds a GPU to a CPU's margins


def probe_facts(model: nn.Module, train: ImageSet) -> dict[str, Any]:
    """Return what to keep beside the model's state: float32 logits [8, classes] of the first training images.

    Of a model with example-tied dropout in mode `scaled`. The model is left in the mode it was in.
    """
    return {FACT: _logits(model, train).tolist()}


def check_probe(model: nn.Module, train: ImageSet, facts: Mapping[str, Any], *, where: str) -> None:
    """Check that a model that was given a kept state computes what it did when that was kept.

    facts: those kept with the state; without a probe (kept by a memlib that made none) nothing is checked.

    Raises:
        InputError: logits differ by more than a thousandth of the largest one; `where` names the state.
    """
    if FACT not in facts:
        return
    then, now = torch.tensor(facts[FACT]), _logits(model, train)
    limit = TOLERANCE * then.nan_to_num(0.0, 0.0, 0.0).abs().max().item()  # a network that diverges is kept, too
    if not torch.allclose(now, then, rtol=0.0, atol=limit, equal_nan=True):
        difference = (now - then).abs().max().item()
        raise InputError(
            f"the network {where} no longer computes what it did when its state was kept (logits differ by "
            f"{difference:.2g}, at most {limit:.2g} is rounding): the code of {type(model).__name__}, or the version "
            "of torch, torchvision or timm, is another one; go back to that of then, or delete the run's checkpoints "
            "and run the sweep again to train it anew."
        )


def _logits(model: nn.Module, train: ImageSet) -> Float32[Tensor, "n k"]:
    device = next(model.parameters()).device  # where it is being trained or measured
    with dropout_mode(model, "scaled") if dropout_layers(model) else nullcontext():
        return predict_logits(model, train.images[:N_IMAGES], device=device)
