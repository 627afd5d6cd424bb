"""The host cost of a call, in calls of functions: without a GPU, on a stub of its driver."""

import json

import pytest

from tests.support.backends import import_with_triton
from tests.support.processes import need_stub_driver, python

import_with_triton("triton")
need_stub_driver()

# Calls for an elementwise rule. Buckets also look for gradients that other code has moved.
LIMITS = {"plan": 100, "list": 150, "buckets": 165}
GRAM = 40  # more calls for the second launch


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("host") / "record.json"
    python("-m", "benchmarks", "host", "--pairs", 3, 291, "--repeats", 2, "--json", file)
    return json.loads(file.read_text())["rows"]


def test_the_number_of_calls_does_not_depend_on_the_number_of_tensors(rows):
    few, many = ([r for r in rows if r["pairs"] == n] for n in (3, 291))
    assert len(few) == len(many) == 12
    for a, b in zip(few, many, strict=True):
        assert a["calls"] == b["calls"], a


def test_calls_and_launches_are_few(rows):
    for row in rows:
        gram = row["rule"] == "pcgrad"
        assert 30 < row["calls"] <= LIMITS[row["entry"]] + GRAM * gram, row
        assert row["launches"] == 1 + gram, row
        assert (row["met"] is None) == (row["target"] is None) == (row["pairs"] == 3), row
