"""A run as it lies on disk after training, made by hand: metrics, pictures, an adapter file, and its plan."""

import json
import math
import random
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from ideoflow.diagnostics import Diagnostic, Span
from ideoflow.diagnostics.codes.plan import DATA_CHANGED
from ideoflow.model.base import NANO_TEXT, NANO_TRANSFORMER, NANO_VAE, BaseFacts
from ideoflow.plan.document import (
    FORMAT,
    Bucket,
    DataSummary,
    Decision,
    Digests,
    DiskSizes,
    Hardware,
    Ledger,
    LedgerLine,
    Plan,
    Rejected,
    TimeEstimate,
    TimePart,
)
from ideoflow.recipe import parse_recipe
from ideoflow.report.record import Recorder

MIB = 2**20
CAPTION = {
    "high_level_description": "A tabby cat behind a red cup of coffee on a wooden table.",
    "compositional_deconstruction": {
        "background": "A dim room, out of focus.",
        "elements": [
            {"type": "obj", "bbox": [120, 300, 760, 760], "desc": "A ginger-brown tabby cat."},
            {"type": "text", "bbox": [40, 80, 120, 920], "text": "KAFFEE", "desc": "A sign in cream."},
        ],
    },
}
RECIPE = """
[model]
base = "nano"
[data]
images = "quickstart"
resolution = 256
[adapter]
rank = 16
[train]
steps = 300
learning_rate = 2e-3
warmup = 20
decay = "cosine"
[validate]
prompts = ["prompts/*.icap"]
preset = "turbo"
"""
LEDGER = (
    ("text", "text encoder", 42, True),
    ("text", "libraries and interpreter", 610, False),
    ("latents", "VAE", 18, True),
    ("latents", "activations", 95, False),
    ("latents", "libraries and interpreter", 610, False),
    ("train", "base weights", 21, True),
    ("train", "adapter, gradients, AdamW's moments", 9, True),
    ("train", "activations", 240, False),
    ("train", "libraries and interpreter", 610, False),
    ("sample", "base weights", 42, True),
    ("sample", "activations", 60, False),
    ("sample", "libraries and interpreter", 610, False),
)


def make_plan(extra: str = "", **changes: object) -> Plan:
    """A plan of the quickstart; ``extra`` is added to its recipe."""
    recipe = parse_recipe(RECIPE + extra, "quickstart.toml")
    base = BaseFacts(
        "nano", Path("cache/nano-1"), True, NANO_TRANSFORMER, NANO_TEXT, NANO_VAE, "float32", "nano-1", True
    )
    decisions = (
        Decision("precision", "float32", "auto", "no_fast_bf16", "This CPU has no fast bf16 arithmetic.",
                 "read from the processor", (Rejected("bf16", "slower_here", -11 * MIB, 84.0),)),
        Decision("checkpointing", "off", "auto", "fits", "Activations fit without recomputing them.", "",
                 (Rejected("on", "not-needed", -180 * MIB, 31.5),)),
        Decision("compile", "off", "recipe", "asked_for", "Set in the recipe, line 14."),
        Decision("unconditional", "loaded", "auto", "fits", "Both transformers fit, so guidance is true."),
    )  # fmt: skip
    ledger = Ledger(tuple(LedgerLine(p, n, m * MIB, c, "architecture table") for p, n, m, c in LEDGER))  # type: ignore[arg-type]
    parts = (TimePart("matrix products", 91.0, "2.1 GFLOP at 40 GFLOP/s"), TimePart("attention", 22.0, ""))
    time = TimeEstimate(parts, 0.0, 6.0, 34.0, 21.0, False, "from nominal rates")
    warning = Diagnostic(
        DATA_CHANGED,
        "two captions name no colours",
        Span("quickstart.toml", 5, 1),
        "add a palette",
        severity="warning",
    )
    plan = Plan(
        FORMAT, "quickstart", "recipes/quickstart.toml", Digests("a1" * 32, "b2" * 32, "nano-1"),
        recipe.tables, base, tuple(f"layers.{i}.attention.to_q" for i in range(6)),
        Hardware("Some CPU, 2 cores", "cpu", 24 << 30, 17 << 30),
        DataSummary(12, 1, (Bucket(256, 256, 9), Bucket(304, 208, 3)), (180, 230, 410), False, "c3" * 32),
        decisions, ledger, time, DiskSizes(2 * MIB, 20 * MIB, None, None), (warning,),
    )  # fmt: skip
    return replace(plan, **changes)  # type: ignore[arg-type]


