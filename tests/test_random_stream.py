"""The random stream is a promise: published Philox vectors, a plain-Python twin of docs/random-stream.md, committed bytes."""

import json
from fractions import Fraction
from typing import Any

import plain_stream
import pytest
import torch
from targets import Target
from torch import Tensor

import bldm_kernels as bk
from bldm_kernels import reference

# tests/kat_vectors of Random123 (D. E. Shaw Research), the three lines "philox4x32 10": counter, key, output.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
DRAWS = [(0, 0, 0), (17, 3, 2**32 - 1), (-1, 2**28 - 1, 2**40 + 9), (2**64 - 2, 1, 2**62 - 3)]
# n0, n1, d0, d1 of an early and a late step, and an unlikely flip
COEFFICIENTS = [[0.25, 0.5, 1.0, 0.0], [0.001953125, 0.0625, 1.0, -0.75], [1e-5, 0.3, 0.9, 0.07]]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def packed(samples: list[bytes], rows: int, device: str) -> Tensor:
    return torch.tensor([list(b) for b in samples], dtype=torch.uint8, device=device).view(len(samples), rows, -1)


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS)
def test_philox_known_answers(counter: str, key: str, expected: str) -> None:
    assert plain_stream.philox(words(counter), words(key)) == words(expected)
    c, k = ([torch.tensor(w) for w in words(text)] for text in (counter, key))
    output = reference.philox_4x32_10((c[0], c[1], c[2], c[3]), (k[0], k[1]))
    assert [int(w) for w in output] == words(expected)


@pytest.mark.parametrize("seed, _step, offset", DRAWS)
def test_random_bits(target: Target, seed: int, _step: int, offset: int) -> None:
    """A bit is set when its lane is below 2^15; the counter holds byte, draw and sample as documented."""
    got = bk.random_bits(2, (3, 13), seed=seed, sample_offset=offset, device=target.device)
    expected = [plain_stream.random_bits(3, 13, seed, offset + i) for i in range(2)]
    assert torch.equal(got, packed(expected, 3, target.device))


@pytest.mark.parametrize("seed, step, offset", DRAWS)
def test_add_noise(target: Target, seed: int, step: int, offset: int) -> None:
    probabilities = [0.3, 1e-4]
    zeros = torch.zeros(2, 3, 2, dtype=torch.uint8, device=target.device)
    p = torch.tensor(probabilities, device=target.device)
    got = bk.add_noise(zeros, p, seed=seed, step=step, sample_offset=offset, num_bits=13)
    expected = [plain_stream.add_noise(p, 3, 13, seed, step, offset + i) for i, p in enumerate(probabilities)]
    assert torch.equal(got, packed(expected, 3, target.device))


@pytest.mark.parametrize("row", range(len(COEFFICIENTS)))
@pytest.mark.parametrize("option", ["plain", "temperature", "x_0", "guidance"])
def test_flip_step(target: Target, row: int, option: str) -> None:
    """Every rounding of the documented arithmetic, redone in exact fractions."""
    seed, step, offset = DRAWS[row]
    generator = torch.Generator().manual_seed(row)
    logits, uncond = torch.randn(2, 2, 2, 13, generator=generator) * 3
    logits[0, 0, :4] = torch.tensor([0.0, 100.0, -100.0, 1e-7])
    bits = (torch.rand(2, 2, 13, generator=generator) < 0.5).to(torch.uint8)
    plain: dict[str, Any] = {}
    call: dict[str, Any] = {}
    if option == "temperature":
        plain["temperature"] = call["temperature"] = 0.7
    if option == "x_0":
        call["prediction"] = "x_0"
    if option == "guidance":
        call["guidance_scale"], call["uncond_logits"] = 2.3, uncond.to(target.device)
        plain["guidance_scale"] = 2.3
    x_t = bk.pack_bits(bits.to(target.device))
    coefficients = torch.tensor(COEFFICIENTS[row], device=target.device)
    draw = {"seed": seed, "step": step, "sample_offset": offset}
    got = bk.flip_step(logits.to(target.device), x_t, coefficients, **draw, **call)
    expected = []
    for i in range(2):
        if option == "x_0":
            plain["negate"] = bits[i].tolist()
        if option == "guidance":
            plain["uncond"] = uncond[i].tolist()
        args = (logits[i].tolist(), COEFFICIENTS[row], seed, step, offset + i)
        expected.append(plain_stream.flip_mask("flip_step", *args, **plain))
    assert torch.equal(got ^ x_t, packed(expected, 2, target.device))


