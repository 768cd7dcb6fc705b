"""What runs on the nano base begin with: the head of their recipes, and folders of shipped photographs."""

import shutil
from pathlib import Path

from ideoflow.resources import recipes

HEAD = """
[model]
base = "nano"
[data]
images = "pictures"
resolution = 64
"""


def three_photographs(folder: Path) -> None:
    """Photographs of different shapes with their captions, in ``pictures``, and the styles these name."""
    (folder / "pictures").mkdir()
    for name in ("cat", "coffee", "rocket"):
        for suffix in (".jpg", ".icap"):
            shutil.copy(recipes() / "quickstart" / f"{name}{suffix}", folder / "pictures")
    shutil.copytree(recipes() / "styles", folder / "styles")


def one_photograph(folder: Path) -> None:
    """A photograph with a caption of one sentence, in ``pictures``."""
    (folder / "pictures").mkdir()
    shutil.copy(recipes() / "quickstart" / "coffee.jpg", folder / "pictures")
    (folder / "pictures" / "coffee.icap").write_text("A photograph of a cup of coffee.\n")
