"""Every kernel, every dtype and all four targets, compiled without a GPU.

The tests compile the subset of `python -m benchmarks compile --quick`. The whole set takes minutes.
"""

import json

import pytest

from benchmarks import released
from sago.rules import RULES
from tests.support.backends import import_with_triton
from tests.support.processes import python

import_with_triton("triton")

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES = ("bf16/bf16", "fp16/fp16", "fp32/fp32", "fp64/fp64", "bf16/fp32", "fp32/bf16")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The record of the command, and the finished process."""
    file = tmp_path_factory.mktemp("compile") / "record.json"
    done = python("-m", "benchmarks", "compile", "--quick", "--json", file, check=False)
    assert file.exists(), done.stderr
    return json.loads(file.read_text()), done


@pytest.fixture(scope="module")
def broken():
    return json.loads(python("-m", "tests.support.broken_launches", "sm_90", "gfx942").stdout)


def rows(record, **labels):
    return [row for row in record["rows"] if labels.items() <= row.items()]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_whole_vectors_without_spills_or_fusion(quick, arch, dtypes):
    found = rows(quick[0], arch=arch, dtypes=dtypes)
    assert found
    for row in found:
        assert row["failures"] == [], row
        assert row["load_bytes"] >= 16, row
        assert row["vector_loads"] >= row["vector_loads_expected"] >= 2, row
        assert row["vector_stores"] >= row["vector_stores_expected"] >= (row["kernel"] == "combine"), row
        assert row["spill_bytes"] == row["fma"] == 0, row
        assert 0 < row["registers"] <= (512 if arch == "gfx942" else 255), row
        assert row["instructions"] is None if arch == "gfx942" else 5 < row["instructions"] < 100, row


def with_one_kernel():
    """The names of the rules, those with the same coefficients together."""
    names = {}
    for rule in map(RULES.get, released.RULES):
        names.setdefault(rule.coefficients, []).append(rule.name)
    return [", ".join(some) for some in names.values()]


def test_every_kernel_and_rule_is_there(quick):
    found = rows(quick[0], arch="sm_90", dtypes="bf16/bf16")
    longest = {("gram", None, 9, "aligned"), ("combine", "sago (propagate)", 9, "mixed")}
    assert {(row["kernel"], row["rule"], row["sums"], row["alignment"]) for row in found} == longest | {
        *(("combine", names, 0, "aligned") for names in with_one_kernel()),
        ("combine", "(torch)", 0, "aligned"),
        ("combine", "sum (propagate)", 0, "aligned"),
        ("combine", "sago (propagate)", 0, "aligned"),
        ("combine", "sago (floor)", 0, "aligned"),
        ("combine", "(torch) (propagate)", 0, "aligned"),
    }
    for arch in ARCHS:
        for dtypes in DTYPES:
            found = rows(quick[0], arch=arch, dtypes=dtypes)
            there = {(row["kernel"], row["rule"], row["sums"], row["alignment"]) for row in found}
            assert longest <= there


def test_the_command_reports_failures(quick):
    record, done = quick
    failed = sum(bool(row["failures"]) for row in record["rows"])
    assert done.returncode == (1 if failed else 0)
    assert f"{len(record['rows'])} configurations, {failed} with failures" in done.stdout
    assert len(done.stdout.splitlines()) == len(record["rows"]) + 3


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
@pytest.mark.parametrize(
    ("variant", "failures"),
    [
        ("shipped", []),
        ("fused", ["fused multiply-add"]),
        ("narrow block", ["narrow loads", "narrow stores"]),
        ("too many values a thread", ["spills"]),
    ],
)
def test_the_check_can_fail(broken, arch, variant, failures):
    assert broken[arch][variant]["failures"] == failures


SASS = """
        /*0000*/                   LDG.E.64 R2, desc[UR4][R2.64] ;    /* 0x01 */
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R20.64] ;  /* 0x02 */
        /*0020*/                   FADD R12, R7, R12 ;                /* 0x04 */
        /*0030*/                   LDG.E.U16 R4, desc[UR4][R24.64] ;  /* 0x05 */
        /*0040*/                   LDG.E R4, desc[UR4][R24.64] ;      /* 0x05 */
        /*0050*/                   BRA.U !UP0, 0x10 ;                 /* 0x07 */
        /*0060*/                   LDG.E.128.STRONG.GPU R4, desc[UR4][R20.64] ;     /* 0x08 */
        /*0070*/                   LDG.E.128.STRONG.GPU R8, desc[UR4][R20.64+16] ;  /* 0x09 */
        /*0080*/               @P0 BRA 0x60 ;                         /* 0x0a */
        /*0090*/                   EXIT ;                             /* 0x0b */
        /*00a0*/                   BRA 0xa0;                          /* 0x0c */
"""


def test_the_main_loop_is_the_one_that_loads_most_gradients():
    compile = import_with_triton("benchmarks.compile")
    assert compile.main_loop(SASS) == (5, 16 + 2 + 4)
