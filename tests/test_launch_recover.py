"""`adagc recover`: the labels that a run recovered, by its teacher or by the averages in its newest checkpoint."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from adagc_dist.checkpoint import Checkpoint, CheckpointStore, Content, Position
from adagc_dist.comm import SoloComm
from launch import evaluate as evaluation
from launch import recover as command
from launch.data import Shards
from launch.newest import newest_averages
from launch.recipe import dump_config
from sharding.manifest import load_manifest, load_table
from tests.damages import flip_rows
from tests.faults.commands import SKIP, Told, alone, assert_trained, in_a_rank
from tests.faults.commands import command as training
from tests.ranks import Ranks
from tests.tiny import tiny_config

MARKED = (1 << 14) + 1
ROWS, CLASSES = 90, 19


@pytest.fixture(scope="module")
def trained(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that have finished: "adagc", and "an", which keeps no averages; not to be changed."""
    root = tmp_path_factory.mktemp("trained")
    assert_trained(*alone(training(tiny_shards, root / "adagc"), training(tiny_shards, root / "an", "method.name=an")))
    return root


@pytest.fixture
def finished(trained: Path, tmp_path: Path) -> Path:
    """A finished run of one's own."""
    return shutil.copytree(trained / "adagc", tmp_path / "finished")


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


def averages_of(run: Path, out: Path, *more: str) -> int:
    return command.main([str(run), "--out", str(out), "--averages-only", *more])


def matrix_of(frame: pd.DataFrame, model: str) -> NDArray[np.float32]:
    """float32 [N, C]: the probabilities in the columns ``model/<class>``."""
    return frame[[name for name in frame if name.startswith(f"{model}/")]].to_numpy(np.float32)


def counts_of(frame: pd.DataFrame, column: str, classes: tuple[str, ...]) -> list[int]:
    told = frame[column].explode().value_counts()
    return [int(told.get(name, 0)) for name in classes]


