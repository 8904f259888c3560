"""ttrl: test-time reinforcement learning of language models, without labels.

Importing this package is light: no torch, no ray, no transformers.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("ttrl")
except PackageNotFoundError:  # a checkout that was not installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
