"""Every CUDA kernel once on small odd shapes, without pytest: what compute-sanitizer runs (see tests/gpu.sh)."""

import torch

import bldm_kernels as bk
from bldm_kernels.inference import attention, stream
from bldm_kernels.inference.product import prepare

device = "cuda"
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

if torch.cuda.get_device_capability() == (9, 0):
    one = torch.ones(1, device=device)
    for scale in (None, one):  # bfloat16, e4m3
        expand, contract = torch.nn.Linear(96, 320, device=device), torch.nn.Linear(320, 96, device=device)
        norm = torch.nn.LayerNorm(96, device=device)
        reader = stream.prepare_reader(prepare(expand, torch.bfloat16, norm=norm, input_scale=scale), 1e-5, scale)
        adder = stream.prepare_adder(prepare(contract, torch.bfloat16, input_scale=scale))
        found = stream.enter(torch.randn(400, 96, device=device).bfloat16(), reader, torch.ones(96, device=device))
        for _ in range(2):
            inner = stream.read(found, reader, gelu=True, out_scale=scale)
            stream.read(found, reader)
            found = stream.add(inner, adder, found, reader)
        stream.add(inner, adder, found)
        to_heads, norm = torch.nn.Linear(384, 3 * 2 * 64, device=device), torch.nn.LayerNorm(384, device=device)
        reader = stream.prepare_reader(prepare(to_heads, torch.bfloat16, norm=norm, input_scale=scale), 1e-5, scale)
        found = stream.enter(torch.randn(70 * 257, 384, device=device).bfloat16(), reader)
        assert stream.takes_heads(found.h, reader, 2, 70)
        stream.attend(found, reader, 2, 70, out_scale=scale)
    qkv = torch.randn(2, 257, 3 * 2 * 64, device=device).bfloat16()
    assert attention.takes_whole_heads(qkv, 2)
    attention.whole_heads(qkv, 2)
torch.cuda.synchronize()
print("ok")
