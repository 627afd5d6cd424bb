"""The processes that the other tests run in."""

import os
import warnings

import pytest
import torch
import torch.distributed as dist


def about():
    t = torch.tensor([1.0 + dist.get_rank()])
    dist.all_reduce(t)
    return os.getpid(), dist.get_rank(), torch.get_num_threads(), t.item()


def warned():
    with pytest.raises(UserWarning):
        warnings.warn("an error here", stacklevel=1)


def test_ranks_are_kept_and_have_one_thread_each(ranks2):
    found = ranks2(about)
    assert [rank for _, rank, _, _ in found] == [0, 1]
    assert {threads for _, _, threads, _ in found} == {1}
    assert {total for _, _, _, total in found} == {3.0}
    assert os.getpid() not in {process for process, _, _, _ in found}
    assert ranks2(about) == found


def test_warnings_are_errors_on_ranks(ranks2):
    ranks2(warned)
