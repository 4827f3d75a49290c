"""The one command line: help that teaches, wrong usage that is told, and a fast door."""

import subprocess
import sys

import pytest

from launch import cli


@pytest.mark.parametrize("argument", ["-h", "--help"])
def test_help_lists_every_command_and_an_example(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([argument]) == 0
    told = capsys.readouterr().out
    for command in cli._COMMANDS:
        assert f"\n  {command} " in told
    for command in ("synth", "shard", "train", "evaluate"):
        assert f"\n  adagc {command} " in told


def test_nothing_asked_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert capsys.readouterr().out.startswith("usage: adagc COMMAND")


def test_an_unknown_command_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian", "demo"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("adagc: there is no command 'trian'\n")
    assert "usage: adagc COMMAND" in told.err


@pytest.mark.parametrize("command", cli._COMMANDS)
def test_the_help_of_every_command_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert f"usage: adagc {command}" in told
    assert told.count(f"adagc {command}") > 1


def test_the_help_of_train_lists_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    told = capsys.readouterr().out
    assert "  method.gc_weight = 3.0\n" in told
    assert "  optim.global_batch = 512\n" in told


def test_a_wrong_setting_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "demo", "data.shards=s", "run.dir=r", "optim.lrate=1"]) == 2
    assert capsys.readouterr().err == "adagc train: unknown key optim.lrate: did you mean optim.lr?\n"


def test_the_door_opens_without_importing_what_is_behind_it() -> None:
    code = "import sys; from launch import cli; cli.main(['--help']); print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert not {"torch", "rasterio", "deepspeed", "ray", "timm"} & {name.strip("' ") for name in loaded.split(",")}
