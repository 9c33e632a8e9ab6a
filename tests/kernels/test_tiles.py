"""Which program of a grid gets which tile of a ragged batch."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="there are no Triton kernels without triton")

import triton
import triton.language as tl

from fastbert.kernels import attention, attention_bwd, attention_fwd, attention_tiles
from fastbert.ops.attention import attention_ref

pytestmark = pytest.mark.usefixtures("memory_watch")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
find_tile = attention_tiles.find_tile


@triton.jit
def _tiles_kernel(cu_seqlens, tiles, batch, BLOCK: tl.constexpr):
    """tiles: int32 [slots, 3], the sequence, its length, and the first row of the tile in it."""
    sequence, _, length, first = find_tile(cu_seqlens, batch, BLOCK)
    slot = tiles + 3 * tl.program_id(0)
    tl.store(slot, sequence)
    tl.store(slot + 1, length)
    tl.store(slot + 2, first)


def ragged(sequences: int, longest: int) -> list[int]:
    random = torch.Generator().manual_seed(sequences)
    return torch.randint(1, longest + 1, (sequences,), generator=random).tolist()


@pytest.mark.parametrize("block", [16, 64, 128])
@pytest.mark.parametrize(
    "lengths",
    [[1], [128], [0, 0, 5], [64, 64, 64], [63, 65, 1, 129], [0, 300, 0, 0, 1, 128, 0], [1] * 20, ragged(12, 200)],
    ids=lambda lengths: f"{len(lengths)}-{sum(lengths)}",
)
def test_every_tile_has_one_program(lengths: list[int], block: int) -> None:
    """And no more programs than sequences are launched in vain."""
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    launched = sum(lengths) // block + len(lengths)
    tiles = torch.full((launched, 3), -1, dtype=torch.int32, device=DEVICE)
    _tiles_kernel[launched,](bounds, tiles, len(lengths), BLOCK=block)
    useful = [(sequence, first) for sequence, length, first in tiles.tolist() if first < length]
    assert useful == [(b, first) for b, length in enumerate(lengths) for first in range(0, length, block)]
    assert launched - len(useful) <= len(lengths)


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
def test_a_ragged_batch_idles_few_programs(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid of the padded batch, whose results would be the same, would idle half of its programs."""
    lengths = [129, 1, 70, 1, 1, 9, 1, 1]
    tiles = {"fwd": "BLOCK_M", "bwd_begin": "BLOCK_M", "bwd_dkdv": "BLOCK_N"}
    tiles["bwd_dq" if deterministic else "bwd_end"] = "BLOCK_M"
    launches = {}
    for name in tiles:
        kernel = getattr(attention_fwd if name == "fwd" else attention_bwd, f"_attention_{name}_kernel")
        launches[name] = mock.Mock(wraps=kernel.run)  # which launches it, on a GPU or in the interpreter
        monkeypatch.setattr(kernel, "run", launches[name])
    qkv = torch.randn(sum(lengths), 3, 1, 64, device=DEVICE).bfloat16()
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    common = (bounds, max(lengths), 0.125, 0.0, None, None)
    out, lse = attention.attention_fwd(qkv, *common, deterministic)
    attention.attention_bwd(out, qkv, out, lse, *common, False, deterministic)
    for name, tile in tiles.items():
        ((_, launched),) = launches[name].call_args_list
        block, programs = launched[tile], launched["grid"][0]
        useful = sum(-(-length // block) for length in lengths)
        padded = len(lengths) * -(-max(lengths) // block)
        assert useful <= programs, name
        assert useful / programs > 0.8 > useful / padded, name


@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (1, 1, 8, 8), (1, 3, 1, 8), (9, 1, 8, 8)], ids=str)
def test_the_gradient_of_a_shared_bias_is_summed_in_parts(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of few numbers, as rounding wants it, and by enough programs to fill the GPU."""
    monkeypatch.setattr(attention, "_BIAS_SUMMANDS", 4)
    lengths, heads = [8, 3, 1, 0, 5, 8, 2, 7, 4], 3
    kernel = attention_bwd._attention_bwd_dbias_kernel
    launch = mock.Mock(wraps=kernel.run)
    monkeypatch.setattr(kernel, "run", launch)
    random = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, heads, 32, generator=random).to(DEVICE)
    bias = torch.randn(shape, generator=random).to(DEVICE)
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    common = (bounds, max(lengths), 0.125, 0.0, None, bias)
    out, lse = attention.attention_fwd(qkv, *common, True)
    upstream = torch.randn(out.shape, generator=random).to(DEVICE)
    _, dbias = attention.attention_bwd(upstream, qkv, out, lse, *common, True, True)
    shared = len(lengths) * heads // (shape[0] * shape[1])
    parts = launch.call_args.kwargs["grid"][0] // (shape[0] * shape[1])
    assert parts <= shared <= 4 * parts

    bias = bias.double().requires_grad_()
    reference = attention_ref(qkv.double(), *common[:3], bias=bias)
    (expected,) = torch.autograd.grad(reference, bias, upstream.double())
    torch.testing.assert_close(dbias.double(), expected, atol=1e-5, rtol=1e-5)
