"""Where numbers go besides the run directory: console, TensorBoard, Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ttrl.config.schema import Recipe
from ttrl.errors import ConfigError
from ttrl.evaluate.digest import LineToBeat
from ttrl.evaluate.evaluator import Estimate, Evaluation
from ttrl.rundir import TENSORBOARD

COLUMNS = (
    ("reward", "reward/mean", "6.3f"), ("share", "reward/majority_share", "6.3f"), ("answered", "reward/answered", "8.3f"),
    ("labelled", "reward/labelled", "8.3f"), ("length", "rollout/length", "6.1f"), ("kl", "train/kl", "8.5f"),
    ("entropy", "train/entropy", "7.4f"), ("grad", "train/grad_norm", "6.3f"), ("tok/s", "time/rollout_tokens_per_second", "7.0f"),
    ("s/step", "time/step", "6.1f"),
)  # fmt: skip


class Sink(Protocol):
    """Receives what happens, in order. Closed at the end, also after an error."""

    def phase(self, name: str) -> None: ...

    def step(self, step: int, values: Mapping[str, float]) -> None: ...

    def note(self, step: int, text: str) -> None:
        """Something out of the ordinary happened in a step."""
        ...

    def evaluation(self, evaluation: Evaluation) -> None: ...

    def close(self) -> None: ...


def show(estimate: Estimate, *, sign: bool = False) -> str:
    """`0.672 [0.640, 0.704]`; with a sign for differences."""
    form = "+.3f" if sign else ".3f"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:{form}}"
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


def show_line(line: LineToBeat) -> str:
    """The vote of the start model, and how far the final model is above it without any vote."""
    text = f"line to beat: {line.metric} of the start model, {show(line.start)}"
    if line.final_pass1_above_it is None:
        return text
    meaning = {"beaten": "beaten", "missed": "missed", "open": "the interval holds 0"}[line.verdict]
    return f"{text}; final pass@1 minus it: {show(line.final_pass1_above_it, sign=True)} ({meaning})"


class ConsoleSink:
    """One line per step under a table head, and a progress bar with the time that remains."""

    def __init__(self, total: int, console: Console, start: int) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("elapsed"), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task("starting", total=total, completed=start)
        self._headed = False
        self._progress.start()

    def phase(self, name: str) -> None:
        self._progress.update(self._task, description=name)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        if not self._headed:
            heads = (f"{name:>{_width(spec, name)}}" for name, _, spec in COLUMNS)
            self._console.print("step  " + "  ".join(heads), style="bold", highlight=False)
            self._headed = True
        cells = (_cell(values.get(key), spec, name) for name, key, spec in COLUMNS)
        self._console.print(f"{step:>4}  " + "  ".join(cells), highlight=False)
        self._progress.update(self._task, completed=step + 1, description="training")

    def note(self, step: int, text: str) -> None:
        self._console.print(f"{step:>4}  {text}", style="bold yellow", highlight=False, markup=False)

    def evaluation(self, evaluation: Evaluation) -> None:
        shown = [f"{name} {show(e)}" for name, e in evaluation.estimates.items() if name not in ("answered", "length")]
        when = f"after {evaluation.step} steps" if evaluation.step else "before training"
        self._console.print(
            f"[bold]{evaluation.split}[/bold] {when}: " + "   ".join(shown).replace("[", "\\["), highlight=False
        )

    def close(self) -> None:
        self._progress.stop()


def _width(spec: str, name: str) -> int:
    return max(int(spec.split(".")[0]), len(name))


def _cell(value: float | None, spec: str, name: str) -> str:
    text = "-" if value is None else f"{value:{spec}}"
    return f"{text:>{_width(spec, name)}}"


class TensorBoardSink:
    """Event files under <output>/tensorboard."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / TENSORBOARD))

    def phase(self, name: str) -> None:
        """Not shown."""

    def step(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def note(self, step: int, text: str) -> None:
        self._writer.add_text("guard/events", text, step)

    def evaluation(self, evaluation: Evaluation) -> None:
        for name, estimate in evaluation.estimates.items():
            self._writer.add_scalar(f"eval/{evaluation.split}/{name}", estimate.value, evaluation.step)

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """A Weights & Biases run; only when the recipe names a project."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        import wandb

        config = recipe.model_dump(mode="json", by_alias=True)
        self._run: Any = wandb.init(project=recipe.log.wandb, name=recipe.name, dir=str(folder), config=config)

    def phase(self, name: str) -> None:
        """Not shown."""

    def step(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def note(self, step: int, text: str) -> None:
        self._run.alert(title=f"step {step}", text=text)

    def evaluation(self, evaluation: Evaluation) -> None:
        values = {f"eval/{evaluation.split}/{name}": estimate.value for name, estimate in evaluation.estimates.items()}
        self._run.log({**values, "eval/step": evaluation.step})

    def close(self) -> None:
        self._run.finish()


def check_sinks(recipe: Recipe) -> None:
    """Raises ConfigError when a package that the recipe asks for is missing; imports none of them."""
    wanted = {"tensorboard": recipe.log.tensorboard, "wandb": recipe.log.wandb is not None}
    for package, asked in wanted.items():
        if asked and find_spec(package) is None:
            raise ConfigError(f"log.{package} needs the package {package}: pip install 'ttrl[{package}]'")


def open_sinks(recipe: Recipe, folder: Path, console: Console, start: int, total: int) -> list[Sink]:
    """The sinks a recipe asks for; `start` of `total` steps are done."""
    sinks: list[Sink] = []
    if recipe.log.tensorboard:
        sinks.append(TensorBoardSink(folder))
    if recipe.log.wandb:
        sinks.append(WandbSink(recipe, folder))
    return [*sinks, ConsoleSink(total, console, start)]
