"""The inference engine of a `BinaryAutoencoder`: the same network in 16 bits, channels last, with fused kernels and CUDA graphs.

Convolutions and products are the libraries'. What stands between two of them (bias, residual, GroupNorm, SiLU) is one launch; an
upsampling is part of the convolution behind it; the last norm, the last convolution and the conversion to pixels are one.
"""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bldm_kernels as bk
from bldm_kernels.inference import group_norm, pixels
from bldm_kernels.inference.convolution import Filter, convolve
from bldm_kernels.inference.group_norm import Norm, finish

from ..convnets import Attention, Downsample, ResidualBlock, Upsample
from ..parts import part
from .activations import precision_of
from .graphs import GraphCache
from .report import Part, warn_of_fallbacks

if TYPE_CHECKING:
    from ..autoencoder import BinaryAutoencoder

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
IMAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)

# Between two steps: the activations (B, H, W, C), and their norm if the next step begins with one (or its statistics).
Flow = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Place:
    """Where the plan of a network is: name and shape of the activations, and the parts noted so far."""

    name: str
    shape: tuple[int, int, int]
    device: torch.device
    dtype: torch.dtype
    counters: Tensor
    parts: list[Part]

    def note(self, what: str, runs: str | bool) -> None:
        """A part of the step, and the function of PyTorch that runs it, or whether a kernel does."""
        name = f"{self.name}/{what}"
        self.parts.append(Part(name, self.shape, runs) if isinstance(runs, str) else Part.of(name, self.shape, runs))


class Ending:
    """What follows the convolution of a step: the sum with bias and residual, and the norm that the next step begins with."""

    def __init__(self, norm: Norm | None, place: Place, *, keep: bool, apply: bool = True):
        self.norm, self.keep, self.apply, self.counters = norm, keep, apply, place.counters
        supported = group_norm.supports(place.dtype, place.shape[2], place.device)
        place.note("sum" if norm is None else "sum, norm", supported)

    def __call__(self, raw: Tensor, filter: Filter | None, residual: Tensor | None = None) -> Flow:
        options = {"keep": self.keep, "apply": self.apply, "counters": self.counters}
        if filter is None:
            return finish(raw, None, residual, self.norm, **options)  # type: ignore[arg-type]
        return finish(raw, filter.bias, residual, self.norm, source=filter.source, **options)  # type: ignore[arg-type]


def _noted(filter: Filter, place: Place, name: str = "convolution") -> Filter:
    place.note(name, "linear" if filter.weight.shape[2:] == (1, 1) else "conv2d")
    return filter


class Convolution:
    """A convolution, of the activations or of their norm."""

    def __init__(self, filter: Filter, of_norm: bool, ending: Ending):
        self.filter, self.of_norm, self.ending = filter, of_norm, ending

    def __call__(self, flow: Flow) -> Flow:
        x = flow[self.of_norm]
        assert x is not None
        return self.ending(convolve(x, self.filter), self.filter)


class Residual:
    def __init__(self, block: ResidualBlock, place: Place, after: "After"):
        assert isinstance(block.norm2, nn.GroupNorm)
        inside = replace(place, shape=(*place.shape[:2], block.conv1.out_channels))
        self.skip = None
        if isinstance(block.skip, nn.Conv2d):
            self.skip = _noted(Filter.of(block.skip, place.dtype), place, "skip")
        self.conv1 = _noted(Filter.of(block.conv1, place.dtype), place, "convolution 1")
        self.middle = Ending(Norm.of(block.norm2, place.dtype, silu=True), inside, keep=False)
        self.conv2 = _noted(Filter.of(block.conv2, place.dtype), inside, "convolution 2")
        if self.skip is not None:  # its bias is added with that of the second
            self.conv2 = replace(self.conv2, bias=self.conv2.bias + self.skip.bias)
        self.ending = after(inside)

    def __call__(self, flow: Flow) -> Flow:
        x, normalized = flow
        assert x is not None and normalized is not None
        _, h = self.middle(convolve(normalized, self.conv1), self.conv1)
        assert h is not None
        return self.ending(convolve(h, self.conv2), self.conv2, x if self.skip is None else convolve(x, self.skip))


