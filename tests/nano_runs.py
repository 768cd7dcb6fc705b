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
    """Photographs of different shapes with their captions, in ``pictures``, and the styles these name.

    Only the rocket's caption keeps its objects: what a step of the nano base takes is mostly text tokens.
    """
    (folder / "pictures").mkdir()
    for name in ("cat", "coffee", "rocket"):
        shutil.copy(recipes() / "quickstart" / f"{name}.jpg", folder / "pictures")
        caption = (recipes() / "quickstart" / f"{name}.icap").read_text(encoding="utf-8")
        kept = caption if name == "rocket" else caption.partition("\nobj ")[0] + "\n"
        (folder / "pictures" / f"{name}.icap").write_text(kept, encoding="utf-8")
    shutil.copytree(recipes() / "styles", folder / "styles")


def one_photograph(folder: Path) -> None:
    """A photograph with a caption of one sentence, in ``pictures``."""
    (folder / "pictures").mkdir()
    shutil.copy(recipes() / "quickstart" / "coffee.jpg", folder / "pictures")
    (folder / "pictures" / "coffee.icap").write_text("A photograph of a cup of coffee.\n")
