"""What tests share: one small shard folder a session."""

from pathlib import Path

import pytest
from hypothesis import settings

from tests.tiny import write_tiny

# The same examples in every run: a red run can be repeated, and a green one stays green until the code changes.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 train, 40 validation and 40 test rows of 12 bands at native size, 19 classes; not to be changed, copy what is
    to be damaged.
    """
    folder = tmp_path_factory.mktemp("shards") / "tiny"
    write_tiny(folder)
    return folder