class SelfAttention:
    def __init__(self, block: Attention, place: Place, after: "After"):
        qkv = _noted(Filter.of(block.qkv, place.dtype), place, "qkv")
        self.weight, self.bias = qkv.weight[:, :, 0, 0], qkv.bias.to(place.dtype)
        place.note("attention", "scaled_dot_product_attention")
        self.out = _noted(Filter.of(block.out, place.dtype), place, "out")
        self.ending = after(place)

    def __call__(self, flow: Flow) -> Flow:
        x, normalized = flow
        assert x is not None and normalized is not None
        q, k, v = F.linear(normalized, self.weight, self.bias).flatten(1, 2).unsqueeze(1).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(q, k, v).reshape(x.shape)
        return self.ending(convolve(mixed, self.out), self.out, x)


class FirstConvolution:
    """The encoder's first: images (B, C, H, W) -> activations, as a product of their patches."""

    def __init__(self, conv: nn.Conv2d, place: Place, after: "After"):
        filter = Filter.of(conv, place.dtype)
        place.note("patches", pixels.supports_patches(place.dtype, place.device))
        taps = filter.weight.permute(0, 2, 3, 1).flatten(1)
        self.width = -(-taps.shape[1] // 8) * 8  # products want multiples of 16 bytes
        weight = F.pad(taps, (0, self.width - taps.shape[1]))[:, :, None, None]
        self.filter = _noted(replace(filter, weight=weight, padding=0), replace(place, shape=(*place.shape[:2], self.width)))
        self.ending = after(replace(place, shape=(*place.shape[:2], conv.out_channels)))

    def __call__(self, flow: Flow) -> Flow:
        images, _ = flow
        assert images is not None
        return self.ending(convolve(pixels.patches(images, self.width, self.filter.weight.dtype), self.filter), self.filter)


class Pixels:
    """The decoder's end: norm, convolution, image."""

    def __init__(self, norm: Norm, conv: nn.Conv2d, place: Place):
        filter = Filter.of(conv, place.dtype)
        self.norm, self.bias = norm, filter.bias
        self.weight = filter.weight.permute(0, 2, 3, 1).contiguous()
        supported = pixels.supports_pixels(place.dtype, self.weight, place.device)
        place.note("norm, convolution, pixels", supported)

    def __call__(self, flow: Flow, dtype: torch.dtype) -> Tensor:
        x, statistics = flow
        assert x is not None and statistics is not None
        return pixels.pixels(x, statistics, self.norm, self.weight, self.bias, dtype)


Step = Convolution | Residual | SelfAttention | FirstConvolution


@dataclass(frozen=True)
class After:
    """The modules behind a step, which say how it ends."""

    modules: tuple[nn.Module, ...]

    def norm(self, dtype: torch.dtype) -> Norm | None:
        """The norm that they begin with."""
        match self.modules:
            case (ResidualBlock(norm1=nn.GroupNorm() as norm), *_):
                return Norm.of(norm, dtype, silu=True)
            case (Attention(norm=nn.GroupNorm() as norm), *_):
                return Norm.of(norm, dtype, silu=False)
            case (nn.GroupNorm() as norm, *rest):
                return Norm.of(norm, dtype, silu=isinstance(rest[0], nn.SiLU))
        return None

    def __call__(self, place: Place) -> Ending:
        """The ending of a step that comes to `place`; a norm that is a module of its own hides what it normalises."""
        alone = bool(self.modules) and isinstance(self.modules[0], nn.GroupNorm)
        before_pixels = place.name.startswith("decoder") and alone and len(self.modules) <= 3
        return Ending(self.norm(place.dtype), place, keep=before_pixels or not alone, apply=not before_pixels)


def plan(modules: tuple[nn.Module, ...], count: int, place: Place) -> tuple[list[tuple[str, Step]], Place]:
    """The steps of the first `count` modules of a network of convnets.py, each with its name, and where they end."""
    steps = list[tuple[str, Step]]()
    for i, module in enumerate(modules[:count]):
        after = After(modules[i + 1 :])
        here = replace(place, name=f"{place.name}/{type(module).__name__} {i}")
        height, width, channels = place.shape
        of_norm = i > 0 and isinstance(modules[i - 1], nn.GroupNorm | nn.SiLU)
        step: Step
        match module:
            case nn.GroupNorm() | nn.SiLU():
                continue  # done by the step in front of it
            case ResidualBlock():
                step, channels = Residual(module, here, after), module.conv1.out_channels
            case Attention():
                step = SelfAttention(module, here, after)
            case nn.Conv2d() if place.name == "encoder" and i == 0:
                step, channels = FirstConvolution(module, here, after), module.out_channels
            case nn.Conv2d() | Upsample() | Downsample():
                conv = module if isinstance(module, nn.Conv2d) else module.conv
                up, down = isinstance(module, Upsample), isinstance(module, Downsample)
                filter = _noted(Filter.of(conv, place.dtype, upsampled=up, padded_after=down), here)
                height, width = (size * (2 if up else 1) // conv.stride[0] for size in (height, width))
                channels = conv.out_channels
                step = Convolution(filter, of_norm, after(replace(here, shape=(height, width, channels))))
            case _:
                raise TypeError(f"network: no step for a {type(module).__name__}")
        steps.append((here.name, step))
        place = replace(place, shape=(height, width, channels))
    return steps, place


def held(part: Any) -> Iterator[Tensor]:
    """The weights in a part of a plan, in an order that its configuration says."""
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, list | tuple):
        for one in part:
            yield from held(one)
    elif isinstance(part, Step | Pixels | Ending | Filter | Norm):
        for name, one in vars(part).items():
            if name != "counters":
                yield from held(one)


class AutoencoderEngine:
    """Decodes and encodes as a `BinaryAutoencoder` does, in 16 bits; made by `BinaryAutoencoder.optimize`.

    The weights are copies: later changes of the model are followed by `refresh` only. On a GPU every batch size is captured as a
    CUDA graph at its first call, and an image does not depend on what else is in its batch beyond rounding. Not for several
    threads or streams at a time.

    Args:
        autoencoder: the model, on the device the engine is to run on.
        precision: "bf16"; "fp16": as fast, with an eighth of the rounding, for models whose activations stay below 65,504;
            "auto": "fp16" where a trial leaves room for activations 16 times as large, else "bf16". The attribute says which.
        max_batch: images a launch; larger batches go in several. Bounds the memory.
        max_graphs: graphs kept, those used least recently are dropped; 0 runs without graphs.

    Raises: FloatingPointError for a model whose activations overflow in "fp16".
    """

    def __init__(self, autoencoder: "BinaryAutoencoder", precision: str = "auto", *, max_batch: int = 32, max_graphs: int = 8):
        if bk.checks.option("precision", precision, ("auto", *DTYPES)) == "auto":
            precision = precision_of(autoencoder)
        dtype = DTYPES[precision]
        self.max_batch = bk.checks.integer("max_batch", max_batch, 1, 2**20)
        self.precision, self.signed = precision, autoencoder.signed
        self.latent_shape, self.image_size = autoencoder.latent_shape, autoencoder.image_size
        self.in_channels = autoencoder.in_channels
        self.embedding = autoencoder.embedding.detach().to(dtype, copy=True)
        self.device = self.embedding.device
        self._parts: list[Part] = []
        counters = torch.zeros(group_norm.counters_needed(max_batch), dtype=torch.int32, device=self.device)
        height, width, _ = self.latent_shape
        place = Place("decoder", (height, width, self.embedding.shape[1]), self.device, dtype, counters, self._parts)
        modules = tuple(autoencoder.decoder)
        self._embedded = After(modules)(replace(place, name="decoder/embedding"))
        self._decoder, place = plan(modules, len(modules) - 1, place)
        *_, last = modules
        norm = After(modules[len(modules) - (3 if isinstance(modules[-2], nn.SiLU) else 2) :]).norm(dtype)
        assert norm is not None and isinstance(last, nn.Conv2d)
        self._pixels = Pixels(norm, last, replace(place, name="decoder/end"))
        place = Place("encoder", (self.image_size, self.image_size, self.in_channels), self.device, dtype, counters, self._parts)
        self._encoder, _ = plan(tuple(autoencoder.encoder), len(autoencoder.encoder), place)
        self._graphs = GraphCache(bk.checks.integer("max_graphs", max_graphs, 0, 2**10), self.device)
        if self.device.type == "cuda":
            warn_of_fallbacks(self._parts)
        if dtype == torch.float16:
            self._check_range()

    @torch.no_grad()
    def refresh(self, autoencoder: "BinaryAutoencoder") -> None:
        """Take over the weights that `autoencoder`, of the same configuration, has now: in place, so that captured graphs follow.

        The precision stays what it is. Raises: ValueError for another configuration, FloatingPointError as when the engine was
        made; the engine is then as it was.
        """
        fresh = AutoencoderEngine(autoencoder, self.precision, max_graphs=0)
        if self._configuration() != fresh._configuration():
            raise ValueError("autoencoder: expected the configuration of the model that this engine was made from")
        for mine, new in zip(self._weights(), fresh._weights(), strict=True):
            mine.copy_(new)

    def _weights(self) -> list[Tensor]:
        return list(held([self.embedding, self._embedded, self._decoder, self._pixels, self._encoder]))

    def _configuration(self) -> tuple[Any, ...]:
        shapes = [weight.shape for weight in self._weights()]
        return self.signed, self.latent_shape, shapes, [(part.name, part.shape) for part in self._parts]

    def report(self) -> tuple[Part, ...]:
        """Every part with its shape and what runs it, so that a fallback to PyTorch is seen."""
        return tuple(self._parts)

    @torch.no_grad()
    def decode(self, latents: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Packed bits (B, h, w, P) -> images (B, in_channels, H, W).

        Args:
            dtype: float32, bfloat16 or float16: about in [-1, 1], as the model gives them; uint8: pixels 0..255.

        Raises: TypeError, ValueError for a wrong argument.
        """
        height, width, num_bits = self.latent_shape
        bk.checks.packed("latents", latents)
        bk.checks.shape("latents", latents, (len(latents), height, width, (num_bits + 7) // 8), f"{self.latent_shape} bits")
        self._check_device("latents", latents)
        if dtype not in IMAGE_DTYPES:
            raise TypeError(f"dtype: expected one of {', '.join(map(str, IMAGE_DTYPES))}, got {dtype}")
        if len(latents) == 0:
            return torch.empty(0, self.in_channels, self.image_size, self.image_size, dtype=dtype, device=self.device)
        return self._in_batches(("decode", dtype), lambda x: self._decode(x, dtype), latents)

    @torch.no_grad()
    def encode_logits(self, images: Tensor) -> Tensor:
        """Images (B, in_channels, H, W) in [-1, 1] -> logits (B, C, h, w) in float32, of each bit being 1."""
        bk.checks.floating("images", images)
        bk.checks.shape("images", images, (len(images), self.in_channels, self.image_size, self.image_size), "the model's images")
        self._check_device("images", images)
        if len(images) == 0:
            height, width, num_bits = self.latent_shape
            return torch.empty(0, num_bits, height, width, device=self.device)
        return self._in_batches("encode", self._encode, images.float()).float().permute(0, 3, 1, 2)

    def encode(self, images: Tensor, *, seed: int | None = None, sample_offset: int = 0) -> Tensor:
        """Packed bits uint8 (B, h, w, P), as `BinaryAutoencoder.encode`: thresholded without a seed, Bernoulli with one."""
        return bk.binarize(self.encode_logits(images), seed=seed, sample_offset=sample_offset, dim=1)

    @property
    def graph(self) -> bool:
        """Whether calls are graphs; set it to False to see the kernels one by one, as a profile does."""
        return self._graphs.enabled

    @graph.setter
    def graph(self, enabled: bool) -> None:
        self._graphs.enabled = enabled

    @property
    def num_graphs(self) -> int:
        """Graphs that are kept now."""
        return len(self._graphs)

    def _in_batches(self, name: Hashable, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        parts = [self._graphs(name, function, chunk) for chunk in x.contiguous().split(self.max_batch)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @torch.no_grad()
    def _check_range(self) -> None:
        height, width, num_bits = self.latent_shape
        latents = bk.random_bits(1, (height, width, num_bits), seed=0, device=self.device)
        images = self._decode(latents, torch.float32)
        if not (images.isfinite().all() and self._encode(images.clamp(-1, 1)).isfinite().all()):
            raise FloatingPointError("precision: the activations of this model are too large for float16, use 'bf16'")

    def _check_device(self, name: str, value: Tensor) -> None:
        if value.device != self.device:
            raise ValueError(f"{name}: expected on {self.device}, where the engine is, got {value.device}")

    def _decode(self, latents: Tensor, dtype: torch.dtype) -> Tensor:
        with part("embed"):
            flow = self._embedded(bk.embed_bits(latents, self.embedding, signed=self.signed), None)
        for name, step in self._decoder:
            with part(name):
                flow = step(flow)
        with part("pixels"):
            return self._pixels(flow, dtype)

    def _encode(self, images: Tensor) -> Tensor:
        flow: Flow = images, None
        for name, step in self._encoder:
            with part(name):
                flow = step(flow)
        assert flow[0] is not None
        return flow[0]
