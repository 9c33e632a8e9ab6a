from __future__ import annotations

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

    def half(counter: tuple[int, int, int, int], column: int) -> int:
        return scalar(seed, (column >> 3, *counter[1:]))[(column & 7) >> 1] >> 16 * (column & 1) & 0xFFFF

    rows = philox.keep_rows(tensor, p, 3, 20)
    for row in range(3):
        for column in range(20):
            assert rows[row, column] == (half((0, row, 0, 1), column) >= limit)
    keep = philox.keep_attention(tensor, p, torch.tensor([[4, 5], [9, 10]]), 2, 13)
    assert keep.shape == (2, 2, 2, 13)
    for sequence, query, head, key in [(0, 0, 0, 0), (0, 1, 1, 3), (1, 0, 1, 4), (1, 1, 0, 6), (0, 1, 0, 12)]:
        token = (4, 9)[sequence] + query
        assert keep[sequence, head, query, key] == (half((0, token, head, 0), key) >= limit)


def test_extreme_probabilities() -> None:
    seed = torch.tensor([3])
    assert philox.keep_rows(seed, 0.0, 50, 50).all()
    assert not philox.keep_rows(seed, 1.0, 50, 50).any()
    assert (philox.drop(torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.bool), 1.0) == 0).all()


def test_seed_follows_the_generator() -> None:
    torch.manual_seed(5)
    first = philox.draw_seed(torch.device("cpu"))
    second = philox.draw_seed(torch.device("cpu"))
    torch.manual_seed(5)
    assert torch.equal(philox.draw_seed(torch.device("cpu")), first)
    assert not torch.equal(first, second)
