from __future__ import annotations

import itertools

import pytest
import torch

from fastbert.ops import philox

# Random123 1.14, tests/kat_vectors: philox4x32 10
VECTORS = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    tensors = lambda values: tuple(torch.tensor([value]) for value in values)  # noqa: E731
    assert tuple(int(word) for word in philox.philox(tensors(key), tensors(counter))) == expected


def scalar(seed: int, counter: tuple[int, int, int, int]) -> tuple[int, ...]:
    """Philox4x32-10 once more, in Python's integers."""
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 5, 2**63 - 1, -1, -(2**63)])
def test_masks_follow_the_definition(seed: int) -> None:
    p, tensor = 0.3, torch.tensor([seed])
    limit = round(p * 2**16)

    def kept(counter: tuple[int, int, int, int], half: int) -> bool:
        return scalar(seed, counter)[half >> 1] >> 16 * (half & 1) & 0xFFFF >= limit

    rows = philox.keep_rows(tensor, p, 3, 20)
    for row in range(3):
        for column in range(20):
            assert rows[row, column] == kept((column >> 3, row, 0, 1), column & 7)
    starts, queries, keys = (4, 29), 25, 37
    keep = philox.keep_attention(tensor, p, torch.tensor(starts)[:, None] + torch.arange(queries), 2, keys)
    assert keep.shape == (2, 2, queries, keys)
    for sequence, head, q, k in itertools.product(range(2), range(2), range(0, queries, 3), range(keys)):
        counter = 4 * (k >> 4) + (k >> 1 & 3), starts[sequence] + 8 * (q >> 4) + (q & 7), head, 0
        assert keep[sequence, head, q, k] == kept(counter, (k >> 3 & 1) << 2 | (q >> 3 & 1) << 1 | k & 1)


def test_no_two_queries_draw_alike() -> None:
    """Not within a sequence, nor in those that lie beside it in the packed batch."""
    ends = list(itertools.accumulate((1, 3, 17, 16, 40), initial=0))
    masks = [
        philox.keep_attention(torch.tensor([7]), 0.5, torch.arange(start, end)[None], 2, 128).flatten(1, 2)[0]
        for start, end in itertools.pairwise(ends)
    ]
    assert len(torch.cat(masks).unique(dim=0)) == 2 * ends[-1]


def test_extreme_probabilities() -> None:
    seed = torch.tensor([3])
    assert philox.keep_rows(seed, 0.0, 50, 50).all()
    assert not philox.keep_rows(seed, 1.0, 50, 50).any()
    assert (philox.drop(torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.bool), 1.0) == 0).all()


@pytest.mark.parametrize("shape", [(), (1, 1, 1)])
def test_seed_may_have_any_shape(shape: tuple[int, ...]) -> None:
    seed, query = torch.tensor([3]), torch.arange(20)[None]
    assert torch.equal(philox.keep_rows(seed.view(shape), 0.5, 6, 20), philox.keep_rows(seed, 0.5, 6, 20))
    masks = [philox.keep_attention(given, 0.5, query, 2, 20) for given in (seed, seed.view(shape))]
    assert torch.equal(*masks)


def test_seed_follows_the_generator() -> None:
    torch.manual_seed(5)
    first = philox.draw_seed(torch.device("cpu"))
    second = philox.draw_seed(torch.device("cpu"))
    torch.manual_seed(5)
    assert torch.equal(philox.draw_seed(torch.device("cpu")), first)
    assert not torch.equal(first, second)
