"""From an attention mask to a packed batch and back.

The encoder works on the real tokens alone: `pack` takes them out of [B, S, H] into [T, H], `cu_seqlens` says where each
sequence starts, and `unpack` puts them back, with zeros where the mask is 0 (but for the first place of a row, which
pooled outputs read). Where tokens cannot be taken out (a 4-D mask, or a trace or a CUDA graph, in which T must not
depend on data) all B * S places are kept, and the mask becomes an additive bias; unless `token_bound` says how many
tokens there are at most: then T is that bound, and the rows behind the last token are sequences of their own, which
`unpack` leaves out.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastbert.internals import assert_async

SMALL = 4096  # places of a mask that is read on the CPU wherever it lies

_bound: int | None = None  # process-wide: a checkpointed encoder is recomputed in a thread of autograd's own


@contextlib.contextmanager
def token_bound(tokens: int) -> Iterator[None]:
    """Within this context, a batch with a mask is packed into exactly `tokens` rows, and nothing is read back for it.

    tokens: at least the number of real tokens (ones in the mask) of each batch. With it the work has a size that is
    known beforehand, so that a whole step can be captured in a CUDA graph or compiled, without computing the padding.
    Rows to spare cost what tokens cost, and change no result. Question answering heads and ELECTRA's summaries of all
    places keep their padding, and 4-D masks theirs, as ever. A first place that is masked gives zeros here, also to
    pooled outputs: pad on the right.

    Applies to all threads. Raises ValueError if tokens is no positive integer; the forward raises ValueError if it
    has no mask and more tokens. A mask with more is found on the device: RuntimeError on the CPU, on CUDA a
    device-side assertion, after which the process has to end.
    """
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"token_bound: tokens must be an integer of at least 1, got {tokens!r}")
    global _bound
    before, _bound = _bound, tokens
    try:
        yield
    finally:
        _bound = before


def bounded() -> bool:
    """Whether a `token_bound` is in force."""
    return _bound is not None


class PackedBatch:
    """One batch as the encoder sees it.

    batch, seqlen: B and S of the padded tensors. cu_seqlens: int32 [sequences + 1]. max_seqlen: the longest sequence.
    indices: int64 [T], the real tokens among the B * S places; None if all places are kept. Where T is a bound, the
        rows without a token have B * S there, and cu_seqlens makes sequences of them behind the B real ones.
    bias: additive, [B|1, h|1, S|1, S], or None.
    mask: the 2-D bool mask [B, S], or None. source: the 4-D mask as it was given, or None.
    zero: whether `unpack` clears the masked places of a layout that keeps them.
    """

    def __init__(
        self,
        batch: int,
        seqlen: int,
        cu_seqlens: Tensor,
        max_seqlen: int,
        *,
        indices: Tensor | None = None,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        source: Tensor | None = None,
        zero: bool = False,
        sequences: bool = False,
        surplus: bool = False,
    ) -> None:
        self.batch = batch
        self.seqlen = seqlen
        self.cu_seqlens = cu_seqlens
        self.max_seqlen = max_seqlen
        self.indices = indices
        self.bias = bias
        self.mask = mask
        self.source = source
        self.zero = zero
        self._sequences = sequences
        self._surplus = surplus
        self._stock: dict[bool, Tensor | None] = {}

    @classmethod
    def full(cls, batch: int, seqlen: int, device: torch.device) -> PackedBatch:
        """A batch without padding: nothing is gathered, `pack` and `unpack` are views."""
        return cls(batch, seqlen, _even(batch, seqlen, device), seqlen)

    @classmethod
    def from_mask(cls, attention_mask: Tensor, batch: int, seqlen: int, device: torch.device) -> PackedBatch:
        """From a mask [B, S] of 0 and 1 (bool, integer or float), in any pattern, for states on `device`.

        The first place of a row that has tokens is kept even if it is masked (padding on the left): pooled outputs
        read it. It sees the tokens, and a bias hides it from all, as in stock.

        Reads the lengths back from the device, once. Raises ValueError for another shape or other values.
        """
        _check_shape(attention_mask, batch, seqlen)
        attention_mask = at_hand(attention_mask)
        if attention_mask.is_cpu and bool((attention_mask == 1).all()):  # soon told on the CPU
            return cls.full(batch, seqlen, device)
        mask = kept = checked_mask(attention_mask)
        lengths = mask.sum(1, dtype=torch.int32)
        starts_masked = (lengths > 0) & ~mask[:, 0] if seqlen else lengths > 0
        on_host, masked_starts = torch.stack((lengths, starts_masked)).tolist()
        bias = None
        if any(masked_starts):
            kept = mask.clone()
            kept[:, 0] |= starts_masked
            lengths = lengths + starts_masked
            on_host = [length + start for length, start in zip(on_host, masked_starts, strict=True)]
            bias = torch.zeros(batch, 1, 1, max(on_host), device=mask.device)
            bias[:, 0, 0, 0].masked_fill_(starts_masked, -torch.inf)
            bias = bias.to(device, non_blocking=True)
        elif sum(on_host) == batch * seqlen:
            return cls.full(batch, seqlen, device)
        flat = kept.reshape(-1)
        indices = flat.nonzero() if mask.device.type == "cpu" else torch.nonzero_static(flat, size=sum(on_host))
        cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        indices, cu_seqlens, mask = (x.to(device, non_blocking=True) for x in (indices.view(-1), cu_seqlens, mask))
        return cls(batch, seqlen, cu_seqlens, max(on_host), indices=indices, bias=bias, mask=mask)

    @classmethod
    def bounded(cls, attention_mask: Tensor, batch: int, seqlen: int, tokens: int) -> PackedBatch:
        """From a mask [B, S] in any pattern, into `tokens` rows, and no host sync; see `token_bound`."""
        _check_shape(attention_mask, batch, seqlen)
        if batch * seqlen == 0:
            return cls.full(batch, seqlen, attention_mask.device)
        mask = attention_mask if attention_mask.dtype is torch.bool else attention_mask != 0
        ends = mask.sum(1, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        assert_async(
            ends[-1] <= tokens, f"attention_mask has more than {tokens} tokens, the bound set by fastbert.token_bound"
        )
        indices = torch.nonzero_static(mask.reshape(-1), size=tokens, fill_value=batch * seqlen).view(-1)
        surplus = surplus_ends(ends[-1:], -(-tokens // seqlen), seqlen, tokens, mask.device)
        cu_seqlens = torch.cat([ends.new_zeros(1), ends, surplus])
        return cls(batch, seqlen, cu_seqlens, seqlen, indices=indices, mask=mask, surplus=True)

    @classmethod
    def padded(cls, attention_mask: Tensor, batch: int, seqlen: int, dtype: torch.dtype, *, zero: bool) -> PackedBatch:
        """From a mask [B, S], all places kept and no host sync: for traces, and for whoever reads the masked places."""
        _check_shape(attention_mask, batch, seqlen)
        mask = attention_mask if attention_mask.dtype is torch.bool else attention_mask != 0
        bias = additive(mask[:, None, None, :], dtype)
        return cls(batch, seqlen, _even(batch, seqlen, mask.device), seqlen, bias=bias, mask=mask, zero=zero)

    @classmethod
    def from_bias(cls, attention_mask: Tensor, batch: int, seqlen: int, dtype: torch.dtype) -> PackedBatch:
        """From a mask [B|1, h|1, S|1, S]: bool (True takes part) or floating (added to the scores)."""
        if attention_mask.dtype is torch.bool:  # as SDPA reads it: what sees nothing gets 0
            bias = additive(attention_mask, dtype, -torch.inf)
        elif attention_mask.is_floating_point():
            bias = attention_mask
        else:
            raise ValueError(
                f"attention_mask with 4 dimensions has dtype {attention_mask.dtype}, allowed are torch.bool "
                "(True takes part) and floating point (added to the scores)"
            )
        cu_seqlens = _even(batch, seqlen, attention_mask.device)
        return cls(batch, seqlen, cu_seqlens, seqlen, bias=bias, source=attention_mask)

    @classmethod
    def from_cu_seqlens(
        cls,
        batch: int,
        seqlen: int,
        device: torch.device,
        cu_seq_lens_q: Tensor | None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
    ) -> PackedBatch:
        """From input that comes packed as [1, T], the way transformers' flash attention takes it.

        Checks the values, which a trace or the capture of a CUDA graph cannot: there max_length_q has to be right, and
        is T if it is not given.
        """
        cu_seqlens = cu_seq_lens_q if cu_seq_lens_q is not None else cu_seq_lens_k
        assert cu_seqlens is not None
        name = "cu_seq_lens_q" if cu_seq_lens_q is not None else "cu_seq_lens_k"
        if batch != 1:
            raise ValueError(f"{name} is for packed input with batch size 1, the input has batch size {batch}")
        if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point() or cu_seqlens.dtype is torch.bool:
            raise ValueError(
                f"{name} must hold integers in 1 dimension, got {cu_seqlens.dtype} of shape {list(cu_seqlens.shape)}"
            )
        longest = max_length_q if max_length_q is not None else max_length_k
        if not torch.compiler.is_compiling() and not capturing(cu_seqlens):
            ends = cu_seqlens.tolist()
            lengths = [end - start for start, end in itertools.pairwise(ends)]
            if not lengths or ends[0] != 0 or ends[-1] != seqlen or min(lengths) < 0:
                raise ValueError(f"{name} must rise from 0 to {seqlen}, the number of tokens given; got {ends}")
            if cu_seq_lens_q is not None and cu_seq_lens_k is not None and cu_seq_lens_k.tolist() != ends:
                raise ValueError("cu_seq_lens_k must equal cu_seq_lens_q in self-attention")
            if longest is not None and int(longest) < max(lengths):
                raise ValueError(f"max_length_q is {int(longest)}, shorter than the longest sequence ({max(lengths)})")
            # What is given stays, so that a capture launches the kernels that its warm-up has loaded.
            longest = max(lengths) if longest is None else int(longest)
        cu_seqlens = cu_seqlens.to(device=device, dtype=torch.int32)
        return cls(1, seqlen, cu_seqlens, seqlen if longest is None else longest, sequences=True)

    @property
    def tokens(self) -> int:
        """T, the number of rows that `pack` gives."""
        return self.batch * self.seqlen if self.indices is None else self.indices.shape[0]

    @property
    def even_shape(self) -> tuple[int, int] | None:
        """(B, S) if cu_seqlens follows from them, because every sequence has S tokens; else None."""
        return (self.batch, self.seqlen) if self.indices is None and not self._sequences else None

    def pack(self, x: Tensor) -> Tensor:
        """[B, S, ...] -> [T, ...]: the real tokens, in order. A view if every place is kept."""
        x = x.reshape(self.batch * self.seqlen, *x.shape[2:])
        return x if self.indices is None else _Gather.apply(x, self.indices, self._surplus)

    def rows(self, x: Tensor) -> Tensor:
        """States [B, S, H] packed, or [T, H] as they are."""
        return x if x.dim() == 2 else self.pack(x)

    def unpack(self, x: Tensor) -> Tensor:
        """[T, ...] -> [B, S, ...], zeros where the mask is 0, but for the first place of a row that has tokens."""
        if self.indices is not None:
            x = _Scatter.apply(x, self.indices, self.batch * self.seqlen, self._surplus)
        x = x.view(self.batch, self.seqlen, *x.shape[1:])
        if self.zero and self.mask is not None:
            first = torch.arange(self.seqlen, device=x.device) == 0  # from_mask; a slice would bind traces to S > 2
            shown = self.mask | (first & self.mask.any(1, keepdim=True))
            x = torch.where(shown.view(*shown.shape, *(1,) * (x.dim() - 2)), x, 0.0)
        return x

    def stock_mask(self, dtype: torch.dtype, *, as_bias: bool = False) -> Tensor | None:
        """The 4-D mask that transformers' own layers take: bool, or (as_bias) additive; None if nothing is masked."""
        if self.source is not None:
            return self.source
        if as_bias not in self._stock:
            mask = self._visible()
            self._stock[as_bias] = additive(mask, dtype) if as_bias and mask is not None else mask
        return self._stock[as_bias]

    def _visible(self) -> Tensor | None:
        if self._sequences:
            places = torch.arange(self.seqlen, device=self.cu_seqlens.device, dtype=self.cu_seqlens.dtype)
            number = torch.searchsorted(self.cu_seqlens, places, right=True)
            return (number[:, None] == number[None, :])[None, None]
        if self.mask is None:
            return None
        return self.mask[:, None, None, :].expand(self.batch, 1, self.seqlen, self.seqlen)


