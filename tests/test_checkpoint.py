from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from ttrl.checkpoint import LATEST, STATE, SUMS, CheckpointStore, damage
from ttrl.errors import ConfigError

WEIGHTS = "weights.safetensors"


def write(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(bytes(range(256)) * 10)
    (folder / "optimizer.safetensors").write_bytes(b"moments")


def saved(folder: Path, *steps: int, keep: int = 10) -> CheckpointStore:
    store = CheckpointStore(folder, keep)
    for step in steps:
        store.save(step, {"note": f"after {step}"}, write)
    return store


def held(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir())


def test_a_checkpoint_holds_what_was_written_its_state_and_its_sums(tmp_path: Path) -> None:
    folder = saved(tmp_path, 7).save(8, {"flips": {"p": "5"}}, write)
    assert folder == tmp_path / "step-000008"
    assert sorted(p.name for p in folder.iterdir()) == ["optimizer.safetensors", STATE, SUMS, WEIGHTS]
    assert json.loads((folder / STATE).read_text()) == {"step": 8, "flips": {"p": "5"}}
    assert set(json.loads((folder / SUMS).read_text())) == {"optimizer.safetensors", STATE, WEIGHTS}
    assert (tmp_path / LATEST).read_text() == "step-000008\n"
    assert damage(folder) is None


def test_the_newest_is_resumed(tmp_path: Path) -> None:
    folder, state = saved(tmp_path, 5, 10, 15).latest()
    assert folder.name == "step-000015"
    assert state == {"step": 15, "note": "after 15"}


def test_steps_are_compared_as_numbers_even_with_more_digits(tmp_path: Path) -> None:
    # as text, step-1000000 comes before step-999999
    store = saved(tmp_path, 999_998, 999_999, 1_000_000, keep=2)
    assert store.latest()[1]["step"] == 1_000_000
    assert held(tmp_path) == ["step-1000000", "step-999999"]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    saved(tmp_path, 1, 2, 3, 4, keep=keep)
    assert held(tmp_path) == [f"step-{step:06d}" for step in (1, 2, 3, 4)[-keep:]]


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-2])  # the last byte of a JSON file is a line end, which means nothing


def empty(file: Path) -> None:
    file.write_bytes(b"")


DAMAGES: list[Callable[[Path], None]] = [flip, truncate, empty, Path.unlink]


FILES = [WEIGHTS, "optimizer.safetensors", STATE, SUMS]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", DAMAGES, ids=["flip a byte", "truncate", "empty", "delete"])
def test_any_damage_is_noticed_and_the_one_before_used(
    tmp_path: Path, name: str, harm: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    store = saved(tmp_path, 5, 10)
    harm(tmp_path / "step-000010" / name)
    assert damage(tmp_path / "step-000010") is not None
    assert damage(tmp_path / "step-000005") is None
    with caplog.at_level(logging.WARNING):
        folder, state = store.latest()
    assert (folder.name, state["step"]) == ("step-000005", 5)
    assert "checkpoint step-000010 is damaged" in caplog.text


@pytest.mark.parametrize("content", ["[]", "null", "5", '"x"', "{}"])
def test_sums_that_are_no_table_are_damage(tmp_path: Path, content: str) -> None:
    saved(tmp_path, 5)
    (tmp_path / "step-000005" / SUMS).write_text(content)
    assert damage(tmp_path / "step-000005") is not None


def test_the_message_names_the_damaged_file(tmp_path: Path) -> None:
    saved(tmp_path, 5)
    flip(tmp_path / "step-000005" / WEIGHTS)
    assert damage(tmp_path / "step-000005") == f"checksum of {WEIGHTS}"


def test_without_a_usable_checkpoint_resuming_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no usable checkpoint to resume from"):
        CheckpointStore(tmp_path, 2).latest()
    store = saved(tmp_path, 5)
    truncate(tmp_path / "step-000005" / WEIGHTS)
    with pytest.raises(ConfigError, match="holds no usable checkpoint to resume from"):
        store.latest()


def test_an_unfinished_checkpoint_is_ignored_and_written_over(tmp_path: Path) -> None:
    store = saved(tmp_path, 5)

    def killed(folder: Path) -> None:
        write(folder)
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.save(10, {}, killed)
    assert held(tmp_path) == [".step-000010.part", "step-000005"]
    assert store.latest()[1]["step"] == 5
    store.save(10, {}, write)
    assert held(tmp_path) == ["step-000005", "step-000010"]
    assert not (tmp_path / "step-000010" / "half").exists()


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store = saved(tmp_path, 5, 10)
    truncate(tmp_path / "step-000010" / WEIGHTS)
    store.save(10, {"note": "again"}, write)
    assert store.latest()[1] == {"step": 10, "note": "again"}


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_leftovers_of_before_a_resume_do_not_push_out_good_ones(tmp_path: Path, keep: int) -> None:
    saved(tmp_path, 10, 20)
    truncate(tmp_path / "step-000020" / WEIGHTS)
    store = CheckpointStore(tmp_path, keep)
    assert store.latest()[1]["step"] == 10
    saved_at = store.save(15, {}, write)  # resumed from 10
    assert saved_at.is_dir()
    assert store.latest()[0] == saved_at
    assert held(tmp_path) == ["step-000010", "step-000015"][-keep:]
