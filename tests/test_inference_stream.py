"""Products with the residual stream: the plain form against float64 modules, the kernels against the plain form."""

from types import SimpleNamespace
from typing import Any

import native_stream
import pytest
import torch
from test_inference_product import DEVICE, error, inputs, layer, triton_kernels
from torch import Tensor, nn
from torch.nn import functional as F

from bldm_kernels.backends.native import load_part
from bldm_kernels.inference import stream as stream_module
from bldm_kernels.inference.attention import E4M3, attention, to_e4m3
from bldm_kernels.inference.product import Weights, prepare
from bldm_kernels.inference.stream import (
    MANY_LOW_ROWS,
    MANY_ROWS,
    Reader,
    Stream,
    add,
    attend,
    enter,
    fits,
    plain_add,
    plain_enter,
    plain_read,
    prepare_adder,
    prepare_reader,
    read,
    reorder,
    supports,
    supports_heads,
    takes,
    takes_heads,
)

__all__ = ["triton_kernels"]  # a fixture
EPS = 1e-5
SHAPES = [
    (600, 96, 64),
    (2056, 2304, 768),
    (2056, 768, 3072),
    (5000, 416, 224),
    (16448, 3072, 768),
    (1, 32, 32),
    (1300, 800, 1056),
]


@pytest.fixture
def stream_kernels() -> None:
    there = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    if not there or not hasattr(load_part("cuda")[0], "read_stream"):
        pytest.skip("needs the CUDA build and a GPU of compute capability 9.0")


def one(value: float) -> Tensor:
    return torch.tensor([value], device=DEVICE)


def offset_of(columns: int) -> Tensor:
    return torch.linspace(-1, 1, columns, device=DEVICE)


def reader_of(rows: int, columns: int, low: bool) -> Reader:
    """Of `rows` outputs from a stream of `columns`."""
    linear, norm, _ = layer(rows, columns)
    weights = prepare(linear, torch.bfloat16, norm=norm, input_scale=one(0.02) if low else None)
    return prepare_reader(weights, EPS, one(0.2) if low else None)


def adder_of(rows: int, columns: int, low: bool) -> Weights:
    """Of `rows` outputs that are added to the stream."""
    linear, _, gamma = layer(rows, columns)
    return prepare_adder(prepare(linear, torch.bfloat16, gamma=gamma, input_scale=one(0.02) if low else None))


def exactly(stream: Stream) -> Stream:
    assert stream.moments is not None
    return Stream(stream.h.double(), stream.moments.double(), stream.low)


# --- the plain form ----------------------------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("gelu", [False, True])
def test_the_plain_form_is_the_modules(gelu: bool) -> None:
    linear, norm, gamma = layer(64, 40)
    h, offset = inputs(9, 40, torch.float64), offset_of(40)
    reader = prepare_reader(prepare(linear.double(), torch.float64, norm=norm.double()), norm.eps)
    whole = h + offset
    expected = linear(norm(whole))
    expected = F.gelu(expected) if gelu else expected
    stream = enter(h, reader, offset)
    assert torch.equal(h, whole) and stream.h is h
    assert error(plain_read(stream, reader, gelu), expected) < 1e-6  # vectors are float32
    assert error(read(stream, reader, gelu=gelu), expected) < 1e-6
    weights = prepare(linear, torch.float64, gamma=gamma)
    next_linear, next_norm = nn.Linear(64, 32, device=DEVICE), nn.LayerNorm(64, device=DEVICE)
    x, later = inputs(9, 40, torch.float64), prepare_reader(prepare(next_linear, torch.float64, norm=next_norm), EPS)
    before = torch.randn(9, 64, dtype=torch.float64, device=DEVICE)
    left = add(x, prepare_adder(weights), Stream(before.clone()), later)
    assert error(left.h, before + gamma * linear(x)) < 1e-12
    moments = left.moments
    assert moments is not None and error(moments.sum(0), torch.stack([left.h.sum(1), left.h.square().sum(1)], 1)) < 1e-12
    assert add(x, prepare_adder(weights), Stream(before.clone())).moments is None


