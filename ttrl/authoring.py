"""`ttrl new reward NAME` and `ttrl check ./file.py[:Name]`: from an empty folder to a reward that passes the contract."""

from __future__ import annotations

import keyword
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ttrl.config.schema import Plug
from ttrl.config.source import parse_override
from ttrl.errors import ConfigError
from ttrl.kit import Finding, Watch, examine
from ttrl.registry import build, check, resolve

REWARD = '''\
"""A pseudo-reward: what every rollout of a group is paid, without knowing the right answer."""

import numpy as np

from ttrl.rewards.reader import AnswerReader
from ttrl.rewards.vote import decide
from ttrl.types import Scored


class {name}:
    """Pays every rollout the share of the votes that its answer got."""

    needs, min_votes = frozenset(), 2

    def __init__(self, *, extractor: str = "math", options: dict | None = None):
        self.reader = AnswerReader(extractor, options or {{}})

    def __call__(self, group, ctx):
        answers = self.reader.read(group.rollouts)
        classes, forms = self.reader.classes(answers)  # -1 is "no answer"
        vote = decide(classes, tie_seed=ctx.seed)
        pay = [vote.counts[c] / sum(vote.counts) if c >= 0 else 0.0 for c in classes]
        label = None if vote.winner is None else forms[vote.winner]
        return Scored(
            group=group, rewards=np.array(pay, np.float32), train=group.trainable & (label is not None),
            classes=np.array(classes, np.int32), answers=answers, label=label, share=vote.share, margin=vote.margin,
        )  # fmt: skip
'''

TEST = """\
from {module} import {name}

from ttrl.kit import CONTEXT, Kit, answered, examine


def test_the_contract():
    assert [f for f in examine({name}) if f.problem] == []


def test_three_of_four_agree():
    group = Kit({name}, ("5", "7", "9")).group([answered(a) for a in ("5", "5", "5", "7")])
    scored = {name}()(group, CONTEXT)
    assert scored.label == "5"
    assert scored.rewards.tolist() == [0.75, 0.75, 0.75, 0.25]
"""


def new_reward(name: str, folder: Path) -> tuple[Path, Path]:
    """Write NAME.py and test_NAME.py. Raises ConfigError for a name Python cannot import, or a file that exists."""
    module = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().replace("-", "_")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", module) or keyword.iskeyword(module):
        raise ConfigError(f"{name!r} cannot be a module name; use letters, digits and _, for example soft_vote")
    files = folder / f"{module}.py", folder / f"test_{module}.py"
    for file in files:
        if file.exists():
            raise ConfigError(f"{file} exists; choose another name or move it away")
    class_name = "".join(part.capitalize() for part in module.split("_"))
    for file, text in zip(files, (REWARD, TEST), strict=True):
        file.write_text(text.format(module=module, name=class_name), encoding="utf-8")
    return files


def is_reward(target: str) -> bool:
    """Does `ttrl check` mean a reward? `./file.py`, `./file.py:Name` or `reward:NAME`; everything else is a recipe."""
    return target.startswith("reward:") or target.endswith(".py") or ".py:" in target


def check_reward(target: str, options: Sequence[str]) -> list[Finding]:
    """Run the contract kit. `options` are `key=value`. Raises ConfigError when there is no such reward or option."""
    use = target.removeprefix("reward:")
    with Watch("while it was imported and built") as seen:
        if use.endswith(".py"):
            use = f"{use}:{only_reward(Path(use))}"
        given = {key: value for option in options for key, value in parse_override(option).data.items()}
        plug = Plug.model_validate({"use": use, "with": given})
        check("reward", plug)
        build("reward", plug)
    imported = Finding(check="imported without labels", problem=next(iter(seen.problems), None))
    return [imported, *examine(lambda: build("reward", plug))]


def only_reward(path: Path) -> str:
    """The name of the one class in a file that looks like a reward: its own, public and callable."""
    if not path.is_file():
        raise ConfigError(f"plug-in file {path}: no such file")
    names: list[str] = re.findall(r"^class ([A-Za-z]\w*)", path.read_text(encoding="utf-8"), re.MULTILINE)
    classes: dict[str, Any] = {name: resolve("reward", f"{path}:{name}") for name in names}
    found = [name for name, item in classes.items() if any("__call__" in vars(base) for base in item.__mro__[:-1])]
    if len(found) != 1:
        what = f"{len(found)} classes with __call__ ({', '.join(found)})" if found else "no class with __call__"
        raise ConfigError(f"{path} holds {what}; name one, for example {path}:{found[0] if found else 'MyReward'}")
    return found[0]
