"""Labels are out of reach: for plug-ins while a run lives, and for rewards in the contract kit."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest

from ttrl.authoring import check_reward, new_reward
from ttrl.config import load_recipe
from ttrl.errors import PluginError
from ttrl.evaluate.labels import read_labels
from ttrl.evaluate.seal import label_files, sealed
from ttrl.report.page import _trained_on
from ttrl.setup import check_recipe


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    file = tmp_path / "labels.jsonl"
    file.write_text(json.dumps({"id": "a", "answer": "2"}) + "\n")
    return file


def test_only_the_evaluation_opens_a_sealed_file(labels: Path, tmp_path: Path) -> None:
    link = tmp_path / "innocent.txt"
    link.symlink_to(labels)
    other = tmp_path / "other.jsonl"
    other.write_text("{}")
    with sealed(frozenset({str(labels)})):
        for path in (labels, link, os.fsencode(labels), os.path.relpath(labels)):
            with pytest.raises(PluginError, match="only the evaluation may open it"), open(path):
                pass
        for read in (labels.read_text, labels.read_bytes, lambda: os.open(labels, os.O_RDONLY)):
            with pytest.raises(PluginError, match="only the evaluation may open it"):
                read()
        assert read_labels(str(labels), ["a"]) == {"a": "2"}
        with pytest.raises(PluginError):  # the permission ends with the reading
            labels.read_text()
        assert other.read_text() == "{}"
    assert labels.read_text()


def test_an_attempt_is_heard_of_even_when_it_is_swallowed(labels: Path, caplog: pytest.LogCaptureFixture) -> None:
    with sealed(frozenset({str(labels)})), contextlib.suppress(PluginError):
        labels.read_text()
    assert "holds labels" in caplog.text


def test_what_is_sealed_are_label_files_that_are_not_also_prompts(labels: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": "a", "prompt": "1+1=", "answer": "2"}\n')
    one = load_recipe("quickstart", [f"data.prompts={prompts}", f"eval.labels={labels}", "eval.heldout=null"])
    assert label_files(one) == {str(labels)}
    same = load_recipe("quickstart", [f"data.prompts={prompts}", f"eval.labels={prompts}", "eval.heldout=null"])
    assert label_files(same) == frozenset()
    assert {Path(f).name for f in label_files(load_recipe("quickstart"))} == {
        "train.labels.jsonl",
        "heldout.labels.jsonl",
    }
    assert label_files(load_recipe("quickstart", ["eval.labels=null", "eval.heldout=null"])) == frozenset()


def test_checking_a_recipe_works_under_the_seal() -> None:
    recipe = load_recipe("quickstart")
    with sealed(label_files(recipe)):
        assert len(check_recipe(recipe).records) == 96


PEEKS = {
    "at import": ("import numpy as np", "import numpy as np\nfrom pathlib import Path\nX = Path({path!r}).read_text()"),
    "when built": ("        self.reader =", "        open({path!r}).close()\n        self.reader ="),
    "when built, by number": (
        "        self.reader =",
        "        __import__('os').open({path!r}, 0)\n        self.reader =",
    ),
    "when scoring": ("        answers =", "        open({path!r}).close()\n        answers ="),
    "when scoring, as bytes": ("        answers =", "        open({path!r}.encode()).close()\n        answers ="),
    "from the prompt": (
        "        answers =",
        "        group.prompt.meta.get('answer') and ctx['cheat']\n        answers =",
    ),
}


@pytest.mark.parametrize("how", PEEKS)
def test_a_reward_that_reaches_for_labels_fails_the_contract_kit(tmp_path: Path, labels: Path, how: str) -> None:
    reward, _ = new_reward("soft_vote", tmp_path)
    honest = reward.read_text()
    old, new = PEEKS[how]
    reward.write_text(honest.replace(old, new.format(path=str(labels)), 1))
    failed = [finding.check for finding in check_reward(str(reward), []) if finding.problem]
    assert set(failed) & {"imported without labels", "never sees labels"}


def test_an_honest_reward_passes(tmp_path: Path) -> None:
    reward, _ = new_reward("soft_vote", tmp_path)
    assert [finding for finding in check_reward(str(reward), []) if finding.problem] == []


def test_the_report_says_what_was_trained_on_and_what_was_held_out() -> None:
    full = _trained_on(load_recipe("quickstart"), labels=False)
    assert "Trained on the prompts of train.prompts.jsonl, without labels" in full
    assert "The label files could be opened by the evaluation only" in full
    assert "heldout.prompts.jsonl was held out: never sampled for training" in full
    bare = _trained_on(load_recipe("quickstart", ["eval.labels=null", "eval.heldout=null"]), labels=False)
    assert "Nothing was held out" in bare
    assert "label files" not in bare
    assert "LABELS IN TRAINING" in _trained_on(load_recipe("quickstart"), labels=True)