def batch_of(
    padded: Tensor, attention_mask: Any, kwargs: dict[str, Any], *, keep_padding: bool = False
) -> PackedBatch | str:
    """The batch of padded states [B, S, H] under a mask as the encoder or a layer gets it, or why there is none.

    padded: the states; ids [B, S] serve where a mask is `countable`.
    keep_padding: compute the masked places too, as stock does.
    """
    if isinstance(attention_mask, PackedBatch):
        return attention_mask
    batch, seqlen = padded.shape[:2]
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        return f"the attention mask is a {type(attention_mask).__name__}"
    made_here = getattr(attention_mask, "_fastbert_batch", None)
    if made_here is not None:
        return made_here
    if sequences(kwargs):
        names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
        if attention_mask is not None:
            raise ValueError("attention_mask must be None when cu_seq_lens_q is given")
        return PackedBatch.from_cu_seqlens(batch, seqlen, padded.device, *(kwargs.get(name) for name in names))
    if attention_mask is None:
        if _bound is not None and batch * seqlen > _bound:
            raise ValueError(f"token_bound: tokens is {_bound}, but the batch has no mask and {batch * seqlen} tokens")
        return PackedBatch.full(batch, seqlen, padded.device)
    if attention_mask.dim() == 4:
        _check_bias_shape(attention_mask, batch, seqlen)
        readable = _bound is None and not unreadable(attention_mask)
        if not keep_padding and readable and (mask := _same_rows(attention_mask)) is not None:
            return PackedBatch.from_mask(mask.expand(batch, seqlen), batch, seqlen, padded.device)
        return PackedBatch.from_bias(attention_mask, batch, seqlen, padded.dtype)
    if _bound is not None and not keep_padding:
        return PackedBatch.bounded(attention_mask, batch, seqlen, _bound)
    if keep_padding or unreadable(attention_mask):
        return PackedBatch.padded(attention_mask, batch, seqlen, padded.dtype, zero=not keep_padding)
    return PackedBatch.from_mask(attention_mask, batch, seqlen, padded.device)


