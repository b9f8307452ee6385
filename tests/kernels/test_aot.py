"""Every Triton kernel compiles for GPUs that are not here; its machine code keeps its budget."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import aot

ROOT = Path(__file__).parents[2]
CODE = """
.L_x_0:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/              @!P0 LDG.E.128 R4, [R2.64] ;
        /*0020*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0030*/              @!P1 BRA `(.L_x_1) ;
        /*0040*/                   STL [R1], R8 ;
        /*0050*/                   EXIT ;
"""


@pytest.mark.parametrize("name", sorted(aot.compiled_classes()))
def test_every_build_compiles_and_its_code_has_no_fault(name):
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "kernels.aot", name],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) >= len(aot.TARGETS), done.stdout


def test_machine_code_is_read():
    code = aot.read_code(CODE)
    assert len(code.instructions) == 6
    assert len(code.loop) == 3
    assert (code.spills, code.wide_loads, code.multiplies("HMMA|HGMMA")) == (1, 1, 1)
    build = aot.Build("b", None, {}, {}, warps=1, per_pass=32, budget=3, tensor_core="HMMA")
    assert code.per_weight(build) == 3
    assert aot.faults(build, code, 90) == ["1 loads and stores of spilled registers"]


WAITS = """
.L_x_1:
        /*0000*/                   SYNCS.PHASECHK.TRYWAIT P0, [R1] ;
        /*0010*/              @!P0 BRA `(.L_x_3) ;
.L_x_2:
        /*0020*/                   LDG.E.128 R4, [R2.64] ;
        /*0030*/                   BRA.U UP0, `(.L_x_4) ;
        /*0040*/                   FADD R1, R2, R3 ;
.L_x_4:
        /*0050*/              @!P1 BRA `(.L_x_1) ;
        /*0060*/                   STG [R1], R8 ;
        /*0070*/                   STG [R1], R8 ;
        /*0080*/                   EXIT ;
.L_x_3:
        /*0090*/                   SYNCS.PHASECHK.TRYWAIT P0, [R1] ;
        /*00a0*/              @!P0 BRA `(.L_x_3) ;
        /*00b0*/                   BRA `(.L_x_2) ;
.L_x_5:
        /*00c0*/                   BRA `(.L_x_5) ;
"""


def test_a_wait_past_the_end_belongs_to_its_loop_and_what_lies_between_does_not():
    code = aot.read_code(WAITS)
    assert len(code.instructions) == 13
    assert len(code.loop) == 6 + 3
    assert not any(i.startswith(("STG", "EXIT")) for i in code.loop)
    before = WAITS.replace("@!P1 BRA `(.L_x_1)", "NOP")  # a wait ahead of no loop
    assert len(aot.read_code(before).loop) == 2


def test_faults_name_what_is_missing():
    code = aot.Code(("FADD R1, R2, R3", "BRA x"), ("FADD R1, R2, R3", "BRA x"))
    build = aot.Build("b", None, {}, {}, warps=4, per_pass=16, budget=3, tensor_core="HMMA")
    assert aot.faults(build, code, 90) == [
        "no tensor-core instruction HMMA",
        "no 16-byte load in its loop",
        "16.00 instructions per weight, 3 with a tenth allowed",
    ]
    assert len(aot.faults(build, code, 80)) == 2  # budgets were counted on sm_90
    greedy = aot.Code(("EXIT",), (), shared_bytes=200_000)
    plain = aot.Build("b", None, {}, {})
    assert aot.faults(plain, greedy, 90) == []
    assert aot.faults(plain, greedy, 80) == ["200000 bytes of shared memory, 166912 there are"]
