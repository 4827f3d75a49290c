"""`adagc recover`: the labels recovered so far, from the newest checkpoint of a run."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from adagc_dist.checkpoint import Checkpoint, CheckpointStore, Content, Position
from adagc_dist.comm import SoloComm
from launch import recover as command
from launch.data import Shards
from launch.recipe import dump_config
from sharding.manifest import load_manifest, load_table
from tests.tiny import tiny_config

MARKED = (1 << 14) + 1
ROWS, CLASSES = 90, 19


@pytest.fixture
def run(tiny_shards: Path, tmp_path: Path) -> Path:
    """A run as it is while it trains: two checkpoints of two ranks' rows, of which ten were not read yet."""
    folder = tmp_path / "run"
    folder.mkdir()
    config = tiny_config(tiny_shards, folder)
    (folder / "config.yaml").write_text(dump_config(config))
    for epoch in (1, 2):
        save(folder, epoch, identity(tiny_shards))
    return folder


def identity(shards: Path) -> dict[str, Any]:
    return Shards.open(tiny_config(shards, Path("run"))).identity()


def save(folder: Path, epoch: int, data: dict[str, Any], *, rows: bool = True) -> None:
    store = CheckpointStore(folder / "checkpoints", comm=SoloComm(), keep=9)
    order = np.random.default_rng(epoch).permutation(ROWS).astype(np.int32)
    state = {
        "rows": torch.from_numpy(order),
        "values": torch.from_numpy(averages(epoch)[order]),
        "marks": torch.from_numpy(np.where(order < 10, 0, MARKED).astype(np.int16)),
    }
    store.save(Position(epoch), Content({}, state if rows else None, {"data": data}))
    store.wait()


def averages(epoch: int) -> np.ndarray:
    return np.random.default_rng(100 + epoch).random((ROWS, CLASSES), dtype=np.float32)


def test_the_newest_averages_and_what_they_recover_are_written_by_key(
    run: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "labels.parquet"
    assert command.main([str(run), "--out", str(out), "--threshold", "0.75"]) == 0
    manifest = load_manifest(tiny_shards)
    labels = load_table(manifest, "train")
    table = pq.read_table(out)
    assert table["key"].to_pylist() == labels.keys.to_pylist()
    values = np.stack([table[f"average/{name}"].to_numpy() for name in manifest.classes], axis=1)
    np.testing.assert_array_equal(values[10:], averages(2)[10:])
    assert not values[:10].any()
    assert table["read"].to_pylist() == [False] * 10 + [True] * 80
    for row, (observed, recovered) in enumerate(zip(table["observed"].to_pylist(), table["recovered"].to_pylist())):
        assert len(observed) == 1
        assert labels.labels_NC[row, manifest.classes.index(observed[0])]
        above = {name for name, value in zip(manifest.classes, averages(2)[row]) if value >= 0.75}
        assert set(recovered) == (above - set(observed) if row >= 10 else set())
    told = capsys.readouterr().out
    assert "80 of 90 patches read so far (epoch-0002-step-00000)" in told
    assert "against the true labels: precision 0." in told


def test_thresholds_are_fitted_per_class_on_observed_labels(run: Path, tmp_path: Path) -> None:
    assert command.main([str(run), "--out", str(tmp_path / "fitted.parquet")]) == 0
    table = pq.read_table(tmp_path / "fitted.parquet")
    lowest = {}
    for row, names in enumerate(table["recovered"].to_pylist()):
        for name in names:
            lowest[name] = min(lowest.get(name, 1.0), table[f"average/{name}"][row].as_py())
    assert len(set(lowest.values())) > 5  # no threshold for all


@pytest.mark.parametrize("left", ["nothing", "a folder without its marker"])
def test_a_checkpoint_that_the_run_deletes_meanwhile_is_replaced_by_a_newer_one(
    run: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    read = Checkpoint.rows

    def deleted_once(checkpoint: Checkpoint, rank: int, world_size: int) -> object:
        if checkpoint.position == Position(2):
            save(run, 3, identity(tiny_shards))
            shutil.rmtree(checkpoint.path)
            if left != "nothing":  # it is still being deleted
                checkpoint.path.mkdir()
        return read(checkpoint, rank, world_size)

    monkeypatch.setattr(Checkpoint, "rows", deleted_once)
    assert command.newest_averages(run, identity(tiny_shards)).checkpoint.position == Position(3)


def test_values_are_those_of_the_files(run: Path, tiny_shards: Path) -> None:
    found = command.newest_averages(run, identity(tiny_shards))
    (file,) = found.checkpoint.path.glob("rows-*")
    saved = load_file(file)
    np.testing.assert_array_equal(found.values_NC[saved["rows"][found.written_N[saved["rows"]]]],
                                  saved["values"][found.written_N[saved["rows"]]])  # fmt: skip


def told_of(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert command.main([str(run), "--out", str(tmp_path / "x.parquet")]) == 1
    assert not (tmp_path / "x.parquet").exists()
    return capsys.readouterr().err


def test_a_changed_byte_of_the_averages_is_told_and_nothing_is_written(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file,) = (run / "checkpoints" / str(Position(2))).glob("rows-*")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    told = told_of(run, tmp_path, capsys)
    assert told.startswith(f"adagc recover: {file} is missing or damaged (its digest differs)")
    assert told.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_averages_of_other_shards_are_not_given_to_these_patches(
    run: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As many rows, but made again: a row's number may be another patch's."""
    save(run, 3, identity(tiny_shards) | {"shards": "another digest"})
    told = told_of(run, tmp_path, capsys)
    assert told.startswith(
        f"adagc recover: the shards of {run / 'checkpoints' / str(Position(3))} are not those of this"
    )
    assert told.endswith("keep data.shards and data.bands as in its training\n")


def test_shards_that_have_moved_are_named(run: Path, tiny_shards: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(tiny_shards, tmp_path / "moved")
    (run / "config.yaml").write_text(dump_config(tiny_config(tmp_path / "gone", run)))
    out = tmp_path / "labels.parquet"
    assert command.main([str(run), f"data.shards={tmp_path / 'gone'}", "--out", str(out)]) == 1
    assert command.main([str(run), f"data.shards={moved}", "--out", str(out)]) == 0
    assert out.is_file()


def test_a_folder_is_no_file_to_write(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main([str(run), "--out", str(tmp_path)])
    assert f"{tmp_path} is a folder: name a file, e.g. {tmp_path}/labels.parquet" in capsys.readouterr().err


def test_what_is_no_run_or_has_nothing_yet_is_told(
    run: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "nowhere is no run: it holds no config.yaml" in told_of(tmp_path / "nowhere", tmp_path, capsys)
    shutil.rmtree(run / "checkpoints")
    assert "has no complete checkpoint yet: the first comes with its first epoch's end" in told_of(
        run, tmp_path, capsys
    )
    save(run, 4, identity(tiny_shards), rows=False)
    assert "holds no prediction averages: its method keeps none" in told_of(run, tmp_path, capsys)
