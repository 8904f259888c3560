"""The few exceptions a user of ttrl may meet. Programming mistakes stay `assert` or `TypeError`."""

from __future__ import annotations


class TtrlError(Exception):
    """Base of everything ttrl raises on purpose."""


class ConfigError(TtrlError, ValueError):
    """The recipe, the data or the call is wrong. The command line turns it into exit status 2.

    The message names what is wrong, where (file:line:column when there is a file) and what to do.
    """


class PluginError(TtrlError, RuntimeError):
    """A plug-in broke its contract, or raised; the message carries slot, plug-in and prompt id."""


class EngineError(TtrlError, RuntimeError):
    """A generation engine cannot do what was asked, or its weights are not the ones it should have."""


class ClusterError(TtrlError, RuntimeError):
    """A worker, a rank or the cluster itself is gone, or did not answer before its deadline.

    The run ends as failed and can be resumed from its last checkpoint.
    """


class StopRequested(TtrlError):
    """The user or a scheduler asked the run to end (Ctrl-C, SIGTERM, SIGUSR1). Raised only where the weights are consistent."""

    signal: int = 2
    """Number of the signal; the command line exits with 128 more, as shells do."""


class GuardStop(TtrlError):
    """A guard ended the run, or nothing was left to train on. The command line exits with status 3."""