def paint(file: Path, progress: float, hue: int, size: tuple[int, int] = (128, 96)) -> None:
    """A picture whose forms come out of noise as ``progress`` goes from 0 to 1."""
    noise = random.Random(hue)
    small = Image.new("RGB", (32, 32))
    small.putdata([tuple(noise.randrange(256) for _ in range(3)) for _ in range(1024)])
    blurred = small.resize(size, Image.Resampling.BICUBIC)
    scene = Image.new("HSV", size, (hue, 90, 70)).convert("RGB")
    draw = ImageDraw.Draw(scene)
    width, height = size
    draw.rectangle((0, height * 0.7, width, height), fill=(134, 94, 58))
    draw.ellipse((width * 0.3, height * 0.2, width * 0.75, height * 0.75), fill=(214, 148, 82))
    draw.rectangle((width * 0.12, height * 0.55, width * 0.42, height * 0.9), fill=(176, 44, 28))
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.blend(blurred, scene, progress).save(file)


@dataclass
class Run:
    """A run's folder being filled."""

    folder: Path
    plan: Plan

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.write = Recorder(self.folder).write

    def start(self, from_step: int = 0) -> None:
        self.write("run", version="0.1.0", torch="2.13.0+cpu", device="cpu", from_step=from_step, seed=0)

    def steps(self, first: int, last: int, seed: int = 1) -> None:
        chance = random.Random(seed)
        for step in range(first, last + 1):
            spike = 1.6 if chance.random() < 0.03 else 0.0
            loss = 0.45 + 0.6 * math.exp(-step / 120) + abs(chance.gauss(0, 0.13)) + spike * chance.random()
            rate = 2e-3 * min(step / 20, 0.5 + 0.5 * math.cos(math.pi * max(step - 20, 0) / 280))
            norm = 0.4 + 0.5 * math.exp(-step / 60) + 0.2 * chance.random() + spike / 2
            seconds = 1.9 if step == first else 0.112 + 0.02 * chance.random()
            self.write("step", step=step, loss=loss, learning_rate=rate, grad_norm=norm, seconds=seconds)

    def sample(self, step: int, prompt: str, progress: float, hue: int, **more: object) -> None:
        file = Path("samples") / f"{prompt}-{step:06d}.png"
        paint(self.folder / file, progress, hue)
        self.write("sample", step=step, prompt=prompt, file=file, **more)

    def end(self, step: int, finished: bool = True, seconds: float = 71.4) -> None:
        adapter = f"{self.plan.name}.safetensors"
        if finished:
            (self.folder / adapter).write_bytes(bytes(1_300_000))
        self.write(
            "end", step=step, finished=finished, adapter=adapter if finished else None, seconds=seconds
        )


def whole_run(folder: Path) -> Run:
    """300 steps with a resumption after step 150, three prompts, seven pictures of each."""
    run = Run(folder, make_plan())
    prompts = (("cat-with-cup", 20), ("raccoon-astronaut", 160), ("rocket-at-dusk", 220))
    run.start()
    run.write("stage", stage="captions", seconds=2.31, peak_bytes=701 * MIB)
    run.write("stage", stage="pictures", seconds=4.8, peak_bytes=744 * MIB)
    run.write("stage", stage="load", seconds=0.92, peak_bytes=760 * MIB)
    for step in range(0, 301, 50):
        if step:
            run.steps(step - 49, step)
        if step == 150:
            run.write("checkpoint", step=150, file="checkpoints/step-000150")
            run.write("stage", stage="train", seconds=18.2, peak_bytes=902 * MIB)
            run.end(150, finished=False, seconds=35.0)
            run.start(150)
        for index, (name, hue) in enumerate(prompts):
            run.sample(step, name, step / 300, hue, caption=json.dumps(CAPTION), seed=42 + index)
    run.write("stage", stage="train", seconds=17.9, peak_bytes=915 * MIB)
    run.write("stage", stage="samples", seconds=19.3, peak_bytes=801 * MIB)
    run.write("note", text="cleared an unfinished checkpoint of an earlier process")
    run.end(300)
    return run


@pytest.fixture
def run(tmp_path):
    """An empty run."""
    return Run(tmp_path / "out", make_plan())


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    return whole_run(tmp_path_factory.mktemp("report") / "out")


@pytest.fixture
def finished(whole, tmp_path):
    """A finished run with everything in it."""
    folder = tmp_path / "out"
    shutil.copytree(whole.folder, folder)
    return Run(folder, whole.plan)


@pytest.fixture
def plan_with():
    """Makes a plan from a recipe with further lines in its last table, ``validate``."""
    return make_plan
