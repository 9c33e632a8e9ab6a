"""What holds for every op: it repeats, it runs in threads, after fork, compiled, exported, under autocast."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import accuracy
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from fastbert import dispatch, ops
from fastbert.ops.attention import attention_ref


class Sample(NamedTuple):
    """An op as a function of its floating point tensors alone, and such tensors."""

    op: str
    run: Callable[..., Tensor]
    tensors: dict[str, Tensor]


def sample(
    op: str, p: float = 0.1, dtype: torch.dtype = torch.float32, backend: str | None = None, like: str | None = None
) -> Sample:
    """An op's arguments, of the size at which `backend` is tested, or `like` if that is given."""
    random, device = accuracy.generator(1), accuracy.device(backend)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    dropout = {"dropout_p": p, "seed": accuracy.seed_tensor(device) if p > 0 else None}
    small = accuracy.interpreted(like or backend)
    starts = [0, 18, 18, 30] if small else [0, 70, 70, 130, 163]
    cu_seqlens = torch.tensor(starts, dtype=torch.int32, device=device)
    longest, rows, hidden = starts[1], starts[-1], 96
    if op == "attention":
        heads = 2 if small else 3
        tensors = {"qkv": normal(rows, 3, heads, 32), "bias": normal(len(starts) - 1, heads, 1, longest)}
        run = functools.partial(ops.attention, cu_seqlens=cu_seqlens, max_seqlen=longest, backend=backend, **dropout)
    elif op == "embedding":
        vocabulary, positions, shape = (24, 10, (3, 7)) if small else (50, 30, (3, 21))
        ids = {
            "input_ids": torch.randint(vocabulary, shape, generator=random).to(device),
            "token_type_ids": torch.randint(2, shape, generator=random).to(device),
        }
        tensors = {"word": normal(vocabulary, hidden), "position": normal(positions, hidden)}
        tensors["token_type"] = normal(2, hidden)
        tensors |= {"weight": normal(hidden), "bias": normal(hidden)}
        run = functools.partial(ops.embedding, **ids, padding_idx=0, backend=backend, **dropout)
    elif op == "ffn":
        tensors = {"x": normal(rows, hidden), "weight1": normal(200, hidden) / 10, "bias1": normal(200)}
        tensors["weight2"] = normal(hidden, 200) / 10
        run = functools.partial(ops.ffn, backend=backend)
    elif op == "layernorm":
        tensors = {"x": normal(rows, hidden), "residual": normal(rows, hidden)}
        tensors |= {name: normal(hidden) for name in ("weight", "bias", "x_bias")}
        run = functools.partial(ops.layernorm, backend=backend, **dropout)
    elif op == "linear":
        tensors = {"x": normal(rows, hidden)}
        for i in range(2):
            tensors |= {f"weight{i}": normal(65, hidden) / 10, f"bias{i}": normal(65)}

        def run(x: Tensor, weight0: Tensor, weight1: Tensor, bias0: Tensor, bias1: Tensor) -> Tensor:
            return ops.linear(x, [weight0, weight1], [bias0, bias1], backend=backend)

    else:
        labels = torch.randint(150, (rows,), generator=random).to(device)
        labels[::3] = -100
        tensors = {"hidden": normal(rows, hidden), "decoder_weight": normal(150, hidden) / 10}
        tensors |= {"decoder_bias": normal(150), "transform_weight": normal(hidden, hidden) / 10}
        tensors |= {name: normal(hidden) for name in ("transform_bias", "norm_weight", "norm_bias")}

        def run(**tensors: Tensor) -> Tensor:
            return ops.mlm_loss(labels=labels, backend=backend, **tensors)[0]

    tensors = accuracy.to_device(backend, tensors)
    return Sample(
        op,
        run,
        {name: value if name == "bias" and op == "attention" else value.to(dtype) for name, value in tensors.items()},
    )


def upstream_for(y: Tensor) -> Tensor:
    return torch.randn(y.shape, generator=accuracy.generator(2)).to(y.device, y.dtype)


