"""Small pictures, and recipes for folders of them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ideoflow.model.base import locate_base
from ideoflow.model.hub import fetch_base
from ideoflow.recipe import parse_recipe


@pytest.fixture(scope="session")
def nano_base():
    return fetch_base(locate_base("nano"))


@pytest.fixture(scope="session")
def picture():
    """picture(width, height, seed) -> a smooth RGB picture."""

    def make(width=96, height=64, seed=0):
        coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)

    return make


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "pictures").mkdir()
    return tmp_path / "pictures"


@pytest.fixture
def recipe(folder):
    """recipe("resolution = 64", "[train]...") -> a recipe for the folder of pictures, at resolution 64."""

    def make(data="", tables=""):
        resolution = "" if "resolution" in data else "resolution = 64\n"
        text = f'[model]\nbase = "nano"\n[data]\nimages = "pictures"\n{resolution}{data}\n{tables}'
        return parse_recipe(text, folder.parent / "r.toml")

    return make
