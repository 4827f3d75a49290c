"""Questions that may never be answered (a hung file system, a driver that is stuck), asked by children with a deadline.

A thread would not do: one that waits for a dead disk cannot be ended, and keeps its process from ending.
"""

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

__all__ = ["Answer", "Line", "ask"]

Question = Callable[[], object]


@dataclass(frozen=True)
class Answer:
    """What came of one question: ``value``, or why there is none."""

    value: Any = None
    error: str = ""


@dataclass(frozen=True)
class Line:
    """Questions by name, put one after the other in one process, so that they share imports; ``seconds`` for all."""

    questions: Mapping[str, Question]
    seconds: float


def ask(lines: Sequence[Line]) -> dict[str, Answer]:
    """Put all questions, the lines at once, and give up those of a line that have no answer in its time.

    Args:
        lines: the names are unique over all lines. To be asked by a process of one thread: each line is a fork of it.
    """
    began = time.monotonic()
    answers: dict[str, Answer] = {}
    open_lines: dict[Connection, tuple[Line, list[str]]] = {}
    children = []
    for line in lines:
        child, pipe = _forked(line.questions)
        children.append(child)
        open_lines[pipe] = line, list(line.questions)
    try:
        while open_lines:
            first_deadline = began + min(line.seconds for line, _ in open_lines.values())
            ready = wait(list(open_lines), max(0.0, first_deadline - time.monotonic()))
            for pipe, (line, names) in list(open_lines.items()):
                if pipe in ready:
                    _receive(pipe, names, answers)
                elif time.monotonic() >= began + line.seconds:
                    _give_up(line.seconds, names, answers)
                if not names:
                    del open_lines[pipe]
    finally:
        for child in children:
            _end(child)
    return answers


def _forked(line: Mapping[str, Question]) -> tuple[int, Connection]:
    """The child that answers a line, and where its answers come."""
    ours, theirs = Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)  # a group with the programs that it starts
        try:
            _answer(line, theirs)
        finally:
            os._exit(0)  # nothing of the parent's is to be ended here
    os.setpgid(child, child)  # whoever of both comes first
    theirs.close()
    return child, ours


def _end(child: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, os.WNOHANG)  # no longer: who waits for a dead disk does not even hear that signal


def _answer(line: Mapping[str, Question], pipe: Connection) -> None:
    for question in line.values():
        try:
            answer = Answer(question())
        except Exception as error:
            answer = Answer(error=_told(error))
        pipe.send(answer)


def _receive(pipe: Connection, names: list[str], answers: dict[str, Answer]) -> None:
    """A line's next answer, that of the first of ``names``; or the line's end, before all were answered."""
    try:
        answers[names[0]] = pipe.recv()
        del names[0]
    except EOFError:
        answers |= {name: Answer(error="its process died without a word (killed from outside?)") for name in names}
        names.clear()


def _give_up(seconds: float, names: list[str], answers: dict[str, Answer]) -> None:
    first, *later = names
    answers[first] = Answer(error=f"no answer within {seconds:g} s")
    answers |= {name: Answer(error=f"not tried: {first} gave no answer") for name in later}
    names.clear()


def _told(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"
