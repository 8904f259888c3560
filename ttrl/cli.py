"""The command line. Exit status: 0 done, 1 failed, 2 the recipe or the call is wrong, 3 stopped by a guard,
128 + N stopped by signal N with a checkpoint (130 Ctrl-C, 143 SIGTERM, 138 SIGUSR1)."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ttrl.cli_model import evaluate_command, solve_command
from ttrl.errors import ConfigError, StopRequested, TtrlError
from ttrl.failures import remedy

EXIT_FAILED, EXIT_USAGE, EXIT_GUARD, EXIT_SIGNAL = 1, 2, 3, 128

app = typer.Typer(
    help="Test-time reinforcement learning: improve a language model on unlabelled prompts with rewards it makes itself.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip
recipes_app = typer.Typer(
    help="Recipes that come with ttrl, and the schema of all.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(recipes_app, name="recipes")
new_app = typer.Typer(help="Write the start of a plug-in.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(new_app, name="new")
app.command("eval")(evaluate_command)
app.command("solve")(solve_command)

RecipeArgument = Annotated[str, typer.Argument(help="recipe file, or the name of a shipped recipe")]
Overrides = Annotated[list[str] | None, typer.Argument(help="changes to the recipe: key.path=value ...")]


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="run folder, instead of the recipe's")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the run in the output folder")] = False,
) -> None:
    """Adapt a model to unlabelled prompts and write a report."""
    from ttrl.config import load_recipe

    changes = list(overrides or []) + ([f"output={json.dumps(str(output))}"] if output else [])
    loaded = load_recipe(recipe, changes)
    from ttrl.run import STOPPED, run

    console = Console(stderr=False, soft_wrap=True)
    outcome = run(loaded, resume=resume, console=console)
    folder = Path(loaded.output)
    console.print(f"{outcome.status}{': ' + outcome.reason if outcome.reason else ''}", highlight=False, markup=False)
    if outcome.line:
        console.print(outcome.line, highlight=False, markup=False)
    console.print(f"report: {folder / 'report.html'}", highlight=False, markup=False)
    if outcome.status == STOPPED:
        raise typer.Exit(EXIT_GUARD if outcome.guard else EXIT_SIGNAL + outcome.signal)


@app.command()
def check(
    target: Annotated[str, typer.Argument(help="recipe, ./reward.py, ./reward.py:Name or reward:NAME")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="changes to the recipe, or options of the reward")
    ] = None,
) -> None:
    """Find every mistake in a recipe, its plug-ins and its data without a model; or test a reward of your own."""
    from ttrl.authoring import check_reward, is_reward

    if is_reward(target):
        findings = check_reward(target, overrides or [])
        for finding in findings:
            typer.echo(
                f"{'ok' if finding.problem is None else 'FAIL':<5} {finding.check:<30} {finding.problem or ''}".rstrip()
            )
        if failed := sum(finding.problem is not None for finding in findings):
            typer.echo(f"{target}: {failed} of {len(findings)} checks failed")
            raise typer.Exit(EXIT_FAILED)
        typer.echo(f"{target}: ok, {len(findings)} checks")
        return
    from ttrl.config import load_recipe

    loaded = load_recipe(target, overrides or [])
    from ttrl.evaluate.seal import label_files, sealed
    from ttrl.lint import lint_recipe
    from ttrl.setup import check_recipe

    with sealed(label_files(loaded)):
        checked = check_recipe(loaded)
    for warning in lint_recipe(loaded, checked.reward):
        typer.echo(f"warning ({warning.code}): {warning.message}", err=True)
    typer.echo(
        f"{loaded.name}: ok, {len(checked.records)} prompts, {len(checked.heldout)} held-out prompts, {loaded.steps} steps"
    )


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    gpus: Annotated[
        str | None, typer.Option(help="COUNTxDEVICE, such as 8xH100; default: the CPU of this machine")
    ] = None,
    params: Annotated[str | None, typer.Option(help="size such as 7B, instead of the recipe's model")] = None,
    mean_length: Annotated[float | None, typer.Option(help="expected tokens of a completion")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="of the longest prompt")] = None,
    memory: Annotated[float | None, typer.Option(min=0.1, help="GiB of a device, instead of what is known")] = None,
    price: Annotated[float | None, typer.Option(min=0.0, help="USD per device and hour")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Predict memory, time and money of a recipe before running it. Exit status 1 when it does not fit."""
    from ttrl.config import load_recipe
    from ttrl.plan.command import PlanCall, make_plan
    from ttrl.plan.report import show, to_json

    call = PlanCall(
        gpus=gpus, params=params, mean_length=mean_length, prompt_tokens=prompt_tokens, memory_gib=memory, price=price
    )
    made = make_plan(load_recipe(recipe, overrides or []), call)
    if as_json:
        typer.echo(json.dumps(to_json(made), indent=2))
    else:
        show(made, Console(soft_wrap=True))
    if not made.fits:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="run folder")]) -> None:
    """Write report.html of a run again from its files."""
    from ttrl.report import write_report
    from ttrl.rundir import RunDir

    typer.echo(write_report(RunDir.existing(run)))


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="two or more run folders; differences are against the first")],
    markdown: Annotated[Path | None, typer.Option(help="also write the tables to this file")] = None,
) -> None:
    """Compare runs measured under one protocol, with intervals and paired differences; refuses others with exit status 2."""
    from ttrl.compare import compare_runs, to_markdown, to_tables

    if markdown is not None and not markdown.parent.is_dir():
        raise ConfigError(f"--markdown {markdown}: there is no folder {markdown.parent}")
    found = compare_runs(runs)
    console = Console(soft_wrap=True)
    for table in to_tables(found):
        console.print(table)
    for note in found.notes:
        console.print(note, highlight=False, markup=False)
    if markdown is not None:
        markdown.write_text(to_markdown(found), encoding="utf-8")


