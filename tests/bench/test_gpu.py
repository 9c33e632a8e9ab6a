"""The GPU benchmark, as far as it goes without a GPU: who takes part, what is held against what, what is written."""

import ast
import importlib.machinery
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fastbert.bench import cli, gpu, gpu_rows, gpu_worker, machine, report, runner

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


CPU = {"device": "cpu"}
TINY_ROWS = {
    "inference": lambda: gpu_rows.model_row("inference", "t", 3, 8, ragged=True, config=TINY, **CPU),
    "inference[base-512]": lambda: gpu_rows.model_row("inference[base-512]", "t", 3, 8, config=TINY, **CPU),
    "training": lambda: gpu_rows.model_row("training", "t", 3, 8, training=True, config=TINY, **CPU),
    "float32": lambda: gpu_rows.model_row(
        "float32", "t", 3, 8, ragged=True, training=True, config=TINY, **CPU, dtype="float32"
    ),
    "ffn": lambda: gpu_rows.op_row("ffn", "fwd_bwd", "t", TINY_OP, **CPU),
    "attention": lambda: gpu_rows.op_row("attention", "fwd_bwd", "t", TINY_OP, **CPU),
    "layernorm": lambda: gpu_rows.op_row("layernorm", "fwd", "t", TINY_OP, **CPU),
}


@pytest.fixture(scope="module")
def worker() -> gpu_worker.Gpu:
    """The worker on the CPU, with tiny rows; it goes the same way there, with another clock."""
    return gpu_worker.Gpu("cpu", TINY_ROWS)


