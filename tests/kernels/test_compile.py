"""Every Triton kernel, in every configuration that can be chosen, compiled for sm_80, sm_90 and sm_100 without a GPU.

The whole table takes minutes and carries the marker `kernels` (`make kernels`); that the check finds fault where there
is some is tested always. Compiling is the work of other processes: in this one the kernels are interpreted.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fastbert.bench import cli, kernels

from fastbert import dispatch

pytest.importorskip("triton", reason="there are no Triton kernels without triton")

HERE = Path(__file__).resolve().parent
COMMITTED = HERE.parents[1] / "bench" / "results" / "kernels-triton.json"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


def name(row: dict[str, Any]) -> str:
    return f"{row['op']}: {row['kernel']} {row['case']} sm_{row['arch']}"


def code_with(registers: int) -> kernels.Code:
    nothing = dict.fromkeys(("stack", "shared", "local", "loads", "loads_128", "stores", "stores_128"), 0)
    return kernels.Code(registers=registers, matrix={}, serialized=False, touched=[], **nothing)


@pytest.fixture(scope="module")
def broken() -> dict[str, dict[str, Any]]:
    """The rows of broken_kernels.py for sm_90, by case."""
    program = (
        "import json\nfrom fastbert.bench import kernels\n"
        "if __name__ == '__main__':\n"
        "    print(json.dumps(kernels.compile_all(kernels.tasks('broken_kernels', 90), jobs=1)))\n"
    )
    done = run("-c", program)
    assert done.returncode == 0, done.stderr
    return {row["case"]: row for row in json.loads(done.stdout)}


class TestCheck:
    def test_a_sound_kernel(self, broken):
        row = broken["sound"]
        assert row["problems"] == []
        assert row["matrix"]["HGMMA"] > 0
        assert 0 < row["registers"] <= 255
        assert row["stack"] == row["local"] == 0
        assert row["shared"] >= 2 * 2 * 64 * 64 * 2  # two stages of two tiles in bf16
        assert row["loads_128"] == row["loads"] > 0

    @pytest.mark.parametrize(
        ("case", "problem"),
        [
            ("spills", "spills: "),
            ("two-warps", "multiplies matrices without HGMMA"),
            ("too-much-shared", "sm_90 has 232448"),
            ("no-power-of-two", "does not compile: CompilationError"),
            ("crashes", "does not compile: the compiler crashed"),
        ],
    )
    def test_finds(self, broken, case, problem):
        assert any(problem in found for found in broken[case]["problems"]), broken[case]

    @pytest.mark.parametrize("arch", [80, 90, 100])
    def test_finds_a_trap_in_place_of_a_matrix_kernel(self, arch):
        assert len(kernels.problems(code_with(registers=4), arch, shared=1024, warps=4, matrix=True)) == 1
        assert not kernels.problems(code_with(registers=4), arch, shared=1024, warps=4, matrix=False)

    @pytest.mark.parametrize(
        ("registers", "shared", "held"),
        [(128, 98304, 2), (129, 98304, 1), (128, 120000, 1), (40, 1024, 6), (32, 0, 8)],
    )
    def test_counts_the_programs_that_a_multiprocessor_holds(self, registers, shared, held):
        """65536 registers and 228 KiB on sm_90; at most 64 warps, of which a program has eight here."""
        code = code_with(registers)
        assert kernels.resident(code, 90, shared, warps=8) == held
        lonely = kernels.problems(code, 90, shared, warps=8, matrix=False, together=held + 1)
        assert lonely == [f"a multiprocessor holds {held} of the {held + 1} programs that work side by side"]
        assert not kernels.problems(code, 90, shared, warps=8, matrix=False, together=held)

    def test_registers_that_are_touched_too_early_are_a_problem(self):
        code = code_with(registers=4)._replace(matrix={"HGMMA": 1}, touched=["x"])
        assert kernels.problems(code, 90, shared=1024, warps=4, matrix=True) == ["x"]

    def test_a_crash_takes_no_other_case_along(self, broken):
        assert len(broken) == 6


def test_wrong_arguments():
    """In a process of its own: once imported for compiling, kernels are not interpreted any more."""
    wrong = {
        ("--arch", "75"): "--arch has '75'; it may have: 80, 90, 100",
        ("--op", "nothing"): "--op has 'nothing'; it may have: ",
        ("--jobs", "0"): "--jobs is 0; it must be 1 or more",
    }
    program = f"from fastbert.bench import cli\nprint([cli.main(['kernels', *words]) for words in {list(wrong)}])"
    done = run("-c", program)
    assert done.stdout.strip() == "[2, 2, 2]", done.stderr
    for line, message in zip(done.stderr.strip().splitlines(), wrong.values(), strict=True):
        assert message in line


def test_interpreted_kernels_are_not_compiled(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert cli.main(["kernels"]) == 2
    assert "TRITON_INTERPRET=1 is set" in capsys.readouterr().err


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("kernels")
    done = run("-m", "fastbert.bench", "kernels", "--output", str(folder))
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return json.loads((folder / COMMITTED.name).read_text(encoding="utf-8"))


@pytest.mark.kernels
class TestTable:
    def test_every_kernel_is_as_it_should_be(self, compiled):
        bad = [f"{name(row)}: {problem}" for row in compiled["rows"] for problem in row["problems"]]
        assert not bad, "\n".join(bad)

    def test_every_op_is_there(self, compiled):
        for op in dispatch.OPS:
            importlib.import_module(f"fastbert.ops.{op}")
        ops = {op for op in dispatch.OPS if dispatch.missing_leaf(f"{op}_fwd_triton") is None}
        assert {row["op"] for row in compiled["rows"]} >= ops

    def test_committed_table_is_of_these_kernels(self, compiled):
        """The numbers too, where the same compilers made them."""
        committed = json.loads(COMMITTED.read_text(encoding="utf-8"))
        advice = "run `fastbert bench kernels` and commit bench/results/kernels-triton.json"
        assert [name(row) for row in committed["rows"]] == [name(row) for row in compiled["rows"]], advice
        if committed["versions"] == compiled["versions"]:
            changed = [name(a) for a, b in zip(committed["rows"], compiled["rows"], strict=True) if a != b]
            assert not changed, f"{advice}: {', '.join(changed)}"


@pytest.mark.kernels
def test_models_launch_every_kernel():
    """With arguments that compile, in a process that does not interpret them, to code without a problem."""
    program = str(HERE / "launch_without_gpu.py")
    done = subprocess.run(
        [sys.executable, program, "90"], env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not {kernel: problems for kernel, problems in found.items() if problems}
    committed = json.loads(COMMITTED.read_text(encoding="utf-8"))
    assert found.keys() == {row["kernel"] for row in committed["rows"]}
