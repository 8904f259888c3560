"""Putting the page together. Everything a model wrote passes through Jinja's autoescaping."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttrl.config import Recipe, load_recipe
from ttrl.evaluate.digest import largest_vote
from ttrl.evaluate.seal import label_files
from ttrl.report.plots import accuracy, curve, share_map
from ttrl.report.thumbs import thumbs
from ttrl.report.votemap import vote_map
from ttrl.rundir import EVAL, EVENTS, GROUPS, LEDGER, LUCK, METRICS, RECIPE, REPORT, RunDir
from ttrl.stamp import from_comments

MAX_GROUPS = 24
MAX_LEDGER_ROWS = 500
MAX_TEXT = 4_000
MAX_EVENTS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """One number before and after."""

    name: str
    meaning: str
    before: str
    after: str
    change: str
    verdict: str
    """better | worse | same | none, for the colour"""


def write_report(run: RunDir) -> Path:
    """Write report.html from the other files of the run and return its path."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    run.write(REPORT, environment.get_template("report.html.j2").render(**_content(run)))
    return run.path / REPORT


def _content(run: RunDir) -> dict[str, Any]:
    recipe = load_recipe(run.path / RECIPE)
    text = (run.path / RECIPE).read_text(encoding="utf-8")
    metrics = list(run.lines(METRICS))
    summary = {**_unfinished(metrics), **run.summary()}
    entries = list(run.lines(LEDGER))
    headlines = _headlines(summary)
    return {
        "recipe": recipe,
        "recipe_text": text,
        "stamped": list(from_comments(text).items()),
        "summary": summary,
        "headlines": headlines,
        "prequential": _prequential(summary.get("prequential") or {}),
        "measured": summary.get("measured_after_steps", []),
        "cards": _cards(headlines),
        "heldout": _headlines(summary.get("heldout") or {}),
        "line": _line(summary),
        "protocol": ", ".join(
            f"{key} {value}" for key, value in (summary.get("protocol") or {}).items() if value != ""
        ),
        "shares": {name: _share(share) for name, share in (summary.get("ledger_shares") or {}).items()},
        "by_chance": summary.get("ledger_by_chance"),
        "transfer": (summary.get("heldout") or {}).get("ledger"),
        "trained_on": _trained_on(recipe, labels=bool(summary.get("labels_in_training", recipe.allow_labels))),
        "parts": _parts(recipe),
        "figures": _figures(metrics, list(run.lines(EVAL)), summary, list(run.lines(LUCK))),
        "ledger": sorted(entries, key=lambda e: (_ORDER.index(e["verdict"]), e["p_value"]))[:MAX_LEDGER_ROWS],
        "ledger_total": len(entries),
        "groups": [_clipped(group) for group in _spread(list(run.lines(GROUPS)))],
        "dropped": _dropped(metrics),
        "coverage": _coverage(summary.get("coverage") or {}),
        "guarded": _guarded(summary),
        "events": [(row["step"], event) for row in metrics for event in row.get(EVENTS, ())][:MAX_EVENTS],
        "signals": _signals(metrics),
    }