def results(of: Sample) -> tuple[Tensor, ...]:
    """Output and gradients."""
    leaves = [value.detach().clone().requires_grad_() for value in of.tensors.values()]
    y = of.run(**dict(zip(of.tensors, leaves, strict=True)))
    return y.detach(), *torch.autograd.grad(y, leaves, upstream_for(y))


@functools.cache
def known(op: str, p: float, dtype: torch.dtype, backend: str) -> tuple[Tensor, ...]:
    """The `results` that several tests hold others against. For some of them the interpreter takes seconds."""
    return results(sample(op, p, dtype, backend))


def same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


DROPPING = ("attention", "embedding", "layernorm")


def on_backends(*names: str) -> pytest.MarkDecorator:
    """Parametrizes `op` and `backend`."""
    pairs = [(op, backend) for op in names for backend in accuracy.backends_of(op)]
    return pytest.mark.parametrize(("op", "backend"), pairs)


def on_every_leaf_with(*dropouts: float) -> pytest.MarkDecorator:
    """Parametrizes `op`, `backend` and `p`, which for ops without dropout has the first value only."""
    found = [
        (op, backend, p)
        for op in dispatch.OPS
        for backend in accuracy.backends_of(op)
        for p in (dropouts if op in DROPPING else dropouts[:1])
        if backend not in ("reference", "vendor")  # which are plain PyTorch
    ]
    return pytest.mark.parametrize(("op", "backend", "p"), found)


every_op = pytest.mark.parametrize("op", dispatch.OPS)
on_every_backend = on_backends(*dispatch.OPS)
with_dropout = on_backends(*DROPPING)
dtypes = pytest.mark.parametrize("dtype", accuracy.DTYPES, ids=accuracy.name_of)


@dtypes
@on_every_backend
def test_repeats_bit_for_bit(backend: str, dtype: torch.dtype, op: str) -> None:
    accuracy.require(op, backend, dtype)
    assert same(results(sample(op, dtype=dtype, backend=backend)), known(op, 0.1, dtype, backend))


@every_op
@dtypes
def test_thread_count_does_not_change_the_forward(dtype: torch.dtype, op: str) -> None:
    accuracy.require(op, "cpu", dtype)
    of = sample(op, dtype=dtype, backend="cpu")
    torch.set_num_threads(1)
    expected = results(of)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        with torch.no_grad():
            assert torch.equal(of.run(**of.tensors), expected[0])
        y, *gradients = results(of)
        assert torch.equal(y, expected[0])
        assert same(results(of), [y, *gradients]), "backward does not repeat"
        for gradient, alone in zip(gradients, expected[1:], strict=True):
            torch.testing.assert_close(gradient, alone)


@on_every_leaf_with(0.1, 0.5)
def test_backends_draw_the_same_mask(p: float, op: str, backend: str) -> None:
    accuracy.require(op, backend, torch.float32)
    references = results(sample(op, p, backend="reference", like=backend))
    for ours, reference in zip(known(op, p, torch.float32, backend), references, strict=True):
        torch.testing.assert_close(ours, reference.to(ours.device), rtol=1e-3, atol=1e-3)


@with_dropout
def test_seed_is_drawn_from_pytorch(backend: str, op: str) -> None:
    accuracy.require(op, backend, torch.float32)
    of = sample(op, 0.3, backend=backend)
    run = functools.partial(of.run, seed=None, **of.tensors)
    torch.manual_seed(3)
    first, second = run(), run()
    torch.manual_seed(3)
    assert torch.equal(run(), first)
    assert not torch.equal(first, second)


@with_dropout
def test_checkpointing_replays_the_mask(backend: str, op: str) -> None:
    accuracy.require(op, backend, torch.float32)
    of = sample(op, 0.3, backend=backend)
    gradients = []
    for again in (False, True):
        leaves = {name: value.clone().requires_grad_() for name, value in of.tensors.items()}
        torch.manual_seed(3)

        def function(*values: Tensor, names: tuple[str, ...] = tuple(leaves)) -> Tensor:
            return of.run(seed=None, **dict(zip(names, values, strict=True)))

        y = checkpoint(function, *leaves.values(), use_reentrant=False) if again else function(*leaves.values())
        gradients.append(torch.autograd.grad(y, list(leaves.values()), upstream_for(y)))
    assert same(*gradients)


