"""The wheel works in an empty environment, outside the checkout, without torch."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# All that recipes, captions and plans need; torch and its family are left out on purpose.
LIGHT = ["huggingface_hub", "jinja2", "jsonschema", "lark", "pillow", "psutil", "rich", "tomli"]
OFFLINE = ("Temporary failure in name resolution", "Max retries exceeded", "Network is unreachable")

CAPTION = """A lone wooden sailboat on a glassy lake at sunset.
background: A wide, windless lake; the horizon at the lower third.
obj y380..660 x590..720: A wooden sailboat with a slack white sail.
"""
RECIPE = """[model]
base = "ideogram-ai/ideogram-4-fp8"
[data]
images = "pictures"
[train]
steps = 10
"""


def run(*argv: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return subprocess.run([str(a) for a in argv], cwd=cwd, env=clean, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    built = run(
        sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("ideoflow-*-py3-none-any.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """A folder with a virtual environment that holds the wheel and little else."""
    folder = tmp_path_factory.mktemp("elsewhere")
    venv.create(folder / "venv")
    into = ("--python", folder / "venv", "--disable-pip-version-check")  # pip of this environment
    pip = [sys.executable, "-m", "pip", *into, "install", "--quiet"]
    light = run(*pip, "-c", ROOT / "constraints.txt", *LIGHT, cwd=folder)
    if light.returncode and any(sign in light.stderr for sign in OFFLINE):
        pytest.skip("no package index can be reached")
    assert light.returncode == 0, light.stderr
    assert (done := run(*pip, "--no-deps", wheel, cwd=folder)).returncode == 0, done.stderr
    return folder


def ideoflow(environment: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return run(environment / "venv" / "bin" / "ideoflow", *argv, cwd=environment)


@pytest.mark.slow
def test_torch_is_absent_and_the_package_is_the_wheel(environment):
    python = environment / "venv" / "bin" / "python"
    assert run(python, "-c", "import torch", cwd=environment).returncode == 1
    where = run(python, "-c", "import ideoflow; print(ideoflow.__file__)", cwd=environment).stdout
    assert Path(where.strip()).is_relative_to(environment / "venv")


@pytest.mark.slow
def test_captions_are_checked(environment):
    good, bad = environment / "good.icap", environment / "bad.icap"
    good.write_text(CAPTION, encoding="utf-8")
    bad.write_text(CAPTION.replace("y380..660 x590..720", "[380, 590, 660, 720]"), encoding="utf-8")
    done = ideoflow(environment, "captions", "check", good.name)
    assert done.returncode == 0, done.stdout + done.stderr
    done = ideoflow(environment, "captions", "check", bad.name)
    assert done.returncode == 1
    assert "bad.icap:3:5" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_recipe_is_planned(environment):
    pictures = environment / "pictures"
    pictures.mkdir()
    shipped = next((environment / "venv").rglob("_data/recipes/quickstart/coffee.jpg"))
    (pictures / "sailboat.jpg").write_bytes(shipped.read_bytes())
    (pictures / "sailboat.icap").write_text(CAPTION, encoding="utf-8")
    (environment / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    done = ideoflow(environment, "plan", "--gpu", "rtx-4090", "recipe.toml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4090" in done.stdout


@pytest.mark.slow
def test_grammar_schemas_and_recipes_travel_along(environment):
    (data,) = (environment / "venv").rglob("ideoflow/_data")
    for folder in ("grammar", "schemas", "recipes"):
        shipped = {p.relative_to(ROOT / folder): p for p in (ROOT / folder).rglob("*") if p.is_file()}
        for relative, source in shipped.items():
            assert (data / folder / relative).read_bytes() == source.read_bytes()
