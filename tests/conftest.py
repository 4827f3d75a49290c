"""What tests share: one small shard folder a session."""

from pathlib import Path

import pytest

from tests.tiny import write_tiny


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 train, 40 validation and 40 test rows of 12 bands at native size, 19 classes; not to be changed, copy what is
    to be damaged.
    """
    folder = tmp_path_factory.mktemp("shards") / "tiny"
    write_tiny(folder)
    return folder
