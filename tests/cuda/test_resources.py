"""What the assembler made of every CUDA kernel, for every GPU it was built for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from fastbert.bench import cuda_resources, kernels, wgmma

from fastbert import dispatch

pytestmark = pytest.mark.skipif(dispatch.cuda_error is not None, reason=str(dispatch.cuda_error))


@pytest.fixture(scope="module")
def built() -> dict:
    return cuda_resources.collect(cuda_resources.reports())


@pytest.fixture(scope="module")
def code_sm90() -> dict[Path, dict[str, str]]:
    """The machine code of the kernels for sm_90a alone: file -> function -> listing."""
    pytest.importorskip("triton", reason="its package has cuobjdump")
    tools = kernels.triton_tools()
    objects = sorted((cuda_resources.ROOT / "build").glob("ext-*/cuda/*_sm90.o"))
    return {file: kernels.listings(file, tools) for file in objects}


def test_no_kernel_spills(built: dict) -> None:
    """Nor has a stack: a register array that is indexed at run time would be there."""
    assert built["kernels"]
    spilling = {
        f"{name} {arch}": entry
        for name, archs in built["kernels"].items()
        for arch, entry in archs.items()
        if entry["spills"] or entry["stack"]
    }
    assert not spilling


def test_shared_memory_is_all_dynamic() -> None:
    """Launches allow a kernel as much of it as a block can have, which leaves nothing for any that is static."""
    assert not [file.name for file in cuda_resources.reports() if "bytes smem" in file.read_text()]


def test_wgmma_is_not_serialized() -> None:
    """Which the assembler does, and says, where it cannot see the whole of a pipeline of them."""
    assert not [file.name for file in cuda_resources.reports() if "instructions are serialized" in file.read_text()]


def test_registers_change_hands() -> None:
    """Which the assembler leaves out, and says so, where it cannot tell how many a kernel has at first."""
    assert not [file.name for file in cuda_resources.reports() if "setmaxnreg" in file.read_text()]


@pytest.mark.parametrize(
    ("direction", "opcodes"),
    [("fwd", {"HGMMA", "UTMALDG", "USETMAXREG"}), ("bwd", {"HGMMA", "UTMALDG", "USETMAXREG", "STSM", "REDG"})],
)
def test_attention_for_sm_90_is_made_of_wgmma_and_tma(
    direction: str, opcodes: set[str], code_sm90: dict[Path, dict[str, str]]
) -> None:
    kernel = f"attention_{direction}_sm90"
    note = json.loads((cuda_resources.ROOT / "fastbert" / "_build.json").read_text(encoding="utf-8"))
    codes = [code for file, code in code_sm90.items() if file.stem == kernel]
    assert bool(codes) == could_have(note, f"{kernel}_kernel")
    for code in codes:
        functions = {name: text for name, text in code.items() if f"{kernel}_kernel" in name}
        assert functions
        for name, text in functions.items():
            first = {opcode.split(".")[0] for opcode in kernels.instructions(text)}
            assert first >= opcodes, name
            assert not first & {"HMMA", "LDL", "STL"}, name


def test_ffn_for_sm_90_is_made_of_wgmma_and_tma(code_sm90: dict[Path, dict[str, str]]) -> None:
    for code in (code for file, code in code_sm90.items() if file.stem == "ffn_sm90"):
        assert code
        for name, text in code.items():
            found = {opcode.split(".")[0] for opcode in kernels.instructions(text)}
            assert found >= {"HGMMA", "UTMALDG", "USETMAXREG"}, name
            assert not found & {"HMMA", "LDL", "STL"}, name


def test_the_softmax_runs_under_the_product_with_the_values(code_sm90: dict[Path, dict[str, str]]) -> None:
    """The wait for the product comes behind the exponentials, where the assembler has not moved it up."""
    code = [item for file, found in code_sm90.items() if file.stem == "attention_fwd_sm90" for item in found.items()]
    for name, text in code:
        found = re.findall(r"MUFU\.EX2|WARPGROUP\.DEPBAR\.LE gsb0, 0x[01]", text)
        behind_scores = found[found.index("WARPGROUP.DEPBAR.LE gsb0, 0x1") + 1 :]
        assert behind_scores.index("WARPGROUP.DEPBAR.LE gsb0, 0x0") >= 60, name


def test_registers_of_wgmma_are_left_alone_until_it_is_waited_for(code_sm90: dict[Path, dict[str, str]]) -> None:
    found = {name: wgmma.problems(text) for code in code_sm90.values() for name, text in code.items()}
    assert not {name: problems for name, problems in found.items() if problems}


def could_have(note: dict, name: str) -> bool:
    """Whether a build has this kernel: not all can be built everywhere."""
    if (name.startswith("ffn_") or "_sm90_" in name) and not note["cutlass"]:
        return False
    return "_sm90_" not in name or any(arch.startswith("90") for arch in note["cuda_archs"])


def test_the_kept_table_is_that_of_this_build(built: dict) -> None:
    kept = json.loads(cuda_resources.TABLE.read_text(encoding="utf-8"))
    note = json.loads((cuda_resources.ROOT / "fastbert" / "_build.json").read_text(encoding="utf-8"))
    expected = [name for name in kept["kernels"] if could_have(note, name)]
    assert expected == list(built["kernels"]), "`make kernel-tables` writes the table"
    if kept["nvcc"] != built["nvcc"]:
        return  # another compiler gives other numbers
    for name, archs in built["kernels"].items():
        for arch in archs.keys() & kept["kernels"][name].keys():
            assert archs[arch] == kept["kernels"][name][arch], f"{name} {arch}: `make kernel-tables` writes the table"