@torch.no_grad()
@pytest.mark.parametrize("gelu", [False, True])
def test_the_plain_form_in_e4m3_is_the_modules_but_for_rounding(gelu: bool) -> None:
    linear, norm, _ = layer(64, 96)
    h, offset, scale = inputs(9, 96), offset_of(96), one(0.1)
    weights = prepare(linear, torch.bfloat16, norm=norm, input_scale=one(0.02))
    reader, whole = prepare_reader(weights, EPS, scale), h.double() + offset
    stream = enter(h, reader, offset)
    assert error(h, whole) < 3e-3
    assert stream.low is not None and error(stream.low.double() * scale, whole) < 4e-2
    expected = linear.double()(norm.double()(whole))
    out_scale = one(0.02) if gelu else None
    got = read(stream, reader, gelu=gelu, out_scale=out_scale)
    assert got.dtype == (E4M3 if gelu else torch.bfloat16)
    got = got.double() if out_scale is None else got.double() * out_scale
    assert error(got, F.gelu(expected) if gelu else expected) < 8e-2


def test_reordering_twice_is_nothing() -> None:
    weight = torch.arange(64)[:, None].expand(64, 3)
    once = reorder(weight)
    for j, t, c in ((0, 1, 0), (3, 2, 1), (1, 0, 1)):
        assert once[32 + 8 * j + 2 * t + c, 0] == 32 + 8 * t + 2 * j + c
    assert torch.equal(reorder(once), weight)


# --- the kernel of a fresh stream --------------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("rows, columns", [(1, 32), (7, 48), (130, 768), (600, 208), (3, 5008)])
def test_enter(rows: int, columns: int, low: bool, triton_kernels: None) -> None:
    h, reader, offset = inputs(rows, columns), reader_of(32, columns, low), offset_of(columns) if rows > 1 else None
    whole = h.double() if offset is None else h.double() + offset
    got, expected = enter(h, reader, offset), plain_enter(h.double(), reader)
    assert got.h is h and got.moments is not None and expected.moments is not None
    torch.testing.assert_close(h.double(), whole, rtol=2**-7, atol=0)  # rounded; the interpreter cuts off
    assert got.moments.shape == (1, rows, 2) and got.moments.dtype == torch.float32
    size = h.double().abs().sum(1)  # sums may be of both signs
    assert ((got.moments[0, :, 0] - expected.moments[0, :, 0]).abs() <= 1e-5 * size).all()
    torch.testing.assert_close(got.moments[0, :, 1].double(), expected.moments[0, :, 1], rtol=1e-5, atol=0)
    if low:
        assert got.low is not None and expected.low is not None and error(got.low, expected.low) < 1e-2
    else:
        assert got.low is None


# --- the products' kernels ---------------------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_read(shape: tuple[int, int, int], low: bool, gelu: bool, stream_kernels: None) -> None:
    rows, columns, inner = shape
    h, reader = inputs(rows, inner), reader_of(columns, inner, low)
    stream = enter(h, reader, offset_of(inner))  # rows whose mean is not 0
    assert takes(h) and fits(reader.weight)
    out_scale = one(0.02) if gelu and low else None
    got = read(stream, reader, gelu=gelu, out_scale=out_scale)
    expected = plain_read(exactly(stream), reader, gelu)
    if out_scale is None:
        assert got.dtype == torch.bfloat16 and error(got, expected) < 3e-3
    else:
        assert got.dtype == E4M3
        # GELU in halves, by its tanh form: some values round to their neighbours in e4m3.
        assert error(got.float() * out_scale, to_e4m3(expected.float(), out_scale).float() * out_scale) < 2e-2
    again = read(stream, reader, gelu=gelu, out_scale=out_scale, pdl=True)
    assert torch.equal(again.view(torch.uint8), got.view(torch.uint8))


