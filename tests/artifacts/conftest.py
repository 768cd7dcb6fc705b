"""Models with adapters of every kind, as training leaves them, on the nano base; finds its helper."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Ideogram4Transformer2DModel

from ideoflow.engine.adapt import add_adapter
from ideoflow.model.base import BaseFacts, locate_base
from ideoflow.model.hub import fetch_base
from ideoflow.plan import make_plan
from ideoflow.plan.document import Hardware, Plan
from ideoflow.recipe import parse_recipe

sys.path.insert(0, str(Path(__file__).parent))
HARDWARE = Hardware("CPU", "cpu", 16 << 30, 12 << 30, fast_bf16=False)


@pytest.fixture(scope="session")
def nano() -> BaseFacts:
    return fetch_base(locate_base("nano"))


@pytest.fixture(scope="session")
def base(nano: BaseFacts) -> Ideogram4Transformer2DModel:
    """The nano transformer without an adapter, whole (its text projection included)."""
    return Ideogram4Transformer2DModel.from_pretrained(nano.folder, subfolder="transformer")


@pytest.fixture(scope="session")
def plan_of(nano: BaseFacts) -> Callable[[str], Plan]:
    def make(adapter: str) -> Plan:
        text = f'[model]\nbase = "nano"\n[data]\nimages = "."\n[adapter]\n{adapter}\n'
        return make_plan(parse_recipe(text, Path("test.toml")), nano, None, HARDWARE)

    return make


@pytest.fixture
def adapted(nano: BaseFacts, plan_of: Any) -> Callable[..., Ideogram4Transformer2DModel]:
    """adapted('kind = "dora"') -> a model with that adapter, its numbers random."""

    def make(adapter: str, seed: int = 0) -> Ideogram4Transformer2DModel:
        model = Ideogram4Transformer2DModel.from_pretrained(nano.folder, subfolder="transformer")
        g = torch.Generator().manual_seed(seed)
        for name, p in add_adapter(model, plan_of(adapter)).items():
            if "magnitude" in name:
                p.data.mul_(0.7 + 0.6 * torch.rand(p.shape, generator=g))
            else:
                p.data.copy_(torch.randn(p.shape, generator=g) * (0.3 if "hada" not in name else 0.5))
        return model

    return make
