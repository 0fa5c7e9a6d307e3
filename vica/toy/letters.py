"""The letters of the toy world's printed words, as strokes: a system font would differ between machines."""

from functools import cache

import numpy as np

WIDTH, HEIGHT, PITCH = 16, 24, 20  # a letter's size in pixels, and the distance from one letter to the next
THICKNESS = 3.6
# Lines through points "xy" of a lattice, x from 0 to 4 and y from 0 (top) to 6.
STROKES = {
    "A": ("06 02 20 42 46", "04 44"),
    "B": ("03 00 30 41 42 33 03 06 36 45 44 33",),
    "C": ("41 30 10 01 05 16 36 45",),
    "D": ("00 06 26 44 42 20 00",),
    "E": ("40 00 06 46", "03 33"),
    "F": ("40 00 06", "03 33"),
    "G": ("41 30 10 01 05 16 36 45 43 23",),
    "H": ("00 06", "40 46", "03 43"),
    "I": ("10 30", "20 26", "16 36"),
    "K": ("00 06", "40 03 46"),
    "L": ("00 06 46",),
    "M": ("06 00 23 40 46",),
    "N": ("06 00 46 40",),
    "O": ("10 30 41 45 36 16 05 01 10",),
    "P": ("06 00 30 41 42 33 03",),
    "R": ("06 00 30 41 42 33 03", "13 46"),
    "S": ("41 30 10 01 02 13 33 44 45 36 16 05",),
    "T": ("00 40", "20 26"),
    "U": ("00 05 16 36 45 40",),
    "W": ("00 06 23 46 40",),
    "Y": ("00 23 40", "23 26"),
}


@cache
def cover(letter: str, fine: int = 4) -> np.ndarray:
    """Returns how much the letter's ink covers each pixel, 0 to 255, [HEIGHT, WIDTH], from `fine` squared points a
    pixel."""
    y, x = (np.indices((HEIGHT * fine, WIDTH * fine)) + 0.5) / fine
    ink = np.zeros(x.shape, bool)
    for line in STROKES[letter]:
        points = [_pixel(point) for point in line.split()]
        for start, end in zip(points, points[1:]):
            ink |= _distance(x, y, start, end) <= THICKNESS / 2
    return shrink(ink, fine)


def shrink(points: np.ndarray, fine: int) -> np.ndarray:
    """Returns levels 0 to 255 of each pixel from booleans at `fine` x `fine` points a pixel."""
    height, width = (n // fine for n in points.shape)
    return np.round(255 * points.reshape(height, fine, width, fine).mean((1, 3))).astype(np.uint8)


def _pixel(point: str) -> tuple[float, float]:
    return 2 + int(point[0]) * (WIDTH - 4) / 4, 2 + int(point[1]) * (HEIGHT - 4) / 6


def _distance(x, y, start, end) -> np.ndarray:
    """Returns the distance from each point to the segment."""
    (ax, ay), (bx, by) = start, end
    along = ((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / ((bx - ax) ** 2 + (by - ay) ** 2)
    along = along.clip(0, 1)
    return np.hypot(x - ax - along * (bx - ax), y - ay - along * (by - ay))
