"""The sampling loop as one CUDA graph: the same samples as without, new inputs without a capture, bounded memory, fallbacks."""

import warnings
from typing import Any

import bldm
import pytest
import torch
from conftest import require_gpu
from standins import berdiff, bigr, bld
from tiny_models import tiny_model
from torch import Tensor, nn

import bldm_kernels as bk

pytestmark = pytest.mark.usefixtures("gpu")
SHAPE = (4, 13)
NULL = 3


@pytest.fixture
def gpu() -> None:
    require_gpu()


class Net(nn.Module):
    """A denoiser in exact arithmetic: the same logits in any batch, captured or not."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.mix = nn.Parameter(torch.randint(-2, 3, (52, 52), generator=generator) / 8.0)
        self.labels = nn.Parameter(torch.randint(-9, 10, (NULL + 1, 52), generator=generator) / 8.0)
        self.null_label = NULL
        self.calls = 0

    def forward(self, x: Tensor, time: Tensor, cond: Tensor | None = None) -> Tensor:
        self.calls += 1
        logits = x.flatten(1) @ self.mix + time[:, None] / 8
        return (logits if cond is None else logits + self.labels[cond]).view(-1, *SHAPE)


def sampler(net: Any = None, **options: Any) -> bldm.FastSampler:
    net = Net() if net is None else net
    net = net.cuda() if isinstance(net, nn.Module) else net
    arguments = {"latent_shape": SHAPE, "state": "bits", "device": "cuda", **options}
    return bldm.FastSampler(net, bk.BernoulliSchedule("linear", 16), **arguments)


def both(options: dict[str, Any], calls: list[dict[str, Any]], captures: int) -> bldm.FastSampler:
    """Every call with and without a graph; the number of graphs at the end."""
    with_graph, plain = sampler(**options), sampler(graph=False, **options)
    for call in calls:
        assert torch.equal(with_graph.sample(8, **call), plain.sample(8, **call)), call
    assert len(with_graph.graphs) == captures and not plain.graphs
    return with_graph


def test_a_replay_takes_a_new_seed_offset_condition_scale_and_mask() -> None:
    generator = torch.Generator().manual_seed(1)
    calls: list[dict[str, Any]] = []
    for i in range(4):
        mask, kept = (bk.pack_bits(torch.rand(SHAPE, generator=generator) < 0.4) for _ in range(2))
        scales = [1.0 + i, 2.0, 0.5, 3.0 - i, 1.5]
        options = {"seed": 2**63 + i, "sample_offset": 1000 * i, "cond": torch.arange(8) % 3 if i % 2 else i % 3}
        calls.append({"steps": 5, "guidance_scale": scales, "keep_mask": mask, "keep_bits": kept, **options})
    captured = both({}, calls, 1)
    both({"guidance": bldm.sampling.Guidance(calls=2)}, calls, 1)
    assert captured.graphs[0].num_samples == 8 and captured.graphs[0].num_steps == 5
    assert captured.graph_bytes() > 0


def test_the_denoiser_is_called_for_the_capture_only() -> None:
    taken = sampler()
    taken.sample(8, 5)
    calls = taken.denoiser.calls
    for seed in range(20):
        taken.sample(8, 5, seed=seed)
    assert taken.denoiser.calls == calls


@pytest.mark.parametrize("rule", ["plugin", "marginal", "ddim", "renoise", "threshold-renoise"])
@pytest.mark.parametrize("final", ["threshold", "probability"])
def test_rules(rule: str, final: str) -> None:
    both({"rule": rule, "final": final, "prediction": "x_0"}, [{"steps": 6, "seed": i} for i in range(3)], 1)


def test_other_timesteps_need_no_capture_other_numbers_of_steps_do() -> None:
    both({}, [{"timesteps": [16, 9, 2]}, {"timesteps": [12, 5, 1]}, {"steps": 3}, {"steps": 4}, {"steps": 4, "history": True}], 3)


def test_parts_of_a_batch_and_a_side_stream() -> None:
    taken = sampler()
    together = taken.sample(21, 4, seed=5)
    assert torch.equal(taken.sample(21, 4, seed=5, batch_size=8), together)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert torch.equal(taken.sample(21, 4, seed=5), together)


def test_weights_changed_in_place_are_seen_and_replaced_ones_too() -> None:
    taken, plain = sampler(), sampler(graph=False)
    plain.denoiser = taken.denoiser
    before = taken.sample(8, 4)
    with torch.no_grad():
        taken.denoiser.mix.neg_()
    assert torch.equal(taken.sample(8, 4), plain.sample(8, 4))
    assert not torch.equal(taken.sample(8, 4), before)
    taken.denoiser.mix = nn.Parameter(torch.zeros(52, 52, device="cuda"))
    assert torch.equal(taken.sample(8, 4), plain.sample(8, 4))
    assert len(taken.graphs) == 1


def test_memory_stays_where_it_was() -> None:
    """Bounded graphs; and many calls of many kinds leave nothing behind."""
    taken = sampler(max_graphs=2)

    def calls(count: int) -> None:
        for seed in range(count):
            taken.sample(8, 4, seed=seed)

    for size in (3, 4, 5, 6):
        taken.sample(size, 3)
        assert len(taken.graphs) <= 2
    calls(20)
    torch.cuda.synchronize()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    calls(10_000)
    assert torch.cuda.memory_allocated() == allocated and torch.cuda.memory_reserved() == reserved
    taken.clear_graphs()
    assert taken.graphs == []


def test_what_waits_for_the_device_runs_without_a_graph_and_says_why_once() -> None:
    class Waiting(Net):
        def forward(self, x: Tensor, time: Tensor, cond: Tensor | None = None) -> Tensor:
            assert int(time[0]) > 0
            return super().forward(x, time, cond)

    taken, plain = sampler(Waiting()), sampler(graph=False)
    with pytest.warns(UserWarning, match="without a CUDA graph.*synchroniz"):
        assert torch.equal(taken.sample(8, 4), plain.sample(8, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(taken.sample(8, 4, seed=1), plain.sample(8, 4, seed=1))
    assert torch.rand(3, device="cuda").shape == (3,)  # the generator is no longer being captured
    assert taken.graphs == []


def test_a_capture_that_fails_leaves_the_device_usable() -> None:
    """What the rehearsal lets through and the capture does not."""

    class Querying(Net):
        def forward(self, x: Tensor, time: Tensor, cond: Tensor | None = None) -> Tensor:
            if torch.cuda.is_current_stream_capturing():
                torch.rand(3, device="cuda")
                raise RuntimeError("not while capturing")
            return super().forward(x, time, cond)

    taken = sampler(Querying())
    with pytest.warns(UserWarning, match="not while capturing"):
        taken.sample(8, 4)
    assert torch.rand(3, device="cuda").shape == (3,)
    both({}, [{"steps": 4}], 1)


def test_constants_from_the_host() -> None:
    class Frequencies(Net):
        def forward(self, x: Tensor, time: Tensor, cond: Tensor | None = None) -> Tensor:
            scale = torch.tensor([0.5, 0.25]).to(device=x.device).mul_(2)
            return super().forward(x, time, cond) * scale[0]

    both({"net": Frequencies()}, [{"steps": 4, "seed": i} for i in range(3)], 1)


def test_callbacks_run_without_a_graph() -> None:
    taken, states = sampler(), []
    last = taken.sample(8, 4, callback=lambda info: states.append(info.x))
    assert not taken.graphs and len(states) == 4 and torch.equal(states[-1], last)
    run = taken.run(8, 4, history=True)
    assert run.states is not None and torch.equal(run.states[1:], torch.stack(states))


def test_logits_that_are_not_finite_are_found_in_a_replay() -> None:
    taken = sampler()
    taken.sample(8, 4)
    with torch.no_grad():
        taken.denoiser.mix[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite at step"):
        taken.sample(8, 4)
    assert len(taken.graphs) == 1


def test_logits_that_are_not_finite_leave_no_images() -> None:
    model = tiny_model().cuda()
    model.sample(4, steps=4)
    with torch.no_grad():
        next(model.denoiser.parameters()).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="not finite at step 0"):
        model.sample(4, steps=4)


class Wide(nn.Module):
    """A denoiser with products worth a lower precision."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(52, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 52))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.net(x.flatten(1) + time[:, None] / 16).view(-1, *SHAPE)