@app.command()
def plugins() -> None:
    """List every plug-in by slot, with where it lives."""
    from ttrl.registry import BUILT_IN, names

    for slot in BUILT_IN:
        typer.echo(f"{slot}")
        for name, target in sorted(names(slot).items()):
            typer.echo(f"  {name:<16} {target}")


@app.command()
def doctor() -> None:
    """Versions, devices and what is missing, ready to paste into a bug report."""
    from ttrl.doctor import examine

    facts, problems = examine()
    for name, value in facts:
        typer.echo(f"{name:<16} {value}")
    for problem in problems:
        typer.echo(f"problem: {problem}")
    if problems:
        raise typer.Exit(EXIT_FAILED)


@new_app.command("reward")
def new_reward_command(
    name: Annotated[str, typer.Argument(help="for example soft_vote")],
    folder: Annotated[Path, typer.Option(help="where to write the two files")] = Path(),
) -> None:
    """Write a pseudo-reward of 25 lines and its test; refuses to overwrite."""
    from ttrl.authoring import new_reward

    reward, test = new_reward(name, folder)
    typer.echo(f"wrote {reward} and {test}")
    typer.echo(f"next: ttrl check {reward if reward.is_absolute() else f'./{reward}'}    python -m pytest {test}")


@recipes_app.command("list")
def recipes_list() -> None:
    """Names and descriptions of the shipped recipes."""
    from ttrl.config import load_recipe
    from ttrl.config.load import shipped_recipes

    for name in shipped_recipes():
        typer.echo(f"{name:<36} {load_recipe(name).description}")


@recipes_app.command("show")
def recipes_show(name: RecipeArgument, overrides: Overrides = None) -> None:
    """A recipe with everything it extends and every default written out."""
    from ttrl.config import load_recipe, recipe_to_yaml

    typer.echo(recipe_to_yaml(load_recipe(name, overrides or [])), nl=False)


@recipes_app.command("schema")
def recipes_schema() -> None:
    """The JSON schema of recipes, for editors."""
    from ttrl.config import Recipe

    typer.echo(json.dumps(Recipe.model_json_schema(by_alias=True), indent=2))


def _printable(text: str) -> str:
    """Messages quote files of others: control characters must not reach the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def main() -> None:
    """Entry point. Mistakes of the user end in one message and exit status 2; everything else keeps its traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Idle OpenMP threads must sleep, not spin: on a machine with other work spinning makes small models up to 100x slower
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except ConfigError as error:
        sys.exit(_complain(error, EXIT_USAGE))
    except StopRequested as error:  # before there was anything to keep
        sys.exit(_complain(error, EXIT_SIGNAL + error.signal))
    except TtrlError as error:
        sys.exit(_complain(error, EXIT_FAILED))
    except (OSError, MemoryError, RuntimeError, FloatingPointError) as error:
        if remedy(error) is None:
            raise
        sys.exit(_complain(error, EXIT_FAILED))


def _complain(error: BaseException, status: int) -> int:
    advice = remedy(error)
    text = f"{error}" if advice is None else f"{type(error).__name__}: {error}; {advice}"
    typer.echo(_printable(f"ttrl: {text}"), err=True)
    for note in getattr(error, "__notes__", ()):
        typer.echo(_printable(f"  {note}"), err=True)
    return status


if __name__ == "__main__":
    main()
