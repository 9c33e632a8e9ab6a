"""CUDA graphs: everything but CUDA's own recording, which tests/gpu looks at.

Here the graphs' recorder runs what was recorded anew, in the same static buffers, so that the choice of buckets, the
surplus rows, what is kept and what is looked for at each call are those of a GPU.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from comparison import MASKS, all_fast, build, inputs, real
from torch import Tensor, nn

import fastbert
from fastbert.graphs import Bucket, EncoderGraphs


class Rerun:
    """Records by keeping the function. launched: the number of each graph that was replayed, in turn."""

    device_type = "cpu"

    def __init__(self) -> None:
        self.recorded = 0
        self.launched: list[int] = []

    @contextlib.contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        yield

    def finish(self) -> None:
        pass

    def warm_up(self, function: Callable[[], Tensor]) -> None:
        function()

    def record(self, function: Callable[[], Tensor], *, first: bool) -> tuple[Callable[[], Any], Tensor]:
        y = function()
        number, self.recorded = self.recorded, self.recorded + 1

        def replay() -> None:
            self.launched.append(number)
            y.copy_(function())

        return replay, y


def graphed(family: str = "bert", head: str = "Model", limit: int = 8, **changes: Any) -> tuple[Any, EncoderGraphs]:
    model = fastbert.optimize(build(family, head, **changes))
    graphs = EncoderGraphs(limit, Rerun())
    next(module for module in model.modules() if hasattr(module, "layer"))._fastbert.graphs = graphs
    return model, graphs


def without(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The output of a copy that has no graphs."""
    plain = fastbert.optimize(fastbert.restore(copy.deepcopy(model)))
    return plain(**batch)[0]


def told(model: nn.Module) -> dict[str, Any]:
    (entry,) = fastbert.report(model).cuda_graphs
    return entry


# --- buckets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sequences", [1, 2, 5, 32, 200])
@pytest.mark.parametrize("max_seqlen", [1, 17, 128, 300, 512])
def test_a_bucket_holds_its_batch(sequences: int, max_seqlen: int) -> None:
    for tokens in range(0, sequences * max_seqlen + 1, 1 + sequences * max_seqlen // 200):
        bucket = Bucket.of(tokens, sequences, max_seqlen)
        spare = bucket.tokens - tokens
        assert 0 <= spare <= max(16 if tokens == 0 else 15, tokens / 8)
        assert max_seqlen <= bucket.max_seqlen <= max(16, 2 * max_seqlen - 1)
        needed = sequences + -(-spare // bucket.max_seqlen)
        assert needed <= bucket.sequences <= 1.25 * needed


def test_full_batches_of_usual_sizes_have_no_spare_rows() -> None:
    for batch, seqlen in ((1, 128), (1, 512), (8, 128), (32, 384), (32, 512), (64, 256)):
        assert Bucket.of(batch * seqlen, batch, seqlen)[:2] == (batch * seqlen, batch)


def test_there_are_few_buckets() -> None:
    assert len({Bucket.of(tokens, 1, 512).tokens for tokens in range(1, 16385)}) == 64
    assert Bucket.of(0, 1, 1) == (16, 2, 16, False, False)


# --- results ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta"])
def test_same_outputs(family: str, mode: Callable[[], Any]) -> None:
    model, graphs = graphed(family)
    shapes = [(4, 21), (4, 20), (2, 33), (1, 7), (4, 21)]
    batches = [inputs(mask, *shape) for mask in MASKS for shape in shapes if mask != "empty row" or shape[0] > 1]
    with mode():
        outputs = [model(**batch)[0] for batch in batches]  # kept: a later replay must not change an earlier result
        for batch, y in zip(batches, outputs, strict=True):
            expected = without(model, batch)
            torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
            assert (y[:, 1:][~real(batch)[:, 1:]] == 0).all()
    assert graphs.reason is None
    assert graphs.replayed == len(batches)
    assert graphs.captured < len(batches)
    assert all_fast(model)


def test_modes_can_alternate() -> None:
    model, graphs = graphed()
    batch = inputs("right")
    with torch.inference_mode():
        expected = model(**batch)[0].clone()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch)[0], expected)
    y = model(**batch)[0]
    assert graphs.reason is not None
    y.sum().backward()
    with torch.inference_mode():
        torch.testing.assert_close(model(**batch)[0], expected)
    assert (graphs.captured, graphs.replayed) == (1, 3)


