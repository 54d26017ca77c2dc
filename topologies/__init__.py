"""Where things run: emulated data centers, one file each (`rack.py` -> class `Rack`), found by file name."""
