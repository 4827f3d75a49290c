"""Pictures of patches with their labels written below: observed, recovered, true."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from sharding.files import ShardFiles
from sharding.manifest import LabelTable, Manifest
from sharding.reader import PatchReader, Target, select_bands

__all__ = ["Caption", "Quicklooks", "draw_panel", "write_captions"]

log = logging.getLogger(__name__)

_SIDE = 288  # pixels; a card of TensorBoard's is a little wider
_LINE = 15
_KEY_LETTERS = 36  # a line of them; of a longer key the end tells most
_PERCENTILES = (2.0, 98.0)
_TRUE_COLOUR = ("B04", "B03", "B02")  # of Sentinel-2
_PLAIN, _RIGHT, _WRONG, _HEAD = "#ffffff", "#7ee08a", "#ff9a76", "#9aa7b4"

Pixels = NDArray[np.uint8]
Caption = tuple[str, str]
"""A line and its colour."""


@dataclass(frozen=True)
class Quicklooks:
    """Reads patches of one split as small pictures in true colour.

    Attributes:
        planes: the group and the plane within it of red, green and blue.
        candidates: the rows that may be asked for without having a shard fetched from afar.
    """

    reader: PatchReader
    planes: tuple[tuple[int, int], ...]
    candidates: range

    @classmethod
    def of(cls, manifest: Manifest, table: LabelTable, files: ShardFiles, *, remote: bool) -> "Quicklooks":
        """Red, green and blue are Sentinel-2's, else the first three bands of a member, else one band thrice."""
        bands = _colours(manifest)
        groups = select_bands(manifest, tuple(dict.fromkeys(bands)))
        places = {band: (g, p) for g, group in enumerate(groups) for p, band in enumerate(group.bands)}
        last = manifest.rows_per_shard(table.split)[-1]  # read last of all in a validation, so it is still at hand
        candidates = range(len(table) - last if remote else 0, len(table))
        reader = PatchReader(manifest, table, groups, files)
        return cls(reader, tuple(places[band] for band in bands), candidates)

    def read(self, rows: NDArray[np.int32]) -> list[tuple[int, Pixels]]:
        """Row and uint8 [H, W, 3] picture; rows that cannot be read are left out and told."""
        arrays = [np.zeros(shape, dtype) for shape, dtype in self.reader.buffers(len(rows))]
        failed = dict(self.reader.read(rows, Target(arrays), go_on=True))
        for error in failed.values():
            log.warning("no picture of a patch: %s", error)
        return [
            (int(row), _stretch(np.stack([arrays[group][place, plane] for group, plane in self.planes], axis=-1)))
            for place, row in enumerate(rows)
            if place not in failed
        ]


def write_captions(
    key: str,
    classes: Sequence[str],
    scores_C: NDArray[np.float32],
    thresholds_C: NDArray[np.float64],
    observed_C: NDArray[np.bool_],
    labels_C: NDArray[np.bool_],
) -> list[Caption]:
    """The patch's labels: those observed, those the teacher recovers (its probability reaches the threshold), right or
    wrong, and all true ones, of which some may have been missed.
    """
    recovered_C = (scores_C >= thresholds_C.astype(np.float32)) & ~observed_C
    found_C = recovered_C | observed_C
    lines = [(key[start : start + _KEY_LETTERS], _HEAD) for start in range(0, len(key), _KEY_LETTERS)]
    for title, chosen_C in (("observed", observed_C), ("recovered", recovered_C), ("true", labels_C)):
        lines.append((title if chosen_C.any() else f"{title}: none", _HEAD))
        for c in np.flatnonzero(chosen_C).tolist():
            verdict, colour = "", _PLAIN
            if title == "recovered":
                verdict, colour = ("right", _RIGHT) if labels_C[c] else ("wrong", _WRONG)
            elif not found_C[c]:
                verdict, colour = "missed", _WRONG
            lines.append((" ".join(filter(None, [f"{scores_C[c]:.2f}", verdict, classes[c]])), colour))
    return lines


def draw_panel(picture: Pixels, captions: Iterable[Caption]) -> Pixels:
    """uint8 [H', W', 3]: the picture, and the captions below it, each a line that is cut where it is too long."""
    lines = list(captions)
    panel = Image.new("RGB", (_SIDE, _SIDE + _LINE * len(lines) + 8), "#1b1f24")
    panel.paste(Image.fromarray(picture).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC))
    pen, font = ImageDraw.Draw(panel), ImageFont.load_default(12)
    for number, (text, colour) in enumerate(lines):
        pen.text((5, _SIDE + 3 + number * _LINE), _cut(text, font), fill=colour, font=font)
    return np.asarray(panel)


def _colours(manifest: Manifest) -> tuple[str, str, str]:
    if set(_TRUE_COLOUR) <= set(manifest.bands):
        return _TRUE_COLOUR
    first = next((member.bands for member in manifest.members if len(member.bands) >= 3), manifest.bands[:1] * 3)
    return first[0], first[1], first[2]


def _stretch(pixels: NDArray[np.generic]) -> Pixels:
    """[H, W, 3] of any type: black at the patch's 2nd percentile, white at its 98th, the same for all colours."""
    values = pixels.astype(np.float32)
    low, high = np.percentile(values, _PERCENTILES)
    shades: NDArray[np.float32] = np.clip((values - low) / max(high - low, 1e-6), 0, 1) * 255
    return shades.astype(np.uint8)


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    room, length = _SIDE - 10, font.getlength(text)
    if length <= room:
        return text
    end = int(len(text) * room / length)  # nearly right: letters differ in width
    while font.getlength(short := text[:end] + "\u2026") > room:
        end -= 1
    return short
