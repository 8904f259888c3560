"""The bank of a stream: the numbers of the paper's rule, quotas, replacement, drawing."""

from __future__ import annotations

import math

import pytest

from ttrl.modes.bank import Bank, Entry, answer_kind, vote_entropy


def entry(name: str, kind: str = "a", entropy: float = 0.0, age: int = 0) -> Entry:
    return Entry(prompt_id=name, kind=kind, entropy=entropy, age=age)


@pytest.mark.parametrize(
    ("age", "nats", "value"), [(0, 0.3, 0.6443), (64, 0.3, 0.8753), (128, 0.3, 1.0251), (0, 1.0, 0.9809)]
)
def test_the_score_of_an_entry(age, nats, value):
    """Size 64, eight classes: entropies are divided by ln 8."""
    assert Bank(64, 8).worth_less(entry("p", entropy=nats / math.log(8), age=age)) == pytest.approx(value, abs=5e-5)


def test_the_weight_of_a_replay_falls_with_age():
    bank = Bank(64, 8)
    assert bank.weight(entry("p")) == 0.5
    assert bank.weight(entry("p", age=64)) == pytest.approx(0.2689, abs=5e-5)


def test_a_stream_of_one_type_fills_its_quota_and_no_more():
    bank = Bank(64, 8)
    for i in range(500):
        bank.arrive(entry(f"p{i}", entropy=(i * 37 % 100) / 100))
    assert len(bank.entries) == 8
    bank.arrive(entry("other", kind="b"))
    assert len(bank.entries) == 9


def test_at_its_quota_a_type_gives_up_its_worst_entry_and_only_for_a_better_one():
    bank = Bank(4, 2)
    bank.arrive(entry("clear", entropy=0.1))
    bank.arrive(entry("vague", entropy=0.9))
    bank.arrive(entry("worse", entropy=1.0))  # even aged by one, "vague" is the better one
    assert [e.prompt_id for e in bank.entries] == ["clear", "vague"]
    bank.arrive(entry("better", entropy=0.2))
    assert [(e.prompt_id, e.age) for e in bank.entries] == [("clear", 3), ("better", 0)]


def test_a_full_bank_makes_room_for_a_new_type_at_the_expense_of_the_largest():
    bank = Bank(5, 2)
    for name, kind in (("a1", "a"), ("a2", "a"), ("b1", "b"), ("b2", "b"), ("c1", "c")):
        bank.arrive(entry(name, kind, entropy=0.5 if name == "b2" else 0.1))
    bank.arrive(entry("d1", "d", entropy=0.1))
    assert sorted(e.prompt_id for e in bank.entries) == ["a1", "a2", "b1", "c1", "d1"]


def test_age_alone_makes_room():
    bank = Bank(2, 2)
    bank.arrive(entry("old"))
    for i in range(3):
        bank.arrive(entry(f"new{i}"))
    assert "old" not in {e.prompt_id for e in bank.entries}


def test_drawing_is_by_seed_without_replacement_and_survives_a_restart():
    bank = Bank(8, 1)
    for i in range(8):
        bank.arrive(entry(f"p{i}"))
    drawn = bank.draw(5, 0, "replay", 3)
    assert len({e.prompt_id for e in drawn}) == 5
    again = Bank(8, 1)
    again.load_state(bank.state())
    assert again.draw(5, 0, "replay", 3) == drawn
    assert again.draw(5, 0, "replay", 4) != drawn
    assert len(bank.draw(20, 0)) == 8
    assert Bank(8, 1).draw(3, 0) == []


@pytest.mark.parametrize(
    ("form", "kind"),
    [("933", "number of 3 digits"), ("-12.5", "number of 2 digits"), ("B", "b"), ("Yes", "yes"), ("x^2+1", "text"),
     ("a long answer", "text")],
)  # fmt: skip
def test_answers_have_types(form, kind):
    assert answer_kind(form) == kind


def test_entropy_of_a_vote_is_a_share_of_the_largest():
    assert vote_entropy([2, 2], 4) == pytest.approx(0.5)
    assert vote_entropy([1, 1, 1, 1], 4) == pytest.approx(1.0)
    assert vote_entropy([4], 4) == 0.0
    assert vote_entropy([], 4) == 0.0
