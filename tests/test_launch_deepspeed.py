"""DeepSpeed behind the engine's protocol: the same losses, weights, averages and checkpoints as DDP, but for rounding.

Largest deviation of losses and gradient norms from DDP's, of 56 steps on two ranks (GroupNorm, float32, a rewind in
between), as a share of their values: ZeRO 0 none, ZeRO 1 2e-7, ZeRO 2 with another accumulation 2e-6.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adagc_dist.agreement import NoRequests, Stopped
from adagc_dist.checkpoint import CheckpointStore
from adagc_dist.comm import Comm, PeerError
from adagc_dist.config import Config
from adagc_dist.reasons import StopReason
from adagc_dist.tracking import NullTracker
from adagc_dist.trainer import Trainer
from launch.build import build_trainer
from launch.engines.ddp import DdpEngine
from launch.engines.deepspeed_engine import DeepSpeedEngine
from launch.engines.deepspeed_settings import deepspeed_settings
from launch.failure import EXIT_LOST_PEER
from tests.ranks import run_ranks
from tests.test_elastic import GROUPNORM
from tests.test_launch_engines import CPU, batch, settings, small_student, train
from tests.test_training import Scripted
from tests.test_training import train as train_command
from tests.tiny import tiny_config, tiny_settings

BOUND = 1e-4
STAGES = (0, 1, 2)


def deepspeed(stage: int) -> list[str]:
    return ["engine.name=deepspeed", f"engine.zero_stage={stage}"]


def make_engine(comm: Comm, config: Config, student: nn.Module | None = None) -> DeepSpeedEngine | DdpEngine:
    student = student or small_student()
    if config.engine.name == "ddp":
        return DdpEngine(student, config, comm=comm, device=CPU)
    known = deepspeed_settings(config, comm.world_size)
    return DeepSpeedEngine(student, config, comm=comm, device=CPU, settings=known)


def assert_near(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], bound: float = 1e-5) -> None:
    torch.testing.assert_close(dict(found), dict(expected), rtol=bound, atol=bound)


def assert_same_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def engines_agree(comm: Comm, base: list[str], json_path: str | None) -> None:
    """Norms, weights and optimiser state are DDP's; and a state goes from any engine to any other."""
    accumulation = settings(*base).optim.accumulation
    ddp = make_engine(comm, settings(*base))
    norms = train(ddp, range(3), accumulation)
    weights, state = copied(ddp.student.state_dict()), copied(ddp.state())
    norms += train(ddp, range(3, 6), accumulation)
    others = [f"engine.deepspeed_json={json_path}"] if json_path else []
    for stage in STAGES:
        config = settings(*base, *deepspeed(stage), *others)
        engine = make_engine(comm, config)
        assert engine.state() == {}
        assert train(engine, range(3), accumulation) == pytest.approx(norms[:3], rel=1e-5)
        own_weights, own_state = copied(engine.student.state_dict()), copied(engine.state())
        assert_near(own_weights, weights)
        assert_near(own_state, state)
        own_norms = train(engine, range(3, 6), accumulation)
        assert own_norms == pytest.approx(norms[3:], rel=1e-5)
        assert_near(engine.student.state_dict(), ddp.student.state_dict())
        own_end = copied(engine.student.state_dict())

        engine.student.load_state_dict(own_weights)  # a rewind
        engine.load_state(own_state)
        assert_same_bits(engine.state(), own_state)
        assert train(engine, range(3, 6), accumulation) == own_norms
        assert_same_bits(engine.student.state_dict(), own_end)

        fresh = make_engine(comm, config)  # a resume
        fresh.student.load_state_dict(own_weights)
        fresh.load_state(own_state)
        assert_same_bits(fresh.state(), own_state)
        assert train(fresh, range(3, 6), accumulation) == own_norms
        assert_same_bits(fresh.student.state_dict(), own_end)

        fresh.student.load_state_dict(weights)  # and of DDP's checkpoint, which for once is of no step
        fresh.load_state({})
        assert fresh.state() == {}
        anew = make_engine(comm, settings(*base))
        anew.student.load_state_dict(weights)
        assert train(fresh, range(3), accumulation) == pytest.approx(train(anew, range(3), accumulation), rel=1e-5)
        assert_near(fresh.student.state_dict(), anew.student.state_dict())

        anew.student.load_state_dict(own_weights)
        anew.load_state(own_state)
        assert train(anew, range(3, 6), accumulation) == pytest.approx(own_norms, rel=1e-5)