@on_every_backend
def test_inference_mode(backend: str, op: str) -> None:
    accuracy.require(op, backend, torch.float32)
    of = sample(op, 0.0, backend=backend)
    with torch.no_grad():
        expected = of.run(**of.tensors)
    with torch.inference_mode():
        assert torch.equal(of.run(**of.tensors), expected)
    parameters = {name: torch.nn.Parameter(value) for name, value in of.tensors.items()}
    with torch.inference_mode():
        assert torch.equal(of.run(**parameters), expected)
    with torch.no_grad():
        y = of.run(**parameters)
    assert torch.equal(y, expected)
    assert not y.requires_grad


@on_every_backend
def test_gradients_of_some_inputs_alone(backend: str, op: str) -> None:
    """What is frozen gets no gradient, and the others get the same as if nothing were."""
    accuracy.require(op, backend, torch.float32)
    of = sample(op, backend=backend)
    _, *gradients = known(op, 0.1, torch.float32, backend)
    names = list(of.tensors)
    some = [names[::2], names[1::2]] + [[name] for name in names if not accuracy.interpreted(backend)]
    for chosen in some:
        leaves = {name: value.clone().requires_grad_(name in chosen) for name, value in of.tensors.items()}
        y = of.run(**leaves)
        y.backward(upstream_for(y))
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
            if name in chosen:
                torch.testing.assert_close(leaf.grad, gradient)
            else:
                assert leaf.grad is None


def strided(value: Tensor, way: str) -> Tensor:
    """The same values with other strides."""
    if way == "transposed":
        return value.transpose(0, -1).contiguous().transpose(0, -1)
    if way == "every second":
        return torch.stack([value, torch.full_like(value, torch.nan)], -1)[..., 0]
    padded = torch.full([size + 1 for size in value.shape], torch.nan, dtype=value.dtype, device=value.device)
    inner = padded[tuple(slice(1, None) for _ in value.shape)]
    return inner.copy_(value)


@dtypes
@on_every_backend
@pytest.mark.parametrize("way", ["transposed", "every second", "inside a larger one"])
def test_other_strides(way: str, backend: str, dtype: torch.dtype, op: str) -> None:
    accuracy.require(op, backend, dtype)
    of = sample(op, dtype=dtype, backend=backend)
    other = {name: strided(value, way) for name, value in of.tensors.items()}
    assert all(torch.equal(value, of.tensors[name]) for name, value in other.items())
    expected, *plain = known(op, 0.1, dtype, backend)
    with torch.no_grad():
        torch.testing.assert_close(of.run(**other), expected)
        if backend == "cpu":
            unforced = sample(op, dtype=dtype)
            torch.testing.assert_close(unforced.run(**other), unforced.run(**of.tensors))
    leaves = {name: value.requires_grad_() for name, value in other.items()}
    upstream = strided(upstream_for(expected), way) if expected.dim() else upstream_for(expected)
    gradients = torch.autograd.grad(of.run(**leaves), list(leaves.values()), upstream)
    for gradient, expected in zip(gradients, plain, strict=True):
        torch.testing.assert_close(gradient, expected)


@every_op
@pytest.mark.usefixtures("no_interpreter")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=accuracy.name_of)
def test_other_dtypes(dtype: torch.dtype, op: str) -> None:
    of = sample(op, dtype=dtype)
    expected = results(sample(op, backend="reference"))
    for ours, single in zip(results(of), expected, strict=True):
        assert ours.dtype == (torch.float32 if single.dim() == 0 and dtype == torch.float16 else ours.dtype)
        torch.testing.assert_close(ours.float(), single, rtol=0.05, atol=0.05 * float(single.abs().max()))