class TestWorker:
    @pytest.mark.parametrize(
        ("row", "name"),
        [
            ("inference", "fastbert"),
            ("inference[base-512]", "hf-sdpa-math"),
            ("training", "fastbert"),
            ("training", "hf-sdpa-sparse-head"),
            ("float32", "fastbert"),
            ("ffn", "pytorch"),
        ],
    )
    def test_right_ones_get_a_time(self, worker, row, name):
        found = worker.measure(row, name)
        assert found["status"] == "ok", found
        assert found["median_s"] > 0
        assert found["clock"] == "host"
        assert found["error"] <= found["tolerance"] < 0.1

    def test_float32_is_held_to_float64(self, worker):
        worker.prepare("float32")
        assert {tensor.dtype for tensor in worker.truth.values()} == {torch.float64}
        assert max(worker.allowed.values()) < 1e-4

    def test_a_wrong_one_gets_none(self, worker):
        worker.prepare("layernorm")
        worker.truth = {name: tensor * 1.1 for name, tensor in worker.truth.items()}
        found = worker.measure("layernorm", "pytorch")
        assert found["status"] == "wrong"
        assert "of out is above" in found["reason"]
        assert "median_s" not in found

    def test_one_that_is_not_there_says_why(self, worker):
        assert worker.measure("ffn", "cuda")["status"] == "unavailable"
        found = worker.measure("attention", "fa2")
        assert found["status"] == "unavailable"
        assert "_flash_attention_forward" in found["reason"]

    @pytest.mark.parametrize("keep", [True, False])
    def test_is_timed_again_kept_or_made_anew(self, worker, keep):
        assert worker.measure("ffn", "pytorch", keep=keep)["status"] == "ok"
        assert ("pytorch" in worker.ready) == keep
        assert worker.again("ffn", "pytorch", graph=True)["median_s"] > 0
        worker.release("pytorch")
        assert "pytorch" not in worker.ready

    def test_a_truth_is_found_once(self, worker, monkeypatch):
        found = []
        monkeypatch.setattr(worker, "_find_truth", lambda row, find=worker._find_truth: (found.append(row), find(row)))
        worker.prepare("ffn")
        for row in ("layernorm", "ffn", "layernorm"):
            worker.prepare(row, keep=row == "layernorm" and not worker.kept)
            assert worker.measure(row, "pytorch")["status"] == "ok"
        assert [row.facts["op"] for row in found] == ["ffn", "layernorm", "ffn"][-len(found) :]
        assert not worker.kept

    def test_memory_that_runs_out_is_made_room_for(self, worker, monkeypatch):
        def run_out(name, graph, keep, measure=worker._measure):
            if worker.ready:
                raise torch.OutOfMemoryError("no room")
            return measure(name, graph, keep)

        worker.measure("ffn", "pytorch", keep=True)
        monkeypatch.setattr(worker, "_measure", run_out)
        assert worker.measure("ffn", "bare-gemm")["status"] == "ok"
        assert not worker.ready

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

    def test_the_important_comes_first(self):
        plan = gpu_rows.plan(list(gpu_rows.rows()))
        assert {name for name, _ in plan[:5]} == {
            *(f"{kind}[base-512{ragged}]" for kind in ("inference", "training") for ragged in ("", "-ragged")),
            "inference[base-1x128]",
        }
        assert plan[5:8] == [(name, True) for name in gpu_rows.COMPILED_FIRST]
        assert all(name.split("[")[1].startswith("large-512") for name, _ in plan[8:12])
        assert plan[12 : 12 + len(gpu_rows.TELLING)] == [(name, False) for name in gpu_rows.TELLING]
        assert {name.split("_fwd")[0] for name in gpu_rows.TELLING} == set(dispatch.OPS)

    def test_backends_of_sdpa(self):
        """All of them in two rows, elsewhere those that can run: flash takes no mask, and one alone takes float32."""
        found = {
            row: [name.split("-")[-1] for name in gpu_rows.entries(gpu_rows.rows()[row]()) if "sdpa-" in name]
            for row in (
                "inference[base-512]",
                "inference[base-512-ragged]",
                "attention_fwd[d64-512]",
                "inference[base-128-ragged-float32]",
            )
        }
        assert list(found.values()) == [[*gpu_rows.SDPA], ["cudnn", "efficient"], ["flash", "cudnn"], ["efficient"]]

    def test_what_memory_limits_is_larger_than_a_cache(self):
        for name, make in gpu_rows.rows().items():
            if name.startswith(("layernorm", "embedding")):
                shape = make().facts["shape"]
                assert sum(shape["lengths"]) * shape["hidden"] * 2 > 80e6

    def test_bytes_of_a_layernorm(self):
        forward, both = (gpu_rows.rows()[f"layernorm_{name}[large]"]().work for name in ("fwd", "fwd_bwd"))
        assert (forward, both) == tuple(tensors * 65536 * 1024 * 2 for tensors in (3, 8))


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
        def ask(worker, do, seconds, row=None, **rest):
            if row == "layernorm_fwd_bwd[base]":
                raise KeyboardInterrupt
            return {"status": "ok", "clock": "graph", "error": 0.0, "median_s": 0.1} if do == "measure" else {}

        monkeypatch.setattr(gpu.Worker, "ask", ask)
        content = report.result("gpu", {"device": "none"}, None, None, [])
        run = gpu.Run(content, tmp_path / "x.json", ["pytorch"], 60.0)
        with pytest.raises(KeyboardInterrupt):
            run.everything(["layernorm_fwd[base]", "layernorm_fwd_bwd[base]"])
        assert [row["complete"] for row in content["rows"]] == [True, False]
        written = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
        assert written["rows"][0]["complete"]

    def test_what_takes_minutes_is_not_begun_at_the_end(self, tmp_path):
        content = report.result("gpu", {"device": "none"}, None, None, [])
        run = gpu.Run(content, tmp_path / "x.json", None, gpu.SLOW_LEAST_S)
        run.row(record := run.begin("inference[base-512]"), True)
        item = record["contestants"]["hf-compile"]
        assert item["status"] == "not run"
        assert "it may take minutes" in item["reason"]
        assert run.worker.process is None

    def test_one_that_the_end_cuts_short_was_not_reached(self, tmp_path, monkeypatch):
        """It has not failed: a later run may try it again."""
        monkeypatch.setattr(gpu, "GRACE_S", 0.0)
        content = report.result("gpu", {"device": "none"}, None, None, [])
        run = gpu.Run(content, tmp_path / "x.json", None, 0.2)
        try:
            found = run.measured("inference[base-512]", "hf-eager", False)
        finally:
            run.worker.close()
        assert found == {"status": "not run", "reason": "stopped when the 0 s were used up"}

    def test_one_that_gave_no_answer_is_not_asked_again(self, tmp_path, monkeypatch):
        asked = []

        def ask(worker, do, seconds, row=None, name=None, **rest):
            if do == "measure":
                asked.append((row, name))
                if name == "cuda":
                    raise runner.LateError("no answer in 60 s")
            return {"status": "ok", "clock": "graph", "error": 0.0, "median_s": 0.1}

        monkeypatch.setattr(gpu.Worker, "ask", ask)
        content = report.result("gpu", {"device": "none"}, None, None, [])
        run = gpu.Run(content, tmp_path / "x.json", ["pytorch", "cuda"], 60.0)
        rows = ("layernorm_fwd[large]", "layernorm_fwd[base]", "layernorm_fwd_bwd[base]")
        run.everything(rows)
        first, second, third = (record["contestants"]["cuda"] for record in content["rows"])
        assert first["status"] == third["status"] == "failed"
        assert second == {"status": "not run", "reason": "not begun: it gave no answer in layernorm_fwd[large]"}
        assert [(row, "pytorch") for row in rows] == [pair for pair in asked if pair[1] == "pytorch"]
        assert ("layernorm_fwd[base]", "cuda") not in asked

    def test_one_that_cannot_be_recorded_is_timed_in_another_process(self, worker, tmp_path, monkeypatch):
        def timed(graph, stock=worker._timed):
            if graph:
                raise gpu_worker.NotCapturedError("no")
            return stock(graph)

        monkeypatch.setattr(worker, "_timed", timed)
        content = report.result("gpu", {"device": "none"}, None, None, [])
        run = gpu.Run(content, tmp_path / "x.json", None, 60.0)
        run.worker = Here(worker)
        found = run.measured("ffn", "pytorch", False)
        assert (found["status"], found["not_captured"], run.worker.closed) == ("ok", "no", 1)

    @pytest.mark.parametrize(
        ("name", "peak", "sheet"),
        [("inference[base-512]", 800e3, 989.4e3), ("inference[base-128-ragged-float32]", 50e3, None)],
    )
    def test_rates(self, name, peak, sheet, tmp_path):
        content = report.result("gpu", {"device": "NVIDIA H200"}, None, None, [])
        run = gpu.Run(content, tmp_path / "x.json", ["fastbert"], 1.0)
        run.ceilings = {"copy": 4000.0, "bfloat16": 800e3, "float32": 50e3}
        record = run.begin(name)
        item = record["contestants"]["fastbert"]
        item.update(status="ok", error=0.001, median_s=0.01)
        run.rate(record, item)
        assert item["tokens_per_s"] == record["facts"]["tokens"] / 0.01
        assert item["rate"] == record["work"] / 0.01 / 1e9
        assert item["share_of_peak"] == item["rate"] / peak
        assert item["mfu"] == (item["rate"] / sheet if sheet else None)
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


