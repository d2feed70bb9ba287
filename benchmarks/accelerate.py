"""What `bldm.accelerate` gains: foreign models as shipped and accelerated, on the GPU of this machine.

    python benchmarks/accelerate.py [--parts paper,compiled,glue,head,compiled-head] [--batches 1,8,64]

Writes benchmarks/results/accelerate_<device>.json; parts that a run leaves out keep their earlier numbers. Times are of whole
calls of `sample`, host to host, divided by the steps; the median of several calls.
"""

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import bldm
import torch
from accelerate_models import HeadDenoiser, HeadSampler, PaperDenoiser, PaperSampler

import bldm_kernels as bk

STEPS, HEAD_STEPS, TOKENS = 16, 100, 256
Rows = dict[str, Any]


def median_ms(call: Callable[[], Any], seconds: float = 0.5) -> float:
    """Median milliseconds of a call, after one that does not count; at most 50, about `seconds` in all."""
    call()
    times: list[float] = []
    while sum(times) < seconds and len(times) < 50:
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


def capture_of(accelerated: Any) -> dict[str, float]:
    (sampler,) = accelerated.samplers
    info = sampler.graphs[-1]
    seconds = {"rehearsal_s": round(info.rehearsal_seconds, 2), "capture_s": round(info.capture_seconds, 2)}
    return {**seconds, "graph_mib": round(sampler.graph_bytes() / 2**20, 1)}


def paper(batch: int, ways: dict[str, dict[str, Any]], shipped: bool) -> Rows:
    """ms a step of the churches configuration, float32 weights."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        denoiser = PaperDenoiser()
    model = PaperSampler(denoiser).cuda().eval()
    rows: Rows = {}
    if shipped:
        rows["as shipped"] = {"ms_per_step": median_ms(lambda: model.sample(sample_steps=STEPS, b=batch)) / STEPS}
    for way, options in ways.items():
        fast = bldm.accelerate(model, **options)
        ms = median_ms(lambda fast=fast: fast.sample(sample_steps=STEPS, b=batch)) / STEPS
        rows[way] = {"ms_per_step": ms, **capture_of(fast)}
    return rows


def glue(batch: int) -> Rows:
    """us a step inside the graph that are not the denoiser: the loop around logits that are there already.

    The difference between graphs of many and of few steps, so that what a call costs once does not count.
    """
    logits = torch.randn(batch, TOKENS, 64, device="cuda", dtype=torch.bfloat16)
    options = {"latent_shape": (TOKENS, 64), "state": "bits", "time_label": "t-1", "device": "cuda"}
    sampler = bldm.FastSampler(lambda x, time: logits, bk.BernoulliSchedule("linear", 1024), **options)
    few, many = (median_ms(lambda steps=steps: sampler.sample(batch, steps)) for steps in (16, 1016))
    return {"us_per_step": many - few}  # 1000 steps: milliseconds in all are microseconds each


def head(batch: int, ways: dict[str, dict[str, Any]], shipped: bool) -> Rows:
    """ms of the loop of BiGR's head, float32 weights, TF32 products."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = HeadSampler(HeadDenoiser()).cuda().eval()
    cond = torch.randn(2 * batch * TOKENS, 1024, device="cuda")
    call = {"sample_steps": HEAD_STEPS, "cond": cond, "cfg_scale": 2.5, "return_logits": True}
    rows: Rows = {}
    if shipped:
        rows["as shipped"] = {"ms": median_ms(lambda: model.sample(**call))}
    for way, options in ways.items():
        fast = bldm.accelerate(model, **options)
        rows[way] = {"ms": median_ms(lambda fast=fast: fast.sample(**call)), **capture_of(fast)}
    torch.set_float32_matmul_precision("highest")
    return rows


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="paper,compiled,glue,head,compiled-head")
    parser.add_argument("--batches", default="1,8,64")
    arguments = parser.parse_args()
    batches = [int(size) for size in arguments.batches.split(",")]
    device = re.sub(r"\W+", "_", torch.cuda.get_device_name()).lower()
    path = Path(__file__).parent / "results" / f"accelerate_{device}.json"
    results: Rows = json.loads(path.read_text()) if path.exists() else {}
    bf16 = {"autocast": torch.bfloat16}
    for part in arguments.parts.split(","):
        began = time.perf_counter()
        table: dict[str, Rows] = {}
        for batch in batches:
            if part == "paper":
                table[str(batch)] = paper(batch, {"accelerated": {}, "accelerated, bf16": bf16}, True)
            elif part == "compiled":
                table[str(batch)] = paper(batch, {"accelerated, bf16, compiled": {**bf16, "compile": True}}, False)
            elif part == "glue":
                table[str(batch)] = {"inside the graph": glue(batch)}
        if part == "head":
            table["8"] = head(8, {"accelerated, TF32": {}, "accelerated, bf16": bf16}, True)
        if part == "compiled-head":
            ways = {"accelerated, TF32, compiled": {"compile": True}, "accelerated, bf16, compiled": {**bf16, "compile": True}}
            table["8"] = head(8, ways, False)
        title = {"paper": "paper", "compiled": "paper", "glue": "glue", "head": "head", "compiled-head": "head"}[part]
        for batch_name, rows in table.items():
            results.setdefault(title, {}).setdefault(batch_name, {}).update(rounded(rows))
        print(part, f"{time.perf_counter() - began:.0f} s", json.dumps(rounded(table)), flush=True)
        results["machine"] = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
            "command": "python benchmarks/accelerate.py",
            "bldm": bldm.__version__,
            "setting": {
                "paper": f"{STEPS} steps",
                "head": f"{HEAD_STEPS} steps, guidance, {TOKENS} tokens",
                "unit": "milliseconds",
            },
        }
        path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
