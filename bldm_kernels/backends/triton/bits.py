"""pack_bits, unpack_bits, random_bits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    NOT_SPECIALIZED,
    NUM_WARPS,
    RANDOM_BITS,
    byte_grid,
    byte_tile,
    mask_padding,
    on_device,
    pack,
    random_words,
    unpack,
    value_or_load,
)

COLUMN_BYTES = 8  # channels in the middle, (outer, C, inner): bytes a position, at most ...
COLUMN_BLOCK = 1024  # ... and bytes a program, at most
WORD_BLOCK = 1024  # words a program, where an item has one byte

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _is_set(x, PREDICATE: tl.constexpr):
    if PREDICATE == "positive":
        return x.to(tl.float32) > 0
    elif PREDICATE == "nonzero_float":  # the bits of a float: all but the sign
        return (x << 1) != 0
    else:
        return x != 0


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def pack_rows(x, out, num_samples, sample_bytes, num_bits, PREDICATE: tl.constexpr, SAMPLES: tl.constexpr, BYTES: tl.constexpr):
    """(rows, C) -> (rows, P): here a "sample" is one row."""
    row, byte, exists = byte_tile(num_samples, sample_bytes, SAMPLES, BYTES)
    channel = (byte * 8)[:, None] + tl.arange(0, 8)[None, :]
    values = tl.load(x + (row * num_bits)[:, None] + channel, exists[:, None] & (channel < num_bits), 0)
    tl.store(out + row * sample_bytes + byte, pack(_is_set(values, PREDICATE)), exists)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def unpack_rows(packed, out, num_samples, sample_bytes, num_bits, ONE: tl.constexpr, SAMPLES: tl.constexpr, BYTES: tl.constexpr):
    """(rows, P) -> (rows, C)."""
    row, byte, exists = byte_tile(num_samples, sample_bytes, SAMPLES, BYTES)
    channel = (byte * 8)[:, None] + tl.arange(0, 8)[None, :]
    bits = unpack(tl.load(packed + row * sample_bytes + byte, exists, 0)).to(out.dtype.element_ty)
    tl.store(out + (row * num_bits)[:, None] + channel, bits * ONE, exists[:, None] & (channel < num_bits))


@triton.jit
def pack_words(x, out, num_bytes, BLOCK: tl.constexpr):
    """Eight items of one byte, read as one word (int64)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(x + i, i < num_bytes, 0)
    # Adding 0x7F to the lower seven bits of a byte sets its upper bit unless they are 0.
    upper = ((word & 0x7F7F7F7F7F7F7F7F) + 0x7F7F7F7F7F7F7F7F) | word
    flags = (upper >> 7) & 0x0101010101010101
    tl.store(out + i, ((flags * 0x0102040810204080) >> 56).to(tl.uint8), i < num_bytes)  # gathers them in the upper byte