def test_autocast_converts_weights_once_a_run_and_follows_them() -> None:
    taken, plain = sampler(Wide(), autocast=torch.bfloat16), sampler(graph=False, autocast=torch.bfloat16)
    plain.denoiser = taken.denoiser
    assert torch.equal(taken.sample(64, 8), plain.sample(64, 8))
    with torch.no_grad():
        taken.denoiser.net[0].weight.mul_(-1)
    with torch.autocast("cuda", torch.bfloat16):  # a caller's own context changes nothing
        assert torch.equal(taken.sample(64, 8, seed=1), plain.sample(64, 8, seed=1))
    assert torch.equal(taken.sample(64, 8, seed=2), plain.sample(64, 8, seed=2))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_compiled_denoisers(autocast: torch.dtype | None) -> None:
    """Captured like others; nearly the same bits as uncompiled; weights changed later are followed."""
    net = Wide().cuda()
    taken, plain = sampler(net, autocast=autocast, compile=True), sampler(net, graph=False, autocast=autocast)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*CUDA graph.*")
        for change in (1, -1):
            with torch.no_grad():
                net.net[0].weight.mul_(change)
            got, expected = taken.sample(512, 1, seed=3), plain.sample(512, 1, seed=3)
            assert int(bk.hamming_distance(got, expected).sum()) < 0.01 * 512 * 52
    assert len(taken.graphs) == 1