def _unfinished(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stands in for summary.json while a run goes on, or after it was killed."""
    tokens = sum(int(row["rollout/tokens"]) for row in metrics)
    seconds = sum(float(row["time/step"]) for row in metrics)
    return {"status": "unfinished", "reason": "", "steps": len(metrics), "tokens": {"rollout": tokens}, "seconds": seconds,
            "peak_memory_mb": 0, "ledger": None}  # fmt: skip


_ORDER = ("corrupted", "learned", "sharpened", "unchanged")
_MEANINGS = {
    "pass@1": "share of samples that are right (mean over samples and prompts)",
    "majority_share": "votes of the most common answer among valid votes; no labels involved",
    "answered": "share of samples with a readable answer",
    "length": "mean tokens per sample",
}


def _meaning(name: str) -> str:
    kind, _, k = name.partition("@")
    if kind == "pass" and k != "1":
        return f"at least one of {k} samples is right (unbiased)"
    return f"the vote of {k} samples is right (ties at random)" if kind == "maj" else _MEANINGS.get(name, "")


def _headlines(part: Mapping[str, Any]) -> list[Headline]:
    before, after, changes = part.get("initial") or {}, part.get("final") or {}, part.get("change") or {}
    rows = []
    for name, estimate in before.items():
        verdict = "none"
        difference = changes.get(name)
        if difference is not None and difference["low"] is not None and "@" in name:
            verdict = "better" if difference["low"] > 0 else "worse" if difference["high"] < 0 else "same"
        rows.append(
            Headline(
                name=name,
                meaning=_meaning(name),
                before=_show(estimate),
                after=_show(after.get(name)),
                change=_show(difference, sign=True),
                verdict=verdict,
            )
        )  # fmt: skip
    return rows


def _cards(rows: Sequence[Headline]) -> list[Headline]:
    """The numbers to see first: pass@1, the largest vote, and what can be seen without labels."""
    wanted = ("pass@1", largest_vote(row.name for row in rows), "majority_share")
    return [row for name in wanted for row in rows if row.name == name]


def _line(summary: Mapping[str, Any]) -> Headline | None:
    """The vote of the start model against the final model without a vote."""
    line = summary.get("line_to_beat")
    if line is None:
        return None
    margin = line["final_pass@1_above_it"]
    verdict = {"beaten": "better", "missed": "worse", "open": "same"}[line["verdict"]]
    return Headline(
        name=line["metric"], meaning=f"{_meaning(line['metric'])}; by the start model, before any training",
        before=_show(line["start"]), after=_show((summary.get("final") or {}).get("pass@1")),
        change=_show(margin, sign=True), verdict=verdict,
    )  # fmt: skip


def _share(share: Mapping[str, Any]) -> str:
    return f"{share['value']:.0%} [{share['low']:.0%}, {share['high']:.0%}]"


def _show(estimate: Mapping[str, Any] | None, *, sign: bool = False) -> str:
    if estimate is None:
        return "not measured"
    form = "+.3f" if sign else ".3f"
    interval = "" if estimate["low"] is None else f" [{estimate['low']:{form}}, {estimate['high']:{form}}]"
    return f"{estimate['value']:{form}}{interval}"


def _trained_on(recipe: Recipe, *, labels: bool) -> str:
    data = Path(recipe.data.prompts).name
    text = (
        f"Trained on the prompts of {data}, without labels. The numbers above are on these same prompts: "
        "that is the test-time setting."
    )
    if labels:
        text = (
            f"LABELS IN TRAINING: the reward saw the reference answers of {data}. This is an upper bound for label-free runs on "
            "these prompts, not a label-free run, and the numbers above are on the prompts it was trained on."
        )
    elif label_files(recipe):
        text += " The label files could be opened by the evaluation only."
    if recipe.eval.heldout is None:
        return text + " Nothing was held out, so the report cannot say whether the gain carries over to other prompts."
    return text + f" {Path(recipe.eval.heldout.prompts).name} was held out: never sampled for training."


def _prequential(parts: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, dict[str, str]]]:
    """Rows of the table of a stream: the whole and its halves, with every measure that was estimated."""
    return [
        (
            f"{name.replace('_', ' ')} ({part['prompts']})",
            {measure: _show(value) for measure, value in part.items() if measure != "prompts"},
        )
        for name, part in parts.items()
    ]


def _parts(recipe: Recipe) -> list[tuple[str, str]]:
    plugs = [
        ("source", recipe.data.source),
        ("sampler", recipe.rollout.sampler),
        ("engine", recipe.rollout.engine),
        ("reward", recipe.reward),
    ]
    plugs += [("gate", plug) for plug in recipe.gates] + [("objective", recipe.objective)]
    plugs += [("stabilizer", plug) for plug in recipe.stabilizers]
    plugs += [("guard", plug) for plug in recipe.guards] + [("parameters", recipe.trainer.parameters)]
    return [(slot, plug.use + (f" {plug.options}" if plug.options else "")) for slot, plug in plugs]


def _figures(
    metrics: Sequence[Mapping[str, Any]],
    evals: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    luck: Sequence[Mapping[str, Any]] = (),
) -> list[str]:
    from markupsafe import Markup

    initial = summary.get("initial") or {}
    majority = largest_vote(initial)
    beat = initial[majority]["value"] if majority is not None else None
    adapted = [row for row in evals if row["split"] == "adapted"]
    heldout = [row for row in evals if row["split"] == "heldout"]
    shown = ["pass@1"] if majority is None else ["pass@1", majority]
    figures = [
        accuracy(adapted, shown, "Accuracy on the adapted prompts", beat),
        accuracy(heldout, shown, "Accuracy on the held-out prompts", None),
        curve(metrics, {"reward/mean": "mean reward", "reward/majority_share": "vote share", "reward/answered": "answered"},
              "Votes and reward (no labels)", bounded=True),
        share_map(metrics, "Vote shares over time"),
        curve(luck, {"label_accuracy": "labels that are right", "reward_accuracy": "rewards that are right",
                     "reward_accuracy_label_wrong": "rewards that are right, where the label is wrong"},
              "Against the references (training does not see this)", bounded=True),
        curve(metrics, {"reward/flip_rate": "labels that changed since the last visit", "reward/labelled": "groups with a label"},
              "Stability of the labels", bounded=True),
        curve(metrics, {"reward/unique_answers": "different answers per prompt"}, "Diversity"),
        curve(metrics, {"rollout/length": "tokens per rollout"}, "Length"),
        curve(metrics, {"guard/canary_rate": "canary votes that disagree", "guard/canary_limit": "limit"}, "Canaries (no labels)",
              bounded=True),
        curve(metrics, {"train/entropy": "entropy (nats)"}, "Entropy of the policy"),
        curve(metrics, {"train/kl": "KL to the start model"}, "Distance from the start model"),
        curve(metrics, {"train/grad_norm": "before clipping"}, "Gradient norm"),
        curve(metrics, {"guard/unlikely": "start majorities less likely (nats per token)", "guard/forgotten": "their share lost",
                        "guard/flips_first": "changed since the first visit"}, "What the guard sees (no labels)"),
    ]  # fmt: skip
    # The SVGs hold numbers and the fixed titles above, nothing a model wrote
    return [Markup(figure) for figure in figures if figure is not None]


def _guarded(summary: Mapping[str, Any]) -> str:
    """What became of a guarded run, in a sentence; empty for a run without guards."""
    found = summary.get("guards")
    if not found:
        return ""
    actions = f"{found['actions']} actions were taken, the learning rate ended at x{found['lr_factor']:g}."
    if found["model_after_steps"] is None:
        return f"{actions} The model is that of the last step."
    score = found["score"]
    said = "no score, since no prompt came twice" if score is None else f"score {score['value']:+.3f} without labels"
    return f"{actions} model/ has the weights of {found['model_after_steps']} completed steps ({said})."


def _signals(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    """(signal, largest value, the step of it, its bound in that step), for every signal that was read."""
    rows = []
    names = sorted(
        {key.removeprefix("guard_bound/") for row in metrics for key in row if key.startswith("guard_bound/")}
    )
    for name in names:
        read = [row for row in metrics if f"guard_bound/{name}" in row]
        worst = max(read, key=lambda row: row[f"guard/{name}"])
        rows.append((name, f"{worst[f'guard/{name}']:.3f}", str(worst["step"]), f"{worst[f'guard_bound/{name}']:.3f}"))
    return rows


def _spread(groups: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """At most MAX_GROUPS, evenly over the run, the first and the last among them."""
    if len(groups) <= MAX_GROUPS:
        return list(groups)
    return [groups[round(i * (len(groups) - 1) / (MAX_GROUPS - 1))] for i in range(MAX_GROUPS)]


def _clipped(group: Mapping[str, Any]) -> dict[str, Any]:
    shown = thumbs(group)
    rollouts = [{**rollout, "text": _clip(rollout["text"])} for rollout in group["rollouts"]]
    return {
        **group,
        "prompt": _clip(group["prompt"]),
        "thumbs": shown,
        "map": vote_map(group, shown[0].data if shown else None),
        "rollouts": sorted(rollouts, key=lambda r: (-r["reward"], r["class"])),
    }


def _clip(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + f" ... ({len(text) - MAX_TEXT} more characters)"


def _coverage(coverage: Mapping[str, Mapping[str, int]]) -> list[tuple[str, str]]:
    """For `drawn` and `trained`: how many prompts, how often."""
    return [
        (name, ", ".join(f"{count} prompts {steps} times" for steps, count in counts.items()))
        for name, counts in coverage.items()
    ]


def _dropped(metrics: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for row in metrics:
        for name, value in row.items():
            if name.startswith("dropped/"):
                totals[name.removeprefix("dropped/")] = totals.get(name.removeprefix("dropped/"), 0) + int(value)
    return totals
