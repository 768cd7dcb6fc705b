"""The nano base, a plan for it and its parts, made once for all tests of the engine."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ideoflow.model.base import BaseFacts, locate_base
from ideoflow.model.hub import fetch_base
from ideoflow.plan import make_plan
from ideoflow.plan.document import Bucket, DataSummary, Hardware, Plan
from ideoflow.recipe import parse_recipe

sys.path.insert(0, str(Path(__file__).parent))  # for the helper of test_distributed.py

CPU = torch.device("cpu")
HARDWARE = Hardware("CPU", "cpu", 16 << 30, 12 << 30, fast_bf16=False)
DATA = DataSummary(1, 0, (Bucket(64, 64, 1),), (40, 40, 40), True, "none")


@pytest.fixture(scope="session")
def nano() -> BaseFacts:
    return fetch_base(locate_base("nano"))


@pytest.fixture(scope="session")
def plan_of(nano: BaseFacts) -> Any:
    """plan_of(**{"train.steps": 4, ...}) -> Plan on the CPU for the nano base."""

    def make(**settings: Any) -> Plan:
        tables: dict[str, dict[str, Any]] = {
            "model": {"base": "nano"},
            "data": {"images": ".", "resolution": 64},
        }
        for key, value in settings.items():
            table, _, name = key.rpartition(".")
            tables.setdefault(table, {})[name] = value
        text = "\n".join(
            f"[{table}]\n" + "\n".join(f"{k} = {_toml(v)}" for k, v in keys.items())
            for table, keys in tables.items()
        )
        return make_plan(parse_recipe(text, Path("test.toml")), nano, DATA, HARDWARE)

    return make


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)
