"""The products of a transformer's layers with the residual stream, which leave no LayerNorm a pass of its own.

    LayerNorm(h) W^T + b = r h W^T + b        r: reciprocal deviation of the rows of the stream h; the rows of W add up to 0

So `read` takes the stream as it is, and has its norm behind the product. What it needs of the rows, their moments and for
products in e4m3 the rows in e4m3, is left by whoever wrote them: `add`, or `enter` for the first reader. `attend` reads it too:
what comes of queries, keys and values, which then need no memory.

The kernels (csrc/cuda/product.cu, stream_attention.cu) are for compute capability 9.0.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import checks, dispatch
from ..backends.native import load_part
from . import norm, product
from .attention import E4M3, WHOLE_HEAD_DIM, attention, check_scale, to_e4m3
from .product import Weights, dequantized

# From so many rows on they are faster than a norm and its product, in bfloat16 and in e4m3: a step of 771 rows takes 1.18 and
# 0.96 times as long as with norms, of 1,028 rows 1.14 and 0.92, of 1,542 rows 1.04 and 0.88 times
# (benchmarks/results/engine_parts_nvidia_h200.txt).
MANY_ROWS, MANY_LOW_ROWS = 2048, 768
TOKENS = range(256, 259)  # of a sample, that the kernel of `attend` is for
# It has a head on every multiprocessor at a time. In one round of so many of them, or in several of which so many are used on
# average, it is faster than `read` and `attention`: a step of 8 samples of 12 heads (0.73 of 132) takes 0.96 times as long in fp8
# and 0.99 in bf16, of 16 (0.73 in two rounds) 0.99 and 1.04, of 64 (0.97 in six) 0.95 and 1
# (benchmarks/results/engine_parts_nvidia_h200.txt).
ONE_ROUND, SEVERAL_ROUNDS = 0.7, 0.9
MOST_SUM = 2**-4  # of a row of weights behind a norm, for its length: that of one value that is all of it, rounded to e4m3
COLUMNS = 32  # of whose multiples the kernels' outputs are: rows of weights are in an order of their own within so many


class Stream(NamedTuple):
    """The residual stream, and what its next reader needs of it.

    h (M, W): bfloat16 for the kernels. moments (parts, M, 2): sum and sum of squares over parts of the columns, float32 (float64
    for float64 h); None: nobody reads it next. low (M, W): for a reader in e4m3, h / its input_scale.
    """

    h: Tensor
    moments: Tensor | None = None
    low: Tensor | None = None


class Reader(NamedTuple):
    """A layer that reads the stream behind its norm, made by `prepare_reader`.

    weight (N, K): rows as `reorder` has them; bias (N,) in float32; input_scale, weight_scale: for e4m3, of the stream and of
    the weights.
    """

    weight: Tensor
    bias: Tensor
    input_scale: Tensor | None
    weight_scale: Tensor | None
    eps: float

    @property
    def low(self) -> bool:
        return self.weight.dtype == E4M3


def prepare_reader(weights: Weights, eps: float, stream_scale: Tensor | None = None) -> Reader:
    """A layer for `read`. Its weight is another copy: as `weights` has it, kernels for fewer rows want it.

    Args:
        weights: of `product.prepare` with the norm, N a multiple of 32; their input_scale is of what a norm has passed over,
            and not used here.
        eps: of the norm.
        stream_scale: one-element float32 tensor, for weights in e4m3: what the stream is divided by.

    Raises: TypeError, ValueError for a wrong argument.
    """
    whole = dequantized(weights)
    if (whole.sum(1).abs() > MOST_SUM * whole.norm(dim=1)).any():
        raise ValueError("weights: expected rows that add up to 0, as those of `product.prepare` with a norm do")
    if (stream_scale is None) == (weights.weight.dtype == E4M3):
        raise ValueError(f"stream_scale: expected one for weights in e4m3 only, got {stream_scale} for {weights.weight.dtype}")
    return Reader(reorder(weights.weight), weights.bias.float(), stream_scale, weights.weight_scale, eps)


def prepare_adder(weights: Weights) -> Weights:
    """A layer for `add`: its weight in another copy, as `reorder` has it, and its bias in float32 (of float64 in float64)."""
    return weights._replace(weight=reorder(weights.weight), bias=weights.bias.to(_exact(weights.bias)))


def reorder(weight: Tensor) -> Tensor:
    """(N, K) with row 8 j + 2 t + c of every 32 the one that was 8 t + 2 j + c, and back: a thread that holds two columns of each
    of four products of the tensor cores then has eight neighbours, which it writes at once.

    Raises: ValueError if N is no multiple of 32.
    """
    rows, columns = weight.shape
    if rows % COLUMNS:
        raise ValueError(f"weight: expected rows in multiples of {COLUMNS}, got shape {tuple(weight.shape)}")
    return weight.view(rows // COLUMNS, 4, 4, 2, columns).transpose(1, 2).reshape(rows, columns)


def fits(weight: Tensor) -> bool:
    """Whether the kernels take a layer of this weight (N, K)."""
    aligned = len(weight) % COLUMNS == 0 and weight.shape[1] * weight.element_size() % 16 == 0
    return aligned and weight.dtype in (torch.bfloat16, E4M3)


def takes(h: Tensor) -> bool:
    """Whether the kernels take this stream (M, W)."""
    if not h.is_cuda or dispatch.forced_backend() not in (None, "cuda") or not hasattr(load_part("cuda")[0], "read_stream"):
        return False
    whole = h.shape[1] % COLUMNS == 0 and h.shape[1] <= norm.WIDEST and h.is_contiguous() and h.data_ptr() % 16 == 0
    return h.dtype == torch.bfloat16 and whole and len(h) > 0 and torch.cuda.get_device_capability(h.device) == (9, 0)


def supports(h: Tensor, low: bool) -> bool:
    """Whether the kernels take this stream (M, W), for products in bfloat16 or (low) e4m3, and are the faster way."""
    return len(h) >= (MANY_LOW_ROWS if low else MANY_ROWS) and takes(h)


def takes_heads(h: Tensor, reader: Reader, num_heads: int, batch: int) -> bool:
    """Whether `attend` is one kernel for this stream (M, K)."""
    rows, depth = reader.weight.shape
    whole = rows == 3 * num_heads * WHOLE_HEAD_DIM and num_heads % 2 == 0 and len(h) // batch in TOKENS
    return whole and depth * reader.weight.element_size() % 384 == 0 and takes(h) and fits(reader.weight)


def supports_heads(h: Tensor, reader: Reader, num_heads: int, batch: int) -> bool:
    """Whether it is, and is the faster way."""
    if not takes_heads(h, reader, num_heads, batch):
        return False
    rounds = batch * num_heads / torch.cuda.get_device_properties(h.device).multi_processor_count
    return rounds >= (ONE_ROUND if rounds <= 1 else SEVERAL_ROUNDS * math.ceil(rounds))


def plain_enter(h: Tensor, reader: Reader) -> Stream:
    """The specification of what `enter` leaves of h as it then is, in float64 for float64 h, else float32."""
    x = h.to(_exact(h))
    low = None if reader.input_scale is None else to_e4m3(x, reader.input_scale)
    return Stream(h, torch.stack([x.sum(1), x.square().sum(1)], 1).unsqueeze(0), low)


def plain_read(stream: Stream, reader: Reader, gelu: bool = False) -> Tensor:
    """The specification of `read`, in float64 for float64 h, else float32."""
    exact = _exact(stream.h)
    weight = reorder(reader.weight).to(exact)
    if reader.input_scale is None or reader.weight_scale is None:
        y = F.linear(stream.h.to(exact), weight)
    else:
        assert stream.low is not None
        y = F.linear(stream.low.to(exact), weight) * (reader.input_scale * reader.weight_scale).to(exact)
    assert stream.moments is not None
    mean, squares = (stream.moments.to(exact).sum(0) / stream.h.shape[1]).split(1, dim=1)
    r = ((squares - mean**2).clamp(min=0) + reader.eps).rsqrt()
    y = r * y + reader.bias
    return F.gelu(y) if gelu else y


def plain_add(x: Tensor, weights: Weights, h: Tensor) -> Tensor:
    """The specification of what `add` writes to h, and leaves to the next reader, in float64 for float64 x, else float32."""
    return product.plain(x, prepare_adder(weights)) + h  # rows back in their own order


def _exact(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def enter(h: Tensor, reader: Reader, offset: Tensor | None = None, *, pdl: bool = False) -> Stream:
    """What the first reader needs, of a stream that no `add` has written.

    Args:
        h: contiguous (M, W), bfloat16 for the kernel. It is changed in place, if there is an offset.
        reader: who reads it next.
        offset: float32 (W,), added to h first: what it lacks, see `normalize`.
        pdl: as in `attention`.

    Raises: TypeError, ValueError for a wrong argument.
    """
    checks.floating("h", h)
    if h.dim() != 2 or not h.is_contiguous():
        raise ValueError(f"h: expected a contiguous (M, W), got shape {tuple(h.shape)} with strides {h.stride()}")
    _check_reader(reader, "h", h)
    if offset is not None:
        checks.tensor("offset", offset, (torch.float32,))
        checks.shape("offset", offset, h.shape[1:], "one a column")
        checks.same_device("offset", offset, "h", h)
    if not norm.supports(h):
        return plain_enter(h if offset is None else h.copy_(h + offset), reader)
    from .triton import stream as kernels

    low = torch.empty_like(h, dtype=E4M3) if reader.low else None
    stream = Stream(h, h.new_empty(1, len(h), 2, dtype=torch.float32), low)
    kernels.enter(stream, reader, offset, pdl)
    return stream


def read(stream: Stream, reader: Reader, *, gelu: bool = False, out_scale: Tensor | None = None, pdl: bool = False) -> Tensor:
    """A layer behind its norm, of the stream as `enter` or `add` have left it for this reader: (M, K) -> (M, N).

    Args:
        stream: of (M, K).
        reader: see `prepare_reader`.
        gelu: apply GELU, in the kernel as in `product`.
        out_scale: one-element float32 tensor: write e4m3, the result divided by it; behind GELU in e4m3, where it must be there.
        pdl: as in `attention`, but the tensors of the layers are read at once: the kernel before this one may not write them.

    Returns: (M, N) in e4m3 with out_scale, else in the dtype of h.

    Raises: TypeError, ValueError for a wrong argument.
    """
    h, moments, low = stream
    moments = _check_stream(stream, reader)
    check_scale(out_scale, "stream.h", h)
    if (out_scale is not None) != (gelu and reader.low):
        raise ValueError(f"out_scale: expected one behind GELU of a reader in e4m3, and only there, got {out_scale}")
    if not (takes(h) and fits(reader.weight)):
        y = plain_read(stream, reader, gelu)
        return y.to(h.dtype) if out_scale is None else to_e4m3(y, out_scale)
    out = h.new_empty(len(h), len(reader.weight), dtype=h.dtype if out_scale is None else E4M3)
    _native().read_stream(
        *_addresses(low if reader.low else h, reader.weight),
        reader.low,
        *(len(h), len(reader.weight), h.shape[1]),
        *_addresses(reader.input_scale, reader.weight_scale, reader.bias, moments),
        *(len(moments), reader.eps, gelu),
        *_addresses(out_scale, out),
        *(pdl, h.get_device(), torch.cuda.current_stream(h.device).cuda_stream),
    )
    return out


def attend(
    stream: Stream, reader: Reader, num_heads: int, batch: int, *, out_scale: Tensor | None = None, pdl: bool = False
) -> Tensor:
    """`attention` of the queries, keys and values that `read` finds: (M, K) -> (M, W), M = batch T.

    Args:
        stream: of (M, K), as for `read`.
        reader: of queries, keys and values, N = 3 W.
        num_heads: a divisor of W.
        batch: samples, a divisor of M, whose tokens see each other.
        out_scale: as in `attention`.
        pdl: as in `read`.

    Returns: (M, W) in e4m3 with out_scale, else in the dtype of h.

    Raises: TypeError, ValueError for a wrong argument.
    """
    h, moments, low = stream
    moments = _check_stream(stream, reader)
    checks.integer("num_heads", num_heads, 1, 2**16)
    checks.integer("batch", batch, 1, len(h))
    if len(h) % batch or len(reader.weight) % (3 * num_heads):
        sizes = f"{len(h)} rows and of a third of {len(reader.weight)}"
        raise ValueError(f"batch, num_heads: expected divisors of {sizes}, got {batch} and {num_heads}")
    check_scale(out_scale, "stream.h", h)
    if not takes_heads(h, reader, num_heads, batch):
        qkv = read(stream, reader, pdl=pdl)
        return attention(qkv.view(batch, -1, qkv.shape[1]), num_heads, None, out_scale, pdl=pdl).flatten(0, 1)
    out = h.new_empty(len(h), len(reader.weight) // 3, dtype=h.dtype if out_scale is None else E4M3)
    _native().attend_to_stream(
        *_addresses(low if reader.low else h, reader.weight),
        *(reader.low, batch, len(h) // batch, num_heads, h.shape[1]),
        *_addresses(reader.input_scale, reader.weight_scale, reader.bias, moments),
        *(len(moments), reader.eps),
        *_addresses(out_scale, out),
        *(pdl, h.get_device(), torch.cuda.current_stream(h.device).cuda_stream),
    )
    return out


def add(x: Tensor, weights: Weights, stream: Stream, reader: Reader | None = None, *, pdl: bool = False) -> Stream:
    """h += x W^T + b in place, and what the next reader needs of it: of the sum before it is rounded to h's dtype.

    Args:
        x: contiguous (M, K), in the dtype of the weights.
        weights: see `prepare_adder`.
        stream: its h (M, N) is changed, and its `low`, if it has one, is written anew.
        reader: who reads it next; None: nobody that needs more than h.
        pdl: as in `attention`, but the tensors of the layers are read at once: the kernel before this one may not write them.

    Returns: the stream as that reader needs it.

    Raises: TypeError, ValueError for a wrong argument.
    """
    h = stream.h
    product.check_input(x, weights)
    checks.floating("h", h)
    product.check_sum(h, x, weights)
    checks.tensor("weights.bias", weights.bias, (_exact(h),))  # as it is before `prepare_adder`, a kernel would misread it
    if reader is not None:
        _check_reader(reader, "h", h)
        if reader.low != (x.dtype == E4M3):
            raise ValueError(f"reader: expected weights in e4m3 if x is, and only then, got {reader.weight.dtype} for {x.dtype}")
        if stream.low is not None:
            _check_low(stream.low, h)
    if not (takes(h) and fits(weights.weight) and x.data_ptr() % 16 == 0):
        added = plain_add(x, weights, h)
        h.copy_(added)
        return Stream(h) if reader is None else plain_enter(added, reader)._replace(h=h)
    low = weights.weight.dtype == E4M3
    sizes = (len(h), *weights.weight.shape)
    left = Stream(h)
    if reader is not None:
        parts = _native().moments_parts(*sizes, low, h.get_device())
        copy = None if not reader.low else torch.empty_like(h, dtype=E4M3) if stream.low is None else stream.low
        left = Stream(h, h.new_empty(parts, len(h), 2, dtype=torch.float32), copy)
    _native().add_to_stream(
        *_addresses(x, weights.weight),
        low,
        *sizes,
        *_addresses(weights.input_scale, weights.weight_scale, weights.bias, h),
        *_addresses(None if reader is None else reader.input_scale, left.moments, left.low),
        *(pdl, h.get_device(), torch.cuda.current_stream(h.device).cuda_stream),
    )
    return left


def _native() -> Any:
    return load_part("cuda")[0]


def _addresses(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)


def _check_stream(stream: Stream, reader: Reader) -> Tensor:
    """Its moments, if it is one that this reader can read."""
    h = stream.h
    checks.floating("stream.h", h)
    if h.dim() != 2 or not h.is_contiguous():
        raise ValueError(f"stream.h: expected a contiguous (M, K), got shape {tuple(h.shape)} with strides {h.stride()}")
    _check_reader(reader, "stream.h", h)
    moments = checks.tensor("stream.moments", stream.moments, (_exact(h),))
    checks.same_device("stream.moments", moments, "stream.h", h)
    if moments.dim() != 3 or moments.shape[1:] != (len(h), 2) or not moments.is_contiguous():
        raise ValueError(f"stream.moments: expected a contiguous (parts, {len(h)}, 2), got shape {tuple(moments.shape)}")
    if reader.low:
        _check_low(stream.low, h)
    return moments


def _check_low(low: Tensor | None, h: Tensor) -> None:
    low = checks.tensor("stream.low", low, (E4M3,))
    checks.same_device("stream.low", low, "stream.h", h)
    if low.shape != h.shape or not low.is_contiguous():
        raise ValueError(f"stream.low: expected a contiguous {tuple(h.shape)}, got shape {tuple(low.shape)}")


def _check_reader(reader: Reader, name: str, h: Tensor) -> None:
    if h.shape[1] != reader.weight.shape[1]:
        raise ValueError(f"reader: expected one of {name} {tuple(h.shape)}, got a weight {tuple(reader.weight.shape)}")
    checks.same_device("reader", reader.weight, name, h)
