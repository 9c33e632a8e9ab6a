"""What `make results` writes into README.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fastbert.bench import gpu, report


@pytest.fixture(scope="module")
def results(load_script: Any) -> Any:
    return load_script("docs/results.py")


def content(time: str, rows: list[dict[str, Any]], commit: str = "abc") -> dict[str, Any]:
    machine = {"device": "NVIDIA H200", "versions": {"torch": "2.11", "triton": "3.6", "transformers": "5.17"}}
    machine |= {"commit": {"hash": commit, "dirty": False}}
    made = report.result("gpu", machine, None, None, rows) | {"time": time}
    return made | {"ceilings": {"copy": 4300.0, "bfloat16": 790e3, "float32": 50e3, "matmuls": {}}}


def row(name: str, work: float, unit: str = "GFLOP/s", peak: float = 790e3, **milliseconds: Any) -> dict[str, Any]:
    kind = "op" if "_fwd" in name else name.split("[")[0]
    contestants: dict[str, Any] = {}
    for who, value in milliseconds.items():
        item = {
            "status": "ok",
            "reason": None,
            "median_s": value / 1e3,
            "rate": work / value * 1e3 / 1e9,
            "details": {},
        }
        item |= {"clock": "stream" if who == "pytorch" or kind != "op" else "graph", "error": 0.0}
        item |= {"share_of_peak": item["rate"] / peak, "tokens_per_s": 16384e3 / value, "mfu": 0.5}
        item["memory"] = {"peak": int(value * 2**20), "before": 0}
        contestants[who.replace("_", "-")] = item
    shape = {"row": name, "title": name, "kind": kind, "unit": unit, "work": work, "facts": {}, "complete": True}
    return shape | {"others": None, "peak": {"rate": peak, "how": "x"}, "contestants": contestants}


def test_a_row_with_less_does_not_replace_one_with_more(results: Any, tmp_path: Path) -> None:
    name = "inference[base-512]"
    report.write(content("2026-01-01", [row(name, 1e13, fastbert=50, hf_eager=110)]), tmp_path / "gpu-a.json")
    report.write(content("2026-01-02", [row(name, 1e13, fastbert=40)]), tmp_path / "gpu-b.json")
    short = row(name, 1e13, fastbert=30, hf_eager=100) | {"complete": False}
    report.write(content("2026-01-03", [short]), tmp_path / "gpu-c.json")
    (found,) = results.newest_gpu(tmp_path)["NVIDIA H200"]
    assert found.content["time"] == "2026-01-01"
    report.write(content("2026-01-04", [row(name, 1e13, fastbert=45, hf_eager=110)]), tmp_path / "gpu-d.json")
    (found,) = results.newest_gpu(tmp_path)["NVIDIA H200"]
    assert found.content["time"] == "2026-01-04"


def test_nothing_was_measured(results: Any, tmp_path: Path) -> None:
    assert results.gpu_tables(tmp_path) == "not yet measured"
    report.write(content("2026-01-01", []), tmp_path / "gpu-a.json")
    assert results.gpu_tables(tmp_path) == "not yet measured"


def test_models_and_operations(results: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "draw", lambda content, path: [])
    training = row("training[base-512]", 1e13, fastbert=50, hf_eager=110, hf_sdpa_flash=90, hf_sdpa_cudnn=80, varlen=60)
    training["contestants"]["varlen"]["details"]["note"] = "no attention dropout"
    training["contestants"]["hf-sdpa-sparse-head"] = training["contestants"]["hf-sdpa-cudnn"] | {"median_s": 0.07}
    latency = row("inference[base-1x128]", 1e10, fastbert=2, fastbert_graphs=0.5)
    ffn = row("ffn_fwd[large]", 2.75e11, triton=0.5, cuda=0.4, pytorch=0.8, bare_gemm=0.38)
    norm = row("layernorm_fwd[large]", 4e8, "GB/s", 4300.0, triton=0.1, pytorch=0.4)
    old = row("layernorm_fwd[large]", 4e8, "GB/s", 4300.0, triton=0.2)
    report.write(content("2026-01-01", [old, latency], "old"), tmp_path / "gpu-a.json")
    report.write(content("2026-01-02", [norm, ffn, training]), tmp_path / "gpu-b.json")
    text = results.gpu_tables(tmp_path)
    models, ops, *_ = text.split("\n\n")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in models.splitlines()]
    assert [line[0] for line in lines[2:]] == ["training[base-512]", "inference[base-1x128]"]
    assert dict(zip(lines[0], lines[2], strict=True)) == {
        "work": "training[base-512]",
        "HF eager": "110 ms (2.20x)",
        "HF sdpa, fastest backend": "80 ms (1.60x)",
        "HF sdpa, logits at labels only": "70 ms (1.40x)",
        "torch.compile": "-",
        "unpadded FlashAttention-2": "-",
        "unpadded varlen_attn": "60 ms (1.20x), no attention dropout",
        "fastbert": "50 ms",
        "tokens/s": "327680",
        "MFU": "50%",
        "peak memory, sdpa to fastbert": "80 MiB to 50 MiB",
    }
    assert "0.5 ms, with CUDA graphs" in models
    assert (
        "| ffn_fwd[large] | 0.5 ms | 0.4 ms | 0.8 ms * (pytorch) | 688 TFLOP/s | 87%, 95% of the bare products |" in ops
    )
    assert "| layernorm_fwd[large] | 0.1 ms | - | 0.4 ms * (pytorch) | 4000 GB/s | 93% |" in ops
    assert "call by call" in text
    for commit in ("old", "abc"):
        assert f"torch 2.11, triton 3.6, transformers 5.17, commit {commit}, " in text


def test_operations_alone(results: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "draw", lambda content, path: [])
    report.write(content("2026-01-01", [row("ffn_fwd[base]", 1e11, cuda=0.4)]), tmp_path / "gpu-a.json")
    assert results.gpu_tables(tmp_path).startswith("Models: not yet measured.\n\n| operation |")


def test_plots_of_all_results(results: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.write(content("2026-01-01", [row("ffn_fwd[base]", 1e11, cuda=0.4)]), tmp_path / "gpu-a.json")
    report.write(content("2026-01-02", [row("inference[base-512]", 1e12, fastbert=4)]), tmp_path / "gpu-b.json")
    text = results.gpu_tables(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["gpu-nvidia-h200-ops.png", "gpu-nvidia-h200.png"]
    assert "gpu-nvidia-h200.png)" in text
    assert "gpu-nvidia-h200-ops.png)" in text


def test_processors_of_one_name_are_told_apart_by_their_instruction_set(results: Any, tmp_path: Path) -> None:
    row = {"row": "base", "kind": "inference", "complete": True, "contestants": {"fastbert": {"median_s": 1.0}}}
    for time, isa in (("2026-01-01", "avx512"), ("2026-01-02", "avx2"), ("2026-01-03", "avx2")):
        content = {"command": "table", "time": time, "rows": [row]}
        content["machine"] = {"device": "AMD EPYC", "extension": {"isa": isa}}
        (tmp_path / f"{time}.json").write_text(json.dumps(content))
    found = results.newest(tmp_path)
    assert {name: rows["base"].path.stem for name, rows in found.items()} == {
        "AMD EPYC (avx2)": "2026-01-03",
        "AMD EPYC (avx512)": "2026-01-01",
    }
