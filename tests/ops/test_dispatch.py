from __future__ import annotations

import os
import subprocess
import sys

import accuracy
import pytest
import torch

from fastbert import dispatch, ops


@pytest.mark.parametrize("op", dispatch.OPS)
def test_every_op_says_why_each_backend_does_not_run(op: str) -> None:
    description = dispatch.describe("cpu", torch.float32)[op]
    names = {implementation.name for implementation in dispatch._implementations[op].values()}
    assert {description["backend"], description.get("otherwise"), *description["rejected"]} - {None} == names
    assert all(description["rejected"].values())


@pytest.mark.parametrize("op", dispatch.OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_runs_where_the_extension_is_built(op: str, dtype: torch.dtype) -> None:
    """So that the skips of the other tests cannot hide it."""
    if dispatch.extension_error is not None:
        pytest.skip(dispatch.extension_error)
    assert dispatch.describe("cpu", dtype, head_dim=64)[op]["backend"] == "cpu"
    assert dispatch.select(op, device="cpu", dtype=dtype).name == "cpu"


@pytest.mark.usefixtures("no_interpreter")
@pytest.mark.parametrize("op", dispatch.OPS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_run_on_the_reference(op: str, dtype: torch.dtype) -> None:
    description = dispatch.describe("cpu", dtype)[op]
    assert description["backend"] == "reference"
    if dispatch.extension_error is None:
        assert str(dtype) in description["rejected"]["cpu"]


@pytest.mark.parametrize("op", dispatch.OPS)
def test_other_devices_run_on_the_reference(op: str) -> None:
    description = dispatch.describe("meta", torch.float32)[op]
    assert description["backend"] == "reference"
    assert "meta" in description["rejected"]["cpu"]


@pytest.mark.parametrize("backend", ["triton", None])
def test_rows_too_wide_for_triton(backend: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another implementation takes them; Triton, where it is forced, says why it does not."""
    monkeypatch.setattr(dispatch, "WIDEST", 32)
    monkeypatch.setattr(dispatch, "_selected", {})
    device = accuracy.device("triton")
    for width in (32, 33):
        table, row = torch.randn(4, width, device=device), torch.randn(width, device=device)
        ids = torch.zeros(1, 3, dtype=torch.int64, device=device)
        for run in (
            lambda x, row: ops.layernorm(x, row, row, backend=backend),
            lambda x, row, ids=ids: ops.embedding(ids, x, x, x, row, row, backend=backend),
        ):
            if backend is None or width == 32:
                assert run(table, row).isfinite().all()
            else:
                with pytest.raises(RuntimeError, match=r"triton, which cannot run: .* up to 32 columns"):
                    run(table, row)


def test_meta_tensors() -> None:
    with torch.device("meta"):
        x, square, row = torch.randn(7, 16), torch.randn(16, 16), torch.randn(16)
        assert ops.linear(x, [square, square], [row, row]).shape == (7, 32)
        assert ops.ffn(x, square, row, square).shape == (7, 16)
        assert ops.layernorm(x, row, row, residual=x, dropout_p=0.1).shape == (7, 16)
        cu_seqlens = torch.zeros(3, dtype=torch.int32)
        assert ops.attention(torch.randn(7, 3, 2, 8), cu_seqlens, 4, dropout_p=0.1).shape == (7, 16)
        ids = torch.zeros(2, 5, dtype=torch.int64)
        y = ops.embedding(ids, square, square, square, row, row, dropout_p=0.1)
    assert y.shape == (2, 5, 16)
    assert y.is_meta


def test_environment_forces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTBERT_BACKEND", "reference")
    description = dispatch.describe()
    assert all(op["backend"] == "reference" for op in description.values())
    if dispatch.extension_error is None:
        assert description["ffn"]["rejected"]["cpu"] == "FASTBERT_BACKEND=reference forces reference"
    assert dispatch.select("ffn", device="cpu", dtype=torch.float32).name == "reference"
    monkeypatch.setenv("FASTBERT_BACKEND", "attention:reference, ffn:reference")
    assert dispatch.select("attention", device="cpu", dtype=torch.float32).name == "reference"
    monkeypatch.delenv("FASTBERT_BACKEND")
    if dispatch.extension_error is None:
        assert dispatch.select("attention", device="cpu", dtype=torch.float32).name == "cpu"


def test_a_single_op_is_forced_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    automatic = dispatch.describe()
    monkeypatch.setenv("FASTBERT_BACKEND", "ffn:reference")
    description = dispatch.describe()
    assert description["ffn"]["backend"] == "reference"
    assert all(description[op] == automatic[op] for op in dispatch.OPS if op != "ffn")


def test_a_backend_for_all_leaves_out_ops_that_lack_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTBERT_BACKEND", "cuda,linear:reference")
    assert dispatch.select("linear", device="cpu", dtype=torch.float32).name == "reference"
    assert dispatch.select("mlm_loss", device="meta", dtype=torch.float32).name == "reference"


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("gpu", ["'gpu'", "cpu, cuda, triton, vendor, reference"]),
        ("atention:cpu", ["'atention'", "attention, embedding, ffn"]),
        ("attention:fast", ["'fast'", "attention", "cpu, cuda, triton, reference"]),
        ("mlm_loss:cuda", ["'cuda'", "mlm_loss", "cpu, triton, reference"]),
        ("linear:cuda", ["'cuda'", "linear", "cpu, triton, vendor, reference"]),
        ("attention:", ["''"]),
        ("cpu,reference", ["twice"]),
        ("ffn:cpu,ffn:reference", ["ffn", "twice"]),
    ],
)
def test_bad_settings(monkeypatch: pytest.MonkeyPatch, setting: str, words: list[str]) -> None:
    monkeypatch.setenv("FASTBERT_BACKEND", setting)
    for call in (dispatch.describe, lambda: dispatch.select("ffn", device="cpu", dtype=torch.float32)):
        with pytest.raises(ValueError, match="FASTBERT_BACKEND=") as caught:
            call()
        assert all(word in str(caught.value) for word in words), str(caught.value)
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match="FASTBERT_BACKEND="), torch.no_grad():
        ops.linear(x, x)


PRODUCTS = {
    "one weight": (2, [8], torch.bfloat16, "several weights at once"),
    "many rows": (513, [8, 8], torch.bfloat16, "up to 512 rows"),
    "weights of two sizes": (2, [8, 16], torch.bfloat16, "weights of one size"),
    "fp32": (2, [8, 8], torch.float32, "16-bit numbers only"),
    "what it is for": (512, [8, 8], torch.bfloat16, None),
}


@pytest.mark.parametrize("case", PRODUCTS.values(), ids=list(PRODUCTS))
def test_linear_by_triton_says_what_it_is_not_for(case: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forced for this op it raises; a backend for every op leaves the rest of the calls to the other backends."""
    rows, outputs, dtype, words = case
    accuracy.require("linear", "triton", torch.bfloat16)
    x = torch.randn(rows, 8, device=accuracy.device("triton"), dtype=dtype)
    weights = [torch.randn(size, 8, device=x.device, dtype=dtype) for size in outputs]
    ran: list[str] = []
    for item in dispatch._candidates("linear").values():

        def run(*arguments: object, _item: dispatch.Implementation = item) -> object:
            ran.append(_item.name)
            return _item.run(*arguments)

        monkeypatch.setitem(dispatch._implementations["linear"], item.name, item._replace(run=run))
    monkeypatch.setattr(dispatch, "_selected", {})

    def forced(backend: str | None) -> None:
        if words is None:
            ops.linear(x, weights, backend=backend)
        else:
            with pytest.raises(RuntimeError, match=f"forces linear:triton, which cannot run: .*{words}"):
                ops.linear(x, weights, backend=backend)

    forced("triton")
    monkeypatch.setenv("FASTBERT_BACKEND", "linear:triton")
    forced(None)
    assert ran == ([] if words else ["triton", "triton"])
    ran.clear()
    monkeypatch.setenv("FASTBERT_BACKEND", "triton")
    ops.linear(x, weights)
    assert len(ran) == 1
    assert (ran == ["triton"]) == (words is None)


def test_linear_is_described_with_the_part_that_triton_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    accuracy.require("linear", "triton", torch.bfloat16)
    device = accuracy.device("triton")
    for setting in ("triton", "linear:triton"):
        monkeypatch.setenv("FASTBERT_BACKEND", setting)
        described = dispatch.describe(device, torch.float16)["linear"]
        assert described["backend"] == "triton"
        assert described["part"] == "several weights of one size on up to 512 rows, outside torch.compile"
        (line, *_) = dispatch.details_as_text(described)
        if setting == "triton":
            assert described["otherwise"] == ("vendor" if device == "cuda" else "reference")
            assert line.endswith(f"; else {described['otherwise']}")
            assert described["otherwise"] not in described["rejected"]
        else:
            assert described["otherwise"] is None
            assert line.endswith("; else it raises")
            assert described["rejected"]["reference"] == "FASTBERT_BACKEND=linear:triton forces triton"
    described = dispatch.describe(device, torch.float32)["linear"]
    assert described["backend"] is None
    assert "16-bit numbers only" in described["rejected"]["triton"]
    monkeypatch.setenv("FASTBERT_BACKEND", "triton")
    assert dispatch.describe(device, torch.bfloat16)["linear"]["backend"] == "triton"  # before cpu, which has it, too
    assert dispatch.describe(device, torch.float32)["linear"]["backend"] in ("cpu", "vendor", "reference")


def test_a_forced_backend_that_cannot_run_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"backend argument forces linear:cpu, which cannot run: .*"):
        ops.linear(x, x, backend="cpu")
    monkeypatch.setenv("FASTBERT_BACKEND", "linear:cpu")
    with pytest.raises(RuntimeError, match="FASTBERT_BACKEND=linear:cpu forces linear:cpu, which cannot run: "):
        ops.linear(x, x)
    assert ops.linear(x, x, backend="reference").shape == (2, 2)  # the argument comes before the environment
    description = dispatch.describe("cpu", torch.float64)["linear"]
    assert description["backend"] is None
    assert set(description["rejected"]) == {"cpu", "triton", "vendor", "reference"}


def test_unknown_names_as_arguments() -> None:
    with pytest.raises(ValueError, match=r"softmax.*attention, embedding"):
        dispatch.select("softmax", device="cpu", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"quick.*cpu, triton, vendor, reference"):
        ops.linear(torch.randn(2, 8), torch.randn(2, 8), backend="quick")


@pytest.mark.usefixtures("no_interpreter")
def test_cuda_backends_are_named() -> None:
    rejected = dispatch.describe("cpu", torch.float32)["attention"]["rejected"]
    expected = ("needs a tensor on cuda", "no CUDA device")
    assert rejected["cuda"].startswith((*expected, "not built"))
    assert rejected["triton"].startswith(expected)


@pytest.mark.parametrize("op", ["attention", "ffn", "layernorm"])
def test_kernels_that_no_gpu_has_run_are_off(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU for which everything is there, unless forced; and what `report` shows says so."""
    configs = pytest.importorskip("fastbert.kernels.configs", reason="there are no Triton kernels without triton")
    monkeypatch.setattr(dispatch, "_selected", {})
    monkeypatch.setattr(dispatch, "cuda_reason", lambda *_: None)
    monkeypatch.setattr(dispatch, "_nvidia_reason", lambda: None)
    monkeypatch.setattr(dispatch, "preferred", lambda *_: [])  # nothing has been measured
    monkeypatch.setattr(configs, "architecture", lambda device: 90)
    monkeypatch.setattr(configs, "tuned", lambda device: {})
    requires = {"attention": 64, "ffn": True, "layernorm": None}[op]
    given = {"device": "cuda", "dtype": torch.bfloat16, "requires": requires}
    assert dispatch.select(op, **given).name == "triton"
    described = dispatch.describe("cuda", torch.bfloat16, head_dim=64, ops=(op,))[op]
    assert described["backend"] == "triton"
    assert described["rejected"]["cuda"] == dispatch.NEVER_RUN
    assert dispatch.select(op, **given, backend="cuda").name == "cuda"


@pytest.mark.parametrize("op", [op for op in dispatch.OPS if "triton" in accuracy.backends_of(op)])
def test_triton_has_the_schemas_of_the_cpu(op: str) -> None:
    """One fake kernel and one autograd formula serve all backends, which they can only so. That of attention takes in
    what Triton alone has a choice about; that of mlm_loss either way to say which rows are labelled."""

    def schema(name: str) -> str:
        return str(leaf._schema).partition("(")[2] if (leaf := dispatch.leaf(name)) is not None else ""

    if not schema(f"{op}_fwd_triton"):
        pytest.skip(f"{op} has no Triton kernels")
    if dispatch.extension_error is not None:
        pytest.skip(dispatch.extension_error)
    for direction in ("fwd", "bwd"):
        ours = schema(f"{op}_{direction}_triton").replace(", bool deterministic", "")
        assert ours.replace("Tensor count", "int ignore_index") == schema(f"{op}_{direction}_cpu")


@pytest.mark.usefixtures("no_interpreter")
def test_triton_refuses_cpu_tensors_without_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTBERT_BACKEND", "triton")
    x = torch.randn(2, 8)
    with pytest.raises(RuntimeError, match="FASTBERT_BACKEND=triton forces layernorm:triton, which cannot run: "):
        ops.layernorm(x, x[0], x[0])


def test_without_the_extension_everything_runs_on_the_reference() -> None:
    program = (
        "import sys; sys.modules['fastbert._C'] = None\n"
        "import torch; from fastbert import dispatch, ops\n"
        "for op, d in dispatch.describe().items():\n"
        "    assert d['backend'] == 'reference', (op, d)\n"
        "    assert d['rejected']['cpu'], d\n"
        "x = torch.randn(3, 8, requires_grad=True)\n"
        "ops.layernorm(ops.linear(x, x), x[:, 0], x[:, 0], dropout_p=0.5).sum().backward()\n"
        "try: ops.linear(x, x, backend='cpu')\n"
        "except RuntimeError as error: print(error)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    printed = subprocess.check_output([sys.executable, "-c", program], env=environment, text=True)
    assert "cannot run: " in printed


FIRST_CALLS = """
import os
import sys
import torch

if sys.argv[1] == "fastbert":
    import fastbert.dispatch
torch.set_num_threads(1)  # a process that has threads cannot be forked
x = torch.rand(32, 384) + 0.1
wrong = 0
for _ in range(100):
    process = os.fork()
    if not process:
        torch.set_num_threads(2)
        os._exit(int((torch.tanh(x) - torch.tanh(x.double())).abs().max() > 1e-6))
    wrong += os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
print(wrong)
"""


def test_first_calls_of_vector_math_are_accurate() -> None:
    """Each process that is forked makes a first call with two threads: one in a hundred is wrong without fastbert."""
    assert subprocess.check_output([sys.executable, "-c", FIRST_CALLS, "fastbert"], text=True) == "0\n"
