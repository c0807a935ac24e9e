# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the stem against torch's own operators; GPU only."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import conv2d, gelu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of the largest value: a rounding to the dtype, and to TF32 in cuDNN's float32.
MOST_ERROR = {torch.float32: 2e-3, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def assert_near(ours: torch.Tensor, expected: torch.Tensor) -> None:
    limit = MOST_ERROR[ours.dtype] * float(expected.abs().max())
    assert ours.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours.float(), expected.float(), atol=limit, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bins", "frames"), [(128, 100), (80, 37)])
def test_first_conv_is_gelu_of_a_convolution(dtype, bins, frames):
    from qwen3_asr_vllm.model.kernels import first_conv

    torch.manual_seed(0)
    x = torch.randn(7, frames, bins, device="cuda").transpose(1, 2)
    weight = torch.randn(160, 1, 3, 3, device="cuda").to(dtype)
    bias = torch.randn(160, device="cuda").to(dtype)
    expected = conv2d(x.to(dtype)[:, None], weight, bias, stride=2, padding=1)
    assert_near(first_conv(x, weight, bias), gelu(expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_gelu_adds_the_bias_first(dtype):
    from qwen3_asr_vllm.model.kernels import bias_gelu_

    torch.manual_seed(0)
    x = torch.randn(3, 480, 16, 13, device="cuda").to(dtype)
    bias = torch.randn(480, device="cuda").to(dtype)
    expected = gelu(x + bias[:, None, None])
    assert_near(bias_gelu_(x.clone(), bias), expected)
