"""One cluster a session; each test finds it idle."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, missing, running_cluster


@pytest.fixture(scope="session")
def slurm_daemons() -> Iterator[Cluster]:
    if lacking := missing():
        pytest.skip(lacking)
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture
def slurm(slurm_daemons: Cluster) -> Iterator[Cluster]:
    """The session's cluster of two idle nodes."""
    yield slurm_daemons
    slurm_daemons.restore()
