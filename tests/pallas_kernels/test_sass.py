"""Reading machine code: small programs in nvdisasm's format, whose loops and waits are plain to see."""

import pytest

from pallas_kernels.hopper_cost import round_cost
from pallas_kernels.sass import Sass


def sass(*lines: str) -> Sass:
    """Labels end in a colon; everything else is an instruction, at addresses 16 bytes apart."""
    text = ["\t.section\t.text.kernel"]
    address = 0
    for line in lines:
        if line.endswith(":"):
            text.append(line)
        else:
            text.append(f"   -:-:-:Y:01        /*{address:04x}*/                   {line} ;")
            address += 16
    return Sass("\n".join(text))


MATMUL = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24"
GROUP = f"{MATMUL}, gsb0"
WAIT, WAIT_BUT_ONE = (f"WARPGROUP.DEPBAR.LE gsb0, 0x{n}" for n in (0, 1))
ARRIVE = "SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR9], RZ"
EXPECT_BYTES = "SYNCS.ARRIVE.TRANS64 RZ, [UR9], R4"
WRITE, FENCE, STORE = "STS [R4], R5", "FENCE.VIEW.ASYNC.S", "UTMASTG.3D [UR4], [UR16]"
STORED = "DEPBAR.LE SB0, 0x0"


def test_instructions():
    program = sass("MOV R1, c[0x0][0x28]", "@!P1 BRA `(.L_x_1)", ".L_x_1:", "EXIT")
    move, branch, end = program.instructions
    assert (move.address, move.opcode, move.operands, move.predicate) == (0, "MOV", "R1, c[0x0][0x28]", None)
    assert (branch.address, branch.base, branch.predicate, branch.target) == (16, "BRA", "!P1", ".L_x_1")
    assert (end.opcode, end.operands) == ("EXIT", "")
    assert program.count("MOV", "EXIT") == 2
    assert program.registers == 2


def test_what_is_no_machine_code():
    with pytest.raises(ValueError, match="nvdisasm"):
        _ = Sass("nothing").instructions


def test_a_jump_to_nowhere():
    with pytest.raises(ValueError, match=r"expected a jump to a label, got .*L_x_7"):
        _ = sass("BRA `(.L_x_7)", "EXIT").blocks


def test_register_limits():
    program = sass("USETMAXREG.DEALLOC.CTAPOOL 0x18", "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0", "EXIT")
    assert program.register_limits == (24, 240)


def test_blocks_follow_jumps():
    blocks = sass("@P0 BRA `(.L_x_1)", "NOP", "EXIT", ".L_x_1:", "BRA `(.L_x_1)").blocks
    assert [block.successors for block in blocks] == [(2, 1), (), (2,)]


def test_the_inner_loop_and_its_ways():
    (loop,) = sass(
        "MOV R1, R2",
        ".L_x_0:",
        "NOP",
        ".L_x_1:",  # the inner loop
        "@P2 BRA `(.L_x_5)",  # a round without matmuls
        GROUP,
        "@P0 BRA `(.L_x_2)",  # a tile without masks
        "FSEL R4, R4, R5, P0",
        "FSEL R6, R6, R5, P0",
        ".L_x_2:",
        "FADD R4, R4, R4",
        ".L_x_5:",
        "@P1 BRA `(.L_x_1)",
        "@P3 BRA `(.L_x_0)",
        "EXIT",
    ).inner_loops
    assert [i.base for i in loop.shortest()] == ["BRA", "HGMMA", "BRA", "FADD", "BRA"]
    assert [i.base for i in loop.longest()] == ["BRA", "HGMMA", "BRA", "FSEL", "FSEL", "FADD", "BRA"]


def test_no_loop_without_matmuls():
    assert sass(".L_x_0:", "@P0 BRA `(.L_x_0)", "EXIT").inner_loops == []


@pytest.mark.parametrize(
    ("lines", "pending"),
    [
        ((GROUP, WAIT, ARRIVE), 0),
        ((GROUP, ARRIVE), 1),
        ((MATMUL, MATMUL, GROUP, GROUP, ARRIVE), 2),
        ((GROUP, MATMUL, ARRIVE), 2),  # the second group has not ended
        ((GROUP, GROUP, WAIT_BUT_ONE, ARRIVE), 1),
        ((GROUP, f"@P0 {WAIT}", ARRIVE), 1),  # a wait that may be skipped
        ((GROUP, "@P0 BRA `(.L_x_0)", WAIT, ".L_x_0:", ARRIVE), 1),  # or jumped over
    ],
)
def test_groups_pending_where_memory_is_freed(lines: tuple[str, ...], pending: int):
    program = sass(*lines, "EXIT")
    assert [count for _, count in program.pending_at_arrivals()] == [pending]
    assert len(program.findings()) == (pending > 0)
    assert program.findings(pending) == []


def test_groups_pending_from_the_round_before():
    program = sass(".L_x_0:", WAIT_BUT_ONE, ARRIVE, GROUP, GROUP, "@P0 BRA `(.L_x_0)", WAIT, "EXIT")
    assert [count for _, count in program.pending_at_arrivals()] == [1]


def test_a_loop_that_never_waits():
    program = sass(".L_x_0:", GROUP, ARRIVE, "@P0 BRA `(.L_x_0)", "EXIT")
    ((_, pending),) = program.pending_at_arrivals()
    assert pending > 8


def test_announcing_bytes_frees_nothing():
    assert sass(GROUP, EXPECT_BYTES, "EXIT").pending_at_arrivals() == []


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ((WRITE, FENCE, STORE, STORED), []),
        ((WRITE, STORE, STORED), ["no fence"]),
        ((FENCE, WRITE, STORE, STORED), ["no fence"]),
        ((WRITE, FENCE, STORE), ["no wait"]),
        ((STORED, STORE), ["no wait"]),
        ((STORE, "DEPBAR.LE SB0, 0x1"), ["no wait"]),
    ],
)
def test_tma_stores(lines: tuple[str, ...], found: list[str]):
    findings = sass(*lines, "EXIT").findings()
    assert [finding[: len(start)] for finding, start in zip(findings, found, strict=True)] == found


def test_the_cost_of_a_round():
    cost = round_cost(sass(GROUP, "MUFU.EX2 R4, R4", "FFMA R4, R4, R5, R6", "FMNMX R4, R4, R5, !PT").instructions)
    # 2 * 64 * 128 * 16 FLOP at 4,096 a cycle; 32 threads at 4, 32 and 16 results a cycle.
    assert (cost.tensor, cost.issue, cost.special, cost.fma, cost.alu) == (64, 4, 8, 1, 2)
    assert cost.shared == (64 * 16 + 16 * 128) * 2 / 128  # both operands, 128 bytes a cycle
    assert cost.bound(warpgroups=1) == pytest.approx(64 / 72)
    assert cost.bound(warpgroups=2) == 1


def test_a_left_operand_in_registers_is_not_read_from_shared_memory():
    instructions = sass("HGMMA.64x64x16.F32.BF16 R120, R24, gdesc[UR16].tnspB, R120").instructions
    assert round_cost(instructions).shared == 16 * 64 * 2 / 128


def test_a_round_that_the_tensor_cores_wait_for():
    cost = round_cost(sass(GROUP, *["MUFU.EX2 R4, R4"] * 16).instructions)
    assert cost.bound(warpgroups=3) == 64 / 128
