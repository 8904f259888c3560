"""Safe by default: what the sources never do, what a run never writes or follows. docs/security.md says against whom."""

from __future__ import annotations

import ast
import contextlib
import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from test_layout import modules

from ttrl import files
from ttrl.config import load_recipe
from ttrl.config.load import bundled
from ttrl.config.schema import ModelSection
from ttrl.errors import ConfigError
from ttrl.rewards.sandbox import Sandbox
from ttrl.rundir import CHECKPOINTS, METRICS, RECIPE, SUMMARY, WRITTEN, RunDir, check_unused
from ttrl.stamp import from_comments, plugin_files, stamp, to_comments

FORBIDDEN = {
    "torch.load", "torch.jit.load", "pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load", "numpy.load", "np.load", "eval",
    "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "marshal.loads", "shelve.open", "parse_expr", "sympy.parse_expr",
    "sympy.sympify", "sympify",
}  # fmt: skip
ALLOWED = {("ttrl.kit", "pickle.loads")}
"""The contract kit reads back what it pickled one call before."""


def called(node: ast.Call) -> str:
    parts, target = [], node.func
    while isinstance(target, ast.Attribute):
        parts.append(target.attr)
        target = target.value
    return ".".join(reversed([*parts, target.id])) if isinstance(target, ast.Name) else ""


def test_no_source_unpickles_evaluates_or_trusts_remote_code() -> None:
    found, loaders = [], 0
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            what = called(node)
            if what in FORBIDDEN and (name, what) not in ALLOWED:
                found.append(f"{name}:{node.lineno} {what}")
            options = {keyword.arg: keyword.value for keyword in node.keywords}
            if isinstance(options.get("shell"), ast.Constant) and options["shell"].value:
                found.append(f"{name}:{node.lineno} shell")
            if what.startswith("Auto") and what.endswith(".from_pretrained"):
                loaders += 1
                if (
                    not isinstance(options.get("trust_remote_code"), ast.Constant)
                    or options["trust_remote_code"].value is not False
                ):
                    found.append(f"{name}:{node.lineno} trust_remote_code is not False")
    assert found == []
    assert loaders >= 2


EVIL = "from pathlib import Path\nPath({marker!r}).touch()\nraise RuntimeError('remote code ran')\n"


@pytest.mark.parametrize("kind", ["model", "tokenizer"])
def test_code_that_comes_with_a_model_does_not_run(tmp_path: Path, kind: str) -> None:
    from ttrl.model.load import load_model, load_tokenizer

    folder, marker = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(bundled("bundled:tiny-adder") or "", folder)
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
    file, key, value = {
        "model": ("config.json", "AutoModelForCausalLM", "evil.Model"),
        "tokenizer": ("tokenizer_config.json", "AutoTokenizer", ["evil.Tokenizer", "evil.Tokenizer"]),
    }[kind]
    config = json.loads((folder / file).read_text())
    config["auto_map"] = {key: value}
    if kind == "model":
        config["model_type"] = "never-seen"
        config["auto_map"]["AutoConfig"] = "evil.Config"
        (folder / file).write_text(json.dumps(config))
        with pytest.raises(ConfigError, match="cannot load a causal LM"):
            load_model(ModelSection(path=str(folder), device="cpu"))
    else:
        config["tokenizer_class"] = "NeverSeenTokenizer"
        (folder / file).write_text(json.dumps(config))
        with contextlib.suppress(ConfigError):  # or transformers falls back to its own class
            load_tokenizer(str(folder))
    assert not marker.exists()


def test_weights_that_are_pickles_are_not_loaded(tmp_path: Path) -> None:
    from ttrl.model.load import load_model

    folder = tmp_path / "model"
    shutil.copytree(bundled("bundled:tiny-adder") or "", folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="cannot load a causal LM from safetensors"):
        load_model(ModelSection(path=str(folder), device="cpu"))