def compare(comm: Comm, json_path: str) -> None:
    engines_agree(comm, ["optim.clip_norm=0.5", "optim.weight_decay=0.1"], None)
    engines_agree(comm, ["optim.clip_norm=0", "optim.accumulation=3"], None)
    engines_agree(comm, ["optim.accumulation=2"], json_path)
    engines_agree(comm, ["optim.precision=bf16"], None)  # as near only if gradients are summed in float32
    check_precision(comm)
    check_divergence(comm)
    check_refusals(comm)
    check_timeout(comm)


def check_precision(comm: Comm) -> None:
    half, full = (make_engine(comm, settings(f"optim.precision={name}", *deepspeed(2))) for name in ("bf16", "fp32"))
    logits = half.forward(batch(0)), full.forward(batch(0))
    assert logits[0].dtype == torch.float32
    assert 1e-5 < (logits[0] - logits[1]).abs().max() < 0.05
    assert {parameter.dtype for parameter in half.student.parameters()} == {torch.float32}


def check_divergence(comm: Comm) -> None:
    """ZeRO would go on without the step, and tell nobody."""
    for stage in (1, 2):
        engine = make_engine(comm, settings(*deepspeed(stage)))
        engine.backward(engine.forward(batch(0)).sum() * float("inf"), last=True)
        with pytest.raises((ValueError, PeerError), match="the gradient is not finite: training has diverged"):
            engine.step(0.01)


def check_refusals(comm: Comm) -> None:
    """What DeepSpeed finds only when it makes an engine: told by one rank."""
    scalar = nn.Sequential(nn.Linear(5, 3))
    scalar.register_parameter("scale", nn.Parameter(torch.tensor(1.0)))
    with pytest.raises((ValueError, PeerError), match=r"the model has scale: set engine\.name=ddp$"):
        make_engine(comm, settings(*deepspeed(0)), scalar)
    for wrong in ({"prescale_gradients": True}, {"zero_optimization.allgather_bucket_size": 12345}):
        config = settings(*deepspeed(2), "engine.deepspeed_json=ds.json")
        known = deepspeed_settings(settings(*deepspeed(2)), comm.world_size)
        for key, value in wrong.items():
            section, _, name = key.rpartition(".")
            (known[section] if section else known)[name] = value
        with pytest.raises((ValueError, PeerError)) as refusal:
            DeepSpeedEngine(small_student(), config, comm=comm, device=CPU, settings=known)
        assert "engine.deepspeed_json=ds.json: " in str(refusal.value)
        assert isinstance(refusal.value, ValueError) == (comm.rank == 0)


def check_timeout(comm: Comm) -> None:
    """A peer that is missed is missed for as long as the recipe says, engine by engine."""
    for minutes in (3.0, 0.05):
        engine = make_engine(comm, settings(*deepspeed(2), f"engine.timeout_minutes={minutes}"))
    if comm.rank == 0:
        start = time.monotonic()
        with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
            engine.backward(engine.forward(batch(0)).sum(), last=True)
        assert time.monotonic() < start + 30.0
    comm.barrier()


