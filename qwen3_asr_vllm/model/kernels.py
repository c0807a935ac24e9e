# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the encoder's stem, for operations that libraries do slowly on GPUs.

    first_conv   a convolution of one input channel, with its bias and GELU; cuDNN's takes longer
                 without either, and each is a pass over 3 MB a chunk of its own
    bias_gelu_   bias and GELU in one pass

Sums are float32 and rounded once, where torch rounds after the convolution and after the bias.
"""

from __future__ import annotations

import torch
from vllm.triton_utils import tl, triton

ROWS_AT_ONCE = 128  # output positions of a program
CHANNELS_AT_ONCE = 128
VALUES_AT_ONCE = 2048


def first_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """GELU of a 3 x 3 convolution, stride 2, padding 1, of one channel.

    ``x``: (C, M, F) of any strides and float type, rounded to that of ``weight``,
    (channels, 1, 3, 3). Returns (C, channels, ceil(M / 2), ceil(F / 2)), channels last.
    """
    num_chunks, height, width = x.shape
    channels = len(weight)
    out_height, out_width = (height + 1) // 2, (width + 1) // 2
    out = torch.empty(
        (num_chunks, channels, out_height, out_width),
        dtype=weight.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    num_rows = num_chunks * out_height * out_width
    _first_conv[(triton.cdiv(num_rows, ROWS_AT_ONCE),)](
        x,
        weight,
        bias,
        out,
        num_rows,
        *x.stride(),
        height,
        width,
        out_height,
        out_width,
        channels,
        ROWS_AT_ONCE,
        CHANNELS_AT_ONCE,
    )
    return out


def bias_gelu_(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """GELU of ``x + bias``, (C, channels, height, width), channels last: in the place of ``x``,
    if it was so before."""
    x = x.contiguous(memory_format=torch.channels_last)
    blocks = triton.cdiv(x.numel(), VALUES_AT_ONCE)
    _bias_gelu[(blocks,)](x, bias, x.numel(), len(bias), VALUES_AT_ONCE)
    return x


@triton.jit
def _gelu(x):  # type: ignore[no-untyped-def]
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit(do_not_specialize=["num_rows"])
def _first_conv(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    out,
    num_rows,
    chunk_stride,
    row_stride,
    column_stride,
    height,
    width,
    out_height,
    out_width,
    channels: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    chunk = row // (out_height * out_width)
    top = row // out_width % out_height * 2 - 1
    left = row % out_width * 2 - 1
    # 16 taps, the fewest of a matrix unit: 4 x 4, whose last row and column are zero
    tap = tl.arange(0, 16)
    down, right = tap // 4, tap % 4
    y, z = top[:, None] + down[None, :], left[:, None] + right[None, :]
    is_inside = (y >= 0) & (y < height) & (z >= 0) & (z < width) & (row < num_rows)[:, None]
    places = chunk[:, None] * chunk_stride + y * row_stride + z * column_stride
    patch = tl.load(x + places, mask=is_inside, other=0.0).to(weight.dtype.element_ty)
    has_weight = ((down < 3) & (right < 3))[:, None]
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        is_channel = channel < channels
        weights = tl.load(
            weight + channel[None, :] * 9 + (down * 3 + right)[:, None],
            mask=has_weight & is_channel[None, :],
            other=0.0,
        )
        biases = tl.load(bias + channel, mask=is_channel, other=0.0)
        total = tl.dot(patch, weights, input_precision="ieee") + biases.to(tl.float32)[None, :]
        tl.store(
            out + row[:, None] * channels + channel[None, :],
            _gelu(total).to(out.dtype.element_ty),
            mask=(row < num_rows)[:, None] & is_channel[None, :],
        )


@triton.jit(do_not_specialize=["num_values"])
def _bias_gelu(x, bias, num_values, channels: tl.constexpr, VALUES: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * VALUES + tl.arange(0, VALUES)
    is_value = at < num_values
    values = tl.load(x + at, mask=is_value).to(tl.float32)
    biases = tl.load(bias + at % channels, mask=is_value).to(tl.float32)
    tl.store(x + at, _gelu(values + biases).to(x.dtype.element_ty), mask=is_value)
