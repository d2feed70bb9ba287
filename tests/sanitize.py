"""Every CUDA kernel once on small odd shapes, without pytest: what compute-sanitizer runs (see tests/gpu.sh).

With --for-racecheck all but the stream's products, layer_stack and attention's gradient, which that tool does not follow.
"""

import sys

import torch

import bldm_kernels as bk
from bldm_kernels.inference import attention, layer_stack, stream
from bldm_kernels.inference.product import Weights, prepare
from bldm_kernels.training.attention import attention as self_attention

device = "cuda"
complete = "--for-racecheck" not in sys.argv
bk.use_backend("cuda")
schedule = bk.BernoulliSchedule("linear", 16)
table = schedule.coefficients(schedule.timesteps(4)).to(device)

for channels in (7, 64, 100):
    for dtype in (torch.float32, torch.bfloat16):
        shape = (3, 5, channels)
        logits = torch.randn(shape, device=device).to(dtype)
        x_0 = bk.random_bits(3, shape[1:], seed=1, device=device)
        x_t = bk.add_noise(x_0, 0.2, seed=2, num_bits=channels)
        rows = table[0].expand(3, 4).contiguous()
        nonfinite = torch.zeros(1, dtype=torch.int32, device=device)
        for prediction in ("flip", "x_0"):
            guided = {"uncond_logits": logits * 0.5, "guidance_scale": 2.0, "keep_mask": x_0[0], "keep_bits": x_t[0]}
            bk.flip_step(logits, x_t, rows, seed=3, step=1, prediction=prediction, nonfinite=nonfinite, **guided)
            learnt = logits.float().requires_grad_()
            bk.flip_probability(learnt, x_t, rows, prediction=prediction).sum().backward()
            bk.flip_loss(learnt, x_0, x_t, focal_gamma=1.0, prediction=prediction).backward()
        images = torch.randn(3, channels, 4, 5, device=device).to(dtype)
        packed = bk.binarize(images, seed=4, dim=1)
        assert torch.equal(bk.pack_bits(bk.unpack_bits(packed, channels, dtype, dim=1), 1), packed)
        weight = torch.randn(channels, 48, device=device).to(dtype).requires_grad_()
        bk.embed_bits(x_0, weight).float().sum().backward()
        bk.hamming_distance(x_0, x_t)
        database = bk.random_bits(300, shape[1:], seed=5, device=device)
        for queries in (x_0, database[:20], database[:70]):
            bk.hamming_topk(queries, database, 3)


def products(scale: torch.Tensor | None, rows: int, width: int, hidden: int) -> None:
    expand, contract = torch.nn.Linear(width, hidden, device=device), torch.nn.Linear(hidden, width, device=device)
    norm = torch.nn.LayerNorm(width, device=device)
    reader = stream.prepare_reader(prepare(expand, torch.bfloat16, norm=norm, input_scale=scale), 1e-5, scale)
    adder = stream.prepare_adder(prepare(contract, torch.bfloat16, input_scale=scale))
    found = stream.enter(torch.randn(rows, width, device=device).bfloat16(), reader, torch.ones(width, device=device))
    for _ in range(2):
        inner = stream.read(found, reader, gelu=True, out_scale=scale)
        stream.read(found, reader)
        found = stream.add(inner, adder, found, reader)
    stream.add(inner, adder, found)


def attention_to_stream(scale: torch.Tensor | None) -> None:
    to_heads, norm = torch.nn.Linear(384, 3 * 2 * 64, device=device), torch.nn.LayerNorm(384, device=device)
    reader = stream.prepare_reader(prepare(to_heads, torch.bfloat16, norm=norm, input_scale=scale), 1e-5, scale)
    found = stream.enter(torch.randn(70 * 257, 384, device=device).bfloat16(), reader)
    assert stream.takes_heads(found.h, reader, 2, 70)
    stream.attend(found, reader, 2, 70, out_scale=scale)


def whole_heads(tokens: int, learns: bool) -> None:
    x = torch.randn(2, tokens, 2 * 64, device=device).bfloat16().requires_grad_(learns)
    layer = torch.nn.Linear(2 * 64, 3 * 2 * 64, device=device, dtype=torch.bfloat16)
    if learns:
        torch.autograd.grad(self_attention(x, layer.weight, layer.bias, 2).float().sum(), (x, layer.weight, layer.bias))
        return
    qkv = layer(x).detach()
    assert attention.takes_whole_heads(qkv, 2)
    attention.whole_heads(qkv, 2)


def small_batch(one: torch.Tensor, batch: int, tokens: int) -> None:
    def weights(shape: tuple[int, int], norm: torch.nn.LayerNorm | None) -> Weights:
        rows, columns = shape
        return prepare(torch.nn.Linear(columns, rows, device=device), torch.bfloat16, norm=norm, input_scale=one)

    norm = torch.nn.LayerNorm(layer_stack.WIDTH, device=device)
    qkv, proj, up, down = map(weights, layer_stack.SHAPES, (norm, None, norm, None))
    offset = torch.zeros(layer_stack.WIDTH, device=device)
    layer = layer_stack.Layer(qkv, proj, up, down, offset, offset, one, one)
    stack = layer_stack.LayerStack([layer, layer], 1e-5)
    stack(torch.randn(batch * tokens, layer_stack.WIDTH, device=device).bfloat16(), batch)


if torch.cuda.get_device_capability() == (9, 0):
    one = torch.ones(1, device=device)
    for scale in (None, one):  # bfloat16, e4m3
        # All shapes of tiles, of products that read and of products that add; of the last two sizes some blocks have two.
        sizes = ((400, 96, 320), (1000, 96, 3072), (2056, 96, 3072), (1000, 3072, 96), (2056, 3072, 96))
        for rows, width, hidden in (*sizes, (400, 96, 3104), (400, 3104, 96)) if complete else ():
            products(scale, rows, width, hidden)
        attention_to_stream(scale)
    for tokens in (257, 270):
        whole_heads(tokens, learns=False)
    for tokens in (256, 257, 260) if complete else ():
        whole_heads(tokens, learns=True)
    for batch, tokens in ((1, 257), (3, 17)) if complete else ():
        small_batch(one, batch, tokens)
torch.cuda.synchronize()
print("ok")
