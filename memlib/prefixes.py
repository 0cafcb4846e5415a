"""What lies before the changed layer, computed once.

A network is cut before the first module of a layer group: the modules that have finished by then
are the prefix, the rest is the suffix. A suffix is the network's own module tree in which the
modules of the prefix hand out the output they once had, so whatever its `forward` does between
modules (residual additions, pooling) happens as written, for any architecture. Outputs that nothing
behind the cut reads are found by autograd and not kept.

Where a network cannot be cut (a parameter of its own is used at the very start, a module's output
is hidden from hooks), the suffix is the whole network: slower, never different.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from memlib.evaluation import class_logits, evaluation_mode
from memlib.grouping import LayerGroups

State = Mapping[str, Tensor]  # parameter or buffer name -> value
Boundary = Mapping[str, Tensor]  # module name -> its output, for one batch


@dataclass(frozen=True, eq=False)
class Suffix:
    """A network from a layer group on; it shares its tensors with the network it was cut from.

    crossing: the modules before the cut whose outputs it reads.
    behind: the modules that are first called behind the cut, or by what is.
    """

    network: nn.Module
    crossing: tuple[str, ...]
    behind: frozenset[str]

    def __call__(
        self, boundary: Boundary, inputs: Float[Tensor, "b ..."], state: State | None = None
    ) -> Float[Tensor, "b k"]:
        """Return the logits of the batch whose prefix outputs are `boundary`; `state` replaces tensors by name."""
        finished = {name: module for name, module in self.network.named_modules() if isinstance(module, _Finished)}
        try:
            for name, module in finished.items():
                # A copy: what follows may write into it, and other suffixes read the same boundary.
                module.output = boundary[name].clone() if name in self.crossing else module.unread(len(inputs))
            return functional_call(self.network, dict(state or {}), (inputs,))
        finally:
            if not torch.is_grad_enabled():  # a backward pass may run parts again (activation checkpointing)
                for module in finished.values():
                    module.output = None


def cut_before(
    model: nn.Module, sets: Sequence[Sequence[str]], groups: LayerGroups, example: Float[Tensor, "b ..."]
) -> list[Suffix]:
    """Return, for each set of layer groups, the suffix of `model` that begins where the set's first group is used.

    `example` are two or more inputs to try the cuts on. The model is left unchanged.

    Raises:
        InputError: the model returns no logits.
    """
    with torch.no_grad(), evaluation_mode(model):
        trace = _trace(model, example)
        expected = class_logits(model, model(example))
        return [_try_cut(model, trace, _owners(model, chosen, groups), example, expected) for chosen in sets]


def _try_cut(
    model: nn.Module, trace: Mapping[str, _Call], owners: set[str], example: Tensor, expected: Tensor
) -> Suffix:
    """Return the suffix from the owners' first use on; the whole network where it cannot be cut there."""
    cut = min(_first_use(owner, trace) for owner in owners)
    behind = frozenset(name for name, call in trace.items() if call.start >= cut)
    try:
        suffix = _cut(model, trace, cut, behind, example)
        logits = suffix(run_prefix(model, suffix.crossing, example), example)
        if torch.allclose(logits, expected, rtol=1e-4, atol=1e-5):
            return suffix
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        pass  # a forward that needs more of a module than its output
    return Suffix(model, (), behind)


@torch.no_grad()
def run_prefix(model: nn.Module, crossing: Iterable[str], inputs: Float[Tensor, "b ..."]) -> dict[str, Tensor]:
    """Return the outputs of the modules named `crossing` for one batch, running the model only as far as needed."""
    wanted = set(crossing)
    boundary: dict[str, Tensor] = {}
    if wanted:
        with _recording(model, wanted, boundary):
            try:
                model(inputs)
            except _AllRecorded:
                pass
    return boundary


class _AllRecorded(Exception):  # noqa: N818 - no error: it ends a forward pass early
    """Every wanted output is there."""


