"""Fixtures for every test. torch is imported only by tests that need it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Before torch is imported: the models here are tiny, and threads cost more than they give
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The same examples in every run, and no clock: a busy machine must not fail a test
settings.register_profile("ttrl", derandomize=True, deadline=None)
settings.load_profile("ttrl")


LONGEST_FIRST = (
    "test_ray_pool.py",
    "test_kill.py",
    "test_run.py",
    "test_ranks.py",
    "test_cluster.py",
    "test_interrupt.py",
    "test_sandbox.py",
)
"""Files of more than half a minute. Started last, one of them would keep a single worker busy while the others wait."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order files for `--dist loadfile --no-loadscope-reorder`; the order within a file stays."""
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope="session", autouse=True)
def single_thread() -> None:
    """One torch thread, where torch was imported at all."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def without_figures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Drawing curves takes longer than a short run. tests/test_report.py draws them, and so do runs in processes of their own."""
    with pytest.MonkeyPatch.context() as patch:
        page = sys.modules.get("ttrl.report.page")
        if page is not None and request.path.name != "test_report.py":
            patch.setattr(page, "_figures", lambda *_: [])
        yield


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama (grouped-query attention, width 32) with a character tokenizer, as a transformers folder."""
    from helpers_torch import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tiny-llama"))
