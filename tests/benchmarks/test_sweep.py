"""What is read off compiled code: loads in flight, instructions, resident blocks; the code of experiments."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.backends import import_with_triton

import_with_triton("triton")
sweep = pytest.importorskip("benchmarks.experiments.sweep")

ROOT = Path(__file__).resolve().parents[2]
SASS = """
        /*0000*/                   LDG.E.64 R2, desc[UR4][R2.64] ;    /* 0x01 */
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R20.64] ;  /* 0x02 */
        /*0020*/              @!P0 LDG.E.128 R8, desc[UR4][R22.64] ;  /* 0x03 */
        /*0030*/                   FADD R12, R7, R12 ;                /* 0x04 */
        /*0040*/                   LDG.E.U16 R4, desc[UR4][R24.64] ;  /* 0x05 */
        /*0050*/                   FADD R12, R11, R4 ;                /* 0x06 */
        /*0060*/                   BRA.U !UP0, 0x10 ;                 /* 0x07 */
        /*0070*/                   LDG.E.128.STRONG.GPU R4, desc[UR4][R20.64] ;  /* 0x08 */
        /*0080*/                   LDG.E.128.STRONG.GPU R8, desc[UR4][R20.64+16] ;  /* 0x09 */
        /*0090*/                   LDG.E.128.STRONG.GPU R8, desc[UR4][R20.64+32] ;  /* 0x09 */
        /*00a0*/               @P0 BRA 0x70 ;                         /* 0x0a */
        /*00b0*/                   EXIT ;                             /* 0x0b */
        /*00c0*/                   BRA 0xc0;                          /* 0x0c */
"""


def test_the_loop_that_streams():
    """Two loads of 16 bytes before the first is needed; then one of 2 beside the second of them."""
    assert sweep.loop(SASS) == (6, 34, 32)


def test_a_load_that_is_used_at_once_has_no_company():
    used_at_once = SASS.replace("FADD R12, R7, R12", "NOP").replace(
        "LDG.E.128 R8, desc[UR4][R22.64]", "LDG.E.128 R8, desc[UR4][R6.64]"
    )
    assert sweep.loop(used_at_once) == (6, 34, 18)


@pytest.mark.parametrize(
    ("registers", "threads", "blocks"),
    [
        (32, 256, 8),
        (33, 256, 6),
        (40, 256, 6),
        (64, 256, 4),
        (65, 256, 3),
        (255, 256, 1),
        (16, 32, 32),
        (32, 128, 16),
    ],
)
def test_resident_blocks(registers, threads, blocks):
    assert sweep.resident(registers, threads) == blocks


def python(code: str) -> object:
    """In a process of its own: these tests run with Triton's interpreter, which compiles nothing."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_experiments_compile_to_whole_vectors_without_spills():
    rows = python(
        "import json, torch; from benchmarks.experiments import code;"
        "print(json.dumps(code.run(['sm_90'], [torch.bfloat16])['rows']))"
    )
    assert {row["phase"] for row in rows} == {"reduce", "combine", "both", "resident"}
    for row in rows:
        assert row["failures"] == "", row
        assert row["spill_bytes"] == row["fma"] == 0, row
        assert row["load_bytes"] == 16, row


def test_a_configuration():
    found = python(
        "import json; from benchmarks.experiments import sweep;"
        "launch = next(x for x in sweep.chosen('sm_90', ['combine']) if x.labels['rule'] == 'sum');"
        "print(json.dumps([sweep.inspect(launch, 'sm_90', *c) for c in ((2048, 256), (1024, 512))]))"
    )
    shipped, narrow = found
    assert shipped["failures"] == []
    assert shipped["kib_in_flight"] * 1024 == shipped["blocks_per_sm"] * 256 * 32
    assert shipped["instructions"] > 3
    assert narrow["failures"] == ["narrow loads", "narrow stores"]
