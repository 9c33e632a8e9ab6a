"""What is told of machine code that touches the registers of a running wgmma, and of code that does not."""

from __future__ import annotations

import pytest
from fastbert.bench import wgmma

A_IN_REGISTERS = "HGMMA.64x16x16.F32.BF16 R24, R40, gdesc[UR8].tnspB, R24"
A_IN_SHARED = "HGMMA.64x16x16.F32.BF16 R48, gdesc[UR12], RZ, !UPT"
LAST_IN_REGISTERS, LAST_IN_SHARED = f"{A_IN_REGISTERS}, gsb0", f"{A_IN_SHARED}, gsb0"
WAIT, WAIT_BUT_ONE = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"


def listing(*lines: str) -> str:
    """As cuobjdump writes it: an address every sixteen bytes, the encoding as comments."""
    return "\n".join(
        f"        /*{16 * place:04x}*/  {line} ;  /* 0x000e220000001400 */\n  /* 0x01afea0003800000 */"
        for place, line in enumerate(lines)
    )


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param(["MOV R40, R1", LAST_IN_REGISTERS, WAIT, "MOV R40, R24"], id="waited for"),
        pytest.param([LAST_IN_REGISTERS, "FADD R1, R40, R41", "STS.128 [R2+0x10], R40", WAIT], id="A is read"),
        pytest.param([A_IN_REGISTERS, LAST_IN_REGISTERS, WAIT], id="one sum"),
        pytest.param([LAST_IN_REGISTERS, LAST_IN_SHARED, WAIT_BUT_ONE, "MOV R24, RZ"], id="all but one"),
        pytest.param([LAST_IN_REGISTERS, "ISETP.GE.AND P0, PT, R40, R3, PT", WAIT], id="a comparison"),
        pytest.param([LAST_IN_REGISTERS, "BAR.SYNC.DEFER_BLOCKING R40, 0x80", WAIT], id="a barrier"),
        pytest.param([LAST_IN_REGISTERS, "R2UR UR40, R41", "UMOV UR24, 0x1", WAIT], id="uniform registers"),
        pytest.param([LAST_IN_REGISTERS, "BRA 0x30", "MOV R40, RZ", WAIT], id="jumped over"),
        pytest.param([LAST_IN_REGISTERS, "EXIT", "MOV R40, RZ"], id="behind the end"),
        pytest.param(["MOV R40, RZ", LAST_IN_REGISTERS, WAIT, "@P0 BRA 0x0", "EXIT"], id="in a loop"),
    ],
)
def test_sound(lines: list[str]) -> None:
    assert wgmma.problems(listing(*lines)) == []


@pytest.mark.parametrize(
    ("lines", "place"),
    [
        pytest.param([LAST_IN_REGISTERS, "MOV R43, RZ", WAIT], 1, id="A is written"),
        pytest.param([LAST_IN_REGISTERS, "@P0 LDS.64 R42, [R1+0x10]", WAIT], 1, id="half of A"),
        pytest.param([LAST_IN_REGISTERS, "SHFL.BFLY PT, R41, R1, 0x1, 0x1f", WAIT], 1, id="behind predicates"),
        pytest.param([A_IN_REGISTERS, WAIT, "MOV R40, RZ", LAST_IN_SHARED], 2, id="not yet committed"),
        pytest.param([LAST_IN_REGISTERS, WAIT_BUT_ONE, "MOV R40, RZ", WAIT], 2, id="the one that is left"),
        pytest.param([LAST_IN_REGISTERS, "FADD R1, R31.reuse, R2", WAIT], 1, id="a sum is read"),
        pytest.param([LAST_IN_SHARED, "STG.E.64 desc[UR6][R2.64], R54", WAIT], 1, id="a sum is stored"),
        pytest.param([LAST_IN_SHARED, "LDG.E R3, desc[UR6][R48.64]", WAIT], 1, id="a sum as an address"),
        pytest.param([LAST_IN_SHARED, "HGMMA.64x8x16.F32 R56, R52, gdesc[UR8], R56, gsb0", WAIT], 1, id="a sum as A"),
        pytest.param([LAST_IN_REGISTERS, "HGMMA.64x32x16.F32 R32, gdesc[UR8], R32, gsb0", WAIT], 1, id="A as sums"),
        pytest.param([LAST_IN_REGISTERS, "@!P0 BRA 0x30", WAIT, "MOV R40, RZ", WAIT], 3, id="on one of two ways"),
        pytest.param([LAST_IN_REGISTERS, "BRA.U UP0, 0x30", WAIT, "MOV R40, RZ"], 3, id="a uniform condition"),
        pytest.param(["MOV R40, RZ", LAST_IN_REGISTERS, "@P0 BRA 0x0", WAIT], 0, id="in the next round"),
        pytest.param(
            [LAST_IN_REGISTERS, "CALL.REL.NOINC 0x40", WAIT, "EXIT", "MOV R40, RZ", "RET.REL.NODEC R2 0x0"],
            4,
            id="in a function",
        ),
    ],
)
def test_touched(lines: list[str], place: int) -> None:
    (problem,) = wgmma.problems(listing(*lines))
    assert f"touched 1 times, first by {lines[place]} at {16 * place:#x}, while HGMMA" in problem


def test_half_precision_takes_half_of_the_registers() -> None:
    product = "HGMMA.64x16x16.F16 R24, gdesc[UR8], RZ, !UPT, gsb0"
    assert wgmma.problems(listing(product, "MOV R27, RZ", WAIT))
    assert not wgmma.problems(listing(product, "MOV R28, RZ", WAIT))
