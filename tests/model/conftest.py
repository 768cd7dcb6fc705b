"""One nano base for all tests here, copies of it that may be damaged, and ``checkpoint_forms`` to import."""

import shutil
import sys
from pathlib import Path

import pytest

from ideoflow.model.base import locate_base
from ideoflow.model.hub import fetch_base

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def nano_folder() -> Path:
    folder = fetch_base(locate_base("nano")).folder
    assert folder is not None
    return folder


@pytest.fixture
def copy(nano_folder, tmp_path) -> Path:
    """A copy of the nano base to be damaged; big files are links until they are replaced."""
    return Path(shutil.copytree(nano_folder, tmp_path / "base", copy_function=_link))


def _link(source: str, target: str) -> None:
    # A link costs nothing, and a test that writes to a path replaces it.
    if source.endswith(".safetensors"):
        Path(target).symlink_to(source)
    else:
        shutil.copy(source, target)


@pytest.fixture(scope="session")
def pipeline(nano_folder):
    from diffusers import Ideogram4Pipeline

    pipe = Ideogram4Pipeline.from_pretrained(nano_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe
