"""Hand-made facts to plan with."""

import dataclasses
from pathlib import Path

import pytest

from ideoflow.model.base import NANO_TEXT, NANO_TRANSFORMER, NANO_VAE, BaseFacts
from ideoflow.model.spec import TextEncoderSpec, TransformerSpec, VaeSpec
from ideoflow.plan import make_plan, named_hardware
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


@pytest.fixture
def plan_for(full_base, nano_base, processor, write_recipe, summarize):
    def make(base, machine, extra="", resolution=1024, **options):
        facts = nano_base if base == "nano" else full_base
        if base in ("fp8", "nf4"):
            facts = dataclasses.replace(full_base, name=f"owner/{base}", storage=base)
        machine, *details = machine.split(", ")
        hardware = processor if machine == "cpu" else named_hardware(machine)
        for detail in details:
            word, value = detail.split(" ", 1)
            if word == "no":
                changed = {"packages": tuple(p for p in hardware.packages if p != value)}
            else:
                key = {"free": "free_bytes", "host": "host_free_bytes"}[word]
                changed = {key: int(float(value) * GIB)}
            hardware = dataclasses.replace(hardware, **changed)
        recipe = write_recipe(extra, facts.name, resolution)
        return make_plan(recipe, facts, summarize(size=resolution), hardware, **options)

    return make