def batch_of_ids(input_ids: Tensor, attention_mask: Tensor | None, kwargs: dict[str, Any]) -> PackedBatch | str:
    """The same of ids [B, S] under a mask that is `countable`, any value but 0 being a token, or under None."""
    if attention_mask is None:
        return batch_of(input_ids, None, kwargs)
    batch, seqlen = input_ids.shape
    if _bound is not None or sequences(kwargs):
        return batch_of(input_ids, attention_mask.to(input_ids.device, torch.bool), kwargs)
    mask = at_hand(attention_mask)
    # True of single requests, where an operation counts.
    if mask.is_cpu and mask.shape == (batch, seqlen) and bool(mask.all()):
        return PackedBatch.full(batch, seqlen, input_ids.device)
    return batch_of(input_ids, mask.to(torch.bool), kwargs)


def at_hand(mask: Tensor) -> Tensor:
    """A small mask on the CPU, a large one where it is: a small copy takes less time than launching what counts it."""
    return mask.cpu() if mask.numel() <= SMALL else mask


def sequences(kwargs: dict[str, Any]) -> bool:
    """Whether the arguments of a call say where sequences end in input that comes packed."""
    return kwargs.get("cu_seq_lens_q") is not None or kwargs.get("cu_seq_lens_k") is not None


