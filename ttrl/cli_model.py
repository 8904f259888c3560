"""`ttrl eval` and `ttrl solve`: a model as it is, measured or asked, without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ttrl.errors import ConfigError


def evaluate_command(
    model: Annotated[str, typer.Argument(help="model folder, hub name or bundled:NAME")],
    prompts: Annotated[str, typer.Option(help="file with prompts")],
    labels: Annotated[
        str | None, typer.Option(help="file with {id, answer}; without it only label-free numbers")
    ] = None,
    template: Annotated[str, typer.Option(help="chat, boxed, choice, raw or a .txt file")] = "chat",
    extractor: Annotated[str, typer.Option(help="math, number, choice, label, json, box or point")] = "math",
    label_set: Annotated[
        str | None, typer.Option("--label-set", help="comma-separated labels for the extractor 'label'")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, max=512)] = 16,
    temperature: Annotated[float, typer.Option(min=0.0)] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    k: Annotated[
        str | None, typer.Option(help="comma-separated, for pass@k and maj@k; default 1,8,16 as far as drawn")
    ] = None,
    truncated_votes: Annotated[
        bool, typer.Option("--truncated-votes", help="text cut at the limit may answer")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="only the first N prompts")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    regret: Annotated[
        str | None,
        typer.Option(help="comma-separated token budgets: measure normalised regret with forced answers instead"),
    ] = None,
    splitter: Annotated[str, typer.Option(help="regret: paragraphs, delimiter:TEXT or tokens:N")] = "paragraphs",
    termination: Annotated[str | None, typer.Option(help="regret: the words that force an answer")] = None,
    probes: Annotated[int, typer.Option(min=1, help="regret: forced answers per cut point")] = 8,
    probe_tokens: Annotated[int, typer.Option(min=1, help="regret: tokens of a forced answer")] = 32,
    reach: Annotated[str, typer.Option(help="regret: accuracies whose token cost is reported")] = "0.5",
    output: Annotated[Path | None, typer.Option(help="also write the result as JSON")] = None,
) -> None:
    """Measure pass@1, pass@k and maj@k of any model on any prompts file, with intervals; or, with --regret, how soon it is right."""
    from ttrl.evaluate.command import EvalCall, RegretCall, evaluate_model, evaluate_regret
    from ttrl.probing import TERMINATION

    if output is not None and not output.parent.is_dir():
        raise ConfigError(f"--output {output}: there is no folder {output.parent}")
    options = {"labels": label_set.split(",")} if label_set else {}
    call = EvalCall(
        model=model, prompts=prompts, labels=labels, template=template, extractor=extractor, extractor_options=options,
        samples=samples, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, limit=limit, seed=seed,
        k=_numbers(k, "--k") if k is not None else tuple(n for n in (1, 8, 16) if n <= samples),
        truncated_votes=truncated_votes, device=device,
    )  # fmt: skip
    from ttrl.sinks import show

    console = Console(soft_wrap=True)
    if regret is None:
        evaluation = evaluate_model(call)
        shown, record = {name: show(estimate) for name, estimate in evaluation.estimates.items()}, evaluation.record()
    else:
        extra = RegretCall(
            budgets=_numbers(regret, "--regret"), reach=_fractions(reach), splitter=splitter, probes=probes,
            termination=TERMINATION if termination is None else termination, probe_tokens=probe_tokens,
        )  # fmt: skip
        stopped = evaluate_regret(call, extra)
        shown, record = {name: show(estimate) for name, estimate in stopped.estimates.items()}, stopped.record()
        shown |= {name: "never" if cost is None else show(cost) for name, cost in stopped.reach.items()}
    for name, text in shown.items():
        console.print(f"{name:>16}  {text}", highlight=False, markup=False)
    if output is not None:
        output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def solve_command(
    model: Annotated[str, typer.Argument(help="model folder, hub name or bundled:NAME")],
    prompts: Annotated[str, typer.Option(help="file with prompts")],
    output: Annotated[Path, typer.Option(help="answers, one JSON object per line; must not exist yet")],
    reward: Annotated[
        str, typer.Option(help="the rule that elects an answer: majority_vote, region_consistency, ...")
    ] = "majority_vote",
    option: Annotated[list[str] | None, typer.Option(help="key=value of the rule; may be given again")] = None,
    template: Annotated[str, typer.Option(help="chat, boxed, choice, raw or a .txt file")] = "chat",
    keep: Annotated[str, typer.Option(help="comma-separated columns the rule needs, such as image_size")] = "",
    votes: Annotated[int, typer.Option(min=2, help="samples per prompt")] = 16,
    temperature: Annotated[float, typer.Option(min=0.0)] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="only the first N prompts")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Answer prompts without training: sample votes and let a decision rule elect, or abstain."""
    from dataclasses import asdict

    from ttrl.config.source import parse_override
    from ttrl.solve import SolveCall, solve

    if output.exists() or not output.parent.is_dir():
        raise ConfigError(f"--output {output}: {'exists already' if output.exists() else 'its folder does not exist'}")
    given = {key: value for text in option or [] for key, value in parse_override(text).data.items()}
    call = SolveCall(
        model=model, prompts=prompts, reward=reward, options=given, template=template,
        keep=tuple(name for name in keep.split(",") if name), votes=votes, temperature=temperature, top_p=top_p,
        max_new_tokens=max_new_tokens, limit=limit, seed=seed, device=device,
    )  # fmt: skip
    solved = solve(call)
    output.write_text("".join(json.dumps(asdict(one)) + "\n" for one in solved), encoding="utf-8")
    elected = sum(one.answer is not None for one in solved)
    typer.echo(f"{elected} of {len(solved)} prompts answered, the rule abstained on the others: {output}")


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{option}: {text!r} is not a comma-separated list of whole numbers") from None


def _fractions(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--reach: {text!r} is not a comma-separated list of numbers") from None