@on_every_backend
def test_nan_stays_nan(backend: str, op: str) -> None:
    """A NaN in an input reaches the outputs that depend on it and no others, and nothing crashes."""
    accuracy.require(op, backend, torch.float32)
    of = sample(op, 0.0, backend=backend)
    for name, value in of.tensors.items():
        broken = of.tensors | {name: value.clone()}
        broken[name].view(-1)[0] = torch.nan
        for grad in (True,) if accuracy.interpreted(backend) else (False, True):
            with torch.set_grad_enabled(grad):
                leaves = {key: tensor.clone().requires_grad_(grad) for key, tensor in broken.items()}
                y = of.run(**leaves)
                if name not in ("word", "position", "token_type", "hidden"):  # there, row 0 need not be looked at
                    assert torch.isnan(y).any(), name
                if grad:
                    y.sum().backward()
    if op != "mlm_loss":
        first = next(iter(of.tensors))
        broken = of.tensors | {first: of.tensors[first].clone()}
        broken[first][0] = torch.nan
        with torch.no_grad():
            y = of.run(**broken)
        assert torch.isfinite(y[-1]).all()


@every_op
def test_concurrent_calls(op: str) -> None:
    """Several Python threads at once, forward and backward; each gets what a lone call gets."""
    accuracy.require(op, "cpu", torch.float32)
    torch.set_num_threads(2)
    of = sample(op, backend="cpu")
    expected = results(of)
    wrong: list[str] = []

    def work() -> None:
        for _ in range(6):
            with torch.no_grad():
                if not torch.equal(of.run(**of.tensors), expected[0]):
                    wrong.append("forward")
            if not same(results(of), expected):
                wrong.append("backward")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_after_fork() -> None:
    """A child made by fork after its parent used the ops, as DataLoader workers are."""
    torch.set_num_threads(2)
    samples = [sample(op) for op in dispatch.OPS]
    expected = [of.run(**of.tensors) for of in samples]
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # ends the child if it hangs
        right = True
        for of, value in zip(samples, expected, strict=True):
            if of.op == "mlm_loss":  # gathers with PyTorch's own kernels, which hang in a child with several threads
                torch.set_num_threads(1)
            right = right and torch.equal(of.run(**of.tensors), value)
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@every_op
def test_second_order_gradients_raise(op: str) -> None:
    accuracy.require(op, "cpu", torch.float32)
    of = sample(op, 0.0, backend="cpu")
    leaves = {name: value.clone().requires_grad_() for name, value in of.tensors.items()}

    def penalty(of: Sample) -> None:
        gradients = torch.autograd.grad(of.run(**leaves).sum(), list(leaves.values()), create_graph=True)
        sum(gradient.square().sum() for gradient in gradients).backward()

    with pytest.raises(RuntimeError, match='no second-order gradients; use backend="reference"'):
        penalty(of)
    penalty(sample(op, 0.0, backend="reference"))


@every_op
def test_forward_mode_differentiation(op: str) -> None:
    """By the reference; a backend that was asked for raises, where autograd would make the tangent 0."""
    accuracy.require(op, "cpu", torch.float32)
    tangents = []
    for backend in (None, "reference", "cpu"):
        of = sample(op, 0.0, backend=backend)
        with forward_ad.dual_level():
            dual = {name: forward_ad.make_dual(value, torch.ones_like(value)) for name, value in of.tensors.items()}
            if backend == "cpu":
                with pytest.raises(RuntimeError, match="no forward-mode differentiation"):
                    of.run(**dual)
            else:
                tangents.append(forward_ad.unpack_dual(of.run(**dual)).tangent)
    torch.testing.assert_close(*tangents)


@on_every_backend
def test_compile(backend: str, op: str) -> None:
    accuracy.require(op, backend, torch.float32)
    torch._dynamo.reset()
    of = sample(op, backend=backend)
    compiled = of._replace(run=torch.compile(of.run, fullgraph=True, backend="aot_eager"))
    for ours, expected in zip(results(compiled), known(op, 0.1, torch.float32, backend), strict=True):
        torch.testing.assert_close(ours, expected)


