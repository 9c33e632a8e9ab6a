"""Counter-based dropout randomness: Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as
1, 2, 3", SC 2011), the one definition that every backend follows bit for bit.

The key is the 64-bit seed; the counter is the element's place. One Philox call gives four 32-bit words, whose eight
halves serve eight neighbouring columns (draws of 32 bits would be most of what attention computes): half ``c & 7`` of
counter ``c0 = c >> 3`` decides about column ``c``, the lower half of a word before its upper one. An element is kept
iff its half is at least ``threshold(p)``, so that p counts in steps of 1 / 65536, and kept values are scaled by
``1 / (1 - p)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85


def _multiply(value: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``value * constant``, without ever leaving the range of int64."""
    low = value * (constant & 0xFFFF)
    middle = value * (constant >> 16) + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 on int64 tensors that hold unsigned 32-bit values; all broadcast against each other."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIER_0)
        high1, low1 = _multiply(c2, _MULTIPLIER_1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
    return c0, c1, c2, c3


def threshold(p: float) -> int:
    """Smallest 16-bit number that is kept at dropout probability ``p``."""
    return min(int(p * 65536.0 + 0.5), 0xFFFF)


def _keep(seed: Tensor, p: float, columns: int, c1: Tensor, c2: Tensor, c3: int) -> Tensor:
    """Keep-mask whose last dimension runs over ``columns``; ``c1`` and ``c2`` end in a dimension of size 1."""
    key = (seed & _MASK, (seed >> 32) & _MASK)
    c0 = torch.arange((columns + 7) // 8, device=c1.device)
    words = torch.stack(torch.broadcast_tensors(*philox(key, (c0, c1, c2, torch.full_like(c0, c3)))), dim=-1)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1)
    keep = halves.flatten(-3)[..., :columns] >= threshold(p)
    return keep if p < 1.0 else torch.zeros_like(keep)


def keep_rows(seed: Tensor, p: float, rows: int, columns: int) -> Tensor:
    """Keep-mask [rows, columns] (bool) of every op but attention.

    seed: int64 tensor of one element, on the device of the result.
    """
    row = torch.arange(rows, device=seed.device)[:, None]
    return _keep(seed, p, columns, row, torch.zeros_like(row), 1)


def keep_attention(seed: Tensor, p: float, query: Tensor, heads: int, keys: int) -> Tensor:
    """Keep-mask [B, heads, S, keys] (bool) of attention.

    query: int64 [B, S], each query's index in the packed batch. Keys count from the start of their sequence.
    """
    head = torch.arange(heads, device=seed.device)[:, None, None]
    return _keep(seed, p, keys, query[:, None, :, None], head, 0)


def draw_seed(device: torch.device) -> Tensor:
    """A seed from PyTorch's default generator of ``device``, so that manual_seed and checkpointing replay it."""
    return torch.randint(0x7FFFFFFFFFFFFFFF, (1,), dtype=torch.int64, device=device)


def drop(x: Tensor, keep: Tensor, p: float) -> Tensor:
    """Apply a keep-mask at dropout probability `p`: kept values are scaled by 1 / (1 - p)."""
    return torch.where(keep, x * (1.0 / (1.0 - p) if p < 1.0 else 0.0), 0.0)
