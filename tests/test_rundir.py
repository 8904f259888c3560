from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ttrl.errors import ConfigError
from ttrl.rundir import EVAL, GROUPS, LEDGER, METRICS, RECIPE, SUMMARY, RunDir, check_unused

# Every character that str.splitlines, but not JSONL, takes for the end of a line
LINE_ENDS = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei\rj\r\nk\nl"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path / "run")


def test_what_was_appended_is_read_back(run: RunDir) -> None:
    records = [{"step": 0, "text": "zwölf"}, {"step": 1, "text": LINE_ENDS}, {"step": 2, "nested": {"a": [1, None]}}]
    for record in records:
        run.append(GROUPS, record)
    assert list(run.lines(GROUPS)) == records
    assert (run.path / GROUPS).read_bytes().count(b"\n") == len(records)
    assert "zwölf".encode() in (run.path / GROUPS).read_bytes()


def test_a_missing_or_empty_file_has_no_lines(run: RunDir) -> None:
    assert list(run.lines(METRICS)) == []
    run.write_lines(METRICS, [])
    assert list(run.lines(METRICS)) == []


@pytest.mark.parametrize("cut", [1, 2, 3, 10])
def test_a_torn_last_line_is_skipped(run: RunDir, cut: int) -> None:
    run.append(METRICS, {"step": 0})
    run.append(METRICS, {"step": 1, "text": "ü"})
    whole = (run.path / METRICS).read_bytes()
    (run.path / METRICS).write_bytes(whole[:-1] if cut == 1 else whole[: -cut - 1])
    assert [record["step"] for record in run.lines(METRICS)] == ([0, 1] if cut == 1 else [0])


def test_a_line_torn_inside_a_character_is_skipped(run: RunDir) -> None:
    run.append(METRICS, {"step": 0})
    with (run.path / METRICS).open("ab") as stream:
        stream.write('{"step": 1, "text": "ü'.encode()[:-1])
    assert list(run.lines(METRICS)) == [{"step": 0}]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_json_does_not_know_are_refused(run: RunDir, value: float) -> None:
    run.append(METRICS, {"step": 0})
    with pytest.raises(ValueError, match="JSON"):
        run.append(METRICS, {"step": 1, "loss": value})
    with pytest.raises(ValueError, match="JSON"):
        run.write_json(SUMMARY, {"loss": value})
    assert list(run.lines(METRICS)) == [{"step": 0}]
    assert run.summary() == {}


def test_writing_replaces_the_file_and_leaves_nothing_beside_it(run: RunDir) -> None:
    run.write(RECIPE, "old, and longer than the new one")
    run.write(RECIPE, "new")
    assert (run.path / RECIPE).read_text() == "new"
    run.write_lines(LEDGER, [{"a": 1}])
    run.write_json(SUMMARY, {"status": "completed"})
    assert run.summary() == {"status": "completed"}
    assert sorted(p.name for p in run.path.iterdir()) == ["checkpoints", LEDGER, RECIPE, SUMMARY]


def test_a_failed_write_keeps_the_old_file(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    run.write(RECIPE, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        run.write(RECIPE, "new")
    monkeypatch.undo()
    assert (run.path / RECIPE).read_text() == "old"


def test_cutting_back_forgets_what_came_after_the_checkpoint(run: RunDir) -> None:
    for step in range(5):
        run.append(METRICS, {"step": step, "loss": 0.1})
        run.append(GROUPS, {"step": step, "text": LINE_ENDS})
    for step in (0, 3, 5):
        run.append(EVAL, {"step": step})
    run.cut_back(3)  # three steps were done: 0, 1 and 2; the evaluation after them is called step 3
    assert [record["step"] for record in run.lines(METRICS)] == [0, 1, 2]
    assert [record["step"] for record in run.lines(GROUPS)] == [0, 1, 2]
    assert [record["step"] for record in run.lines(EVAL)] == [0, 3]
    assert next(run.lines(GROUPS))["text"] == LINE_ENDS
    run.append(METRICS, {"step": 3})
    assert [record["step"] for record in run.lines(METRICS)] == [0, 1, 2, 3]


def test_cutting_back_removes_a_torn_line_for_good(run: RunDir) -> None:
    run.append(METRICS, {"step": 0})
    with (run.path / METRICS).open("a") as stream:
        stream.write('{"step": 1')
    run.cut_back(1)
    run.append(METRICS, {"step": 1})
    assert [json.loads(line)["step"] for line in (run.path / METRICS).read_text().splitlines()] == [0, 1]


def test_a_folder_that_holds_a_run_is_not_taken_again(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path)
    run.write(RECIPE, "name: x")
    with pytest.raises(ConfigError, match=r"already holds a run.*--resume"):
        RunDir.create(tmp_path)
    assert RunDir.existing(tmp_path).path == tmp_path


def test_a_file_in_the_way_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file, not a folder"):
        check_unused(tmp_path / "file")
    with pytest.raises(ConfigError, match="cannot be created: Not a directory"):
        RunDir.create(tmp_path / "file" / "run")


def test_a_folder_without_a_run_cannot_be_resumed_or_read(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text("{}")
    with pytest.raises(ConfigError, match="holds no run"):
        RunDir.existing(tmp_path)


@pytest.mark.parametrize("name", ["model", "report.html", "metrics.jsonl"])
def test_nothing_of_the_user_is_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match=f"would overwrite .*{name}"):
        RunDir.create(tmp_path)


def test_a_folder_is_held_by_one_run_at_a_time(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path)
    with run.locked(), pytest.raises(ConfigError, match="another process"), RunDir(tmp_path).locked():
        pass
    with run.locked():
        pass
