"""The cockpit as TensorBoard itself shows it: a run of two ranks that was killed in mid-epoch and went on."""

import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from adagc_dist.board import Board
from adagc_dist.checkpoint import Position
from adagc_dist.comm import Comm, SoloComm
from adagc_dist.meter import Meter
from adagc_dist.panels import Quicklooks, draw_panel, write_captions
from adagc_dist.predict import Scores
from adagc_dist.store import PredictionStore
from adagc_dist.tracking import NullTracker
from adagc_dist.validate import Details, Validation
from sharding import reben
from sharding.files import LocalFiles
from sharding.manifest import load_manifest, load_table
from tests.ranks import run_threads
from tests.tensorboard_server import Server, tensorboard
from tests.test_training import IN_MID_EPOCH, assert_trained, kill_after, lines_of
from tests.tiny import Owners, tiny_settings

STEPS = [8, 16, 24, 32, 40]  # at the ends of the epochs; the trigger comes after the second
CLASSES = len(reben.CLASSES)


@pytest.fixture(scope="module")
def resumed(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("board") / "resumed"
    settings = tiny_settings(tiny_shards, run, *IN_MID_EPOCH, "run.panels_every=2", "model.prior_bias=false")
    kill_after(settings, run, Position(2, 4))
    assert_trained("demo", settings)
    return run


@pytest.fixture(scope="module")
def server(resumed: Path) -> Iterator[Server]:
    with tensorboard(resumed) as server:
        yield server


def curve(server: Server, tag: str) -> list[tuple[int, float]]:
    return [(step, value) for _, step, value in server.get("plugin/scalars/scalars", run="tensorboard", tag=tag)]


def steps_of(points: list[tuple[int, float]]) -> list[int]:
    return [step for step, _ in points]


def test_it_is_one_run(resumed: Path, server: Server) -> None:
    assert server.get("runs") == ["tensorboard"]
    assert len(list((resumed / "tensorboard").glob("events*"))) == 2  # of the two processes
    assert all(path.is_file() for path in (resumed / "tensorboard").iterdir())


def test_every_curve_goes_forward_and_has_numbers(server: Server) -> None:
    (tags,) = server.get("plugin/scalars/tags").values()
    assert len(tags) > 100
    for tag in tags:
        points = curve(server, tag)
        steps = steps_of(points)
        assert steps == sorted(set(steps)), tag  # nothing is told twice
        assert all(math.isfinite(value) for _, value in points), tag
    whole = {"map/noisy_teacher", "auc/noisy_teacher", "auc/true_teacher", "pu/noisy_teacher", "f1/true_teacher",
        "ece/noisy_teacher", "ece/true_teacher", "ema/quantile_50", "ema/quantile_99", "ema/above_half",
        f"ap_noisy/{reben.CLASSES[0]}", f"ap_true/{reben.CLASSES[18]}", "epoch/speed/samples_per_second_min",
        "epoch/speed/memory_gb_max", "epoch/speed/row_sync_seconds_max", "epoch/speed/sync_share_max"}  # fmt: skip
    assert whole <= set(tags)
    for tag in whole:
        assert steps_of(curve(server, tag)) == STEPS
    for tag in ("pseudo_precision", "pseudo_recall", "pseudo_count"):
        found = {
            step
            for name in reben.CLASSES
            if f"{tag}/{name}" in tags
            for step in steps_of(curve(server, f"{tag}/{name}"))
        }
        assert found <= set(STEPS[2:])  # after the trigger
        assert STEPS[2] in found
    assert steps_of(curve(server, "epoch/ema/movement")) == STEPS[1:]  # in the first epoch nothing had an average


def test_every_chart_of_the_layout_has_curves(server: Server) -> None:
    layout = server.get("plugin/custom_scalars/layout")
    charts = {chart["title"]: chart for group in layout["category"] for chart in group["chart"]}
    assert len(layout["category"]) == 6
    assert len(charts) >= 18
    for title, chart in charts.items():
        for regex in chart["multiline"]["tag"]:
            found = server.get("plugin/custom_scalars/scalars", run="tensorboard", tag=regex)
            assert found["regex_valid"], title
            assert found["tag_to_events"], f"{title}: {regex}"
            assert all(found["tag_to_events"].values()), title
    for title in ("AP against noisy labels", "AP against true labels", "count by class"):
        (regex,) = charts[title]["multiline"]["tag"]
        assert (
            len(server.get("plugin/custom_scalars/scalars", run="tensorboard", tag=regex)["tag_to_events"]) == CLASSES
        )


def test_a_level_line_begins_at_the_trigger(server: Server) -> None:
    """Also of the process that was started after it."""
    noisy = dict(curve(server, "map/noisy_teacher"))
    assert curve(server, "map/at_trigger") == [(step, noisy[16]) for step in STEPS[1:]]


def test_least_and_most_of_the_ranks(server: Server) -> None:
    for name in ("samples_per_second", "data_wait_share", "sync_share", "memory_gb", "row_sync_seconds"):
        least, most = (dict(curve(server, f"epoch/speed/{name}_{which}")) for which in ("min", "max"))
        assert all(0 <= least[step] <= most[step] for step in STEPS)
    total = dict(curve(server, "epoch/speed/samples_per_second"))
    assert all(total[step] <= 2.001 * value for step, value in curve(server, "epoch/speed/samples_per_second_max"))
    assert dict(curve(server, "epoch/speed/memory_gb_min"))[40] > 0.05


def test_pseudo_labels_by_class_add_up(resumed: Path, server: Server) -> None:
    (tags,) = server.get("plugin/scalars/tags").values()
    counts = [dict(curve(server, tag)) for tag in tags if tag.startswith("pseudo_count/")]
    for line in lines_of(resumed)[2:]:
        assert sum(count[line["step"]] for count in counts) == line["pseudo/count"]


def test_the_averages_have_a_histogram_an_epoch(server: Server) -> None:
    events = server.get("plugin/histograms/histograms", run="tensorboard", tag="ema/distribution")
    assert [event[1] for event in events] == STEPS
    for _, _, buckets in events:
        assert sum(count for _, _, count in buckets) == 90 * CLASSES
        assert (buckets[0][0], buckets[-1][1]) == (0.0, 1.0)


def test_precision_recall_curves(server: Server) -> None:
    (tags,) = server.get("plugin/pr_curves/tags").values()
    assert {"pr_micro/noisy", "pr_micro/true", f"pr_true/{reben.CLASSES[0]}", f"pr_noisy/{reben.CLASSES[0]}"} <= set(
        tags
    )
    assert sum(tag.startswith("pr_true/") for tag in tags) == CLASSES
    for tag in ("pr_micro/noisy", "pr_micro/true"):
        (events,) = server.get("plugin/pr_curves/pr_curves", run="tensorboard", tag=tag).values()
        assert [event["step"] for event in events] == [16, 32, 40]  # every second epoch, and the last
        for event in events:
            assert len(event["precision"]) == len(event["recall"]) == len(event["thresholds"]) > 3
            assert event["recall"][0] == 1.0 or event["recall"][-1] == 1.0


def test_pictures_of_patches(server: Server) -> None:
    (tags,) = server.get("plugin/images/tags").values()
    assert set(tags) == {f"patches/{number}" for number in range(1, 9)}
    for tag in tags:
        entries = server.get("plugin/images/images", run="tensorboard", tag=tag, sample=0)
        assert [entry["step"] for entry in entries] == [16, 32, 40]
    picture = Image.open(io.BytesIO(server.read("plugin/images/individualImage?" + entries[-1]["query"])))
    pixels = np.asarray(picture)
    assert pixels.shape[1:] == (288, 3)
    assert len(np.unique(pixels[:288].reshape(-1, 3), axis=0)) > 500  # a patch
    assert {(0x9A, 0xA7, 0xB4)} < set(map(tuple, pixels[288:].reshape(-1, 3)))  # and headings below it


def test_hyperparameters_beside_the_final_metrics(resumed: Path, server: Server) -> None:
    experiment = server.post("plugin/hparams/experiment", {"experimentName": ""})
    names = {entry["name"] for entry in experiment["hparamInfos"]}
    assert {"method.gc_weight", "optim.lr", "spml.policy", "run.seed", "detector.rule"} <= names
    assert not [name for name in names if name.startswith(("data.shards", "run.dir", "engine."))]
    (group,) = server.post("plugin/hparams/session_groups", _all_sessions(experiment))["sessionGroups"]
    assert group["hparams"]["optim.lr"] == 0.003
    assert group["hparams"]["spml.policy"] == "random"
    last = lines_of(resumed)[-1]
    metrics = {value["name"]["tag"]: value["value"] for value in group["metricValues"]}
    assert set(metrics) == {
        f"{name}_teacher" for name in ("map/noisy", "map/true", "auc/noisy", "auc/true", "pu/noisy", "f1/true")
    }
    for name, value in metrics.items():
        assert value == pytest.approx(last[name], rel=1e-6)
    (session,) = group["sessions"]
    assert session["status"] == "STATUS_SUCCESS"


def _all_sessions(experiment: Mapping[str, Any]) -> dict[str, Any]:
    """What the page asks for: all columns, whatever the status."""
    columns = [{"hparam": entry["name"]} for entry in experiment["hparamInfos"]]
    columns += [{"metric": entry["name"]} for entry in experiment["metricInfos"]]
    statuses = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]
    return {"experimentName": "", "allowedStatuses": statuses, "colParams": columns, "startIndex": 0, "sliceSize": 10}


