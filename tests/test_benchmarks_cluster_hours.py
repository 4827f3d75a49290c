"""GPU hours of a full table are what one gets by hand."""

import json
import re
from pathlib import Path

import pytest

from adagc_dist.config import MethodConfig
from tests.benchmarks.cluster_hours import DATA, Data, Kind, extra_forwards, full_table, main
from tests.benchmarks.step_flops import Flops

SMALL = Data(100, 40, 20, bands=3, size=32, classes=4)
SPEED = (1e12, 0.25)


@pytest.fixture
def grid(tmp_path: Path) -> str:
    """Two settings with one bound in common; 8 epochs, of which AdaGC calibrates at most 8 - 3."""
    path = tmp_path / "grid.yaml"
    path.write_text("""
        recipe: demo
        common: {optim.epochs: 8, data.size: 32}
        settings: {random: {spml.policy: random}, dominant: {spml.policy: dominant}}
        methods:
          an: {method.name: an}
          elr: {method.name: elr}
          adagc: {method.name: adagc}
          full: {spml.policy: full, method.name: an}
    """)
    return str(path)


def test_a_run_is_its_epochs_forward_and_backward_and_what_is_scored() -> None:
    """Of 2 FLOP forward and 6 with backward: 100 (8 x 6 + 5 x 2 x 2), 40 x 9 x 2 and 20 x 2."""
    kind = Kind(flops=Flops(2, 6), extra=2, calibrated=5, epochs=8, scorings=9)
    assert [kind.training(SMALL), kind.validation(SMALL), kind.test(SMALL)] == [6800, 720, 40]
    assert kind.run(SMALL) == 7560


def test_a_calibrated_step_has_the_teachers_pass_and_with_mixup_the_clean_images() -> None:
    names = {name: extra_forwards(MethodConfig(name=name)) for name in ("an", "elr", "role", "adagc", "adagc_levels")}  # type: ignore[arg-type]
    assert names == {"an": 0, "elr": 0, "role": 0, "adagc": 2, "adagc_levels": 1}
    assert extra_forwards(MethodConfig(name="adagc", mixup_alpha=0)) == 1


def test_the_table_has_the_comparisons_runs_and_their_sum(grid: str) -> None:
    table = full_table(grid, SMALL, seeds=3, speed=SPEED)
    plain, adagc = table.kinds
    forward, both = plain.flops.forward, plain.flops.training
    assert 2.5 < both / forward < 3  # less than 3: nothing is wanted of the gradient by the images
    assert (table.runs, table.trained) == (3 * 8, 3 * 7)  # the bound once
    assert dict(table.kinds) == {plain: 3 * 5, adagc: 3 * 2}
    assert dict(table.methods) == {plain: ["an", "elr", "full"], adagc: ["adagc"]}
    assert table.rows == 21 * 8 * 100
    scored = (40 * 9 + 20) * forward
    flop = 15 * (100 * 8 * both + scored) + 6 * (100 * (8 * both + 5 * 2 * forward) + scored)
    assert table.flop == pytest.approx(flop, rel=1e-12)
    assert table.hours == pytest.approx(flop / 0.25e12 / 3600, rel=1e-12)


def test_what_a_run_does_is_its_configurations(grid: str) -> None:
    told = full_table(
        grid, SMALL, ["run.eval_student=true", "detector.rule=never", "data.size=16"], seeds=1, speed=SPEED
    )
    assert {(kind.calibrated, kind.scorings) for kind in told.kinds} == {(0, 17)}
    whole = full_table(grid, SMALL, seeds=1, speed=SPEED)
    assert next(iter(told.kinds)).flops.forward < 0.5 * next(iter(whole.kinds)).flops.forward


def test_a_measured_rate_takes_the_place_of_peak_and_share(grid: str) -> None:
    table = full_table(grid, SMALL, seeds=1, speed=SPEED, samples_per_second=50)
    assert table.rate == 50 * next(iter(table.kinds)).flops.training
    assert "50 samples/s of AN, measured" in table.speed


def test_the_command_shows_the_arithmetic(grid: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--grid", grid, "--rows", "100,40,20", "--image", "3,32,4", "--peak", "1", "--mfu", "0.25", "--seeds", "1"]
    assert main([*words, "--json", str(tmp_path / "figures.json")]) == 0
    shown = capsys.readouterr().out
    assert "1 TFLOP/s x 0.25 (assumed) = 0.25 TFLOP/s" in shown
    assert re.search(r"training    100 rows x \(8 x \S+ \+ 5 x 2 x \S+\) GFLOP", shown)
    figures = json.loads((tmp_path / "figures.json").read_text())[grid]
    assert (figures["runs"], figures["trained"], figures["rows"]) == (8, 7, 5600)
    assert figures["gpu_hours"] == pytest.approx(figures["flop"] / 0.25e12 / 3600)


def test_data_that_are_not_known_are_asked_for(grid: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--grid", grid])
    assert "name them with --rows and --image" in capsys.readouterr().err


def test_the_shipped_tables_are_of_the_official_splits() -> None:
    reben = DATA["reben"]
    assert (reben.train, reben.validation, reben.test) == (237_871, 122_342, 119_825)
    assert DATA["aid"].train + DATA["aid"].validation + DATA["aid"].test == 3_000
