"""The interface of the stream's kernels, as the extension has it, by the plain functions: for CPU memory."""

import ctypes
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from bldm_kernels.inference import stream
from bldm_kernels.inference.attention import E4M3, attention, to_e4m3
from bldm_kernels.inference.product import Weights
from bldm_kernels.inference.stream import Reader, Stream, plain_add, plain_enter, plain_read

PARTS = 3  # of the moments


def at(address: int, dtype: torch.dtype, *shape: int) -> Tensor | None:
    """The tensor that is there."""
    if address == 0:
        return None
    memory = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)


def there(address: int, dtype: torch.dtype, *shape: int) -> Tensor:
    found = at(address, dtype, *shape)
    assert found is not None
    return found


def read_stream(
    stream_ptr: int,
    weight_ptr: int,
    low: bool,
    rows: int,
    columns: int,
    depth: int,
    stream_scale_ptr: int,
    weight_scale_ptr: int,
    bias_ptr: int,
    moments_ptr: int,
    parts: int,
    eps: float,
    gelu: bool,
    out_scale_ptr: int,
    out_ptr: int,
    early: bool,
    device: int,
    cuda_stream: int,
) -> None:
    dtype, vector = E4M3 if low else torch.bfloat16, (torch.float32, columns)
    scales = (at(address, torch.float32, 1) for address in (stream_scale_ptr, weight_scale_ptr))
    reader = Reader(there(weight_ptr, dtype, columns, depth), there(bias_ptr, *vector), *scales, eps)
    x, moments = there(stream_ptr, dtype, rows, depth), there(moments_ptr, torch.float32, parts, rows, 2)
    assert low == (stream_scale_ptr != 0) and (out_scale_ptr != 0) == (gelu and low)
    y = plain_read(Stream(x.bfloat16(), moments, x if low else None), reader, gelu)
    out_scale = at(out_scale_ptr, torch.float32, 1)
    out = y.bfloat16() if out_scale is None else to_e4m3(y, out_scale)
    there(out_ptr, out.dtype, rows, columns).copy_(out)


def add_to_stream(
    x_ptr: int,
    weight_ptr: int,
    low: bool,
    rows: int,
    columns: int,
    depth: int,
    input_scale_ptr: int,
    weight_scale_ptr: int,
    bias_ptr: int,
    h_ptr: int,
    stream_scale_ptr: int,
    moments_ptr: int,
    stream_ptr: int,
    early: bool,
    device: int,
    cuda_stream: int,
) -> None:
    dtype, h = E4M3 if low else torch.bfloat16, there(h_ptr, torch.bfloat16, rows, columns)
    scales = (at(address, torch.float32, 1) for address in (input_scale_ptr, weight_scale_ptr))
    weights = Weights(there(weight_ptr, dtype, columns, depth), there(bias_ptr, torch.float32, columns), *scales)
    added = plain_add(there(x_ptr, dtype, rows, depth), weights, h)
    h.copy_(added)
    stream_scale = at(stream_scale_ptr, torch.float32, 1)
    assert (stream_scale is None) == (stream_ptr == 0) and (moments_ptr != 0 or stream_scale is None)
    if moments_ptr:
        nothing = torch.zeros(0)
        left = plain_enter(added, Reader(nothing, nothing, stream_scale, None, 0.0))
        assert left.moments is not None
        moments = there(moments_ptr, torch.float32, PARTS, rows, 2)
        moments.zero_()[:1] = left.moments
        if left.low is not None:
            there(stream_ptr, E4M3, rows, columns).copy_(left.low)


def attend_to_stream(
    stream_ptr: int,
    weight_ptr: int,
    low: bool,
    samples: int,
    tokens: int,
    heads: int,
    depth: int,
    stream_scale_ptr: int,
    weight_scale_ptr: int,
    bias_ptr: int,
    moments_ptr: int,
    parts: int,
    eps: float,
    out_scale_ptr: int,
    out_ptr: int,
    early: bool,
    device: int,
    cuda_stream: int,
) -> None:
    rows, columns = samples * tokens, 3 * heads * 64
    qkv = torch.empty(rows, columns, dtype=torch.bfloat16)
    of_layer = (stream_scale_ptr, weight_scale_ptr, bias_ptr, moments_ptr, parts, eps, False, 0)
    read_stream(stream_ptr, weight_ptr, low, rows, columns, depth, *of_layer, qkv.data_ptr(), early, device, cuda_stream)
    mixed = attention(qkv.view(samples, tokens, columns), heads, None, at(out_scale_ptr, torch.float32, 1))
    there(out_ptr, mixed.dtype, samples, tokens, columns // 3).copy_(mixed)


def moments_parts(rows: int, columns: int, depth: int, low: bool, device: int) -> int:
    return PARTS


def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let these be the kernels; returns the list of the calls that come."""
    calls = list[str]()

    class Native:
        def __getattr__(self, name: str) -> object:
            calls.append(name)
            return globals()[name]

    monkeypatch.setattr(stream, "takes", lambda h: True)
    monkeypatch.setattr(stream, "_native", Native)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    return calls