class Here:
    """Asks a worker in this process."""

    def __init__(self, worker: gpu_worker.Gpu) -> None:
        self.worker, self.asked, self.closed = worker, [], 0

    def close(self) -> None:
        self.closed += 1

    def ask(self, do: str, seconds: float, **arguments: Any) -> dict[str, Any]:
        self.asked.append((do, arguments.get("name")))
        if do == "ceilings":
            return {"copy": 1.0, "bfloat16": 1.0}
        try:
            return getattr(self.worker, do)(**arguments)
        except RuntimeError as error:
            raise runner.WorkerError(str(error)) from error


MACHINE: dict[str, Any] = {"device": "H", "arch": "sm_90", "cuda": "13.0", "cudnn": 9, "versions": {"torch": "2.11"}}
MACHINE |= {"commit": {"hash": "abc", "dirty": False}}


class TestResume:
    ROWS = ("ffn", "layernorm", "inference")
    NAMES = ("pytorch", "hf-eager", "fastbert")

    def run(self, content, path, worker, budget=1e6):
        run = gpu.Run(content, path, list(self.NAMES), budget)
        run.worker = Here(worker)
        run.everything(self.ROWS)
        return run.worker.asked

    def test_goes_on_where_it_stopped(self, worker, tmp_path, monkeypatch):
        monkeypatch.setattr(gpu_rows, "rows", lambda: TINY_ROWS)
        path = tmp_path / "gpu-x.json"
        content = report.result("gpu", {"device": "none"}, None, None, [])
        self.run(content, path, worker, budget=1e-9)
        states = [item["status"] for row in content["rows"] for item in row["contestants"].values()]
        assert set(states) == {"not run"}
        content["rows"] = content["rows"][:1]
        asked = self.run(content, path, worker)
        measured = [name for do, name in asked if do == "measure"]
        assert measured == ["pytorch", "pytorch", "fastbert", "hf-eager"]
        for row in content["rows"]:
            for name, item in row["contestants"].items():
                assert item["status"] == "ok", item
                assert item["reason"] is None
                assert len(item["turns"]) == (1 + gpu.ROUNDS if name == "fastbert" else 1)
        again = json.loads(path.read_text(encoding="utf-8"))
        assert again == json.loads(json.dumps(content))
        assert {do for do, _ in self.run(again, path, worker)} == {"ceilings"}

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({}, None),
            ({"device": "A"}, "its device is A, here it is H"),
            ({"cuda_kernels": {"cutlass": None}}, "its cuda_kernels is {'cutlass': None}, here it is None"),
            ({"versions": {}}, "its versions is {}, here it is {'torch': '2.11'}"),
            ({"commit": {"hash": "abd", "dirty": False}}, "its commit is {'hash': 'abd'"),
        ],
    )
    def test_what_belongs_together(self, change, reason):
        found = gpu.apart(MACHINE | change, MACHINE)
        assert found is None if reason is None else found.startswith(reason)

    @pytest.mark.parametrize(
        ("commit", "words"), [(None, "FASTBERT_COMMIT"), ({"hash": "a", "dirty": True}, "differs")]
    )
    def test_code_that_is_not_known(self, commit, words):
        here = MACHINE | {"commit": commit}
        assert words in gpu.apart(here, here)

    def test_of_a_folder_the_newest_that_fits(self, tmp_path):
        new = report.result("gpu", MACHINE, None, None, [])
        there = tmp_path / "new.json"
        (tmp_path / "gpu-broken.json").write_text("{")
        assert gpu._resumed(tmp_path, new, there) == (new, there)
        for name, when, where in (
            ("a", "1", MACHINE),
            ("b", "2", MACHINE),
            ("c", "3", MACHINE | {"cuda": "1"}),
        ):
            report.write({**new, "machine": where, "time": when}, tmp_path / f"gpu-{name}.json")
        content, path = gpu._resumed(tmp_path, new, there)
        assert path.name == "gpu-b.json"
        assert content["resumed"] == [new["time"]]
        with pytest.raises(ValueError, match="its cuda is 1, here it is 13.0"):
            gpu._resumed(tmp_path / "gpu-c.json", new, there)
        with pytest.raises(ValueError, match="is no JSON"):
            gpu._resumed(tmp_path / "gpu-broken.json", new, there)


