from __future__ import annotations

import os
import pickle
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from ttrl import registry
from ttrl.config import Plug
from ttrl.errors import ConfigError
from ttrl.gates import VoteShare
from ttrl.registry import BUILT_IN, build, check, names, resolve
from ttrl.rewards.majority import MajorityVote

PLUGIN = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from nowhere import Missing

class Reward:
    def __init__(self, *, scale: float = 1.0, required: int, mode: "Missing" = None) -> None:
        self.scale, self.required, self.mode = scale, required, mode

def gate(first, *, low: int = 1):
    if low < 0:
        raise ValueError("low must not be negative")
    return (first, low)

_hidden = 5
number = 5
"""


def plug(use: str, **options: Any) -> Plug:
    return Plug.model_validate({"use": use, "with": options})


def plugin_file(folder: Path, text: str = PLUGIN, name: str = "plug.py") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_every_built_in_reward_gate_and_source_resolves() -> None:
    for slot in ("reward", "gate", "source", "sampler", "engine"):
        for name in BUILT_IN[slot]:
            assert callable(resolve(slot, name))
    assert resolve("reward", "majority_vote") is MajorityVote


def test_naming_a_plugin_of_any_slot_does_not_import_torch() -> None:
    code = (
        "import sys; from ttrl.registry import *; from ttrl.registry import BUILT_IN\n"
        "for slot in ('reward', 'gate', 'source', 'sampler', 'engine', 'parameters', 'backend'):\n"
        "    [resolve(slot, name) for name in BUILT_IN[slot]]\n"
        "print([m for m in ('torch', 'ray', 'vllm', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_a_module_path_names_any_class() -> None:
    assert resolve("gate", "ttrl.gates:VoteShare") is VoteShare


def test_built_ins_win_over_entry_points_and_entry_points_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(group: str) -> list[EntryPoint]:
        assert group == "ttrl.gates"
        return [
            EntryPoint("answered", "evil.module:Gate", group),
            EntryPoint("mine", "ttrl.gates:ZeroVariance", group),
        ]

    monkeypatch.setattr(registry, "entry_points", installed)
    assert names("gate")["answered"] == "ttrl.gates:Answered"
    assert resolve("gate", "mine").__name__ == "ZeroVariance"


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ("vote_shar", r"unknown gate 'vote_shar'\. Did you mean 'vote_share'\?"),
        ("zzz", r"unknown gate 'zzz'\. Known: answered, reliable, vote_share, zero_variance"),
        (":VoteShare", "unknown gate"),
        ("no_such_module:X", "there is no module 'no_such_module'"),
        ("ttrl.nope:X", r"there is no module 'ttrl\.nope'"),
        ("ttrl.gates:VoteShar", r"ttrl\.gates has no class or function 'VoteShar'\. Did you mean 'VoteShare'\?"),
        ("ttrl.gates:NO_ANSWER", "has no class or function 'NO_ANSWER'"),
        ("./missing.py:X", r"plug-in file missing\.py: no such file"),
    ],
)
def test_wrong_names_are_errors_with_the_nearest_right_one(use: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve("gate", use)


def test_a_file_plugin_is_loaded_once_and_files_of_one_name_do_not_meet(tmp_path: Path) -> None:
    first, second = (
        plugin_file(tmp_path / "a"),
        plugin_file(tmp_path / "b", PLUGIN.replace("low: int = 1", "low: int = 2")),
    )
    assert resolve("gate", f"{first}:gate") is resolve("gate", f"{first}:gate")
    assert build("gate", plug(f"{first}:gate"), "x") == ("x", 1)
    assert build("gate", plug(f"{second}:gate"), "x") == ("x", 2)


def test_an_instance_of_a_file_plugin_travels_to_any_process(tmp_path: Path) -> None:
    """By plain pickle, to an interpreter that knows nothing but where ttrl is, from a folder elsewhere."""
    file = plugin_file(tmp_path / "my plug-ins.d", name="my.reward v2.py")
    sent = pickle.dumps(build("reward", plug(f"{file}:Reward", required=3)))
    code = "import pickle, sys; made = pickle.load(sys.stdin.buffer); print(type(made).__name__, made.required)"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(Path(registry.__file__).parent.parent)}
    done = subprocess.run(run, input=sent, capture_output=True, cwd=elsewhere, env=environment, timeout=60, check=True)
    assert done.stdout.decode().split() == ["Reward", "3"]
    Path(file).unlink()
    gone = subprocess.run(run, input=sent, capture_output=True, cwd=elsewhere, env=environment, timeout=60)
    assert gone.returncode != 0
    assert f"plug-in file {file}: no such file; workers read it at the same absolute path" in gone.stderr.decode()


def test_a_plugin_that_breaks_while_loading_shows_its_own_error_every_time(tmp_path: Path) -> None:
    file = plugin_file(tmp_path, "raise RuntimeError('my own bug')")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="my own bug"):
            resolve("gate", f"{file}:X")


def test_a_missing_package_of_a_plugin_is_named(tmp_path: Path) -> None:
    file = plugin_file(tmp_path, "import a_package_nobody_has")
    with pytest.raises(ConfigError, match="needs the package 'a_package_nobody_has', which is not installed"):
        resolve("gate", f"{file}:X")


def test_options_are_checked_against_the_signature_all_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        check("gate", plug("vote_share", lo=0.1, high="much"))
    assert sorted(str(raised.value).split("\n")) == [
        "gate 'vote_share': option 'high': Input should be a valid number, "
        "unable to parse string as a number, got 'much'",
        "gate 'vote_share': unknown option 'lo'. Did you mean 'low'?",
    ]


def test_literals_of_a_built_in_are_checked() -> None:
    with pytest.raises(
        ConfigError, match="option 'ties': Input should be 'abstain', 'random' or 'shortest', got 'first'"
    ):
        check("reward", plug("majority_vote", ties="first"))


def test_required_options_are_named_and_unknown_annotations_accepted(tmp_path: Path) -> None:
    file = plugin_file(tmp_path)
    with pytest.raises(ConfigError, match="option 'required' is required"):
        check("reward", plug(f"{file}:Reward"))
    built = build("reward", plug(f"{file}:Reward", required=3, mode="m"))
    assert (built.scale, built.required, built.mode) == (1.0, 3, "m")


def test_only_options_that_were_given_are_passed() -> None:
    assert check("gate", plug("vote_share", low=0.5))[1] == {"low": 0.5}
    assert check("gate", plug("vote_share"))[1] == {}


def test_an_error_of_the_plugin_about_its_options_becomes_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gate 'vote_share': vote_share needs 0 <= low <= high <= 1"):
        build("gate", plug("vote_share", low=0.9, high=0.1))
    file = plugin_file(tmp_path)
    with pytest.raises(ConfigError, match="low must not be negative"):
        build("gate", plug(f"{file}:gate", low=-1), "x")
