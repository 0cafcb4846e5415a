import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from memlib.checkpoints import Checkpoint, CheckpointFolder, from_bytes, load_model_state, to_bytes
from memlib.errors import InputError
from memlib.models import ResNet9
from memlib.storage import open_storage


def model(width=0.0625):
    return ResNet9(in_channels=1, num_classes=3, width=width).to(memory_format=torch.channels_last)


def test_a_state_comes_back_to_the_bit(tmp_path):
    folder, saved = CheckpointFolder(open_storage(tmp_path), "run"), model()
    folder.save_epoch(4, saved, {"note": "x"})
    other = model()
    load_model_state(other, folder.load_epoch(4).tensors, where="epoch 4")
    for a, b in zip(saved.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_the_kept_epochs_are_listed_in_order_and_others_are_refused(tmp_path):
    folder = CheckpointFolder(open_storage(tmp_path), "run")
    for epoch in (10, 0, 2):
        folder.save_epoch(epoch, model(), {})
    assert folder.epochs() == (0, 2, 10)
    with pytest.raises(InputError, match=r"kept no checkpoint at epoch 5; it kept \[0, 2, 10\]"):
        folder.load_epoch(5)


def test_what_an_unfinished_run_continues_from_is_replaced_and_removed(tmp_path):
    folder = CheckpointFolder(open_storage(tmp_path), "run")
    assert folder.load_last() is None
    for value in (1.0, 2.0):
        folder.save_last(Checkpoint({"x": torch.tensor([value])}, {"epoch": value}))
    last = folder.load_last()
    assert last is not None
    assert last.tensors["x"].item() == 2.0
    assert last.facts == {"epoch": 2.0}
    folder.delete_last()
    assert folder.load_last() is None


@given(cut=st.integers(1, 400), seed=st.integers(0, 5))
def test_a_truncated_file_is_an_error_and_never_a_model(cut, seed):
    data = to_bytes(Checkpoint({"x": torch.arange(50.0) + seed}, {"a": 1}))
    with pytest.raises(InputError, match="checkpoint somewhere is damaged"):
        from_bytes(data[: max(0, len(data) - cut)], where="somewhere")


def test_a_changed_byte_is_an_error(tmp_path):
    data = bytearray(to_bytes(Checkpoint({"x": torch.arange(50.0)}, {})))
    data[-3] ^= 1
    with pytest.raises(InputError, match="its digest differs"):
        from_bytes(bytes(data), where="somewhere")


def test_a_state_of_another_architecture_is_refused():
    with pytest.raises(InputError, match="state wide does not belong to this ResNet9: "):
        load_model_state(model(), model(width=0.125).state_dict(), where="wide")
    with pytest.raises(InputError, match="does not belong to this Linear"):
        load_model_state(nn.Linear(2, 2), model().state_dict(), where="other")


def test_non_finite_weights_are_refused():
    state = model().state_dict()
    state["conv1.conv.weight"] = state["conv1.conv.weight"] * torch.nan
    with pytest.raises(InputError, match="non-finite values in 'conv1.conv.weight'"):
        load_model_state(model(), state, where="broken")


def test_nothing_of_ours_is_ever_unpickled_from_disk():
    root = Path(__file__).parent.parent
    sources = [path for folder in ("memlib", "sweeps", "analysis", "bench") for path in (root / folder).rglob("*.py")]
    assert len(sources) > 30
    for path in sources:
        assert not re.search(r"torch\.load|import pickle|pickle\.load|allow_pickle", path.read_text()), path
