"""What torchrun starts in test_distributed.py: the command line, with a trouble at some step of one process.

    python distributed_worker.py none|kill RECIPE...    # recipes one after the other, in the same processes

A recipe called fused.toml is run by the fused engine, which the planner itself only chooses for GPUs.
"""

import os
import signal
import sys
from typing import Any

import torch

import ideoflow.engine.exchange
import ideoflow.workflow
from ideoflow.cli import main, show
from ideoflow.diagnostics import fail
from ideoflow.diagnostics.codes.data import CACHE_LOST
from ideoflow.engine.batches import Batches, Step
from ideoflow.engine.processes import joined
from ideoflow.plan.document import Decision, Plan

FUSED = {"engine": "fused", "matmul": "bf16", "attention": "sdpa", "activation_budget": 1.0}
plain_plan, plain_of = ideoflow.workflow.make_plan, Batches.of


def planned(recipe: Any, *args: Any, **options: Any) -> Plan:
    plan = plain_plan(recipe, *args, **options)
    if recipe.path.stem != "fused":
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


def run_all(recipes: list[str]) -> int:
    for recipe in recipes:
        if code := main(["run", recipe]):
            return code
    return 0


if __name__ == "__main__":
    TROUBLE, *recipes = sys.argv[1:]
    torch.set_num_threads(1)
    ideoflow.workflow.make_plan, Batches.of = planned, troubled  # type: ignore[method-assign,assignment]
    ideoflow.engine.exchange.BUCKET_BYTES = 1 << 15  # a dozen buckets of this small adapter
    if len(recipes) == 1:
        sys.exit(run_all(recipes))
    with joined(show):
        code = run_all(recipes)
    sys.exit(code)
