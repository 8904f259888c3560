"""Failures that are nobody's programming mistake, and what to do about them: a full disk, too little memory, numbers that blew up."""

from __future__ import annotations

import errno

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def remedy(error: BaseException) -> str | None:
    """What the user can do, or None for an error that its traceback explains better."""
    if isinstance(error, OSError) and error.errno in FULL:
        return "make room on that disk, or raise the quota, and continue with --resume"
    if _out_of_memory(error):
        return (
            "lower trainer.tokens_per_microbatch or set trainer.gradient_checkpointing: true, which may be changed at --resume "
            "(`ttrl plan` predicts what fits); fewer votes or tokens need a new run"
        )
    if isinstance(error, FloatingPointError):
        return (
            "the weights of the last checkpoint are those from before; the same recipe comes to the same point again, so start "
            "a new run with a lower trainer.lr"
        )
    return None


def describe(error: BaseException) -> str:
    """One line for summary.json and the report."""
    advice = remedy(error)
    return f"{type(error).__name__}: {error}" + (f"; {advice}" if advice else "")


def _out_of_memory(error: BaseException) -> bool:
    # By name and text: torch, which has both kinds, is not imported for this
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "CUDA out of memory" in text)
