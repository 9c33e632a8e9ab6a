"""CUDA graphs and work of a bounded size, on the device."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import device
import pytest
import torch
from comparison import MASKS, all_fast, real
from device import BASE, DEVICE, DROPOUT, HEADS, build, gradients, inputs, labelled, ragged

import fastbert

pytestmark = device.needed
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Of the root mean square of values about 1, and ten times that of each: products of other numbers of rows may be
summed in another order, and then differ by a few roundings."""


def graphed(held: bool | int = True, **changes: Any) -> tuple[Any, Any]:
    """The same model with and without graphs."""
    plain = fastbert.optimize(build(**HEADS[64] | changes))
    return fastbert.optimize(copy.deepcopy(plain), cuda_graphs=held), plain


def told(model: Any) -> dict[str, Any]:
    (entry,) = fastbert.report(model).cuda_graphs
    return entry


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    error = (ours - theirs).float()
    assert torch.isfinite(ours).all()
    assert error.square().mean().sqrt() <= TOLERANCE[ours.dtype]
    assert error.abs().max() <= 10 * TOLERANCE[ours.dtype]


@pytest.fixture
def no_sync() -> Iterator[Any]:
    """To call before work that must not wait for the device."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


# --- inference ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", device.DTYPES, ids=device.dtype_name)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_same_outputs(mode: Any, dtype: torch.dtype) -> None:
    model, plain = (m.to(dtype) for m in graphed())
    shapes = [(4, 21), (4, 20), (2, 33), (3, 70), (4, 21)]
    batches = [inputs(mask, *shape) for mask in MASKS for shape in shapes]
    with mode():
        outputs = [model(**batch)[0] for batch in batches]  # kept: a later replay must not change an earlier result
        for batch, y in zip(batches, outputs, strict=True):
            close(y, plain(**batch)[0])
            assert (y[:, 1:][~real(batch)[:, 1:]] == 0).all()
    entry = told(model)
    assert entry["reason"] is None
    assert entry["replayed"] == len(batches) > entry["captured"]
    assert all_fast(model)


def test_base_sizes() -> None:
    model, plain = (m.to(torch.bfloat16) for m in graphed(**BASE))
    with torch.inference_mode():
        for batch in (inputs("none", 1, 128), ragged(8, 128), ragged(16, 512), inputs("none", 1, 128)):
            close(model(**batch)[0], plain(**batch)[0])
    assert told(model)["captured"] == 3


def test_weights_are_read_in_place() -> None:
    model, plain = graphed()
    batch = inputs("right")
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (model, plain)]

    def step() -> None:
        for m, optimizer in zip((model, plain), optimizers, strict=True):
            m(**batch)[0].square().mean().backward()
            optimizer.step()

    def scale() -> None:
        for m in (model, plain):
            m.encoder.layer[0].output.dense.weight.data.mul_(2)

    for change in (step, scale, step):
        with torch.no_grad():
            before = model(**batch)[0]
        change()
        with torch.no_grad():
            y = model(**batch)[0]
            assert not torch.equal(y, before)
            close(y, plain(**batch)[0])
    assert told(model)["captured"] == 1


def test_moved_weights_are_recorded_anew() -> None:
    model, plain = graphed()
    batch = inputs("right")
    with torch.no_grad():
        close(model(**batch)[0], plain(**batch)[0])
        for m in (model, plain):
            m.encoder.layer[1].output.dense.weight = torch.nn.Parameter(m.encoder.layer[1].output.dense.weight * 2)
        torch.cuda.empty_cache()
        close(model(**batch)[0], plain(**batch)[0])
        for m in (model, plain):
            m.to(torch.bfloat16)
        close(model(**batch)[0], plain(**batch)[0])
        assert (told(model)["captured"], told(model)["held"]) == (3, 1)
        model.cpu()
        model(**{name: value.cpu() for name, value in batch.items()})
    assert told(model)["reason"] == "the model is on cpu, graphs need cuda"


def test_the_least_recently_used_goes() -> None:
    model, plain = graphed(held=2)
    batches = [inputs("none", 1, n) for n in (16, 32, 64)]
    with torch.no_grad():
        for i in (0, 1, 0, 2, 1, 0, 2):
            close(model(**batches[i])[0], plain(**batches[i])[0])
    entry = told(model)
    assert entry["held"] == entry["limit"] == 2
    assert entry["dropped"] == entry["captured"] - 2 > 0


def test_replays_allocate_nothing_that_stays() -> None:
    model, _ = graphed()
    batch = inputs("right")
    with torch.no_grad():
        for _ in range(3):
            model(**batch)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        for _ in range(20):
            model(**batch)
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == before


def test_on_several_streams() -> None:
    model, plain = graphed()
    batches = [inputs(mask, 4, 40) for mask in ("right", "left", "holes", "full")] * 8
    streams = [torch.cuda.Stream() for _ in range(3)]
    with torch.no_grad():
        expected = [plain(**batch)[0] for batch in batches]
        model(**batches[0])
        torch.cuda.synchronize()
        outputs = []
        for i, batch in enumerate(batches):
            with torch.cuda.stream(streams[i % 3]):
                outputs.append(model(**batch)[0])
        torch.cuda.synchronize()
    for y, other in zip(outputs, expected, strict=True):
        close(y, other)


def test_a_full_batch_does_not_wait(no_sync: Any) -> None:
    model, _ = graphed()
    batch = inputs("none", 1, 64)
    with torch.no_grad():
        for _ in range(2):
            model(**batch)
        torch.cuda.synchronize()
        no_sync()
        model(**batch)


@pytest.mark.parametrize("bound", [None, 84])
def test_captured_by_the_user(bound: int | None) -> None:
    """A forward in somebody else's graph: without a bound the padded layout, and never a graph in a graph."""
    model, plain = graphed()
    batch = inputs("right")
    within = contextlib.nullcontext() if bound is None else fastbert.token_bound(bound)
    with torch.no_grad(), within:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                model(**batch)
                if bound is None:  # the kernels of the padded layout
                    model(batch["input_ids"], attention_mask=torch.zeros(4, 1, 1, 21, device=DEVICE))
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(**batch)[0]
        assert told(model)["reason"] is not None
        for mask in ("left", "holes"):
            for name, value in inputs(mask).items():
                batch[name].copy_(value)
            graph.replay()
            close(y, plain(**batch)[0])


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["Model", "ForTokenClassification", "ForMaskedLM"])
def test_a_bounded_step_does_not_wait(head: str, no_sync: Any) -> None:
    model = fastbert.optimize(build(head, train=True, **HEADS[64], **DROPOUT))
    batch = inputs("right")
    if head == "ForMaskedLM":
        batch = labelled(batch)

    def step() -> None:
        with fastbert.token_bound(84):
            outputs = model(**batch)
        (outputs.loss if head == "ForMaskedLM" else outputs[0].square().sum()).backward()

    for _ in range(2):
        step()
    torch.cuda.synchronize()
    no_sync()
    step()


