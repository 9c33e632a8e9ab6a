"""The benchmark harness, on tiny models: what it counts, the order it keeps, and whom it gives no speed."""

import json
import mmap
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from fastbert.bench import cli, contestants, ops, plots, report, runner, worker, workloads

from fastbert import flops

HERE = Path(__file__).resolve().parent
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 120,
    "max_position_embeddings": 32,
}
TINY_OP = {"hidden": 32, "intermediate": 64, "heads": 2, "vocab": 50, "lengths": [7, 1, 5]}


def tiny_workload(training: bool = False) -> workloads.Workload:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 120, (3, 8), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(8) < torch.tensor([[8], [5], [2]])).long()}
    facts = {}
    if training:
        inputs["labels"] = torch.tensor([0, 1, 1])
        facts = {"num_labels": 2, "dropout": 0.1}
    return workloads.model_workload("tiny", "tiny", {"config": TINY}, TINY, inputs, training, facts)


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    """A run with a right, a wrong and a crashing contestant, interrupted (Ctrl-C) in its second round."""
    messages: list[str] = []

    def progress(text: str) -> None:
        messages.append(text)
        if text.startswith("round 2/"):
            raise KeyboardInterrupt

    names = ["hf-sdpa", "outside_contestants:OffByOnePercent", "outside_contestants:Crashes"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE))
        found = runner.run(tiny_workload(), names, 1, repeats=100, seconds=0.01, progress=progress)
    return {**found, "messages": messages}


class TestUsefulWork:
    def test_encoder_by_hand(self):
        # H 4, I 8, lengths 2 and 3: weights 4*4*4 + 2*4*8 = 128, products 2*5*128 = 1280, attention 4*4*(4 + 9) = 208
        assert flops.layer_flops([2, 3], 4, 8) == 1280 + 208
        assert flops.encoder_flops([2, 3], 4, 8, num_layers=2) == 2 * 1488
        assert flops.encoder_flops([2, 3], 4, 8, num_layers=2, training=True) == 3 * 2 * 1488

    def test_agrees_with_what_pytorch_counts_on_a_full_batch(self):
        from torch.utils.flop_counter import FlopCounterMode
        from transformers import BertConfig, BertModel

        model = BertModel(BertConfig(**TINY), add_pooling_layer=False).eval()
        model.set_attn_implementation("eager")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.ones(3, 8, dtype=torch.long))
        assert flops.encoder_flops([8] * 3, 32, 64, 2) == counter.get_total_flops()

    def test_padding_is_no_work(self):
        workload = tiny_workload()
        assert workload.work == flops.encoder_flops([8, 5, 2], 32, 64, 2)
        assert workload.facts["tokens"] == 15
        assert workload.facts["fill"] == 15 / 24

    def test_bert_base_row(self):
        workload = workloads.build("base", Path("unused"))
        assert workload.work == 12 * (2 * 1024 * (4 * 768**2 + 2 * 768 * 3072) + 8 * 4 * 128**2 * 768)
        assert workload.inputs["input_ids"].shape == (8, 128)

    def test_unknown_row(self, tmp_path):
        (tmp_path / "all-MiniLM-L6-v2").mkdir()
        for name in ("model.safetensors", "tokenizer.json", "config.json"):
            (tmp_path / "all-MiniLM-L6-v2" / name).write_text("{}")
        with pytest.raises(ValueError, match="'nope'"):
            workloads.build("nope", tmp_path)


def test_workload_survives_its_folder(tmp_path):
    before = tiny_workload(training=True)
    before.save(tmp_path)
    after = workloads.Workload.load(tmp_path)
    assert after.work == before.work
    assert after.facts == before.facts
    assert all(torch.equal(after.inputs[name], tensor) for name, tensor in before.inputs.items())


def test_order_is_interleaved():
    assert list(runner.turns(["a", "b", "c"], 2)) == [(0, "a"), (0, "b"), (0, "c"), (1, "a"), (1, "b"), (1, "c")]