def test_an_engine_is_as_good_as_another(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"  # several buckets, one of them smaller than a parameter
    zero = {"reduce_bucket_size": 30, "round_robin_gradients": True, "parameter_alignment": False}
    path.write_text(json.dumps({"zero_optimization": zero, "gradient_accumulation_steps": 2}))
    run_ranks(3, compare, str(path))


@dataclass
class Recorder(NullTracker):
    """Losses and gradient norms of each step."""

    found: dict[tuple[str, int], float] = field(default_factory=dict)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        names = ("loss/bce", "loss/gc", "gradient_norm")
        self.found |= {(name, step): values[name] for name in names if name in values}


class StopAt(NoRequests):
    """Asks to stop once so many steps are done."""

    def __init__(self, step: int | None) -> None:
        self.trainer: Trainer | None = None
        self._step = step

    @property
    def stop(self) -> StopReason | None:  # type: ignore[override]
        asked = self.trainer is not None and self._step is not None and self.trainer.moment.step + 1 >= self._step
        return StopReason.BUDGET if asked else None


def run_training(
    comm: Comm, shards: Path, folder: Path, overrides: list[str], *, until: int | None = None, rewinds: bool = False
) -> tuple[Trainer, dict[tuple[str, int], float]]:
    """A run that continues what ``folder`` holds, up to a step or to its end; and what it reported."""
    config = tiny_config(shards, folder, "run.log_every=1", "run.checkpoint_every=epoch", *overrides)
    checkpoints, requests = CheckpointStore(folder, comm=comm, keep=9), StopAt(until)
    trainer = build_trainer(config, comm=comm, device=CPU, checkpoints=checkpoints, requests=requests)
    requests.trainer, trainer.tracker = trainer, (recorder := Recorder())
    newest = checkpoints.latest()
    if newest is None:
        trainer.start()
    else:
        trainer.resume(newest)
    if rewinds:
        trainer.detector = Scripted()  # type: ignore[assignment]
    try:
        trainer.run()
    except Stopped:
        assert until is not None
    return trainer, recorder.found


def deviation(found: dict[tuple[str, int], float], expected: dict[tuple[str, int], float]) -> float:
    """The largest, as a share of the expected value."""
    assert found
    assert found.keys() <= expected.keys()
    return max(abs(value - expected[point]) / max(abs(expected[point]), 1e-12) for point, value in found.items())


def store_of(trainer: Trainer) -> dict[str, Tensor]:
    """All rows of the newest checkpoint, in the split's order, whichever ranks they lie on."""
    newest = trainer.checkpoints.latest()
    rows = None if newest is None else newest.rows(0, 1)
    assert rows is not None
    order = rows["rows"].argsort()
    return {name: tensor[order] for name, tensor in rows.items()}


SMALL = [*GROUPNORM, "data.bands=[B02,B04]", "data.size=16"]
PHASES = [*SMALL, "optim.epochs=7"]  # 56 steps; the trigger after the third epoch rewinds to the first


def train_with_all(comm: Comm, shards: Path, folder: Path) -> dict[str, float]:
    ddp, expected = run_training(comm, shards, folder / "ddp", PHASES, rewinds=True)
    assert {step for _, step in expected} == {*range(1, 57)}
    assert ddp.moment.calibrating
    assert ddp.moment.best_epoch == 0
    found = {}
    for stage in STAGES:
        accumulated = ["optim.accumulation=2"] if stage == 2 else []
        overrides = [*PHASES, *deepspeed(stage), *accumulated]
        own, losses = run_training(comm, shards, folder / f"zero-{stage}", overrides, rewinds=True)
        assert losses.keys() == expected.keys()
        found[f"zero {stage}"] = deviation(losses, expected)
        assert vars(own.moment) == vars(ddp.moment)
        assert_near(own.teacher.model.state_dict(), ddp.teacher.model.state_dict(), BOUND)
        assert_near(own.engine.state(), ddp.engine.state(), BOUND)
        assert_near(store_of(own), store_of(ddp), BOUND)
    return found


def test_losses_of_both_phases_are_those_of_ddp(tiny_shards: Path, tmp_path: Path) -> None:
    for found in run_ranks(2, train_with_all, tiny_shards, tmp_path, timeout=120.0):
        assert all(worst < BOUND for worst in found.values()), found


SHORT = [*SMALL, "optim.epochs=2", "detector.rule=fixed", "detector.min_epochs=1"]  # 16 steps, half of them calibrate
HALF = 5


def train_twice(comm: Comm, shards: Path, folder: Path) -> None:
    """With each stage, without a stop and with one in mid-epoch: not a bit differs."""
    for stage in STAGES:
        overrides = [*SHORT, *deepspeed(stage)]
        whole, expected = run_training(comm, shards, folder / f"whole-{stage}", overrides)
        _, before = run_training(comm, shards, folder / f"parted-{stage}", overrides, until=HALF)
        if comm.rank == 0:
            shutil.copytree(folder / f"parted-{stage}", folder / f"half-{stage}")
        parted, after = run_training(comm, shards, folder / f"parted-{stage}", overrides)
        assert {step for _, step in before} == {*range(1, HALF + 1)}
        assert before | after == expected
        assert_same_bits(parted.teacher.model.state_dict(), whole.teacher.model.state_dict())
        assert_same_bits(parted.engine.state(), whole.engine.state())
        assert_same_bits(store_of(parted), store_of(whole))


def go_on(comm: Comm, shards: Path, folder: Path, overrides: list[str]) -> dict[tuple[str, int], float]:
    _, found = run_training(comm, shards, folder, overrides)
    return found


def go_on_with_others(comm: Comm, shards: Path, folder: Path) -> None:
    """A checkpoint of ZeRO 2 on two ranks is continued by DDP and another stage, and one of DDP by ZeRO."""
    whole = go_on(comm, shards, folder / "ddp", SHORT)
    run_training(comm, shards, folder / "half-ddp", SHORT, until=HALF)
    changes = {"half-2": [[], deepspeed(1)], "half-1": [deepspeed(0)], "half-ddp": [deepspeed(2)]}
    for half, engines in changes.items():
        for number, engine in enumerate(engines):
            run = folder / f"{half}-{number}"
            if comm.rank == 0:
                shutil.copytree(folder / half, run)
            comm.barrier()
            assert deviation(go_on(comm, shards, run, [*SHORT, *engine]), whole) < BOUND


def train_with_batchnorm(comm: Comm, shards: Path, folder: Path) -> None:
    for mode in ("local", "sync"):
        base = ["data.bands=[B02]", "data.size=16", "optim.epochs=1", "detector.rule=never", f"engine.batchnorm={mode}"]
        ddp, expected = run_training(comm, shards, folder / f"ddp-{mode}", base)
        own, found = run_training(comm, shards, folder / f"zero-{mode}", [*base, *deepspeed(1)])
        assert deviation(found, expected) < BOUND
        assert_near(own.engine.student.state_dict(), ddp.engine.student.state_dict(), BOUND)


def on_two_ranks(comm: Comm, shards: Path, folder: Path) -> None:
    """In one process, for DeepSpeed takes seconds to start."""
    train_with_batchnorm(comm, shards, folder)
    train_twice(comm, shards, folder)
    go_on_with_others(comm, shards, folder)


@pytest.fixture(scope="module")
def halves(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("halves")
    run_ranks(2, on_two_ranks, tiny_shards, folder, timeout=200.0)
    return folder


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.long), 3])
def test_a_checkpoint_of_two_ranks_goes_on_with_others(
    halves: Path, tiny_shards: Path, tmp_path: Path, ranks: int
) -> None:
    shutil.copytree(halves / "half-2", tmp_path / "run")
    shutil.copytree(halves / "half-2", tmp_path / "ddp")
    (found, *_) = run_ranks(ranks, go_on, tiny_shards, tmp_path / "run", [*SHORT, *deepspeed(2)], timeout=120.0)
    (expected,) = run_ranks(1, go_on, tiny_shards, tmp_path / "ddp", SHORT)
    assert {step for _, step in found} == {*range(HALF + 1, 17)}
    assert deviation(found, expected) < BOUND


