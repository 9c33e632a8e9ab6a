"""Counter-based dropout randomness: Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as
1, 2, 3", SC 2011), the one definition that every backend follows bit for bit.

The key is the 64-bit seed; the counter is the element's place. One Philox call gives four 32-bit words, whose eight
halves, the lower half of a word before its upper one, serve eight elements: draws of 32 bits would be most of what
attention computes. An element is kept iff its half is at least ``threshold(p)``, so that p counts in steps of 1 / 65536
(and drops nothing below half a step), and kept values are scaled by ``1 / (1 - p)``.

- Rows: half ``c & 7`` of counter ``(c >> 3, row, 0, 1)`` decides about column ``c``.
- Attention: of 16 queries x 16 keys a tensor core leaves a thread the queries ``r`` and ``r + 8`` and the keys ``2 t``,
  ``2 t + 1``, ``2 t + 8`` and ``2 t + 9``. These eight share a call, so that no thread asks another: of query ``q`` and
  key ``k`` of a sequence that begins at token ``s``, half ``(k >> 3 & 1, q >> 3 & 1, k & 1)``, bits of a number, of
  counter ``(4 (k >> 4) + (k >> 1 & 3), s + 8 (q >> 4) + (q & 7), head, 0)``, which stays below the ``s`` of the next.
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


def _halves(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: int) -> Tensor:
    """[..., 8]: the halves of the words of the counters, which broadcast against each other."""
    seed = seed.reshape(())
    key = (seed & _MASK, (seed >> 32) & _MASK)
    words = torch.stack(torch.broadcast_tensors(*philox(key, (c0, c1, c2, torch.full_like(c0, c3)))), dim=-1)
    return torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten(-2)


def _keep(halves: Tensor, p: float) -> Tensor:
    keep = halves >= threshold(p)
    return keep if p < 1.0 else torch.zeros_like(keep)


def keep_rows(seed: Tensor, p: float, rows: int, columns: int) -> Tensor:
    """Keep-mask [rows, columns] (bool) of every op but attention.

    seed: int64 tensor of one element, on the device of the result.
    """
    row = torch.arange(rows, device=seed.device)[:, None]
    c0 = torch.arange((columns + 7) // 8, device=seed.device)
    return _keep(_halves(seed, c0, row, torch.zeros_like(row), 1).flatten(-2)[:, :columns], p)


def keep_attention(seed: Tensor, p: float, query: Tensor, heads: int, keys: int) -> Tensor:
    """Keep-mask [B, heads, S, keys] (bool) of attention.

    query: int64 [B, S], the packed batch's indices of each sequence's queries, from its first on. Keys count from the
    start of their sequence.
    """
    batch, queries = query.shape
    row = torch.arange((queries + 15) // 16 * 8, device=query.device)
    c0 = torch.arange((keys + 15) // 16 * 4, device=query.device)
    c1 = (query[:, :1] + row)[:, None, :, None]
    head = torch.arange(heads, device=query.device)[:, None, None]
    halves = _halves(seed, c0, c1, head, 0).unflatten(-1, (2, 2, 2)).unflatten(-4, (-1, 4)).unflatten(-6, (-1, 8))
    # [B, heads, queries / 16, q & 7, keys / 16, k >> 1 & 3, k >> 3 & 1, q >> 3 & 1, k & 1]
    blocks = halves.permute(0, 1, 2, 7, 3, 4, 6, 5, 8).reshape(batch, heads, 2 * row.numel(), 4 * c0.numel())
    return _keep(blocks[..., :queries, :keys], p)


def draw_seed(device: torch.device) -> Tensor:
    """A seed from PyTorch's default generator of ``device``, so that manual_seed and checkpointing replay it."""
    # Inductor cuts the bound to 32 bits and divides by what that leaves: by 2**64 - 1, where 2**62 would leave 0.
    return torch.randint(0x7FFFFFFFFFFFFFFF, (1,), dtype=torch.int64, device=device)


def drop(x: Tensor, keep: Tensor, p: float) -> Tensor:
    """Apply a keep-mask at dropout probability `p`: kept values are scaled by 1 / (1 - p)."""
    return torch.where(keep, x * (1.0 / (1.0 - p) if p < 1.0 else 0.0), 0.0)
