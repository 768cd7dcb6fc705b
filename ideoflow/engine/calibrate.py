"""A few steps of a plan on the device at hand, for what ``ideoflow plan --calibrate`` writes down."""

from __future__ import annotations

import time
from statistics import median

import torch

from ideoflow.data.encode import release
from ideoflow.data.order import Draw
from ideoflow.engine.meter import memory_errors_told
from ideoflow.engine.optimizer import Optimizer
from ideoflow.engine.setup import build, plan_device, plan_dtype
from ideoflow.engine.step import prepare
from ideoflow.model.spec import PIXELS_PER_TOKEN
from ideoflow.plan.document import Plan

# Kernels are compiled, and attention planned, in the first steps.
WARM_UP, STEPS = 4, 6


def measure_steps(plan: Plan) -> tuple[int | None, float]:
    """(bytes allocated at the peak, None on a CPU; median milliseconds of an optimiser step).

    The steps are a run's own, on random pictures of the plan's greatest size with captions of its greatest
    length, and on a base of random numbers where the plan's is not on this disk.

    Raises:
        IdeoflowError: when the memory does not suffice, or the plan cannot be built here.
    """
    device = plan_device(plan)
    try:
        with memory_errors_told(plan):
            return _measure(plan, device)
    finally:
        release(device)


def _measure(plan: Plan, device: torch.device) -> tuple[int | None, float]:
    assert plan.data is not None, "a plan to be measured has pictures"
    model, train = build(plan), plan.tables.train
    optimizer = Optimizer(str(plan.value("optimizer_state")), model.parameters, train, model.masters)
    largest = max(plan.data.buckets, key=lambda b: b.width * b.height)
    grid = largest.height // PIXELS_PER_TOKEN, largest.width // PIXELS_PER_TOKEN
    spec, generator = plan.base.transformer, torch.Generator().manual_seed(train.seed)
    latents, noise = (torch.randn(grid[0] * grid[1], spec.in_channels, generator=generator) for _ in range(2))
    text = torch.randn(plan.data.text_tokens[2], spec.hidden, generator=generator).to(plan_dtype(plan))
    sample = prepare(latents, text, grid, Draw(0.4, noise, False), train.schedule)
    if device.type == "cuda":
        sample = sample.pinned()
        torch.cuda.reset_peak_memory_stats(device)
    model.transformer.train()
    times = []
    for _ in range(WARM_UP + STEPS):
        started = time.perf_counter()
        for _ in range(train.accumulation):
            model.gradients([sample] * train.batch, train.accumulation)
        optimizer.clip(train.max_grad_norm or float("inf"))
        optimizer.step(train.learning_rate)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - started))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return peak, median(times[WARM_UP:])
