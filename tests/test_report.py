"""The report in a real browser: it opens offline, runs no script, and shows hostile text as text."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

from ttrl.report import write_report
from ttrl.report.votemap import vote_map
from ttrl.rundir import RunDir

ATTACK = '<script>document.title="owned"</script><img src=x onerror="document.title=\'owned\'">{{ 7*7 }}'
RECIPE = """\
name: report-test
description: a <b>bold</b> claim
steps: 2
model: {path: "bundled:tiny-adder"}
data: {prompts: /data/prompts.jsonl}
eval: {labels: /data/labels.jsonl, heldout: {prompts: /data/heldout.jsonl}}
"""


def estimate(value: float) -> dict:
    return {"value": value, "low": value - 0.05, "high": value + 0.05}


def side(correct: int) -> dict:
    return {"correct": correct, "samples": 16, "majority": ATTACK, "share": 0.5, "majority_correct": correct > 8,
            "no_answer": 0, "answers": {"5": 16}}  # fmt: skip


@pytest.fixture
def run(tmp_path) -> RunDir:
    directory = RunDir.create(tmp_path / "run")
    directory.write("recipe.yaml", RECIPE)
    for step in range(2):
        directory.append("metrics.jsonl", {
            "step": step, "reward/mean": 0.5 + step / 10, "reward/majority_share": 0.5, "reward/answered": 1.0,
            "rollout/tokens": 100, "rollout/length": 10.0, "time/step": 1.0, "dropped/abstained": 1,
            "reward/share_histogram": [0, 0, 0, 0, 0, 2, 1, 0, 0, 1],
        })  # fmt: skip
    for step in (0, 2):
        values = {"pass@1": estimate(0.4 + step / 10), "maj@16": estimate(0.8)}
        directory.append("eval.jsonl", {"step": step, "split": "adapted", "protocol": {}, **values})
    rollout = {"text": ATTACK, "answer": ATTACK, "class": 0, "reward": 1.0, "trained": True, "finish": "stop",
               "tokens": 10, "mean_logprob": -0.1}  # fmt: skip
    directory.append("groups.jsonl", {"step": 0, "prompt_id": ATTACK, "prompt": ATTACK, "label": ATTACK, "share": 1.0,
                                      "margin": 1.0, "trace": [ATTACK], "rollouts": [rollout]})  # fmt: skip
    entries = [{"id": ATTACK, "verdict": "corrupted", "p_value": 0.01, "before": side(14), "after": side(2)}]
    directory.write_lines("ledger.jsonl", entries)
    initial = {"pass@1": estimate(0.4), "maj@16": estimate(0.8), "majority_share": estimate(0.5)}
    final = {"pass@1": estimate(0.6), "maj@16": estimate(0.7), "majority_share": estimate(0.7)}
    directory.write_json("summary.json", {
        "status": "completed", "reason": "", "name": "report-test", "steps": 2, "initial": initial, "final": final,
        "change": {"pass@1": {"value": 0.2, "low": 0.1, "high": 0.3}, "maj@16": {"value": -0.1, "low": -0.2, "high": -0.05}},
        "ledger": {"learned": 0, "sharpened": 0, "corrupted": 1, "unchanged": 0}, "heldout": None,
        "tokens": {"rollout": 200, "train": 100}, "seconds": 3.0, "peak_memory_mb": 500,
    })  # fmt: skip
    return directory


def test_the_page_refers_to_nothing_outside_itself(run):
    html = write_report(run).read_text()
    outside = [u for u in re.findall(r"""(?:src|href|action)\s*=\s*["']([^"'#]+)""", html) if not u.startswith("data:")]
    assert outside == []
    assert "@import" not in html
    assert "<script" not in html
    assert "{{ 7*7 }}" in html  # shown, not evaluated
    assert "bold&lt;/b&gt; claim" in html


def test_changes_are_marked_only_when_the_interval_excludes_zero(run):
    html = write_report(run).read_text()
    assert re.search(r'class="num better">\+0\.200', html)
    assert re.search(r'class="num worse">-0\.100', html)


def test_the_line_to_beat_and_how_sure_the_ledger_is_are_shown(run):
    summary = json.loads((run.path / "summary.json").read_text())
    start = {"value": 0.804, "low": 0.7, "high": 0.9}
    above = {"value": -0.204, "low": -0.3, "high": -0.1}
    extra = {
        "line_to_beat": {"metric": "maj@16", "start": start, "verdict": "missed", "final_pass@1_above_it": above},
        "ledger_shares": {"corrupted": {"value": 0.25, "low": 0.1, "high": 0.5}}, "ledger_by_chance": 1.3,
        "protocol": {"temperature": 0.7, "extractor": ATTACK, "labels": ""}, "heldout": {"ledger": {"learned": 3, "corrupted": 2}},
    }  # fmt: skip
    run.write_json("summary.json", {**summary, **extra})
    html = write_report(run).read_text()
    assert "maj@16 of the start model is <b>0.804 [0.700, 0.900]</b>" in html
    assert 'is <b class="worse">-0.204 [-0.300, -0.100]</b>' in html
    assert "corrupted: 25% [10%, 50%]" in html
    assert "1.3 are to be expected if nothing had changed" in html
    assert "Protocol: temperature 0.7, extractor &lt;script&gt;" in html
    assert "<script" not in html
    assert "labels ," not in html  # an empty hash is not shown


def test_an_unfinished_run_has_a_report_too(run):
    (run.path / "summary.json").unlink()
    assert "unfinished" in write_report(run).read_text()


@pytest.fixture(scope="module")
def browser() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium on this machine")
    return found


def dump(browser: str, page: Path, profile: Path) -> str:
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
             "--disable-background-networking", "--disable-component-update", f"--user-data-dir={profile}"]  # fmt: skip
    result = subprocess.run([browser, *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_chromium_shows_the_report_and_no_model_text_runs(run, browser, tmp_path):
    dom = dump(browser, write_report(run), tmp_path / "profile")
    assert "<title>report-test - ttrl report</title>" in dom  # a script would have changed it
    assert "owned" in dom  # the text itself is there to read
    assert dom.count("<svg") >= 3
    assert "corrupted" in dom
    assert json.loads((run.path / "summary.json").read_text())["status"] in dom


def test_groups_over_a_screenshot_get_a_map_made_of_numbers_only():
    rollouts = [
        {"answer": a} for a in ("[10,10,50,30]", "[12.5,9,48,31]", "<script>", "[1,2,nan,4]", "[9,9,1,1]", None)
    ]
    drawn = vote_map({"screen": [200, 100], "label": "[12,10,48,30]", "rollouts": rollouts})
    assert drawn is not None
    shapes = ElementTree.fromstring(drawn)
    assert [s.tag.rpartition("}")[2] for s in shapes] == [
        "rect",
        "rect",
        "rect",
        "rect",
        "circle",
    ]  # frame, two votes, the label
    assert (shapes[4].get("cx"), shapes[4].get("cy")) == ("30.000", "20.000")
    assert "script" not in drawn
    assert vote_map({"screen": [200, 100], "label": None, "rollouts": [{"answer": "12"}]}) is None
    assert vote_map({"label": "[1,1,2,2]", "rollouts": rollouts}) is None
