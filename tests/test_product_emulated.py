"""The kernel of products with the residual stream on the emulated machine of tests/emulator, where it runs without a GPU: its
schedule, the layouts that it reads and writes, and its arithmetic against float64."""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from emulated import build
from torch import Tensor
from torch.nn import functional as F

E4M3 = torch.float8_e4m3fn
READ, READ_GELU, ADD = range(3)
SHAPES = range(3)  # of emulator/product.cpp
EPS = 1e-5


FIELDS: list[tuple[str, Any]] = (
    [(name, ctypes.c_void_p) for name in ("rows", "weights")]
    + [(name, ctypes.c_void_p) for name in ("input_scale", "weight_scale", "bias", "moments")]
    + [(name, ctypes.c_void_p) for name in ("out_scale", "stream_scale", "out", "h", "new_moments", "stream")]
    + [(name, ctypes.c_long) for name in ("num_rows", "num_columns", "depth", "parts")]
    + [(name, ctypes.c_int) for name in ("kind", "low", "shape", "share_weights", "clusters", "rows_first")]
    + [("seed", ctypes.c_uint), ("eps", ctypes.c_float)]
)


class Launch(ctypes.Structure):
    """As in emulator/product.cpp."""

    _fields_ = FIELDS


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ctypes.CDLL]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors: others would mostly wait
    yield build(tmp_path_factory.mktemp("emulator"), "product.cpp")
    torch.set_num_threads(threads)


@dataclass
class Schedule:
    shape: int
    share_weights: bool
    clusters: int
    seed: int = 0
    rows_first: bool = False


def launch(library: ctypes.CDLL, how: Schedule, rows: Tensor, weights: Tensor, **others: Any) -> None:
    """Others: a tensor, None or a number for every member of Launch that is not said here."""
    values = others | vars(how) | {"rows": rows, "weights": in_order(weights), "low": rows.dtype == E4M3}
    values |= {"num_rows": len(rows), "num_columns": len(weights), "depth": rows.shape[1], "eps": EPS}
    as_passed = {name: x.data_ptr() if isinstance(x, Tensor) else x for name, x in values.items()}
    assert library.run(ctypes.byref(Launch(**as_passed))).decode() == ""


