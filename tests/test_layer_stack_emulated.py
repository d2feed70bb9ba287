"""The kernel of all layers on the emulated machine of tests/emulator, where it runs without a GPU: its schedule (a deadlock, a
copy that nobody waits for) and its arithmetic, phase by phase against float64 of what the phase before left."""

import ctypes

import pytest
import torch
from emulated import build
from test_inference_layer_stack import make_layers
from torch import Tensor
from torch.nn import functional as F

from bldm_kernels.inference.layer_stack import HEADS, HIDDEN, ROWS, WIDTH, LayerStack, norm_behind, plain
from bldm_kernels.inference.product import dequantized


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    loaded = build(tmp_path_factory.mktemp("emulator"), "layer_stack.cpp", "self_check.cpp")
    loaded.self_check.restype = ctypes.c_char_p
    return loaded


class Run:
    """A launch, with all that it leaves in memory."""

    def __init__(self, library: ctypes.CDLL, stack: LayerStack, h: Tensor, tokens: int, blocks: int, seed: int):
        rows = len(h)
        tiles = -(-rows // ROWS)
        widths = (WIDTH, 6 * WIDTH, WIDTH, HIDDEN)
        self.h = h.clone()
        scratch = [torch.full((tiles * ROWS, width), 0x7F, dtype=torch.uint8) for width in widths]  # NaN
        self.stream, self.qkv, self.mixed, self.inner = scratch
        self.moments = torch.full((rows, WIDTH // 64, 2), float("nan"))
        self.counters = torch.zeros(8 * (1 + tiles + stack.num_layers * (2 + 3 * tiles)), dtype=torch.int32)
        memory = (self.h, *scratch, self.moments, stack.weights, stack.vectors, self.counters)
        pointers = [ctypes.c_void_p(x.data_ptr()) for x in memory]
        sizes = [ctypes.c_long(n) for n in (rows, tokens, stack.num_layers)]
        self.error = library.run(ctypes.c_int(blocks), ctypes.c_uint(seed), *pointers, *sizes, ctypes.c_float(stack.eps)).decode()


def from_tiles(x: Tensor, rows: int) -> Tensor:
    """Bytes in tiles of rows, in the order of the swizzle -> e4m3 values (rows, W) as float64."""
    width = x.shape[1]
    tiled = x.view(-1, width // 128, ROWS, 8, 16)
    row, place = torch.arange(ROWS)[:, None], torch.arange(8)
    return tiled[:, :, row, place ^ row % 8].transpose(1, 2).reshape(-1, width)[:rows].view(torch.float8_e4m3fn).double()


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("batch, tokens, blocks", [(1, 17, 8), (3, 17, 8), (1, 1, 4), (1, 60, 12), (1, 130, 16)])
def test_every_phase_against_float64(emulated: ctypes.CDLL, batch: int, tokens: int, blocks: int) -> None:
    (layer,), rows = make_layers(1, "cpu"), batch * tokens
    h = torch.randn(rows, WIDTH).bfloat16()
    run = Run(emulated, LayerStack([layer], 1e-5), h, tokens, blocks, seed=0)
    assert run.error == "" and run.counters.eq(0).all()
    qkv = run.qkv.flatten().view(torch.bfloat16)[: rows * 3 * WIDTH].view(3, HEADS, rows, 8, 8)
    row, place = torch.arange(rows)[:, None], torch.arange(8)
    q, k, v = qkv[:, :, row, place ^ row % 8].flatten(-2).double().unflatten(2, (batch, tokens)).transpose(1, 2)
    together = torch.stack([q, k, v], 1).permute(0, 3, 1, 2, 4).reshape(rows, -1)
    assert error(together, norm_behind(h.double(), layer.qkv, layer.qkv_offset.double(), layer.qkv_stream, 1e-5)) < 3e-3
    assert layer.proj.input_scale is not None and layer.down.input_scale is not None
    mixed, inner = from_tiles(run.mixed, rows) * layer.proj.input_scale, from_tiles(run.inner, rows) * layer.down.input_scale
    assert error(mixed, F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows, -1)) < 4e-2
    middle = h.double() + mixed @ dequantized(layer.proj).T
    assert error(from_tiles(run.stream, rows) * layer.up_stream, middle + layer.up_offset) < 4e-2
    x, (total, squares) = middle + layer.up_offset, run.moments.double().sum(1).T
    torch.testing.assert_close(total / WIDTH, x.mean(1), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(squares / WIDTH - (total / WIDTH) ** 2, x.var(1, unbiased=False), atol=1e-3, rtol=1e-2)
    expected = F.gelu(norm_behind(middle, layer.up, layer.up_offset.double(), layer.up_stream, 1e-5))
    assert error(inner, expected) < 4e-2
    assert error(run.h, middle + inner @ dequantized(layer.down).T) < 4e-3


def test_several_layers_and_any_order_of_events(emulated: ctypes.CDLL) -> None:
    layers, h = make_layers(2, "cpu"), torch.randn(58, WIDTH).bfloat16()
    stack = LayerStack(layers, 1e-5)
    runs = [Run(emulated, stack, h, 58, blocks, seed) for seed, blocks in enumerate((4, 12))]
    assert [run.error for run in runs] == [""] * 2
    assert all(torch.equal(run.h, runs[0].h) for run in runs)
    expected, rounded = plain(h.double(), layers, 1, HEADS, 1e-5), plain(h.clone(), layers, 1, HEADS, 1e-5)
    assert (runs[0].h.double() - expected).norm() <= 1.2 * (rounded.double() - expected).norm()


@pytest.mark.parametrize(
    "which, said",
    [
        *((0, "deadlock: 128 threads wait"), (1, "more arrivals"), (2, "no multiple of 16 bytes"), (3, "read before")),
        (4, "ended before all of a part met"),
    ],
)
def test_the_machine_notices_what_is_wrong(emulated: ctypes.CDLL, which: int, said: str) -> None:
    assert said in emulated.self_check(which).decode()
