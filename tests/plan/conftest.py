"""Hand-made facts to plan with."""

from pathlib import Path

import pytest

from ideoflow.model.base import NANO_TEXT, NANO_TRANSFORMER, NANO_VAE, BaseFacts
from ideoflow.model.spec import TextEncoderSpec, TransformerSpec, VaeSpec
from ideoflow.plan.document import Bucket, DataSummary, Hardware
from ideoflow.recipe import parse_recipe

FULL = BaseFacts(
    "owner/full", None, False, TransformerSpec(), TextEncoderSpec(), VaeSpec(), "bf16", "b" * 64, True
)
NANO = BaseFacts(
    "nano", Path("/cache/nano"), True, NANO_TRANSFORMER, NANO_TEXT, NANO_VAE, "float32", "nano-1", True
)


GIB = 1 << 30


@pytest.fixture
def full_base():
    """The released model, not downloaded."""
    return FULL


@pytest.fixture
def nano_base():
    return NANO


@pytest.fixture
def write_recipe():
    """A recipe from further TOML, with tables other than model and data."""

    def write(extra="", base="owner/full", resolution=1024):
        head = f'[model]\nbase = "{base}"\n[data]\nimages = "pictures"\nresolution = {resolution}\n'
        return parse_recipe(head + extra, "portrait.toml")

    return write


@pytest.fixture
def summarize():
    """Facts about a data set of pictures of one size."""

    def make(pictures=48, size=1024, tokens=320):
        bucket = Bucket(size, size, pictures)
        return DataSummary(pictures, 0, (bucket,), (tokens, tokens, tokens), False, "d" * 64)

    return make


@pytest.fixture
def processor():
    """A desktop without a GPU."""
    return Hardware("8-core x86_64 CPU", "cpu", 64 * GIB, 48 * GIB, fast_bf16=False)