def test_compiled_denoisers_with_replaced_weights() -> None:
    net = Wide().cuda()
    options: dict[str, Any] = {"autocast": torch.bfloat16}
    taken, plain = sampler(net, compile=True, **options), sampler(net, graph=False, **options)
    taken.sample(512, 1, seed=3)
    net.net[0] = nn.Linear(52, 256).cuda()
    got, expected = taken.sample(512, 1, seed=3), plain.sample(512, 1, seed=3)
    assert int(bk.hamming_distance(got, expected).sum()) < 0.01 * 512 * 52


# --- other code bases' objects ------------------------------------------------------------------------------------------
def test_accelerated_objects_are_captured() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paper = bldm.accelerate(bld.BinaryDiffusion(dataset="imagenet").cuda())
        for label in (0, 100):
            assert paper.sample(sample_steps=4, b=16, label=label, guidance=1.5).shape == (16, 2, 3)
        assert paper.sample(sample_steps=4, b=16, return_all=True).shape == (80, 2, 3)
        head = bldm.accelerate(bigr.BinaryDiffusion().cuda())
        for _ in range(2):
            head.sample(sample_steps=4, cond=torch.randn(32, 4, device="cuda"), cfg_scale=2.0, return_logits=True)
        diffusion = berdiff.AnomalyDiffusion(berdiff.beta_table("cosine", 8), "EPSILON")
        medical, model = bldm.accelerate(diffusion), berdiff.Model().cuda()
        image = (torch.rand(4, 1, 2, 3, device="cuda") < 0.5).float()
        torch.manual_seed(0)
        sample, mask = medical.ddim_sample_loop_anomaly(model, image.shape, image, noise_level=6)
        torch.manual_seed(0)
        again, mask_again = medical.ddim_sample_loop_anomaly(model, image.shape, image, noise_level=6)
        assert torch.equal(sample, again) and torch.equal(mask, mask_again)
    for accelerated, graphs in ((paper, 2), (head, 1), (medical, 1)):
        assert sum(len(taken.graphs) for taken in accelerated.samplers) == graphs
