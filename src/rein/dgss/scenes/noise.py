"""Tileable noise for the grain of walls and roads, and for tree crowns, clouds, puddles and snow."""

from functools import lru_cache

import numpy as np
from numpy.random import Generator


@lru_cache(maxsize=1)
def noise_tile() -> np.ndarray:
    """Return low-frequency noise, (512, 512) float32 in 0..1 with mean 0.5."""
    random = Generator(np.random.PCG64(20240501))
    spectrum = np.fft.rfft2(random.standard_normal((512, 512)))
    frequency = np.hypot(np.fft.fftfreq(512)[:, None], np.fft.rfftfreq(512)[None])
    frequency[0, 0] = np.inf
    field = np.fft.irfft2(spectrum / np.maximum(frequency, 2.5 / 512) ** 1.15, s=(512, 512))
    tile = np.clip(0.5 + 0.22 * field / field.std(), 0, 1).astype(np.float32)
    tile.setflags(write=False)
    return tile


def shifted_noise(x: np.ndarray, y: np.ndarray, random: Generator) -> np.ndarray:
    """Sample the tile after a random shift, by bilinear interpolation at coordinates `x` and `y` in cells."""
    shift = random.uniform(0, 512, 2).astype(np.float32)
    x, y = x + shift[0], y + shift[1]
    tile = noise_tile().ravel()
    left, top = np.floor(x), np.floor(y)
    u, v = (x - left).astype(np.float32), (y - top).astype(np.float32)
    left, top = left.astype(np.int32) & 511, top.astype(np.int32) & 511
    right, below = (left + 1) & 511, ((top + 1) & 511) * 512
    top *= 512
    upper, lower = tile.take(top + left), tile.take(below + left)
    upper += u * (tile.take(top + right) - upper)
    lower += u * (tile.take(below + right) - lower)
    return upper + v * (lower - upper)
