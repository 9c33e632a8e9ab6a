"""torch.compile with fullgraph and torch.export keep the fused ops and give the same numbers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import build, inputs, real
from transformers.models.bert import modeling_bert

import fastbert
from fastbert import ops


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("mask", ["none", "holes"])
def test_compile_forward_and_backward(mask: str) -> None:
    model = fastbert.optimize(build(head="ForSequenceClassification", train=True, num_hidden_layers=1))
    batch = inputs(mask)
    labels = torch.arange(4) % 2
    model(**batch, labels=labels).loss.backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    logits = model(**batch).logits
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = compiled(**batch, labels=labels)
    torch.testing.assert_close(outputs.logits, logits, atol=1e-5, rtol=1e-5)
    outputs.loss.backward()
    for gradient, p in zip(expected, (p for p in model.parameters() if p.grad is not None), strict=True):
        torch.testing.assert_close(p.grad, gradient, atol=1e-5, rtol=1e-4)


def test_compile_with_inductor_and_another_shape() -> None:
    model = fastbert.optimize(build(num_hidden_layers=1))
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for batch in (inputs("right"), inputs("right", batch=3, seqlen=16)):
            torch.testing.assert_close(compiled(**batch)[0], model(**batch)[0], atol=1e-5, rtol=1e-5)


def test_compile_masked_language_model() -> None:
    model = fastbert.optimize(build(head="ForMaskedLM", train=True, num_hidden_layers=1))
    batch = inputs("right")
    labels = batch["input_ids"].masked_fill(~real(batch), -100)
    expected = model(**batch, labels=labels)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(**batch, labels=labels)
    torch.testing.assert_close(compiled.loss, expected.loss, atol=1e-5, rtol=1e-5)
    keep = real(batch)
    torch.testing.assert_close(compiled.logits[keep], expected.logits[keep], atol=1e-5, rtol=1e-5)


def test_compile_with_dropout() -> None:
    changes: dict[str, Any] = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    model = fastbert.optimize(build(train=True, num_hidden_layers=1, **changes))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    batch = inputs("right")
    torch.manual_seed(5)
    one = compiled(**batch)[0]
    two = compiled(**batch)[0]
    torch.manual_seed(5)
    assert torch.equal(compiled(**batch)[0], one)
    assert not torch.equal(one, two)
    one.square().sum().backward()


def test_compile_hidden_states_and_4d_mask() -> None:
    model = fastbert.optimize(build())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    batch: dict[str, Any] = inputs("right")
    with torch.no_grad():
        expected = model(**batch, output_hidden_states=True).hidden_states  # installs hooks under a lock: not traceable
        for one, other in zip(compiled(**batch, output_hidden_states=True).hidden_states, expected, strict=True):
            torch.testing.assert_close(one[real(batch)], other[real(batch)], atol=1e-5, rtol=1e-5)
        batch["attention_mask"] = torch.randn(4, 1, 21, 21)
        torch.testing.assert_close(compiled(**batch)[0], model(**batch)[0], atol=1e-5, rtol=1e-5)


def test_compile_sees_a_changed_layer() -> None:
    model = fastbert.optimize(build())
    model.encoder.layer[1].chunk_size_feed_forward = 7
    batch = inputs("right")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(**batch)[0][real(batch)], model(**batch)[0][real(batch)], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("grad", [False, True])
def test_export_with_dynamic_batch_and_length(grad: bool) -> None:
    model = fastbert.optimize(build())
    batch, seqlen = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("seqlen", min=2, max=72)
    shapes = {"input_ids": {0: batch, 1: seqlen}, "attention_mask": {0: batch, 1: seqlen}}
    with torch.set_grad_enabled(grad):
        program = torch.export.export(model, (), inputs("right"), dynamic_shapes=shapes)
        module = program.module()
        targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        backend = fastbert.report(model).ops["attention"]["backend"]
        assert backend == "reference" or any("fastbert" in target for target in targets)
        for case in (inputs("holes", batch=3, seqlen=33), inputs("left", batch=1, seqlen=5)):
            torch.testing.assert_close(module(**case)[0], model(**case)[0], atol=1e-5, rtol=1e-5)


class Products(torch.nn.Module):
    """Products without a bias, one and two at once."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList([torch.randn(8, 8), torch.randn(24, 8)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.linear(ops.linear(x, self.weights[0]), list(self.weights))


def compiled_ahead(program: torch.export.ExportedProgram, folder: Path) -> Any:
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
    return torch._inductor.aoti_load_package(package)


