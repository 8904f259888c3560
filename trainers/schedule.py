"""Learning-rate schedules as pure functions of the update number."""

from __future__ import annotations

import math


def lr_scale(update: int, total: int, *, schedule: str, warmup: float, min_ratio: float) -> float:
    """Factor on the peak learning rate for update 0 .. total - 1; always positive, so every update moves.

    The first ceil(warmup * total) updates rise linearly to 1, the rest falls by cosine or line towards `min_ratio`.
    """
    if not 0 <= update < total:
        raise ValueError(f"update {update} is outside 0 .. {total - 1}")
    rising = math.ceil(round(warmup * total, 9))  # 0.07 * 100 is a little more than 7
    if update < rising:
        return (update + 1) / rising
    progress = (update - rising) / max(1, total - rising)
    if schedule == "constant":
        return 1.0
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
    return min_ratio + (1 - min_ratio) * shape
