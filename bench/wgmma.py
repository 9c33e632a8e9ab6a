"""Whether machine code for sm_90 leaves the registers of its matrix products alone for as long as these run.

A wgmma (HGMMA in machine code) runs on while the program goes on. Until a wait (WARPGROUP.DEPBAR) that covers it, none
but a further product may touch its accumulators, and nothing may write the registers that its first operand, A, is in,
if that is not in shared memory (PTX ISA, "wgmma.mma_async"). Registers and the order of instructions are the work of
the assembler, and before CUDA 13.3 it is known to write registers of A too early (triton-lang/triton#9433 and #11781).
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
REGISTER = re.compile(r"\bR(\d+)\b")
PREDICATE = re.compile(r"!?U?P[\dTR]")
WRITES_NOTHING = re.compile(r"[A-Z]+SETP\d?|FCHK|R2P|BAR|BRX|CALL|NANOSLEEP|RET|WARPSYNC")
"""Instructions whose first register is one that they read. Stores begin with an address, in brackets."""

A_REGISTERS = 4
"""A has 64 rows of 32 bytes, by 128 threads: four registers a thread, whatever its type."""
GROUPS = 8
"""More groups than this need not be told apart: a wait can leave seven of them running."""


class Step(NamedTuple):
    """One instruction. named, written: the registers that stand in it, and that of them which it writes.

    Of several that are read or written as one only the first stands there. It lies at a multiple of their number, as
    accumulators and A do: whatever reaches into one of those names a register of it.

    accumulators, a: of a product. commits: whether it ends a group of products. leaves: of a wait, how many groups may
    still run after it. jumps: the address of another instruction that may be next. goes_on: whether that below may be.
    """

    address: int
    text: str
    named: frozenset[int]
    written: frozenset[int]
    accumulators: frozenset[int] = frozenset()
    a: frozenset[int] = frozenset()
    commits: bool = False
    leaves: int | None = None
    jumps: int | None = None
    goes_on: bool = True


def problems(body: str) -> list[str]:
    """What is wrong with a function, as cuobjdump lists it: at most one sentence, with the first place."""
    steps = list(_steps(body))
    found = [(product, step) for product in steps if product.accumulators for step in _too_early(product, steps)]
    if not found:
        return []
    product, step = found[0]
    first = f"{step.text} at {step.address:#x}, while {product.text} at {product.address:#x} runs"
    return [f"registers of running products are touched {len(found)} times, first by {first}"]


def _steps(body: str) -> Iterator[Step]:
    for address, condition, opcode, rest in LINE.findall(body):
        operands = [operand.strip() for operand in rest.split(",")]
        kind = opcode.partition(".")[0]
        named = frozenset(int(number) for number in REGISTER.findall(rest))
        step = Step(int(address, 16), f"{condition}{opcode} {rest}", named, _written(kind, operands))
        if kind.endswith("GMMA"):
            yield _product(step, opcode, operands)
        elif opcode.startswith("WARPGROUP.DEPBAR") and not condition:
            yield step._replace(leaves=int(operands[-1], 16))
        elif kind in ("BRA", "CALL"):  # what is called may return: products run on in it and behind it
            target = int(operands[-1], 16) if operands[-1].startswith("0x") else None
            yield step._replace(jumps=target, goes_on=bool(condition) or len(operands) > 1 or kind == "CALL")
        else:
            yield step._replace(goes_on=bool(condition) or kind not in ("EXIT", "RET", "BRX"))


def _written(kind: str, operands: Sequence[str]) -> frozenset[int]:
    """The register that an instruction writes: the first operand but for predicates, if it is a register."""
    if not WRITES_NOTHING.fullmatch(kind):
        for operand in operands:
            if found := REGISTER.match(operand):
                return frozenset([int(found[1])])
            if not PREDICATE.fullmatch(operand):
                break
    return frozenset()


def _product(step: Step, opcode: str, operands: Sequence[str]) -> Step:
    """As in "HGMMA.64x128x16.F32 R24, R180, gdesc[UR8].tnspB, R24, gsb0"."""
    _, shape, kind, *_ = opcode.split(".")
    count = int(shape.split("x")[1]) // (4 if kind == "F16" else 2)  # 64 rows by 128 threads
    first, second = (REGISTER.match(operand) for operand in operands[:2])
    accumulators = frozenset(range(int(first[1]), int(first[1]) + count)) if first else frozenset()
    a = frozenset(range(int(second[1]), int(second[1]) + A_REGISTERS)) if second else frozenset()
    return step._replace(written=accumulators, accumulators=accumulators, a=a, commits="gsb0" in operands)


def _too_early(product: Step, steps: Sequence[Step]) -> Iterator[Step]:
    """The instructions that touch registers of a product on some way to the wait for it."""
    places = {step.address: place for place, step in enumerate(steps)}
    # Where to go on, and how many groups have been committed by then, from the product's own on.
    ways = [(places[product.address] + 1, int(product.commits))]
    seen = set(ways)
    while ways:
        place, groups = ways.pop()
        if place >= len(steps):
            continue
        step = steps[place]
        if step.leaves is not None and groups > step.leaves:
            continue
        if _touches(step, product):
            yield step
            continue
        groups = min(groups + step.commits, GROUPS)
        following = [place + 1] if step.goes_on else []
        following += [places[step.jumps]] if step.jumps in places else []
        new = {(place, groups) for place in following} - seen
        seen |= new
        ways += new


def _touches(step: Step, product: Step) -> bool:
    if not product.a.isdisjoint(step.written):
        return True
    if step.accumulators == product.accumulators:  # products run in turn: a further one may add to the same
        return not product.accumulators.isdisjoint(step.a)
    return not product.accumulators.isdisjoint(step.named | step.written | step.a)
