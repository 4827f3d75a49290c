"""Recipes: one door for files, names and overrides; what is misspelt is told, what is written reads back equal."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from adagc_dist.config import Config
from launch.recipe import RECIPES, describe_keys, dump_config, flatten, load_config

REQUIRED = ["data.shards=shards", "run.dir=run"]


def load(*overrides: str, recipe: str | Path | None = None) -> Config:
    return load_config(recipe, [*REQUIRED, *overrides])


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_by_name_and_by_path(path: Path) -> None:
    assert load(recipe=path.stem) == load(recipe=path)
    with pytest.raises(ValueError, match=r"data\.shards is not set"):
        load_config(path.stem)


def test_the_promised_recipes_are_shipped() -> None:
    assert {"demo", "reben_random", "reben_dominant"} <= {path.stem for path in RECIPES.glob("*.yaml")}
    assert load(recipe="reben_dominant").spml.policy == "dominant"
    assert load(recipe="reben_random").spml.policy == "random"


def test_overrides_win_over_the_recipe_and_the_last_of_them_over_all() -> None:
    assert load(recipe="demo").model.name == "test_resnet"
    assert load("model.name=resnet18", recipe="demo").model.name == "resnet18"
    assert load("model.name=resnet18", "model.name=resnet50", recipe="demo").model.name == "resnet50"


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("optim.lr=1e-3", "optim", "lr", 1e-3),  # YAML 1.1 reads this as text
        ("optim.lr=3.0e-4", "optim", "lr", 3e-4),
        ("optim.lr=1", "optim", "lr", 1.0),
        ("data.bands=B04,B03, B02", "data", "bands", ("B04", "B03", "B02")),
        ("data.bands=[B08, B8A]", "data", "bands", ("B08", "B8A")),
        ("data.bands=B08", "data", "bands", ("B08",)),
        ("data.augment=false", "data", "augment", False),
        ("model.kwargs.img_size=120", "model", "kwargs", {"img_size": 120}),
        (
            "model.kwargs={img_size: 60, drop_path_rate: 0.1}",
            "model",
            "kwargs",
            {"img_size": 60, "drop_path_rate": 0.1},
        ),
        ("model.pretrained=null", "model", "pretrained", None),
        ("model.pretrained=org/name", "model", "pretrained", "org/name"),
        ("detector.max_epochs=5", "detector", "max_epochs", 5),
        ("method.teacher_momentum=0.99", "method", "teacher_momentum", 0.99),
        ("run.dir=2024-06-01", "run", "dir", "2024-06-01"),  # YAML would make it a date
        ("run.dir=7", "run", "dir", "7"),
        ("schedule.changes={3: {optim.lr: 1e-3}}", "schedule", "changes", {3: {"optim.lr": 0.001}}),
        ("data.shards=a=b: c", "data", "shards", "a=b: c"),
    ],
)
def test_overrides_become_values_of_the_right_type(override: str, section: str, key: str, value: object) -> None:
    found = getattr(getattr(load(override), section), key)
    assert found == value
    assert type(found) is type(value)


def test_model_arguments_are_added_to_those_of_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model: {name: test_vit, kwargs: {img_size: 60}}\n")
    assert load("model.kwargs.drop_path_rate=0.1", recipe=recipe).model.kwargs == {
        "img_size": 60,
        "drop_path_rate": 0.1,
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrate=1", r"unknown key optim\.lrate: did you mean optim\.lr\?"),
        ("optm.lr=1", r"unknown key optm\.lr: did you mean optim\.lr\?"),
        ("method.lr=1", r"unknown key method\.lr: did you mean optim\.lr\?"),
        ("model.seed=1", r"unknown key model\.seed: did you mean spml\.seed or run\.seed\?"),
        ("zzz.qqq=1", r"unknown key zzz\.qqq: `adagc train --help` lists all keys"),
        ("lr=1", r"override 'lr=1' names no section: did you mean optim\.lr\?"),
        ("optim.lr", r"override 'optim\.lr' is not of the form section\.key=value"),
        ("optim.lr=fast", r"key \"optim\.lr\": Expected a .*float.* Got value: fast"),
        ("optim.lr=[1", r"optim\.lr=\[1 is no YAML value"),
        ("optim.epochs=2.5", r"key \"optim\.epochs\": Expected a .*int.* Got value: 2\.5"),
        ("optim.epochs=true", r"key \"optim\.epochs\": Expected a .*int"),
        ("data.augment=maybe", r"key \"data\.augment\": Expected a .*bool"),
        ("method.name=adagcc", r"key \"method\.name\": .*'adagc', .*'an'.* Got value: adagcc"),
        ("spml.policy=partial", r"key \"spml\.policy\": .*'random', 'dominant', 'file', 'full'.* Got value: partial"),
        ("optim.precision=fp16", r"key \"optim\.precision\": .*'fp32', 'bf16'"),
        ("model.kwargs=3", r"key \"model\.kwargs\""),
        ("optim.lr=-1", r"optim\.lr=-1\.0 must not be negative"),
        ("schedule.changes={3: {optim.lr: fast}}", r"key \"schedule\.changes\": Expected a float\. Got value: fast"),
        ("schedule.changes={3: {method.teacher_weight: 2}}", r"method\.teacher_weight=2\.0 must lie in \[0, 1\]"),
        ("data.size=big", r"key \"data\.size\": Expected one of int, null\. Got value: big$"),
        ("engine.batchnorm=no", r"key \"engine\.batchnorm\": Expected one of 'local', 'sync'\. Got value: False$"),
        ("method.combine=min", r"key \"method\.combine\": .*'mean', 'max', 'product'"),
    ],
)
def test_what_is_wrong_is_told_by_its_key(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(override)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lr: 0.1, epoch: 3}", r"unknown key optim\.epoch: did you mean optim\.epochs\?"),
        ("lr: 0.1", r"must hold sections \(data, spml, model, method, detector, optim, schedule, engine, run\)"),
        ("[1, 2]", "must hold sections"),
        ("optim: {lr: ", "is no YAML"),
        ("run: {dir: München}", "is no YAML"),  # not as UTF-8
    ],
)
def test_a_wrong_file_is_told(tmp_path: Path, text: str, message: str) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text, "latin-1")
    with pytest.raises(ValueError, match=message):
        load(recipe=recipe)


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("# nothing\n")
    assert load(recipe=tmp_path / "mine.yaml") == load()


def test_a_missing_recipe_names_the_nearest_and_all() -> None:
    with pytest.raises(
        ValueError, match=r"there is no recipe 'reben_randm': .*demo, reben_dom.*; did you mean reben_random\?"
    ):
        load_config("reben_randm")


@given(
    lr=st.floats(0, 10), epochs=st.integers(10, 10**6), policy=st.sampled_from(["random", "dominant", "full"]),
    bands=st.permutations(["B02", "B8A", "B11"]), maximum=st.none() | st.integers(1, 4),
    folder=st.text(min_size=1, max_size=12),
    kwargs=st.dictionaries(st.text("abc_", min_size=1), st.none() | st.booleans() | st.integers() | st.text()),
)  # fmt: skip
@example(lr=1e-5, epochs=20, policy="full", bands=["B02", "B8A", "B11"], maximum=None, folder="0", kwargs={"_": "0"})
@settings(deadline=None, max_examples=25)
def test_what_is_dumped_loads_equal(
    tmp_path_factory: pytest.TempPathFactory, lr: float, epochs: int, policy: str, bands: list[str],
    maximum: int | None, folder: str, kwargs: dict[str, object],
) -> None:  # fmt: skip
    base = load(f"data.bands={','.join(bands)}", f"spml.policy={policy}")
    config = dataclasses.replace(
        base,
        optim=dataclasses.replace(base.optim, lr=lr, epochs=epochs),
        detector=dataclasses.replace(base.detector, max_epochs=maximum),
        model=dataclasses.replace(base.model, kwargs=kwargs),
        run=dataclasses.replace(base.run, dir=folder),
    )
    path = tmp_path_factory.mktemp("recipe") / "config.yaml"
    path.write_text(dump_config(config))
    again = load_config(path)
    assert again == config
    assert flatten(again) == flatten(config)


def test_a_dumped_configuration_has_every_key() -> None:
    config = load()
    tree = yaml.safe_load(dump_config(config))
    assert {f"{section}.{key}" for section, values in tree.items() for key in values} == set(flatten(config))


def test_help_tells_every_key_with_its_default_and_meaning() -> None:
    lines = describe_keys().splitlines()
    for name in flatten(load()):
        place = next(i for i, line in enumerate(lines) if line.startswith(f"  {name} = "))
        assert lines[place + 1].startswith("      ")
        assert len(lines[place + 1].split()) > 2, f"{name} has no meaning"
    assert "  optim.lr = 0.001" in lines
