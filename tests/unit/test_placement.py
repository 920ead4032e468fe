"""Which cores an engine gets: from those that its node may use, whatever their numbers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eadt.coordination.placement import cpu_share
from eadt.training.engine_spec import ComputeShare

CORES = st.lists(st.integers(0, 255), min_size=1, max_size=16, unique=True).map(lambda n: tuple(sorted(n)))


@pytest.mark.parametrize(
    ("percentage", "cores", "index", "expected"),
    [
        (50, (0, 1, 2, 3), 0, ComputeShare(50, (0, 1), 2, 1.0)),
        (50, (2, 3, 6, 7), 0, ComputeShare(50, (2, 3), 2, 1.0)),
        (50, (2, 3, 6, 7), 1, ComputeShare(50, (6, 7), 2, 1.0)),
        (50, (2, 3, 6, 7), 2, ComputeShare(50, (2, 3), 2, 1.0)),
        (75, (2, 3, 6, 7), 1, ComputeShare(75, (2, 3, 7), 3, 1.0)),
        (85, (2, 3), 0, ComputeShare(85, (2, 3), 2, 0.85)),
        (100, (5,), 3, ComputeShare(100, (5,), 1, 1.0)),
        (10, (4, 9), 1, ComputeShare(10, (9,), 1, 0.2)),
    ],
)
def test_shares_by_hand(percentage: int, cores: tuple[int, ...], index: int, expected: ComputeShare) -> None:
    share = cpu_share(percentage, cores, index)
    assert (share.percentage, share.cores, share.num_threads) == (
        expected.percentage,
        expected.cores,
        expected.num_threads,
    )
    assert share.duty_fraction == pytest.approx(expected.duty_fraction)


@given(st.integers(1, 100), CORES, st.integers(0, 20))
def test_a_share_is_cut_from_the_nodes_cores_and_is_as_large_as_was_asked(
    percentage: int, cores: tuple[int, ...], index: int
) -> None:
    share = cpu_share(percentage, cores, index)
    assert set(share.cores) <= set(cores)
    assert len(share.cores) == min(share.num_threads, len(cores))
    assert share.num_threads * share.duty_fraction == pytest.approx(percentage / 100 * len(cores))


@given(st.integers(1, 8), CORES)
def test_shares_that_fit_beside_each_other_have_no_core_in_common(
    num_engines: int, cores: tuple[int, ...]
) -> None:
    if len(cores) % num_engines:
        return
    shares = [cpu_share(100 // num_engines, cores, index) for index in range(num_engines)]
    if 100 % num_engines == 0:
        taken = [core for share in shares for core in share.cores]
        assert sorted(taken) == sorted(cores)


_IN_A_CPUSET = """
import os, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
from eadt.node.agent import training_cores
from eadt.coordination.placement import cpu_share
share = cpu_share(100, training_cores(None), 0)
print(training_cores(None), training_cores(1), training_cores(7), share.cores, share.num_threads)
os.sched_setaffinity(0, share.cores)
"""


def test_a_node_that_may_not_use_core_0_runs_its_engines_on_those_that_it_may() -> None:
    """As under ``taskset``: a real affinity, in a process of its own."""
    core = max(os.sched_getaffinity(0))
    if core == 0:
        pytest.skip("this machine has one core only")
    result = subprocess.run(
        [sys.executable, "-c", _IN_A_CPUSET, str(core)], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"({core},) ({core},) ({core},) ({core},) 1"