def test_what_the_cuda_kernels_were_built_with_is_known():
    note = json.loads(Path(dispatch.__file__).with_name("_build.json").read_text(encoding="utf-8"))
    found = machine._cuda_kernels()
    assert found["built"] == (found["reason"] is None) == note["cuda"]
    assert found["cutlass"] == note.get("cutlass")


def test_plots_show_models_and_operations(worker, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(gpu_rows, "rows", lambda: TINY_ROWS)
    content = report.result("gpu", {"device": "none"}, None, None, [])
    run = gpu.Run(content, tmp_path / "gpu-x.json", ["pytorch", "hf-eager"], 60.0)
    run.worker = Here(worker)
    run.everything(["layernorm", "inference"])
    drawn = gpu.draw(content, tmp_path / "gpu-x.json")
    assert [path.name for path in drawn] == ["gpu-x.png", "gpu-x-ops.png"]
    assert all(path.stat().st_size for path in drawn)


def op_rows(*times: tuple[str, float | None, float | None], clock: str = "graph") -> dict[str, Any]:
    def item(seconds: float | None) -> dict[str, Any]:
        good = {"status": "ok", "median_s": seconds, "clock": clock}
        return {"status": "wrong", "reason": "x"} if seconds is None else good

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

    def test_a_failure_that_is_not_its_own_says_nothing(self):
        content = op_rows(("ffn", 2.0, 1.0), ("ffn", None, None))
        for item in content["rows"][1]["contestants"].values():
            item.update(status="failed", reason=f"{gpu.NO_TRUTH}out of memory")
        assert gpu.preferred(content) == {"ffn": ["cuda", "triton"]}

    def test_launches_by_python_count_for_nothing(self):
        assert gpu.preferred(op_rows(("ffn", 1.0, 2.0), clock="stream")) == {}

    def test_is_written_from_a_result_without_a_gpu(self, tmp_path, monkeypatch, capsys):
        table, result = tmp_path / "preferred.json", tmp_path / "gpu-x.json"
        table.write_text(json.dumps({"sm_80": {"ffn": ["triton"]}, "sm_90": {"attention": ["cuda", "triton"]}}))
        monkeypatch.setattr(dispatch, "PREFERRED", table)
        where = {"device": "H", "arch": "sm_90", "cuda_kernels": {"cutlass": "4.2.0"}}
        content = report.result("gpu", where, None, None, [])
        report.write({**content, **op_rows(("ffn", 1.0, 2.0))}, result)
        assert cli.main(["gpu", "--preferred-from", str(result)]) == 0
        assert str(table) in capsys.readouterr().out
        assert json.loads(table.read_text()) == {
            "sm_80": {"ffn": ["triton"]},
            "sm_90": {"attention": ["cuda", "triton"], "ffn": ["triton", "cuda"]},
        }
        assert cli.main(["gpu", "--preferred-from", str(table)]) == 2
        assert "is no result of fastbert bench gpu" in capsys.readouterr().err

    @pytest.mark.parametrize("kernels", [{"cuda_kernels": {"cutlass": None}}, {}])
    @pytest.mark.parametrize(("arch", "refused"), [("sm_90", {"attention", "ffn"}), ("sm_80", set())])
    def test_kernels_that_were_not_built_are_not_judged(self, arch, refused, kernels, tmp_path, monkeypatch, capsys):
        table, result = tmp_path / "preferred.json", tmp_path / "gpu-x.json"
        before = {op: ["triton"] for op in ("attention", "ffn", "layernorm")}
        table.write_text(json.dumps({arch: before}))
        monkeypatch.setattr(dispatch, "PREFERRED", table)
        content = report.result("gpu", {"device": "H", "arch": arch, **kernels}, None, None, [])
        report.write({**content, **op_rows(*((op, 2.0, 1.0) for op in before))}, result)
        assert cli.main(["gpu", "--preferred-from", str(result)]) == bool(refused)
        error = capsys.readouterr().err
        assert not refused if not error else "attention and ffn left as they were" in error
        now = json.loads(table.read_text())[arch]
        assert now == {op: order if op in refused else ["cuda", "triton"] for op, order in before.items()}

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

    @pytest.mark.parametrize("steps", [["tests"], ["build", "sanitize"], ["bench"]])
    def test_what_the_tests_need_is_missed_before_anything_is_done(self, suite, steps, monkeypatch):
        there = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pytest" else there(name))
        reason = suite.unfit(steps) or ""
        words = ["has no pytest, which tests and sanitize need", "--target FOLDER pytest` on", "PYTHONPATH=FOLDER"]
        assert [word in reason for word in words] == [steps != ["bench"]] * len(words)

    def test_what_the_tests_import_is_what_they_are_said_to_need(self, suite):
        """At the top of their files; what stands in a `try` there is not needed."""
        tests = ROOT / "tests"
        files = [tests / "conftest.py", *(tests / "gpu").glob("*.py"), *(tests / "ops").glob("*.py")]
        files.append(tests / "model" / "comparison.py")  # which tests/gpu uses
        packages = set()
        for file in files:
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.Import | ast.ImportFrom):
                    names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                    packages |= {name.partition(".")[0] for name in names}
        packages -= sys.stdlib_module_names | {"fastbert"} | {file.stem for file in files}
        assert set(suite.TESTS_NEED) <= packages <= {*suite.NEEDED, *suite.TESTS_NEED}

    def test_unknown_step(self):
        done = subprocess.run([sys.executable, str(ROOT / ".ci" / "gpu"), "nope"], capture_output=True, text=True)
        assert done.returncode == 2
        assert "unknown step nope; allowed are build, tests, sanitize, bench" in done.stderr

    def test_a_failure_and_a_limit_do_not_stop_the_rest(self, suite, tmp_path, capsys):
        run = suite.Suite(tmp_path, tmp_path, tmp_path / "gpu.log", 600.0)
        assert not run.run("build", [sys.executable, "-c", "import sys; print('why'); sys.exit(3)"])
        assert not run.run("tests", [sys.executable, "-c", "import time; time.sleep(60)"], limit=6)
        assert run.run("bench", [sys.executable, "-c", "print('done')"])
        states = {name: state.split(",")[0] for name, state in run.outcome.items()}
        assert states == {"build": "failed with status 3", "tests": "stopped at its limit", "bench": "ok"}
        assert run.together({"a": [sys.executable, "-c", ""], "b": [sys.executable, "-c", ""]}, 20.0, {})
        assert "why" in (tmp_path / "build.log").read_text()
        assert "failed with status 3" in (tmp_path / "gpu.log").read_text()
        assert "done" in capsys.readouterr().out

    @pytest.mark.skipif(importlib.util.find_spec("xdist") is None, reason="pytest-xdist is not there")
    def test_a_run_in_parallel_that_is_stopped_says_what_failed(self, suite, tmp_path):
        file, ran = tmp_path / "test_it.py", tmp_path / "ran"
        file.write_text(
            "import pathlib, time\n"
            f"def test_bad(): pathlib.Path({str(ran)!r}).touch(); assert 0\n"
            "def test_long(): time.sleep(600)\n"
        )
        tests = ["-q", "-p", "no:cacheprovider", "-n", "2", f"--rootdir={tmp_path}", str(file)]
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a shell's background
        with (tmp_path / "log").open("wb") as log:
            process = suite.started([sys.executable, "-m", "pytest", *tests], cwd=tmp_path, stdout=log, stderr=log)
            signal.signal(signal.SIGINT, before)
            end = time.monotonic() + 120
            while not ran.exists() and time.monotonic() < end:
                time.sleep(0.1)
            time.sleep(2)
            assert suite.ended([process], time.monotonic()) == [True]
        assert "test_bad" in (tmp_path / "log").read_text()
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)

    @pytest.mark.skipif(importlib.util.find_spec("xdist") is None, reason="pytest-xdist is not there")
    def test_a_test_that_hangs_is_named_and_the_others_run(self, suite, tmp_path, monkeypatch, capsys):
        file = tmp_path / "tests" / "gpu" / "test_it.py"
        file.parent.mkdir(parents=True)
        file.write_text(
            "import os, signal, time\n"
            "def test_hangs(): signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT]); time.sleep(600)\n"
            f"def test_compilers(): assert os.environ['TORCHINDUCTOR_COMPILE_THREADS'] == '{suite.COMPILERS}'\n"
        )
        monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
        monkeypatch.setattr(suite, "TEST_SECONDS", 3)
        monkeypatch.setattr(suite, "ROOT", tmp_path)
        run = suite.Suite(tmp_path, tmp_path, tmp_path / "gpu.log", 120.0, ("tests",))
        run.tests()
        output = capsys.readouterr().out
        assert "crashed while running 'tests/gpu/test_it.py::test_hangs'" in output
        assert "1 failed, 1 passed" in output

    @pytest.mark.parametrize(
        ("steps", "seconds", "tests", "sanitize"),
        [
            (("build", "tests", "sanitize", "bench"), 1000, 210, 70),
            (("tests", "bench"), 1000, 210, 70),
            (("build", "tests", "sanitize", "bench"), 370, 370 - 120 - 60, 70),
            (("tests", "sanitize", "bench"), 200, 20, 20),
            (("build", "tests", "sanitize"), 1000, 1000 - 70 - 60, 970),
            (("tests",), 1000, 970, 970),
            (("tests", "sanitize"), 100, 210, 70),
        ],
    )
    def test_the_time_that_is_left_to_a_benchmark(self, suite, tmp_path, steps, seconds, tests, sanitize):
        run = suite.Suite(tmp_path, tmp_path, tmp_path / "gpu.log", seconds, steps)
        assert run.limit("build") == suite.LIMIT["build"]
        assert run.limit("tests") == pytest.approx(tests, abs=5)
        assert run.limit("sanitize") == pytest.approx(sanitize, abs=5)

    def test_memcheck_comes_first_and_the_others_in_what_it_leaves(self, suite, tmp_path, monkeypatch):
        tool = tmp_path / "compute-sanitizer"
        tool.write_text(f'#!/bin/sh\necho "$2" >> {tmp_path}/ran\n[ "$2" != memcheck ] || exec sleep 60\n')
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        run = suite.Suite(tmp_path, tmp_path, tmp_path / "gpu.log", 600.0)
        monkeypatch.setitem(suite.LIMIT, "sanitize", 6)
        run.sanitize()
        assert (tmp_path / "ran").read_text().split() == ["memcheck"]
        assert [state.split(",")[0] for state in run.outcome.values()] == [
            "stopped at its limit",
            *["not run: no time left"] * 2,
        ]
        tool.write_text(tool.read_text().replace("sleep 60", "true"))
        run.sanitize()
        ran = (tmp_path / "ran").read_text().split()[1:]
        assert ran[0] == "memcheck"
        assert sorted(ran) == sorted(suite.TOOLS)

    def test_what_the_user_has_on_the_path_stays(self, suite, tmp_path, monkeypatch):
        monkeypatch.setenv("PYTHONPATH", "/of/the/user")
        path = suite.Suite(tmp_path, tmp_path, tmp_path / "gpu.log", 1.0).environment["PYTHONPATH"]
        assert path.split(":") == [str(suite.LIBRARY), "/of/the/user"]

    def test_what_was_left_out_of_the_build_is_said(self, suite, tmp_path, monkeypatch):
        monkeypatch.setattr(suite, "LIBRARY", tmp_path)
        assert suite.built().startswith("nothing is known")
        (tmp_path / "fastbert").mkdir()
        note = {
            "extension": True,
            "reason": "",
            "cuda": True,
            "cuda_reason": "",
            "cutlass": None,
            "cutlass_reason": "y",
        }
        for change, said in (
            ({}, "built: the extension, CUDA C++, no CUTLASS (y)"),
            ({"cutlass": "4.2.1"}, "built: the extension, CUDA C++, CUTLASS"),
            (
                {"cuda": False, "cuda_reason": "x", "cutlass_reason": None},
                "no CUDA C++ (x), no CUTLASS (without CUDA C++)",
            ),
        ):
            (tmp_path / "fastbert" / "_build.json").write_text(json.dumps(note | change))
            assert said in suite.built()

    def test_cutlass_is_missed_before_anything_is_built(self, suite, tmp_path, monkeypatch):
        found = importlib.util.find_spec("cutlass_library") is not None
        assert suite.has_cutlass(builds=True) == found
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        monkeypatch.delitem(sys.modules, "cutlass_library", raising=False)
        assert not suite.has_cutlass(builds=True)
        headers = tmp_path / "cutlass_library" / "source" / "include" / "cutlass"
        headers.mkdir(parents=True)
        (tmp_path / "cutlass_library" / "__init__.py").touch()
        importlib.invalidate_caches()
        assert suite.has_cutlass(builds=True)

    @pytest.mark.parametrize(
        ("note", "known"), [('{"cutlass": "4.2.1"}', True), ('{"cutlass": null}', False), ("", False)]
    )
    def test_cutlass_of_the_build_that_is_there(self, suite, tmp_path, monkeypatch, note, known):
        monkeypatch.setattr(suite, "LIBRARY", tmp_path)
        (tmp_path / "fastbert").mkdir()
        (tmp_path / "fastbert" / "_build.json").write_text(note)
        assert suite.has_cutlass(builds=False) == known

    def test_what_is_built_is_what_runs(self, suite, tmp_path):
        """The package in the build folder goes before the sources in the folder that tests are run from."""
        package = tmp_path / "fastbert"
        package.mkdir()
        (package / "__init__.py").write_text("")
        code = "import fastbert; print(fastbert.__file__)"
        environment = suite.Suite(tmp_path, tmp_path, tmp_path / "gpu.log", 1.0).environment | {
            "PYTHONPATH": str(tmp_path)
        }
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert Path(done.stdout.strip()).parent == package
