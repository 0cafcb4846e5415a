import pytest
import torch

from memlib.precision import has_fast_bfloat16, resolve_precision

CPU = torch.device("cpu")


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