def test_metrics_that_searches_look_at_are_in_every_line(resumed: Path) -> None:
    for line in lines_of(resumed):
        assert 0 <= line["auc/noisy_teacher"] <= 1
        assert 0 <= line["auc/true_teacher"] <= 1
        assert line["pu/noisy_teacher"] >= 1
        assert json.dumps(line, allow_nan=False)


# The parts


class Drawn(NullTracker):
    """Calls what draws with a writer of its own kind."""

    def __init__(self) -> None:
        self.calls: dict[str, list[Any]] = {}

    def draw(self, draw: Any) -> None:
        draw(self)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("add_"):
            raise AttributeError(name)
        return lambda *arguments, **named: self.calls.setdefault(name, []).append(arguments)


def test_the_averages_of_all_ranks_are_counted_once() -> None:
    """Whatever the ranks: the same histogram, without rows that were never written."""
    probs = torch.rand(60, 3, generator=torch.Generator().manual_seed(0))
    probs[0, 0], probs[1, 0] = 0.0, 1.0

    def work(comm: Comm) -> list[Any]:
        store = PredictionStore(70, 3, momentum=0.9, comm=comm, device=torch.device("cpu"))
        rows = np.array_split(np.arange(70, dtype=np.int32), comm.world_size)
        store.home(Owners(tuple(rows)))
        mine = rows[comm.rank][rows[comm.rank] < 60]
        store.blend(mine, probs[torch.from_numpy(mine).long()])
        return _shown(store, comm).calls["add_histogram_raw"]

    (expected,) = work(SoloComm())
    assert expected[3] == 180
    np.testing.assert_array_equal(expected[7], np.histogram(probs.numpy(), bins=100, range=(0, 1))[0])
    for found in run_threads(3, work):
        assert found == [expected]


