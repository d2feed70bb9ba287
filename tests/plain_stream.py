"""docs/random-stream.md once more, in plain Python integers and fractions: one bit at a time, nothing shared with the package.

`python tests/plain_stream.py` rewrites tests/data/random_stream.json, the committed vectors. They change only if the promise of
docs/random-stream.md is broken on purpose.
"""

import json
import math
from fractions import Fraction
from pathlib import Path

VECTORS = Path(__file__).parent / "data" / "random_stream.json"
PURPOSE = {"random_bits": 0, "flip_step": 2, "add_noise": 4, "binarize": 6}
EXP2 = [Fraction(float.fromhex(c)) for c in "0x1.62e42ap-1 0x1.ebf9bcp-3 0x1.c6b752p-5 0x1.3cea88p-7 0x1.5bba14p-10".split()]
M32 = 2**32 - 1


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 (Salmon et al. 2011): the key is bumped before every round but the first."""
    c, (k0, k1) = counter, key
    for round_index in range(10):
        if round_index:
            k0, k1 = (k0 + 0x9E3779B9) & M32, (k1 + 0xBB67AE85) & M32
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 & M32, (p0 >> 32) ^ c[3] ^ k1, p0 & M32]
    return c


def lane(purpose: int, seed: int, step: int, sample: int, bit: int) -> int:
    """The 16 random bits that decide bit `bit` (counted over the packed bytes) of a sample."""
    draw = purpose * 2**28 + step
    words = philox([bit // 8, draw, sample & M32, sample >> 32], [seed & M32, (seed >> 32) & M32])
    j = bit % 8
    return (words[j // 2] >> (16 * (j % 2))) % 2**16


def float32(x: Fraction | float | int) -> Fraction:
    """The nearest float32, ties to even, subnormals included."""
    x = Fraction(x)
    if x == 0:
        return x
    exponent = math.floor(math.log2(abs(x))) - 23
    while abs(x) >= Fraction(2) ** (exponent + 24):
        exponent += 1
    while abs(x) < Fraction(2) ** (exponent + 23):
        exponent -= 1
    unit = Fraction(2) ** max(exponent, -149)
    return round(x / unit) * unit


def fma(a: Fraction, b: Fraction, c: Fraction) -> Fraction:
    return float32(a * b + c)


def is_set(numerator: Fraction, denominator: Fraction, h: int, g: int) -> bool:
    d = float32(denominator * Fraction(1, 2**16))
    r = fma(Fraction(-h), d, numerator)
    return fma(Fraction(-g), float32(d * Fraction(1, 2**16)), r) > 0


def draw_bit(name: str, numerator: Fraction, denominator: Fraction, seed: int, step: int, sample: int, bit: int) -> bool:
    h, g = (lane(purpose, seed, step, sample, bit) for purpose in (PURPOSE[name], PURPOSE[name] + 1))
    return is_set(numerator, denominator, h, g)


def ratio(
    logit: float,
    coefficients: list[float],
    temperature: float = 1.0,
    negate: bool = False,
    uncond: float | None = None,
    guidance_scale: float = 1.0,
) -> tuple[Fraction, Fraction]:
    """N and D of one logit."""
    value = float32(logit)
    if uncond is not None:
        value = fma(float32(guidance_scale), float32(value - float32(uncond)), float32(uncond))
    if negate:
        value = -value
    scale = float32(-math.log2(math.e) / temperature)
    y = min(max(float32(value * scale), Fraction(-64)), Fraction(64))
    n = round(y)
    z = y - n
    p = EXP2[4]
    for c in (*EXP2[3::-1], Fraction(1)):
        p = fma(p, z, c)
    e = p * Fraction(2) ** n
    n0, n1, d0, d1 = (float32(c) for c in coefficients)
    return fma(n0, e, float32(n0 + n1)), fma(d0, e, float32(d0 + d1))


def pack(bits: list[bool]) -> bytes:
    """Bits of one position to bytes, bit j of byte i is bits[8 i + j]."""
    return bytes(sum(bool(b) << j for j, b in enumerate(bits[i : i + 8])) for i in range(0, len(bits), 8))


def random_bits(rows: int, channels: int, seed: int, sample: int) -> bytes:
    width = -(-channels // 8) * 8
    half, one = Fraction(1, 2), Fraction(1)
    return b"".join(
        pack([draw_bit("random_bits", half, one, seed, 0, sample, r * width + c) for c in range(channels)]) for r in range(rows)
    )


def add_noise(p: float, rows: int, channels: int, seed: int, step: int, sample: int) -> bytes:
    """The flip mask, which is the noised zero."""
    width = -(-channels // 8) * 8
    return b"".join(
        pack([draw_bit("add_noise", float32(p), Fraction(1), seed, step, sample, r * width + c) for c in range(channels)])
        for r in range(rows)
    )


def flip_mask(
    name: str,
    logits: list[list[float]],
    coefficients: list[float],
    seed: int,
    step: int,
    sample: int,
    temperature: float = 1.0,
    negate: list[list[int]] | None = None,
    uncond: list[list[float]] | None = None,
    guidance_scale: float = 1.0,
) -> bytes:
    """The bits that `flip_step` flips, or that `binarize` (coefficients 0, 1, 1, 0) sets, for the logits (R, C) of one sample."""
    packed = b""
    for r, row in enumerate(logits):
        width = -(-len(row) // 8) * 8
        bits = []
        for c, logit in enumerate(row):
            sign = bool(negate[r][c]) if negate else False
            other = uncond[r][c] if uncond else None
            n, d = ratio(logit, coefficients, temperature, sign, other, guidance_scale)
            bits.append(draw_bit(name, n, d, seed, step, sample, r * width + c))
        packed += pack(bits)
    return packed


def example_logits(rows: int, channels: int) -> list[list[float]]:
    """Logits from -8 to 8 in no order, exact in float32."""
    return [[((37 * (r * channels + c)) % 129 - 64) / 8 for c in range(channels)] for r in range(rows)]


def vectors() -> list[dict]:
    """What the committed file holds: every purpose, with seeds, steps and sample indices beyond 32 bits."""
    draws = [(0, 0, 0), (1, 1, 0), (2**64 - 1, 2**28 - 1, 2**32 + 5), (0x0123456789ABCDEF, 255, 2**40 + 1)]
    coefficients = [0.0625, 0.75, 1.0, -0.125]
    rows, channels = 2, 24
    logits = example_logits(rows, channels)
    entries: list[dict] = []
    for seed, step, sample in draws:
        draw = {"seed": seed, "sample": sample}
        shape = {"rows": rows, "channels": channels}
        entries.append({"op": "random_bits", **draw, **shape, "bytes": random_bits(rows, channels, seed, sample).hex()})
        draw["step"] = step
        for p in (1e-3, 0.3):
            mask = add_noise(p, rows, channels, seed, step, sample)
            entries.append({"op": "add_noise", **draw, **shape, "flip_probability": p, "bytes": mask.hex()})
        mask = flip_mask("flip_step", logits, coefficients, seed, step, sample, temperature=0.75)
        options = {"coefficients": coefficients, "temperature": 0.75}
        entries.append({"op": "flip_step", **draw, **shape, **options, "bytes": mask.hex()})
        bits = flip_mask("binarize", logits, [0, 1, 1, 0], seed, step, sample)
        entries.append({"op": "binarize", **draw, **shape, "bytes": bits.hex()})
    return entries


def main() -> None:
    about = (
        "Vectors of docs/random-stream.md, made by `python tests/plain_stream.py`: the bytes one sample draws. add_noise and "
        "flip_step start from zeros; the logits of flip_step and binarize are plain_stream.example_logits(rows, channels)."
    )
    lines = ",\n".join("  " + json.dumps(entry) for entry in vectors())
    VECTORS.write_text(f'{{"about": {json.dumps(about)},\n "vectors": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
