"""Decoding and encoding of the paper's autoencoder (256 px, 64 bits a position): the module, the module compiled, and the engine.

    python benchmarks/autoencoder.py [--parts bf16,fp16,shipped,autocast,compiled] [--directions decode,encode] [--batches 1,8,32]
                                     [--commit hash]

Random weights. Every way is first held against the float32 module: images within 1.5 of 255 grey levels in the mean (random
weights amplify rounding; the rows of autocast say how much), at most 2 % of the bits different. Times are of whole calls,
decoding to uint8 pixels, encoding to packed bits: the median of several calls.
Writes benchmarks/results/autoencoder_<device>.json after every row, with date and commit; parts that a run leaves out keep their
earlier numbers.
"""

import argparse
import json
import re
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import bldm
import torch
from bldm.bench.run import commit as current_commit
from bldm.bench.timing import Timer
from bldm.grid import to_uint8
from torch import Tensor

import bldm_kernels as bk

PAPER: dict[str, Any] = {
    "image_size": 256,
    "in_channels": 3,
    "num_bits": 64,
    "base_channels": 128,
    "channel_multipliers": (1, 1, 2, 2, 4),
    "num_res_blocks": 2,
    "architecture": "taming",
    "attention_levels": (4,),
    "embedding_width": 256,
    "norm_first": True,
}
Way = Callable[[Tensor], Tensor]


def ways(part: str, model: bldm.BinaryAutoencoder) -> dict[str, dict[str, Way]]:
    """name -> direction -> call: packed bits to uint8 images, or images to packed bits."""

    def bits(logits: Tensor) -> Tensor:
        return bk.binarize(logits.float(), dim=1)

    if part == "shipped":
        return {"module, TF32": {"decode": lambda x: to_uint8(model.decode(x)), "encode": lambda x: bits(model.encode_logits(x))}}
    if part in ("autocast", "compiled"):
        decode, encode = model.decode, model.encode_logits
        if part == "compiled":
            decode, encode = (torch.compile(call, mode="reduce-overhead") for call in (decode, encode))

        def autocast(call: Callable[[Tensor], Tensor]) -> Way:
            def run(x: Tensor) -> Tensor:
                with torch.autocast("cuda", torch.bfloat16):
                    return call(x)

            return run

        return {
            "module, bf16 autocast" + (", compiled" if part == "compiled" else ""): {
                "decode": autocast(lambda x: to_uint8(decode(x))),
                "encode": autocast(lambda x: bits(encode(x))),
            }
        }
    engine = model.optimize(part)
    return {f"engine, {part}": {"decode": lambda x: engine.decode(x, dtype=torch.uint8), "encode": engine.encode}}


def check(name: str, direction: str, call: Way, model: bldm.BinaryAutoencoder, x: Tensor) -> float:
    """The mean difference of pixels in 255ths of the range, or the share of bits that differ; raises if it is too large."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        if direction == "decode":
            difference, limit = (call(x).float() - (model.decode(x).clamp(-1, 1) + 1) * 127.5).abs().mean().item(), 1.5
        else:
            bits, expected = (bk.unpack_bits(packed, PAPER["num_bits"]) for packed in (call(x), model.encode(x)))
            difference, limit = (bits != expected).float().mean().item(), 0.02
    if not difference <= limit:
        raise RuntimeError(f"{name}, {direction}: differs by {difference:.3g}, at most {limit} is right")
    return difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="bf16,fp16,shipped,autocast,compiled")
    parser.add_argument("--directions", default="decode,encode")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--commit", help="of this source, where it is no git checkout")
    arguments = parser.parse_args()
    batches = [int(size) for size in arguments.batches.split(",")]
    device = re.sub(r"\W+", "_", torch.cuda.get_device_name()).lower()
    path = Path(__file__).parent / "results" / f"autoencoder_{device}.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    results["machine"] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "command": "python benchmarks/autoencoder.py",
        "bldm": bldm.__version__,
    }
    of_run = {"date": datetime.now(timezone.utc).strftime("%Y-%m-%d"), "commit": arguments.commit or current_commit()}
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = bldm.BinaryAutoencoder(**PAPER).eval()
        images = torch.rand(max(batches), 3, 256, 256) * 2 - 1
    latents = bk.random_bits(max(batches), model.latent_shape, seed=0, device="cuda")
    timer = Timer(torch.device("cuda"))
    for part in arguments.parts.split(","):
        for name, calls in ways(part, model).items():
            for direction in arguments.directions.split(","):
                x = latents if direction == "decode" else images
                with torch.no_grad():
                    difference = check(name, direction, calls[direction], model, x[: min(2, len(x))])
                    for batch in batches:
                        began = time.perf_counter()
                        calls[direction](x[:batch])
                        torch.cuda.synchronize()
                        first = time.perf_counter() - began
                        ms = timer(lambda call=calls[direction], some=x[:batch]: call(some), flush=False).p50
                        found = {"ms": ms, "ms_per_image": ms / batch, "first_call_s": first, "difference": difference}
                        row = {**{key: float(f"{value:.4g}") for key, value in found.items()}, **of_run}
                        results.setdefault(direction, {}).setdefault(name, {})[str(batch)] = row
                        path.write_text(json.dumps(results, indent=2) + "\n")
                        print(f"{direction}, {name}, batch {batch}: {json.dumps(row)}", flush=True)


if __name__ == "__main__":
    main()
