"""Rules of the tree: one import direction, light imports, no print, short files, a wheel that works on its own."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 350
HEAVY = (
    "torch",
    "transformers",
    "ray",
    "vllm",
    "deepspeed",
    "peft",
    "trl",
    "datasets",
    "matplotlib",
    "scipy",
    "sympy",
    "math_verify",
)

# Lower layers know nothing of higher ones; parts of one layer know nothing of each other.
PARTS = ("rewards", "rollout", "trainers")
ABOVE_PARTS = (
    "ttrl.evaluate", "ttrl.setup", "ttrl.loop", "ttrl.journal", "ttrl.run", "ttrl.report", "ttrl.cli", "ttrl.sinks", "ttrl.stepmetrics",
    "ttrl.plan", "ttrl.resume", "ttrl.compare",
)  # fmt: skip


def modules() -> dict[str, Path]:
    """Module name -> file, for everything under ttrl/ (symlinked folders under their ttrl names)."""
    files = {}
    for folder, _, names in os.walk(ROOT / "ttrl", followlinks=True):
        for name in names:
            if name.endswith(".py"):
                path = Path(folder) / name
                dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
                files[dotted] = path
    return files


def imports(path: Path) -> set[str]:
    """Every module a file imports anywhere, type-checking blocks included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def under(module: str, parents: tuple[str, ...] | str) -> bool:
    parents = (parents,) if isinstance(parents, str) else parents
    return any(module == parent or module.startswith(parent + ".") for parent in parents)


def test_the_walk_sees_the_symlinked_parts():
    found = modules()
    assert {"ttrl.rewards.vote", "ttrl.rollout.hf", "ttrl.trainers.grpo", "ttrl.loop"} <= found.keys()
    assert all((ROOT / "ttrl" / part).is_symlink() for part in PARTS)


def test_parts_do_not_import_each_other_or_anything_above_them():
    wrong = []
    for name, path in modules().items():
        part = next((p for p in PARTS if under(name, f"ttrl.{p}")), None)
        if part is None:
            continue
        others = tuple(f"ttrl.{p}" for p in PARTS if p != part)
        wrong += [f"{name} -> {target}" for target in imports(path) if under(target, others + ABOVE_PARTS)]
    assert wrong == []


def test_core_does_not_import_parts_or_anything_above_them():
    core = ("ttrl.types", "ttrl.config", "ttrl.registry", "ttrl.seeds", "ttrl.metrics", "ttrl.protocols", "ttrl.model",
            "ttrl.prompts", "ttrl.templates", "ttrl.errors", "ttrl.sources", "ttrl.gates", "ttrl.contract", "ttrl.rundir")  # fmt: skip
    above = tuple(f"ttrl.{p}" for p in PARTS) + ABOVE_PARTS
    wrong = [f"{n} -> {t}" for n, path in modules().items() if under(n, core) for t in imports(path) if under(t, above)]
    assert wrong == []


def test_only_the_command_line_imports_the_run_and_nothing_imports_the_command_line():
    for name, path in modules().items():
        used = imports(path)
        assert not any(under(target, "ttrl.cli") for target in used), name
        assert name == "ttrl.cli" or not any(under(target, "ttrl.run") for target in used), name


def test_labels_are_opened_by_the_evaluation_package_and_the_recipe_check_only():
    users = {name for name, path in modules().items() if any(under(t, "ttrl.evaluate.labels") for t in imports(path))}
    assert {name for name in users if not under(name, "ttrl.evaluate")} <= {"ttrl.setup"}
    for part in ("ttrl.rewards", "ttrl.rollout", "ttrl.trainers", "ttrl.loop"):
        for name, path in modules().items():
            if under(name, part):
                assert not any(under(target, "ttrl.evaluate") for target in imports(path)), name


def test_nobody_imports_the_top_level_names_of_the_parts():
    for path in [*modules().values(), *(ROOT / "tests").glob("*.py")]:
        assert not any(under(target, PARTS) for target in imports(path)), path


def test_no_file_is_too_long_to_read():
    long = {name: n for name, path in modules().items() if (n := len(path.read_text().splitlines())) > MAX_LINES}
    assert long == {}


def light(code: str) -> None:
    """Run code in a fresh interpreter and require that nothing heavy was imported."""
    check = f"import sys\n{code}\nheavy = [m for m in {HEAVY!r} if m in sys.modules]\nassert not heavy, heavy"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import ttrl",
        "import ttrl.cli",
        "from ttrl.config import load_recipe; load_recipe('quickstart')",
        "from ttrl.config import load_recipe; from ttrl.setup import check_recipe; check_recipe(load_recipe('quickstart'))",
        "import ttrl.rewards.majority, ttrl.rewards.vote, ttrl.rewards.equivalence, ttrl.rewards.extract",
        "from ttrl.registry import BUILT_IN as B, resolve\nfor s in B:\n    for n in B[s]: resolve(s, n)",
    ],
)
def test_importing_and_checking_stay_light(code):
    light(code)


def test_wheel_works_in_a_clean_environment(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    wheel = next((tmp_path / "dist").glob("ttrl-*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in ("ttrl/rewards/vote.py", "ttrl/recipes/quickstart.yaml", "ttrl/assets/tiny-adder/model.safetensors",
                   "ttrl/assets/tiny-eyes/model.safetensors", "ttrl/assets/tiny-eyes/pictures/train-000.png",
                   "ttrl/report/report.html.j2", "ttrl/py.typed"):  # fmt: skip
        assert wanted in names
    assert not any(name.split("/")[0] in PARTS for name in names)

    venv.create(tmp_path / "clean", with_pip=True)
    python = tmp_path / "clean" / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], check=True, capture_output=True
    )
    site = next((tmp_path / "clean" / "lib").glob("python*/site-packages"))
    # The dependencies come from the environment of the tests; the package itself must come from the wheel
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    code = (
        "import ttrl.rewards.vote, ttrl.rollout.flat, ttrl.trainers.grpo\n"
        "from ttrl.config import load_recipe\nfrom ttrl.setup import check_recipe\n"
        "check_recipe(load_recipe('quickstart'))\nprint(ttrl.rewards.vote.__file__)"
    )
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "rewards.py").write_text("raise RuntimeError('a file of the user shadows ours')")
    result = subprocess.run(
        [python, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path / "elsewhere"
    )
    assert str(site) in result.stdout


def test_links_of_the_docs_lead_somewhere():
    broken = []
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http") and not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert broken == []