@contextmanager
def _recording(model: nn.Module, wanted: set[str], boundary: dict[str, Tensor]) -> Iterator[None]:
    def record(name: str, output: Tensor) -> None:
        boundary[name] = output.clone()  # what follows may write into it
        if len(boundary) == len(wanted):
            raise _AllRecorded

    handles = [
        module.register_forward_hook(lambda _m, _i, output, name=name: record(name, output))
        for name, module in model.named_modules()
        if name in wanted
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Call:
    """A module's calls in one forward pass, on the clock of all modules' starts and ends."""

    start: int
    end: int = -1
    times: int = 1
    output: object = None


class _Finished(nn.Module):
    """Stands for a module of the prefix and returns the output it had."""

    def __init__(self, original: nn.Module, output: Tensor, n_examples: int) -> None:
        super().__init__()
        self._original = (original,)  # in a tuple: its tensors are none of the suffix
        self._per_batch = output.shape[0] / n_examples
        self._like = torch.empty(0, dtype=output.dtype, device=output.device)
        self._shape = output.shape[1:]
        self.output: Tensor | None = None  # while a batch runs

    def forward(self, *_args: object, **_kwargs: object) -> Tensor | None:
        return self.output

    def unread(self, n_examples: int) -> Tensor:
        """Return an output that shows up in the logits if anything reads it after all."""
        shape = (round(self._per_batch * n_examples), *self._shape)
        return self._like.new_full((), torch.nan).expand(shape)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the original has
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_original"][0], name)


def _trace(model: nn.Module, example: Tensor) -> dict[str, _Call]:
    """Return when each module was called in one forward pass, and what it returned."""
    clock = itertools.count()
    calls: dict[str, _Call] = {}

    def begin(name: str) -> None:
        if name in calls:
            calls[name].times += 1
            next(clock)
        else:
            calls[name] = _Call(next(clock))

    def end(name: str, output: object) -> None:
        calls[name].end, calls[name].output = next(clock), output

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda _m, _i, name=name: begin(name)))
        handles.append(module.register_forward_hook(lambda _m, _i, output, name=name: end(name, output)))
    try:
        model(example)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _owners(model: nn.Module, chosen: Iterable[str], groups: LayerGroups) -> set[str]:
    """Return the names of the modules that hold a tensor of the groups, each by its first: tensors may be shared."""
    names = {name for group in chosen for name in (*groups.parameters[group], *groups.buffers[group])}
    tensors = {id(t) for n, t in itertools.chain(model.named_parameters(), model.named_buffers()) if n in names}
    return {
        name
        for name, module in model.named_modules()
        for tensor in itertools.chain(module.parameters(recurse=False), module.buffers(recurse=False))
        if id(tensor) in tensors
    }


def _cut(model: nn.Module, trace: Mapping[str, _Call], cut: int, behind: frozenset[str], example: Tensor) -> Suffix:
    finished = [n for n, c in trace.items() if c.times == 1 and 0 <= c.end < cut and isinstance(c.output, Tensor)]
    outermost = [n for n in finished if not any(n.startswith(f"{other}.") for other in finished)]
    if not outermost:
        return Suffix(model, (), behind)
    shared = {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}
    network = copy.deepcopy(model, shared)
    outputs: dict[str, Tensor] = {}
    for name in outermost:
        parent, _, child = name.rpartition(".")
        output = trace[name].output
        if isinstance(output, Tensor):
            outputs[name] = output
            setattr(
                network.get_submodule(parent), child, _Finished(model.get_submodule(name), output, example.shape[0])
            )
    return Suffix(network, tuple(_read_outputs(network, outputs, example)), behind)


def _first_use(owner: str, trace: Mapping[str, _Call]) -> int:
    """Return when the module, or the nearest one around it that is called, is first called."""
    while owner not in trace:
        owner = owner.rpartition(".")[0]
    return trace[owner].start


def _read_outputs(network: nn.Module, outputs: Mapping[str, Tensor], example: Tensor) -> list[str]:
    """Return the names of the outputs that reach the logits: those with a gradient, and those that can have none."""
    leaves = {n: o.detach().clone().requires_grad_() for n, o in outputs.items() if o.is_floating_point()}
    with torch.enable_grad():
        for name, output in outputs.items():
            network.get_submodule(name).output = leaves[name].clone() if name in leaves else output
        gradients = torch.autograd.grad(network(example).sum(), list(leaves.values()), allow_unused=True)
    read = {name for name, gradient in zip(leaves, gradients, strict=True) if gradient is not None}
    return [name for name in outputs if name in read or name not in leaves]
