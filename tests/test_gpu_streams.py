"""Kernels run where PyTorch's current stream says: on a side stream, inside a graph, on another device, in compiled code."""

from collections.abc import Iterator

import pytest
import torch
from cases import BUILDERS, CASES, Case, Inputs
from conftest import require_backend, require_gpu
from torch import Tensor

import bldm_kernels as bk

# One case an op: the first with samples.
REPRESENTATIVE = [next(case for case in CASES if case.op == op and case.batch > 0) for op in BUILDERS]


@pytest.fixture(params=["cuda", "triton"], autouse=True)
def gpu_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    require_gpu()
    require_backend(request.param)
    with bk.use_backend(request.param):
        yield


def blank(inputs: Inputs) -> Inputs:
    """The same inputs with zeros for the values of every tensor."""
    return {
        name: torch.zeros_like(value).requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }


@torch.no_grad()
def fill(held: Inputs, inputs: Inputs) -> None:
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            held[name].copy_(value)


def assert_same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", REPRESENTATIVE, ids=str)
def test_side_stream(case: Case) -> None:
    """The inputs arrive late on the side stream: a kernel on any other stream would read zeros."""
    inputs = case.inputs("cuda")
    expected = tuple(x.clone() for x in case.run(inputs))
    held = blank(inputs)
    inputs = case.inputs("cuda")  # where the op writes into an input, as it was
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        fill(held, inputs)
        got = case.run(held)
    side.synchronize()
    assert_same(got, expected)


@pytest.mark.parametrize("case", REPRESENTATIVE, ids=str)
def test_graph_replayed_with_other_inputs(case: Case) -> None:
    held = case.inputs("cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        case.run(held)  # compiles what has to be compiled
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        got = case.run(held)
    inputs = {
        name: value.flip(0).contiguous() if isinstance(value, Tensor) and value.dim() > 1 else value
        for name, value in case.inputs("cuda").items()
    }
    fill(held, inputs)
    graph.replay()
    torch.cuda.synchronize()
    got = tuple(x.clone() for x in got)
    again = {k: v.detach().clone().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    for name, value in case.inputs("cuda").items():
        if isinstance(value, Tensor):
            again[name].requires_grad_(value.requires_grad)
    assert_same(got, case.run(again))


@pytest.mark.parametrize("case", REPRESENTATIVE, ids=str)
def test_second_device(case: Case) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    assert torch.cuda.current_device() == 0
    got = case.run(case.inputs("cuda:1"))
    assert all(x.device.index == 1 for x in got)
    assert_same(tuple(x.cpu() for x in got), tuple(x.cpu() for x in case.run(case.inputs("cuda:0"))))


def test_compiled_sampling_step() -> None:
    generator = torch.Generator("cuda").manual_seed(1)
    weight = torch.randn(64, 128, device="cuda", generator=generator)
    head = torch.randn(128, 64, device="cuda", generator=generator) / 8
    row = bk.BernoulliSchedule().coefficients([40, 12])[0].cuda()

    def step(x: Tensor, seed: Tensor) -> Tensor:
        logits = torch.tanh(bk.embed_bits(x, weight)) @ head
        return bk.flip_step(logits, x, row, seed=seed, step=3, uncond_logits=logits / 2, guidance_scale=2.0)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True)
    for seed in (1, 2):
        x = bk.random_bits(8, (16, 64), seed=seed, device="cuda")
        draw = torch.tensor([seed], device="cuda")
        different = (compiled(x, draw) ^ step(x, draw)).count_nonzero()
        assert int(different) <= 2  # the products of compiled code may round another way
