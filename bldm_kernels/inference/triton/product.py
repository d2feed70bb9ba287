"""Tiles of x @ W^T by the tensor cores, operands through TMA, and all that follows while a tile is in registers.

A program takes one tile after the other, so that the operands of the next are on their way while it writes one. Where there
are few tiles and K is large, several programs share a tile: each leaves its part of the sum in memory, and the last to come
adds the parts in their order, so that the result does not depend on who that was.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from ...backends.triton.common import INTERPRETED, ceil_div, next_power_of_2, on_device
from ..product import TICKETS, Weights
from .common import E4M3_MAX, dependent_launch, rounded
from .common import product as dot

LINE = tl.constexpr(128)  # bytes of a cache line, and of K a step


class Tiling(NamedTuple):
    """Of a product: tile, column parts of a tile in the epilogue, programs a tile, warps, stages, and whether programs stay for
    many tiles."""

    block_m: int
    block_n: int
    parts: int
    split: int
    warps: int
    stages: int
    persistent: bool


@lru_cache(maxsize=4096)
def tiling(rows: int, columns: int, inner_bytes: int) -> Tiling:
    """For (rows, K) @ (columns, K)^T, K in bytes: from measurements on an H200."""
    if rows > 4096:
        return Tiling(128, 256 if columns > 128 else 128, 2 if columns > 128 else 1, 1, 8, 3, True)
    if rows > 512:
        return Tiling(64, 128, 1, 1, 4, 4, False)
    if ceil_div(rows, 64) * ceil_div(columns, 64) >= 132:
        return Tiling(64, 128, 1, 1, 4, 5, False)
    split = 4 if inner_bytes >= 3072 and ceil_div(rows, 64) * ceil_div(columns, 64) <= TICKETS else 1
    return Tiling(64, 64, 1, split, 4, 6, False)


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
def _low(values, scale, dtype: tl.constexpr):
    """values / scale, a pointer, in e4m3, saturated."""
    values = tl.minimum(tl.maximum(values / tl.load(scale), -E4M3_MAX), E4M3_MAX)
    if INTERPRETED:  # it truncates: to 4 significant bits, or multiples of 2^-9
        bits = values.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        values = tl.where(tl.abs(values) < 2.0**-6, (values + 1.5 * 2.0**14) - 1.5 * 2.0**14, normal)
    return values.to(dtype)


@triton.jit
def _statistics(moments, rows, num_rows, parts, inner, eps, PARTS: tl.constexpr):
    """rstd and rstd * mean of the rows, of `inner` columns each."""
    part = tl.arange(0, PARTS)[None, :]
    at = moments + (rows[:, None].to(tl.int64) * parts + part) * 2
    there = (rows[:, None] < num_rows) & (part < parts)
    total = tl.sum(tl.load(at, there, 0.0), axis=1) / inner
    squares = tl.sum(tl.load(at + 1, there, 0.0), axis=1) / inner
    rstd = tl.rsqrt(tl.maximum(squares - total * total, 0.0) + eps)
    return rstd, rstd * total


@triton.jit
def _finish(
    acc,
    row,
    column,
    rstd,
    shift,
    bias,
    sums,
    scale,
    residual,
    out,
    low,
    out_moments,
    out_scale,
    num_rows,
    num_columns,
    GELU: tl.constexpr,
):
    """The part of a tile that begins at `row`, `column`: from sums to what is stored."""
    columns = column + tl.arange(0, acc.shape[1])
    inside = columns < num_columns
    if scale is not None:
        acc = acc * tl.load(scale + columns, inside, 0.0)[None, :]
    y = acc
    if sums is not None:
        y = y * rstd[:, None] - shift[:, None] * tl.load(sums + columns, inside, 0.0)[None, :]
    y = y + tl.load(bias + columns, inside, 0.0)[None, :]
    if GELU:
        y = _gelu(y)
    if residual is not None:
        y = y + residual.load([row, column]).to(tl.float32)
    if out_scale is None or low is not None:
        stored = rounded(y, out.dtype)
        out.store([row, column], stored.to(out.dtype))
        y = stored.to(tl.float32)
    if low is not None:
        low.store([row, column], _low(y, out_scale, low.dtype))
    elif out_scale is not None:
        out.store([row, column], _low(y, out_scale, out.dtype))
    if out_moments is not None:  # rows and columns that are not there hold zeros, but for the bias
        y = tl.where(inside[None, :], y, 0.0)
        rows = row + tl.arange(0, acc.shape[0])
        at = out_moments + (rows.to(tl.int64) * tl.cdiv(num_columns, acc.shape[1]) + column // acc.shape[1]) * 2
        there = (rows < num_rows) & (column < num_columns)
        tl.store(at, tl.sum(y, axis=1), there)
        tl.store(at + 1, tl.sum(y * y, axis=1), there)


@triton.jit
def _finish_all(
    acc,
    row,
    column,
    moments,
    parts,
    eps,
    bias,
    sums,
    scale,
    residual,
    out,
    low,
    out_moments,
    out_scale,
    num_rows,
    num_columns,
    inner,
    GELU: tl.constexpr,
    PARTS: tl.constexpr,
    HALVES: tl.constexpr,
):
    rstd, shift = 1.0, 0.0
    if sums is not None:
        rstd, shift = _statistics(moments, row + tl.arange(0, acc.shape[0]), num_rows, parts, inner, eps, PARTS)
    if HALVES == 1:
        _finish(
            acc, row, column, rstd, shift, bias, sums, scale, residual, out, low, out_moments, out_scale, num_rows, num_columns, GELU
        )
    else:
        half: tl.constexpr = acc.shape[1] // 2
        a, b = tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, half)), (0, 2, 1)))
        _finish(
            a, row, column, rstd, shift, bias, sums, scale, residual, out, low, out_moments, out_scale, num_rows, num_columns, GELU
        )
        column += half
        _finish(
            b, row, column, rstd, shift, bias, sums, scale, residual, out, low, out_moments, out_scale, num_rows, num_columns, GELU
        )


@triton.jit
def tiles(
    x,
    weight,
    weight_lines,
    bias,
    sums,
    scale,
    moments,
    parts,
    eps,
    residual,
    out,
    low,
    out_moments,
    out_scale,
    partial,
    tickets,
    num_rows,
    num_columns,
    inner,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HALVES: tl.constexpr,
    SPLIT: tl.constexpr,
    SHARE: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    GELU: tl.constexpr,
    PERSISTENT: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    PDL: tl.constexpr,
):
    """All tiles of a product."""
    tiles_m, tiles_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_columns, BLOCK_N)
    if PDL:
        if not PERSISTENT:  # what the kernel before does not write is on its way to L2 while that ends
            tile = tl.program_id(0) // SPLIT
            first = (tile // tiles_m) * BLOCK_N
            rows = tl.arange(0, BLOCK_N)[:, None]
            for step in range(SHARE):
                line = (tl.program_id(0) % SPLIT) * SHARE + step
                at = weight_lines + (first + rows).to(tl.int64) * ROW_BYTES + line * LINE
                tl.inline_asm_elementwise(
                    "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
                    "=r,l",
                    [tl.where((first + rows < num_columns) & (line * LINE < ROW_BYTES), at, weight_lines)],
                    dtype=tl.int32,
                    is_pure=False,
                    pack=1,
                )
        gdc_wait()
        gdc_launch_dependents()
    if PERSISTENT and not INTERPRETED:
        for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
            group = tile // (GROUP * tiles_n)
            size = tl.minimum(tiles_m - group * GROUP, GROUP)
            within = tile - group * (GROUP * tiles_n)
            row, column = (group * GROUP + within % size) * BLOCK_M, (within // size) * BLOCK_N
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for step in range(SHARE):
                acc = dot(x.load([row, step * BLOCK_K]), weight.load([column, step * BLOCK_K]).T, acc)
            _finish_all(
                acc,
                row,
                column,
                moments,
                parts,
                eps,
                bias,
                sums,
                scale,
                residual,
                out,
                low,
                out_moments,
                out_scale,
                num_rows,
                num_columns,
                inner,
                GELU,
                PARTS,
                HALVES,
            )
    else:
        tile, share = tl.program_id(0) // SPLIT, tl.program_id(0) % SPLIT
        row, column = (tile % tiles_m) * BLOCK_M, (tile // tiles_m) * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(SHARE):  # beyond K there are zeros
            at = (share * SHARE + step) * BLOCK_K
            acc = dot(x.load([row, at]), weight.load([column, at]).T, acc)
        last = True
        if SPLIT > 1:
            size: tl.constexpr = BLOCK_M * BLOCK_N
            place = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
            mine = partial + tile.to(tl.int64) * (SPLIT * size)
            tl.store(mine + share * size + place, acc, cache_modifier=".cg")
            tl.debug_barrier()  # all of it is written before the ticket says so
            last = tl.atomic_add(tickets + tile, 1, sem="acq_rel") == SPLIT - 1
            if last:
                tl.store(tickets + tile, 0)
                acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                for other in tl.static_range(SPLIT):
                    acc += tl.load(mine + other * size + place, cache_modifier=".cg")
        if last:
            _finish_all(
                acc,
                row,
                column,
                moments,
                parts,
                eps,
                bias,
                sums,
                scale,
                residual,
                out,
                low,
                out_moments,
                out_scale,
                num_rows,
                num_columns,
                inner,
                GELU,
                PARTS,
                HALVES,
            )


def new_moments(x: Tensor, weights: Weights) -> Tensor:
    """Room for the moments that `product` leaves: one part for each part of a tile."""
    rows, columns, inner = len(x), *weights.weight.shape
    plan = tiling(rows, columns, inner * x.element_size())
    return torch.empty(rows, ceil_div(columns, plan.block_n // plan.parts), 2, device=x.device)


def product(
    x: Tensor,
    weights: Weights,
    moments: Tensor | None,
    gelu: bool,
    residual: Tensor | None,
    out: Tensor,
    low: Tensor | None,
    out_moments: Tensor | None,
    out_scale: Tensor | None,
    pdl: bool,
    plan: Tiling | None = None,
) -> None:
    """Fill `out` (M, N), and `low` and `out_moments` where they are given."""
    rows, columns, inner = len(x), *weights.weight.shape
    plan = plan or tiling(rows, columns, inner * x.element_size())
    block_k = LINE.value // x.element_size()
    num_tiles = ceil_div(rows, plan.block_m) * ceil_div(columns, plan.block_n)
    programs = num_tiles * plan.split
    if plan.persistent and not INTERPRETED.value:
        programs = min(programs, torch.cuda.get_device_properties(x.device).multi_processor_count)
    partial = None
    if plan.split > 1:
        partial = torch.empty(num_tiles * plan.split * plan.block_m * plan.block_n, device=x.device)

    def block(tensor: Tensor, height: int, width: int) -> TensorDescriptor:
        return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [height, width])

    def stored(tensor: Tensor | None) -> TensorDescriptor | None:
        return None if tensor is None else block(tensor, plan.block_m, plan.block_n // plan.parts)

    with on_device(x):
        tiles[(programs,)](
            block(x, plan.block_m, block_k),
            block(weights.weight, plan.block_n, block_k),
            weights.weight.view(torch.uint8),
            weights.bias,
            weights.sums,
            weights.scale,
            moments,
            1 if moments is None else moments.shape[1],
            weights.eps,
            stored(residual),
            stored(out),
            stored(low),
            out_moments,
            out_scale,
            partial,
            weights.tickets,
            rows,
            columns,
            inner,
            BLOCK_M=plan.block_m,
            BLOCK_N=plan.block_n,
            BLOCK_K=block_k,
            HALVES=plan.parts,
            SPLIT=plan.split,
            SHARE=ceil_div(ceil_div(inner, block_k), plan.split),
            GROUP=8,
            PARTS=1 if moments is None else next_power_of_2(moments.shape[1]),
            GELU=gelu,
            PERSISTENT=plan.persistent,
            ROW_BYTES=inner * x.element_size(),
            num_warps=plan.warps,
            num_stages=plan.stages,
            **dependent_launch(pdl),
        )
