"""Where patches come from: GeoTIFF trees and archives, HDF5, image folders, all behind one protocol."""