@triton.jit
def unpack_words(packed, out, num_bytes, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    byte = tl.load(packed + i, i < num_bytes, 0).to(tl.uint64)
    bits = (byte * 0x0101010101010101) & 0x8040201008040201  # byte j of the word: bit j alone
    flags = ((bits + 0x00406070787C7E7F) >> 7) & 0x0101010101010101
    tl.store(out + i, flags.to(tl.int64), i < num_bytes)


@triton.jit
def column_tile(inner, row_bytes, POSITIONS: tl.constexpr, BYTES: tl.constexpr):
    """[POSITIONS, 1], [1, BYTES]: outer index, position, byte, and [POSITIONS, BYTES] whether they exist."""
    position_blocks, byte_blocks = tl.cdiv(inner, POSITIONS), tl.cdiv(row_bytes, BYTES)
    program = tl.program_id(0)
    outer = (program // (position_blocks * byte_blocks)).to(tl.int64)
    position = (program // byte_blocks % position_blocks).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)[:, None]
    byte = (program % byte_blocks).to(tl.int64) * BYTES + tl.arange(0, BYTES)[None, :]
    return outer, position, byte, (position < inner) & (byte < row_bytes)


@triton.jit
def pack_columns(x, out, inner, row_bytes, num_bits, PREDICATE: tl.constexpr, POSITIONS: tl.constexpr, BYTES: tl.constexpr):
    """(outer, C, inner) -> (outer, inner, P), one pass with reads along inner."""
    outer, position, byte, exists = column_tile(inner, row_bytes, POSITIONS, BYTES)
    packed = tl.zeros((POSITIONS, BYTES), tl.int32)
    for lane in tl.static_range(8):
        channel = byte * 8 + lane
        values = tl.load(x + (outer * num_bits + channel) * inner + position, exists & (channel < num_bits), 0)
        packed |= tl.where(_is_set(values, PREDICATE), 1 << lane, 0)
    tl.store(out + (outer * inner + position) * row_bytes + byte, packed.to(tl.uint8), exists)


@triton.jit
def unpack_columns(packed, out, inner, row_bytes, num_bits, ONE: tl.constexpr, POSITIONS: tl.constexpr, BYTES: tl.constexpr):
    """(outer, inner, P) -> (outer, C, inner)."""
    outer, position, byte, exists = column_tile(inner, row_bytes, POSITIONS, BYTES)
    values = tl.load(packed + (outer * inner + position) * row_bytes + byte, exists, 0).to(tl.int32)
    for lane in tl.static_range(8):
        channel = byte * 8 + lane
        bits = ((values >> lane) & 1).to(out.dtype.element_ty)
        tl.store(out + (outer * num_bits + channel) * inner + position, bits * ONE, exists & (channel < num_bits))


@triton.jit
def pack_column_words(x, out, inner, row_bytes, num_bits, POSITIONS: tl.constexpr, BYTES: tl.constexpr):
    """pack_columns of items of one byte, four positions at a time: x is int32 (outer, C, inner / 4)."""
    outer, word, byte, exists = column_tile(inner // 4, row_bytes, POSITIONS // 4, BYTES)
    packed = tl.zeros((POSITIONS // 4, BYTES), tl.int32)  # a byte of four positions
    for lane in tl.static_range(8):
        channel = byte * 8 + lane
        four = tl.load(x + (outer * num_bits + channel) * (inner // 4) + word, exists & (channel < num_bits), 0)
        upper = ((four & 0x7F7F7F7F) + 0x7F7F7F7F) | four  # as in pack_words
        packed |= ((upper >> 7) & 0x01010101) << lane
    packed = tl.join(tl.join(packed, packed >> 16), tl.join(packed >> 8, packed >> 24)).to(tl.uint8)
    packed = tl.permute(tl.reshape(packed, (POSITIONS // 4, BYTES, 4)), (0, 2, 1))
    outer, position, byte, exists = column_tile(inner, row_bytes, POSITIONS, BYTES)
    tl.store(out + (outer * inner + position) * row_bytes + byte, tl.reshape(packed, (POSITIONS, BYTES)), exists)


@triton.jit
def unpack_column_words(packed, out, inner, row_bytes, num_bits, POSITIONS: tl.constexpr, BYTES: tl.constexpr):
    outer, position, byte, exists = column_tile(inner, row_bytes, POSITIONS, BYTES)
    bits = tl.load(packed + (outer * inner + position) * row_bytes + byte, exists, 0).to(tl.int32)
    bits = tl.permute(tl.reshape(bits, (POSITIONS // 4, 4, BYTES)), (0, 2, 1))
    bits = tl.sum(bits << (8 * tl.arange(0, 4))[None, None, :], axis=2)  # a byte of four positions
    outer, word, byte, exists = column_tile(inner // 4, row_bytes, POSITIONS // 4, BYTES)
    for lane in tl.static_range(8):
        channel = byte * 8 + lane
        pointers = out + (outer * num_bits + channel) * (inner // 4) + word
        tl.store(pointers, (bits >> lane) & 0x01010101, exists & (channel < num_bits))


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def draw_bits(
    out,
    seed: tl.int64,
    seed_tensor,
    sample_offset: tl.int64,
    num_samples,
    sample_bytes,
    row_bytes,
    num_bits,
    WHOLE_BYTES: tl.constexpr,
    SAMPLES: tl.constexpr,
    BYTES: tl.constexpr,
):
    """Fair coin flips: a bit is set when its 16-bit lane is below 2^15, that is when the lane's top bit is 0."""
    sample, byte, exists = byte_tile(num_samples, sample_bytes, SAMPLES, BYTES)
    key = value_or_load(seed, seed_tensor)
    w0, w1, w2, w3 = random_words(RANDOM_BITS, key, tl.cast(0, tl.int64), sample + sample_offset, byte)
    low = (w0 >> 15 & 1) | (w1 >> 13 & 4) | (w2 >> 11 & 16) | (w3 >> 9 & 64)
    high = (w0 >> 30 & 2) | (w1 >> 28 & 8) | (w2 >> 26 & 32) | (w3 >> 24 & 128)
    bits = ((low | high) ^ 0xFF).to(tl.uint8)
    tl.store(out + sample * sample_bytes + byte, mask_padding(bits, byte, row_bytes, num_bits, WHOLE_BYTES), exists)


def _rows(packed: Tensor, num_bits: int) -> tuple[int, int, int]:
    """(rows, bytes, bits) of packed (outer, 1, P): one long row when there is no padding between rows."""
    if num_bits % 8 == 0:
        return 1, packed.numel(), packed.numel() * 8
    return packed.shape[0], packed.shape[2], num_bits


def _as_words(x: Tensor) -> Tensor | None:
    """(outer, C, inner) items of one byte as aligned words: the items of a packed byte (int64), or four positions (int32)."""
    size = 4 if x.shape[2] > 1 else 8
    items = x.shape[2] if x.shape[2] > 1 else x.shape[1]
    if x.element_size() > 1 or items % size or x.storage_offset() % size or x.data_ptr() % size:
        return None
    return x.view(-1).view(_INTEGER[size])


def _word_grid(packed: Tensor) -> tuple[int]:
    return (triton.cdiv(packed.numel(), WORD_BLOCK),)


def column_grid(packed: Tensor, block: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid for (outer, inner, P), and the tile of POSITIONS x BYTES packed bytes, at most `block`, of every program."""
    outer, inner, row_bytes = packed.shape
    num_bytes = min(triton.next_power_of_2(row_bytes), COLUMN_BYTES)
    positions = min(triton.next_power_of_2(inner), block // num_bytes)
    grid = outer * triton.cdiv(inner, positions) * triton.cdiv(row_bytes, num_bytes)
    return (grid,), {"POSITIONS": positions, "BYTES": num_bytes, "num_warps": NUM_WARPS}


def pack_where(x: Tensor, predicate: str, out: Tensor) -> None:
    """(outer, C, inner) -> packed (outer, inner, P): the bits where x is "positive", "nonzero" or, seen as the integers
    that hold its bits, "nonzero_float"."""
    num_bits, inner = x.shape[1:]
    words = _as_words(x) if predicate == "nonzero" else None
    with on_device(x):
        if inner == 1 and words is not None:
            pack_words[_word_grid(out)](words, out, out.numel(), WORD_BLOCK)
        elif inner == 1:
            rows, row_bytes, row_bits = _rows(out, num_bits)
            grid, tile = byte_grid(rows, row_bytes)
            pack_rows[grid](x, out, rows, row_bytes, row_bits, predicate, **tile)
        else:
            grid, tile = column_grid(out, COLUMN_BLOCK)
            if words is not None:
                pack_column_words[grid](words, out, inner, out.shape[2], num_bits, **tile)
            else:
                pack_columns[grid](x, out, inner, out.shape[2], num_bits, predicate, **tile)


def pack_bits(x: Tensor, out: Tensor) -> None:
    if x.is_complex():
        x = x != 0
    predicate = "nonzero_float" if x.is_floating_point() else "nonzero"
    pack_where(x.view(_INTEGER[x.element_size()]), predicate, out)


def unpack_bits(packed: Tensor, out: Tensor) -> None:
    integer = _INTEGER[out.element_size()]
    one = int(torch.ones((), dtype=out.dtype).view(integer))  # the bits of a 1 in any dtype
    out = out.view(integer)
    num_bits, inner = out.shape[1:]
    words = _as_words(out)
    with on_device(packed):
        if inner == 1 and words is not None:
            unpack_words[_word_grid(packed)](packed, words, packed.numel(), WORD_BLOCK)
        elif inner == 1:
            rows, row_bytes, row_bits = _rows(packed, num_bits)
            grid, tile = byte_grid(rows, row_bytes)
            unpack_rows[grid](packed, out, rows, row_bytes, row_bits, one, **tile)
        else:
            grid, tile = column_grid(packed, COLUMN_BLOCK)
            if words is not None:
                unpack_column_words[grid](packed, words, inner, packed.shape[2], num_bits, **tile)
            else:
                unpack_columns[grid](packed, out, inner, packed.shape[2], num_bits, one, **tile)


def random_bits(num_bits: int, seed: int, sample_offset: int, seed_tensor: Tensor | None, out: Tensor) -> None:
    num_samples, rows, row_bytes = out.shape
    grid, tile = byte_grid(num_samples, rows * row_bytes)
    with on_device(out):
        draw_bits[grid](
            out,
            seed,
            seed_tensor,
            sample_offset,
            num_samples,
            rows * row_bytes,
            row_bytes,
            num_bits,
            WHOLE_BYTES=num_bits % 8 == 0,
            **tile,
        )
