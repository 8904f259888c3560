"""The stream mode in a model of a model: order of events, transactions, poison, quarantine, bank, stops and resumes."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import FakeTokenizer
from helpers_modes import ATTACK, POISON, Lab, make_lab

from ttrl.answers import from_json
from ttrl.errors import ConfigError, StopRequested
from ttrl.modes.stream import Stream

HONEST = [f"q{i}" for i in range(40)]
POISONED = HONEST[:16] + [ATTACK if i % 2 else HONEST[i] for i in range(16, 40)]
GUARDED = "{use: stream, with: {canaries: 8, tolerance: 0.15, replay: 1, bank: 8, bank_classes: 2}}"
UNGUARDED = "{use: stream, with: {canaries: 0}}"
BATCHES = ["steps=10", "data.prompts_per_step=4"]


def lab(folder: Path, texts: list[str] = HONEST, *changes: str, source: str = GUARDED, resume: bool = False) -> Lab:
    return make_lab(folder, texts, *BATCHES, *changes, source=source, resume=resume)


def anchors(run: Lab) -> dict[str, str]:
    return dict(run.parts.source.state()["canaries"]["anchors"])  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return lab(tmp_path_factory.mktemp("honest")).go()


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return lab(tmp_path_factory.mktemp("poisoned"), POISONED).go()


def test_every_prompt_is_answered_once_in_the_order_of_the_file(honest):
    rows = honest.lines("answers.jsonl")
    assert [row["prompt_id"] for row in rows] == [f"p{i:03d}" for i in range(40)]
    assert [row["step"] for row in rows] == [i // 4 for i in range(40)]
    assert "after" not in rows[0]


def test_answers_are_from_the_weights_before_the_prompt_was_learned_from(honest):
    committed = [row.get("guard/committed", 0.0) for row in honest.lines("metrics.jsonl")]
    for row in honest.lines("answers.jsonl"):
        learned = int(sum(committed[: row["step"]]))
        assert row["before"]["weights"] == f"{learned}-False"
    assert sum(committed) >= 6


def test_nothing_is_learned_before_the_canaries_are_anchored_by_the_start_model(honest):
    rows = honest.lines("metrics.jsonl")
    before = [row["step"] for row in rows if "dropped/before_canaries" in row]
    assert before == list(range(len(before)))
    assert before
    assert all("train/loss" not in rows[step] for step in before)
    assert len(anchors(honest)) == 8
    assert {row["guard/canary_limit"] for row in rows[len(before) :]} == {rows[before[-1]]["guard/canary_limit"]}
    assert rows[before[-1]]["guard/canary_limit"] == pytest.approx(rows[before[-1]]["guard/canary_rate"] + 0.15)


def test_without_guards_one_poisoned_update_changes_every_answer(tmp_path):
    run = lab(tmp_path, POISONED, source=UNGUARDED).go()
    assert run.world.served["poisoned"]
    late = [row["before"]["answer"] for row in run.lines("answers.jsonl")[24:]]
    assert set(late) == {POISON}


def test_a_poisoned_stream_changes_no_canary_while_honest_updates_are_committed(poisoned):
    rows = poisoned.lines("metrics.jsonl")
    refused = [row for row in rows if row.get("guard/committed") == 0.0]
    committed = [row for row in rows if row.get("guard/committed") == 1.0]
    assert len(refused) == 1  # afterwards the text is known, whatever id it comes under
    assert refused[0]["guard/canary_lost"] == 1.0
    assert len(committed) >= 4
    assert not poisoned.world.served["poisoned"]
    assert not poisoned.world.trained["poisoned"]
    for name, anchor in anchors(poisoned).items():
        assert anchor == poisoned.parts.prompts[name].text.removeprefix("q")
    assert committed[-1]["guard/canary_changed"] == 0
    honest = [row for row in poisoned.lines("answers.jsonl") if int(row["prompt_id"][1:]) % 2 == 0]
    assert all(row["before"]["answer"] == str(int(row["prompt_id"][1:])) for row in honest)


def test_repetitions_of_a_poisoned_prompt_are_quarantined_and_still_answered(poisoned):
    rows = poisoned.lines("metrics.jsonl")
    first = next(row["step"] for row in rows if row.get("guard/committed") == 0.0)
    assert all(row["dropped/quarantined"] == 2 for row in rows[first + 1 :])
    attacks = [row for row in poisoned.lines("answers.jsonl") if int(row["prompt_id"][1:]) in (37, 39)]
    assert [row["before"]["answer"] for row in attacks] == [POISON, POISON]


def test_a_refused_update_leaves_weights_and_moments_as_they_were(poisoned):
    committed = sum(row.get("guard/committed", 0.0) for row in poisoned.lines("metrics.jsonl"))
    assert poisoned.world.trained == {"good": committed, "moments": committed, "poisoned": False}
    assert poisoned.world.served == poisoned.world.trained


def test_the_bank_holds_only_prompts_of_committed_updates(poisoned):
    state = poisoned.parts.source.state()  # type: ignore[attr-defined]
    rows = poisoned.lines("metrics.jsonl")
    banned = {row["step"] for row in rows if row.get("guard/committed") != 1.0}
    held = [int(entry["prompt_id"][1:]) for entry in state["bank"]]
    assert held
    assert all(number // 4 not in banned for number in held)
    assert all(poisoned.parts.prompts[f"p{number:03d}"].text != ATTACK for number in held)


def test_an_update_that_votes_cannot_decide_is_not_committed(tmp_path):
    source = "{use: stream, with: {canaries: 8, canary_votes: 1, tolerance: 0.05, level: 0.0001}}"
    run = lab(tmp_path, source=source).go()
    tried = [row for row in run.lines("metrics.jsonl") if "guard/committed" in row]
    assert tried
    assert all(row["guard/committed"] == row["guard/canary_lost"] == 0.0 for row in tried)
    assert run.world.trained["good"] == 0


def test_replayed_samples_count_by_their_age(honest, tmp_path, monkeypatch):
    seen = []
    original = Stream._transaction

    def watched(self, parts, journal, step, lesson, *rest):
        entries = {entry.prompt_id: entry for entry in self._bank.entries}
        for item in lesson.replayed:
            plain = [s for s in parts.objective.samples(item) if abs(s.advantages[0]) > 0]
            name = item.group.prompt.id
            ours = [s for s in lesson.samples if s.group == name and abs(s.advantages[0]) > 0]
            weight = self._bank.weight(entries[name])
            seen.extend((o.advantages[0] / p.advantages[0], weight) for o, p in zip(ours, plain, strict=True))
        return original(self, parts, journal, step, lesson, *rest)

    monkeypatch.setattr(Stream, "_transaction", watched)
    lab(tmp_path).go()
    assert len(seen) > 10
    assert all(found == pytest.approx(wanted, rel=1e-5) for found, wanted in seen)


def test_only_answering_trains_nothing_and_answers_the_same_prompts(honest, tmp_path):
    run = lab(tmp_path, source="{use: stream, with: {learn: false}}").go()
    assert run.world.trained["good"] == 0
    assert [r["prompt_id"] for r in run.lines("answers.jsonl")] == [
        r["prompt_id"] for r in honest.lines("answers.jsonl")
    ]
    assert run.lines("answers.jsonl")[:4] == honest.lines("answers.jsonl")[:4]


@pytest.mark.parametrize("checkpoint", [1, 2, 5, 9])
def test_resumed_from_any_checkpoint_the_run_is_the_same(poisoned, tmp_path, checkpoint, monkeypatch):
    """As after a kill: what was in memory is gone, what is on disk beyond the checkpoint is cut back."""
    first = lab(tmp_path, POISONED, "checkpoint.keep=20").go()
    for folder in (tmp_path / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > checkpoint:
            (folder / "state.json").write_text("torn")
    again = lab(tmp_path, POISONED, "checkpoint.keep=20", resume=True)
    assert again.progress.step == checkpoint
    assert len(again.lines("answers.jsonl")) == 4 * checkpoint
    again.go()
    for file in ("answers.jsonl", "metrics.jsonl"):
        assert again.lines(file) == first.lines(file) == poisoned.lines(file)
    assert again.parts.source.state() == poisoned.parts.source.state()  # type: ignore[attr-defined]
    assert again.world.trained == poisoned.world.trained


def test_a_stop_in_the_middle_of_a_transaction_leaves_the_last_commit(poisoned, tmp_path):
    """At calls of the engine all over the run: answers, replays, canaries of the first and of later looks."""
    total = poisoned.world.calls
    stopped_inside = 0
    for call in range(8, total, total // 6):
        folder = tmp_path / str(call)
        run = lab(folder, POISONED)
        run.world.stop_at = call
        with pytest.raises(StopRequested):
            run.go()
        stopped_inside += run.world.version > run.progress.step
        committed = sum(row.get("guard/committed", 0.0) for row in run.lines("metrics.jsonl"))
        assert run.world.trained == {"good": committed, "moments": committed, "poisoned": False}
        run.journal.checkpoint(run.parts.trainer, run.parts.memory, run.progress)
        again = lab(folder, POISONED, resume=True).go()
        for file in ("answers.jsonl", "metrics.jsonl"):
            assert again.lines(file) == poisoned.lines(file)
    assert stopped_inside >= 2


def test_prequential_accuracy_is_judged_from_the_answers_alone(honest):
    answered = [from_json(row) for row in honest.lines("answers.jsonl")]
    found = honest.judge().prequential(answered, step=10)
    right = [row["before"]["answer"] == str(i) for i, row in enumerate(honest.lines("answers.jsonl"))]
    assert found["all"].estimates["accuracy"].value == pytest.approx(sum(right) / 40)
    halves = [found[name].estimates["accuracy"].value for name in ("first_half", "second_half")]
    assert sum(halves) / 2 == pytest.approx(sum(right) / 40)
    samples = [row["before"]["answers"].get(str(i), 0) / 8 for i, row in enumerate(honest.lines("answers.jsonl"))]
    assert found["all"].estimates["pass@1"].value == pytest.approx(sum(samples) / 40)
    assert found["all"].step == 10


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (["steps=11"], "ends after 10 steps of 4; lower steps"),
        (["rollout.ahead=1"], "rollout.ahead"),
        (["data.source.with={tolerance: 0}"], "tolerance and level must lie strictly between 0 and 1"),
        (["data.source.with={canaries: -1}"], "canaries >= 0"),
        (["data.source.with={replay: 1, bank: 2, bank_classes: 3}"], "bank_classes <= bank"),
        (["data.source.with={canarys: 4}"], "canaries"),
        (["eval.limit=2", "eval.labels={folder}/few.jsonl"], "no label for 38 of 40 prompts"),
    ],
)
def test_mistakes_in_the_recipe_are_found_before_anything_runs(tmp_path, changes, complaint):
    (tmp_path / "few.jsonl").write_text('{"id": "p000", "answer": "0"}\n{"id": "p001", "answer": "1"}\n')
    with pytest.raises(ConfigError, match=complaint):
        lab(tmp_path, HONEST, *(change.replace("{folder}", str(tmp_path)) for change in changes))


def test_the_last_batch_may_be_smaller():
    source = Stream(["a", "b", "c"], 2, 0)
    assert [source.batch(0), source.batch(1)] == [["a", "b"], ["c"]]


def test_the_attack_reaches_the_trainer_as_text():
    """Otherwise the poison of these tests would be a placebo."""
    ids = FakeTokenizer().encode(ATTACK)
    assert FakeTokenizer().decode(ids[1:]) == ATTACK
