"""Tables of labels in each form, and each way in which they can be wrong, told by file, line and column."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sharding import reben
from sharding.sources.labels import join_name, read_labels

SHARED = Path(__file__).parents[2] / "shared" / "data"

GOOD = "IMAGE\\LABEL,sea,sand\na_1,1,0\nb_2,0,0\nc_3,1,1\n"


def csv_file(tmp_path: Path, text: str, name: str = "labels.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(text.encode())
    return path


def parquet_file(tmp_path: Path, **columns: list[object]) -> Path:
    path = tmp_path / "labels.parquet"
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        GOOD.replace(",", "\t"),
        GOOD.replace("\n", "\r\n"),
        "\ufeff" + GOOD,
        GOOD.replace(",", " , ").replace("\n", "\n\n"),
        GOOD.rstrip("\n"),
    ],
    ids=["csv", "tsv", "crlf", "byte order mark", "blanks", "no last newline"],
)
def test_csv(tmp_path: Path, text: str) -> None:
    found = read_labels(csv_file(tmp_path, text), None)
    assert found.keys == ["a_1", "b_2", "c_3"]
    assert found.classes == ("sea", "sand")
    assert found.labels_NC.dtype == np.bool_
    assert found.labels_NC.tolist() == [[True, False], [False, False], [True, True]]
    assert found.splits is None


def test_csv_with_a_column_of_splits(tmp_path: Path) -> None:
    found = read_labels(csv_file(tmp_path, "key,Split,sea\na,train,1\nb,val,0\nc,dev,1\nd,Valid,1\ne,test,1\n"), None)
    assert found.classes == ("sea",)
    assert found.splits == ["train", "validation", "validation", "validation", "test"]


def test_quoted_class_with_a_comma(tmp_path: Path) -> None:
    found = read_labels(csv_file(tmp_path, 'key,"Beaches, dunes, sands",sea\na,1,0\n'), None)
    assert found.classes == ("Beaches, dunes, sands", "sea")


def test_split_file_selects_by_name(tmp_path: Path) -> None:
    splits = csv_file(tmp_path, "image,split\nScene/C_3.JPG,val\nA_1,train\nunknown,test\n", "split.csv")
    found = read_labels(csv_file(tmp_path, GOOD), splits)
    assert found.keys == ["a_1", "c_3"]
    assert found.splits == ["train", "validation"]
    assert found.labels_NC.tolist() == [[True, False], [True, True]]


@pytest.mark.parametrize(
    ("key", "name"),
    [("Airport/airport_1.JPG", "airport_1"), ("a\\B.jpeg", "b"), (" x ", "x"), ("v1.2", "v1.2"), ("a.tif", "a.tif")],
)
def test_join_name(key: str, name: str) -> None:
    assert join_name(key) == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "labels.csv is empty"),
        ("\n\n", "labels.csv is empty"),
        ("key,sea\n", "labels.csv lists no labels"),
        ("key\na\n", "has no column of a class"),
        ("key,split\na,train\n", "has no column of a class"),
        ("key,sea,sea\na,1,0\n", "class 'sea' heads two columns"),
        ("key,sea,\na,1,0\n", "a column without a name"),
        ("key,sea,sand\na,1,0\nb,1\n", "labels.csv, line 3: 2 cells where the header has 3"),
        ("key,sea,sand\na,1,0,1\n", "labels.csv, line 2: 4 cells where the header has 3"),
        ("key,sea,sand\na,1,0\n\nb,1,2\n", "labels.csv, line 4, column sand: '2' is neither 0 nor 1"),
        ("key,sea,sand\na,,0\n", "labels.csv, line 2, column sea: '' is neither 0 nor 1"),
        ("key,sea\na,1\nb,0\na,1\n", "a is in line 2 and again in line 4"),
        ("key,sea\n,1\n", "line 2: no key in the first column"),
        ("key,sea,split\na,1,training\n", "line 2: split 'training' is unknown: known are train, validation"),
        ('key,sea\n"a,1\n', "line 2: unexpected end of data"),
    ],
)
def test_unusable_csv(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        read_labels(csv_file(tmp_path, text), None)


def test_neither_text_nor_parquet(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xff")
    with pytest.raises(ValueError, match="is neither parquet nor UTF-8 text"):
        read_labels(tmp_path / "labels.csv", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,set\na_1,train\n", "is no list of keys and splits: its columns are image, set"),
        ("image,split\na_1,training\n", "split.csv, line 2: split 'training' is unknown"),
        ("image,split\na_1,train\nA_1.jpg,val\n", "split.csv, line 3: A_1.jpg is listed twice"),
        ("image,split\nz_9,train\n", "no key of .* is in .*split.csv: the first are 'a_1' and 'z_9'"),
        ("image,split\n", "no key of .* is in .*split.csv"),
    ],
)
def test_unusable_split_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_labels(csv_file(tmp_path, GOOD), csv_file(tmp_path, text, "split.csv"))


def test_splits_from_two_places(tmp_path: Path) -> None:
    labels = csv_file(tmp_path, "key,sea,split\na,1,train\n")
    with pytest.raises(ValueError, match="has a column of splits already"):
        read_labels(labels, csv_file(tmp_path, "image,split\na,train\n", "split.csv"))


def test_parquet_of_lists(tmp_path: Path) -> None:
    path = parquet_file(
        tmp_path, key=["a", "b", "c"], labels=[["sea", "sand"], [], ["dock"]], split=["train", "val", "test"]
    )
    found = read_labels(path, None)
    assert found.classes == ("dock", "sand", "sea")
    assert found.labels_NC.tolist() == [[False, True, True], [False, False, False], [True, False, False]]
    assert found.splits == ["train", "validation", "test"]


def test_parquet_of_reben_labels_has_rebens_order(tmp_path: Path) -> None:
    found = read_labels(parquet_file(tmp_path, patch_id=["a"], labels=[["Marine waters", "Arable land"]]), None)
    assert found.classes == reben.CLASSES
    assert np.flatnonzero(found.labels_NC[0]).tolist() == [2, 18]
    assert found.splits is None


@pytest.mark.parametrize("values", [[True, False], [1, 0], [1.0, 0.0]])
def test_parquet_of_flags(tmp_path: Path, values: list[object]) -> None:
    found = read_labels(parquet_file(tmp_path, key=["a", "b"], sea=values, sand=[True, True]), None)
    assert found.classes == ("sea", "sand")
    assert found.labels_NC.tolist() == [[True, True], [False, True]]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"name": ["a"], "sea": [1]}, "has no column key or patch_id; it has name, sea"),
        ({"key": ["a", "a"], "sea": [1, 1]}, "a is listed twice"),
        ({"key": [1, 2], "sea": [1, 1]}, "row 0: the key 1 is no text"),
        ({"key": ["a", None], "sea": [1, 1]}, "row 1: the key None is no text"),
        ({"key": ["a"]}, "has no column of a class"),
        ({"key": ["a", "b"], "sea": [1, 3]}, "column sea, b: 3 is neither 0 nor 1"),
        ({"key": ["a", "b"], "sea": [1, None]}, "column sea, b: None is neither 0 nor 1"),
        ({"key": ["a"], "country": ["Serbia"]}, "column country, a: 'Serbia' is neither 0 nor 1"),
        ({"key": ["a"], "labels": ["sea"]}, "column labels is string; lists of class names are expected"),
        ({"key": ["a"], "labels": [[1, 2]]}, "lists of class names are expected"),
        ({"key": ["a", "b"], "labels": [["sea"], ["sea", None]]}, "b: a label without a name"),
        ({"key": ["a"], "labels": pa.array([[]], pa.list_(pa.string()))}, "lists no labels"),
        ({"key": ["a"], "sea": [1], "split": ["all"]}, "a: split 'all' is unknown"),
        ({"key": pa.array([], pa.string()), "sea": pa.array([], pa.bool_())}, "lists no labels"),
    ],
)
def test_unusable_parquet(tmp_path: Path, columns: dict[str, list[object]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_labels(parquet_file(tmp_path, **columns), None)


def test_damaged_parquet(tmp_path: Path) -> None:
    path = parquet_file(tmp_path, key=["a"], sea=[1])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is no parquet file, or damaged"):
        read_labels(path, None)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_labels(tmp_path / "labels.csv", None)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared real data are not here")
def test_metadata_of_reben() -> None:
    found = read_labels(SHARED / "reben_composites" / "metadata.parquet", None)
    assert found.classes == reben.CLASSES
    assert len(found.keys) == 120
    assert found.labels_NC.any(axis=1).all()
    assert found.splits is not None
    assert {*found.splits} <= {"train", "validation", "test"}