def _shown(store: PredictionStore | None, comm: Comm) -> Drawn:
    """A board of 40 rows without pictures, whose teacher knows half of the classes of each row."""
    rng = np.random.default_rng(0)
    labels_NC = rng.random((40, 3)) < 0.4
    scores = Scores(rng.random((40, 3), dtype=np.float32), np.ones(40, dtype=bool))
    table = load_like(labels_NC)
    details = Details(scores, np.array([0.5, np.nan, 0.1]), np.array([0.5, 0.6, 0.7]), np.full(3, 0.5))
    validation = Validation(
        noisy_map=0.3, replicates=[], true_map=0.4, true_f1=0.3, noisy_auc=0.5, true_auc=0.6, noisy_pu=1.5,
        details=details,
    )  # fmt: skip
    drawn = Drawn()
    board = Board(["a", "b", "c"], table, labels_NC, None, lambda epoch: True, comm)
    board.show(drawn, validation, Meter(torch.device("cpu"), comm, 3), store, epoch=0, step=9, trigger_map=None)
    return drawn


def load_like(labels_NC: Any) -> Any:
    from sharding.manifest import LabelTable

    empty = np.empty((len(labels_NC), 0), dtype=np.int64)
    shards = np.zeros(len(labels_NC), dtype=np.int32)
    return LabelTable("validation", None, labels_NC, labels_NC.astype(np.float32), shards, empty, empty, None)  # type: ignore[arg-type]


