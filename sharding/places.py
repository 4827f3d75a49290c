"""Where patches lie: CRS and footprint of each, in its own coordinates or in longitude and latitude.

A patch is a square of 1,200 m below and to the right of its origin (``sample.Place``). Letters: N patches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sharding.manifest import MANIFEST_PARQUET, Manifest
from sharding.reben import PATCH_METRES
from sharding.sample import Place

__all__ = ["Places", "load_places"]


@dataclass(frozen=True, eq=False)
class Places:
    """Of N patches.

    Attributes:
        epsg_N: int32, the EPSG code of the CRS; 0 where the place is unknown.
        origin_N2: float64, x and y of the upper left corner in metres; NaN where it is unknown.
    """

    epsg_N: NDArray[np.int32]
    origin_N2: NDArray[np.float64]

    @classmethod
    def of(cls, places: Sequence[Place | None]) -> "Places":
        """One after the other."""
        epsg = [0 if place is None else place.epsg for place in places]
        origins = [(np.nan, np.nan) if place is None else (place.x, place.y) for place in places]
        return cls(np.array(epsg, dtype=np.int32), np.array(origins, dtype=np.float64).reshape(-1, 2))

    @property
    def known_N(self) -> NDArray[np.bool_]:
        return self.epsg_N > 0

    def bounds_N4(self) -> NDArray[np.float64]:
        """xmin, ymin, xmax, ymax in the patch's CRS; NaN where unknown."""
        x_N, y_N = self.origin_N2.T
        return np.stack([x_N, y_N - PATCH_METRES, x_N + PATCH_METRES, y_N], axis=1)

    def rings_N52(self) -> NDArray[np.float64]:
        """Longitude and latitude (WGS 84, degrees) of the footprint's corners, counter-clockwise and closed, as GeoJSON
        has polygons; NaN where unknown.
        """
        from rasterio.warp import transform  # training does without

        xmin_N, ymin_N, xmax_N, ymax_N = self.bounds_N4().T
        x_N5 = np.stack([xmin_N, xmax_N, xmax_N, xmin_N, xmin_N], axis=1)
        y_N5 = np.stack([ymin_N, ymin_N, ymax_N, ymax_N, ymin_N], axis=1)
        rings_N52 = np.full((len(self.epsg_N), 5, 2), np.nan)
        for epsg in np.unique(self.epsg_N[self.known_N]).tolist():
            rows = np.flatnonzero(self.epsg_N == epsg)
            degrees = transform(f"EPSG:{epsg}", "EPSG:4326", x_N5[rows].ravel(), y_N5[rows].ravel())
            rings_N52[rows] = np.stack(degrees, axis=1).reshape(-1, 5, 2)
        return rings_N52


def load_places(manifest: Manifest, split: str) -> Places:
    """Of the rows of ``split``, in row order; ``manifest.load_table`` has checked the file."""
    names = ["row", "epsg", "origin_x", "origin_y"]
    chosen = pc.field("split") == split
    table = pq.read_table(manifest.root / MANIFEST_PARQUET, columns=[*names, "split"], filters=chosen).sort_by("row")
    epsg_N = pc.fill_null(table["epsg"], 0).to_numpy().astype(np.int32)
    origin_N2 = np.stack([table[name].to_numpy().astype(np.float64) for name in names[2:]], axis=1)
    return Places(epsg_N, origin_N2)
