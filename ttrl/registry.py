"""Plug-ins by name: a built-in, an entry point, `package.module:Name`, or `./file.py:Name` next to the recipe.

A plug-in is a class or function. The framework passes what the slot needs by position; everything keyword-only belongs to
the recipe's `with:` and is checked against the signature before any model loads.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import typing
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, cast

from pydantic import ConfigDict, ValidationError, create_model

from ttrl import plugin_files
from ttrl.config.explain import suggest
from ttrl.config.schema import Plug
from ttrl.errors import ConfigError

# Modules named here import neither torch nor ray at module level: checking a recipe stays instant.
BUILT_IN: dict[str, dict[str, str]] = {
    "source": {
        "epoch": "ttrl.sources:EpochSource",
        "refill": "ttrl.sources:RefillSource",
        "per_prompt": "ttrl.modes.per_prompt:PerPrompt",
        "stream": "ttrl.modes.stream:Stream",
        "views": "ttrl.sources:ViewSource",
    },
    "sampler": {
        "adaptive": "ttrl.rollout.adaptive:AdaptiveSampler",
        "flat": "ttrl.rollout.flat:FlatSampler",
        "tree": "ttrl.rollout.tree:TreeSampler",
    },
    "engine": {
        "hf": "ttrl.rollout.engines:hf",
        "scripted": "ttrl.rollout.engines:scripted",
        "vllm": "ttrl.rollout.engines:vllm",
    },
    "reward": {
        "majority_vote": "ttrl.rewards.majority:MajorityVote",
        "soft_vote": "ttrl.rewards.soft:SoftVote",
        "frequency_entropy": "ttrl.rewards.soft:FrequencyEntropy",
        "region_consistency": "ttrl.rewards.region:RegionConsistency",
        "selective": "ttrl.rewards.selective:Selective",
        "novelty": "ttrl.rewards.novelty:Novelty",
        "restrain": "ttrl.rewards.restrain:Restrain",
        "distribution": "ttrl.rewards.distribution:DistributionAware",
        "views": "ttrl.rewards.views:Views",
        "length_penalty": "ttrl.rewards.length:LengthPenalty",
        "random": "ttrl.rewards.controls:Random",
        "incorrect": "ttrl.rewards.controls:Incorrect",
        "frozen": "ttrl.rewards.controls:Frozen",
        "gold": "ttrl.rewards.controls:Gold",
        "trl": "ttrl.rewards.trl:TRLReward",
    },
    "gate": {
        "vote_share": "ttrl.gates:VoteShare",
        "answered": "ttrl.gates:Answered",
        "reliable": "ttrl.gates:Reliable",
        "zero_variance": "ttrl.gates:ZeroVariance",
    },
    "objective": {"grpo": "ttrl.trainers.grpo:GRPO", "mrt": "ttrl.trainers.mrt:MRT"},
    "advantage": {
        "grpo": "ttrl.trainers.advantages:grpo",
        "dr_grpo": "ttrl.trainers.advantages:dr_grpo",
        "rloo": "ttrl.trainers.advantages:rloo",
        "reinforce_pp": "ttrl.trainers.reinforce_pp:ReinforcePP",
        "reinforce_pp_baseline": "ttrl.trainers.reinforce_pp:ReinforcePPBaseline",
    },
    "shaper": {
        "adv_clip": "ttrl.trainers.shapers.entropy_advantage:AdvantageClip",
        "answer_span": "ttrl.trainers.shapers.answer_span:AnswerSpan",
        "ear": "ttrl.trainers.shapers.entropy_advantage:EntropyAdvantage",
        "fork_tokens": "ttrl.trainers.shapers.fork_tokens:ForkTokens",
        "limiting_confidence": "ttrl.trainers.shapers.limiting_confidence:LimitingConfidence",
        "overlong": "ttrl.trainers.shapers.overlong:Overlong",
    },
    "loss": {
        "clip": "ttrl.trainers.losses.clip:ClipLoss",
        "cispo": "ttrl.trainers.losses.cispo:CISPOLoss",
        "gspo": "ttrl.trainers.losses.gspo:GSPOLoss",
        "tis": "ttrl.trainers.losses.tis:TISLoss",
        "topr": "ttrl.trainers.losses.topr:TOPRLoss",
    },
    "regularizer": {
        "entropy_band": "ttrl.trainers.losses.entropy_band:EntropyBand",
        "kl": "ttrl.trainers.losses.kl:KLAnchor",
    },
    "stabilizer": {
        "ema": "ttrl.trainers.stabilizers.ema:EMATeacher",
        "fisher": "ttrl.trainers.stabilizers.fisher:FisherAnchor",
        "grad_norm": "ttrl.trainers.stabilizers.spikes:GradNormFilter",
        "kl": "ttrl.trainers.losses.kl:KLAnchor",
        "reset": "ttrl.trainers.stabilizers.reset:FullReset",
        "restore": "ttrl.trainers.stabilizers.restore:StochasticRestore",
    },
    "guard": {"sentinel": "ttrl.guards.sentinel:Sentinel"},
    "parameters": {"full": "ttrl.trainers.parameters:Full", "lora": "ttrl.trainers.parameters:LoRA"},
    "backend": {"deepspeed": "ttrl.trainers.backends:deepspeed", "torch": "ttrl.trainers.backends:torch"},
}

# Built-ins that need a package beyond the dependencies: slot -> name -> (package, how to get it).
PACKAGES: dict[str, dict[str, tuple[str, str]]] = {
    "engine": {"vllm": ("vllm", "on a GPU: pip install 'ttrl[vllm]'; on a CPU: scripts/setup_vllm_cpu")},
}


def names(slot: str) -> dict[str, str]:
    """Every known plug-in of a slot: name -> where it lives. Built-ins win over entry points of the same name."""
    found = {point.name: point.value for point in entry_points(group=f"ttrl.{slot}s")}
    return {**found, **BUILT_IN[slot]}


def resolve(slot: str, use: str) -> Callable[..., Any]:
    """The class or function behind a name. Raises ConfigError with the nearest right name."""
    # Looking through the entry points of everything that is installed takes 30 ms
    target = BUILT_IN[slot].get(use) or names(slot).get(use, use)
    module_name, separator, attribute = target.rpartition(":")
    if not separator or not module_name:
        raise ConfigError(f"unknown {slot} {use!r}.{suggest(use, names(slot))}")
    try:
        module = _load_file(Path(module_name)) if module_name.endswith(".py") else importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # Only the module that was asked for is the user's mistake; a missing import inside it is shown as it is.
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise ConfigError(f"{slot} {use!r}: there is no module {module_name!r}") from None
        raise ConfigError(
            f"{slot} {use!r}: {module_name} needs the package {error.name!r}, which is not installed"
        ) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        public = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise ConfigError(
            f"{slot} {use!r}: {module_name} has no class or function {attribute!r}.{suggest(attribute, public)}"
        )
    return cast(Callable[..., Any], found)


def build(slot: str, plug: Plug, *arguments: Any) -> Any:
    """Resolve a plug-in, check its options and call it with the slot's arguments and the recipe's options."""
    factory, options = check(slot, plug)
    try:
        return factory(*arguments, **options)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{slot} {plug.use!r}: {error}") from error


def check(slot: str, plug: Plug) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The plug-in and its options after validation against the signature. Raises ConfigError naming every bad option."""
    factory = resolve(slot, plug.use)
    _check_package(slot, plug.use)
    parameters = [p for p in inspect.signature(factory).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    hints = _hints(factory)
    fields: dict[str, Any] = {
        p.name: (hints.get(p.name, Any), ... if p.default is inspect.Parameter.empty else p.default) for p in parameters
    }
    model = create_model(
        "Options",
        __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=()),
        **fields,
    )
    try:
        checked = model.model_validate(plug.options)
    except ValidationError as error:
        problems = []
        for item in error.errors(include_url=False):
            key = ".".join(str(part) for part in item["loc"])
            if item["type"] == "extra_forbidden":
                problems.append(f"unknown option {key!r}.{suggest(key, fields)}")
            elif item["type"] == "missing":
                problems.append(f"option {key!r} is required")
            else:
                problems.append(f"option {key!r}: {item['msg']}, got {item['input']!r}")
        raise ConfigError("\n".join(f"{slot} {plug.use!r}: {problem}" for problem in problems)) from None
    return factory, {name: getattr(checked, name) for name in checked.model_fields_set}


def _check_package(slot: str, use: str) -> None:
    package, remedy = PACKAGES.get(slot, {}).get(use, ("", ""))
    if package:
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:  # a mere folder of that name is a package without origin
            raise ConfigError(f"{slot} {use!r} needs the package {package!r}, which is not installed; {remedy}")


def _hints(factory: Callable[..., Any]) -> dict[str, Any]:
    target = factory.__init__ if inspect.isclass(factory) else factory
    try:
        return typing.get_type_hints(target)
    except NameError:
        # A plug-in may annotate framework types under TYPE_CHECKING; its options are then taken as they are.
        return {}


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(f"plug-in file {path}: no such file")
    try:
        return importlib.import_module(plugin_files.module_name(path))
    except BaseException as error:
        error.add_note(f"while loading the plug-in file {path}")
        raise