@torch.no_grad()
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_add(shape: tuple[int, int, int], low: bool, last: bool, stream_kernels: None) -> None:
    rows, columns, inner = shape
    adder, reader = adder_of(columns, inner, low), None if last else reader_of(64, columns, low)
    x = to_e4m3(inputs(rows, inner), one(0.02)) if low else inputs(rows, inner)
    h = inputs(rows, columns)
    expected = plain_add(x if low else x.double(), adder, h)
    one_way, again = add(x, adder, Stream(h.clone()), reader), add(x, adder, Stream(h.clone()), reader, pdl=True)
    assert error(one_way.h, expected) < 3e-3 and torch.equal(one_way.h, again.h)
    if reader is None:
        assert one_way.moments is None and one_way.low is None
        return
    left = plain_enter(expected.double(), reader)
    assert one_way.moments is not None and again.moments is not None and left.moments is not None
    assert torch.equal(one_way.moments, again.moments)
    sums, size = one_way.moments.double().sum(0), expected.double().abs().sum(1)
    limit = 1e-3 if low else 1e-4  # the tensor cores add e4m3 products up to 14 bits or so
    assert ((sums[:, 0] - left.moments[0, :, 0]).abs() <= limit * size).all()
    torch.testing.assert_close(sums[:, 1], left.moments[0, :, 1], rtol=2 * limit, atol=0)
    if low:
        assert one_way.low is not None and again.low is not None and left.low is not None
        assert error(one_way.low, left.low) < 2e-2
        assert torch.equal(one_way.low.view(torch.uint8), again.low.view(torch.uint8))
        into = add(x, adder, Stream(h.clone(), None, again.low), reader)
        assert into.low is again.low
    behind = read(one_way, reader)
    assert error(behind, plain_read(exactly(one_way), reader)) < 3e-3


HEADS = [(8, 257, 12, 768), (3, 256, 4, 384), (2, 258, 6, 768), (9, 258, 2, 768), (80, 257, 12, 768)]


@torch.no_grad()
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("batch, tokens, heads, width", HEADS)
def test_attend(batch: int, tokens: int, heads: int, width: int, low: bool, stream_kernels: None) -> None:
    h, reader = inputs(batch * tokens, width), reader_of(3 * heads * 64, width, low)
    stream = enter(h, reader, offset_of(width))
    assert takes_heads(h, reader, heads, batch)
    expected = attention(plain_read(exactly(stream), reader).view(batch, tokens, -1), heads).flatten(0, 1)
    for out_scale in (None, one(float(expected.abs().max()) / 400)):
        got = attend(stream, reader, heads, batch, out_scale=out_scale)
        assert got.dtype == (torch.bfloat16 if out_scale is None else E4M3)
        values = got.double() if out_scale is None else got.double() * out_scale
        assert error(values, expected) < (1e-2 if out_scale is None else 4e-2)
        for _ in range(3):
            again = attend(stream, reader, heads, batch, out_scale=out_scale, pdl=True)
            assert torch.equal(again.view(torch.uint8), got.view(torch.uint8))


