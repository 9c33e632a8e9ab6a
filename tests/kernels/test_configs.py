"""Launch configurations: the tables of the package, the measured table of a card, and how one is found."""

import json

import pytest
import torch
from fastbert.bench import gpu_rows, runner, tune

from fastbert import __version__, dispatch
from fastbert.kernels import configs

GOOD = {"layernorm_fwd": {"256": {"BLOCK_M": 4, "num_warps": 2}}}


@pytest.fixture
def user_file(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTBERT_CONFIGS", str(tmp_path))
    path = configs.user_file("NVIDIA H100 80GB HBM3")
    assert path == tmp_path / "nvidia-h100-80gb-hbm3.json"
    return path


class TestUserFile:
    def test_is_read(self, user_file):
        user_file.write_text(json.dumps({"fastbert": __version__, "kernels": GOOD}))
        assert configs.read_user_file(user_file) == GOOD

    def test_there_is_none(self, user_file):
        assert configs.read_user_file(user_file) == {}

    def test_of_another_version_is_not_used(self, user_file):
        user_file.write_text(json.dumps({"fastbert": "0.0.0", "kernels": GOOD}))
        assert configs.read_user_file(user_file) == {}

    @pytest.mark.parametrize(
        "text",
        [
            "{",
            "[]",
            json.dumps({"kernels": GOOD}),
            json.dumps({"fastbert": __version__, "kernels": {"layernorm_fwd": {"256": {"BLOCK_M": "4"}}}}),
            json.dumps({"fastbert": __version__, "kernels": {"layernorm_fwd": {"256": {"BLOCK_M": 0}}}}),
        ],
    )
    def test_that_is_broken(self, user_file, text):
        user_file.write_text(text)
        with pytest.raises(ValueError, match=r"nvidia-h100-80gb-hbm3.json holds no table .* let `fastbert bench tune`"):
            configs.read_user_file(user_file)


def test_tables_agree_in_their_keys():
    """A kernel is launched on every architecture, with the same arguments. The first may lack short attention kernels:
    the long ones run in their place."""
    first = configs.table(configs.ARCHITECTURES[0])
    for arch in configs.ARCHITECTURES[1:]:
        table = configs.table(arch)
        assert table.keys() == first.keys()
        for kernel, classes in table.items():
            lacking = classes.keys() ^ first[kernel].keys()
            assert not lacking or (kernel.endswith("_short") and lacking < classes.keys()), f"{kernel}: {lacking}"
            for shape_class in classes.keys() & first[kernel].keys():
                assert classes[shape_class].keys() == first[kernel][shape_class].keys(), f"{kernel} {shape_class}"


class TestSearch:
    def test_neighbours(self):
        found = tune.neighbours({"BLOCK_M": 64, "num_warps": 32, "num_stages": 1})
        assert found == [
            {"BLOCK_M": 32, "num_warps": 32, "num_stages": 1},
            {"BLOCK_M": 128, "num_warps": 32, "num_stages": 1},
            {"BLOCK_M": 64, "num_warps": 16, "num_stages": 1},
            {"BLOCK_M": 64, "num_warps": 32, "num_stages": 2},
            {"BLOCK_M": 32, "num_warps": 16, "num_stages": 1},
        ]

    def test_a_tile_and_its_warps_change_together(self):
        found = tune.neighbours({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 4})
        both = [[candidate[key] for key in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps")] for candidate in found[8:]]
        assert both == [[32, 32, 64, 2], [128, 32, 64, 8], [64, 16, 64, 2], [64, 64, 64, 8]]

    def test_goes_past_two_steps_that_are_slower_each_alone(self):
        def ask(do, seconds, *, config, **rest):
            return {"seconds": abs(config["BLOCK_M"] / config["num_warps"] - 16) + 100 / config["BLOCK_M"]}

        found = tune.search(ask, "row", "kernel", "class", {"BLOCK_M": 32, "num_warps": 2})
        assert found["config"] == {"BLOCK_M": 512, "num_warps": 32}

    def test_goes_to_the_best_past_what_fails(self):
        def ask(do, seconds, *, config, **rest):
            if config["num_warps"] > 8:
                raise runner.WorkerError("too many")
            return {"seconds": abs(config["BLOCK_M"] - 256) + 100 / config["num_warps"]}

        found = tune.search(ask, "row", "kernel", "class", {"BLOCK_M": 32, "num_warps": 4})
        assert found["config"] == {"BLOCK_M": 256, "num_warps": 8}
        assert found["before"] == 224 + 25
        assert found["seconds"] == 100 / 8

    def test_a_start_that_fails(self):
        def ask(do, seconds, **rest):
            raise runner.WorkerError("no")

        with pytest.raises(runner.WorkerError):
            tune.search(ask, "row", "kernel", "class", {"BLOCK_M": 32})


@pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter")
def test_a_kernel_is_tuned_in_the_interpreter():
    """What a kernel asks for is found, changed, and judged: the numbers stay right, and a bad argument is an error."""
    triton = dispatch.describe("cpu", torch.bfloat16, ops=("layernorm",))["layernorm"]["rejected"].get("triton", "")
    if not triton.startswith("not needed"):
        pytest.skip(triton)
    shape = {"hidden": 32, "intermediate": 64, "heads": 2, "vocab": 50, "lengths": [7, 1, 5]}
    row = "layernorm_fwd[tiny]"
    tuner = tune.Tuner("cpu", {row: lambda: gpu_rows.op_row("layernorm", "fwd", "tiny", shape, device="cpu")})
    try:
        ((kernel, shape_class, config),) = tuner.asked(row)["asked"]
        assert kernel == "layernorm_fwd"
        changed = config | {"BLOCK_M": config["BLOCK_M"] * 2}
        assert tuner.attempt(row, kernel, shape_class, changed)["seconds"] > 0
        assert configs.describe("cpu")["used"][f"{kernel} {shape_class}"] == changed
        with pytest.raises(Exception, match="power of 2|BLOCK_M"):
            tuner.attempt(row, kernel, shape_class, config | {"BLOCK_M": 3})
    finally:
        tuner._forget()
        configs.table.cache_clear()
        configs.choose.cache_clear()
        configs.used.clear()
