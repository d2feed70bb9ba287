"""Every Triton kernel of the inference engines and of training compiles for sm_90 without a GPU, and spills no register.

As in test_triton_compile.py: without the interpreter, with a driver that launches nothing.
"""

import functools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")


def test_every_inference_kernel_compiles_for_sm_90(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parent.parent
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment["PYTHONPATH"] = f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout + run.stderr


def _calls() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """A launcher and arguments for it: every kernel, with large and small tiles, everything optional at once or nothing."""
    import torch

    from bldm_kernels.inference.product import Weights
    from bldm_kernels.inference.stream import Reader, Stream
    from bldm_kernels.inference.triton import attention, embed, head, norm, product, stream

    def low(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16)

    e4m3, one = torch.float8_e4m3fn, torch.ones(1)
    for rows in (257, 16448):
        yield norm.normalize, (low(rows, 768), 1e-5, torch.zeros(768), one, rows == 257, low(rows, 768).to(e4m3))
        h, small = low(rows, 768), Weights(low(768, 3072).to(e4m3), low(768), one, one)
        yield product.product, (low(rows, 3072), Weights(low(768, 3072), low(768)), True, True, None, h, None, False)
        yield product.product, (low(rows, 3072).to(e4m3), small, True, True, None, h.to(e4m3), one, rows == 257)
        yield product.product, (low(rows, 3072).to(e4m3), small, False, False, h, h, None, rows == 257)
    sums, vector = torch.zeros(257, 1, 2), torch.zeros(768)
    for scale in (None, one):
        reader = Reader(low(2304, 768), vector, scale, scale, 1e-5)
        h = low(257, 768)
        offset = None if scale is None else vector
        yield stream.enter, (Stream(h, sums, None if scale is None else h.to(e4m3)), reader, offset, scale is None)
    number, byte = torch.zeros(1, dtype=torch.int64), torch.uint8
    for special in (False, True):
        for batch, tokens, heads, dim in (
            (1, 257, 12, 64),
            (8, 257, 12, 64),
            (64, 257, 12, 64),
            (4, 1025, 12, 64),
            (64, 80, 6, 128),
        ):
            mask, scale = (torch.ones(batch, tokens, dtype=torch.bool), torch.ones(1)) if special else (None, None)
            out = low(batch, tokens, heads * dim).to(torch.float8_e4m3fn if special else torch.bfloat16)
            yield attention.attention, (low(batch, tokens, 3 * heads * dim), heads, mask, scale, special, out)
        for batch in (1, 64):
            tokens = [low(1, 768), *([low(batch, 768)] if special else [])]
            packed, out = torch.zeros(batch, 256, 8, dtype=byte), low(batch, 256 + len(tokens), 768)
            yield embed.embed_tokens, (packed, low(64, 768), torch.zeros(256, 768), tokens, out, special)
        for batch, num_bits in ((1, 64), (4, 64), (8, 64), (64, 64), (64, 12)):
            h, sums, x = low((1 + special) * batch, 257, 768), torch.zeros(num_bits), torch.zeros(batch, 256, -(-num_bits // 8))
            fixed, x = (h, low(num_bits, 768), sums, sums, 1e-5), x.to(byte)
            yield head.logits, (*fixed, 256, special, torch.zeros(len(h), 256, num_bits))
            draw = (1, 2, 3, *((number,) * 3 if special else (None,) * 3))
            options = (torch.ones(1), x, x[:1], torch.zeros(1, dtype=torch.int32)) if special else (None,) * 4
            coefficients = torch.zeros(batch if special else 1, 4)
            yield head.step, (*fixed, x, coefficients, *draw, 1.0, special, special, 1.0, *options, special, x)

    from bldm_kernels.inference.group_norm import PLAIN, SHIFTED, UPSAMPLED, Norm
    from bldm_kernels.inference.triton import group_norm, pixels

    counters = torch.zeros(97, dtype=torch.int32)
    for batch, side, channels, source in (
        (32, 256, 128, PLAIN),
        (1, 16, 512, PLAIN),
        (2, 32, 256, UPSAMPLED),
        (1, 7, 96, SHIFTED),
    ):
        vector, shape = torch.zeros(channels), (batch, side, side, channels)
        norm = Norm(32, 1e-6, vector, vector, silu=True)
        grid = {PLAIN: side, UPSAMPLED: side // 2 + 1, SHIFTED: side + 1}[source]
        raw = torch.empty(batch, grid, grid, channels * (4 if source == UPSAMPLED else 1), dtype=torch.bfloat16)
        residual = torch.empty(shape, dtype=torch.bfloat16)
        for special, keep, apply in ((True, True, True), (False, False, True), (True, True, False)):
            added = residual if special else None
            yield group_norm.finish, (raw, vector, added, norm, source, keep, apply, shape, counters)
        yield group_norm.finish, (raw, None, None, None, source, True, True, shape, None)
        for dtype in (torch.float32, torch.uint8):
            last = (low(3, 3, 3, channels), torch.zeros(3), dtype)
            yield pixels.pixels, (low(2, side, side, channels), torch.zeros(2, 2, 32), norm, *last)
        yield pixels.patches, (torch.zeros(2, 3, side, side), 32, torch.bfloat16)

    from bldm_kernels.training.triton import gelu
    from bldm_kernels.training.triton import norm as end_of_branch

    x, vector, moment = low(64, 257, 768), low(768), torch.zeros(64, 257, 1)
    for missing in (None, vector):
        yield end_of_branch.forward, (x, x, missing, vector, vector, 1e-5)
        yield end_of_branch.backward, (x, None if missing is None else x, x, moment, moment, vector)
    h = low(16448, 3072)
    yield gelu.forward, (h, low(3072), h)
    yield gelu.backward, (h, h, low(3072), h)


def main() -> None:
    import triton
    from test_triton_compile import _Driver, tiles_read_twice
    from triton.runtime.jit import JITFunction

    triton.runtime.driver.set_active(_Driver())
    report = []

    def compile_only(kernel: JITFunction, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        binary = kernel.run(*args, grid=grid, warmup=True, **options)
        file = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
        file.write_bytes(binary.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "-res-usage", str(file)], capture_output=True, text=True, check=True)
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
        assert "sm_90" in binary.asm["ptx"] and found, usage
        assert not tiles_read_twice(binary.asm["ttgir"]), kernel.__name__
        constants = {name: value for name, value in options.items() if name.isupper() or name.startswith("num_")}
        report.append((kernel.__name__, *map(int, found.groups()), binary.metadata.shared, constants))

    JITFunction.__getitem__ = lambda self, grid: functools.partial(compile_only, self, grid)  # type: ignore[method-assign]
    for function, arguments in _calls():
        function(*arguments)
    print("kernel, registers, spilled bytes, shared memory, constants", *sorted(set(map(repr, report))), sep="\n")
    denoiser = {"attend", "tokens", "head_logits", "head_step", "rows", "tiles", "moments"}
    autoencoder = {"finish_kernel", "taps_kernel", "sum_kernel", "patches_kernel"}
    training = {"gelu", "gelu_gradient", "sum_parts", "add_rows", "add_rows_gradient"}
    assert {name for name, *_ in report} == denoiser | autoencoder | training
    few = {"finish_kernel": 16}  # bytes a thread: ptxas prefers them to one block fewer on a multiprocessor
    assert all(spilled <= few.get(name, 0) for name, _, spilled, *_ in report), "a kernel spills registers"


if __name__ == "__main__":
    main()
