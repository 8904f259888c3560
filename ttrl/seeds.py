"""Counter-based seeds: every random decision has an address, so no generator state travels anywhere.

A rollout's stream is H(run seed, "rollout", step, prompt id, index). Results therefore do not depend on the number of
workers, on their order, or on a restart, and lost work can be issued again.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive(*address: int | str) -> int:
    """Hash an address to a 64-bit seed. Parts are length-prefixed: ("ab", "c") and ("a", "bc") differ, 1 and "1" too."""
    digest = hashlib.blake2b(digest_size=8)
    for part in address:
        data = (b"i" if isinstance(part, int) else b"s") + str(part).encode()
        digest.update(len(data).to_bytes(4, "little") + data)
    return int.from_bytes(digest.digest(), "little")


def generator(*address: int | str) -> np.random.Generator:
    """A numpy generator for one address (Philox: counter-based and the same on every platform)."""
    return np.random.Generator(np.random.Philox(key=derive(*address)))


def uniforms(seed: int, count: int) -> np.ndarray:
    """`count` float64 numbers in [0, 1) for one rollout; token t uses number t, whatever came before it.

    24 random bits each, so that `u * total` stays strictly below `total` in double precision.
    """
    bits = np.random.Philox(key=seed).random_raw(count) >> np.uint64(40)
    return np.asarray(bits, dtype=np.float64) * 2.0**-24