class TestTurn:
    def test_short_calls_fill_the_time_and_skip_the_first(self):
        calls: list[int] = []
        samples = worker.turn(lambda: calls.append(1), 0.02)
        assert len(samples) == len(calls) - 1 > 10

    def test_a_long_call_is_made_once(self):
        import time

        samples = worker.turn(lambda: time.sleep(worker.SHORT_CALL * 1.1), 0.0)
        assert len(samples) == 1

    @pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
    def test_peak_memory_sees_what_is_freed_again(self):
        def use() -> None:
            with mmap.mmap(-1, 64 << 20) as memory:  # of the system, as the heap may have that much to spare
                memory.write(bytes(64 << 20))

        used = worker.peak_memory(use, 2)
        assert used is not None
        assert 60 << 20 < used["peak"] - used["before"] < 200 << 20


class TestError:
    truth: ClassVar = {"a": torch.tensor([1.0, -2.0]), "zero": torch.tensor([1e-12])}

    def test_is_relative_to_the_largest_value(self):
        found = {"a": torch.tensor([1.0, -2.002]), "zero": torch.tensor([0.0])}
        error, where = runner.relative_error(found, self.truth)
        assert error == pytest.approx(1e-3, rel=1e-3)
        assert where == "a"

    @pytest.mark.parametrize(
        "found",
        [
            {"a": torch.tensor([float("nan"), -2.0]), "zero": torch.tensor([0.0])},
            {"a": torch.tensor([1.0, -2.0])},
            {"a": torch.tensor([1.0]), "zero": torch.tensor([0.0])},
        ],
        ids=["nan", "missing", "shape"],
    )
    def test_is_infinite_for(self, found):
        assert runner.relative_error(found, self.truth)[0] == float("inf")


class TestRun:
    def test_right_one_gets_a_speed(self, record):
        item = record["contestants"]["hf-sdpa"]
        assert item["status"] == "ok", item
        assert item["error"] <= item["tolerance"]
        assert item["rate"] == pytest.approx(record["work"] / item["median_s"] / 1e9)
        assert item["share_of_peak"] == pytest.approx(item["rate"] / record["peak"]["rate"])

    @pytest.mark.parametrize(
        ("name", "status", "reason"),
        [("OffByOnePercent", "wrong", "error 1.0e-02 of last_hidden_state"), ("Crashes", "failed", "status 8")],
    )
    def test_no_speed_for(self, record, name, status, reason):
        item = record["contestants"][f"outside_contestants:{name}"]
        assert item["status"] == status
        assert reason in item["reason"]
        assert not {"median_s", "min_s", "rate", "share_of_peak", "turns"} & set(item)
        assert f"{name}: no speed, {status}" in report.table(record)

    def test_interrupt_keeps_what_is_there(self, record):
        assert not record["complete"]
        assert record["rounds"] == 2
        assert len(record["contestants"]["hf-sdpa"]["turns"]) == len(record["peak"]["samples"]) == 2
        assert record["messages"][-1].startswith("interrupted")
        assert "INTERRUPTED after 2 rounds" in report.table(record)

    def test_training_step_to_the_end_with_memory(self):
        messages: list[str] = []
        workload = tiny_workload(training=True)
        found = runner.run(workload, ["fastbert"], 1, 2, seconds=0.01, memory=True, progress=messages.append)
        item = found["contestants"]["fastbert"]
        assert found["complete"]
        assert found["rounds"] == 2
        assert item["status"] == "ok", item
        assert len(item["turns"]) == 2
        if sys.platform == "linux":
            assert item["memory"]["peak"] >= item["memory"]["before"] > 0


@pytest.mark.parametrize("module", ["onnxruntime", "openvino", "ctranslate2"])
def test_peers_are_right(module):
    pytest.importorskip(module)
    if module == "onnxruntime":
        pytest.importorskip("onnx")
    workload = tiny_workload()
    truth = contestants.entry("inference", contestants.TRUTH).load()(contestants.TRUTH, workload).outputs()
    found = contestants.entry("inference", module).load()(module, workload).outputs()
    assert runner.relative_error(found, truth)[0] <= runner.TOLERANCE["outputs"]


