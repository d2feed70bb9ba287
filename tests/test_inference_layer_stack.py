"""The layers of a small batch as one kernel: the layout of its weights here, its results on a GPU of compute capability 9.0."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bldm_kernels.backends.native import load_part
from bldm_kernels.inference.layer_stack import (
    COLUMNS,
    DEPTH,
    HEADS,
    HIDDEN,
    WIDTH,
    Layer,
    LayerStack,
    norm_behind,
    plain,
    supports,
    tiles,
)
from bldm_kernels.inference.product import Weights, prepare


def make_layers(count: int, device: str) -> list[Layer]:
    torch.manual_seed(0)

    def scale(largest: float) -> Tensor:
        return torch.tensor([largest / 224])

    def weights(n: int, k: int, largest: float, **beside: Any) -> Weights:
        linear = nn.Linear(k, n)
        with torch.no_grad():
            linear.weight.normal_(std=k**-0.5)
        made = prepare(linear, torch.bfloat16, input_scale=scale(largest), **beside)
        return Weights(*(x.to(device) for x in made if x is not None))

    def layer() -> Layer:
        gamma, norm = torch.full((WIDTH,), 0.3), nn.LayerNorm(WIDTH)
        products = (
            weights(3 * WIDTH, WIDTH, 6, norm=norm),
            weights(WIDTH, WIDTH, 4, gamma=gamma),
            weights(HIDDEN, WIDTH, 6, norm=norm),
            weights(WIDTH, HIDDEN, 6, gamma=gamma),
        )
        return Layer(*products, *(torch.randn(2, WIDTH) * 0.1).to(device), *(scale(8).to(device) for _ in range(2)))

    return [layer() for _ in range(count)]


def test_tiles_are_stages_in_the_order_of_the_swizzle() -> None:
    weight = torch.arange(256 * 384).view(256, 384)
    tiled = tiles(weight)
    assert tiled.shape == (2, 3, COLUMNS, DEPTH)
    for row, column in ((0, 0), (1, 0), (130, 77), (255, 191), (77, 64), (200, 100), (9, 383)):
        r, c = row % 128, column % 128
        address = (c // 16 ^ r % 8) * 16 + c % 16  # where the tensor cores look
        assert tiled[row // 128, column // 128, r, address] == weight[row, column]


def test_the_plain_form_is_a_pre_norm_transformer() -> None:
    layer = make_layers(1, "cpu")[0]
    h = torch.randn(2 * 5, WIDTH, dtype=torch.float64)

    def linear(x: Tensor, weights: Weights, bias: bool = True) -> Tensor:
        assert weights.weight_scale is not None
        return x @ (weights.weight.double() * weights.weight_scale.double()).T + (weights.bias.double() if bias else 0)

    def norm(x: Tensor, offset: Tensor) -> Tensor:
        x = x + offset
        return (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()

    heads = linear(norm(h, layer.qkv_offset), layer.qkv).view(2, 5, 3, HEADS, 64).permute(2, 0, 3, 1, 4)
    mixed = (heads[0] @ heads[1].mT / 8).softmax(-1) @ heads[2]
    middle = h + linear(mixed.transpose(1, 2).reshape(10, WIDTH), layer.proj, bias=False)
    inner = nn.functional.gelu(linear(norm(middle, layer.up_offset), layer.up))
    expected = middle + linear(inner, layer.down, bias=False)
    added, error = expected - h, plain(h.clone(), [layer], 2, HEADS, 1e-5) - expected
    assert error.norm() < 0.06 * added.norm()  # what is read is rounded to e4m3


def test_a_norm_may_stand_behind_its_product() -> None:
    layer = make_layers(1, "cpu")[0]
    scale = torch.tensor([2.0**-4])
    x = torch.randint(-7, 8, (5, WIDTH)).double() / 2 + 0.5  # which e4m3 holds
    mean, deviation = x.mean(1, keepdim=True), (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert layer.qkv.weight_scale is not None
    weight = layer.qkv.weight.double() * layer.qkv.weight_scale.double()
    behind = norm_behind(x - layer.qkv_offset.double(), layer.qkv, layer.qkv_offset.double(), scale, 1e-5)
    expected = (x - mean) / deviation @ weight.T + layer.qkv.bias.double()
    assert (behind - expected).norm() < 3e-4 * expected.norm()  # rows add up to 0 but for the rounding of a weight


def test_fill_takes_over_new_weights() -> None:
    first, second = make_layers(2, "cpu")
    stack = LayerStack([first], 1e-5)
    places = stack.weights.data_ptr(), stack.vectors.data_ptr()
    stack.fill([second])
    assert (stack.weights.data_ptr(), stack.vectors.data_ptr()) == places
    fresh = LayerStack([second], 1e-5)
    assert torch.equal(stack.weights, fresh.weights) and torch.equal(stack.vectors, fresh.vectors)


def test_errors() -> None:
    layer = make_layers(1, "cpu")[0]
    with pytest.raises(ValueError, match=r"layers\[0\]: expected e4m3 weights of shapes"):
        LayerStack([layer._replace(up=layer.qkv)], 1e-5)
    with pytest.raises(ValueError, match="h: the kernel does not take"):
        LayerStack([layer], 1e-5)(torch.zeros(4, WIDTH, dtype=torch.bfloat16), 1)


@pytest.fixture
def on_gpu() -> Callable[[int], tuple[list[Layer], LayerStack]]:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0) or load_part("cuda")[0] is None:
        pytest.skip("needs the CUDA build and a GPU of compute capability 9.0")

    def make(count: int) -> tuple[list[Layer], LayerStack]:
        layers = make_layers(count, "cuda")
        return layers, LayerStack(layers, 1e-5)

    return make


@pytest.mark.parametrize("batch, tokens", [(1, 257), (1, 280), (3, 17), (1, 1), (5, 56)])
def test_the_kernel_is_as_close_as_the_plain_form(on_gpu: Any, batch: int, tokens: int) -> None:
    layers, stack = on_gpu(4)
    h = torch.randn(batch * tokens, WIDTH, device="cuda").bfloat16()
    expected, rounded = plain(h.double(), layers, batch, HEADS, 1e-5), plain(h.clone(), layers, batch, HEADS, 1e-5)
    out = stack(h.clone(), batch)
    assert (out.double() - expected).norm() <= 1.2 * (rounded.double() - expected).norm()
    for _ in range(20):
        assert torch.equal(stack(h.clone(), batch), out)


def test_the_kernel_runs_in_a_graph_and_not_for_what_it_does_not_take(on_gpu: Any) -> None:
    _, stack = on_gpu(2)
    h = torch.randn(257, WIDTH, device="cuda").bfloat16()
    side, graph, kept = torch.cuda.Stream(), torch.cuda.CUDAGraph(), h.clone()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        out = stack(h.clone(), 1)
        with torch.cuda.graph(graph, stream=side):
            stack(kept, 1)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(kept, out)
    sample = h.view(1, 257, WIDTH)
    assert supports(sample, HEADS) and not supports(sample.half(), HEADS) and not supports(sample, 8)
    assert not supports(torch.cat([sample] * 3), HEADS) and not supports(sample[..., :512].contiguous(), HEADS)
