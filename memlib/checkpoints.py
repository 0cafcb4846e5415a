"""States of a run on disk: safetensors with a JSON header, whole or absent, verified on load.

`<results>/checkpoints/<run_id>/epoch-0010.safetensors` is the model after 10 epochs;
`last.safetensors` is what an unfinished run needs to continue. Nothing is ever unpickled. The header
holds a digest of the tensors, so that a damaged or truncated file is an error and never a model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from memlib.errors import InputError
from memlib.storage import Storage

FORMAT = "memlib-checkpoint-1"
LAST = "last.safetensors"
_FOLDER = "checkpoints"
_PREFIX = "epoch-"
_SUFFIX = ".safetensors"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Named tensors, on the CPU, and the JSON facts stored with them."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class CheckpointFolder:
    """The checkpoints of one run."""

    storage: Storage
    run_id: str

    def save_epoch(self, epoch: int, model: nn.Module, facts: Mapping[str, Any]) -> None:
        """Keep the model's parameters and buffers as they are after `epoch` epochs."""
        self._save(_epoch_name(epoch), Checkpoint(model.state_dict(), {**facts, "epoch": epoch}))

    def load_epoch(self, epoch: int) -> Checkpoint:
        """Return the state dictionary kept at `epoch`, and the facts kept with it.

        Raises:
            InputError: that epoch was not kept (the message lists those that were), or the file is damaged.
        """
        try:
            return self._load(_epoch_name(epoch))
        except FileNotFoundError:
            kept = list(self.epochs())
            raise InputError(f"run {self.run_id} kept no checkpoint at epoch {epoch}; it kept {kept}.") from None

    def epochs(self) -> tuple[int, ...]:
        """Return the epochs that were kept, in order."""
        return _kept(self.storage.names(self._folder))

    def is_under_way(self) -> bool:
        """Return whether there is a state that an unfinished run would continue from."""
        return self.storage.exists(f"{self._folder}/{LAST}")

    def save_last(self, checkpoint: Checkpoint) -> None:
        """Replace what the unfinished run continues from."""
        self._save(LAST, checkpoint)

    def load_last(self) -> Checkpoint | None:
        """Return what the unfinished run continues from, None if it never got that far.

        Raises:
            InputError: the file is damaged.
        """
        try:
            return self._load(LAST)
        except FileNotFoundError:
            return None

    def remove_unfinished(self) -> None:
        """Remove what a killed writer of this run left behind."""
        self.storage.remove_unfinished(self._folder)

    def delete_last(self) -> None:
        """Remove what a finished run no longer needs."""
        self.storage.delete(f"{self._folder}/{LAST}")

    @property
    def _folder(self) -> str:
        return f"{_FOLDER}/{self.run_id}"

    def _save(self, name: str, checkpoint: Checkpoint) -> None:
        self.storage.write(f"{self._folder}/{name}", to_bytes(checkpoint))

    def _load(self, name: str) -> Checkpoint:
        path = f"{self._folder}/{name}"
        return from_bytes(self.storage.read(path), where=f"{self.storage.location}/{path}")


def kept_epochs(storage: Storage) -> dict[str, tuple[int, ...]]:
    """Return the epochs that each run kept, in order, from one listing.

    A run with a state to continue from is left out: what it kept may be of two trainings, one under way.
    """
    found = storage.names_by_folder(_FOLDER).items()
    return {run_id: _kept(names) for run_id, names in found if LAST not in names}


def to_bytes(checkpoint: Checkpoint) -> bytes:
    """Return the file content of a checkpoint; tensors that share memory are stored one by one."""
    tensors = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in checkpoint.tensors.items()}
    header = {"format": FORMAT, "digest": _digest(tensors), "facts": json.dumps(checkpoint.facts)}
    return save_safetensors(tensors, metadata=header)


def from_bytes(data: bytes, *, where: str) -> Checkpoint:
    """Return the checkpoint in `data`; `where` names it in errors.

    Raises:
        InputError: the data are truncated, changed, or not a checkpoint of this format.
    """
    try:
        tensors = load_safetensors(data)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    except (SafetensorError, ValueError) as error:
        raise InputError(f"checkpoint {where} is damaged ({error}); delete it and run the sweep again.") from error
    if header.get("format") != FORMAT:
        raise InputError(f"checkpoint {where} has format {header.get('format')!r}; this memlib reads {FORMAT!r}.")
    if header["digest"] != _digest(tensors):
        raise InputError(f"checkpoint {where} is damaged (its digest differs); delete it and run the sweep again.")
    return Checkpoint(tensors, json.loads(header["facts"]))


def load_model_state(model: nn.Module, state: Mapping[str, Tensor], *, where: str) -> None:
    """Copy a state into the model, in place; every name and shape must match.

    Raises:
        InputError: the state is another architecture's, or holds non-finite values.
    """
    check_state(model, state, where=where)
    model.load_state_dict(state, strict=True)


def check_state(model: nn.Module, state: Mapping[str, Tensor], *, where: str) -> None:
    """Raise InputError if `state` is another architecture's than the model's, or holds non-finite values."""
    own = model.state_dict()
    odd = [n for n in (own.keys() | state.keys()) if n not in own or n not in state or own[n].shape != state[n].shape]
    if odd:
        name = min(odd)
        shapes = [f"{tuple(tensors[name].shape)}" if name in tensors else "absent" for tensors in (state, own)]
        raise InputError(
            f"state {where} does not belong to this {type(model).__name__}: {name!r} is {shapes[0]} there and "
            f"{shapes[1]} here ({len(odd)} differ in all)."
        )
    broken = [name for name, t in state.items() if t.is_floating_point() and not t.isfinite().all()]
    if broken:
        raise InputError(f"state {where} has non-finite values in {broken[0]!r} ({len(broken)} tensors in all).")


def _kept(names: Iterable[str]) -> tuple[int, ...]:
    epochs = (n.removeprefix(_PREFIX).removesuffix(_SUFFIX) for n in names if n.startswith(_PREFIX))
    return tuple(sorted(int(epoch) for epoch in epochs))


def _epoch_name(epoch: int) -> str:
    return f"{_PREFIX}{epoch:04d}{_SUFFIX}"


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
