"""How long a vote over a 4K screenshot takes, against painting it on a dense grid of pixels in the same run.

python scripts/bench/region.py [--boxes 64] [--repeats 30]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
from scipy import ndimage

from ttrl.rewards.spots import spot_vote, to_pixels

WIDTH, HEIGHT = 3840, 2160


def dense(pixels: np.ndarray) -> int:
    """The same vote on a grid of pixels; returns the peak."""
    grid = np.zeros((HEIGHT, WIDTH), np.int32)
    for x1, y1, x2, y2 in pixels:
        grid[y1:y2, x1:x2] += 1
    peak = int(grid.max())
    labels, count = ndimage.label(grid == peak)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    ndimage.find_objects(labels)[int(np.argmax(sizes))]
    for x1, y1, x2, y2 in pixels:
        grid[y1:y2, x1:x2].mean()
    return peak


def median_ms(action: Callable[[], object], repeats: int) -> float:
    """Median over repeats, in milliseconds."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boxes", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=30)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    low = rng.random((arguments.boxes, 2)) * (WIDTH - 900, HEIGHT - 600)
    boxes = np.hstack([low, low + rng.uniform(5, 500, (arguments.boxes, 2))])
    regions = [(float(a), float(b), float(c), float(d)) for a, b, c, d in boxes]
    pixels = to_pixels(regions, WIDTH, HEIGHT)
    assert dense(pixels) == spot_vote(pixels).peak
    fast = median_ms(lambda: spot_vote(to_pixels(regions, WIDTH, HEIGHT)), arguments.repeats)
    slow = median_ms(lambda: dense(pixels), max(3, arguments.repeats // 10))
    print(f"{arguments.boxes} boxes on {WIDTH} x {HEIGHT}: {fast:.2f} ms, dense grid {slow:.0f} ms, {slow / fast:.0f}x")


if __name__ == "__main__":
    main()
