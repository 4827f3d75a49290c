"""What tests share: one small shard folder a session."""

import logging
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.tiny import write_tiny

# The same examples in every run: a red run can be repeated, and a green one stays green until the code changes.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 train, 40 validation and 40 test rows of 12 bands at native size, 19 classes; not to be changed, copy what is
    to be damaged.
    """
    folder = tmp_path_factory.mktemp("shards") / "tiny"
    write_tiny(folder)
    return folder


@pytest.fixture(autouse=True)
def no_log_handler_stays() -> Iterator[None]:
    """One that a test leaves would write what others log, to streams that are closed by then."""
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    left = [one for one in root.handlers if one not in before and not type(one).__module__.startswith("_pytest.")]
    for handler in left:
        root.removeHandler(handler)
        handler.close()
    assert not left, f"the test leaves {left} on the root logger"


@pytest.fixture(autouse=True)
def no_signal_stays_ignored() -> Iterator[None]:
    """What is started later would inherit it, and could not be stopped."""
    before = [signal.getsignal(number) for number in _SIGNALS]
    yield
    after = [signal.getsignal(number) for number in _SIGNALS]
    for number, handler in zip(_SIGNALS, before):
        signal.signal(number, handler)
    assert after == before, "the test leaves signals ignored, or with a handler of its own"