def settings_of(path: Path, content: Any, *overrides: str) -> dict[str, Any]:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return deepspeed_settings(settings(*deepspeed(2), f"engine.deepspeed_json={path}", *overrides), 2)


def test_a_users_settings_join_those_of_the_recipe(tmp_path: Path) -> None:
    named = {
        "communication_data_type": "bf16",
        "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1000},
        "gradient_clipping": 0.5,
    }
    assert settings_of(tmp_path / "ds.json", named, "optim.accumulation=3", "optim.clip_norm=0.5") == {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1000},
        "torch_autocast": {"enabled": False, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "timers": {"throughput": {"enabled": False}},
        "communication_data_type": "bf16",
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train_batch_size": 64}, r"train_batch_size=64 is for the recipe.*and set optim\.global_batch$"),
        ({"gradient_accumulation_steps": 4}, r"gradient_accumulation_steps=4 .*set optim\.accumulation$"),
        ({"gradient_clipping": 0.1}, r"gradient_clipping=0\.1 .*set optim\.clip_norm$"),
        ({"optimizer": {"type": "Adam"}}, r"optimizer=.*set optim\.lr and optim\.weight_decay"),
        ({"scheduler": {"type": "WarmupLR"}}, r"scheduler=.*set optim\.lr, optim\.warmup_steps"),
        ({"bf16": {"enabled": True}}, r"bf16=.*set optim\.precision$"),
        ({"torch_autocast": {"enabled": True}}, r"torch_autocast\.enabled=true .*set optim\.precision$"),
        ({"zero_optimization": {"stage": 1}}, r"zero_optimization\.stage=1 .*set engine\.zero_stage$"),
        ({"zero_optimization": 2}, r"zero_optimization=2 is not a setting.*did you mean zero_optimization\.stage"),
        ({"zero_optimization": {"overlap_com": True}}, r"did you mean zero_optimization\.overlap_comm\?$"),
        ({"wall_clock_breakdwon": True}, r"did you mean wall_clock_breakdown\?$"),
        ({"quantum": True}, r"quantum=true is not a setting .*it may hold communication_data_type, "),
        ([1], "must hold a JSON object, not a list$"),
        ("{", "cannot be read as JSON: Expecting property name"),
    ],
)
def test_what_a_json_may_not_say_is_refused_by_name(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        settings_of(tmp_path / "ds.json", content)
    assert str(refusal.value).startswith(f"engine.deepspeed_json={tmp_path}/ds.json")


def test_what_would_have_no_effect_is_refused(tmp_path: Path) -> None:
    path, asked = tmp_path / "ds.json", {"communication_data_type": "bf16"}
    with pytest.raises(ValueError, match=r"has no effect with optim\.precision=bf16 .*lower_precision_safe_modules"):
        settings_of(path, asked, "optim.precision=bf16")
    found = settings_of(path, asked, "optim.precision=bf16", "engine.zero_stage=0")
    assert found["communication_data_type"] == "bf16"


def test_a_json_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"engine\.deepspeed_json=.*none\.json does not exist$"):
        deepspeed_settings(settings(f"engine.deepspeed_json={tmp_path}/none.json"), 1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("engine.zero_stage=3", r"engine\.zero_stage=3 is not supported: the teacher .* Set engine\.zero_stage=2"),
        ("engine.zero_stage=4", r"engine\.zero_stage=4 must be 0, 1 or 2"),
        ("engine.zero_stages=1", "zero_stages"),
        ("engine.name=deepsped", "deepsped"),
    ],
)
def test_wrong_settings_are_refused_before_anything_starts(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings("engine.name=deepspeed", override)


@pytest.mark.parametrize(
    ("named", "parts"),
    [
        ({"fp16": {"enabled": True}}, ("fp16=", "set optim.precision")),
        ({"zero_optimization": {"reduce_bucket_size": -1}}, ("reduce_bucket_size", "greater than 0")),
    ],
)
def test_ranks_refuse_with_one_voice(
    tiny_shards: Path, tmp_path: Path, named: dict[str, Any], parts: tuple[str, str]
) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(named))
    overrides = [*deepspeed(1), f"engine.deepspeed_json={tmp_path}/ds.json"]
    (code, told), (other_code, other_told) = train_command(
        "demo", tiny_settings(tiny_shards, tmp_path / "run", *overrides)
    )
    assert (code, other_code, other_told) == (1, EXIT_LOST_PEER, "")
    assert told.startswith("adagc train: engine.deepspeed_json=")
    assert told.count("\n") == 1
    assert all(part in told for part in parts)
    assert not (tmp_path / "run").exists()


def test_a_command_is_as_quiet_as_under_ddp(tiny_shards: Path, tmp_path: Path) -> None:
    """Through the command line, without torchrun: no line that DDP would not show, and no file of DeepSpeed's."""
    run = tmp_path / "run"
    overrides = ["optim.epochs=1", "detector.rule=never", "data.size=16", *deepspeed(2)]
    result = subprocess.run(
        [sys.executable, "-m", "launch.cli", "train", "demo", *tiny_settings(tiny_shards, run, *overrides)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert [line for line in result.stderr.splitlines() if not line.startswith("epoch 1/1")] == []
    assert len(result.stdout.splitlines()) == 2
    assert {path.name for path in (run / "checkpoints").rglob("*.*")} >= {"optimizer.safetensors"}