def test_what_evaluate_measures_is_what_the_file_holds(
    finished: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Recovered on train, by the teacher at evaluate's thresholds, beside the truth that the metadata have."""
    manifest = load_manifest(tiny_shards)
    labels = load_table(manifest, "train")
    truth = [[manifest.classes[c] for c in np.flatnonzero(row)] for row in labels.labels_NC]
    metadata = tmp_path / "metadata.parquet"
    pd.DataFrame({"patch_id": labels.keys.to_pylist(), "labels": truth, "country": "x"})[::-1].to_parquet(metadata)
    assert command.main([str(finished), "--out", str(tmp_path / "labels.parquet")]) == 0
    table = capsys.readouterr().out.splitlines()
    assert evaluation.main([str(finished), "--recovered"]) == 0
    measured = json.loads((finished / "metrics.json").read_text())["recovered"]

    joined = pd.read_parquet(tmp_path / "labels.parquet").merge(pd.read_parquet(metadata), on="patch_id")
    assert len(joined) == len(labels)
    sets = [joined[name].map(set) for name in ("observed", "recovered", "labels")]
    hits = sum(len(recovered & true) for _, recovered, true in zip(*sets))
    hidden = sum(len(true - observed) for observed, _, true in zip(*sets))
    assert all(len(observed) == 1 and not observed & recovered for observed, recovered, _ in zip(*sets))
    assert hits / measured["recovered"] == measured["precision"]
    assert hits / hidden == measured["recall"]
    recovered = counts_of(joined, "recovered", manifest.classes)
    assert recovered == [entry["recovered"] for entry in measured["per_class"]]
    total = f"{len(labels)}  {measured['recovered']}  {hidden}  {measured['precision']:.4f}  {measured['recall']:.4f}"
    assert " ".join(table[-1].split()) == f"all classes {' '.join(total.split())}"


def test_thresholds_are_fitted_once_and_kept_for_this_teacher_and_these_labels(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def scored(*more: str) -> tuple[dict[str, float], str]:
        assert command.main([str(finished), "--out", str(tmp_path / "labels.parquet"), *more]) == 0
        notes = json.loads(pq.read_schema(tmp_path / "labels.parquet").metadata[b"adagc"])
        return notes["thresholds"], (finished / "thresholds.json").read_text()

    first, kept = scored()
    assert len(set(first.values())) > 5
    (finished / "thresholds.json").write_text(kept.replace(str(next(iter(first.values()))), "0.125"))
    assert next(iter(scored()[0].values())) == 0.125
    assert next(iter(scored("spml.seed=7")[0].values())) != 0.125
    (finished / "thresholds.json").write_text("[]")
    assert scored() == (first, kept)
    assert "thresholds: fitted per class on validation's observed labels" in capsys.readouterr().out


def test_a_run_is_scored_by_quarters_at_thresholds_of_these_scores(finished: Path, tmp_path: Path) -> None:
    found = []
    for views in ("whole", "quarters"):
        assert evaluation.main([str(finished), f"model.views={views}"]) == 0
        assert command.main([str(finished), "--out", str(tmp_path / "labels.parquet"), f"model.views={views}"]) == 0
        scores = matrix_of(pd.read_parquet(tmp_path / "labels.parquet"), "teacher")
        found.append((json.loads((finished / "metrics.json").read_text())["test"]["map_macro"], scores))
        assert json.loads((finished / "thresholds.json").read_text())["model.views"] == views
    (whole, scores), (quarters, others) = found
    assert whole != quarters
    assert np.isfinite(others).all()
    assert (scores != others).any(axis=0).all()


def test_two_ranks_write_what_one_writes(finished: Path, tmp_path: Path) -> None:
    tables = []
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}.parquet"
        words = ["recover", str(finished), "--out", str(out), "--split", "validation"]
        told: list[Told] = [one for (one,) in Ranks(ranks, in_a_rank, [words], timeout=60.0).join()]
        assert_trained(*told)
        tables.append(pq.read_table(out))
        (finished / "thresholds.json").unlink()
    assert tables[0].equals(tables[1])
    assert not [name for name in tables[0].column_names if name.startswith("average/")]


def test_the_teacher_of_a_run_that_still_trains_is_that_of_its_newest_checkpoint(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here the last one, so the scores are those of the trained teacher; nothing that may change is kept."""
    assert command.main([str(finished), "--out", str(tmp_path / "trained.parquet")]) == 0
    (finished / "teacher.safetensors").unlink()
    (finished / "thresholds.json").unlink()
    capsys.readouterr()
    assert command.main([str(finished), "--out", str(tmp_path / "training.parquet")]) == 0
    assert f"teacher: {finished / 'checkpoints' / str(Position(2))}\n" in capsys.readouterr().out
    assert pq.read_table(tmp_path / "trained.parquet").equals(pq.read_table(tmp_path / "training.parquet"))
    assert not (finished / "thresholds.json").exists()


def test_a_method_without_averages_has_its_teacher(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained / "an", tmp_path / "an")
    out = tmp_path / "labels.csv"
    assert command.main([str(run), "--out", str(out), "--threshold", "0.06"]) == 0
    frame = pd.read_csv(out, dtype={"recovered": str}, keep_default_na=False)
    assert not [name for name in frame if name.startswith("average/")]
    above = [";".join(name[8:] for name in frame if name.startswith("teacher/") and row[name] >= 0.06)
             for _, row in frame.iterrows()]  # fmt: skip
    assert (frame["recovered"] != "").any()
    for all_of_them, observed, recovered in zip(above, frame["observed"], frame["recovered"]):
        assert set(filter(None, recovered.split(";"))) == set(filter(None, all_of_them.split(";"))) - {observed}
    assert averages_of(run, out) == 1
    assert (
        "keeps no prediction averages: method.name=an has none (adagc, elr, sat, role, ll_cp and em_apl have)"
        in capsys.readouterr().err
    )


def test_geojson_has_the_footprints_in_degrees(finished: Path, tmp_path: Path) -> None:
    """All patches of the tiny shards lie at 600,000 E (100 km east of 15 degrees) and 5,300,040 N of zone 33."""
    out = tmp_path / "labels.geojson"
    assert command.main([str(finished), "--out", str(out), "--threshold", "0.2"]) == 0
    collection = json.loads(out.read_text())
    assert collection["type"] == "FeatureCollection"
    assert len(collection["features"]) == ROWS
    feature = collection["features"][0]
    ((*corners, last),) = feature["geometry"]["coordinates"]
    assert last == corners[0]
    east, north = np.array(corners).T
    assert np.ptp(east) == pytest.approx(1200 / (111_320 * np.cos(np.radians(47.85))), rel=0.03)
    assert np.ptp(north) == pytest.approx(1200 / 111_200, rel=0.03)
    assert (east.mean(), north.mean()) == (pytest.approx(16.344, abs=0.01), pytest.approx(47.84, abs=0.01))
    area = np.dot(east, np.roll(north, -1)) - np.dot(north, np.roll(east, -1))
    assert area > 0  # counter-clockwise
    assert feature["id"] == feature["properties"]["patch_id"]
    assert feature["properties"]["crs"] == "EPSG:32633"
    assert len(feature["properties"]["observed"]) == 1


def test_patches_that_cannot_be_read_are_null(
    finished: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = shutil.copytree(tiny_shards, tmp_path / "lost")
    flip_rows(lost, [3, 50])
    words = [str(finished), "--out", str(tmp_path / "labels.parquet"), f"data.shards={lost}"]
    assert command.main(words) == 1
    assert "b10.npy is not what" in capsys.readouterr().err
    assert not (tmp_path / "labels.parquet").exists()
    assert command.main([*words, *SKIP]) == 0
    frame = pd.read_parquet(tmp_path / "labels.parquet")
    unread = np.isnan(matrix_of(frame, "teacher")).all(axis=1)
    assert np.flatnonzero(unread).tolist() == [3, 50]
    assert frame["recovered"].isna().tolist() == unread.tolist()
    assert frame["observed"].map(len).tolist() == [1] * ROWS


def test_the_newest_averages_and_what_they_recover_are_written_by_key(
    run: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "labels.parquet"
    assert averages_of(run, out, "--threshold", "0.75") == 0
    manifest = load_manifest(tiny_shards)
    labels = load_table(manifest, "train")
    frame = pd.read_parquet(out)
    assert frame["patch_id"].tolist() == labels.keys.to_pylist()
    values = matrix_of(frame, "average")
    np.testing.assert_array_equal(values[10:], averages(2)[10:])
    assert np.isnan(values[:10]).all()
    for row, (observed, recovered) in enumerate(zip(frame["observed"], frame["recovered"])):
        assert len(observed) == 1
        assert labels.labels_NC[row, manifest.classes.index(observed[0])]
        above = {name for name, value in zip(manifest.classes, averages(2)[row]) if value >= 0.75}
        assert recovered is None if row < 10 else set(recovered) == above - set(observed)
    assert set(frame["crs"]) == {"EPSG:32633"}
    assert frame[["xmin", "ymin", "xmax", "ymax"]].to_numpy()[0].tolist() == [600000, 5298840, 601200, 5300040]
    told = capsys.readouterr().out
    assert "averages: 80 of 90 patches read so far (epoch-0002-step-00000)" in told
    assert told.splitlines()[-1].startswith("all classes")


def test_thresholds_are_fitted_per_class_on_observed_labels(run: Path, tmp_path: Path) -> None:
    assert averages_of(run, tmp_path / "fitted.parquet") == 0
    table = pq.read_table(tmp_path / "fitted.parquet")
    lowest: dict[str, float] = {}
    for row, names in enumerate(table["recovered"].to_pylist()):
        for name in names or []:
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
    found = newest_averages(run, identity(tiny_shards))
    assert found is not None
    assert found.checkpoint.position == Position(3)


def test_values_are_those_of_the_files(run: Path, tiny_shards: Path) -> None:
    found = newest_averages(run, identity(tiny_shards))
    assert found is not None
    (file,) = found.checkpoint.path.glob("rows-*")
    saved = load_file(file)
    np.testing.assert_array_equal(found.values_NC[saved["rows"][found.written_N[saved["rows"]]]],
                                  saved["values"][found.written_N[saved["rows"]]])  # fmt: skip


def told_of(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert averages_of(run, tmp_path / "x.parquet") == 1
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
    assert averages_of(run, out, f"data.shards={tmp_path / 'gone'}") == 1
    assert averages_of(run, out, f"data.shards={moved}") == 0
    assert out.is_file()


def test_an_ending_that_says_nothing_is_no_format(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "labels.txt"
    assert averages_of(run, out) == 1
    assert f"{out} ends in none of .parquet, " in capsys.readouterr().err
    assert not out.exists()
    assert averages_of(run, out, "--format", "csv") == 0


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
    assert "keeps no prediction averages" in told_of(run, tmp_path, capsys)
    (run / "teacher.safetensors").write_bytes(b"cut short")
    assert command.main([str(run), "--out", str(tmp_path / "x.parquet")]) == 1
    assert "teacher.safetensors is damaged" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_told_before_a_model_runs(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "labels.parquet"
    assert command.main([str(finished), "--out", str(out)]) == 1
    told = capsys.readouterr().err
    assert (
        told == f"adagc recover: {out} cannot be written (a part of its path is a file): name another file with --out\n"
    )


def test_averages_are_of_train_and_need_no_ranks(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in (["--split", "test"], ["--nproc-per-node", "2"]):
        with pytest.raises(SystemExit, match="2"):
            command.main([str(run), "--out", "x.parquet", "--averages-only", *more])
        assert "averages are of train, and read by one process" in capsys.readouterr().err
