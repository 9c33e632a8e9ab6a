"""The GPU benchmark, as far as it goes without a GPU: who takes part, what is held against what, what is written."""

import importlib.machinery
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fastbert.bench import cli, gpu, gpu_rows, gpu_worker, report

from fastbert import dispatch

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 120,
    "max_position_embeddings": 32,
}
TINY_OP = {"hidden": 32, "intermediate": 64, "heads": 2, "vocab": 50, "lengths": [7, 1, 5]}
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="measures in earnest where there is a GPU")


@pytest.fixture(scope="module")
def worker() -> gpu_worker.Gpu:
    """The worker on the CPU, with tiny rows; it goes the same way there, with another clock."""
    cpu = {"device": "cpu"}
    return gpu_worker.Gpu(
        "cpu",
        {
            "inference": lambda: gpu_rows.model_row("inference", "t", 3, 8, ragged=True, config=TINY, **cpu),
            "training": lambda: gpu_rows.model_row("training", "t", 3, 8, training=True, config=TINY, **cpu),
            "ffn": lambda: gpu_rows.op_row("ffn", "fwd_bwd", "t", TINY_OP, **cpu),
            "layernorm": lambda: gpu_rows.op_row("layernorm", "fwd", "t", TINY_OP, **cpu),
        },
    )


class TestWorker:
    @pytest.mark.parametrize(
        ("row", "name"),
        [
            ("inference", "fastbert"),
            ("inference", "hf-sdpa-math"),
            ("training", "fastbert"),
            ("training", "hf-sdpa-sparse-head"),
            ("ffn", "pytorch"),
        ],
    )
    def test_right_ones_get_a_time(self, worker, row, name):
        found = worker.measure(row, name)
        assert found["status"] == "ok", found
        assert found["median_s"] > 0
        assert found["error"] <= found["tolerance"] < 0.1

    def test_a_wrong_one_gets_none(self, worker):
        worker.prepare("layernorm")
        worker.truth = {name: tensor * 1.1 for name, tensor in worker.truth.items()}
        found = worker.measure("layernorm", "pytorch")
        assert found["status"] == "wrong"
        assert "of out is above" in found["reason"]
        assert "median_s" not in found

    def test_one_that_is_not_there_says_why(self, worker):
        assert worker.measure("ffn", "cuda")["status"] == "unavailable"

    def test_the_measure_of_others_is_not_compared(self, worker):
        found = worker.measure("ffn", "bare-gemm")
        assert found["status"] == "ok"
        assert "error" not in found

    def test_sdpa_is_held_to_the_backend_of_its_name(self, worker):
        with pytest.raises(RuntimeError, match="backend|kernel"):
            worker.measure("inference", "hf-sdpa-efficient")  # which the CPU does not have


class TestRows:
    def test_ragged_is_half_full(self):
        for count, width in ((32, 512), (128, 128)):
            lengths = gpu_rows.half_full(count, width)
            assert min(lengths) >= 1
            assert max(lengths) == width
            assert sum(lengths) / (count * width) == pytest.approx(0.5, abs=0.01)

    def test_labels_are_real_tokens(self):
        inputs = gpu_rows.model_row("x", "t", 8, 16, ragged=True, training=True, config=TINY).inputs
        labelled = inputs["labels"] != -100
        assert 0 < labelled.sum() < inputs["attention_mask"].sum()
        assert not (labelled & (inputs["attention_mask"] == 0)).any()

    def test_each_row_has_its_turns(self):
        rows = list(gpu_rows.rows())
        plan = gpu_rows.plan(rows)
        assert sorted(name for name, slow in plan if not slow) == sorted(rows)
        slow = [name for name, slow in plan if slow]
        assert sorted(slow) == sorted(name for name in rows if not name.startswith(tuple(dispatch.OPS)))


class TestRun:
    @without_gpu
    def test_failures_are_reported_in_their_place(self, tmp_path):
        content = report.result("gpu", {"device": "none"}, None, None, [])
        run = gpu.Run(content, tmp_path / "x.json", ["pytorch"], 60.0)
        try:
            run.row(record := run.begin("layernorm_fwd[base]"), False)
        finally:
            run.worker.close()
        assert record["contestants"]["pytorch"]["status"] == "failed"
        assert "there is nothing to compare with: " in record["contestants"]["pytorch"]["reason"]
        assert "pytorch: no speed, failed" in report.table(record)

    def test_time_that_is_used_up(self, tmp_path):
        content = report.result("gpu", {"device": "none"}, None, None, [])
        run = gpu.Run(content, tmp_path / "x.json", None, 1e-9)
        run.row(record := run.begin("layernorm_fwd[base]"), False)
        assert all(item["status"] == "not run" for item in record["contestants"].values())
        assert "used up" in record["contestants"]["pytorch"]["reason"]
        assert run.worker.process is None

    def test_rows_that_were_finished_are_complete(self, tmp_path, monkeypatch):
        def ask(worker, do, seconds, row=None, name=None):
            if row == "layernorm_fwd_bwd[base]":
                raise KeyboardInterrupt
            return {"status": "ok", "error": 0.0, "median_s": 0.1} if do == "measure" else {}

        monkeypatch.setattr(gpu.Worker, "ask", ask)
        content = report.result("gpu", {"device": "none"}, None, None, [])
        run = gpu.Run(content, tmp_path / "x.json", ["pytorch"], 60.0)
        with pytest.raises(KeyboardInterrupt):
            run.everything(["layernorm_fwd[base]", "layernorm_fwd_bwd[base]"])
        assert [row["complete"] for row in content["rows"]] == [True, False]
        written = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
        assert written["rows"][0]["complete"]

    def test_rates(self, tmp_path):
        content = report.result("gpu", {"device": "NVIDIA H200"}, None, None, [])
        run = gpu.Run(content, tmp_path / "x.json", ["fastbert"], 1.0)
        run.ceilings = {"copy": 4000.0, "matmul": 800e3}
        record = run.begin("inference[base-512]")
        item = record["contestants"]["fastbert"]
        item.update(status="ok", error=0.001, median_s=0.01)
        run.rate(record, item)
        assert item["tokens_per_s"] == 32 * 512 / 0.01
        assert item["rate"] == record["work"] / 0.01 / 1e9
        assert item["share_of_peak"] == item["rate"] / 800e3
        assert item["mfu"] == item["rate"] / 989.4e3
        assert "tokens/s" in report.table(record)


