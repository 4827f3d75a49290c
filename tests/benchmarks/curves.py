"""The README's picture of a run: the teacher's validation mAP over epochs, from the runs' metrics.jsonl, as one SVG.

python -m tests.benchmarks.curves demo/runs/an demo/runs/adagc --out launch/demo.svg
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 340, 56, 190, 20, 44
COLOURS = ("#7a7a7a", "#1f6fb4", "#c2571a", "#2c8f4e")
SERIES = (("map/true_teacher", "all labels", ""), ("map/noisy_teacher", "observed labels", "6 4"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, at most four")
    parser.add_argument("--out", type=Path, required=True, help="SVG to write")
    arguments = parser.parse_args()
    runs = {
        run.name: [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in arguments.runs
    }
    arguments.out.write_text(draw(runs))


def draw(runs: dict[str, list[dict[str, Any]]]) -> str:
    """SVG text: a colour per run, full lines for the true mAP, dashed for the noisy one, upright at the trigger."""
    epochs = max(len(lines) for lines in runs.values())
    top = 0.1 * (1 + int(10 * max(line[key] for lines in runs.values() for line in lines for key, _, _ in SERIES)))
    parts = [*_grid(epochs, top)]
    entries: list[tuple[str, str, str]] = []
    for (name, lines), colour in zip(runs.items(), COLOURS):
        for key, label, dash in SERIES:
            points = [_place(number + 1, line[key], epochs, top) for number, line in enumerate(lines)]
            parts.append(_polyline(points, colour, dash))
            entries.append((f"{name}, {label}", colour, dash))
        for number, line in enumerate(lines):
            if line["trigger"] and any(later["phase"] == "calibration" for later in lines):
                x, _ = _place(number + 1, 0, epochs, top)
                parts.append(_line(x, TOP, x, HEIGHT - BOTTOM, colour, "2 3"))
                parts.append(_text(x + 4, TOP + 12, f"{name}: trigger", colour))
    parts += _legend(entries)
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n{body}\n</svg>\n'
    )


def _grid(epochs: int, top: float) -> list[str]:
    parts = [
        _text((LEFT + WIDTH - RIGHT) / 2 - 20, HEIGHT - 8, "epoch"),
        _text(4, TOP - 6, "mAP of the teacher, validation"),
    ]
    for tenth in range(round(10 * top) + 1):
        _, y = _place(1, tenth / 10, epochs, top)
        parts += [_line(LEFT, y, WIDTH - RIGHT, y, "#dddddd"), _text(LEFT - 26, y + 4, f"{tenth / 10:.1f}")]
    step = max(1, epochs // 10)
    for epoch in range(step, epochs + 1, step):
        x, _ = _place(epoch, 0, epochs, top)
        parts.append(_text(x - 4, HEIGHT - BOTTOM + 16, str(epoch)))
    return parts


def _legend(entries: Sequence[tuple[str, str, str]]) -> list[str]:
    parts = []
    for number, (label, colour, dash) in enumerate(entries):
        x, y = WIDTH - RIGHT + 16, TOP + 20 + 20 * number
        parts += [_line(x, y, x + 26, y, colour, dash, 2), _text(x + 32, y + 4, label)]
    return parts


def _place(epoch: float, value: float, epochs: int, top: float) -> tuple[float, float]:
    x = LEFT + (epoch - 1) / max(1, epochs - 1) * (WIDTH - LEFT - RIGHT)
    return x, HEIGHT - BOTTOM - value / top * (HEIGHT - TOP - BOTTOM)


def _polyline(points: Sequence[tuple[float, float]], colour: str, dash: str) -> str:
    text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{text}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, dash: str = "", width: int = 1) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}" stroke-dasharray="{dash}"/>'


def _text(x: float, y: float, text: str, colour: str = "#333333") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}">{escape(text)}</text>'


if __name__ == "__main__":
    main()
