"""Single labels from a file: in any of its forms the same, and what does not fit the shards is told."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from adagc_dist.given import read_given
from launch.data import Shards
from launch.recipe import load_config
from sharding.manifest import LabelTable, load_manifest, load_table
from tests.test_training import assert_trained, train
from tests.tiny import tiny_config, tiny_settings


def chosen(shards: Path) -> pa.Table:
    """The last of each patch's labels, of all splits, in no order."""
    manifest = load_manifest(shards)
    tables = [load_table(manifest, split) for split in ("test", "validation", "train")]
    keys = [key for table in tables for key in table.keys.to_pylist()]
    columns = np.concatenate([_last(table) for table in tables])
    return pa.table({"note": [""] * len(keys), "label": [manifest.classes[c] for c in columns], "patch_id": keys})


def _last(table: LabelTable) -> np.ndarray:
    width = table.labels_NC.shape[1]
    return width - 1 - table.labels_NC[:, ::-1].argmax(axis=1)


def write(table: pa.Table, path: Path) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        options = pyarrow.csv.WriteOptions(delimiter="\t" if path.suffix == ".tsv" else ",")
        pyarrow.csv.write_csv(table, path, options)
    return path


@pytest.mark.parametrize("name", ["labels.csv", "labels.tsv", "labels.parquet"])
def test_each_patch_has_the_label_that_the_file_names(tiny_shards: Path, tmp_path: Path, name: str) -> None:
    file = write(chosen(tiny_shards), tmp_path / name)
    shards = Shards.open(tiny_config(tiny_shards, tmp_path / "run", "spml.policy=file", f"spml.file={file}"))
    for split in ("train", "validation"):
        table = shards.table(split)
        observed_NC = shards.observed(table)
        assert (observed_NC.sum(axis=1) == 1).all()
        np.testing.assert_array_equal(observed_NC.argmax(axis=1), _last(table))
    assert shards.identity()["labels of spml.file"] == read_given(file, shards.manifest.classes).digest


def changed(table: pa.Table, **columns: Any) -> pa.Table:
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    return table


def test_what_does_not_fit_is_told(tiny_shards: Path, tmp_path: Path) -> None:
    table, classes = chosen(tiny_shards), load_manifest(tiny_shards).classes
    labels, keys = table["label"].to_pylist(), table["patch_id"].to_pylist()
    train = load_table(load_manifest(tiny_shards), "train")

    def told(wrong: pa.Table) -> str:
        with pytest.raises(ValueError, match=r"spml\.file=.*wrong\.csv") as caught:
            read_given(write(wrong, tmp_path / "wrong.csv"), classes).observe(train)
        return str(caught.value)

    assert "must have the columns patch_id (or key) and label; it has note, patch_id" in told(table.drop(["label"]))
    assert "'Sea' is no class of the shards, which are Urban fabric" in told(changed(table, label=["Sea", *labels[1:]]))
    assert f"{keys[0]} is listed more than once" in told(changed(table, patch_id=[keys[0], keys[0], *keys[2:]]))
    assert "of the 90 rows of split 'train' (the first is " in told(table.slice(0, 50))
    other = [
        next(c for c in classes if c != label and not _has(train, key, c, classes)) for key, label in zip(keys, labels)
    ]
    assert "90 of the 90 rows of split 'train'" in told(changed(table, label=other))
    assert "than any of their full ones in the shards" in told(changed(table, label=other))
    with pytest.raises(FileNotFoundError, match=r"spml\.file=.*none\.csv: there is no such file"):
        read_given(tmp_path / "none.csv", classes)
    (tmp_path / "noise").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match="is neither CSV, TSV nor parquet"):
        read_given(tmp_path / "noise", classes)


def _has(table: LabelTable, key: str, name: str, classes: tuple[str, ...]) -> bool:
    keys = table.keys.to_pylist()
    return key in keys and bool(table.labels_NC[keys.index(key), classes.index(name)])


@pytest.mark.parametrize("settings", [["spml.policy=file"], ["spml.file=x.csv"]])
def test_file_and_policy_go_together(settings: list[str]) -> None:
    with pytest.raises(ValueError, match=r"spml\.policy=\w+ and spml\.file=.*: the file goes with spml\.policy=file"):
        load_config(None, ["data.shards=s", "run.dir=r", *settings])


def test_a_run_goes_on_with_the_same_labels_only(tiny_shards: Path, tmp_path: Path) -> None:
    table = chosen(tiny_shards)
    file = write(table, tmp_path / "labels.csv")
    settings = tiny_settings(tiny_shards, tmp_path / "run", "spml.policy=file", f"spml.file={file}", "run.max_epochs=1")
    assert_trained("demo", settings, ranks=1)
    write(changed(table, note=["seen"] * len(table)), file)
    [(code, told)] = train("demo", settings, ranks=1)
    assert code == 1
    assert "the labels of spml.file of" in told