@without_gpu
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpu"], "this benchmark needs an NVIDIA GPU"),
        (["gpu", "--row", "nope"], "--row has 'nope'; it may have, or begin as: inference[base-512]"),
        (["gpu", "--contestants", "nobody"], "--contestants has 'nobody'; it may have: "),
        (["gpu", "--budget", "0"], "--budget is 0.0; it must be more than 0 seconds"),
        (["tune"], "there is nothing to tune for"),
        (["tune", "--op", "softmax"], "--op has 'softmax'; it may have: attention"),
        (["tune", "--output", "missing.json"], "missing.json"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


def op_rows(*times: tuple[str, float | None, float | None]) -> dict[str, Any]:
    def item(seconds: float | None) -> dict[str, Any]:
        return {"status": "wrong", "reason": "x"} if seconds is None else {"status": "ok", "median_s": seconds}

    rows = [
        {"kind": "op", "facts": {"op": op}, "contestants": {"triton": item(triton), "cuda": item(cuda)}}
        for op, triton, cuda in times
    ]
    return {"rows": rows}


class TestPreferred:
    def test_the_faster_over_all_rows_comes_first(self):
        content = op_rows(("ffn", 1.0, 2.0), ("layernorm", 1.0, 0.5), ("layernorm", 1.0, 1.1))
        assert gpu.preferred(content) == {"ffn": ["triton", "cuda"], "layernorm": ["cuda", "triton"]}

    def test_what_was_wrong_once_stays_off(self):
        assert gpu.preferred(op_rows(("ffn", 2.0, 1.0), ("ffn", 1.0, None))) == {"ffn": ["triton"]}

    def test_an_op_without_a_comparison_is_not_there(self):
        assert gpu.preferred(op_rows(("ffn", None, 1.0))) == {}

    def test_the_table_in_the_package(self):
        for arch, ops in json.loads(dispatch.PREFERRED.read_text(encoding="utf-8")).items():
            assert arch.startswith("sm_")
            for op, backends in ops.items():
                assert set(backends) <= set(dispatch._candidates(op)) & {"cuda", "triton"}

    @pytest.mark.parametrize("order", [["cuda", "triton"], ["triton", "cuda"], ["triton"], []])
    def test_decides_which_comes_first(self, order, monkeypatch):
        monkeypatch.setattr(dispatch, "preferred", lambda op, device_type: order)
        names = [item.name for item in dispatch._ordered("layernorm", "cuda") if item.name in ("cuda", "triton")]
        assert names == (order if len(order) == 2 else ["cuda", "triton"])
        off = dispatch._off("layernorm", dispatch._candidates("layernorm")["cuda"], "cuda")
        assert (off is None) == ("cuda" in order)


@pytest.fixture(scope="module")
def suite() -> Any:
    loader = importlib.machinery.SourceFileLoader("gpu_suite", str(ROOT / ".ci" / "gpu"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("gpu_suite", loader))
    loader.exec_module(module)
    return module


class TestMakeGpu:
    @without_gpu
    def test_says_in_one_sentence_that_there_is_no_gpu(self):
        done = subprocess.run([sys.executable, str(ROOT / ".ci" / "gpu")], capture_output=True, text=True)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith("make gpu: ")
        assert not done.stdout

    def test_unknown_step(self):
        done = subprocess.run([sys.executable, str(ROOT / ".ci" / "gpu"), "nope"], capture_output=True, text=True)
        assert done.returncode == 2
        assert "unknown step nope; allowed are build, tests, sanitize, bench" in done.stderr

    def test_a_failure_and_a_limit_do_not_stop_the_rest(self, suite, tmp_path, capsys):
        run = suite.Suite(tmp_path, tmp_path, 60.0)
        assert not run.run("build", [sys.executable, "-c", "import sys; print('why'); sys.exit(3)"])
        assert not run.run("tests", [sys.executable, "-c", "import time; time.sleep(60)"], limit=6)
        assert run.run("bench", [sys.executable, "-c", "print('done')"])
        states = {name: state.split(",")[0] for name, state in run.outcome.items()}
        assert states == {"build": "failed with status 3", "tests": "stopped at its limit", "bench": "ok"}
        assert "why" in (tmp_path / "build.log").read_text()
        assert "done" in capsys.readouterr().out

    def test_what_is_built_is_what_runs(self, suite, tmp_path):
        """The package in the build folder goes before the sources in the folder that tests are run from."""
        package = tmp_path / "fastbert"
        package.mkdir()
        (package / "__init__.py").write_text("")
        code = "import fastbert; print(fastbert.__file__)"
        environment = suite.Suite(tmp_path, tmp_path, 1.0).environment | {"PYTHONPATH": str(tmp_path)}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert Path(done.stdout.strip()).parent == package