def test_packed_input() -> None:
    model, graphs = graphed()
    lengths = [5, 1, 12, 3]
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    batch = {
        "input_ids": torch.randint(2, 100, (1, 21)),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": ends,
    }
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model(**batch)[0], without(model, batch), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(model(batch["input_ids"])[0], without(model, {"input_ids": batch["input_ids"]}))
    assert graphs.replayed == 4


def test_with_a_token_bound() -> None:
    model, graphs = graphed()
    batch = inputs("holes")
    with torch.no_grad():
        expected = without(model, batch)
        with fastbert.token_bound(70):
            torch.testing.assert_close(model(**batch)[0], expected, atol=1e-5, rtol=1e-5)
    assert graphs.replayed == 1


def test_rows_to_spare_are_seen_by_no_token() -> None:
    model, graphs = graphed()
    batch = inputs("right", batch=3, seqlen=20)
    embeds = torch.randn(3, 20, 48)
    with torch.no_grad():
        expected = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])[0]
        model(inputs_embeds=torch.full((3, 20, 48), torch.nan))  # leaves NaN in the buffers of 64 rows
        full = {"attention_mask": torch.ones(3, 20, dtype=torch.long)}
        full["attention_mask"][2, 10:] = 0
        y = model(inputs_embeds=embeds, **full)[0]
        assert Bucket.of(60, 3, 20).tokens == Bucket.of(50, 3, 20).tokens
        assert torch.isfinite(y).all()
        assert graphs.captured == 2
        torch.testing.assert_close(model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])[0], expected)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_ids_of_every_kind(family: str) -> None:
    """One graph serves calls with and without token types and positions; none sees what an earlier one left."""
    model, graphs = graphed(family)
    types = int(model.config.type_vocab_size)
    ragged, full, even = inputs("right", 4, 20), inputs("none", 4, 20), inputs("none", 5, 16)
    positions = torch.arange(20).flip(0)[None] + 2

    def typed(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return batch | {"token_type_ids": torch.randint(0, types, batch["input_ids"].shape)}

    calls = [full, typed(full), full | {"position_ids": positions}, full, even, typed(ragged), ragged, full]
    calls += [ragged | {"position_ids": positions}, {"input_ids": full["input_ids"].int()}, typed(even)]
    with torch.no_grad():
        for batch in calls:
            torch.testing.assert_close(model(**batch)[0], without(model, batch), atol=1e-5, rtol=1e-5)
    assert (graphs.reason, graphs.replayed) == (None, len(calls))
    assert graphs.captured <= 3
    assert model.embeddings._fastbert.reason is None


def test_ids_that_no_graph_may_serve() -> None:
    model, graphs = graphed()
    with torch.no_grad():
        with pytest.raises(IndexError, match="tokens"):
            model(torch.ones(1, model.config.max_position_embeddings + 1, dtype=torch.long))
        with pytest.raises(ValueError, match="position_ids"):
            model(torch.ones(2, 8, dtype=torch.long), position_ids=torch.arange(7))
        assert graphs.captured == 0
        model.embeddings.dropout.train()
        model(torch.ones(2, 8, dtype=torch.long))  # then the layers alone
    assert graphs.replayed == 1


def test_heads_use_the_graphs_of_their_encoder() -> None:
    model, graphs = graphed(head="ForMaskedLM")
    batch = inputs("left")
    with torch.no_grad():
        outputs = model(**batch, labels=batch["input_ids"].masked_fill(~real(batch), -100))
        torch.testing.assert_close(outputs.logits, without(model, batch), atol=1e-5, rtol=1e-5)
    assert graphs.replayed == 1


@pytest.mark.parametrize("mask", ["right", "left", "holes"])
def test_masks_that_are_a_bias(mask: str) -> None:
    """Question answering keeps its padding; so does a mask [B, 1, 1, S] that is added to the scores."""
    model, graphs = graphed(head="ForQuestionAnswering")
    with torch.no_grad():
        for batch in (inputs(mask), inputs(mask, 4, 25), inputs(mask, 3, 21), inputs(mask)):
            plain = fastbert.optimize(fastbert.restore(copy.deepcopy(model)))
            torch.testing.assert_close(model(**batch).start_logits, plain(**batch).start_logits, atol=2e-5, rtol=1e-5)
            batch["attention_mask"] = torch.randn(len(batch["input_ids"]), 1, 1, batch["input_ids"].shape[1])
            torch.testing.assert_close(model(**batch).start_logits, plain(**batch).start_logits, atol=2e-5, rtol=1e-5)
    assert (graphs.reason, graphs.replayed, graphs.captured) == (None, 8, 3)


def test_several_threads() -> None:
    model, graphs = graphed()
    batches = [inputs(mask, batch=2 + i) for i, mask in enumerate(MASKS)]

    def run(batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return model(**batch)[0]

    expected = [run(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for ours, theirs in zip(pool.map(run, batches * 3), expected * 3, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert graphs.replayed == 24


# --- what is looked for at each call ---------------------------------------------------------------------


def _replace_parameter(model: Any) -> None:
    model.encoder.layer[1].output.dense.weight = nn.Parameter(model.encoder.layer[1].output.dense.weight * 2)


def _replace_data(model: Any) -> None:
    weight = model.encoder.layer[0].attention.self.key.weight
    weight.data = weight.data * 2


def _transpose_data(model: Any) -> None:
    weight = model.encoder.layer[0].attention.self.key.weight
    weight.data = weight.data.t()


def _change_eps(model: Any) -> None:
    model.encoder.layer[0].output.LayerNorm.eps = 0.5


def _change_dtype(model: Any) -> None:
    model.bfloat16()


def _share_a_layer(model: Any) -> None:
    model.encoder.layer[1] = model.encoder.layer[0]


def _fewer_layers(model: Any) -> None:
    del model.encoder.layer[1]


def _replace_table(model: Any) -> None:
    table = model.embeddings.word_embeddings
    table.weight = nn.Parameter(table.weight * 2)


def _replace_positions(model: Any) -> None:
    weight = model.embeddings.position_embeddings.weight
    weight.data = weight.data.flip(0)


def _change_eps_of_embeddings(model: Any) -> None:
    model.embeddings.LayerNorm.eps = 0.5


MOVED = [_replace_parameter, _replace_data, _transpose_data, _change_eps, _change_dtype, _share_a_layer, _fewer_layers]
MOVED += [_replace_table, _replace_positions, _change_eps_of_embeddings]
GONE = [_replace_data, _change_dtype, _replace_table, _replace_positions, _change_eps_of_embeddings]


@pytest.mark.parametrize("change", MOVED)
def test_recorded_anew(change: Callable[[Any], None]) -> None:
    model, graphs = graphed()
    batch = inputs("right")
    with torch.no_grad():
        before = model(**batch)[0]
        change(model)
        y = model(**batch)[0]
        assert not torch.equal(y, before)
        torch.testing.assert_close(y, without(model, batch), atol=1e-5, rtol=1e-5)
        assert (graphs.captured, told(model)["held"]) == (2, 1)
        model(**batch)
        assert graphs.captured == 2
    # A graph is launched before all is compared, but not one whose weights or tables may be gone.
    assert graphs.recorder.launched == ([0] if change in GONE else [0, 0]) + [1, 1]


def test_weights_are_read_in_place() -> None:
    model, graphs = graphed()
    batch = inputs("right")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step() -> None:
        model.train()
        model(**batch)[0].square().sum().backward()
        optimizer.step()
        model.eval()

    layer = model.encoder.layer[0]
    for change in (step, lambda: layer.output.dense.weight.data.mul_(2), lambda: layer.output.dense.bias.add_(1)):
        with torch.no_grad():
            before = model(**batch)[0]
        with torch.set_grad_enabled(change is step):
            change()
        with torch.no_grad():
            assert not torch.equal(model(**batch)[0], before)
            torch.testing.assert_close(model(**batch)[0], without(model, batch), atol=1e-5, rtol=1e-5)
    assert graphs.captured == 1


def test_another_backend_is_recorded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graphs = graphed()
    batch = inputs("right")
    with torch.no_grad():
        expected = model(**batch)[0]
        monkeypatch.setenv("FASTBERT_BACKEND", "reference")
        torch.testing.assert_close(model(**batch)[0], expected, atol=1e-5, rtol=1e-5)
    assert graphs.captured == 2


def test_larger_tables_are_not_read_by_an_older_graph() -> None:
    model, graphs = graphed()
    with torch.no_grad():
        model(**inputs("right"))
        model.resize_token_embeddings(model.config.vocab_size + 8, mean_resizing=False)
        batch = inputs("right") | {
            "input_ids": torch.full_like(inputs("right")["input_ids"], model.config.vocab_size - 1)
        }
        torch.testing.assert_close(model(**batch)[0], without(model, batch), atol=1e-5, rtol=1e-5)
    assert graphs.recorder.launched == [0, 1]


def test_the_least_recently_used_goes() -> None:
    model, graphs = graphed(limit=2)
    one, two, three = (inputs("none", batch=1, seqlen=n) for n in (16, 32, 64))
    with torch.no_grad():
        for batch in (one, two, one, three):  # two has to go
            model(**batch)
        assert (graphs.captured, graphs.dropped, told(model)["held"]) == (3, 1, 2)
        model(**one)
        assert graphs.captured == 3
        model(**two)
        assert (graphs.captured, graphs.dropped, told(model)["held"]) == (4, 2, 2)
        torch.testing.assert_close(model(**three)[0], without(model, three), atol=1e-5, rtol=1e-5)


# --- reasons ------------------------------------------------------------------------------------


def _hook(model: Any) -> None:
    model.encoder.layer[0].register_forward_hook(lambda module, args, output: output * 2)


def _inner_hook(model: Any) -> None:
    model.encoder.layer[0].output.dense.register_forward_hook(lambda module, args, output: output * 2)


def _forward(model: Any) -> None:
    layer = model.encoder.layer[1]
    layer.forward = lambda *args, stock=layer.forward, **kwargs: stock(*args, **kwargs) * 2


def _chunks(model: Any) -> None:
    model.encoder.layer[0].chunk_size_feed_forward = 3


def _eager(model: Any) -> None:
    model.set_attn_implementation("eager")


def _foreign_layer(model: Any) -> None:
    class Layer(type(model.encoder.layer[0])):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs) * 2

    model.encoder.layer[1].__class__ = Layer


def _no_layer_is_fast(model: Any) -> None:
    for layer in model.encoder.layer:
        layer.chunk_size_feed_forward = 3


REFUSED = {
    _hook: "a hook .* sits on a layer",
    _inner_hook: "a hook .* sits on output.dense",
    _forward: "the forward of a layer is replaced",
    _chunks: "chunk_size_feed_forward is set",
    _eager: "the attention implementation was set to 'eager'",
    _foreign_layer: "a layer is a .*Layer of .*test_graphs",
    _no_layer_is_fast: "no layer takes the fast path|chunk_size_feed_forward is set",
}


@pytest.mark.parametrize("change", REFUSED, ids=list(REFUSED.values()))
@pytest.mark.parametrize("before", [False, True], ids=["first", "after a replay"])
def test_a_changed_model_runs_without(change: Callable[[Any], Any], before: bool) -> None:
    model, graphs = graphed()
    batch = inputs("none")
    with torch.no_grad():
        plain = fastbert.optimize(fastbert.restore(copy.deepcopy(model)))
        change(plain)
        expected = plain(**batch)[0]
        if before:
            model(**batch)
        change(model)
        for _ in range(3):
            torch.testing.assert_close(model(**batch)[0], expected, atol=1e-5, rtol=1e-5)
    assert graphs.replayed == before
    assert len(graphs.recorder.launched) <= 2 * before  # once for nothing at most
    with pytest.raises(AssertionError, match=REFUSED[change]):
        raise AssertionError(told(model)["reason"])


def test_a_call_that_needs_more_runs_without() -> None:
    model, graphs = graphed(hidden_dropout_prob=0.1)
    batch = inputs("right")

    def reason() -> str:
        return str(told(model)["reason"])

    assert model(**batch)[0].requires_grad
    assert "gradients are recorded" in reason()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            model(**batch)
        assert "autocast is on" in reason()
        assert len(model(**batch, output_hidden_states=True).hidden_states) == 3
        assert "hidden states were asked for" in reason()
        assert len(model(**batch, output_attentions=True).attentions) == 2
        assert "attentions were asked for" in reason()
        model(**inputs("none"), attention_mask=torch.randn(4, 1, 21, 21))
        assert "the mask has 4 dimensions" in reason()
        model.train()
        torch.manual_seed(1)
        one = model(**batch)[0]
        assert "dropout is on" in reason()
        assert not torch.equal(model(**batch)[0], one)
        model.eval()
        assert graphs.replayed == 0
        model(**batch)
    assert graphs.replayed == 1
    assert told(model) == {
        "name": "encoder",
        "reason": None,
        "limit": 8,
        "captured": 1,
        "replayed": 1,
        "dropped": 0,
        "held": 1,
    }
    text = str(fastbert.report(model))
    assert "encoder: 1 calls by CUDA graphs, 1 captured, 1 of 8 held, 0 dropped to make room" in text
    assert fastbert.report(model).as_dict()["cuda_graphs"] == [told(model)]


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("record", RuntimeError("operation not permitted when stream is capturing")),
        ("warm_up", torch.OutOfMemoryError("no room")),
    ],
)
def test_a_recording_that_fails(method: str, error: Exception) -> None:
    def fail(self: Rerun, function: Callable[[], Tensor], **options: bool) -> Any:
        raise error

    model = fastbert.optimize(build())
    graphs = model.encoder._fastbert.graphs = EncoderGraphs(4, type("Failing", (Rerun,), {method: fail})())
    batch = inputs("right")
    with torch.no_grad():
        with pytest.warns(UserWarning, match=f"cuda_graphs: the recording failed: {error}"):
            y = model(**batch)[0]
        torch.testing.assert_close(y, without(model, batch))
        model(**batch)  # does not try again
    assert "the recording failed" in str(graphs.reason)
    assert graphs.captured == 0


def test_a_bucket_without_memory_leaves_the_others_their_graphs() -> None:
    class Small(Rerun):
        def record(self, function: Callable[[], Tensor], *, first: bool) -> Any:
            if len(function()) > 64:
                raise torch.OutOfMemoryError("no room")
            return super().record(function, first=first)

    model = fastbert.optimize(build())
    graphs = model.encoder._fastbert.graphs = EncoderGraphs(4, Small())
    small, large = inputs("none", 2, 16), inputs("none", 8, 16)
    with torch.no_grad():
        model(**small)
        with pytest.warns(UserWarning, match="cuda_graphs: the recording failed: no room"):
            y = model(**large)[0]
        torch.testing.assert_close(y, without(model, large))
        model(**large)  # does not try again
        assert graphs.reason == "the recording failed: no room"
        model(**small)
    assert graphs.reason is None
    assert (graphs.captured, graphs.replayed) == (1, 2)


def test_what_a_recording_cannot_run_raises_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = graphed()
    monkeypatch.setenv("FASTBERT_BACKEND", "cuda")
    with torch.no_grad(), pytest.raises(RuntimeError, match="FASTBERT_BACKEND=cuda forces"):
        model(**inputs("right"))


# --- how they are asked for ------------------------------------------------------------------------------------


def test_a_model_on_the_cpu_is_an_error() -> None:
    model = build()
    with pytest.raises(ValueError, match=r"cuda_graphs=True needs .* on a CUDA device, but its weights are on cpu"):
        fastbert.optimize(model, cuda_graphs=True)
    assert not all(isinstance(module, fastbert.swapped.Fast) for module in model.encoder.layer)  # nothing was written
    with pytest.raises(ValueError, match="cuda_graphs=4 needs .* there is no encoder in it"):
        fastbert.optimize(nn.Linear(2, 2), cuda_graphs=4)


@pytest.mark.parametrize("value", [0, -1, 2.5, "yes", None])
def test_bad_arguments(value: Any) -> None:
    with pytest.raises(ValueError, match="cuda_graphs must be True, False, or the number of graphs to hold"):
        fastbert.optimize(build(), cuda_graphs=value)


def test_copies_ask_for_graphs_too() -> None:
    model, graphs = graphed()
    batch = inputs("right")
    with torch.no_grad():
        expected = model(**batch)[0]
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            theirs = other.encoder._fastbert.graphs
            assert theirs is not graphs
            assert (theirs.limit, theirs.captured) == (8, 0)
            torch.testing.assert_close(other(**batch)[0], expected, atol=1e-5, rtol=1e-5)
            assert told(other)["reason"] == "the model is on cpu, graphs need cuda"


def test_optimize_again_switches_them_off() -> None:
    model, _ = graphed()
    assert fastbert.report(model).cuda_graphs
    assert fastbert.report(fastbert.optimize(model)).cuda_graphs == []
    assert "cuda_graphs" not in fastbert.report(model).as_dict()
