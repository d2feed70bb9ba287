"""hamming_topk with many queries: the search in parts keeps exactly the k nearest, whatever the order of the database."""

from collections.abc import Callable

import pytest
import torch
from targets import TARGETS, Target
from torch import Tensor

import bldm_kernels as bk
from bldm_kernels.backends import cuda, search
from bldm_kernels.backends.triton import hamming

SEARCHED = [target for target in TARGETS if target.backend in ("cuda", "triton")]
QUERIES, ROWS = 6, 90


def shuffled(width: int) -> Tensor:
    return torch.randint(256, (ROWS, width)).to(torch.uint8)


def all_equal(width: int) -> Tensor:
    return torch.zeros(ROWS, width, dtype=torch.uint8)


def few_distances(width: int) -> Tensor:
    return torch.randint(2, (ROWS, width)).to(torch.uint8)


def nearer_and_nearer(width: int) -> Tensor:
    """Every row is nearer to zero than the one before: of every part all pairs are kept."""
    bits = torch.rand(width * 8).argsort() < torch.linspace(width * 8, 0, ROWS)[:, None]
    return bk.reference.pack_bits(bits)


@pytest.fixture(autouse=True)
def always_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few queries are searched in parts too."""
    for backend in (cuda, hamming):
        monkeypatch.setattr(backend, "FEW_QUERIES", 0)


def check(queries: Tensor, database: Tensor, k: int) -> None:
    got = bk.hamming_topk(queries, database, k)
    with bk.use_backend("torch"):
        expected = bk.hamming_topk(queries, database, k)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("target", SEARCHED, ids=str, indirect=True)
@pytest.mark.parametrize("database", [shuffled, all_equal, few_distances, nearer_and_nearer])
@pytest.mark.parametrize("width, k", [(5, 1), (33, 40)])
def test_many_parts(
    target: Target, database: Callable[[int], Tensor], width: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiny parts and little memory, so that there are many parts, and two groups of queries."""
    monkeypatch.setattr(search, "FIRST_PART", 8)
    monkeypatch.setattr(search, "GROWTH", 2)
    monkeypatch.setattr(search, "ROOM", 32)
    monkeypatch.setattr(search, "MAX_KEYS", 4 * (k + 32))
    torch.manual_seed(width)
    queries = torch.zeros(QUERIES, width, dtype=torch.uint8)
    queries[1:] = shuffled(width)[1:QUERIES]
    check(queries.to(target.device), database(width).to(target.device), k)


@pytest.mark.parametrize("target", SEARCHED, ids=str, indirect=True)
def test_unaligned_rows(target: Target) -> None:
    """Rows of a multiple of 16 bytes that begin elsewhere, and all of the database asked for."""
    torch.manual_seed(0)
    database = torch.cat([shuffled(16).flatten(), torch.zeros(1, dtype=torch.uint8)]).to(target.device)[1:].view(ROWS, 16)
    assert database.data_ptr() % 16
    check(shuffled(16)[:QUERIES].to(target.device), database, ROWS)


@pytest.mark.parametrize("target", [target for target in SEARCHED if target.device == "cuda"], ids=str, indirect=True)
@pytest.mark.parametrize("queries", [5, 64, 65, 300])
@pytest.mark.parametrize("width, k", [(3, 2000), (24, 1), (256, 10)])
def test_more_rows(target: Target, queries: int, width: int, k: int) -> None:
    generator = torch.Generator(target.device).manual_seed(queries)
    some, database = (
        torch.randint(256, (n, width), generator=generator, device=target.device, dtype=torch.uint8) for n in (queries, 100_003)
    )
    check(some, database, k)
