"""What reaches the driver: the first launch of a kind and the ones after it, without a GPU.

`tests.support.launched` says what is launched, and runs in a process of its own.
"""

import ast
import json

import pytest

from tests.support.backends import GRAM, import_with_triton
from tests.support.processes import ROOT, need_stub_driver, python

import_with_triton("triton")
need_stub_driver()


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The launches of every case, each a `benchmarks.driver.Launch`, cold and warm."""
    cache, folder = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("driver")
    return json.loads(python("-m", "tests.support.launched", folder, TRITON_CACHE_DIR=str(cache)).stdout)


def parameters(launch):
    return launch[5]


def program(launch):
    return [*launch[:5], *launch[6:]]


@pytest.mark.parametrize("state", ["cold", "warm"])
def test_the_second_launch_is_the_first(launched, state):
    for name, case in launched[state].items():
        assert case["second"] == case["first"], name


def test_the_dispatch_of_triton_launches_the_same(launched):
    for name, case in launched["dispatched"].items():
        for attempt in ("first", "second"):
            found, expected = case[attempt], launched["warm"][name]["first"]
            assert [program(x) for x in found] == [program(x) for x in expected], name
            assert set(case["expected"]) <= set(parameters(found[-1])), name


def test_what_is_launched_does_not_depend_on_what_was_launched_before(launched):
    for name, case in launched["warm"].items():
        alone = launched["cold"][name]
        assert [program(x) for x in case["first"]] == [program(x) for x in alone["first"]], name


@pytest.mark.parametrize("state", ["cold", "warm"])
def test_weights_and_tables_arrive_whole(launched, state):
    for name, case in launched[state].items():
        for attempt in ("first", "second"):
            assert set(case["expected"]) <= set(parameters(case[attempt][-1])), (name, attempt)


def test_a_rule_is_one_launch_for_each_dtype_and_one_program_for_each_chunk(launched):
    for name, case in launched["warm"].items():
        kernels = ["_combine_kernel"]
        if name in (*GRAM, "6 sums ahead", "bf16, sums ahead"):
            kernels = ["_gram_kernel", *kernels]
        grids = [[4, 1, 1]] * len(kernels)
        if name == "two dtypes":
            kernels, grids = kernels * 2, [[2, 1, 1]] * 2
        assert [(x[0], x[2]) for x in case["second"]] == list(zip(kernels, grids, strict=True)), name


def test_no_kernel_function_calls_itself():
    """Triton 3.4 would not compile it."""
    for path in (ROOT / "kernels" / "triton").glob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and "triton.jit" in map(
                ast.unparse, function.decorator_list
            ):
                called = {ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)}
                assert function.name not in called, f"{path.name}: {function.name}"
