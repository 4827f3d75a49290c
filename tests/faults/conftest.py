"""What the tests of damaged data share: the shards with something wrong, and the runs of undamaged ones."""

import shutil
from pathlib import Path

import pytest

from sharding.reader import PatchReader
from tests.damages import DAMAGES, copy_with
from tests.faults.commands import alone, assert_trained, command, result_of
from tests.tiny import TinySource, write_tiny


@pytest.fixture(scope="session")
def other_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another sharding: of fewer patches, in shards of the same names."""
    folder = tmp_path_factory.mktemp("other") / "shards"
    write_tiny(folder, TinySource(counts=(70, 8, 8)))
    return folder


@pytest.fixture(scope="session")
def damaged_shards(tiny_shards: Path, other_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with something wrong for each name in ``DAMAGES``, and one with a shard of ``other_shards``."""
    root = tmp_path_factory.mktemp("damaged")

    def replace_it(folder: Path, reader: PatchReader) -> None:
        shutil.copy(other_shards / "train-000001.tar", folder)

    damages = DAMAGES | {"another sharding": replace_it}
    return {name: copy_with(damage, tiny_shards, root / name) for name, damage in damages.items()}


@pytest.fixture(scope="session")
def whole(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Undamaged runs, for comparison: "whole", and "windows" with windows of two shards, on one rank."""
    root = tmp_path_factory.mktemp("whole")
    told = alone(command(tiny_shards, root / "whole"), command(tiny_shards, root / "windows", "data.window_shards=2"))
    assert_trained(*told)
    assert result_of(root / "whole") != result_of(root / "windows")
    assert [line["data/skipped_rows"] for line in result_of(root / "whole")] == [0, 0]
    return root
