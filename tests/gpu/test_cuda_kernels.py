"""Whole models on the CUDA C++ kernels, which have to be forced: on streams other than the default, and in graphs."""

from __future__ import annotations

import copy

import device
import pytest
import torch
from comparison import all_fast, check_model
from device import DROPOUT, HEADS, build, gradients, inputs, ragged

import fastbert
from fastbert import dispatch

pytestmark = device.needed
SLEEP = 50_000_000  # cycles, some 30 ms: what does not wait for its stream is done before


@pytest.fixture(autouse=True)
def cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    built = [op for op in ("attention", "ffn", "layernorm") if dispatch.missing_leaf(f"{op}_fwd_cuda") is None]
    if not built:
        pytest.skip(f"there are no CUDA C++ kernels: {dispatch.cuda_error}")
    monkeypatch.setenv("FASTBERT_BACKEND", ",".join(f"{op}:cuda" for op in built))


# Short sequences and long ones, which have kernels of their own.
@pytest.mark.parametrize("head_dim", HEADS)
@pytest.mark.parametrize("seqlen", [40, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=device.dtype_name)
def test_model(seqlen: int, head_dim: int, dtype: torch.dtype) -> None:
    check_model(build(**HEADS[head_dim], max_position_embeddings=512), ragged(5, seqlen), dtype)


@pytest.mark.parametrize("seqlen", [40, 300])
def test_work_goes_to_the_current_stream(seqlen: int) -> None:
    """Weights and inputs are there only after a pause on the stream; work elsewhere would find zeros."""
    sizes = HEADS[64] | DROPOUT | {"max_position_embeddings": 512}
    model = fastbert.optimize(build(train=True, **sizes)).to(torch.bfloat16)
    batch = ragged(5, seqlen)
    values = [parameter.detach().clone() for parameter in model.parameters()]

    def results() -> list[torch.Tensor | None]:
        torch.manual_seed(1)
        return gradients(model(**batch)[0].float().square().mean(), model)

    torch.use_deterministic_algorithms(True)
    try:
        expected = results()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(SLEEP)
            with torch.no_grad():
                for parameter, value in zip(model.parameters(), values, strict=True):
                    parameter.copy_(value)
            found = results()
        torch.cuda.synchronize()
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)


@pytest.mark.parametrize("seqlen", [40, 300])
def test_graphs(seqlen: int) -> None:
    plain = fastbert.optimize(build(**HEADS[64], max_position_embeddings=512)).to(torch.bfloat16)
    model = fastbert.optimize(copy.deepcopy(plain), cuda_graphs=True)
    batches = [inputs(mask, 4, seqlen) for mask in ("right", "left", "right")]
    with torch.inference_mode():
        outputs = [model(**batch)[0] for batch in batches]
        for batch, y in zip(batches, outputs, strict=True):
            torch.testing.assert_close(y, plain(**batch)[0], atol=3e-1, rtol=0)
    (entry,) = fastbert.report(model).cuda_graphs
    assert entry["reason"] is None
    assert entry["replayed"] == 3 > entry["captured"]
    assert all_fast(model)
