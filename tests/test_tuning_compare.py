"""`adagc compare`: what a grid may say, which runs are the same run, the tables' arithmetic, and one comparison for
real that is killed, goes on, and trains nothing again that is known.
"""

import csv
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import yaml

from launch.recipe import load_config
from tests.browser import find_browser, show
from tests.processes import kill, wait_until, with_environment, words_of
from tests.tiny import tiny_settings
from tuning import compare_results, compare_tables
from tuning.cluster import reached
from tuning.compare import main, read
from tuning.compare_report import write_all
from tuning.compare_tables import Found
from tuning.comparison import Cell, Comparison, ComparisonFolder
from tuning.fingerprint import digest_of, settings_of
from tuning.grid import load_grid

CHECKOUT = Path(__file__).parents[1]
TIMEOUT = 120
GRID = {
    "recipe": "recipe.yaml",
    "settings": {"random": {"spml.policy": "random"}, "dominant": {"spml.policy": "dominant"}},
    "methods": {
        "an": {"method.name": "an"},
        "adagc": {"method.name": "adagc"},
        "full": {"spml.policy": "full", "method.name": "an"},
    },
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with a grid and its recipe."""
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text("{}")
    write_grid()
    return tmp_path


def write_grid(**changes: Any) -> None:
    Path("grid.yaml").write_text(yaml.safe_dump({**GRID, **changes}, sort_keys=False))


def words(shards: Path, *more: str) -> list[str]:
    settings = [word for word in tiny_settings(shards, Path("x")) if not word.startswith("run.dir=")]
    return ["grid.yaml", *settings, "--out", "out", *more]


# ---- the grid --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"setings": {}}, "unknown key setings: did you mean settings?"),
        ({"methods": {}}, "methods must hold names"),
        ({"methods": {"an": {"method.name": "an"}, "adagc": {}, True: {}}}, "True is no name"),
        (
            {"methods": {"an": {}, "adagc": {}}},
            "bound: there is no method 'full': add it, name another (an, adagc)",
        ),
        ({"base": "ann"}, "base: there is no method 'ann'"),
        ({"only": {"ful": ["random"]}}, "only: there is no method 'ful': did you mean full?"),
        ({"only": {"full": ["rando"]}}, "only.full: there is no setting 'rando': did you mean random?"),
        ({"recipe": None}, "setting random has no recipe"),
        ({"common": {"run.seed": 3}}, "common: run.seed is the comparison's own"),
        ({"common": {"lr": 3}}, "common: lr is no setting"),
        ({"common": [1]}, "common: [1] must be settings like"),
        ({"settings": {"random": {"methods": {"em": {}}}}}, "settings.random.methods: there is no method 'em'"),
    ],
)
def test_a_grid_that_says_nothing_is_told(here: Path, changes: dict[str, Any], told: str) -> None:
    write_grid(**changes)
    with pytest.raises(ValueError, match=r"^grid\.yaml: ") as error:
        load_grid("grid.yaml")
    assert told in str(error.value)


def test_overrides_win_over_the_recipe_and_are_refused_where_the_grid_wins(here: Path) -> None:
    write_grid(
        common={"optim.epochs": 5, "optim.lr": 0.1},
        only={"adagc": ["dominant"]},
        settings={"random": None, "dominant": {"methods": {"adagc": {"method.gc_weight": 7}}, "optim.global_batch": 8}},
    )
    grid = load_grid("grid.yaml", ["optim.lr=0.2", "data.shards=s"])
    assert [method for setting, method in grid.cells if setting == "random"] == ["an", "full"]
    assert [method for setting, method in grid.cells if setting == "dominant"] == ["an", "adagc", "full"]
    config = grid.config("dominant", "adagc")
    assert (config.optim.lr, config.optim.epochs, config.optim.global_batch) == (0.2, 5, 8)
    assert config.method.gc_weight == 7.0
    with pytest.raises(ValueError, match=r"method\.name=em: grid\.yaml has method\.name in methods\.an, which wins"):
        load_grid("grid.yaml", ["method.name=em"])
    told = r"grid\.yaml has method\.gc_weight in settings\.dominant\.methods\.adagc, which wins"
    with pytest.raises(ValueError, match=told):
        load_grid("grid.yaml", ["method.gc_weight=4"])
    with pytest.raises(ValueError, match=r"spml\.seed is the comparison's own"):
        load_grid("grid.yaml", ["spml.seed=3"])


def test_a_grid_that_has_all_of_a_methods_arguments_wins_over_one_of_them(here: Path) -> None:
    write_grid(methods={**GRID["methods"], "em": {"method.name": "em", "method.kwargs": {"alpha": 0.1}}})  # type: ignore[dict-item]
    with pytest.raises(
        ValueError, match=r"method\.kwargs\.alpha=0\.3: .* has method\.kwargs in methods\.em, which wins"
    ):
        load_grid("grid.yaml", ["method.kwargs.alpha=0.3"])


@pytest.mark.parametrize("name", ["core", "smoke", "reben", "aid"])
def test_the_shipped_grids_fit_the_configuration(name: str) -> None:
    from adagc_dist.methods import method_settings

    grid = load_grid(name, ["data.shards=s"])
    assert {"an", "full", "adagc"} <= set(grid.methods)
    for setting, method in grid.cells:
        if setting == next(iter(grid.settings)):
            method_settings(grid.config(setting, method).method)


# ---- the same run ----------------------------------------------------------------------------------------------------


def digest(*overrides: str) -> str:
    return digest_of(settings_of(load_config(None, ["data.shards=a", "run.dir=b", *overrides])))


@pytest.mark.parametrize(
    "override",
    [
        "data.shards=c",
        "run.dir=d",
        "run.seed=1",
        "spml.seed=1",
        "data.workers=0",
        "engine.device=cpu",
        "optim.lr=0.001",
    ],
)
def test_what_changes_no_figure_changes_no_digest(override: str) -> None:
    assert digest(override) == digest()


@pytest.mark.parametrize(
    "override", ["optim.epochs=61", "optim.lr=0.002", "method.gc_weight=4", "spml.policy=full", "data.augment=false"]
)
def test_what_changes_figures_changes_the_digest(override: str) -> None:
    assert digest(override) != digest()


def test_numbers_of_adagc_are_nothing_to_a_baseline() -> None:
    assert digest("method.name=an", "method.gc_weight=4") == digest("method.name=an") != digest()
    assert digest("method.name=em", "method.kwargs={alpha: 0.3}") != digest("method.name=em")
    ours = "method.name=adagc_levels"
    assert digest(ours, "method.gc_weight=4") == digest(ours) != digest(ours, "method.kwargs={quantile: 0.1}")


def test_a_key_that_came_later_was_at_its_default_and_an_old_default_is_not_todays() -> None:
    settings = settings_of(load_config(None, ["data.shards=a", "run.dir=b"]))
    earlier = {key: value for key, value in settings.items() if key != "optim.clip_norm"}
    assert digest_of(earlier) == digest_of(settings)
    assert digest_of({**settings, "optim.clip_norm": 0.5}) != digest_of(settings)


def test_labels_from_a_file_are_known_by_their_content(tmp_path: Path) -> None:
    for name, text in (("a.csv", "x"), ("b.csv", "x"), ("c.csv", "y")):
        (tmp_path / name).write_text(text)
    one, same, other = (digest("spml.policy=file", f"spml.file={tmp_path / name}.csv") for name in "abc")
    assert one == same != other


# ---- the tables ------------------------------------------------------------------------------------------------------

NEEDED = "setting,method,seed,state,split,shards,settings,map\n"
SCORES = {  # setting, method -> mAP by seed
    ("random", "an"): (0.50, 0.54),
    ("random", "adagc"): (0.58, 0.60),
    ("random", "full"): (0.70, 0.66),
    ("dominant", "an"): (0.60, 0.62),
    ("dominant", "adagc"): (0.59, 0.66),
    ("dominant", "full"): (0.70, 0.66),
}


def row(cell: Cell, seed: int, score: float) -> dict[str, Any]:
    return {
        **{"setting": cell.setting, "method": cell.method, "seed": seed, "state": "finished", "split": "test"},
        **{"map": score, "f1": score - 0.1, "epochs": 2, "samples": 180, "seconds": 9.0 + seed, "shards": cell.shards},
        **{"trigger_epoch": 1, "best_epoch": 2, "ap/sea": score, "settings": cell.settings},
    }


def points(score: float) -> list[dict[str, Any]]:
    return [
        {"epoch": epoch, "noisy_map": score / 2, "true_map": score + epoch / 100, "true_f1": score - 0.2}
        | {"trigger": int(epoch == 1)}
        for epoch in (1, 2)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> ComparisonFolder:
    """A comparison of which all is known from elsewhere but the second seed of dominant AdaGC."""
    cells = [
        Cell(
            setting=setting, method=method, shards="s", epochs=2, rows=90, settings={"spml.policy": policy, "x": method}
        )
        for setting, method in SCORES
        for policy in ["full" if method == "full" else setting]
    ]
    sets = {"all runs": {"optim.epochs": "2"}, "an": {}, "adagc": {"method.name": "adagc"}}
    comparison = Comparison(
        cells=cells, seeds=[0, 1], split="test", base="an", bound="full", ours="adagc", note="Chosen <blindly>.",
        methods=["an", "adagc", "full"], sets=sets, command=["adagc", "compare", "a b"],
        labels={cells[0].shards: [0, 30, 45, 15]},
    )  # fmt: skip
    found = ComparisonFolder(tmp_path / "out")
    found.begin(comparison)
    known = [
        {"row": row(run.cell, run.seed, score), "curve": points(score)}
        for run in comparison.distinct
        for score in [SCORES[run.cell.setting, run.cell.method][run.seed]]
        if (run.cell.setting, run.cell.method, run.seed) != ("dominant", "adagc", 1)
    ]
    found.take_over(known)
    found.take_over(known)  # once
    return found


def test_gaps_and_paired_differences_are_those_of_the_finished_seeds(folder: ComparisonFolder) -> None:
    found = Found(folder.comparison, compare_results.outcomes(folder))
    an, ours, bound = (mean(SCORES["random", name]) for name in ("an", "adagc", "full"))
    gap = found.gap("random", "adagc")
    assert gap is not None
    assert gap.closed == pytest.approx(100 * (ours - an) / (bound - an))
    assert gap.by_seed == pytest.approx([100 * 0.08 / 0.20, 100 * 0.06 / 0.12])
    only = found.gap("dominant", "adagc")
    assert only is not None
    assert only.closed == pytest.approx(100 * -0.01 / 0.10)  # of seed 0, which all three have
    assert found.differences("random", "an") == pytest.approx([8, 6])
    [random, dominant, average] = dict(compare_tables.groups(found))["Results"]
    assert random.rows[0] == ["an", "52.00 ± 2.83", "42.00 ± 2.83", "2", "0.0 ± 0.0", "+7.00 ± 1.41", "2 of 2"]
    assert dominant.rows[1] == ["adagc", "59.00", "49.00", "1", "-10.0", "", ""]
    differences = [8, 6, -1]
    told = f"{mean(differences):+.2f} ± {stdev(differences):.2f}"
    assert average.rows[0] == ["an", "56.50", "46.50", "4", "0.0", told, "2 of 3"]


def test_a_bound_that_is_not_above_its_base_has_no_gap(folder: ComparisonFolder) -> None:
    turned = dataclasses.replace(folder.comparison, base="full", bound="an")
    found = Found(turned, compare_results.outcomes(folder))
    assert found.gap("random", "adagc") is None
    assert "gap closed %" not in compare_tables.groups(
        Found(dataclasses.replace(turned, bound=None), found.outcomes)
    )[0][1][0].head  # fmt: skip


def test_what_was_written_is_taken_over_elsewhere_and_written_the_same(
    folder: ComparisonFolder, tmp_path: Path
) -> None:
    write_all(folder)
    other = ComparisonFolder(tmp_path / "other")
    other.begin(folder.comparison)
    other.take_over(compare_results.read_known(folder.path / "results.csv"))
    write_all(other)
    for name in ("results.csv", "curves.csv"):
        assert (other.path / name).read_bytes() == (folder.path / name).read_bytes()
    rows = csv_rows(folder.path / "results.csv")
    assert [(one["setting"], one["method"], one["seed"]) for one in rows[:3]] == [
        ("random", "an", "0"), ("random", "adagc", "0"), ("random", "full", "0"),
    ]  # fmt: skip
    assert [one["state"] for one in rows].count("unfinished") == 1
    full = [one["digest"] for one in rows if one["method"] == "full"]
    assert len(set(full)) == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a,b\n1,2\n", "has no column setting: give a results.csv of `adagc compare`"),
        (
            "setting,method,seed,state,split,shards,settings,map\nr,an,one,finished,test,s,{},1\n",
            "line 2: seed is 'one'",
        ),
        (
            "setting,method,seed,state,split,shards,settings,map\nr,an,1,finished,test,s,{,1\n",
            "line 2: settings is '{'",
        ),
    ],
)
def test_a_file_that_is_no_table_is_told(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "known.csv").write_text(text)
    with pytest.raises(ValueError, match=r"known\.csv") as error:
        [*compare_results.read_known(tmp_path / "known.csv")]
    assert told in str(error.value)


def test_both_reports_have_the_table_and_a_browser_shows_one_without_network(
    folder: ComparisonFolder, tmp_path: Path
) -> None:
    write_all(folder)
    told = re.sub(" +", " ", (folder.path / "report.md").read_text())
    assert "| an | 52.00 ± 2.83 | 42.00 ± 2.83 | 2 | 0.0 ± 0.0 | +7.00 ± 1.41 | 2 of 2 |" in told
    assert "adagc compare 'a b'" in told
    assert "| setting | patches | mean | 1 | 2 | 3 |" in told
    assert "| random, dominant | 90 | 1.833 | 33.3 | 50.0 | 16.7 |" in told
    assert "| dominant | adagc | 1 | unfinished | - | not begun |" in told
    page = (folder.path / "report.html").read_text()
    assert "Chosen &lt;blindly&gt;." in page
    browser = find_browser()
    if browser is None:
        pytest.skip("no Chromium here")
    script = "document.querySelector('.method.best').dispatchEvent(new PointerEvent('pointermove', {bubbles: true}));"
    shown = show(browser, folder.path / "report.html", script, tmp_path)
    assert not shown.complaints
    assert shown.html.count('class="bar"') == 3
    assert shown.html.count('class="curve finished best on"') == 3 * 3  # three charts, and three runs


# ---- the command -----------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_told_before_anything_starts(
    here: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*more: str) -> str:
        assert main(words(tiny_shards, *more), {}) == 2
        assert not Path("out").exists()
        return capsys.readouterr().err

    assert main(["cores", "--out", "out"], {}) == 2
    message = capsys.readouterr().err
    assert "there is no grid 'cores': give a YAML file, or the name of a shipped one (aid, core" in message
    assert "did you mean core?" in message
    write_grid(methods={**GRID["methods"], "em": {"method.nam": "em"}})  # type: ignore[dict-item]
    assert "em under random: unknown key method.nam: did you mean method.name?" in told()
    write_grid(methods={**GRID["methods"], "em": {"method.name": "emm"}})  # type: ignore[dict-item]
    assert "em under random: " in (message := told())
    assert "method.name" in message
    write_grid(methods={**GRID["methods"], "em": {"method.name": "em", "method.kwargs": {"alfa": 1}}})  # type: ignore[dict-item]
    assert "em under random: unknown key method.kwargs.alfa: did you mean method.kwargs.alpha?" in told()
    write_grid()
    assert "--gpus-per-trial and engine.device=cpu" in told("--gpus-per-trial", "1")
    assert "No such file" in told("--known", "nowhere.csv")
    assert "an under random: " in told("data.shards=nowhere")
    Path("other").mkdir()
    Path("other/sweep.json").touch()
    assert "other is a sweep's folder: name another with --out" in told("--out", "other")


def test_a_dry_run_counts_the_bound_once_and_writes_nothing(
    here: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(tiny_shards, "--dry-run", "--seeds", "2"), {}) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[5] == "seed 0  dominant  full: as full under random"
    assert lines[-1] == f"12 runs, 10 to be trained, {10 * 4 * 90} rows in all; measured on test"
    assert not Path("out").exists()


def test_a_folder_takes_more_methods_and_seeds_but_no_other_settings(
    here: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = read(words(tiny_shards, "--seeds", "1"))
    assert request is not None
    request.folder.begin(request.comparison)
    assert read(words(tiny_shards, "--seeds", "1")) is None
    assert "holds this comparison already: continue it with --resume" in capsys.readouterr().err
    assert read(words(tiny_shards, "--resume", "optim.weight_decay=0.5")) is None
    assert "optim.weight_decay of an under random: the default there, 0.5 here" in capsys.readouterr().err
    assert read(words(tiny_shards, "--resume", "--split", "validation")) is None
    assert "split: test there, validation here" in capsys.readouterr().err
    write_grid(methods={**GRID["methods"], "em": {"method.name": "em"}})  # type: ignore[dict-item]
    assert read(words(tiny_shards, "--resume", "--seeds", "2")) is not None


def test_a_comparison_goes_on_after_a_kill_and_trains_nothing_that_is_known(here: Path, tiny_shards: Path) -> None:
    """What is known is not trained, what has finished not again, and the bound of both settings once."""
    write_grid(only={"an": ["random"], "adagc": ["random"]})
    asked = words(tiny_shards, "--seeds", "1", "--resume", "run.panels_every=0", "optim.epochs=2")
    request = read(asked)
    assert request is not None
    known = next(run for run in request.comparison.runs if run.cell.method == "adagc")
    write_known(Path("known.csv"), {**row(known.cell, 0, 0.5), "settings": json.dumps(known.cell.settings)})
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "RAY"))}
    env |= {"TMPDIR": str(here), "PYTHONPATH": str(CHECKOUT)}
    own = f"TMPDIR={here}"

    def start() -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "launch.cli", "compare", *asked, "--known", "known.csv"]
        with Path("log").open("ab") as out:
            return subprocess.Popen(command, env=env, stdout=out, stderr=out)

    process = start()
    folder = ComparisonFolder(Path("out"))
    wait_until(lambda: any(one.state == "finished" for one in folder.trials()), "a run", TIMEOUT)
    done = {one.number: (one.path / "log.txt").read_text() for one in folder.trials() if one.state == "finished"}
    lines = {pid: words_of(pid) for pid in with_environment(own)}
    kill(*(pid for pid, line in lines.items() if "tuning.comparing" in line and "tuning.step" not in line))
    assert process.wait(TIMEOUT) != 0
    assert not with_environment(own), Path("log").read_text()

    assert start().wait(2 * TIMEOUT) == 0, Path("log").read_text()
    assert not with_environment(own)
    assert {number: (folder.trial_path(number) / "log.txt").read_text() for number in done} == done
    names = [(one.values["setting"], one.values["method"]) for one in folder.trials()]
    assert sorted(names) == [("random", "an"), ("random", "full")]
    rows = csv_rows(Path("out/results.csv"))
    assert {one["state"] for one in rows} == {"finished"}
    assert rows[1]["map"] == "0.5"  # as it was known
    measured = json.loads((folder.trials()[0].path / "metrics.json").read_text())
    assert list(measured) == ["run", "test"]
    assert float(rows[0]["map"]) == pytest.approx(measured["test"]["map_macro"], abs=1e-6)
    assert rows[2]["map"] == rows[3]["map"]  # the bound, trained once
    assert "run.seed=0" not in rows[0]["settings"]
    assert len(csv_rows(Path("out/curves.csv"))) == 3 * 2
    assert Path("out/curves-random.svg").read_text().startswith("<svg xmlns=")
    assert reached(Path("out")) == [2 + 2, 0]  # epochs, and steps beyond: by checkpoints, as a sweep
    assert "\n| full " in Path("log").read_text()


def write_known(path: Path, known: Mapping[str, Any]) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [*known])
        writer.writeheader()
        writer.writerow(known)


def csv_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return [*csv.DictReader(stream)]