@every_op
def test_compile_without_gradients(op: str) -> None:
    """The same on every backend: what differs is one node of the graph."""
    accuracy.require(op, "cpu", torch.float32)
    torch._dynamo.reset()
    of = sample(op, backend="cpu")
    compiled = torch.compile(of.run, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**of.tensors), of.run(**of.tensors))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_attention_is_chosen_by_its_head_size(dynamic: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    seen: list[object] = []
    choose = dispatch._select

    def select(op: str, device: str, dtype: torch.dtype, requires: object, backend: str | None) -> object:
        seen.append(requires)
        return choose(op, device, dtype, requires, backend)

    monkeypatch.setattr(dispatch, "_select", select)
    starts = torch.tensor([0, 5], dtype=torch.int32)
    run = torch.compile(ops.attention, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for head_dim in (32, 64, 136):
        qkv = torch.randn(5, 3, 2, head_dim, generator=accuracy.generator(head_dim))
        torch.testing.assert_close(run(qkv, starts, 5, backend="reference"), attention_ref(qkv, starts, 5))
    assert list(dict.fromkeys(seen)) == [32, 64, 136]  # some of them twice, where a trace begins anew


@pytest.mark.parametrize("op", DROPPING)
def test_compiled_once_for_any_number(op: str) -> None:
    """By the reference, in plain PyTorch: what is asked of an argument must not become a guard."""
    torch._dynamo.reset()
    of = sample(op, 0.0, backend="reference")
    name = "scale" if op == "attention" else "eps"
    graphs: list[list[str]] = []

    def look(graph: torch.fx.GraphModule, examples: object) -> Callable[..., object]:
        mode = torch._guards.TracingContext.get().fake_mode
        graphs.append([str(guard.expr) for guard in mode.shape_env.guards])
        return graph.forward

    def run(number: float) -> Tensor:
        return of.run(**of.tensors, **{name: number})

    compiled = torch.compile(run, fullgraph=True, backend=look)
    for number in (0.1, 0.2, 0.3, 0.4):
        torch.testing.assert_close(compiled(number), run(number))
    assert graphs == [[], []]  # one for the first number, one for all


def test_exported_attention_takes_symbolic_numbers() -> None:
    """max_seqlen and scale as exporting has them, where they come from a size."""

    class Attention(torch.nn.Module):
        def forward(self, qkv: Tensor) -> Tensor:
            rows = qkv.size(0)
            starts = torch.tensor([0, 1], dtype=torch.int32) * rows
            return ops.attention(qkv, starts, rows, 1 / rows, backend="reference")

    sizes = ({0: torch.export.Dim("rows", min=2, max=64)},)
    for strict in (False, True):
        exported = torch.export.export(Attention(), (torch.randn(5, 3, 2, 8),), dynamic_shapes=sizes, strict=strict)
        qkv = torch.randn(9, 3, 2, 8)
        torch.testing.assert_close(exported.module()(qkv), Attention()(qkv))


def test_traced_attention_takes_sizes() -> None:
    """torch.jit.trace makes tensors of them."""

    def run(qkv: Tensor) -> Tensor:
        return ops.attention(qkv, torch.tensor([0, 5], dtype=torch.int32), qkv.size(0))

    qkv = torch.randn(5, 3, 2, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.trace is deprecated, and a size is compared
        traced = torch.jit.trace(run, (qkv,), check_trace=False)
    torch.testing.assert_close(traced(qkv), run(qkv))


@pytest.mark.parametrize(
    ("op", "backend", "words"),
    [("attention", "triton", "up to 128, not 136"), ("linear", "triton", "must not shape a compiled graph")],
)
def test_compiled_a_forced_backend_that_cannot_run_raises(op: str, backend: str, words: str) -> None:
    accuracy.require(op, backend, torch.bfloat16)
    torch._dynamo.reset()
    starts = torch.tensor([0, 5], dtype=torch.int32, device=accuracy.device(backend))

    def run(x: Tensor) -> Tensor:
        if op == "linear":
            return ops.linear(x, [x, x], backend=backend)
        return ops.attention(x.view(5, 3, 2, 136), starts, 5, backend=backend)

    x = torch.randn(5, 816, dtype=torch.bfloat16, device=accuracy.device(backend))
    with pytest.raises(RuntimeError, match=rf"argument forces {op}:{backend}, which cannot run: .*{words}"):
        torch.compile(run, fullgraph=True, backend="aot_eager")(x)


def test_export_with_dynamic_shapes() -> None:
    """A whole layer, padded as compiled code has it, exported once and run at other sizes."""
    random = accuracy.generator(3)
    names = ("word", "position", "token_type")
    tensors = {name: torch.randn(40, 32, generator=random) for name in names}
    square, row = torch.randn(32, 32, generator=random) / 6, torch.randn(32, generator=random)

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.square, self.row = torch.nn.Parameter(square), torch.nn.Parameter(row)

        def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
            batch, length = input_ids.shape
            x = ops.embedding(input_ids, *tensors.values(), self.row, self.row, padding_idx=0).reshape(-1, 32)
            qkv = ops.linear(x, [self.square] * 3, [self.row] * 3).view(-1, 3, 4, 8)
            cu_seqlens = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32)
            bias = (1.0 - mask[:, None, None, :]) * -1e9
            x = ops.layernorm(ops.attention(qkv, cu_seqlens, length, bias=bias), self.row, self.row, residual=x)
            return ops.ffn(x, self.square, self.row, self.square).view(batch, length, 32)

    def inputs(batch: int, length: int) -> tuple[Tensor, Tensor]:
        mask = torch.ones(batch, length)
        mask[0, length // 2 :] = 0
        return torch.randint(40, (batch, length), generator=random), mask

    layer = Layer()
    sizes = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("length", min=2, max=40)}
    with torch.no_grad():
        exported = torch.export.export(layer, inputs(3, 7), dynamic_shapes=(sizes, sizes))
        if dispatch.extension_error is None:
            assert sum("fastbert" in str(node.target) for node in exported.graph.nodes) == 5
        for size in ((3, 7), (2, 40), (5, 12)):
            values = inputs(*size)
            torch.testing.assert_close(exported.module()(*values), layer(*values))


@on_every_backend
def test_autocast(backend: str, op: str) -> None:
    """Casts as stock modules do: matrix products in bfloat16, embedding and normalisation in what they are given."""
    accuracy.require(op, backend, torch.bfloat16)
    of = sample(op, 0.0, backend=backend)
    if op in ("embedding", "layernorm"):
        with torch.autocast(accuracy.device(backend), torch.bfloat16):
            assert same(results(of), results(sample(op, 0.0, backend=backend)))
            assert of.run(**of.tensors).dtype == torch.float32
        return
    with torch.autocast(accuracy.device(backend), torch.bfloat16):
        values = results(of)
    expected = results(sample(op, 0.0, torch.bfloat16, backend))
    assert values[0].dtype == (torch.float32 if op == "mlm_loss" else torch.bfloat16)
    if op != "mlm_loss":  # whose LayerNorm has float32 weights under autocast
        assert torch.equal(values[0], expected[0])
    for ours, plain, name in zip(values[1:], expected[1:], of.tensors, strict=True):
        assert ours.dtype == of.tensors[name].dtype, name
        torch.testing.assert_close(ours, plain.float(), rtol=0.05, atol=0.05 * float(plain.abs().max()))


def leaf_calls(op: str, backend: str, p: float, dtype: torch.dtype) -> list[tuple[str, tuple]]:
    """Arguments of the leaf ops of one op, forward and backward, as its Python side calls them."""
    of = sample(op, p, dtype, backend)
    t, device = of.tensors, accuracy.device(backend)
    seed = accuracy.seed_tensor(device) if p > 0 else None
    if op == "attention":
        cu_seqlens, longest = of.run.keywords["cu_seqlens"], of.run.keywords["max_seqlen"]
        choice = () if backend == "cpu" else (False,)
        forward = (t["qkv"], cu_seqlens, longest, 0.2, p, seed, t["bias"], *choice)
    elif op == "embedding":
        ids = of.run.keywords
        batch, length = ids["input_ids"].shape
        positions = torch.arange(length, device=device).repeat(batch)
        tables = [t[name] for name in ("word", "position", "token_type", "weight", "bias")]
        flat = (ids["input_ids"].view(-1), positions, ids["token_type_ids"].view(-1))
        forward = (*flat, *tables, 0, 1e-5, p, seed, True)
    elif op == "ffn":
        forward = (t["x"], t["weight1"], t["bias1"], t["weight2"], True)
    elif op == "layernorm":
        forward = (t["x"], t["x_bias"], t["residual"], t["weight"], t["bias"], 1e-5, p, seed, True)
    elif op == "linear":
        forward = (t["x"], [t["weight0"], t["weight1"]], [t["bias0"], t["bias1"]])
    else:
        labels = torch.arange(len(t["hidden"]), device=device) % 150
        count = torch.tensor([len(labels) - 3], dtype=torch.int32, device=device)
        which = count if backend == "triton" else -100
        forward = (t["hidden"], labels, t["decoder_weight"], t["decoder_bias"], which, 0.1, *[True] * 3)
    y, *saved = (outputs,) if isinstance(outputs := call(f"{op}_fwd_{backend}", forward), Tensor) else outputs
    dy = upstream_for(y)
    calls = [(f"{op}_fwd_{backend}", forward)]
    if op == "attention":
        calls.append((f"attention_bwd_{backend}", (dy, t["qkv"], y, *saved, *forward[1:7], True, *choice)))
    elif op == "embedding":
        rows = [len(table) for table in tables[:3]]
        calls.append((f"embedding_bwd_{backend}", (dy, *saved, *flat, t["weight"], *rows, 0, p, seed)))
    elif op == "ffn":
        calls.append((f"ffn_bwd_{backend}", (dy, t["x"], *saved, t["weight1"], t["weight2"], *[True] * 4)))
    elif op == "layernorm":
        z, mean, rstd = saved
        calls.append((f"layernorm_bwd_{backend}", (dy, z, t["weight"], mean, rstd, p, seed, True)))
    elif op == "linear":
        calls.append((f"linear_bwd_{backend}", (dy, t["x"], forward[1], True, True, True)))
    return calls


def call(name: str, arguments: tuple) -> Tensor | tuple[Tensor, ...]:
    return getattr(torch.ops.fastbert, name).default(*arguments)


@on_every_leaf_with(0.0, 0.1)
def test_opcheck(p: float, op: str, backend: str) -> None:
    dtype = torch.bfloat16 if (op, backend) == ("linear", "triton") else torch.float32  # which it is not for
    accuracy.require(op, backend, dtype)
    if p == 0 and op in DROPPING and accuracy.interpreted(backend):
        pytest.skip("no dropout means no seed, which what every kernel is registered by treats alike: see the CPU's")
    (name, arguments), *backward = leaf_calls(op, backend, p, dtype)

    def trainable(value: object) -> object:
        if isinstance(value, list):
            return [trainable(entry) for entry in value]
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return value.clone().requires_grad_() if is_float else value

    checked = [(name, tuple(map(trainable, arguments))), *backward]
    if not accuracy.interpreted(backend):  # what inference adds is in the graph, and that is the same for every kernel
        checked.append((name, arguments))
    for name, arguments in checked:
        torch.library.opcheck(getattr(torch.ops.fastbert, name).default, arguments)


def other_isas() -> list[str]:
    if dispatch.extension_error is not None:
        return []
    from fastbert import _C

    return [isa for isa in _C.supported_isas() if isa != _C.isa()]


WITH_ISA = """
import sys
import pytest, torch
from fastbert import _C
assert _C.isa() == sys.argv[1], _C.isa()
sys.exit(pytest.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("isa", other_isas() or ["none"])
def test_other_instruction_sets(isa: str) -> None:
    """The tables of all ops, in a process limited to an instruction set that this machine would not choose."""
    if isa == "none":
        pytest.skip(dispatch.extension_error or "this machine and build have a single instruction set")
    tables = [str(Path(__file__).with_name(f"test_{op}.py")) for op in dispatch.OPS]
    chosen = "cpu and (_fwd or _bwd) and not 768 and not 512 and not 511"
    command = [sys.executable, "-c", WITH_ISA, isa, "-q", "-x", "-p", "no:cacheprovider", *tables, "-k", chosen]
    environment = os.environ | {"FASTBERT_CPU_ISA": isa}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
