"""How the denoiser runs: copies of weights in lower precision follow the originals; constants of the host."""

import torch
from bldm.sampling.execution import Anatomy, Execution, LowPrecisionCopy
from bldm.sampling.graph import HostConstants
from torch import nn


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Conv1d(1, 2, 3), nn.Dropout())


def test_a_copy_shares_all_but_the_weights_of_products() -> None:
    original = net().train()
    module = LowPrecisionCopy(original, torch.bfloat16).module
    assert module[0].weight.dtype == module[0].bias.dtype == module[2].weight.dtype == torch.bfloat16
    assert module[1].weight is original[1].weight and original[0].weight.dtype == torch.float32
    assert torch.equal(module[0].weight, original[0].weight.bfloat16())
    assert original.training and not module.training and not module[3].training


def test_a_copy_follows_changes_in_place() -> None:
    original = net()
    taken = LowPrecisionCopy(original, torch.bfloat16)
    weight = taken.module[0].weight
    with torch.no_grad():
        original[0].weight.add_(1)
    taken.refresh()
    assert taken.module[0].weight is weight and torch.equal(weight, original[0].weight.bfloat16())


def test_an_anatomy_notices_replaced_parts_weights_and_memory() -> None:
    original = net()
    anatomy = Anatomy(original)
    addresses = anatomy.addresses()
    with torch.no_grad():
        original[0].weight.add_(1)
    assert anatomy.intact() and anatomy.addresses() == addresses
    original[0].weight.data = torch.zeros(8, 4)
    assert anatomy.intact() and anatomy.addresses() != addresses
    for change in (
        lambda m: setattr(m[0], "weight", nn.Parameter(torch.zeros(8, 4))),
        lambda m: m.__setitem__(0, nn.Linear(4, 8)),
    ):
        changed = net()
        anatomy = Anatomy(changed)
        change(changed)
        assert not anatomy.intact()
    assert Anatomy(print).intact() and Anatomy(print).addresses() == ()


def test_an_execution_serves_one_denoiser_on_one_device() -> None:
    original, cpu = net(), torch.device("cpu")
    execution = Execution(original, cpu, None, False)
    assert execution.denoise is original and execution.serves(original, cpu)
    assert not execution.serves(net(), cpu) and not execution.serves(original, torch.device("meta"))
    with Execution(original, cpu, torch.bfloat16, False).context():
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


def test_copies_between_cpu_tensors_are_not_the_devices_constants() -> None:
    with HostConstants():
        x = torch.arange(3).to(torch.float32).to("cpu", copy=True)
    assert torch.equal(x, torch.tensor([0.0, 1, 2]))
