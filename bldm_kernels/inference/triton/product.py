"""Tiles of x @ W^T by the tensor cores, operands through TMA, and all that follows while a tile is in registers.

Where there are many tiles a program takes one after the other, so that the operands of the next are on their way while it
writes one.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from ...backends.triton.common import INTERPRETED, ceil_div, on_device
from ..product import Weights
from .common import dependent_launch, rounded, saturated
from .common import product as dot

STEP = 128  # bytes of K a step
GROUP = 8  # row tiles that programs go over side by side, which share the weights in L2


class Tiling(NamedTuple):
    """Of a product: tile, column parts of a tile in the epilogue, warps, stages, and whether programs stay for many tiles."""

    block_m: int
    block_n: int
    parts: int
    warps: int
    stages: int
    persistent: bool


@lru_cache(maxsize=4096)
def tiling(rows: int, columns: int, residual: bool) -> Tiling:
    """For (rows, K) @ (columns, K)^T, the fastest on an H200; in parts where a residual needs room beside the output."""
    if rows > 4096:
        return Tiling(128, 256, 2 if residual else 1, 8, 3, True) if columns > 128 else Tiling(128, 128, 1, 4, 4, True)
    if rows > 512:
        return Tiling(128, 128, 1, 4, 3, False)
    return Tiling(64, 128, 1, 4, 5, False) if columns > 1024 else Tiling(64, 64, 1, 4, 6, False)


@triton.jit
def _gelu(x):
    inner = x * (0.7978845608028654 + 0.035677408136300125 * x * x)
    if INTERPRETED:
        t = 2.0 / (1.0 + tl.exp(-2.0 * inner)) - 1.0
    else:
        t = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [inner], dtype=tl.float32, is_pure=True, pack=1)
    half = 0.5 * x
    return half + half * t


@triton.jit
def _finish(y, row, column, bias, scale, residual, out, inverse, num_columns, GELU: tl.constexpr):
    """The part of a tile that begins at `row`, `column`: from sums to what is stored."""
    if scale is not None:
        y = y * scale
    if bias is not None:
        columns = column + tl.arange(0, y.shape[1])
        y = y + tl.load(bias + columns, columns < num_columns, 0.0).to(tl.float32)[None, :]
    if GELU:
        y = _gelu(y)
    if residual is not None:
        y = y + residual.load([row, column]).to(tl.float32)
    if inverse is not None:
        out.store([row, column], saturated(y * inverse).to(out.dtype))
    else:
        out.store([row, column], rounded(y, out.dtype).to(out.dtype))


@triton.jit
def _finish_all(acc, row, column, bias, scale, residual, out, inverse, num_columns, GELU: tl.constexpr, PARTS: tl.constexpr):
    if PARTS == 1:
        _finish(acc, row, column, bias, scale, residual, out, inverse, num_columns, GELU)
    else:
        half: tl.constexpr = acc.shape[1] // 2
        a, b = tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, half)), (0, 2, 1)))
        _finish(a, row, column, bias, scale, residual, out, inverse, num_columns, GELU)
        _finish(b, row, column + half, bias, scale, residual, out, inverse, num_columns, GELU)


@triton.jit
def tiles(
    x,
    weight,
    bias,
    input_scale,
    weight_scale,
    residual,
    out,
    out_scale,
    num_rows,
    num_columns,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    GELU: tl.constexpr,
    PERSISTENT: tl.constexpr,
    PDL: tl.constexpr,
):
    """epilogue(x @ W^T)."""
    tiles_m, tiles_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_columns, BLOCK_N)
    scale, inverse = None, None
    if input_scale is not None:
        scale = tl.load(input_scale) * tl.load(weight_scale)
    if out_scale is not None:
        inverse = 1.0 / tl.load(out_scale)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if PERSISTENT and not INTERPRETED:
        for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
            group = tile // (GROUP * tiles_n)
            size = tl.minimum(tiles_m - group * GROUP, GROUP)
            within = tile - group * (GROUP * tiles_n)
            row, column = (group * GROUP + within % size) * BLOCK_M, (within // size) * BLOCK_N
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for step in range(STEPS):
                acc = dot(x.load([row, step * BLOCK_K]), weight.load([column, step * BLOCK_K]).T, acc)
            _finish_all(acc, row, column, bias, scale, residual, out, inverse, num_columns, GELU, PARTS)
    else:
        row, column = (tl.program_id(0) % tiles_m) * BLOCK_M, (tl.program_id(0) // tiles_m) * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(STEPS):
            acc = dot(x.load([row, step * BLOCK_K]), weight.load([column, step * BLOCK_K]).T, acc)
        _finish_all(acc, row, column, bias, scale, residual, out, inverse, num_columns, GELU, PARTS)


def product(
    x: Tensor,
    weights: Weights,
    gelu: bool,
    bias: bool,
    residual: Tensor | None,
    out: Tensor,
    out_scale: Tensor | None,
    pdl: bool,
    plan: Tiling | None = None,
) -> None:
    """Fill `out` (M, N), which may be `residual`."""
    rows, columns, inner = len(x), *weights.weight.shape
    plan = plan or tiling(rows, columns, residual is not None)
    block_k = STEP // x.element_size()
    programs = ceil_div(rows, plan.block_m) * ceil_div(columns, plan.block_n)
    if plan.persistent and x.is_cuda:
        programs = min(programs, torch.cuda.get_device_properties(x.device).multi_processor_count)

    def block(tensor: Tensor, height: int, width: int) -> TensorDescriptor:
        return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [height, width])

    with on_device(x):
        tiles[(programs,)](
            block(x, plan.block_m, block_k),
            block(weights.weight, plan.block_n, block_k),
            weights.bias if bias else None,
            weights.input_scale,
            weights.weight_scale,
            None if residual is None else block(residual, plan.block_m, plan.block_n // plan.parts),
            block(out, plan.block_m, plan.block_n // plan.parts),
            out_scale,
            rows,
            columns,
            BLOCK_M=plan.block_m,
            BLOCK_N=plan.block_n,
            BLOCK_K=block_k,
            STEPS=ceil_div(inner, block_k),
            PARTS=plan.parts,
            GROUP=GROUP,
            GELU=gelu,
            PERSISTENT=plan.persistent,
            num_warps=plan.warps,
            num_stages=plan.stages,
            **dependent_launch(pdl),
        )
