"""The optimiser's one pass: torch.optim.AdamW, clipping, the moving average and the copy, all at once."""

import copy

import pytest
import torch
from bldm.training.update import FlatAdamW
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread")


def models() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.LayerNorm(7), nn.Linear(7, 3))
    return model, copy.deepcopy(model)


def loss_of(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
    return (model(x.to(next(model.parameters()).dtype)).float() - 3).square().sum()


@pytest.mark.parametrize("clip", [0.5, 1e6])
def test_it_is_adamw_with_clipping_and_an_average(clip: float) -> None:
    model, plain = models()
    average, plain_average = copy.deepcopy(model), copy.deepcopy(model)
    flat = FlatAdamW(model, average, None, (0.9, 0.99), 0.1)
    usual = torch.optim.AdamW(plain.parameters(), lr=1.0, betas=(0.9, 0.99), weight_decay=0.1)
    for step in range(30):
        lr, decay = 0.02 / (step + 1), 0.8
        loss_of(model, step).backward()
        flat.step(lr, clip, decay)
        assert all(p.grad is None for p in model.parameters())
        loss_of(plain, step).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), clip)
        usual.param_groups[0]["lr"] = lr
        usual.step()
        usual.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(plain_average.parameters()), list(plain.parameters()), 1 - decay)
    for one, other in ((model, plain), (average, plain_average)):
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
    state, expected = flat.state_dict()["state"], usual.state_dict()["state"]
    for i, moments in expected.items():
        for name, value in moments.items():
            torch.testing.assert_close(state[i][name], value, rtol=2e-5, atol=2e-6)


def test_the_copy_computes_and_follows() -> None:
    model, _ = models()
    half = copy.deepcopy(model).to(torch.bfloat16)
    flat = FlatAdamW(model, copy.deepcopy(model), half, (0.9, 0.99), 0.0)
    first = loss_of(half, 0).item()
    for step in range(100):
        loss_of(half, step).backward()
        flat.step(0.05, 1.0, 0.9)
    assert loss_of(half, 0).item() < 0.2 * first
    for weight, computing in zip(model.parameters(), half.parameters(), strict=True):
        assert torch.equal(computing, weight.bfloat16()) and computing.dtype == torch.bfloat16


def test_small_steps_add_up_in_float32() -> None:
    """A thousand steps of 1e-5 move a weight of 1 by 0.01; in bfloat16 it would not move at all."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    half = copy.deepcopy(model).to(torch.bfloat16)
    flat = FlatAdamW(model, copy.deepcopy(model), half, (0.9, 0.99), 0.0)
    for _ in range(1000):
        half(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        flat.step(1e-5, 1.0, 0.9)
    assert model.weight.item() == pytest.approx(0.99, abs=1e-4)


def test_parameters_lie_in_one_block() -> None:
    model, plain = models()
    flat = FlatAdamW(model, copy.deepcopy(model), None, (0.9, 0.99), 0.0)
    blocks = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert blocks == {flat.weights.untyped_storage().data_ptr()}
    assert all(p.data_ptr() % 256 == flat.weights.data_ptr() % 256 for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_a_parameter_without_a_gradient_stays() -> None:
    model, plain = models()
    flat = FlatAdamW(model, copy.deepcopy(model), None, (0.9, 0.99), 0.0)
    for step in range(3):
        loss_of(model, step).backward()
        model[3].bias.grad = None
        flat.step(0.1, 1.0, 0.5)
    assert torch.equal(model[3].bias, plain[3].bias) and not torch.equal(model[3].weight, plain[3].weight)


def test_state_comes_back() -> None:
    model, other = models()
    one, two = (FlatAdamW(m, copy.deepcopy(m), None, (0.9, 0.99), 0.1) for m in (model, other))
    for step in range(3):
        loss_of(model, step).backward()
        one.step(0.1, 1.0, 0.5)
    other.load_state_dict(model.state_dict())
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for step in range(3, 6):
        for m, flat in ((model, one), (other, two)):
            loss_of(m, step).backward()
            flat.step(0.1, 1.0, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
