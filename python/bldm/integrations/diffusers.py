"""BernoulliScheduler: the Bernoulli diffusion as a diffusers scheduler (needs the extra `bldm-kernels[diffusers]`)."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

import bldm_kernels as bk

LABEL_SHIFT = {"t": 0, "t-1": 1}  # internal t = 1..T is the label plus this
Generators = torch.Generator | Sequence[torch.Generator] | None


class BernoulliScheduler(SchedulerMixin, ConfigMixin):
    """Reverse steps and forward noise of a Bernoulli diffusion (Wang et al., CVPR 2023), as diffusers expects them.

    A state is either unpacked, a tensor shaped like the model's logits, or packed, uint8 (B, ..., ceil(C / 8)) for logits
    (B, ..., C): `uint8` always means packed. In an unpacked state a bit is 1 where the value is > 0, so that besides 0 and 1
    Gaussian noise, which many pipelines start from, is a state too: fair coin flips. What comes out is 0 and 1.

    Args:
        num_train_timesteps: T.
        schedule: "linear", "cosine" or "sigmoid", see `bldm_kernels.BernoulliSchedule`.
        trained_betas: (T,) instead of `schedule`: the probability that step t replaces a bit by a fair coin flip.
        keep: (T + 1,) instead of `schedule`: the kept signal k_t, see `BernoulliSchedule.from_keep`.
        prediction_type: "flip" or "x_0": what the model's logits mean.
        rule: reverse rule of `BernoulliSchedule.coefficients`. `plugin` and `marginal` are different distributions.
        final: rule of the last step; None: the same as `rule`.
        sigma: of the rule "ddim".
        temperature: > 0; divides the logits.
        time_label: what timesteps are called: "t-1" (0..T - 1, the habit of diffusers and of the paper's code) or "t" (1..T, what
            `BinaryDenoiser` expects).

    A table (`trained_betas`, `keep`) decides `config.num_train_timesteps`.

    Raises: TypeError, ValueError naming the argument.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 256,
        schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        keep: Sequence[float] | None = None,
        prediction_type: str = "flip",
        rule: str = "plugin",
        final: str | None = "threshold",
        sigma: float | None = None,
        temperature: float = 1.0,
        time_label: str = "t-1",
    ):
        bk.checks.option("prediction_type", prediction_type, ("flip", "x_0"))
        bk.checks.option("time_label", time_label, LABEL_SHIFT)
        bk.checks.positive("temperature", temperature)
        if trained_betas is not None and keep is not None:
            raise ValueError("trained_betas, keep: expected at most one of the two")
        if trained_betas is not None:
            betas = torch.as_tensor(trained_betas, dtype=torch.float64)
            if betas.dim() != 1 or not len(betas) or not bool(((betas >= 0) & (betas <= 1)).all()):
                raise ValueError(f"trained_betas: expected probabilities, one a step, got {trained_betas}")
            self.schedule = bk.BernoulliSchedule.from_keep(torch.cat([torch.ones(1), (1 - betas).cumprod(0)]))
            self.register_to_config(num_train_timesteps=len(betas), trained_betas=betas.tolist())
        elif keep is not None:
            self.schedule = bk.BernoulliSchedule.from_keep(keep)
            self.register_to_config(num_train_timesteps=self.schedule.num_steps, keep=self.schedule.keep.tolist())
        else:
            self.schedule = bk.BernoulliSchedule(schedule, num_train_timesteps)
        self.schedule.coefficients([1], rule, final, sigma=sigma)  # rejects wrong options here rather than in the first step
        self._shift = LABEL_SHIFT[time_label]
        self._flip = self.schedule.flip.float()
        self.num_inference_steps: int | None = None
        self._choose(range(self.schedule.num_steps, 0, -1), None)

    def __len__(self) -> int:
        return self.schedule.num_steps

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        return [cls]

    @property
    def betas(self) -> Tensor:
        """float64 (T,): the probability 1 - k_t / k_(t-1) that step t replaces a bit by a fair coin flip."""
        keep = self.schedule.keep
        return torch.where(keep[:-1] > 0, 1 - keep[1:] / keep[:-1].clamp(min=1e-300), 1.0)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the steps: `num_inference_steps` in 1..T, spaced as the paper's code does, or labels, strictly descending."""
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("num_inference_steps, timesteps: expected exactly one of the two")
        if timesteps is None:
            count = bk.checks.integer("num_inference_steps", num_inference_steps, 1, self.schedule.num_steps)
            chosen: Sequence[int] = self.schedule.timesteps(count)
        else:
            chosen = [self._internal("timesteps", t) for t in timesteps]
        self._choose(chosen, device)
        self.num_inference_steps = len(chosen)

    def _internal(self, name: str, label: int | float | Tensor) -> int:
        """A label as t in 1..T."""
        value = label.item() if isinstance(label, Tensor) else label
        whole = int(value) if isinstance(value, float) and value.is_integer() else value
        return bk.checks.integer(name, whole, 1 - self._shift, self.schedule.num_steps - self._shift) + self._shift

    def _choose(self, chosen: Sequence[int], device: torch.device | str | None) -> None:
        if not chosen or any(later >= t for t, later in pairwise(chosen)):
            labels = [t - self._shift for t in chosen]
            raise ValueError(f"timesteps: expected at least one, strictly descending, got {labels}")
        self._coefficients: Tensor | None = None  # made in the first step: a scheduler is often made only to be replaced
        self._position = {t: i for i, t in enumerate(chosen)}
        self.timesteps = torch.tensor(chosen, device=device) - self._shift

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """The state as the model should see it: 0 and 1 (so nothing changes but Gaussian noise); packed states as they are."""
        return sample if sample.dtype == torch.uint8 else (sample > 0).to(sample.dtype)

    def initial_sample(
        self,
        shape: Sequence[int],
        generator: Generators = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """x_T: fair coin flips of `shape` (B, ..., C) in bits; packed, (B, ..., ceil(C / 8)), with dtype=torch.uint8."""
        if len(shape) < 2:
            raise ValueError(f"shape: expected the batch and the bits of a sample, got {tuple(shape)}")
        device = torch.device("cpu" if device is None else device)
        packed = torch.cat(
            [
                bk.random_bits(len(range(shape[0])[part]), shape[1:], seed=seed, device=device)
                for part, seed in _draws(generator, shape[0], device)
            ]
        )
        return packed if dtype == torch.uint8 else bk.unpack_bits(packed, shape[-1], dtype)

    def step(
        self,
        model_output: Tensor,
        timestep: int | float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """One reverse step, from `timestep` to the next one chosen by `set_timesteps` (the last goes to the clean state).

        Args:
            model_output: logits, floating, (B, ..., C).
            timestep: one of `timesteps`. A tensor on a GPU is not looked at on the host, so it must be one.
            sample: the state x_t, unpacked like `model_output` or packed.
            generator: where the 64-bit seed of the draw comes from: one for the batch, or one a sample, whose bits then depend on
                its generator alone. Default: PyTorch's own for the device.
            return_dict: False gives the tuple (prev_sample,).

        Returns: `SchedulerOutput` with `prev_sample` in the form and dtype of `sample`.

        Raises: TypeError, ValueError naming the argument; on a CPU FloatingPointError for logits that are not finite.
        """
        bk.checks.floating("model_output", model_output, min_dim=2)
        packed = bk.checks.tensor("sample", sample, min_dim=2).dtype == torch.uint8
        if packed:
            bk.checks.packs("sample", sample, "model_output", model_output)
        else:
            bk.checks.same_device("sample", sample, "model_output", model_output)
            bk.checks.shape("sample", sample, model_output.shape, "like model_output")
        x_t = sample if packed else bk.pack_bits(sample > 0)
        coefficients = self._row(timestep, sample.device)
        parts = [
            bk.flip_step(
                model_output[part],
                x_t[part],
                coefficients,
                seed=seed,
                step=0,
                temperature=self.config["temperature"],
                prediction=self.config["prediction_type"],
            )
            for part, seed in _draws(generator, len(sample), sample.device)
        ]
        x_s = torch.cat(parts) if len(parts) > 1 else parts[0]
        previous = x_s if packed else bk.unpack_bits(x_s, sample.shape[-1], sample.dtype)
        return SchedulerOutput(prev_sample=previous) if return_dict else (previous,)

    def _row(self, timestep: int | float | Tensor, device: torch.device) -> Tensor:
        """float32 (1, 4): the coefficients of the step from `timestep`, without a synchronisation."""
        if self._coefficients is None:
            rules = {name: self.config[name] for name in ("rule", "final", "sigma")}
            self._coefficients = self.schedule.coefficients(list(self._position), **rules)
        self._coefficients = self._coefficients.to(device)
        if isinstance(timestep, Tensor) and timestep.numel() != 1:
            raise ValueError(f"timestep: expected one for the whole batch, got shape {tuple(timestep.shape)}")
        if isinstance(timestep, Tensor) and timestep.device.type != "cpu":
            later = (self.timesteps.to(timestep.device) > timestep).sum(0, keepdim=True)
            return self._coefficients.index_select(0, later.to(device))
        t = self._internal("timestep", timestep)
        if t not in self._position:
            raise ValueError(f"timestep: {t - self._shift} is none of the {len(self._position)} chosen by set_timesteps")
        return self._coefficients[self._position[t]][None]

    def add_noise(
        self, original_samples: Tensor, noise: Tensor | Generators, timesteps: Tensor, *, num_bits: int | None = None
    ) -> Tensor:
        """The forward process q(x_t | x_0): every bit flipped with probability (1 - k_t) / 2.

        Args:
            original_samples: x_0, unpacked or packed.
            noise: standard Gaussian noise (B, ..., C), as training scripts draw it: a bit is flipped where Phi(noise) is below
                its probability, so the same noise flips more and more bits with t. Or a generator (or one a sample, or None).
            timesteps: int64 labels, one element or (B,).
            num_bits: C of packed states drawn with a generator (default: no padding bits in the last byte).

        Returns: x_t in the form and dtype of `original_samples`.
        """
        x_0 = bk.checks.tensor("original_samples", original_samples, min_dim=2)
        bk.checks.tensor("timesteps", timesteps, (torch.int64, torch.int32))
        if timesteps.numel() not in (1, len(x_0)) or timesteps.dim() > 1:
            raise ValueError(f"timesteps: expected one element or shape ({len(x_0)},), got {tuple(timesteps.shape)}")
        if timesteps.device.type == "cpu":
            for label in timesteps.reshape(-1).tolist():
                self._internal("timesteps", label)
        self._flip = self._flip.to(x_0.device)
        flip = self._flip.index_select(0, timesteps.reshape(-1).to(x_0.device) + self._shift).expand(len(x_0))
        packed = x_0.dtype == torch.uint8
        if isinstance(noise, Tensor):
            bk.checks.same_device("noise", bk.checks.floating("noise", noise, min_dim=2), "original_samples", x_0)
            flips = noise.float() < torch.special.ndtri(flip).view(-1, *[1] * (noise.dim() - 1))
            if packed:
                bk.checks.packs("original_samples", x_0, "noise", noise)
                return x_0 ^ bk.pack_bits(flips)
            bk.checks.shape("noise", noise, x_0.shape, "like original_samples")
            return ((x_0 > 0) ^ flips).to(x_0.dtype)
        bits = x_0 if packed else bk.pack_bits(x_0 > 0)
        count = num_bits if packed else x_0.shape[-1]
        x_t = torch.cat(
            [
                bk.add_noise(bits[part], flip[part].contiguous(), seed=seed, num_bits=count)
                for part, seed in _draws(noise, len(x_0), x_0.device)
            ]
        )
        return x_t if packed else bk.unpack_bits(x_t, x_0.shape[-1], x_0.dtype)


def _draws(generator: Generators, num_samples: int, device: torch.device) -> Iterator[tuple[slice, int | Tensor]]:
    """(part of the batch, seed) for every generator: the whole batch from one, or a sample from each."""
    if generator is None or isinstance(generator, torch.Generator):
        yield slice(None), _seed(generator, device)
        return
    if len(generator) != num_samples:
        raise ValueError(f"generator: expected one, or one for each of the {num_samples} samples, got {len(generator)}")
    for i, one in enumerate(generator):
        yield slice(i, i + 1), _seed(one, device)


def _seed(generator: torch.Generator | None, device: torch.device) -> int | Tensor:
    """64 bits from the generator; on the device itself if the generator is there, so that nothing waits for it."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
    source = device if generator is None else generator.device
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), generator=generator, device=source)
    return int(seed) if "cpu" in (source.type, device.type) else seed.to(device)