# Without a bound, a masked first place is kept, so that dropout finds the tokens behind it elsewhere.
@pytest.mark.parametrize("mask", [mask for mask in MASKS if mask != "left"])
def test_a_bound_changes_nothing(mask: str) -> None:
    model = fastbert.optimize(build("ForMaskedLM", train=True, **HEADS[64], **DROPOUT))
    batch = labelled(inputs(mask))
    torch.manual_seed(5)
    expected = gradients(model(**batch).loss, model)
    for bound in (84, 100):
        torch.manual_seed(5)
        with fastbert.token_bound(bound):
            device.assert_close(gradients(model(**batch).loss, model), expected)


@pytest.mark.parametrize("head", ["ForTokenClassification", "ForMaskedLM"])
def test_a_whole_training_step(head: str) -> None:
    """As docs/cuda_graphs.md shows it."""
    model = fastbert.optimize(build(head, train=True, **HEADS[64]))
    other = copy.deepcopy(model)
    batches = [labelled(inputs(mask)) for mask in ("right", "left", "holes")]
    if head == "ForTokenClassification":
        for batch in batches:
            batch["labels"] = torch.where(batch["labels"] >= 0, batch["labels"] % 2, -100)
    static = {name: value.clone() for name, value in batches[0].items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, capturable=True)
    optimizer_other = torch.optim.AdamW(other.parameters(), lr=1e-4)

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=False)
        with fastbert.token_bound(84):
            loss = model(**static).loss
        loss.backward()
        optimizer.step()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    losses, expected = [], []
    for batch in batches:
        for name, value in batch.items():
            static[name].copy_(value)
        graph.replay()
        losses.append(loss.detach().clone())
    for batch in [batches[0]] * 3 + batches:
        optimizer_other.zero_grad()
        one = other(**batch).loss
        one.backward()
        optimizer_other.step()
        expected.append(one.detach())
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected[3:]), atol=1e-3, rtol=1e-3)


def test_replays_draw_new_dropout() -> None:
    model = fastbert.optimize(build(train=True, **HEADS[64], **DROPOUT))
    batch = inputs("right")
    with torch.no_grad(), fastbert.token_bound(84):
        model(**batch)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(**batch)[0]
        graph.replay()
        one = y.clone()
        graph.replay()
        assert not torch.equal(one, y)
        assert torch.isfinite(y).all()
        assert DEVICE.type == y.device.type