def _same_rows(mask: Tensor) -> Tensor | None:
    """The 2-D mask [B|1, S] that a bool mask [B|1, 1, S|1, S] repeats for every query, as SDPA's does, or None."""
    if mask.dtype is not torch.bool or mask.shape[1] != 1:
        return None
    rows = mask[:, 0, :1]
    return rows[:, 0] if torch.equal(mask[:, 0], rows.expand_as(mask[:, 0])) else None


def packing_mask(mask: Tensor) -> Tensor | None:
    """The 2-D mask [B|1, S] that says which places a mask leaves out, if it can be read; None if all are kept."""
    if mask.dim() == 2:
        return mask
    return _same_rows(mask) if mask.dim() == 4 else None


def countable(mask: Any) -> bool:
    """Whether a mask is 2-D, and its tokens can be counted or are bounded: then the layout is packed."""
    return type(mask) is Tensor and mask.dim() == 2 and (_bound is not None or not unreadable(mask))


def unreadable(mask: Tensor) -> bool:
    """Whether the values of a mask cannot be read now: while tracing or capturing, on meta or fake tensors."""
    return torch.compiler.is_compiling() or mask.is_meta or type(mask) is not Tensor or capturing(mask)


def capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured on the stream that works on this tensor."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def additive(visible: Tensor, dtype: torch.dtype, forbidden: float | None = None) -> Tensor:
    """0 where `visible` is True, else `forbidden`: by default the lowest finite number, as with -inf a row that sees
    nothing would become NaN in stock code."""
    bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return bias.masked_fill(~visible, torch.finfo(dtype).min if forbidden is None else forbidden)


