"""Does training with FP8 products learn what training in bf16 learns? Both from the same start, on nano.

    python benchmarks/fp8_training.py --json out.json                 # 300 steps, three seeds
    python benchmarks/fp8_training.py --steps 20 --seeds 0 --draws 2  # a try

The quickstart's photographs and captions go through the real caches; the fused engine trains a LoRA on the
CPU, where `torch._scaled_mm` and e4m3 compute as on a GPU, only slowly. Three ways of the same run: base and
products in bf16; base stored in FP8 with products in bf16; base and products in FP8. Seeds, order, noise
levels, noise and the adapter's start are the same.

The validation loss is the mean squared error of the velocity over all pictures, each at `--draws` noise
levels spread evenly over the training density, with fixed noise. Each adapter is measured twice: with its own
products, and with the bf16 ones, so that what training learnt is told from what the products round. As a
scale for the differences, the adapters of different seeds in bf16 are compared the same way.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import environment, write_json

from ideoflow.artifacts import Checkpoints
from ideoflow.data.order import Draw
from ideoflow.engine.caches import fill_caches, make_encoder
from ideoflow.engine.loop import Stop, Trainer, run_identity
from ideoflow.engine.meter import Meter
from ideoflow.engine.setup import Trainable, build
from ideoflow.engine.step import TrainingSample
from ideoflow.engine.step import prepare as add_noise
from ideoflow.plan.document import Decision, Plan
from ideoflow.resources import recipes
from ideoflow.workflow import prepare

WAYS = {
    "bf16": {"precision": "bf16", "matmul": "bf16"},
    "fp8 base, bf16 products": {"precision": "fp8", "matmul": "bf16"},
    "fp8": {"precision": "fp8", "matmul": "fp8"},
}
RECIPE = """
[model]
base = "nano"
[data]
images = "{images}"
resolution = {resolution}
[adapter]
rank = 16
[train]
steps = {steps}
learning_rate = {rate}
warmup = {warmup}
decay = "cosine"
checkpoint_every = {steps}
seed = {seed}
[memory]
device = "cpu"
"""


def decided(plan: Plan, **values: Any) -> Plan:
    """The plan with other decisions: by itself it takes the fused engine for GPUs only."""
    wanted = {"engine": "fused", "attention": "sdpa", "activation_budget": 1.0, **values}
    kept = [d for d in plan.decisions if d.id not in wanted]
    made = [
        Decision(name, value, "recipe", "asked", "the benchmark asks for it")
        for name, value in wanted.items()
    ]
    return replace(plan, decisions=(*kept, *made))


def validation_set(data: list, encoder: Any, plan: Plan, draws: int) -> list[TrainingSample]:
    """Every picture at ``draws`` noise levels, the middles of as many equal parts of the density."""
    generator = torch.Generator().manual_seed(1234)
    samples = []
    for encoded in data:
        latents, text = encoder.cache.get(encoded.latents), encoder.cache.get(encoded.texts[0])
        for n in range(draws):
            noise = torch.randn(latents.shape, generator=generator)
            chance = Draw((n + 0.5) / draws, noise, False)
            samples.append(add_noise(latents, text, encoded.grid, chance, plan.tables.train.schedule))
    return samples


@torch.no_grad()
def validation_loss(model: Trainable, samples: list[TrainingSample]) -> float:
    """Mean over samples, so that each noise level counts alike."""
    losses = [
        torch.nn.functional.mse_loss(model.predict(s.noisy, s.time, s.text, s.grid).float(), s.target)
        for s in samples
    ]
    return float(torch.stack(losses).mean())


def train(plan: Plan, model: Trainable, data: list, dataset: Any, encoder: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), run_identity(plan), 1)
        trainer = Trainer(
            plan, model, data, dataset.shares, encoder.cache, checkpoints, lambda _: None, Stop()
        )
        trainer.train(plan.tables.train.steps)


def apart(a: float, b: float) -> float:
    return abs(a - b) / b


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--rate", type=float, default=5e-3, help="the quickstart's learning rate")
    parser.add_argument("--draws", type=int, default=16, help="noise levels a picture in validation")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    report: dict[str, Any] = {
        "environment": environment(torch.device("cpu")),
        "arguments": {k: v for k, v in vars(args).items() if k != "json"},
        "rows": rows,
    }
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            recipe = Path(folder) / "nano.toml"
            recipe.write_text(RECIPE.format(
                images=recipes() / "quickstart", resolution=args.resolution, steps=args.steps,
                rate=args.rate, warmup=min(10, args.steps // 10), seed=seed,
            ))  # fmt: skip
            prepared = prepare(recipe)
        encoder = make_encoder(prepared.plan, lambda _: None)
        meter = Meter(torch.device("cpu"), lambda *_: None)
        fill_caches(encoder, prepared.dataset, (), meter)
        data = list(encoder.encoded(prepared.dataset.samples))
        samples = validation_set(data, encoder, prepared.plan, args.draws)
        judge = build(decided(prepared.plan, **WAYS["bf16"]))
        for way, decisions in WAYS.items():
            plan = decided(prepared.plan, **decisions)
            model = build(plan)
            before, started = validation_loss(model, samples), time.perf_counter()
            train(plan, model, data, prepared.dataset, encoder)
            seconds = time.perf_counter() - started
            for name, parameter in judge.parameters.items():
                parameter.data.copy_(model.parameters[name].data)
            rows.append({
                "seed": seed, "way": way, "before": before, "after": validation_loss(model, samples),
                "after_in_bf16": validation_loss(judge, samples), "seconds": round(seconds, 1),
            })  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
            report["summary"] = summary(rows)
            write_json(args.json, report)
    print(json.dumps(report["summary"], indent=1))


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Relative distances of the validation losses from bf16's, and between bf16's own seeds."""
    by_seed: dict[int, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_seed.setdefault(row["seed"], {})[row["way"]] = row
    found: dict[str, Any] = {}
    for way in list(WAYS)[1:]:
        pairs = [(ways[way], ways["bf16"]) for ways in by_seed.values() if way in ways]
        for key in ("before", "after", "after_in_bf16"):
            if pairs:
                apart_by = [apart(a[key], b[key]) for a, b in pairs]
                found.setdefault(way, {})[key] = {
                    "largest": max(apart_by), "mean": statistics.fmean(apart_by),
                    "of_means": apart(statistics.fmean(a[key] for a, _ in pairs),
                                      statistics.fmean(b[key] for _, b in pairs)),
                }  # fmt: skip
        if pairs:  # a base that learns little makes all losses alike; so also by what was learnt
            learnt = [(a["before"] - a["after"], b["before"] - b["after"]) for a, b in pairs]
            found[way]["share_of_what_was_learnt"] = max(apart(a, b) for a, b in learnt)
    after = [ways["bf16"]["after"] for ways in by_seed.values() if "bf16" in ways]
    if len(after) > 1:
        found["bf16, between seeds"] = {"largest": (max(after) - min(after)) / min(after)}
    return found


if __name__ == "__main__":
    main()