def in_order(weights: Tensor) -> Tensor:
    """Of every 32 rows, row 8 t + 2 j + c at 8 j + 2 t + c."""
    columns, depth = weights.shape
    return weights.view(torch.uint8).view(columns // 32, 4, 4, 2, -1).transpose(1, 2).contiguous()


class Output:
    """A tensor of a kernel's, with memory behind it that is not the kernel's."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype, content: Tensor | None = None):
        self.all = torch.full((rows + 3, width), float("nan")).to(dtype)
        self.tensor = self.all[:rows]
        if content is not None:
            self.tensor.copy_(content)

    def check(self) -> Tensor:
        assert self.all[len(self.tensor) :].float().isnan().all()
        assert self.tensor.float().isfinite().all()
        return self.tensor


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def scale_of(x: Tensor) -> Tensor:
    return (x.abs().max() / 400).float().reshape(1)


def make_operand(rows: int, depth: int, low: bool, size: float = 1) -> tuple[Tensor, Tensor | None, Tensor]:
    """A tensor, its scale, and its values in float64."""
    x = size * torch.randn(rows, depth) * (1 + torch.rand(depth))
    if not low:
        return x.bfloat16(), None, x.bfloat16().double()
    scale = scale_of(x)
    return (x / scale).to(E4M3), scale, (x / scale).to(E4M3).double() * scale


def check_read(
    library: ctypes.CDLL, how: Schedule, rows: int, columns: int, depth: int, low: bool, kind: int, parts: int = 3
) -> Tensor:
    weights, weight_scale, w = make_operand(columns, depth, low)
    h = (torch.randn(rows, depth) * (0.5 + torch.rand(rows, 1)) + torch.randn(rows, 1)).bfloat16()
    x, bias = h.double(), torch.randn(columns)
    parted = x.tensor_split(parts, 1)
    moments = torch.stack([torch.stack([part.sum(1), (part**2).sum(1)], -1) for part in parted]).float()
    stream_scale = scale_of(x) if low else None
    stream = h if stream_scale is None else (x / stream_scale).to(E4M3)
    read = x if stream_scale is None else stream.double() * stream_scale
    reciprocal = (x.var(1, unbiased=False, keepdim=True) + EPS).rsqrt()
    expected = reciprocal * read @ w.T + bias  # means are the weights' business
    out_scale = None
    if kind == READ_GELU:
        expected = F.gelu(expected)
        out_scale = scale_of(expected) if low else None
    out = Output(rows, columns, torch.bfloat16 if out_scale is None else E4M3)
    of_stream = {"moments": moments, "parts": parts, "input_scale": stream_scale, "weight_scale": weight_scale}
    of_columns = {"bias": bias, "out_scale": out_scale, "out": out.all}
    launch(library, how, stream, weights, kind=kind, **of_stream, **of_columns)
    got = out.check()
    limit = 4e-3 if out_scale is None else 4e-2
    values = got.double() if out_scale is None else got.double() * out_scale
    assert error(values, expected) < limit
    for edge in (slice(-1, None), slice(-33, None)):
        assert error(values[edge], expected[edge]) < 2 * limit
    assert error(values[:, -32:], expected[:, -32:]) < 2 * limit
    return got


def check_add(
    library: ctypes.CDLL, how: Schedule, rows: int, columns: int, depth: int, low: bool, is_read: bool = True
) -> list[Tensor]:
    x, input_scale, exact = make_operand(rows, depth, low)
    weights, weight_scale, w = make_operand(columns, depth, low)
    h, bias = 3 * torch.randn(rows, columns).bfloat16(), torch.randn(columns)
    expected = h.double() + exact @ w.T + bias
    stream_scale = scale_of(expected)
    sizes = (ctypes.c_int * 3)()
    library.sizes(how.shape, sizes)
    _, tile, wide = sizes
    parts = -(-columns // tile) * (tile // wide)  # the last ones perhaps behind all columns
    new_h, moments = Output(rows, columns, torch.bfloat16, h), Output(parts * rows, 2, torch.float32)
    stream = Output(rows, columns, E4M3)
    of_next: dict[str, Any] = {"new_moments": moments.all} if is_read else {}
    if is_read and low:
        of_next |= {"stream_scale": stream_scale, "stream": stream.all}
    scales = {"input_scale": input_scale, "weight_scale": weight_scale}
    launch(library, how, x, weights, kind=ADD, h=new_h.all, bias=bias, **scales, **of_next)
    got = new_h.check()
    assert error(got, expected) < 3e-3
    if not is_read:
        return [got]
    parted = F.pad(expected, (0, parts * wide - columns)).unflatten(1, (parts, wide))
    sums = torch.stack([parted.sum(2), (parted**2).sum(2)], -1).transpose(0, 1)
    torch.testing.assert_close(moments.check().double().view_as(sums), sums, rtol=1e-5, atol=2e-3)
    if not low:
        return [got, moments.tensor]
    torch.testing.assert_close(stream.check().double(), expected / stream_scale, rtol=1 / 16, atol=2**-10)
    return [got, moments.tensor, stream.tensor]


def check(library: ctypes.CDLL, how: Schedule, rows: int, columns: int, depth: int, low: bool, kind: int) -> None:
    torch.manual_seed(rows + columns + depth)
    if kind == ADD:
        check_add(library, how, rows, columns, depth, low)
    else:
        check_read(library, how, rows, columns, depth, low, kind)


# Rows and columns end inside a tile, and k inside a stage; a cluster takes all tiles, or a part of them.
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("kind", [READ, READ_GELU, ADD])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(emulated: ctypes.CDLL, shape: int, kind: int, low: bool) -> None:
    for share_weights, clusters in ((False, 1), (True, 2)):
        how = Schedule(shape, share_weights, clusters, shape + kind + share_weights, rows_first=not share_weights)
        check(emulated, how, 250, 320, 336 if low else 168, low, kind)


# Tiles of a cluster that lie behind the last row or column, a single row, a stage less than half full, as many stages as there is
# room for and more. Rows, columns, bytes of k, share_weights, clusters.
SIZES = [
    (1, 32, 32, False, 1),
    (400, 64, 128, True, 1),
    (200, 192, 800, False, 2),
    (97, 576, 256, False, 1),
    (192, 192, 544, True, 1),
    (385, 256, 128, True, 2),
    (384, 480, 672, True, 1),
    (64, 96, 1056, False, 1),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows, columns, k_bytes, share_weights, clusters", SIZES)
def test_sizes(
    emulated: ctypes.CDLL, rows: int, columns: int, k_bytes: int, share_weights: bool, clusters: int, shape: int
) -> None:
    for seed, (low, kind) in enumerate([(False, READ), (True, READ_GELU), (True, ADD), (False, ADD)], rows):
        how, depth = Schedule(shape, share_weights, clusters, seed, rows_first=low), k_bytes if low else k_bytes // 2
        check(emulated, how, rows, columns, depth, low, kind)


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_nobody_reads_what_was_added_to(emulated: ctypes.CDLL, shape: int, low: bool) -> None:
    check_add(emulated, Schedule(shape, True, 1), 193, 96, 64, low, is_read=False)


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_order_of_events(emulated: ctypes.CDLL, shape: int, low: bool) -> None:
    """Copies that end early or late, products that read early or late, clusters that take one tile or several."""
    for check_kind in (partial(check_read, kind=READ), check_add):
        results = []
        for seed, (share_weights, clusters) in enumerate([(False, 1), (True, 1), (False, 2), (True, 2)]):
            torch.manual_seed(0)
            how = Schedule(shape, share_weights, clusters, seed, rows_first=seed > 1)
            found = check_kind(emulated, how, 300, 288, 80, low)
            results.append(found if isinstance(found, list) else [found])
        for other in results[1:]:
            assert all(map(torch.equal, (x.float() for x in results[0]), (x.float() for x in other)))


def test_gelu_far_below_0_and_above_what_e4m3_holds(emulated: ctypes.CDLL) -> None:
    weights, weight_scale, _ = make_operand(64, 64, True)
    rows, input_scale, _ = make_operand(10, 64, True)
    bias = torch.tensor([-1500.0, 1500.0, -3e4, 3e4]).repeat(16)
    moments = torch.tensor([[0.0, 64.0]]).repeat(1, 10, 1)
    for out_scale in (1e-2, 1e-7):
        out = Output(10, 64, E4M3)
        of_stream = {"moments": moments, "parts": 1, "input_scale": input_scale, "weight_scale": weight_scale}
        of_columns = {"bias": bias, "out_scale": torch.tensor([out_scale]), "out": out.all}
        launch(emulated, Schedule(0, True, 1), rows, weights, kind=READ_GELU, **of_stream, **of_columns)
        assert torch.equal(out.check().float(), torch.tensor([0.0, 448.0]).repeat(10, 32))