def checked_mask(attention_mask: Tensor) -> Tensor:
    """The mask as bool. Raises ValueError for values other than 0 and 1."""
    if attention_mask.dtype is torch.bool:
        return attention_mask
    mask = attention_mask != 0
    if not torch.equal(mask.to(attention_mask.dtype), attention_mask):
        raise ValueError("attention_mask with 2 dimensions must hold only 0 (padding) and 1 (a token)")
    return mask


def _check_bias_shape(attention_mask: Tensor, batch: int, seqlen: int) -> None:
    shape = attention_mask.shape
    if shape[0] not in (1, batch) or shape[2] not in (1, seqlen) or shape[3] != seqlen:
        raise ValueError(
            f"attention_mask has shape {list(shape)}, allowed with 4 dimensions are "
            f"[{batch} or 1, heads or 1, {seqlen} or 1, {seqlen}]"
        )


def _check_shape(attention_mask: Tensor, batch: int, seqlen: int) -> None:
    if tuple(attention_mask.shape) != (batch, seqlen):
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}, the input needs [{batch}, {seqlen}], "
            f"or a 4-D mask [{batch} or 1, heads or 1, {seqlen} or 1, {seqlen}]"
        )


def surplus_ends(last: Tensor | int, count: int, longest: int, total: int, device: torch.device) -> Tensor:
    """`count` further entries of cu_seqlens, so that the rows behind the last token belong to sequences, too: int32.

    last: where the tokens end. longest: of a sequence. total: where the rows end. Attention writes only the rows of
    sequences, and whatever else lay in memory could be NaN, which a product with a gradient of zero keeps.
    """
    steps = torch.arange(1, count + 1, dtype=torch.int32, device=device)
    return (steps * longest + last).clamp_(max=total)


def _even(batch: int, seqlen: int, device: torch.device) -> Tensor:
    if torch.compiler.is_compiling() or seqlen == 0:
        return torch.arange(batch + 1, dtype=torch.int32, device=device) * seqlen
    return torch.arange(0, batch * seqlen + 1, seqlen, dtype=torch.int32, device=device)


class _Gather(torch.autograd.Function):
    """Rows of x [N, ...] by index; the indices differ, so backward is a plain write instead of a sum.

    surplus: some indices are N; they give rows of zeros.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, indices: Tensor, surplus: bool) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.rows, ctx.surplus = x.shape[0], surplus
        if not surplus:
            return x.index_select(0, indices)
        none = (indices == ctx.rows).view(-1, *(1,) * (x.dim() - 1))
        # Not in place: torch.compile of torch 2.11 loses the gradient of what an in-place operation returns.
        return x.index_select(0, indices.clamp(max=ctx.rows - 1)).masked_fill(none, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Scatter.apply(grad, ctx.saved_tensors[0], ctx.rows, ctx.surplus), None, None


class _Scatter(torch.autograd.Function):
    """Rows of x [T, ...] written to places of a zero tensor [N, ...]; the inverse of _Gather.

    surplus: some indices are N; their rows are left out.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, indices: Tensor, rows: int, surplus: bool) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.surplus = surplus
        places = x.new_zeros(rows + surplus, *x.shape[1:]).index_copy_(0, indices, x)
        return places[:rows] if surplus else places

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _Gather.apply(grad, ctx.saved_tensors[0], ctx.surplus), None, None, None
