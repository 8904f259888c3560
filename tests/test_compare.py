"""`ttrl compare`: what it shows, and what it refuses to compare."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ttrl.cli import app
from ttrl.compare import compare_runs, to_markdown
from ttrl.errors import ConfigError
from ttrl.evaluate.book import EvaluationBook
from ttrl.evaluate.estimators import bootstrap
from ttrl.evaluate.evaluator import Estimate, Evaluation, PromptResult, Protocol
from ttrl.rundir import RunDir

RECIPE = 'name: r\nsteps: 4\nmodel: {path: "bundled:tiny-adder"}\ndata: {prompts: /data/p.jsonl}\n'
PROTOCOL = Protocol(
    samples=4, temperature=1.0, top_p=1.0, max_new_tokens=8, template="raw", extractor="math", prompts=3, prompt_set="aa", labels="bb"
)  # fmt: skip


def evaluation(
    correct: Sequence[int],
    step: int,
    *,
    split: str = "adapted",
    order: Sequence[int] = (0, 1, 2),
    protocol: Protocol = PROTOCOL,
) -> Evaluation:
    """`correct` of four samples are right; ids p0, p1, p2 in the given order."""
    results = tuple(
        PromptResult(
            id=f"p{i}", samples=4, answers={"5": correct[i], "7": 4 - correct[i]}, no_answer=0, majority="5" if correct[i] > 2 else "7",
            share=0.75, length=3.0, correct=correct[i], right="5",
        )
        for i in order
    )  # fmt: skip
    numbers = {
        "pass@1": tuple((r.correct or 0) / 4 for r in results),
        "maj@4": tuple(float((r.correct or 0) > 2) for r in results),
    }
    estimates = {}
    for name, values in numbers.items():
        low, high = bootstrap(np.asarray(values), 0) or (None, None)
        estimates[name] = Estimate(value=float(np.mean(values)), low=low, high=high)
    return Evaluation(
        step=step, split=split, protocol=protocol, results=results, per_prompt=numbers, estimates=estimates
    )


def run(
    folder: Path, *evaluations: Evaluation, status: str = "completed", labels: bool = False, recipe: str = RECIPE
) -> Path:
    directory = RunDir.create(folder)
    directory.write("recipe.yaml", recipe)
    book = EvaluationBook()
    for item in evaluations:
        book.record(item)
    directory.write("evaluations.json", book.to_json())
    directory.write_json("summary.json", {"status": status, "steps": 4, "seconds": 12.3, "labels_in_training": labels,
                                          "tokens": {"rollout": 12345, "train": 678}})  # fmt: skip
    return folder


def cells(markdown: str, run: str, row: str) -> list[str]:
    line = next(line for line in markdown.splitlines() if line.startswith(f"| {run} | {row}"))
    return [cell.strip() for cell in line.strip("|").split("|")][2:]


def test_finals_are_compared_prompt_by_prompt_whatever_their_order(tmp_path: Path) -> None:
    start = evaluation([1, 2, 0], 0)
    a = run(tmp_path / "a", start, evaluation([2, 2, 1], 4))
    b = run(tmp_path / "b", evaluation([1, 2, 0], 0, order=[2, 0, 1]), evaluation([3, 4, 1], 4, order=[2, 0, 1]))
    text = to_markdown(compare_runs([a, b]))
    assert cells(text, "a", "start")[0].startswith("0.250 [")  # (1 + 2 + 0) / 12
    assert cells(text, "b", "after 4 steps")[0].startswith("0.667 [")  # (3 + 4 + 1) / 12
    assert cells(text, "b", "change")[0].startswith("+0.417 [")  # 5 / 12
    # Differences per prompt are 1/4, 2/4 and 0: the interval of their mean cannot leave [0, 0.5]. Unpaired it would.
    value, low, high = map(float, re.findall(r"[+-][\d.]+", cells(text, "b", "minus a")[0]))
    assert value == 0.25
    assert 0 <= low < 0.25 < high <= 0.5
    assert "| a | completed | 4 | 12,345 | 678 | 12 |" in text
    assert "| a | 0 = 0.000 [0.000, 0.561] |" in text  # learned: 0 of 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"temperature": 0.6}, "adapted.temperature: a 1.0, b 0.6"),
        ({"prompt_set": "cc"}, "adapted.prompt_set: a 'aa', b 'cc'"),
        ({"labels": "cc", "grader": "keys-9"}, "adapted.grader: a 'keys-2', b 'keys-9'"),
    ],
)
def test_runs_under_other_protocols_or_prompts_are_refused_with_what_differs(
    tmp_path: Path, changes: dict, said: str
) -> None:
    a = run(tmp_path / "a", evaluation([1, 2, 0], 0))
    other = replace(PROTOCOL, **changes)
    b = run(tmp_path / "b", evaluation([1, 2, 0], 0, protocol=other))
    with pytest.raises(ConfigError, match="not measured alike") as raised:
        compare_runs([a, b])
    assert said in str(raised.value)
    assert len(str(raised.value).splitlines()) == 2 + len(changes)


def test_a_split_that_only_some_measured_is_left_out_and_said(tmp_path: Path) -> None:
    start = evaluation([1, 2, 0], 0)
    held = evaluation([1, 1, 1], 0, split="heldout")
    a = run(tmp_path / "a", start, held, status="stopped", labels=True)
    b = run(tmp_path / "b", start)
    found = compare_runs([a, b])
    assert not any("held-out" in sheet.title for sheet in found.sheets)
    assert "held-out prompts: measured for a only" in found.notes
    assert "a: stopped after 4 of 4 steps" in found.notes
    assert any("a: LABELS IN TRAINING" in note for note in found.notes)
    assert cells(to_markdown(found), "b", "final")[0] == "not measured"


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("evaluations.json", None, "holds no run that has ended"),
        ("evaluations.json", "[1]", "cannot be read"),
        ("evaluations.json", "[]", "has no evaluation to compare"),
        ("summary.json", "{}", "cannot be read"),
        ("summary.json", "[", "cannot be read"),
    ],
)
def test_what_is_no_run_is_named(tmp_path: Path, file: str, content: str | None, said: str) -> None:
    a, b = (run(tmp_path / name, evaluation([1, 2, 0], 0)) for name in "ab")
    if content is None:
        (b / file).unlink()
    else:
        (b / file).write_text(content)
    with pytest.raises(ConfigError, match=said):
        compare_runs([a, b])
    with pytest.raises(ConfigError, match="at least two"):
        compare_runs([a])
    with pytest.raises(ConfigError, match="named twice"):
        compare_runs([a, a])


def test_the_command_prints_tables_writes_markdown_and_escapes(tmp_path: Path) -> None:
    a = run(tmp_path / "a|<b>", evaluation([1, 2, 0], 0), evaluation([4, 4, 4], 4), status="[red]<i>")
    b = run(tmp_path / "b", evaluation([1, 2, 0], 0))
    result = CliRunner().invoke(app, ["compare", str(a), str(b), "--markdown", str(tmp_path / "c.md")])
    assert result.exit_code == 0, result.output
    assert "[red]<i>" in result.output  # shown, not obeyed
    text = (tmp_path / "c.md").read_text()
    assert "a\\|&lt;b&gt;" in text
    assert "<i>" not in text
    missing = CliRunner().invoke(app, ["compare", str(a), str(b), "--markdown", str(tmp_path / "no" / "c.md")])
    assert isinstance(missing.exception, ConfigError)
