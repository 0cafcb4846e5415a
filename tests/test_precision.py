"""In which precision a block computes, and that nothing of it is left behind."""

import pytest
import torch
import torch.nn.functional as F

from memlib.precision import autocast, has_fast_bfloat16, resolve_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_block_computes_in_its_precision_and_parameters_stay_float32(precision, dtype):
    layer = torch.nn.Linear(2, 2)
    with autocast(precision, CPU):
        assert layer(torch.ones(1, 2)).dtype == dtype
    assert layer.weight.dtype == torch.float32
    assert layer(torch.ones(1, 2)).dtype == torch.float32


@pytest.mark.parametrize(("precision", "fused"), [("float32", True), ("bfloat16", False)])
def test_on_a_cpu_attention_in_bfloat16_is_spelled_out(precision, fused):
    def kernels():
        q = torch.ones(1, 2, 16, 8, requires_grad=True)
        with torch.profiler.profile(acc_events=True) as profile, autocast(precision, CPU):
            F.scaled_dot_product_attention(*[F.linear(q, torch.eye(8))] * 3)
        return {event.key for event in profile.key_averages()}

    assert ("aten::_scaled_dot_product_flash_attention_for_cpu" in kernels()) == fused


def test_which_attention_is_used_is_left_as_it_was():
    with pytest.raises(KeyError), autocast("bfloat16", CPU):
        raise KeyError
    assert torch.backends.cuda.flash_sdp_enabled()
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True, "amx_bf16": False}, True),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": False, "avx512_f": True}, False),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False, "amx_tile": False}, False),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True, "amx_tile": True}, True),
        ({"cpu_name": "Intel Xeon", "amx_bf16": True, "amx_tile": False}, False),
        ({}, False),
    ],
)
def test_bfloat16_is_fast_on_amx_and_on_amds_dot_products(capabilities, fast):
    assert has_fast_bfloat16(capabilities) is fast


def test_a_precision_that_is_asked_for_is_taken_and_auto_is_the_same_every_time():
    assert [resolve_precision(p, CPU) for p in ("float32", "bfloat16")] == ["float32", "bfloat16"]
    assert len({resolve_precision("auto", CPU) for _ in range(3)}) == 1
