"""The lab: what it runs again, what it puts in one table, and that every verdict follows from the numbers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import build_misled
from labkit.claims import claim_sentence, direction, final_sentence
from labkit.numbers import Ended, Row, budget, interval, rows
from labkit.page import page
from labkit.runs import Job, Result, jobs, missing, results, run_all
from labkit.tasks import TASKS, Claim, Entry, Task

from ttrl.compare import read_run
from ttrl.config import load_recipe
from ttrl.errors import ConfigError
from ttrl.evaluate.book import EvaluationBook
from ttrl.evaluate.estimators import bootstrap
from ttrl.evaluate.evaluator import Estimate, Evaluation, PromptResult, Protocol, accuracies, label_free
from ttrl.rundir import RunDir
from ttrl.setup import check_recipe

RECIPE = (
    "name: r\nsteps: 4\nmodel: {{path: 'bundled:tiny-adder'}}\ndata: {{prompts: /data/p.jsonl}}\nguards: [{guards}]\n"
)
PROTOCOL = Protocol(
    samples=16, temperature=1.0, top_p=1.0, max_new_tokens=8, template="raw", extractor="math", prompts=3, prompt_set="aa", labels="bb"
)  # fmt: skip
ENTRIES = (
    Entry(name="vote", recipe="base/tiny", claims=(Claim(text="it learns"),)),
    Entry(name="other", recipe="lab/ear", claims=(Claim(text="it is better", against="vote"),)),
)
TASK = Task(name="t", title="Title", about="About.", changes=("steps=4",), entries=ENTRIES)
GOOD, SAME = ([4, 8, 0], [12, 16, 8]), ([4, 8, 0], [4, 8, 0])
"""Right answers of 16 samples of three prompts, before and after."""


def evaluation(
    correct: Sequence[int], step: int, protocol: Protocol = PROTOCOL, order: Sequence[int] = (0, 1, 2)
) -> Evaluation:
    results = tuple(
        PromptResult(
            id=f"p{i}", samples=16, answers={k: n for k, n in (("5", correct[i]), ("7", 16 - correct[i])) if n}, no_answer=0,
            majority=None if correct[i] == 8 else "5" if correct[i] > 8 else "7", share=0.75, length=3.0, correct=correct[i],
            right="5" if correct[i] else None,
        )
        for i in order
    )  # fmt: skip
    return Evaluation(
        step=step, split="adapted", protocol=protocol, results=results, estimates={},
        per_prompt={**accuracies(results, (1, 16)), **label_free(results)},
    )  # fmt: skip


def made(output: Path, job: Job, before: Sequence[int], after: Sequence[int], *, tokens: int = 5000, guards: str = "", steps: int = 4,
         protocol: Protocol = PROTOCOL, order: Sequence[int] = (0, 1, 2)) -> Result:  # fmt: skip
    """A run folder as `ttrl train` leaves it, as far as the lab reads it."""
    directory = RunDir.create(job.folder(output))
    directory.write("recipe.yaml", RECIPE.format(guards=guards).replace("steps: 4", f"steps: {steps}"))
    book = EvaluationBook()
    for item in (evaluation(before, 0, protocol, order), evaluation(after, steps, protocol, order)):
        book.record(item)
    directory.write("evaluations.json", book.to_json())
    first = {"step": 0, "guard/level": 2.0, "rollout/probe_tokens": 700, "reward/mean": 0.25}
    directory.write_lines("metrics.jsonl", [first, {"step": 1, "guard/level": 1.0, "reward/mean": 0.5}])
    summary = {"status": "completed", "reason": "", "steps": steps, "seconds": 12.0, "labels_in_training": False}
    directory.write_json("summary.json", {**summary, "tokens": {"rollout": tokens, "train": 678}})
    return Result(run=job.name, settings=job.settings, status="completed", reason="", seconds=12.0)


def note(output: Path, *found: Result) -> None:
    RunDir(output).write_lines("results.jsonl", map(asdict, found))


def wanted(seeds: Sequence[int] = (0, 1)) -> list[Job]:
    return jobs([TASK], seeds)


def cells(text: str, name: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {name}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_and_the_sentences_say_what_the_numbers_are(tmp_path: Path) -> None:
    seed0, seed1 = wanted()[:2], wanted()[2:]
    note(
        tmp_path,
        made(tmp_path, seed0[0], *SAME),
        made(tmp_path, seed0[1], *GOOD, tokens=4000, guards="sentinel"),
        made(tmp_path, seed1[0], [4, 8, 0], [4, 8, 2]),
        # The same prompts in another order: pairing is by id
        made(tmp_path, seed1[1], [4, 8, 0], [4, 16, 0], tokens=4000, guards="sentinel", order=(2, 0, 1)),
    )
    text = page(wanted(), tmp_path, "python scripts/lab.py", tmp_path / "lab")
    vote, other = cells(text, "vote"), cells(text, "other")
    assert vote[1:3] == ["2", "0.250 -> 0.271"]  # 12 / 48, and (12 + 14) / 96
    assert other[2] == "0.250 -> 0.583"  # (36 + 20) / 96
    assert other[3].startswith("+0.333 [+0.")  # 24 / 48 and 8 / 48: mean of 0.5 and 0.167
    assert other[4] == "+0.500 +0.167"
    assert other[7] == "4.7"  # 4,000 and 700 of probes
    assert (vote[9], other[9]) == ("-", "1, 1")
    # 4 -> 12 and 0 -> 8 and 8 -> 16 of 16 each have p < 0.05 and began with a wrong or tied majority
    assert other[8].startswith("4 / 0 / 0 (")
    said = " ".join(text.split())  # without the breaks of lines
    assert (
        "`base/tiny`): pass@1 cannot be told from no change (+0.021 [+0.000, +0.083]); mean reward of the first and last step"
        in said
    )
    assert "first and last step 0.250, 0.500. Claim (it learns): **cannot be told**." in said
    assert (
        "Claim (it is better): **cannot be told** (final pass@1 minus that of `vote` +0.312 [-0.083, +0.500])" in said
    )
    assert "from 4 of 4 runs" in said and "With 2 per row" in said
    # maj@16 at the start is 0, 1/2 (a tie) and 0; the finals of `other` exceed it but for one of six
    assert "maj@16 0.167, which costs no training. Final pass@1 is above it (interval) for: `other`." in said
    assert "The start majority of 16 is right for 0 of 6 prompts" in said
    assert "python scripts/lab.py\n" in text
    assert not any(
        line.strip().startswith("- ") and line[0] == " " for line in text.splitlines()
    )  # wrapped text is no list


def test_a_failed_run_is_shown_as_failed_and_its_words_are_escaped(tmp_path: Path) -> None:
    first, second = wanted([0])
    bad = Result(run=second.name, settings=second.settings, status="failed", reason="exit status 1: <b>", seconds=0.0)
    note(tmp_path, made(tmp_path, first, *GOOD), bad)
    text = page(wanted([0]), tmp_path, "c", tmp_path / "lab")
    assert cells(text, "other")[1:4] == ["0 (1 failed)", "failed", "-"]
    assert "no run has ended. t/other-0 failed: exit status 1: &lt;b>" in " ".join(text.replace("&gt;", ">").split())
    assert "from 1 of 2 runs" in text
    note(tmp_path, Result(run=first.name, settings=first.settings, status="failed", reason="x", seconds=0.0))
    assert cells(page(wanted([0]), tmp_path, "c", tmp_path), "other")[1:3] == ["0", "not run"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"protocol": replace(PROTOCOL, temperature=0.6)}, "adapted.temperature: t/vote-0 1.0, t/other-0 0.6"),
        ({"protocol": replace(PROTOCOL, prompt_set="cc")}, "adapted.prompt_set"),
        ({"steps": 5}, "steps: t/vote-0 4, t/other-0 5"),
    ],
)
def test_runs_under_other_protocols_never_share_a_table(tmp_path: Path, changes: dict, said: str) -> None:
    first, second = wanted([0])
    note(tmp_path, made(tmp_path, first, *GOOD), made(tmp_path, second, *GOOD, **changes))
    with pytest.raises(ConfigError, match=r"alike|one protocol") as raised:
        page(wanted([0]), tmp_path, "c", tmp_path)
    assert said in str(raised.value)


def test_what_has_ended_is_not_run_again_and_what_failed_is(tmp_path: Path) -> None:
    calls: list[str] = []

    def trainer(arguments: Sequence[str], folder: Path) -> tuple[int, str]:
        job = next(j for j in wanted() if j.settings == tuple(arguments))
        assert not folder.exists()  # what a failed run left is out of the way
        calls.append(job.name)
        made(tmp_path, job, *GOOD)
        (folder / "model").mkdir()
        return {2: (1, "out of luck"), 3: (3, "")}.get(len(calls), (0, ""))

    assert missing(wanted(), tmp_path) == wanted()
    done = list(run_all(wanted()[:3], tmp_path, trainer=trainer))
    assert [r.status for r in done] == ["completed", "failed", "stopped"]
    assert done[1].reason == "exit status 1: out of luck"
    assert [job.name for job in missing(wanted(), tmp_path)] == ["t/other-0", "t/other-1"]
    assert [r.status for r in run_all(missing(wanted(), tmp_path), tmp_path, trainer=trainer)] == ["completed"] * 2
    assert calls == ["t/vote-0", "t/other-0", "t/vote-1", "t/other-0", "t/other-1"]
    assert missing(wanted(), tmp_path) == [] and len(results(tmp_path)) == 4
    folder = wanted()[0].folder(tmp_path)
    assert not (folder / "model").exists() and read_run(folder, "x").summary["steps"] == 4  # numbers stay, weights go


def test_a_run_under_other_settings_is_not_taken_for_a_finished_one(tmp_path: Path) -> None:
    job = wanted([0])[0]
    note(tmp_path, made(tmp_path, job, *GOOD))
    other = replace(job, task=replace(TASK, changes=("steps=5",)))
    with pytest.raises(ConfigError, match=r"t/vote-0 was run with other settings \(steps=4, steps=5\)"):
        missing([other], tmp_path)


def test_jobs_go_seed_by_seed_and_a_wrong_name_is_said() -> None:
    assert [job.name for job in jobs([TASK], [0, 1], ["t/other"])] == ["t/other-0", "t/other-1"]
    assert [job.seed for job in jobs(TASKS, [4, 2])] == sorted([job.seed for job in jobs(TASKS, [4, 2])], reverse=True)
    with pytest.raises(ConfigError, match=r"t/vot: not a task or TASK/ROW; there are t, t/other, t/vote"):
        jobs([TASK], [0], ["t/vot"])


def test_the_interval_has_the_spread_of_crossed_seeds_and_prompts() -> None:
    rng = np.random.default_rng(7)
    values = rng.normal(size=(12, 1)) * 0.5 + rng.normal(size=(1, 40)) + rng.normal(size=(12, 40)) * 2 + 3
    mean, of_seed, of_prompt = values.mean(), values.mean(axis=1) - values.mean(), values.mean(axis=0) - values.mean()
    rest = values - mean - of_seed[:, None] - of_prompt
    # Drawing seeds and prompts independently: their variances add, and the rest is divided by all cells (Owen 2007)
    spread = np.sqrt((of_seed**2).mean() / 12 + (of_prompt**2).mean() / 40 + (rest**2).mean() / 480)
    found = interval(values)
    assert found is not None and found.low is not None and found.high is not None
    assert found.value == pytest.approx(mean)
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(spread, rel=0.05)
    alone = interval(values[:1])
    over_prompts = bootstrap(values[0], 1)
    assert alone is not None and over_prompts is not None
    assert (alone.low, alone.high) == pytest.approx(over_prompts, abs=0.05)
    assert interval(np.empty((0, 0))) is None
    assert interval(np.array([[0.5], [0.7]])) == Estimate(value=pytest.approx(0.6), low=None, high=None)


def row(
    tmp_path: Path, entry: Entry, before: Sequence[int], after: Sequence[int], tokens: int = 5000, seed: int = 0
) -> Row:
    job = Job(task=TASK, entry=entry, seed=seed)
    made(tmp_path, job, before, after, tokens=tokens)
    run = read_run(job.folder(tmp_path), job.name)
    ends = [e for e in (run.book.before("adapted"), run.book.after("adapted")) if e is not None]
    ended = Ended(seed=seed, run=run, before=ends[0], after=ends[1], tokens=tokens, alarms=None, rewards=(0.4, 0.5))
    return Row(entry=entry, ended=(ended,), failed=())


@pytest.mark.parametrize(
    ("after", "word", "verdicts"),
    [
        ([12, 16, 8], "rises", {">": "shown, on one seed", "<": "the opposite was measured, on one seed"}),
        ([2, 4, 0], "cannot be told", {">": "cannot be told", "<": "cannot be told"}),  # one of three did not move
        ([2, 4, 1], "falls", {">": "the opposite was measured, on one seed", "<": "shown, on one seed"}),
    ],
)
def test_verdicts_follow_the_interval_and_nothing_else(
    tmp_path: Path, after: Sequence[int], word: str, verdicts: dict[str, str]
) -> None:
    vote = row(tmp_path, ENTRIES[0], [4, 8, 2], [4, 8, 2])
    other = row(tmp_path, ENTRIES[1], [4, 8, 2] if word != "cannot be told" else [4, 8, 0], after)
    assert word in final_sentence(other)
    for order, verdict in verdicts.items():
        claim = Claim(text="x", order=order)
        assert f"Claim (x): **{verdict}**." in claim_sentence(claim, other, [vote, other])
    assert claim_sentence(Claim(text="x", against="gone"), other, [vote, other]).endswith("`gone` was not asked for.")


def test_equality_is_of_every_number_and_tokens_are_counted(tmp_path: Path) -> None:
    vote = row(tmp_path, ENTRIES[0], [4, 8, 2], [4, 8, 2], tokens=4000)
    same = row(tmp_path, ENTRIES[1], [4, 8, 2], [4, 8, 2], tokens=3000)
    equal = Claim(text="x", order="=", against="vote")
    assert "**shown** (final pass@1 against `vote`: the same for all 3" in claim_sentence(equal, same, [vote, same])
    shifted = row(tmp_path / "b", ENTRIES[1], [4, 8, 2], [5, 7, 2])  # the same mean, other numbers
    assert "**not shown** (final pass@1 against `vote`: other for 2 of 3" in claim_sentence(
        equal, shifted, [vote, shifted]
    )
    fewer = Claim(text="x", metric="tokens", order="<", against="vote")
    assert "**shown, on one seed** (tokens per token of `vote`: 0.750)" in claim_sentence(fewer, same, [vote, same])
    assert "**the opposite was measured, on one seed**" in claim_sentence(fewer, shifted, [vote, shifted])
    assert "no seed is common" in claim_sentence(fewer, row(tmp_path, ENTRIES[1], *GOOD, seed=3), [vote])
    assert (
        claim_sentence(None, same, [vote, same])
        == "Final pass@1 minus that of `vote` +0.000 [+0.000, +0.000]: cannot be told."
    )
    assert direction(Estimate(value=1.0, low=None, high=None)) == direction(None) == 0


def test_sections_are_appended_with_their_links(tmp_path: Path) -> None:
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "regret.md").write_text("## Regret\n\n[MRT](../methods/mrt.md)\n")
    text = page(wanted([0]), tmp_path, "c", tmp_path / "lab")
    assert "## Regret\n\n[MRT](methods/mrt.md)\n" in text


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_every_row_of_the_lab_is_a_recipe_under_the_protocol_of_its_task(task: Task) -> None:
    names = [entry.name for entry in task.entries]
    assert len(set(names)) == len(names) <= 16
    budgets = []
    for job in jobs([task], [3]):
        recipe = check_recipe(load_recipe(job.settings[0], list(job.settings[1:]))).recipe
        budgets.append((budget(recipe), recipe.eval.samples, recipe.eval.temperature, recipe.eval.limit, recipe.seed))
        assert recipe.allow_labels == ("gold" in job.entry.name)
        for claim in job.entry.claims:
            assert claim.order in "><=" and claim.against in ("start", *names)
            assert claim.metric in ("pass@1", "maj@16", "pass@16", "majority_share", "tokens")
    assert all(found == budgets[0] for found in budgets)


def test_the_shipped_page_is_of_the_rows_that_the_lab_has() -> None:
    text = (Path(__file__).resolve().parent.parent / "docs" / "results.md").read_text()
    assert text.splitlines()[2].startswith("    python scripts/lab.py --seeds")
    tables = {part.partition("\n")[0]: part for part in text.split("\n## ")[1:]}
    for task in TASKS:
        assert [cells(tables[task.title], entry.name)[0].partition(" (")[0] for entry in task.entries] == [
            entry.name for entry in task.entries
        ]


def test_misled_prompts_are_what_their_script_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = build_misled.FOLDER
    monkeypatch.setattr(build_misled, "FOLDER", tmp_path)
    build_misled.main()
    for name in ("misled.prompts.jsonl", "misled.labels.jsonl"):
        assert (tmp_path / name).read_bytes() == (shipped / name).read_bytes()


def test_rows_of_nothing_are_empty(tmp_path: Path) -> None:
    assert all(not row.ended and not row.failed for row in rows(wanted(), tmp_path))


def test_a_verdict_of_several_seeds_does_not_say_one(tmp_path: Path) -> None:
    two = [row(tmp_path, ENTRIES[1], [4, 8, 0], [12, 16, 8], seed=seed) for seed in (0, 1)]
    both = Row(entry=ENTRIES[1], ended=(two[0].ended[0], two[1].ended[0]), failed=())
    assert claim_sentence(Claim(text="x"), both, [both]) == "Claim (x): **shown**."
    assert both.change("pass@1").tolist() == [[0.5, 0.5, 0.5]] * 2
