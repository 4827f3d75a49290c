"""What is searched: values within their bounds, the same for the same seed, and a space that is wrong is told."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.recipe import flatten
from sharding.rng import derive_rng
from tuning.space import Base, Domain, Space, load_space

BASE = Base("demo", ("data.shards=shards",))
BOUNDS = st.tuples(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3)).filter(lambda two: two[0] < two[1] * 0.999)


def write(folder: Path, text: str) -> Space:
    (folder / "space.yaml").write_text(text)
    return load_space(folder / "space.yaml")


@given(BOUNDS, st.sampled_from(["uniform", "loguniform"]), st.integers(0, 1000))
def test_draws_lie_between_the_ends(bounds: tuple[float, float], kind: str, seed: int) -> None:
    value = Domain(kind, bounds).draw(derive_rng(seed))
    assert bounds[0] <= value <= bounds[1]


@given(st.integers(-50, 50), st.integers(1, 50), st.integers(0, 1000))
def test_whole_numbers_and_steps_reach_both_ends(low: int, width: int, seed: int) -> None:
    assert Domain("randint", (low, low + width)).draw(derive_rng(seed)) in range(low, low + width + 1)
    stepped = Domain("quniform", (0.0, 1.0, 0.25))
    assert stepped.draw(derive_rng(seed)) in (0, 0.25, 0.5, 0.75, 1)
    drawn = {stepped.draw(derive_rng(seed, number)) for number in range(100)}
    assert {0, 1} <= drawn


@pytest.mark.parametrize(
    ("bounds", "values"),
    [
        ((0.0, 1.0, 0.3), [0.0, 0.3, 0.6, 0.9]),  # three steps do not reach the end
        ((0.1, 0.5, 0.1), [0.1, 0.2, 0.3, 0.4, 0.5]),
        ((1000.5, 1003.5, 1.0), [1000.5, 1001.5, 1002.5, 1003.5]),  # five digits
    ],
)
def test_steps_end_at_values_that_can_be_drawn_and_lead_to_no_others(
    bounds: tuple[float, ...], values: list[float]
) -> None:
    domain = Domain("quniform", bounds)
    assert domain.ends == (values[0], values[-1])
    rngs = [derive_rng(0, number) for number in range(100)]
    assert {domain.draw(rng) for rng in rngs} == {*values}
    assert {domain.near(value, rng) for value in values for rng in rngs} <= {*values}


def test_a_space_may_end_in_what_is_refused_where_no_step_leads_there(tmp_path: Path) -> None:
    write(tmp_path, "method.teacher_weight: {quniform: [0, 1.2, 0.5]}").check(BASE)
    with pytest.raises(ValueError, match=r"method\.teacher_weight=1\.5: .* must lie in \[0, 1\]"):
        write(tmp_path, "method.teacher_weight: {quniform: [0, 1.7, 0.5]}").check(BASE)


def test_a_trial_is_a_function_of_seed_and_number() -> None:
    space = load_space("adagc")
    one, other = (space.draw(BASE, Path("run"), 3, "trial", number) for number in (7, 8))
    assert one == space.draw(BASE, Path("run"), 3, "trial", 7)
    assert one != other
    config = flatten(BASE.config(one, Path("run")))
    assert {key: config[key] for key in one} == one


def test_the_shipped_space_covers_what_it_is_for_and_fits_the_shipped_recipes() -> None:
    space = load_space("adagc")
    wanted = ("pseudo_threshold", "teacher_weight", "gc_weight", "teacher_lag", "prediction_momentum", "mixup_alpha")
    assert {f"method.{name}" for name in wanted} < space.domains.keys()
    assert any(key.startswith("detector.") for key in space.domains)
    for recipe in ("demo", "reben_random"):
        space.check(Base(recipe, ("data.shards=shards",)))


def test_numbers_as_yaml_and_people_write_them(tmp_path: Path) -> None:
    space = write(tmp_path, "optim.lr: {loguniform: [1e-4, 1e-2]}\noptim.weight_decay: {choice: [0, 1e-3]}\n")
    space.check(BASE)
    assert space.domains["optim.lr"].arguments == (1e-4, 1e-2)
    assert space.domains["optim.weight_decay"].arguments == (0, 1e-3)
    config = BASE.config({"optim.lr": 1e-05, "detector.rule": "never"}, Path("run"))
    assert (config.optim.lr, config.detector.rule) == (1e-5, "never")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("optim.lrate: {uniform: [0, 1]}", "optim.lrate=0.0: unknown key optim.lrate: did you mean optim.lr?"),
        ("method.teacher_weight: {uniform: [0, 2]}", "method.teacher_weight=2.0: .* must lie in \\[0, 1\\]"),
        ("detector.rule: {choice: [plateau, nevr]}", "detector.rule=nevr: .*Expected one of 'plateau'"),
        ("optim.lr: {lognormal: [0, 1]}", "there is no domain 'lognormal': did you mean loguniform"),
        ("optim.lr: {loguniform: [0, 1]}", "must begin above 0, not at 0; uniform may begin there"),
        ("optim.lr: {uniform: [1, 0]}", "uniform from 1 to 0: the first must be less than the second"),
        ("optim.lr: {uniform: [1]}", r"uniform takes \[low, high\], not \[1\]"),
        ("optim.lr: {uniform: [a, 1]}", "'a' is no number"),
        ("optim.lr: 0.1", "0.1 is no domain; write e.g. optim.lr: {uniform:"),
        ("detector.patience: {randint: [1.5, 3]}", "takes whole numbers"),
        ("optim.lr: {quniform: [0, 1, 2]}", "the step 2 must be positive, and no more than 1"),
        ("run.seed: {randint: [0, 3]}", "run.seed cannot be searched: a trial's folder, seed"),
        ("optim.epochs: {randint: [1, 3]}", "optim.epochs cannot be searched: all trials have the same budget"),
        ("detector.max_epochs: {randint: [1, 30]}", "max_epochs=30 is more than 0.4 of optim.epochs=16"),
        ("- optim.lr", "must hold lines like"),
        ("a: [", "is no YAML"),
        ("# nothing", "must hold lines like"),
    ],
)
def test_a_wrong_space_names_key_and_remedy(tmp_path: Path, line: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        write(tmp_path, line).check(BASE)


def test_a_space_that_is_not_there_names_those_that_are() -> None:
    with pytest.raises(
        ValueError, match=r"there is no space 'adagcc': .* shipped one \(adagc, pbt\); did you mean adagc\?"
    ):
        load_space("adagcc")


def test_values_that_fit_alone_and_not_together_are_drawn_again(tmp_path: Path) -> None:
    space = write(
        tmp_path, "detector.rule: {choice: [plateau, fixed]}\ndetector.min_epochs: {choice: [3, 16]}\n"
    )  # 16 of 16 epochs is refused with rule fixed
    space.check(BASE)
    drawn = [space.draw(BASE, Path("run"), 0, number) for number in range(16)]
    together = {(values["detector.rule"], values["detector.min_epochs"]) for values in drawn}
    assert together == {("plateau", 3), ("plateau", 16), ("fixed", 3)}


def test_the_latest_trigger_is_that_of_all_trials(tmp_path: Path) -> None:
    assert load_space("adagc").latest_trigger(BASE) == 6  # 0.4 of 16
    assert write(tmp_path, "detector.max_epochs: {randint: [2, 4]}").latest_trigger(BASE) == 4
    both = "detector.rule: {choice: [plateau, fixed]}\ndetector.min_epochs: {randint: [1, 9]}"
    assert write(tmp_path, both).latest_trigger(BASE) == 9
    assert write(tmp_path, "detector.rule: {choice: [never]}").latest_trigger(BASE) == 0