@torch.no_grad()
@pytest.mark.parametrize("low", [False, True])
def test_attend_is_attention_of_what_is_read(low: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    h, reader = inputs(2 * 256, 384).cpu(), Reader(*(x.cpu() if isinstance(x, Tensor) else x for x in reader_of(384, 384, low)))
    stream, out_scale = enter(h, reader), torch.tensor([0.02]) if low else None
    expected = attention(read(stream, reader).view(2, 256, -1), 2, None, out_scale).flatten(0, 1)
    assert torch.equal(attend(stream, reader, 2, 2, out_scale=out_scale).float(), expected.float())
    calls = native_stream.stand_in(monkeypatch)
    assert takes_heads(h, reader, 2, 2)
    assert torch.equal(attend(stream, reader, 2, 2, out_scale=out_scale).float(), expected.float())
    assert calls == ["attend_to_stream"]
    assert not takes_heads(h, reader, 1, 2) and not takes_heads(h, reader, 2, 4) and not takes_heads(h, reader, 3, 2)


def test_which_batches_are_one_kernel_for_their_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = reader_of(32, 48, False)
    assert not supports_heads(inputs(8, 48).cpu(), reader, 12, 8)
    monkeypatch.setattr(stream_module, "takes_heads", lambda *arguments: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    few = {batch for batch in range(1, 50) if supports_heads(inputs(8, 48), reader, 12, batch)}
    assert few == {*range(8, 12), *range(20, 23), *range(30, 34), *range(40, 45)}
    assert all(supports_heads(inputs(8, 48), reader, 12, batch) for batch in (64, 128, 256, 512, 1024))


def test_which_streams_the_kernels_take(stream_kernels: None) -> None:
    def stream(rows: int, columns: int = 768) -> Tensor:
        return torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda")

    assert takes(stream(1)) and not takes(stream(1, 784)) and not takes(stream(0)) and not takes(stream(8).half())
    assert supports(stream(MANY_ROWS), low=False) and not supports(stream(MANY_ROWS - 1), low=False)
    assert supports(stream(MANY_LOW_ROWS), low=True) and not supports(stream(MANY_LOW_ROWS - 1), low=True)


def test_errors_name_the_argument() -> None:
    linear, norm, _ = layer(64, 48)
    weights = prepare(linear, torch.bfloat16, norm=norm)
    reader, low = reader_of(64, 48, False), reader_of(64, 48, True)
    adder, x = prepare_adder(weights), inputs(6, 48)
    stream = enter(x, reader)
    wrong: dict[str, Any] = {
        "weight: expected rows in multiples of 32": lambda: reorder(torch.zeros(40, 8)),
        "weights: expected rows that add up to 0": lambda: prepare_reader(prepare(linear, torch.bfloat16), EPS),
        "stream_scale: expected one for weights in e4m3 only": lambda: prepare_reader(weights, EPS, one(1.0)),
        r"h: expected a contiguous \(M, W\)": lambda: enter(x[None], reader),
        "h: expected dtype": lambda: enter(x.int(), reader),
        r"reader: expected one of h \(6, 32\)": lambda: enter(inputs(6, 32), reader),
        r"stream.h: expected a contiguous \(M, K\)": lambda: read(stream._replace(h=x.mT), reader),
        "stream.moments: expected a torch.Tensor": lambda: read(Stream(x), reader),
        r"stream.moments: expected a contiguous \(parts, 6, 2\)": lambda: read(
            Stream(x, torch.zeros(1, 5, 2, device=DEVICE)), reader
        ),
        "stream.moments: expected dtype float32": lambda: read(Stream(x, torch.zeros(1, 6, 2).double()), reader),
        "stream.low: expected a torch.Tensor": lambda: read(stream, low),
        r"stream.low: expected a contiguous \(6, 48\)": lambda: read(stream._replace(low=x.to(E4M3)[:5]), low),
        "offset: expected shape": lambda: enter(x, reader, offset_of(47)),
        "offset: expected dtype": lambda: enter(x, reader, offset_of(48).double()),
        "out_scale: expected one behind GELU": lambda: read(stream, reader, out_scale=one(1.0)),
        "out_scale: expected one behind": lambda: read(enter(x, low), low, gelu=True),
        "out_scale: expected one element": lambda: read(enter(x, low), low, gelu=True, out_scale=torch.ones(2, device=DEVICE)),
        r"batch, num_heads: expected divisors of 6 rows": lambda: attend(stream, reader, 3, 4),
        "num_heads: expected": lambda: attend(stream, reader, 0, 2),
        "weights.bias: expected dtype float32": lambda: add(x, weights, Stream(inputs(6, 64))),
        r"x: expected a contiguous \(M, 48\)": lambda: add(inputs(6, 32), adder, Stream(inputs(6, 64))),
        r"h: expected a contiguous \(6, 64\)": lambda: add(x, adder, Stream(inputs(5, 64))),
        r"reader: expected one of h \(6, 64\)": lambda: add(x, adder, Stream(inputs(6, 64)), reader),
        "reader: expected weights in e4m3": lambda: add(x, adder, Stream(inputs(6, 64)), reader_of(32, 64, True)),
    }
    for message, call in wrong.items():
        with pytest.raises((TypeError, ValueError), match=message):
            call()