@pytest.mark.parametrize("direction", ["fwd", "fwd_bwd"])
@pytest.mark.parametrize("op", list(ops.OPS))
def test_ops_compare_the_same_thing(op, direction):
    workload = ops.workload(op, direction, "tiny", TINY_OP)
    truth = ops.Torch(contestants.TRUTH, workload).outputs()
    assert (len(truth) > 1) == (direction == "fwd_bwd")
    for kind in (ops.Torch, ops.FastBert):
        contestant = kind("any", workload)
        assert runner.relative_error(contestant.outputs(), truth)[0] <= runner.TOLERANCE["outputs"]
        contestant.run()


class TestCommandLine:
    def test_one_op_from_command_to_files(self, tmp_path, capsys):
        pytest.importorskip("matplotlib")
        arguments = [
            "op",
            "--row",
            "layernorm_fwd[minilm-1x32]",
            "--repeats",
            "1",
            "--seconds",
            "0.01",
            "--threads",
            "1",
        ]
        assert cli.main([*arguments, "--output", str(tmp_path)]) == 0
        out = capsys.readouterr().out
        assert "pytorch" in out
        (path,) = tmp_path.glob("op-*.json")
        content = json.loads(path.read_text())
        assert content["schema"] == report.SCHEMA
        assert set(content) == {"schema", "command", "time", "machine", "threads", "repeats", "rows"}
        assert {"device", "cores", "system", "python", "extension", "versions", "commit"} == set(content["machine"])
        (row,) = content["rows"]
        assert row["unit"] == "GB/s"
        assert {"row", "title", "kind", "work", "facts", "threads", "rounds", "complete", "peak", "contestants"} <= set(
            row
        )
        item = row["contestants"]["pytorch"]
        keys = "status reason error error_at tolerance details turns median_s min_s rate share_of_peak"
        assert set(item) == set(keys.split())
        assert item["status"] == "ok"
        assert set(item["turns"][0]) == {"median_s", "min_s", "calls", "others"}
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    def test_plot_of_rows_without_speed(self, record, tmp_path):
        pytest.importorskip("matplotlib")
        content = report.result("model", {"device": "x", "extension": {}}, 1, 2, [record])
        plots.bars(content, tmp_path / "new" / "plot.png")
        assert (tmp_path / "new" / "plot.png").stat().st_size > 5000

    def test_list(self, capsys):
        assert cli.main(["--list"]) == 0
        out = capsys.readouterr().out
        assert all(name in out for name in ("ragged", "latency", "base", "training", "onnxruntime"))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["model", "--row", "nope"], "--row has 'nope'; it may have: ragged, latency, base"),
            (["model", "--contestants", "hf-sdpa,nobody"], "--contestants has nobody; it may have: hf-eager"),
            (["training", "--contestants", "onnxruntime"], "--contestants has onnxruntime"),
        ],
    )
    def test_wrong_names(self, arguments, message, capsys):
        assert cli.main(arguments) == 2
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize("arguments", [["--threads", "0"], ["--repeats", "x"]])
    def test_wrong_values(self, arguments):
        with pytest.raises(SystemExit) as error:
            cli.main(arguments)
        assert error.value.code == 2

    def test_wrong_commands(self, capsys):
        for arguments, message in (
            (["nope"], f"unknown 'nope'; allowed are {', '.join([*cli.KINDS, *cli.OTHERS])}"),
            (["--list", "gpu"], "gpu comes first, before the flags"),
        ):
            with pytest.raises(SystemExit) as error:
                cli.main(arguments)
            assert error.value.code == 2
            assert message in capsys.readouterr().err

    def test_output_that_cannot_be_written(self, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        assert cli.main(["model", "--output", str(tmp_path / "file" / "below")]) == 2
        assert "file" in capsys.readouterr().err
