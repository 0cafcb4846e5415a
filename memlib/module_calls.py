"""Which modules a forward pass calls, in which order, and what becomes of their outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

ACTIVATION_FUNCTIONS = (
    "relu", "relu_", "relu6", "leaky_relu", "elu", "selu", "gelu", "silu", "mish", "tanh", "sigmoid",
    "hardswish", "hardsigmoid", "hardtanh", "softplus", "glu",
)  # fmt: skip


@dataclass(eq=False)
class Calls:
    """One forward pass: the calls of layers, BatchNorms and modules without children, and of torch functions.

    Tensors are compared by identity and kept, so that no identity is used twice.
    """

    n_images: int
    modules: list[str] = field(default_factory=list)
    inputs: list[Tensor | None] = field(default_factory=list)
    outputs: list[Tensor | None] = field(default_factory=list)
    functions: list[tuple[str, tuple[object, ...]]] = field(default_factory=list)
    within_modules: list[bool] = field(default_factory=list)  # was the function called by such a module?

    @property
    def output_bytes(self) -> int:
        """Return the size of all modules' outputs."""
        return sum(output.nbytes for output in self.outputs if output is not None)

    def consumer(self, index: int) -> int | None:
        """Return the index of the next call whose input is the very output of call `index`, None without one.

        An output that the model changes in place (`out += identity`) is no longer what the call returned.
        """
        output = self.outputs[index]
        if self.changed_in_place(output):
            return None
        later = range(index + 1, len(self.modules))
        return next((i for i in later if output is not None and self.inputs[i] is output), None)

    def output_of(self, module: str) -> Tensor | None:
        """Return the output of the module's first call."""
        return self.outputs[self.modules.index(module)]

    def passed_to_a_function(self, tensor: Tensor) -> bool:
        """Return whether any torch function was given this very tensor."""
        return any(argument is tensor for _, arguments in self.functions for argument in arguments)

    def activation_function(self, tensor: Tensor | None) -> str | None:
        """Return the activation function the model itself applied to the tensor, None if it applied none."""
        return next((n for n in self._functions_on(tensor) if n in ACTIVATION_FUNCTIONS), None)

    def changed_in_place(self, tensor: Tensor | None) -> bool:
        """Return whether the model itself changed the tensor in place."""
        return any(_is_in_place(name) for name in self._functions_on(tensor))

    def _functions_on(self, tensor: Tensor | None) -> Iterator[str]:
        for (name, arguments), within in zip(self.functions, self.within_modules, strict=True):
            if not within and arguments and arguments[0] is tensor:
                yield name


def _is_in_place(function: str) -> bool:
    return function.startswith("__i") if function.endswith("__") else function.endswith("_")


def observe_calls(model: nn.Module, inputs: Tensor) -> Calls:
    """Return the calls of one forward pass; modes and gradients are left to the caller."""
    calls = Calls(len(inputs))
    with _watched(model, calls) as functions, functions:
        model(inputs)
    return calls


class _Functions(TorchFunctionMode):
    """Notes every torch function and its positional arguments; keyword arguments name no tensors we look for."""

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self.calls, self.depth = calls, 0

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: tuple[object, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        keywords = kwargs or {}
        name = getattr(func, "__name__", "")
        name += "_" if keywords.get("inplace") is True and not name.endswith("_") else ""
        self.calls.functions.append((name, (*args, *keywords.values())))
        self.calls.within_modules.append(self.depth > 0)
        return func(*args, **keywords)


@contextmanager
def _watched(model: nn.Module, calls: Calls) -> Iterator[_Functions]:
    functions = _Functions(calls)

    def entering(module: nn.Module, args: tuple[object, ...]) -> None:
        functions.depth += 1

    def leaving(name: str, args: tuple[object, ...], output: object) -> None:
        functions.depth -= 1
        calls.modules.append(name)
        calls.inputs.append(args[0] if args and isinstance(args[0], Tensor) else None)
        calls.outputs.append(output if isinstance(output, Tensor) else None)

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm | _ConvNd | nn.Linear) or next(module.children(), None) is None:
            handles.append(module.register_forward_pre_hook(entering))
            handles.append(
                module.register_forward_hook(lambda module, args, output, name=name: leaving(name, args, output))
            )
    try:
        yield functions
    finally:
        for handle in handles:
            handle.remove()