def exported_products() -> tuple[torch.nn.Module, torch.export.ExportedProgram]:
    model, rows = Products(), torch.export.Dim("rows", min=1, max=64)
    return model, torch.export.export(model, (torch.randn(5, 8),), dynamic_shapes=({0: rows},))


def test_exported_products_have_biases() -> None:
    """AOTInductor hands an op's empty list over as None."""
    _, program = exported_products()
    nodes = [node for node in program.graph.nodes if node.target is torch.ops.fastbert.linear_fwd_cpu.default]
    assert nodes
    assert all(node.args[2] for node in nodes)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compile_ahead_of_time_products_without_a_bias(tmp_path: Path) -> None:
    model, program = exported_products()
    run = compiled_ahead(program, tmp_path)
    for x in (torch.randn(5, 8), torch.randn(1, 8)):
        torch.testing.assert_close(run(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strict", [False, True])
def test_compile_ahead_of_time(strict: bool, tmp_path: Path) -> None:
    model = fastbert.optimize(build(num_hidden_layers=1))
    batch, seqlen = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("seqlen", min=2, max=72)
    shapes = {"input_ids": {0: batch, 1: seqlen}, "attention_mask": {0: batch, 1: seqlen}}
    program = torch.export.export(model, (), inputs("right"), dynamic_shapes=shapes, strict=strict)
    run = compiled_ahead(program, tmp_path)
    for case in (inputs("right"), inputs("holes", batch=3, seqlen=33), inputs("left", batch=1, seqlen=5)):
        torch.testing.assert_close(run(**case)[0], model(**case)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForPreTraining"])
def test_compiled_without_logits(head: str) -> None:
    """`skip_logits`: the loss of the labelled positions, and no tensor of all tokens by the vocabulary in the graph."""
    batch = inputs("right")
    labels = batch["input_ids"].masked_fill(torch.rand(batch["input_ids"].shape) > 0.2, -100)
    batch |= {"labels": labels.masked_fill(~real(batch), -100)}
    if head == "ForPreTraining":
        batch["next_sentence_label"] = torch.tensor([0, 1] * len(labels))[: len(labels)]
    model = fastbert.optimize(build(head=head, train=True, num_hidden_layers=1, vocab_size=500))
    expected = model(**batch).loss
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    largest: list[int] = []

    def backend(graph: Any, examples: Any) -> Any:
        values = [node.meta.get("example_value") for node in graph.graph.nodes]
        largest.append(max(value.numel() for value in values if isinstance(value, torch.Tensor)))
        return graph.forward

    logits = labels.numel() * model.config.vocab_size
    for skip in (False, True):
        model.zero_grad()
        torch.compiler.reset()
        outputs = torch.compile(model, fullgraph=True, backend=backend)(**batch, skip_logits=skip)
        outputs.loss.backward()
        torch.testing.assert_close(outputs.loss, expected)
        for name, gradient in gradients.items():
            torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=2e-6, rtol=1e-4, msg=name)
    assert largest[0] >= logits > largest[1]


@pytest.mark.parametrize("patched", [False, True])
def test_compile_with_a_replaced_method(patched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = fastbert.optimize(build(num_hidden_layers=1)), inputs("right")
    if patched:
        stock = modeling_bert.BertOutput.forward
        monkeypatch.setattr(modeling_bert.BertOutput, "forward", lambda self, *args: 2 * stock(self, *args))
    expected = fastbert.restore(copy.deepcopy(model))(**batch)[0]
    ops: set[str] = set()

    def look(graph: Any, example: Any) -> Any:
        ops.update(str(node.target) for node in graph.graph.nodes)
        return graph

    y = torch.compile(model, fullgraph=True, backend=look)(**batch)[0]
    torch.testing.assert_close(y[real(batch)], expected[real(batch)], atol=1e-5, rtol=1e-5)
    assert any("attention_fwd" in op for op in ops) != patched, ops


def test_compile_reads_the_buffers_of_the_embeddings() -> None:
    model, batch = fastbert.optimize(build(num_hidden_layers=1)), inputs("right")
    model.embeddings.token_type_ids.fill_(1)
    expected = fastbert.restore(copy.deepcopy(model))(**batch)[0]
    y = torch.compile(model, fullgraph=True, backend="eager")(**batch)[0]
    torch.testing.assert_close(y[real(batch)], expected[real(batch)], atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_export_to_onnx() -> None:
    pytest.importorskip("onnxscript")
    model = fastbert.optimize(build(head="ForSequenceClassification", num_hidden_layers=1))
    batch = inputs("right")
    program = torch.onnx.export(model, (batch["input_ids"], batch["attention_mask"]), dynamo=True, verbose=False)
    assert program is not None
    assert not any("fastbert" in (node.domain or "") for node in program.model.graph)
