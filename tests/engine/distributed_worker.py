"""What torchrun starts in test_distributed.py: the command line, with a trouble at some step of one process.

    python distributed_worker.py none|kill RECIPE...    # recipes one after the other, in the same processes

A recipe called fused*.toml is run by the fused engine, which the planner itself only chooses for GPUs, and
makes its samples with proxy guidance, for which the trained transformer runs without text. What each process
held and launched in a run, ran-RANK.json says.
"""

import gc
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

import ideoflow.engine.exchange
import ideoflow.engine.session
import ideoflow.workflow
from ideoflow.cli import main, show
from ideoflow.diagnostics import fail
from ideoflow.diagnostics.codes.data import CACHE_LOST
from ideoflow.engine.batches import Batches, Step
from ideoflow.engine.exchange import GradientExchange
from ideoflow.engine.meter import _bytes, _tensors
from ideoflow.engine.offload import Shards
from ideoflow.engine.processes import joined
from ideoflow.plan.document import Decision, Plan
from ideoflow.processes import this_process

FUSED = {"engine": "fused", "matmul": "bf16", "attention": "sdpa", "activation_budget": 1.0,
         "unconditional": "proxy"}  # fmt: skip
plain_plan, plain_of = ideoflow.workflow.make_plan, Batches.of
plain_build, plain_fetch, plain_send = (
    ideoflow.engine.session.build, Shards.fetch, GradientExchange._send
)  # fmt: skip
launched: list[str] = []
held: dict[str, Any] = {}


def planned(recipe: Any, *args: Any, **options: Any) -> Plan:
    plan = plain_plan(recipe, *args, **options)
    if not recipe.path.stem.startswith("fused"):
        return plan
    kept = tuple(d for d in plan.decisions if d.id not in FUSED)
    made = tuple(Decision(id, value, "recipe", "test", "") for id, value in FUSED.items())
    return ideoflow.workflow.replace(plan, decisions=(*kept, *made))


def troubled(batches: Batches, step: int) -> Step:
    if TROUBLE == "kill" and batches.rank == 1:
        if step == 3 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        if step == 5:
            fail(CACHE_LOST, "the second process finds an entry damaged", cure="run again")
    return plain_of(batches, step)


def build(plan: Plan, processes: Any) -> Any:
    """A run's model, and the bytes of its weights that this process has before anything is fetched."""
    model = plain_build(plan, processes)
    frozen = [t for t in _tensors(model.transformer) if not t.requires_grad]
    pieces = [piece.nbytes for piece in model.shards]
    held.update(pieces=pieces, rest=_bytes(frozen, torch.device("cpu")))
    return model


def fetch(shards: Shards, block: int, slot: torch.Tensor) -> None:
    launched.append(f"block {block}")
    plain_fetch(shards, block, slot)


def send(exchange: GradientExchange) -> None:
    launched.append(f"bucket {len(exchange._works)}")
    plain_send(exchange)


def run_all(recipes: list[str]) -> int:
    ran = {}
    for recipe in recipes:
        launched.clear()
        if code := main(["run", recipe]):
            return code
        ran[Path(recipe).stem] = {"order": launched.copy(), **held}
        Path(f"ran-{this_process().rank}.json").write_text(json.dumps(ran))
    return 0


if __name__ == "__main__":
    TROUBLE, *recipes = sys.argv[1:]
    torch.set_num_threads(1)
    gc.freeze()  # as conftest.py has it
    ideoflow.workflow.make_plan, Batches.of = planned, troubled  # type: ignore[method-assign,assignment]
    ideoflow.engine.session.build = build
    Shards.fetch, GradientExchange._send = fetch, send  # type: ignore[method-assign]
    ideoflow.engine.exchange.BUCKET_BYTES = 1 << 15  # a dozen buckets of this small adapter
    if len(recipes) == 1:
        sys.exit(run_all(recipes))
    with joined(show):
        code = run_all(recipes)
    sys.exit(code)
