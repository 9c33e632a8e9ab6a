"""CUDA graphs for inference: the layers of an encoder, and the embeddings before them, replayed by one launch.

A small batch's kernels run for less time than it takes to launch them one by one. A CUDA graph launches them all at
once, but for fixed sizes and addresses only. So a batch is packed into static buffers of the next larger size, its
`Bucket`: the rows to spare are sequences of their own, and change nothing. One graph a bucket is recorded at the
bucket's first batch and kept; the one that was not used for longest goes when there are too many.

The graphs read the weights where the modules keep them, so that an optimizer's step or `weight.data.mul_()` is seen by
the next replay. Weights that moved (another Parameter, another device or dtype), or anything else that a graph took for
granted, are looked for at each call, and then all graphs are recorded anew.
"""

from __future__ import annotations

import contextlib
import operator
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastbert import encoder
from fastbert.encoder import TokenIds
from fastbert.guards import ResolvedStack, bypass_reason, captured
from fastbert.ops.embedding import like_input
from fastbert.packing import PackedBatch, capturing, surplus_ends

DEFAULT_LIMIT = 32  # graphs held by an encoder under cuda_graphs=True

_nbytes = operator.attrgetter("nbytes")


class Bucket(NamedTuple):
    """The sizes that a graph is recorded for, whether it adds a bias to the keys, and whether it begins with ids."""

    tokens: int
    sequences: int
    max_seqlen: int
    biased: bool
    embeds: bool

    @classmethod
    def of(cls, tokens: int, sequences: int, max_seqlen: int, biased: bool = False, embeds: bool = False) -> Bucket:
        """The smallest bucket that holds a batch, with the sequences that its rows to spare make.

        tokens: to a multiple of 16 and of an eighth of the power of two below: at most 12.5 % to spare from 128 tokens
        on. sequences: of a quarter. max_seqlen: to a power of two, at least 16.
        """
        longest = max(16, _geometric(max_seqlen, 1))
        rows = max(16, -(-_geometric(tokens, 8) // 16) * 16)
        return cls(rows, _geometric(sequences - (tokens - rows) // longest, 4), longest, biased, embeds)


def _geometric(number: int, steps: int) -> int:
    """`number` rounded up to one of the `steps` equal parts between two powers of two."""
    if number <= 1:
        return 1
    step = max(1, (1 << ((number - 1).bit_length() - 1)) // steps)
    return -(-number // step) * step


Recording = tuple[Callable[[], None], Tensor]

_recording = threading.Lock()
"""One capture at a time, of all encoders: a second one begins with waiting for the device, which spoils the first."""


class CudaRecorder:
    """Records what a function launches as a CUDA graph. The graphs of one recorder share their memory."""

    device_type = "cuda"

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None  # the last one that used the static buffers
        self._aside: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None  # to warm up on, and to record on

    @contextlib.contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """For work on the static buffers: on their device, after whatever used them last, on any stream."""
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream()
            if self._stream is not None and self._stream != stream:
                stream.wait_stream(self._stream)
            self._stream = stream
            # Not the stream that PyTorch records on, which stays on the device that recorded first; and no new ones at
            # each bucket: cuBLAS keeps a workspace for each stream that it has worked on.
            if self._aside is None or self._aside[0].device != stream.device:
                self._aside = torch.cuda.Stream(), torch.cuda.Stream()
            yield

    def finish(self) -> None:
        """Wait until no graph is running, so that some can be dropped."""
        if self._stream is not None:
            self._stream.synchronize()

    def warm_up(self, function: Callable[[], Tensor]) -> None:
        """Run what will be recorded until it does only what can be: no compiling, no first call of a library."""
        assert self._aside is not None
        stream, _ = self._aside
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(stream)

    def record(self, function: Callable[[], Tensor], *, first: bool) -> Recording:
        """(replay, the tensor that `function` gives, which each replay writes anew).

        first: whether there is no graph yet to share memory with.
        """
        if first:  # a pool does not outlive its last graph
            self._pool = torch.cuda.graph_pool_handle()
        assert self._aside is not None
        _, stream = self._aside
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            capture = torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local")
            with _recording, capture:
                y = function()
        finally:
            torch.cuda.set_stream(current)  # which PyTorch does not do if the capture fails at its end
        return graph.replay, y


class _Buffers:
    """The static input of one bucket.

    states: [tokens, H]; or ids: those of TokenIds, int64 [tokens] each. cu_seqlens: int32 [sequences + 1].
    bias: float32 [sequences, 1, 1, max_seqlen], or None.
    """

    def __init__(self, bucket: Bucket, like: Tensor | TokenIds) -> None:
        self.bucket = bucket
        tokens, sequences, longest, biased, _ = bucket
        if isinstance(like, TokenIds):
            device = like.input_ids.device
            self.ids = [torch.zeros(tokens, dtype=torch.int64, device=device) for _ in TokenIds._fields]
            self.typed = False  # whether token_type_ids holds those of the last batch; else zeros
            self.counted: tuple[int, int] | None = None  # the last batch's shape, if its positions count from 0
        else:
            device = like.device
            self.states = like.new_zeros(tokens, like.shape[-1])
        self.cu_seqlens = torch.zeros(sequences + 1, dtype=torch.int32, device=device)
        self.bias = torch.zeros(sequences, 1, 1, longest, device=device) if biased else None
        self.batch = PackedBatch(1, tokens, self.cu_seqlens, longest, bias=self.bias)
        self.shape: tuple[int, int] | None = None  # of the last batch, if it had no padding: then cu_seqlens is right

    def load(self, source: Tensor | TokenIds, batch: PackedBatch) -> None:
        """Copy a batch in. Rows behind its tokens keep what they had: no token sees them."""
        if isinstance(source, TokenIds):
            self._load_ids(source, batch)
        else:
            self.states[: batch.tokens].copy_(batch.rows(source))
        if self.bias is not None and batch.bias is not None:
            self.bias[: len(batch.cu_seqlens) - 1, ..., : batch.bias.shape[-1]].copy_(batch.bias)
        shape = batch.even_shape
        if shape is not None and shape == self.shape:
            return
        self.shape = shape
        ends = batch.cu_seqlens
        self.cu_seqlens[: len(ends)].copy_(ends)
        spare = self.cu_seqlens[len(ends) :]
        if len(spare):
            rows, longest = self.bucket.tokens, self.bucket.max_seqlen
            spare.copy_(surplus_ends(batch.tokens, len(spare), longest, rows, spare.device))

    def _load_ids(self, ids: TokenIds, batch: PackedBatch) -> None:
        for name, buffer, given in zip(TokenIds._fields, self.ids, ids, strict=True):
            if given is not None:
                buffer[: batch.tokens].copy_(like_input(given, name, ids.input_ids).reshape(-1))
        _, types, positions = self.ids
        if ids.token_type_ids is None and self.typed:
            types.zero_()
        self.typed = ids.token_type_ids is not None
        counted = None if ids.position_ids is not None else (batch.batch, batch.seqlen)
        if counted is not None and counted != self.counted:
            positions[: batch.tokens].view(counted).copy_(torch.arange(batch.seqlen, device=positions.device))
        self.counted = counted


class _Graph(NamedTuple):
    """What was recorded for a bucket: replay makes y [tokens, H] of what lies in the buffers."""

    buffers: _Buffers
    replay: Callable[[], None]
    y: Tensor


class EncoderGraphs:
    """The CUDA graphs of one encoder.

    limit: how many are held. recorder: records and replays them. reason: why the last call was run without, or None.
    captured, replayed, dropped: how many graphs were recorded, how many calls they served, how many had to make room.
    last_served: whether the last call that looked at the layers was served. Then the next one launches its graph first
    and looks at them while the device works.
    """

    def __init__(self, limit: int, recorder: Any = None) -> None:
        self.limit = limit
        self.recorder = CudaRecorder() if recorder is None else recorder
        self.reason: str | None = None
        self.captured = self.replayed = self.dropped = 0
        self._graphs: OrderedDict[Bucket, _Graph] = OrderedDict()
        self.last_served = False
        self._stack: ResolvedStack | None = None
        self._places: tuple[Any, ...] | None = None
        self._state: tuple[Any, ...] | None = None
        self._embedding: tuple[Any, ...] | None = None
        self._broken: str | None = None
        self._too_large: dict[Bucket, str] = {}
        self._lock = threading.Lock()

    def as_dict(self) -> dict[str, Any]:
        """What `report` shows."""
        told = {name: getattr(self, name) for name in ("reason", "limit", "captured", "replayed", "dropped")}
        return told | {"held": len(self._graphs)}

    def encode(
        self,
        layers: nn.ModuleList,
        source: Tensor | TokenIds,
        batch: PackedBatch,
        embeddings: Any = None,
    ) -> Tensor | None:
        """Through all layers -> [B, S, H], or None if no graph may serve this call.

        source: hidden states [B, S, H] or [T, H]; or, with embeddings (a
        `swapped.FastEmbeddings` that is ready for them), ids.
        """
        first = source if isinstance(source, Tensor) else source.input_ids
        self.reason = self._broken or replay_reason(first, batch, self.recorder.device_type)
        if self.reason is None and embeddings is not None:
            self.reason = ids_reason(embeddings, batch)
        if self.reason is not None:
            return None
        x = first if embeddings is None else embeddings.word_embeddings.weight
        biased, embeds = batch.bias is not None, embeddings is not None
        bucket = Bucket.of(batch.tokens, len(batch.cu_seqlens) - 1, batch.max_seqlen, biased, embeds)
        with self._lock, self.recorder.on(first.device):
            stack, y = self._stack, None
            unmoved = stack is not None and _places(stack.parameters, x) == self._places
            embedding = None if embeddings is None else _embeddings_state(embeddings)
            known = embedding is None or embedding == self._embedding
            if self.last_served and unmoved and known and bucket in self._graphs:
                y = self._run(self._graphs[bucket], source, batch)
            # While the device works: if the layers are not what they were, that was for nothing.
            if not (unmoved and stack and stack.current(layers) and _state(stack.parameters) == self._state):
                y, self.last_served = None, False
                self.reason = next(filter(None, (layer_reason(layer, x) for layer in layers)), None)
                if self.reason is not None:
                    return None
                self.clear()
                self._stack = stack = ResolvedStack(layers)
                self._places, self._state = _places(stack.parameters, x), _state(stack.parameters)
            if not known:
                self._forget_ids()
                self._embedding = embedding
            if y is None:
                self.reason = self._too_large.get(bucket)
                if self.reason is not None:
                    return None
                if bucket not in self._graphs and not self._record(layers, source, batch, bucket, embeddings):
                    return None
                y = self._run(self._graphs[bucket], source, batch)
            self._graphs.move_to_end(bucket)
            self.last_served = True
            self.replayed += 1
            return y

    def _forget_ids(self) -> None:
        """Drop the graphs that begin with ids."""
        self.recorder.finish()
        for bucket in [bucket for bucket in self._graphs if bucket.embeds]:
            del self._graphs[bucket]

    def clear(self) -> None:
        """Drop all graphs."""
        self.recorder.finish()
        self._graphs.clear()
        self._too_large.clear()

    def _run(self, graph: _Graph, source: Tensor | TokenIds, batch: PackedBatch) -> Tensor:
        graph.buffers.load(source, batch)
        graph.replay()
        y = graph.y[: batch.tokens]
        return batch.unpack(y.clone() if batch.indices is None else y)

    def _record(
        self, layers: Iterable[Any], source: Tensor | TokenIds, batch: PackedBatch, bucket: Bucket, embeddings: Any
    ) -> bool:
        """Record the graph of a bucket, at this batch. False, with the reason in `reason`, if it cannot be done."""
        if len(self._graphs) >= self.limit:
            self.recorder.finish()
            self._graphs.popitem(last=False)
            self.dropped += 1
        # Inference tensors could not be written again outside of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            parts = [layer.ready_parts(None)[1:] for layer in layers]

            def run() -> Tensor:
                x = buffers.states if embeddings is None else encoder.embed(embeddings, TokenIds(*buffers.ids))
                for weights, settings in parts:
                    x = encoder.layer(x, buffers.batch, weights, settings)
                return x

            try:
                buffers = _Buffers(bucket, source)
                buffers.load(source, batch)
                self.recorder.warm_up(run)
            except torch.OutOfMemoryError as error:
                self._give_up(bucket, error)
                return False
            try:
                replay, y = self.recorder.record(run, first=not self._graphs)
            except RuntimeError as error:
                self._give_up(bucket, error)
                return False
        self.captured += 1
        self._graphs[bucket] = _Graph(buffers, replay, y)
        return True

    def _give_up(self, bucket: Bucket, error: RuntimeError) -> None:
        """Record no more graphs, or, where memory ran out and a smaller bucket may do, none for this one."""
        self.reason = f"the recording failed: {error}"
        if isinstance(error, torch.OutOfMemoryError):
            self._too_large[bucket] = self.reason
        else:
            self._broken = self.reason
        warnings.warn(f"cuda_graphs: {self.reason}; the model runs without", stacklevel=3)


def replay_reason(hidden_states: Tensor, batch: PackedBatch, device_type: str) -> str | None:
    """Why no graph may serve a call, for what does not lie in the layers."""
    if hidden_states.device.type != device_type:
        return f"the model is on {hidden_states.device}, graphs need {device_type}"
    if torch.is_grad_enabled():
        return "gradients are recorded; torch.no_grad() or torch.inference_mode() leaves them out"
    if torch.is_autocast_enabled(device_type):
        return "autocast is on; converting the model (model.bfloat16()) does without"
    if captured("hidden_states"):
        return "hidden states were asked for"
    if batch.bias is not None and batch.bias.shape[1:3] != (1, 1):
        return "the mask has 4 dimensions"
    if capturing(hidden_states):
        return "another CUDA graph is being captured"
    return None


def ids_reason(embeddings: Any, batch: PackedBatch) -> str | None:
    """Why no graph may begin with the embeddings, or None."""
    if embeddings.dropout.training and embeddings.dropout.p:
        return "dropout is on; model.eval() switches it off"
    if batch.seqlen > embeddings.position_embeddings.weight.shape[0]:
        return "a sequence has more tokens than there are positions"
    return None


def layer_reason(layer: Any, x: Tensor) -> str | None:
    """Why a layer cannot be part of a graph, or None."""
    reason = bypass_reason(layer, "a layer")
    if reason is not None:
        return reason
    reason, _, settings = layer.ready_parts(x)
    if reason is None and settings.dropout:
        return "dropout is on; model.eval() switches it off"
    return reason


def _places(weights: Sequence[Tensor], x: Tensor) -> tuple[Any, ...]:
    """Where a graph reads, and what it begins with: as long as these are the same, its replay does no harm."""
    return (x.device, x.dtype, x.shape[-1], *map(Tensor.data_ptr, weights))


def _state(weights: Sequence[Tensor]) -> tuple[Any, ...]:
    """What the graphs take for granted besides the modules and places, to be compared at each call."""
    matmul = torch.backends.cuda.matmul
    state: list[Any] = [os.environ.get("FASTBERT_BACKEND"), matmul.fp32_precision]
    state += [matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction]
    state.append(torch.are_deterministic_algorithms_enabled())
    for look in (Tensor.stride, _nbytes):
        state += map(look, weights)
    return tuple(state)


def _embeddings_state(embeddings: Any) -> tuple[Any, ...]:
    """The same of the embeddings, whose tables a replay reads at the batch's ids: with their places and sizes."""
    weights = embeddings.resolve().weights.read()
    state: list[Any] = [embeddings.LayerNorm.eps]
    for look in (Tensor.data_ptr, Tensor.stride, _nbytes, operator.attrgetter("dtype")):
        state += map(look, weights)
    return tuple(state)
