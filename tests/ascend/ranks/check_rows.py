"""Linears whose inputs ranks divide: the product of one process, bit by bit; wrong ways to add it are noticed."""

from __future__ import annotations

import pytest
from ascend_rig.ranks import pool, row_jobs

from npuq.formats.schemes import Scheme

W8A8, STATIC, FLOAT = Scheme.W8A8, Scheme.W8A8_STATIC, Scheme.FLOAT


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("scheme", [W8A8, STATIC, FLOAT])
def test_a_linear_with_divided_inputs(ranks, scheme, size):
    assert ranks.run(row_jobs.run_linear, scheme, ranks=size) == [True] * size


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("scheme", [W8A8, STATIC, FLOAT])
def test_an_mlp_with_divided_channels(ranks, scheme, size):
    assert ranks.run(row_jobs.run_mlp, scheme, ranks=size) == [True] * size


@pytest.mark.parametrize("wrong", row_jobs.WRONG)
def test_a_wrong_sum_does_not_pass(ranks, wrong):
    assert not passes(ranks, row_jobs.run_linear, W8A8, wrong)


@pytest.mark.parametrize("wrong", row_jobs.WRONG_STATIC)
def test_a_wrong_sum_of_static_codes_does_not_pass(ranks, wrong):
    assert not passes(ranks, row_jobs.run_linear, STATIC, wrong)


@pytest.mark.parametrize("wrong", row_jobs.WRONG_MLP)
def test_a_wrong_mlp_does_not_pass(ranks, wrong):
    assert not passes(ranks, row_jobs.run_mlp, W8A8, wrong)


def passes(ranks, job, scheme, wrong):
    try:
        return all(ranks.run(job, scheme, wrong))
    except pool.JobError as error:
        print(f"{wrong}: {error}")
        return False