def test_what_is_undefined_is_not_drawn() -> None:
    tags = [call[0] for call in _shown(None, SoloComm()).calls["add_scalar"]]
    assert tags == [
        "ap_noisy/a",
        "ap_noisy/c",
        "ap_true/a",
        "ap_true/b",
        "ap_true/c",
        "ece/noisy_teacher",
        "ece/true_teacher",
    ]


def test_pictures_in_true_colour_stretched_to_the_patch(tiny_shards: Path) -> None:
    manifest, table = load_manifest(tiny_shards), load_table(load_manifest(tiny_shards), "validation")
    looks = Quicklooks.of(manifest, table, LocalFiles(manifest.tars), remote=False)
    assert [looks.reader.groups[group].bands[plane] for group, plane in looks.planes] == ["B04", "B03", "B02"]
    assert looks.candidates == range(40)
    assert Quicklooks.of(manifest, table, LocalFiles(manifest.tars), remote=True).candidates == range(32, 40)
    pictures = looks.read(np.array([7, 3], dtype=np.int32))
    assert [row for row, _ in pictures] == [7, 3]
    for _, picture in pictures:
        assert picture.shape == (120, 120, 3)
        assert picture.dtype == np.uint8
        assert (picture.min(), picture.max()) == (0, 255)


def test_a_patch_that_cannot_be_read_has_no_picture(tiny_shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest, table = load_manifest(tiny_shards), load_table(load_manifest(tiny_shards), "validation")
    lost = replace(manifest, shards=tuple(replace(shard, name=f"{shard.name}.lost") for shard in manifest.shards))
    assert Quicklooks.of(lost, table, LocalFiles(manifest.tars), remote=False).read(np.arange(2, dtype=np.int32)) == []
    assert caplog.text.count("no picture of a patch") == 2


def test_captions_say_what_was_recovered_and_what_was_missed() -> None:
    lines = write_captions(
        "S2A_1_2",
        ["sea", "beach", "forest", "town"],
        np.array([0.9, 0.6, 0.7, 0.1], dtype=np.float32),
        np.array([0.95, 0.5, 0.5, 0.5]),
        np.array([True, False, False, False]),
        np.array([True, True, False, True]),
    )
    assert [text for text, _ in lines] == [
        "S2A_1_2", "observed", "0.90 sea", "recovered", "0.60 right beach", "0.70 wrong forest", "true", "0.90 sea",
        "0.60 beach", "0.10 missed town",
    ]  # fmt: skip
    assert draw_panel(np.zeros((64, 64, 3), np.uint8), [*lines, ("w" * 500, "#ffffff")]).shape[1:] == (288, 3)
