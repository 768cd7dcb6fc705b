"""A base of random numbers has the tensors of a loaded one in every precision, with the right variance."""

from dataclasses import asdict

import pytest
import torch

from ideoflow.model.base import NANO_TRANSFORMER
from ideoflow.model.load import load_transformer
from ideoflow.model.nano import ensure_nano
from ideoflow.model.random import random_transformer
from ideoflow.resources import user_cache

CONFIG = asdict(NANO_TRANSFORMER) | {"mrope_section": (6, 5, 5)}
CPU = torch.device("cpu")


def facts(model):
    return {name: (tuple(t.shape), t.dtype, t.device, t.requires_grad) for name, t in tensors(model)}


def tensors(model):
    return [*model.named_parameters(), *model.named_buffers()]


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp8", "int8", "nf4"])
def test_it_has_the_tensors_of_a_loaded_one(precision):
    folder = ensure_nano(user_cache() / "nano-1")
    loaded = load_transformer(folder, precision=precision, device=CPU)
    made = random_transformer(CONFIG, precision=precision, device=CPU)
    assert facts(made) == facts(loaded)
    assert [type(m) for m in made.modules()] == [type(m) for m in loaded.modules()]


def test_weights_have_variance_one_over_inputs_and_depend_on_the_seed_alone():
    models = [random_transformer(CONFIG, precision="float32", device=CPU, seed=s) for s in (0, 0, 1)]
    weights = [m.layers[2].feed_forward.w1.weight for m in models]
    assert weights[0].std().item() == pytest.approx(NANO_TRANSFORMER.hidden**-0.5, rel=0.02)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], models[0].layers[3].feed_forward.w1.weight)
