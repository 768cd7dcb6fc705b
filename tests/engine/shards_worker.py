"""What torchrun starts in test_shards.py: runs one after the other, and what each process held and launched.

    python shards_worker.py RECIPE...     # engine-precision-offload.toml; writes shards.json

The fused engine makes its samples with proxy guidance, for which the trained transformer runs without text.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from distributed_worker import FUSED, plain_plan

import ideoflow.engine.exchange
import ideoflow.engine.session
import ideoflow.workflow
from ideoflow.cli import main, show
from ideoflow.engine.exchange import GradientExchange
from ideoflow.engine.meter import _bytes, _tensors
from ideoflow.engine.offload import Shards
from ideoflow.engine.processes import joined
from ideoflow.plan.document import Decision, Plan

plain_build, plain_fetch, plain_send = (
    ideoflow.engine.session.build, Shards.fetch, GradientExchange._send
)  # fmt: skip
launched: list[str] = []
held: dict[str, Any] = {}


def planned(recipe: Any, *args: Any, **options: Any) -> Plan:
    plan = plain_plan(recipe, *args, **options)
    changed = {"unconditional": "proxy", **FUSED} if recipe.path.stem.startswith("fused") else {}
    kept = tuple(d for d in plan.decisions if d.id not in changed)
    made = tuple(Decision(id, value, "recipe", "test", "") for id, value in changed.items())
    return ideoflow.workflow.replace(plan, decisions=(*kept, *made))


def build(plan: Plan, processes: Any) -> Any:
    """A run's model, and the bytes of its weights that this process has before anything is fetched."""
    model = plain_build(plan, processes)
    frozen = [t for t in _tensors(model.transformer) if not t.requires_grad]
    pieces = [piece.nbytes for piece in model.shards]
    held[plan.name] = {"pieces": pieces, "rest": _bytes(frozen, torch.device("cpu"))}
    return model


def fetch(shards: Shards, block: int, slot: torch.Tensor) -> None:
    launched.append(f"block {block}")
    plain_fetch(shards, block, slot)


def send(exchange: GradientExchange) -> None:
    launched.append(f"bucket {len(exchange._works)}")
    plain_send(exchange)


if __name__ == "__main__":
    torch.set_num_threads(1)
    ideoflow.workflow.make_plan, ideoflow.engine.session.build = planned, build  # type: ignore[assignment]
    Shards.fetch, GradientExchange._send = fetch, send  # type: ignore[method-assign]
    ideoflow.engine.exchange.BUCKET_BYTES = 1 << 15  # a dozen buckets of this small adapter
    with joined(show) as processes:
        orders = {}
        for recipe in sys.argv[1:]:
            launched.clear()
            if code := main(["run", "--quiet", recipe]):
                sys.exit(code)
            orders[Path(recipe).stem] = launched.copy()
        everything = processes.gather((held, orders))
        if processes.first:
            Path("shards.json").write_text(json.dumps(everything))