@pytest.mark.parametrize("seed, step, offset", DRAWS)
def test_binarize(target: Target, seed: int, step: int, offset: int) -> None:
    logits = torch.randn(2, 3, 13, generator=torch.Generator().manual_seed(0)) * 2
    got = bk.binarize(logits.to(target.device), seed=seed, step=step, sample_offset=offset)
    expected = [plain_stream.flip_mask("binarize", logits[i].tolist(), [0, 1, 1, 0], seed, step, offset + i) for i in range(2)]
    assert torch.equal(got, packed(expected, 3, target.device))


def tied_draws(name: str, count: int) -> list[tuple[int, int, int]]:
    """(seed, bit, u 2^32) with the main lane small enough that u and u + 2^-32 are float32 numbers."""
    found: list[tuple[int, int, int]] = []
    seed = 0
    while len(found) < count:
        seed += 1
        for bit in range(16):
            h, g = (plain_stream.lane(plain_stream.PURPOSE[name] + i, seed, 7, 0, bit) for i in (0, 1))
            if 0 < h < 255:
                found.append((seed, bit, h * 2**16 + g))
    return found


@pytest.mark.parametrize("name", ["add_noise", "flip_step"])
def test_ties_are_decided_by_the_second_block(target: Target, name: str) -> None:
    """u = (h 2^16 + g) / 2^32 is never below P = u, and always below P = u + 2^-32."""
    zeros = torch.zeros(1, 1, 2, dtype=torch.uint8, device=target.device)
    logits = torch.zeros(1, 1, 16, device=target.device)
    for seed, bit, u in tied_draws(name, 6):
        for numerator, expected in ((u, 0), (u + 1, 1)):
            p = numerator / 2**32
            assert plain_stream.float32(p) == Fraction(numerator, 2**32)
            if name == "add_noise":
                x = bk.add_noise(zeros, p, seed=seed, step=7)
            else:
                row = torch.tensor([p, 0.0, 1.0, 0.0], device=target.device)
                x = bk.flip_step(logits, zeros, row, seed=seed, step=7)
            assert (int(x[0, 0, bit // 8]) >> (bit % 8)) & 1 == expected, (seed, bit, numerator)


def test_certain_and_impossible_flips(target: Target) -> None:
    """P = 0 flips nothing and P = 1 everything, whatever the draw."""
    zeros = torch.zeros(4, 64, 8, dtype=torch.uint8, device=target.device)
    assert int(bk.add_noise(zeros, 0.0, seed=1).sum()) == 0
    assert bool((bk.add_noise(zeros, 1.0, seed=1) == 255).all())


def draw_vector(entry: dict[str, Any], device: str) -> Tensor:
    rows, channels = entry["rows"], entry["channels"]
    draw = {"seed": entry["seed"], "sample_offset": entry["sample"]}
    if entry["op"] == "random_bits":
        return bk.random_bits(1, (rows, channels), device=device, **draw)
    draw["step"] = entry["step"]
    logits = torch.tensor([plain_stream.example_logits(rows, channels)], device=device)
    if entry["op"] == "binarize":
        return bk.binarize(logits, **draw)
    zeros = torch.zeros(1, rows, -(-channels // 8), dtype=torch.uint8, device=device)
    if entry["op"] == "add_noise":
        return bk.add_noise(zeros, entry["flip_probability"], num_bits=channels, **draw)
    coefficients = torch.tensor(entry["coefficients"], device=device)
    return bk.flip_step(logits, zeros, coefficients, temperature=entry["temperature"], **draw)


def test_committed_vectors(target: Target) -> None:
    """The stream of the first release, for ever."""
    entries = json.loads(plain_stream.VECTORS.read_text())["vectors"]
    assert {entry["op"] for entry in entries} == set(plain_stream.PURPOSE)
    for entry in entries:
        assert bytes(draw_vector(entry, target.device).flatten().tolist()).hex() == entry["bytes"], entry


def test_committed_vectors_come_from_the_plain_implementation() -> None:
    assert json.loads(plain_stream.VECTORS.read_text())["vectors"] == plain_stream.vectors()
