"""The rules of the house: who imports whom, style, types, file sizes, and what must stay free of torch."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from ideoflow.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PYTHON_FOLDERS = ("ideoflow", "tests", "benchmarks")
TEXT = {".py", ".md", ".toml", ".icap", ".lark", ".json", ".yaml", ".txt", ""}
HEAVY = {"torch", "diffusers", "transformers", "peft", "accelerate", "torchao", "bitsandbytes"}


def sources(*folders: str) -> list[Path]:
    return [p for folder in folders for p in sorted((ROOT / folder).rglob("*.py"))]


def tool(*argv: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs a developer tool of this environment (``python -m``, or a script beside the interpreter)."""
    command = [sys.executable, "-m", *argv]
    if argv[0] == "lint-imports":
        command = [str(Path(sys.executable).parent / argv[0]), *argv[1:]]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def loaded_after(code: str) -> set[str]:
    """The top-level modules that are loaded in a fresh interpreter once ``code`` has run."""
    report = "import sys; print(' '.join({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


# Imports --------------------------------------------------------------------------------------------------


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    return tool("lint-imports", "--no-cache", "--no-logo", cwd=folder)


def test_import_contracts_hold():
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("module", "statement", "contract"),
    [
        ("recipe/load.py", "import torch", "never reach torch"),
        ("recipe/load.py", "import ideoflow.captions", "one way through the house"),
        ("recipe/load.py", "import ideoflow.model.base", "architecture table and nothing else"),
        ("diagnostics/types.py", "import ideoflow.recipe", "one way through the house"),
        ("model/spec.py", "def f():\n    from diffusers import models", "What planning needs"),
        ("cli/__init__.py", "import lark", "command line imports"),
    ],
)
def test_a_forbidden_import_breaks_its_contract(module, statement, contract, tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "ideoflow", tmp_path / "ideoflow", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "ideoflow" / module).open("a", encoding="utf-8") as file:
        file.write(f"\n{statement}\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1
    assert re.search(f"{contract}.* BROKEN", done.stdout)


@pytest.mark.parametrize(
    "module",
    [
        "ideoflow",
        "ideoflow.recipe",
        "ideoflow.captions",
        "ideoflow.plan",
        "ideoflow.model.spec",
        "ideoflow.kernels",
    ],
)
def test_torch_is_not_loaded_by(module):
    assert not loaded_after(f"import {module}") & HEAVY


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_loads_little(command):
    argv = ["--help"] if command is None else [command, "--help"]
    loaded = loaded_after(f"from ideoflow.cli import main\ntry: main({argv})\nexcept SystemExit: pass")
    assert not loaded & HEAVY
    if command is None:
        assert not loaded & {"rich", "lark", "numpy", "PIL", "jsonschema", "asyncio"}


# Style and types ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [("ruff", "check", "--no-cache"), ("ruff", "format", "--check", "--no-cache"), ("mypy",)],
    ids=" ".join,
)
def test_is_clean(argv):
    done = tool(*argv)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("folder", PYTHON_FOLDERS)
def test_no_file_is_over_500_lines(folder):
    lengths = {p.relative_to(ROOT): len(p.read_text(encoding="utf-8").splitlines()) for p in sources(folder)}
    assert {p: n for p, n in lengths.items() if n > 500} == {}


def test_nothing_is_left_unfinished():
    # In brackets, so that this file does not hold what it looks for.
    pattern = re.compile(r"\b(TO[D]O|FIX[M]E|XX[X]|NotImplemented[E]rror|assert[ ]True|pragma: no[ ]cover)\b")
    found = [
        f"{p.relative_to(ROOT)}:{n}: {line.strip()}"
        for p in sources(*PYTHON_FOLDERS)
        for n, line in enumerate(p.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []


def test_no_path_of_one_machine():
    pattern = re.compile(r"(?<![\w.~$}])/(?:work|root|tmp|home/(?!me/))/?\w")
    folders = ("ideoflow", "benchmarks", "docs", "grammar", "recipes", "schemas", ".ci")
    files = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.is_file()]
    files += [p for p in ROOT.iterdir() if p.is_file()]
    found = [
        p.relative_to(ROOT)
        for p in files
        if p.suffix in TEXT and "__pycache__" not in p.parts and p.name not in (".coverage", ".git")
        if pattern.search(p.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_no_pickle_is_loaded():
    pattern = re.compile(r"^[^#\n]*\b(pickle\.loads?|torch\.load)\(", re.MULTILINE)
    assert [p for p in sources("ideoflow") if pattern.search(p.read_text(encoding="utf-8"))] == []


# Packaging ------------------------------------------------------------------------------------------------


def requirements(*extras: str) -> list[Requirement]:
    project = PROJECT["project"]
    lines = project["dependencies"] + [r for e in extras for r in project["optional-dependencies"][e]]
    return [Requirement(line) for line in lines]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


# Torch's CUDA builds pin the triton that they were made for; a version of ours would contradict them.
@pytest.mark.parametrize(
    "requirement", [r for r in requirements("dev") if r.name != "triton"], ids=lambda r: r.name
)
def test_every_dependency_has_a_tested_version(requirement):
    pin = pins()[requirement.name]
    assert requirement.specifier.contains(pin), f"constraints.txt pins {pin}"


def test_constraints_name_direct_dependencies_only():
    assert set(pins()) <= {r.name for r in requirements(*PROJECT["project"]["optional-dependencies"])}
    assert next(iter(pins())) == "torch"


def test_the_readme_and_ci_run_the_same_commands():
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    quickstart, tests = (line for line in readme if line.startswith("python3 -m venv .venv && "))
    assert quickstart.endswith(" && .venv/bin/ideoflow run recipes/quickstart.toml")
    assert tests in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
