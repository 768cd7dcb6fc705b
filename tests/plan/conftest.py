"""Hand-made facts to plan with."""

from pathlib import Path

import pytest

from ideoflow.model.base import NANO_TEXT, NANO_TRANSFORMER, NANO_VAE, BaseFacts
from ideoflow.model.spec import TextEncoderSpec, TransformerSpec, VaeSpec
from ideoflow.plan.document import Bucket, DataSummary
from ideoflow.recipe import parse_recipe

FULL = BaseFacts(
    "owner/full", None, False, TransformerSpec(), TextEncoderSpec(), VaeSpec(), "bf16", "b" * 64, True
)
NANO = BaseFacts(
    "nano", Path("/cache/nano"), True, NANO_TRANSFORMER, NANO_TEXT, NANO_VAE, "float32", "nano-1", True
)


def data_summary(pictures=48, size=1024, tokens=320):
    return DataSummary(
        pictures, 0, (Bucket(size, size, pictures),), (tokens, tokens, tokens), False, "d" * 64
    )


def recipe(extra="", base="owner/full"):
    """A recipe; ``extra`` is further TOML, with tables other than model and data."""
    return parse_recipe(f'[model]\nbase = "{base}"\n[data]\nimages = "pictures"\n{extra}', "portrait.toml")


@pytest.fixture
def full_base():
    return FULL


@pytest.fixture
def nano_base():
    return NANO
