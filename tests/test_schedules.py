import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memlib.config import TrainingConfig
from memlib.schedules import learning_rate


def rates(steps, **settings):
    config = TrainingConfig(**settings)
    return [learning_rate(config, step=s, steps=steps) for s in range(steps)]


def test_cosine_warms_up_linearly_over_ten_percent_and_falls_to_zero():
    got = rates(100, schedule="cosine", peak_lr=0.01)
    assert got[:10] == pytest.approx([0.001 * (i + 1) for i in range(10)])
    assert got[10:] == pytest.approx([0.005 * (1 + math.cos(math.pi * i / 90)) for i in range(90)])


def test_triangular_peaks_at_epoch_ten_of_twenty_five():
    got = rates(250, schedule="triangular", peak_lr=0.1, warmup=0.4)
    assert max(got) == pytest.approx(0.1)
    assert got.index(max(got)) == 99
    assert got[-1] == pytest.approx(0.1 / 150)


def test_one_cycle_is_torchs_own():
    steps, warmup = 200, 0.3
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps, pct_start=warmup)
    expected = []
    for _ in range(steps - 1):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    ours = rates(steps, schedule="one_cycle", peak_lr=0.1, warmup=warmup)
    # theirs starts one step before the first rise and reaches the very end
    assert max(abs(a - b) for a, b in zip(ours, expected, strict=False)) < 0.003


@given(
    schedule=st.sampled_from(["cosine", "triangular", "one_cycle"]),
    warmup=st.floats(0, 0.9),
    steps=st.integers(1, 300),
)
def test_every_step_has_a_rate_above_zero_and_none_is_above_the_peak(schedule, warmup, steps):
    got = rates(steps, schedule=schedule, warmup=warmup, peak_lr=0.5)
    assert all(0 < rate <= 0.5 + 1e-12 for rate in got)
