"""PackedBatch: from every kind of mask, to packed tokens and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.packing import PackedBatch, batch_of


def packed(mask: list[list[int]]) -> PackedBatch:
    tensor = torch.tensor(mask)
    return PackedBatch.from_mask(tensor, *tensor.shape, tensor.device)


def test_full_batch_is_a_view() -> None:
    x = torch.randn(2, 3, 5)
    for batch in (PackedBatch.full(2, 3, x.device), packed([[1, 1, 1], [1, 1, 1]])):
        assert batch.indices is None
        assert batch.pack(x).data_ptr() == x.data_ptr()
        assert batch.unpack(batch.pack(x)).data_ptr() == x.data_ptr()
        assert batch.cu_seqlens.tolist() == [0, 3, 6]
        assert batch.max_seqlen == 3


def test_what_a_mask_becomes() -> None:
    batch = packed([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]])
    assert batch.indices is not None
    assert batch.indices.tolist() == [0, 2, 3, 8, 9]
    assert batch.cu_seqlens.tolist() == [0, 3, 3, 5]
    assert batch.cu_seqlens.dtype is torch.int32
    assert batch.max_seqlen == 3
    assert batch.bias is None
    x = torch.arange(1.0, 25.0).view(3, 4, 2)
    assert batch.pack(x)[:, 0].tolist() == [1, 5, 7, 17, 19]
    y = batch.unpack(batch.pack(x))
    assert torch.equal(y, x * torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]])[..., None])


def test_a_masked_first_place_is_kept_and_hidden() -> None:
    batch = packed([[1, 1, 1], [0, 0, 1], [0, 0, 0]])
    assert batch.indices is not None
    assert batch.indices.tolist() == [0, 1, 2, 3, 5]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 5]
    assert batch.bias is not None
    assert batch.bias.tolist() == [[[[0, 0, 0]]], [[[-torch.inf, 0, 0]]], [[[0, 0, 0]]]]
    assert batch.stock_mask(torch.float32)[1, 0, 0].tolist() == [False, False, True]
    x = torch.ones(3, 3, 1)
    assert batch.unpack(batch.pack(x))[..., 0].tolist() == [[1, 1, 1], [1, 0, 1], [0, 0, 0]]


def test_what_a_mask_becomes_lies_where_the_states_do() -> None:
    for mask in ([[1, 1], [1, 1]], [[1, 0], [1, 1]], [[0, 1], [1, 1]]):
        batch = PackedBatch.from_mask(torch.tensor(mask), 2, 2, torch.device("meta"))
        found = [batch.cu_seqlens, batch.indices, batch.mask, batch.bias]
        assert all(tensor.is_meta for tensor in found if tensor is not None)
        assert (batch.bias is not None) == (mask[0][0] == 0)


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_pack_and_unpack_invert_each_other(data: st.DataObject) -> None:
    batch_size, seqlen = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 7))
    flags = data.draw(st.lists(st.booleans(), min_size=batch_size * seqlen, max_size=batch_size * seqlen))
    mask = torch.tensor(flags).view(batch_size, seqlen)
    batch = PackedBatch.from_mask(mask, batch_size, seqlen, mask.device)
    mask[:, 0] |= mask.any(1)  # what is kept of any mask
    x = torch.randn(batch_size, seqlen, 3)
    assert torch.equal(batch.pack(x), x[mask])
    assert torch.equal(batch.unpack(x[mask]), x * mask[..., None])
    assert batch.cu_seqlens.diff().tolist() == mask.sum(1).tolist()


def test_gradients() -> None:
    batch = packed([[1, 0, 1], [1, 1, 0]])
    x = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    t = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(batch.pack, x)
    assert torch.autograd.gradcheck(batch.unpack, t)
    assert torch.autograd.gradgradcheck(batch.pack, x)
    assert torch.autograd.gradgradcheck(batch.unpack, t)


def test_stock_masks() -> None:
    batch = packed([[1, 0], [1, 1]])
    visible = batch.stock_mask(torch.float32)
    assert visible is not None
    assert visible.tolist() == [[[[True, False], [True, False]]], [[[True, True], [True, True]]]]
    assert PackedBatch.full(2, 2, torch.device("cpu")).stock_mask(torch.float32) is None
    ends = torch.tensor([0, 1, 3])
    visible = PackedBatch.from_cu_seqlens(1, 3, torch.device("cpu"), ends).stock_mask(torch.float32)
    assert visible is not None
    assert visible[0, 0].int().tolist() == [[1, 0, 0], [0, 1, 1], [0, 1, 1]]


def test_padded_layout() -> None:
    mask = torch.tensor([[1, 0], [0, 0]])
    batch = PackedBatch.padded(mask, 2, 2, torch.float32, zero=True)
    assert batch.indices is None
    assert batch.bias is not None
    assert batch.bias.shape == (2, 1, 1, 2)
    assert torch.isfinite(batch.bias).all()
    x = torch.ones(2, 2, 1)
    assert batch.unpack(batch.pack(x))[..., 0].tolist() == [[1, 0], [0, 0]]


BAD_MASKS = [
    (torch.ones(2, 4), r"attention_mask has shape \[2, 4\], the input needs \[2, 3\]"),
    (torch.ones(3), r"attention_mask has shape \[3\]"),
    (torch.ones(2, 3, 3), r"attention_mask has shape \[2, 3, 3\]"),
    (torch.full((2, 3), 2), "attention_mask with 2 dimensions must hold only 0 .* and 1"),
    (torch.full((2, 3), 0.5), "attention_mask with 2 dimensions must hold only 0 .* and 1"),
    (torch.full((2, 3), float("nan")), "attention_mask with 2 dimensions must hold only 0 .* and 1"),
    (torch.ones(2, 1, 3, 4), r"attention_mask has shape \[2, 1, 3, 4\], allowed with 4 dimensions"),
    (torch.ones(2, 1, 3, 3, dtype=torch.long), "attention_mask with 4 dimensions has dtype torch.int64"),
]


@pytest.mark.parametrize(("mask", "message"), BAD_MASKS)
def test_bad_masks(mask: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batch_of(torch.randn(2, 3, 8), mask, {})


BAD_CU_SEQLENS = [
    ({"cu_seq_lens_q": [0, 2]}, "cu_seq_lens_q must rise from 0 to 3"),
    ({"cu_seq_lens_q": [0, 4]}, "cu_seq_lens_q must rise from 0 to 3"),
    ({"cu_seq_lens_q": [1, 3]}, "cu_seq_lens_q must rise from 0 to 3"),
    ({"cu_seq_lens_q": [0, 2, 1, 3]}, "cu_seq_lens_q must rise from 0 to 3"),
    ({"cu_seq_lens_k": [0]}, "cu_seq_lens_k must rise from 0 to 3"),
    ({"cu_seq_lens_q": [0.0, 3.0]}, "cu_seq_lens_q must hold integers in 1 dimension"),
    ({"cu_seq_lens_q": [[0, 3]]}, "cu_seq_lens_q must hold integers in 1 dimension"),
    ({"cu_seq_lens_q": [0, 3], "cu_seq_lens_k": [0, 1, 3]}, "cu_seq_lens_k must equal cu_seq_lens_q"),
    ({"cu_seq_lens_q": [0, 3], "max_length_q": 2}, "max_length_q is 2, shorter than the longest sequence"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_CU_SEQLENS)
def test_bad_cu_seqlens(arguments: dict[str, object], message: str) -> None:
    given = {name: torch.tensor(value) if isinstance(value, list) else value for name, value in arguments.items()}
    with pytest.raises(ValueError, match=message):
        batch_of(torch.randn(1, 3, 8), None, given)


def test_cu_seqlens_with_something_else() -> None:
    ends = torch.tensor([0, 3])
    with pytest.raises(ValueError, match="attention_mask must be None when cu_seq_lens_q is given"):
        batch_of(torch.randn(1, 3, 8), torch.ones(1, 3), {"cu_seq_lens_q": ends})
    with pytest.raises(ValueError, match="batch size 1, the input has batch size 2"):
        batch_of(torch.randn(2, 3, 8), None, {"cu_seq_lens_q": ends})
