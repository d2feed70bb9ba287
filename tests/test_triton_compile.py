"""Every Triton kernel compiles for sm_90 on a machine without a GPU.

The interpreter, which runs the kernels in the other tests, accepts more than the compiler does. Here the backend's own
functions are called without the interpreter, in a process whose Triton driver is a stand-in: it compiles for sm_90 and
launches nothing.
"""

import functools
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")


def test_every_kernel_compiles_for_sm_90(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parent.parent
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment["PYTHONPATH"] = f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout + run.stderr


def _calls() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """A backend function and canonical arguments for it: every kernel, every branch that is decided when compiling."""
    import torch

    from bldm_kernels.backends.triton import binarize, bits, embed, flip_step, hamming, loss, probability

    def packed(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.uint8)

    byte, word = torch.bool, torch.float32
    for shape, dtype in (((2, 64, 1), byte), ((2, 64, 16), byte), ((2, 7, 5), byte), ((2, 7, 1), word), ((2, 64, 16), word)):
        x = torch.zeros(shape, dtype=dtype)
        outer, channels, inner = x.shape
        out = packed(outer, inner, -(-channels // 8))
        yield bits.pack_bits, (x, out)
        yield bits.unpack_bits, (out, x)
    on_device = torch.zeros(1, dtype=torch.int64)
    yield bits.random_bits, (64, 0, 0, None, packed(2, 256, 8))
    yield bits.random_bits, (7, 2**40, 2**40, on_device, packed(2, 3, 1))

    for dtype, channels in ((torch.bfloat16, 64), (torch.float32, 7), (torch.float16, 64)):
        special = channels == 7  # everything optional at once, or nothing
        logits, x = torch.zeros(2, 256, channels, dtype=dtype), packed(2, 256, -(-channels // 8))
        coefficients = torch.zeros(2 if special else 1, 4)
        draw = (1, 2, 3, *((on_device, on_device) if special else (None, None)))
        count = torch.zeros(1, dtype=torch.int32)
        for batch in (2, 20_000):  # one tile a program, and several
            many, many_x = logits[:1].expand(batch, -1, -1), x[:1].expand(batch, -1, -1)
            options = (many, 2.0, torch.ones(1), x, x[:1], count) if special else (None, 1.0, None, None, None, None)
            first = on_device if special else None
            yield flip_step.flip_step, (many, many_x, coefficients, *draw, first, 1.0, special, *options, many_x)
            yield flip_step.add_noise, (many_x, coefficients[:, 0], channels, *draw, many_x)
        few, few_x = logits[:, :3].contiguous(), x[:, :3].contiguous()  # several samples a program
        yield flip_step.flip_step, (few, few_x, coefficients, *draw, None, 1.0, special, None, 1.0, None, None, None, None, few_x)
        yield flip_step.add_noise, (few_x, coefficients[:, 0], channels, *draw, few_x)
        for mode in (True, False):
            yield binarize.binarize, (logits.unsqueeze(-1), mode, *draw, x)
            yield binarize.binarize, (logits.mT.contiguous().unsqueeze(1), mode, *draw, x)
        yield probability.flip_probability, (logits, x, coefficients, 1.0, special, logits.float())
        yield probability.flip_probability_backward, (logits.float(), logits, x, coefficients, 1.0, special, logits)
        for gamma in (0.0, 2.0):
            samples = torch.zeros(2)
            optional = (samples, samples) if special else (None, None)
            total = samples if special else torch.zeros(())
            yield loss.flip_loss, (logits, x, x, optional[0], gamma, special, 1.0, total, optional[1])
            yield loss.flip_loss_backward, (total, logits, x, x, *optional, gamma, special, 1.0, logits)
        for bias in (None, torch.zeros(768, dtype=dtype)):
            rows, weight = x.flatten(0, 1), torch.zeros(channels, 768, dtype=dtype)
            yield embed.embed_bits, (rows, weight, bias, special, torch.zeros(512, 768, dtype=dtype))
        yield embed.embed_bits_backward, (torch.zeros(512, 768, dtype=dtype), rows, channels, special, weight)

    for num_bytes in (2048, 7):
        a, count = packed(64, num_bytes), torch.zeros(64, dtype=torch.int32)
        yield hamming.hamming_distance, (a, a[:1], count)
        for queries in (a[:1], a[:40]):
            shape = (len(queries), 3)
            nearest = (torch.zeros(shape, dtype=torch.int32), torch.zeros(shape, dtype=torch.int64))
            yield hamming.hamming_topk, (queries, a, 3, *nearest)


class _Driver:
    """As much of a Triton driver as compiling asks for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def tiles_read_twice(ttgir: str) -> set[str]:
    """Buffers of a pipelined loop that an asynchronous product reads and that are also loaded into registers.

    Triton 3.6 counts one buffer too few for them: the next tile is copied over the one that the product still reads.
    """
    root = {name: name for name in re.findall(r"(%\S+) = ttg\.local_alloc : \(\)", ttgir)}
    for name, source in re.findall(r"(%\S+) = ttg\.memdesc_\w+ (%[^\s\[:{,]+)", ttgir):
        root[name] = root.get(source, name)
    loaded = {root.get(name) for name in re.findall(r"ttg\.local_load (%\S+)", ttgir)}
    products = re.findall(r"ttng\.warp_group_dot (%[^\s,]+), (%[^\s,]+), .*isAsync = true", ttgir)
    return {buffer for operands in products for buffer in map(root.get, operands) if buffer is not None} & loaded


def main() -> None:
    import triton
    from triton.runtime.jit import JITFunction

    from bldm_kernels.backends.triton import load

    triton.runtime.driver.set_active(_Driver())
    compiled: dict[str, int] = {}

    def compile_only(kernel: JITFunction, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        binary = kernel.run(*args, grid=grid, warmup=True, **options)
        assert "sm_90" in binary.asm["ptx"] and len(binary.asm["cubin"]) > 0
        assert not tiles_read_twice(binary.asm["ttgir"]), kernel.__name__
        compiled[kernel.__name__] = compiled.get(kernel.__name__, 0) + 1

    JITFunction.__getitem__ = lambda self, grid: functools.partial(compile_only, self, grid)  # type: ignore[method-assign]
    launchers = set()
    for function, arguments in _calls():
        function(*arguments)
        launchers.add(function)

    # Nothing is forgotten: every op of the backend was called, every kernel that a module launches was compiled.
    triton.knobs.runtime.interpret = True
    assert {f.__name__ for f in launchers} == set(load().kernels)
    for module in {inspect.getmodule(f) for f in launchers}:
        source = inspect.getsource(module)  # type: ignore[arg-type]
        launched = {name for name, value in vars(module).items() if isinstance(value, JITFunction) and f"{name}[" in source}
        assert launched and launched <= set(compiled), (module, launched)
    print(compiled)


if __name__ == "__main__":
    main()