@pytest.mark.parametrize("name", [*WRITTEN, ".lock", "tensorboard"])
@pytest.mark.parametrize("dangling", [True, False])
def test_a_planted_link_is_not_followed_by_a_new_run(tmp_path: Path, name: str, dangling: bool) -> None:
    target = tmp_path / "elsewhere"
    if not dangling:
        target.mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(target)
    with pytest.raises(ConfigError, match=f"{name} is a symbolic link"):
        RunDir.create(tmp_path / "run")
    assert target.exists() is not dangling


def test_nor_by_a_resume_and_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    run = RunDir.create(tmp_path / "run")
    run.write(RECIPE, "name: x")
    assert RunDir.existing(tmp_path / "run").path == run.path
    (tmp_path / "run" / SUMMARY).symlink_to(tmp_path / "victim")
    with pytest.raises(ConfigError, match=f"{SUMMARY} is a symbolic link"):
        RunDir.existing(tmp_path / "run")


@pytest.mark.parametrize("late", ["append", "write", "lock"])
def test_nor_is_a_link_that_appears_while_the_run_goes_on(tmp_path: Path, late: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    run = RunDir.create(tmp_path / "run")
    (run.path / {"append": METRICS, "write": RECIPE + ".part", "lock": ".lock"}[late]).symlink_to(victim)
    if late == "append":
        with pytest.raises(OSError, match="symbolic links"):
            run.append(METRICS, {"step": 0})
    elif late == "write":
        run.write(RECIPE, "new")
        assert (run.path / RECIPE).read_text() == "new"
        assert not (run.path / RECIPE).is_symlink()
    else:
        with pytest.raises(OSError, match="symbolic links"), run.locked():
            pass
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("name", ["../x", "a/b", "/x", ".x", "", "a b", "a\n"])
def test_the_name_of_a_recipe_leads_nowhere_else(name: str) -> None:
    with pytest.raises(ConfigError, match="name"):
        load_recipe("quickstart", [f"name={json.dumps(name)}"])


def test_a_folder_that_a_kill_left_empty_can_be_taken(tmp_path: Path) -> None:
    RunDir.create(tmp_path / "run")
    check_unused(tmp_path / "run")
    (tmp_path / "run" / CHECKPOINTS / "step-000001").mkdir()
    with pytest.raises(ConfigError, match="already holds a run"):
        check_unused(tmp_path / "run")


def test_a_full_disk_leaves_the_old_file_and_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    files.write_file(file, "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_file(file, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert file.read_text() == "old"


def test_every_plugin_file_of_a_recipe_is_listed_with_its_hash(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for name in ("reward.py", "loss.py", "other/loss.py"):
        (tmp_path / name).write_text(f"# {name}")
    template = tmp_path / "t.txt"
    template.write_text("{prompt}")
    file = tmp_path / "r.yaml"
    file.write_text(
        "name: x\nsteps: 1\nmodel: {path: m}\ndata: {prompts: p.jsonl, template: t.txt}\nreward: ./reward.py:R\n"
        "objective: {use: grpo, with: {loss: ./loss.py:L}}\ngates: [./other/loss.py:G]\ndescription: like gone.py:X\n"
    )
    recipe = load_recipe(file)
    assert [path.relative_to(tmp_path).as_posix() for path in plugin_files(recipe)] == [
        "loss.py",
        "other/loss.py",
        "reward.py",
    ]
    found = from_comments(to_comments(stamp(recipe, [])))
    assert {key for key in found if key.startswith("plug-in ")} == {
        "plug-in reward.py", f"plug-in {tmp_path}/loss.py", f"plug-in {tmp_path}/other/loss.py"
    }  # fmt: skip
    before = found["template"]
    template.write_text("Q: {prompt}")
    assert stamp(recipe, [])["template"] != before


def test_grading_servers_inherit_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "MY_PASSWORD"):
        monkeypatch.setenv(name, "secret")
    box = Sandbox(servers=1)
    try:
        box.run([("math", "1+1")])
        [server] = box._slots
        assert server is not None
        held = Path(f"/proc/{server.process.pid}/environ").read_bytes()
    finally:
        box.close()
    assert b"PATH=" in held
    assert b"secret" not in held
