"""The step benchmark measures what it says: all cases, parts that add up, counted operations, and a model that is right
where it can be checked by hand.
"""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adagc_dist.batchnorm import batchnorm_layers
from adagc_dist.checkpoint import CheckpointStore
from adagc_dist.comm import SoloComm
from adagc_dist.config import ModelConfig
from adagc_dist.model import create_student
from launch.build import build_trainer
from sharding.reader import ReadError
from tests.benchmarks import soak, step
from tests.benchmarks.step_cases import MemoryReader, TrainerCase, Window
from tests.benchmarks.step_figures import scaling
from tests.benchmarks.step_flops import count_flops
from tests.benchmarks.step_parts import PARTS, Clock
from tests.benchmarks.step_scaling import BUCKET, Exchange, all_reduce_seconds, step_seconds
from tests.benchmarks.step_shards import scenes, write_repeated
from tests.tiny import make_reader, read_batch, slot_of, tiny_config

CPU = torch.device("cpu")
PASSES = {
    "bare": 1.0, "ddp": 1.0, "an": 1.0, "adagc_warmup": 1.0, "adagc_plain": 4 / 3, "adagc_mixup": 5 / 3,
    "an_shards": 1.0, "adagc_shards": 5 / 3, "an+contiguous": 1.0, "adagc_mixup+contiguous": 5 / 3, "an+foreach": 1.0,
    "adagc_mixup+foreach": 5 / 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of the command, on two ranks."""
    path = tmp_path_factory.mktemp("step") / "figures.json"
    small = ["--model", "test_resnet", "--size", "32", "--batch", "4", "--rounds", "1", "--parts-rounds", "1"]
    step.main(["--device", "cpu", "--steps", "2", *small, "--also", "contiguous,foreach", "--json", str(path)])
    figures: dict[str, Any] = json.loads(path.read_text())
    return figures


@pytest.mark.long
def test_all_cases_are_there_with_their_arithmetic(found: dict[str, Any]) -> None:
    cases = found["cases"]
    assert {name: line["arithmetic"] for name, line in cases.items()} == pytest.approx(PASSES)
    for name, line in cases.items():
        assert line["ms"] > 0, name
        assert line["samples_per_second"] == pytest.approx(2 * 4 / line["ms"] * 1e3), name
        assert line["to_an"] == pytest.approx(line["ms"] / cases["an"]["ms"]), name
        plain, _, variant = name.partition("+")
        assert line["to_plain"] == (pytest.approx(line["ms"] / cases[plain]["ms"]) if variant else None), name
        assert 0 < line["utilisation"] < 1, name
        assert 0 <= line["data_wait"] < 1, name
    assert [goal["what"] for goal in found["goals"]] == ["adagc_mixup / an", "adagc_plain / an", "an / ddp"]
    assert all(goal["met"] == (goal["value"] <= goal["goal"]) for goal in found["goals"])


@pytest.mark.long
def test_parts_add_up_to_the_step(found: dict[str, Any]) -> None:
    assert list(found["parts"]) == ["an", "adagc_plain", "adagc_mixup", "an_shards", "adagc_shards"]
    for name, column in found["parts"].items():
        parts = {part: times["ms"] for part, times in column["parts"].items()}
        assert tuple(parts) == PARTS
        assert sum(parts.values()) == pytest.approx(column["step_ms"], rel=0.02), name
        assert min(parts.values()) >= 0, name
        assert parts["rest"] < 0.5 * column["step_ms"], f"{name}: what takes the time has no name"
        for part in ("student forward", "backward", "AdamW", "pixels", "logging", "BatchNorm averaging"):
            assert parts[part] > 0, (name, part)
        assert (parts["teacher forward"] > 0) == name.startswith("adagc")
        assert (parts["clean pass"] > 0) == (name in ("adagc_mixup", "adagc_shards"))
        assert (parts["store"] > 0) == name.startswith("adagc")


@pytest.mark.long
def test_bytes_are_those_of_the_student(found: dict[str, Any]) -> None:
    student = create_student(ModelConfig(name="test_resnet"), num_bands=12, num_classes=19, seed=0)
    features = sum(layer.num_features for layer in batchnorm_layers(student))
    numbers = sum(parameter.numel() for parameter in student.parameters())
    assert found["exchanged_bytes"] == {"gradients": 4 * numbers, "batchnorm": 4 * (2 * features + 1)}
    for line in found["scaling_model"]:
        for world, best in line["best"].items():
            assert 0 < line["worst"][world] <= best <= 1


def test_a_window_takes_its_steps_and_the_epoch_goes_on(tiny_shards: Path, tmp_path: Path) -> None:
    comm = SoloComm()
    checkpoints = CheckpointStore(tmp_path / "checkpoints", comm=comm, keep=1)
    config = tiny_config(tiny_shards, tmp_path, "optim.epochs=100", "optim.global_batch=10")  # 9 steps each
    trainer = build_trainer(config, comm=comm, device=CPU, checkpoints=checkpoints)
    trainer.start()
    memory = MemoryReader.of(trainer.loader, trainer.plan(0).slots(0), 2, pin=False)
    case = TrainerCase("adagc_mixup", trainer, memory, lead=1, calibrating=True, mixup_alpha=1.0)
    stands = []
    for _ in range(3):
        window = Window(1, 2, device=CPU, comm=comm)
        case.run(window)
        assert 0 <= window.waited < window.seconds
        stands.append((trainer.moment.epoch, trainer.moment.epoch_step, trainer.moment.step))
    assert stands == [(0, 3, 3), (0, 6, 6), (1, 3, 9)]
    assert trainer.method.store is not None
    assert int(trainer.method.store.visits.sum()) == sum(len(trainer.plan(1).slot(s, 0, 0).rows) for s in range(3))


def test_a_part_does_not_count_what_it_calls() -> None:
    clock = Clock(CPU)
    inner = clock.around("store", lambda: time.sleep(0.02))

    def outer() -> None:
        time.sleep(0.01)
        inner()

    clock.around("clip", outer)()  # not started: not noted
    clock.start()
    clock.around("clip", outer)()
    assert list(clock.iterating("plan", [1, 2])) == [1, 2]
    time.sleep(0.005)
    clock.stop()
    host = {part: times.host for part, times in clock.read().items()}
    assert host["store"] == pytest.approx(0.02, abs=0.01)
    assert host["clip"] == pytest.approx(0.01, abs=0.008)
    assert host["rest"] == pytest.approx(0.005, abs=0.004)


def test_operations_of_convolutions_by_hand() -> None:
    """A gradient of a weight takes as many as the forward pass, of a depthwise one, too."""
    dense, depthwise = (
        count_flops(ModelConfig(name=name), bands=12, classes=19, size=64) for name in ("test_resnet", "test_convnext")
    )
    for flops in (dense, depthwise):
        assert 2.7 < flops.training / flops.forward <= 3  # the first layer has no gradient of its input
    half = count_flops(ModelConfig(name="test_resnet"), bands=12, classes=19, size=32)
    assert dense.forward / half.forward == pytest.approx(4, rel=0.01)
    assert dense.of_case("adagc_mixup") == pytest.approx(dense.training + 2 * dense.forward)


def test_the_model_of_many_ranks() -> None:
    assert all_reduce_seconds(1e9, 1, bandwidth=1e9, latency=1.0) == 0
    assert all_reduce_seconds(1e9, 4, bandwidth=1e9, latency=0.01) == pytest.approx(1.5 + 4 * 0.01)
    of = Exchange(gradients=4 * BUCKET, batchnorm=0, step=3.0, backward=2.0)
    bucket = all_reduce_seconds(BUCKET, 2, bandwidth=BUCKET, latency=0)  # 1 s
    best, worst = step_seconds(of, 2, bandwidth=BUCKET, latency=0)
    assert (bucket, best, worst) == pytest.approx((1, 3 + 2, 3 + 4))
    assert step_seconds(replace(of, backward=9.0), 2, bandwidth=BUCKET, latency=0)[0] == pytest.approx(3 + 1)


def test_what_the_exchanges_took_here_is_counted_once() -> None:
    """On one rank of the model there is none; on many the share is of the step without it."""
    lines = {"bare": {"ms": 900.0}, "ddp": {"ms": 1000.0}, "an": {"ms": 1150.0}}
    parts = {"backward": {"ms": 700.0}, "BatchNorm averaging": {"ms": 50.0}}
    exchanged = {"gradients": BUCKET, "batchnorm": 1000}
    found = scaling(lines, {"an": {"parts": parts}}, exchanged, fabrics=[1.0], latency=0.0)
    of = Exchange(BUCKET, 1000, step=1.0, backward=0.6)
    for world, share in found[0]["worst"].items():
        assert share == pytest.approx(1.0 / step_seconds(of, int(world), bandwidth=1e9 / 8, latency=0.0)[1])


def test_shards_are_such_that_the_reader_trusts_them(tmp_path: Path) -> None:
    samples = scenes(3)
    manifest = write_repeated(tmp_path / "shards", samples, rows={"train": 5, "validation": 2})
    reader = make_reader(tmp_path / "shards")
    batch = read_batch(reader, slot_of(range(5)))
    expected = torch.from_numpy(samples[1].payload["b10.npy"])
    assert torch.equal(batch.groups[0][4].int(), expected.int())
    tar = tmp_path / "shards" / manifest.shards[0].name
    content = bytearray(tar.read_bytes())
    content[2000] ^= 1
    tar.write_bytes(content)
    with pytest.raises(ReadError, match="train0000000"):
        read_batch(make_reader(tmp_path / "shards"), slot_of(range(5)))


def test_what_is_flat() -> None:
    phases = [False] * 4 + [True] * 6
    flat = [soak.Block(1000 * (i + 1), phase, 5.0 + phase, 4.0 + phase, 500.0 + 20 * phase, 40, 15)
            for i, phase in enumerate(phases)]  # fmt: skip
    assert soak.find_faults(flat, 16) == []
    assert soak.find_faults([replace(flat[0], resident_mb=400.0), *flat[1:]], 16) == []  # what it loads at first
    faults: dict[str, dict[str, Any]] = {
        "a step at 10000 takes 1.20 times as long as at 5000": {"ms": 7.2, "cpu_ms": 7.2},
        "memory has grown by 17.0 MB between steps 5000 and 10000": {"resident_mb": 537.0},
        "50 files at the end, 40 at step 2000": {"files": 50},
        "25 threads at the end, 15 at step 2000": {"threads": 25},
    }
    for fault, changes in faults.items():
        assert soak.find_faults([*flat[:-1], replace(flat[-1], **changes)], 16) == [fault]
    busy = replace(flat[-1], ms=9.0)  # but no more CPU time
    assert soak.find_faults([*flat[:-1], busy], 16) == []
