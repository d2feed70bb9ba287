"""Learner: a model with all that its learning needs, on one device or, through accelerate, on many."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..autoencoder import BinaryAutoencoder
from ..denoiser import BinaryDenoiser
from . import sharding
from .graph import Graphed
from .options import TrainOptions
from .update import FlatAdamW

# Of the training step's attention on a GPU: cuDNN's is the fastest where it can do it.
ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Learner:
    """Float32 weights that learn, the bfloat16 copy that computes, the optimiser and the average of the weights.

    Under "bf16" forward and backward run on a copy of the model in bfloat16, refreshed after every step, so that no activation
    and no gradient is float32; AdamW, clipping and the average work on the float32 weights (Micikevicius et al. 2018).

    On a GPU a denoiser's forward and backward are CUDA graphs; on compute capability 9.0, in bfloat16, with the operators of
    `bldm_kernels.training`.

    Args:
        model: what learns, without buffers; moved to the device, in training mode.
        options: learning rate, precision, clipping, and so on.
        accel: the `accelerate.Accelerator`; with several processes all have the model, and their gradients are averaged; or
            with `options.fsdp`, or a launcher that says so, everything is sharded (FSDP2).
        betas: of AdamW.

    Attributes:
        model: the float32 weights; sharded under FSDP2.
        module: what to call: the model, or its copy, maybe as graphs.
        ema: the `AveragedModel` (of this process's shards under FSDP2).
    """

    def __init__(self, model: nn.Module, options: TrainOptions, accel: Any, betas: tuple[float, float] = (0.9, 0.99)):
        self.accel, self.grad_clip, self.ema_decay = accel, options.grad_clip, options.ema_decay
        self.model = model.to(accel.device).train()
        self.copy: nn.Module | None = None
        self._blank: nn.Module | None = None
        bf16 = options.mixed_precision == "bf16"
        if (options.fsdp or accel.is_fsdp2) and accel.num_processes > 1:
            self._blank = sharding.blank(model)
            sharding.shard(model, accel.device, accel.num_processes, bf16)
            self.ema = AveragedModel(nn.ParameterList(sharding.local(model.parameters())))
            self.module = model
            on_gpu = accel.device.type == "cuda"
            self.optimizer: Any = torch.optim.AdamW(
                model.parameters(), lr=options.lr, weight_decay=options.weight_decay, betas=betas, fused=on_gpu
            )
        else:
            self.ema = AveragedModel(model)
            self.ema.module.eval()
            self.copy = copy.deepcopy(model).to(torch.bfloat16) if bf16 else None
            self.optimizer = FlatAdamW(
                model, self.ema.module, self.copy, betas, options.weight_decay, processes=accel.num_processes
            )
            self.module = model if self.copy is None else self.copy
            if isinstance(model, BinaryDenoiser) and accel.device.type == "cuda":
                if bf16 and torch.cuda.get_device_capability(accel.device) == (9, 0):
                    fuse(self.module)
                self.module = Graphed(self.module)
        if options.compile:
            compile_blocks(model if self.copy is None else self.copy)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Around forward passes: which attention kernels to prefer."""
        if self.accel.device.type == "cuda":
            with sdpa_kernel(ATTENTION, set_priority=True):
                yield
        else:
            yield

    def update(self, loss: Tensor, step: int, lr: float) -> None:
        """One step of the optimiser, and of the average."""
        self.accel.backward(loss)
        # The average starts out shorter, so that a short run does not keep its random beginning.
        decay = min(self.ema_decay, (1 + step) / (10 + step)) if step else 0.0
        if isinstance(self.optimizer, FlatAdamW):
            self.optimizer.step(lr, self.grad_clip, decay)
        else:
            self._sharded_step(lr, decay)
        self.ema.n_averaged += 1

    @torch.no_grad()
    def _sharded_step(self, lr: float, decay: float) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        averages, weights = (sharding.local(m.parameters()) for m in (self.ema.module, self.model))
        get_ema_multi_avg_fn(decay)(averages, weights, self.ema.n_averaged)

    def average(self) -> nn.Module:
        """The averaged model, whole, in evaluation mode. All processes must call it."""
        if self._blank is None:
            return self.ema.module
        averaged = copy.deepcopy(self._blank).to_empty(device=self.accel.device).eval()
        averaged.load_state_dict(sharding.together(list(self.ema.module.parameters()), self.model))
        return averaged

    def state(self) -> dict[str, Any]:
        """Weights, average and optimiser, whole, whatever the processes. All of them must call it."""
        return {
            "model": sharding.whole(self.model.state_dict()),
            "ema": self.average().state_dict(),
            "averaged": int(self.ema.n_averaged),
            "optimizer": sharding.whole(self.optimizer.state_dict()),
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave, on any number of processes. KeyError, ValueError or RuntimeError: it does not fit."""
        parameters = dict(self.model.named_parameters())
        weights = {name: sharding.part_of(value, parameters[name]) for name, value in state["model"].items()}
        self.model.load_state_dict(weights)
        if state["ema"].keys() != parameters.keys():
            raise ValueError("the average has other parameters than the model")
        averages = [sharding.part_of(state["ema"][name], parameter) for name, parameter in parameters.items()]
        for average, value in zip(self.ema.module.parameters(), sharding.local(averages), strict=True):
            average.copy_(value)
        self.ema.n_averaged.fill_(state["averaged"])
        moments = state["optimizer"]["state"]
        for i, parameter in enumerate(parameters.values()):
            if i in moments:
                moments[i] = {name: sharding.part_of(value, parameter) for name, value in moments[i].items()}
        if isinstance(self.optimizer, FlatAdamW):
            self.optimizer.load_state_dict({"state": moments})
            self.optimizer.refresh()
        else:
            self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})


def fuse(model: nn.Module) -> None:
    """Let it train on the operators of `bldm_kernels.training`."""
    assert isinstance(model, BinaryDenoiser)
    for module in (model, *model.blocks):
        module.fused = True  # type: ignore[assignment]


def compile_blocks(model: nn.Module) -> None:
    """Compile a model's `blocks` one by one, which takes the time of one; an autoencoder's two halves, but for the last
    convolution, whose gradient alone an adversary asks for; or the whole model."""
    if isinstance(model, BinaryAutoencoder):
        model.encoder.compile()
        model.features = torch.compile(model.features)  # type: ignore[method-assign]
        return
    for block in getattr(model, "blocks", [model]):
        block.compile()
