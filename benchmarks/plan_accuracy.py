"""How right is the plan? Predicted against measured peak memory and step time, over what a plan may decide.

    python benchmarks/plan_accuracy.py --json out.json               # 66 configurations of the full model
    python benchmarks/plan_accuracy.py --list                        # those, with what each should take
    python benchmarks/plan_accuracy.py --shard 1/2 --seconds 400 --json a.json   # half of them, within a time
    python benchmarks/plan_accuracy.py --skip a.json --json b.json               # what a run left over
    python benchmarks/plan_accuracy.py --merge a.json b.json --json all.json     # one summary, planned again
    python benchmarks/plan_accuracy.py --launching --json launching.json         # what the host is waited for
    python benchmarks/plan_accuracy.py --size nano --device cpu --configurations 12   # a try without a GPU

The first 63 are a covering: values of every two decisions meet, where both are possible together, and mostly
several times (`--list` counts those that do not). The others offload weights in groups. Each is a recipe that
sets everything, planned for this machine, set up by the engine's own `set_up` and trained by its own
`Trainer` on cached random numbers: all that differs from a run is that the frozen weights are random, and one
copy of them serves all configurations of a precision. Predicted is what the formulas and the shares of peak
that ship say, without any correction. Every third configuration is *held out*: whoever fits shares may fit
them to the rest only. A configuration that ran out of memory, or that the planner says does not fit, is a row
too.

``--launching`` measures other configurations: pictures so small that a step takes as long as the host needs
to launch it. What the time model says of launching is fitted to those, none of which is among the above.

Without a GPU, plans are made for an H200 and carried out on the processor without graphs: a try of the code,
whose times mean nothing and are compared with nothing.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import random
import statistics
import tempfile
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import environment, held, write_json
from configurations import Configuration, drawn, held_to, launch_bound, pairs
from hosts import SHIPPED_PROBE_MS, PairedSteps, Probe, best_probe, launching_times, waits
from torch import nn

from ideoflow.artifacts import Checkpoints
from ideoflow.data.cache import TensorCache
from ideoflow.data.encode import Encoded
from ideoflow.data.keys import cache_key
from ideoflow.data.survey import Share
from ideoflow.diagnostics import IdeoflowError
from ideoflow.engine.fused import attention as fused_attention
from ideoflow.engine.loop import Stop, Trainer
from ideoflow.engine.meter import Meter, memory_errors_told
from ideoflow.engine.setup import set_up
from ideoflow.model.base import NANO_TEXT, NANO_TRANSFORMER, NANO_VAE, BaseFacts
from ideoflow.model.load import is_streamed
from ideoflow.model.spec import TextEncoderSpec, TransformerSpec, VaeSpec
from ideoflow.plan import Plan, detect_hardware, make_plan, named_hardware
from ideoflow.plan.calibration import Calibration
from ideoflow.plan.document import Bucket, DataSummary, Decision, Hardware
from ideoflow.plan.profiles import find_profile
from ideoflow.plan.record import allocated
from ideoflow.recipe import parse_recipe

TEXT_TOKENS = 320
# Packages that an attention kernel needs; without them, the planner takes the next one.
ATTENTION = {"flash4": (), "cudnn_varlen": ("flash-attn-4",), "sdpa": ("flash-attn-4", "cudnn")}
# Seconds: making a precision's weights, setting up a configuration (and if streamed), compiling, a probe.
MAKING, SETTING_UP, STREAMING, COMPILING, PROBING = 6.0, 5.0, 4.0, 25.0, 0.08


def base_facts(size: str) -> BaseFacts:
    specs = {
        "full": (TransformerSpec(), TextEncoderSpec(), VaeSpec()),
        "nano": (NANO_TRANSFORMER, NANO_TEXT, NANO_VAE),
    }
    return BaseFacts(size, None, False, *specs[size], "bf16", "random", False)


def plan_of(
    c: Configuration, base: BaseFacts, hardware: Hardware, calibration: Calibration | None = None
) -> Plan:
    """The plan of a recipe that sets all of a configuration."""
    memory: dict[str, Any] = {"engine": c.engine, "precision": c.precision}
    memory |= {"offload": c.offload, "optimizer_state": c.optimizer_state}
    if c.engine == "fused":
        memory |= {"matmul": c.matmul, "activation_budget": c.budget, "graphs": c.graphs,
                   "activation_offload": c.activation_offload}  # fmt: skip
        memory |= {"exact_blocks": 0} if c.matmul == "fp8" else {}
    else:
        memory |= {"checkpointing": "on" if c.budget == 0 else "off", "compile": c.compile}
    lines = [
        '[model]\nbase = "random"\n[data]\nimages = "none"',
        f"resolution = {c.pixels}",
        "[captions]\ndropout = 0.0",
        f"[adapter]\nrank = {c.rank}",
        f"[train]\nbatch = {c.batch}\nsteps = 1000\ncheckpoint_every = 1000",
        "[memory]",
        *(f"{name} = {value!r}" for name, value in memory.items()),
    ]
    data = DataSummary(1, 0, (Bucket(c.pixels, c.pixels, 1),), (TEXT_TOKENS,) * 3, False, "random")
    packages = tuple(p for p in hardware.packages if p not in ATTENTION[c.attention])
    recipe, hardware = parse_recipe("\n".join(lines)), replace(hardware, packages=packages)
    return make_plan(recipe, base, data, hardware, calibration=calibration)


def on_processor(plan: Plan) -> Plan:
    """The plan as a processor can carry it out."""
    wanted = {"device": "cpu", "graphs": "off", "attention": "sdpa", "compile": "off"}
    kept = [d for d in plan.decisions if d.id not in wanted]
    made = [Decision(name, value, "recipe", "test", "a try") for name, value in wanted.items()]
    return replace(plan, decisions=(*kept, *made))


def steps_of(plan: Plan, c: Configuration, steps: int, probed: bool) -> tuple[int, int, int]:
    """(before, measured, paired with probes): graphs are recorded in the third; fewer of slow ones."""
    step_ms = plan.time.step_ms if plan.time else 100.0
    paired = max(4, min(16, int(5000 / step_ms))) if probed else 0
    return 4 if c.graphs == "on" else 2, min(steps, 2) if step_ms > 1500 else steps, paired


def predicted_seconds(plan: Plan, c: Configuration, steps: int, probed: bool) -> float:
    """What measuring a configuration should take here."""
    seconds = SETTING_UP + (STREAMING if c.on_host else 0)
    seconds += COMPILING if c.compile == "regional" else 0
    *plain, paired = steps_of(plan, c, steps, probed)
    taken = plan.time.step_ms / 1e3 if plan.time else 0.1
    return seconds + (sum(plain) + 1 + paired) * taken + paired * PROBING


class Weights:
    """The frozen weights of one precision at a time, on the device or with the large ones on the host."""

    def __init__(self, size: str, device: torch.device) -> None:
        self.size, self.device = size, device
        self.precision, self.streamed = "", False
        self.model: nn.Module | None = None

    @contextmanager
    def of(self, precision: str, streamed: bool) -> Iterator[Any]:
        """A model for one configuration: modules of its own around the tensors that all share."""
        if precision != self.precision:
            self.model = None
            clean(self.device)
            self.model = held(self.size, self.device, precision)
            self.precision, self.streamed = precision, False
        assert self.model is not None
        if streamed != self.streamed:
            for name, layer in self.model.named_modules():
                if is_streamed(name) and isinstance(layer, nn.Linear):
                    layer.weight.data = layer.weight.data.to("cpu" if streamed else self.device)
            self.streamed = streamed
        clean(self.device)
        shared = [*self.model.parameters(), *self.model.buffers()]
        # What is laid together stays so: the old pieces would be a second copy of the model.
        kept = [p.data for p in shared] if streamed else []
        try:
            yield copy.deepcopy(self.model, {id(tensor): tensor for tensor in shared})
        finally:
            if streamed:  # the stream has put its own copies in their place
                for tensor, data in zip(shared, kept, strict=True):
                    tensor.data = data


def clean(device: torch.device) -> None:
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class Samples:
    """Cached random numbers in place of encoded pictures and captions."""

    def __init__(self, folder: Path, hidden: int, channels: int) -> None:
        self.cache, self.hidden, self.channels = TensorCache(folder), hidden, channels
        self.made: dict[int, list[Encoded]] = {}

    def of(self, pixels: int) -> list[Encoded]:
        """Four pictures of a size."""
        if pixels not in self.made:
            side, data = pixels // 16, []
            for number in range(4):
                keys = [cache_key(kind, pixels=pixels, number=number) for kind in ("latents", "text")]
                latents = torch.randn(side * side, self.channels)
                self.cache.put(keys[0], latents, kind="latents", base="b")
                text = torch.randn(TEXT_TOKENS, self.hidden).bfloat16()
                self.cache.put(keys[1], text, kind="text", base="b")
                data.append(Encoded(keys[0], (keys[1],), (side, side)))
            self.cache.flush()
            self.made[pixels] = data
        return self.made[pixels]


def run(
    plan: Plan,
    model: Any,
    samples: Samples,
    c: Configuration,
    steps: int,
    scratch: Path,
    tell: Callable[[str], None] = lambda stage: None,
    probe: Probe | None = None,
) -> dict[str, Any]:
    """Median milliseconds of a step and, on a GPU, the training's peak in bytes, the first steps included.

    ``tell`` is called with what comes next: setting up, and each step. With a ``probe`` further steps are
    measured as :class:`PairedSteps`.
    """
    device = torch.device(str(plan.value("device")))
    before, measured, further = steps_of(plan, c, steps, probe is not None)
    further = further if device.type == "cuda" else min(further, 2)  # a try of the code
    # One more, since the last interval ends with its gradients and not with its update.
    plain = before + measured + 1
    paired = PairedSteps(probe, plain + 1) if probe else None
    events: list[Any] = []
    peaks: dict[str, int] = {}
    meter = Meter(device, lambda stage, seconds, peak: peaks.update({stage: peak}))
    checkpoints = Checkpoints(scratch / "checkpoints", {}, 1)
    data = samples.of(c.pixels)
    begun = time.perf_counter()
    with memory_errors_told(plan), meter.stage("train"):
        tell("setting up")
        trainable = set_up(plan, model)
        set_up_seconds = time.perf_counter() - begun
        trainer = Trainer(plan, trainable, data, [Share("random", 0, len(data))], samples.cache, checkpoints,
                          events.append, Stop())  # fmt: skip
        trainer.around = partial(around, tell, paired)
        trainer.train(plain + further)
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            reserved = torch.cuda.memory_reserved(device)
    times = [e.seconds for e in events if type(e).__name__ == "StepDone"][: plain - 1]
    found: dict[str, Any] = {
        "ms": 1e3 * statistics.median(times[before:]),
        "set_up_seconds": set_up_seconds,
        "step_seconds": times,
    }
    found |= paired.means() if paired else {}
    if device.type == "cuda":
        found |= {
            "allocated": peaks["train"] - (probe.held_bytes if probe else 0),
            "reserved": torch.cuda.max_memory_reserved(device),
            "context": total - free - reserved,
        }
    return found


@contextmanager
def around(tell: Callable[[str], None], paired: PairedSteps | None, step: int) -> Iterator[None]:
    tell(f"step {step}")
    with paired.around(step) if paired else nullcontext():
        yield


def predictions(plan: Plan) -> dict[str, float]:
    tensors = sum(line.bytes for line in allocated(plan.ledger))
    row: dict[str, float] = {"predicted_allocated": tensors, "predicted_peak": plan.ledger.peak("train")}
    return row | ({"predicted_ms": plan.time.step_ms} if plan.time else {})


def might_wait(plan: Plan, c: Configuration) -> bool:
    """Whether the device might wait for the host, were launching half as slow again as the model has it."""
    slow = launching_times(1.5, plan.hardware.name)
    return c.graphs == "off" and waits(plan_of(c, plan.base, plan.hardware, slow))


def errors(row: dict[str, Any]) -> dict[str, float]:
    """Relative errors: predicted / measured - 1.

    A step that waits for the host, or might, has a ``launch_error``, if the host was probed, any other a
    ``time_error``; ``step_error`` is either.
    """
    pairs = {"memory_error": ("predicted_allocated", "allocated")}
    if "probe_ms" in row:
        pairs["launch_error"] = "predicted_ms", "launched_ms"
    elif not row.get("waits"):
        pairs["time_error"] = "predicted_ms", "ms"
    found = {name: row[a] / row[b] - 1 for name, (a, b) in pairs.items() if a in row and b in row}
    step = found.get("launch_error", found.get("time_error"))
    return found if step is None else found | {"step_error": step}


def by_configuration(rows: list[dict[str, Any]], key: str) -> dict[int, float]:
    """A configuration's error: the mean over the machines on which it was measured, which differ too."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if key in row:
            found.setdefault(row["index"], []).append(row[key])
    return {index: statistics.mean(values) for index, values in found.items()}


def summary(rows: list[dict[str, Any]], key: str) -> dict[str, dict[str, float]]:
    """Worst above and below, and mean error, over all configurations and over those held out."""
    found = {}
    for name, chosen in (("all", rows), ("held out", [r for r in rows if r["held_out"]])):
        if values := list(by_configuration(chosen, key).values()):
            found[name] = {
                "configurations": len(values),
                "worst_over": max(0.0, *values),
                "worst_under": min(0.0, *values),
                "mean": statistics.mean(map(abs, values)),
            }
    return found


def planned_again(rows: list[dict[str, Any]], size: str = "full") -> list[dict[str, Any]]:
    """What was measured, with what the code at hand predicts of it, the host's speed taken as it was."""
    again = []
    for row in rows:
        kept = {name: value for name, value in row.items() if not name.endswith("_error")}
        kept["host_factor"] = row["probe_ms"] / SHIPPED_PROBE_MS if "probe_ms" in row else 1.0
        plan = plan_again(row, kept["host_factor"], size)
        kept |= predictions(plan) | {"waits": waits(plan)}
        again.append(kept | errors(kept))
    return again


def plan_again(row: dict[str, Any], host_factor: float, size: str = "full") -> Plan:
    """A row's plan by the code at hand, with so many times the shipped launching."""
    hardware = named_hardware(row["card"])
    known = launching_times(host_factor, hardware.name)
    return plan_of(configuration_of(row), base_facts(size), hardware, known)


def configuration_of(row: dict[str, Any]) -> Configuration:
    return Configuration(**{name: row[name] for name in Configuration.__dataclass_fields__})


def conclude(report: dict[str, Any], path: str | None) -> None:
    rows = report["rows"]
    keys = ("memory_error", "time_error", "launch_error", "step_error")
    report["summary"] = {key: summary(rows, key) for key in keys}
    for key, parts in report["summary"].items():
        for name, s in parts.items():
            print(f"{key:13} {name:9} of {s['configurations']:3}: over at most {s['worst_over']:+.1%}, "
                  f"under at most {s['worst_under']:+.1%}, mean {s['mean']:.1%}")  # fmt: skip
    outcomes = Counter(r["outcome"] for r in rows)
    print("; ".join(f"{count} {outcome}" for outcome, count in outcomes.items()) or "nothing measured")
    write_json(path, report)


def show(row: dict[str, Any]) -> str:
    c = configuration_of(row)
    ways = [c.engine, c.precision, f"x {c.matmul}", c.attention, f"budget {c.budget:g}", c.optimizer_state]
    ways += [f"{w} away" for w in [c.activation_offload] if w != "none"]
    ways += [w for w, on in ((c.offload, c.offload), ("graphs", c.graphs), ("compiled", c.compile))
             if on not in ("none", "off")]  # fmt: skip
    text = f"{c.batch} x {c.pixels} r{c.rank} {' '.join(ways)}: "
    if "ms" not in row:
        return text + row["outcome"]
    error = row.get("step_error")
    text += f"{row['ms']:.0f} ms" + (f" ({error:+.1%})" if error is not None else "")
    if "allocated" in row:
        text += f", {row['allocated'] / 2**30:.2f} GiB ({row['memory_error']:+.1%})"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=["full", "nano"], default="full")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=3, help="measured steps; 2 where they are slow")
    parser.add_argument("--configurations", type=int, default=63)
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="every N-th of them, from the I-th")
    parser.add_argument(
        "--skip", nargs="+", default=[], metavar="FILE", help="what these have is not measured"
    )
    parser.add_argument("--seconds", type=float, default=1e9, help="start nothing that would end later")
    parser.add_argument("--shared-host", action="store_true", help="another measurement runs on this machine")
    parser.add_argument("--machine", default=str(uuid.uuid4())[:8], help="its name in the rows")
    parser.add_argument("--bound", choices=["host", "device"], help="only steps that might wait for "
                        "the host, to be measured with nothing beside them; or only others")  # fmt: skip
    parser.add_argument("--launching", action="store_true", help="steps that wait for the host")
    parser.add_argument("--list", action="store_true", help="print the plans for an H200, run nothing")
    parser.add_argument(
        "--merge",
        nargs="+",
        metavar="FILE",
        help="join results (of one configuration on one machine the last counts), plan them again",
    )
    parser.add_argument("--fit-probe", action="store_true", help="with --merge: what a probe takes on a host "
                        "as fast as the shipped calibration says")  # fmt: skip
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if args.merge:
        parts = [json.loads(Path(f).read_text()) for f in args.merge]
        latest = {(r["index"], r["machine"]): r for p in parts for r in p["rows"] if "outcome" in r}
        rows = planned_again([latest[key] for key in sorted(latest)], args.size)
        if args.fit_probe:
            best = best_probe(rows, lambda r, host: plan_again(r, host, args.size).time.step_ms)
            print(f"a probe of {best:.1f} ms, of rows not held out (now {SHIPPED_PROBE_MS:.1f})")
        conclude({**parts[0], "rows": rows}, args.json)
        return
    # A run's hundreds of steps earn cuDNN's exact plans; these few get them from the first.
    fused_attention._CALLS_BEFORE_EXACT = 0
    started, device, base = time.perf_counter(), torch.device(args.device), base_facts(args.size)
    real = device.type == "cuda" and not args.list
    hardware = detect_hardware(args.device) if real else named_hardware("h200")
    profile = find_profile(hardware.name, hardware.total_bytes)
    card = profile.key if profile else hardware.name
    shard, shards = map(int, args.shard.split("/"))
    wanted, there = [], [r for f in args.skip for r in json.loads(Path(f).read_text())["rows"]]
    done = {r["index"] for r in there if "ms" in r}
    scale = 1 if args.size == "full" else 8
    chosen = launch_bound(scale) if args.launching else held_to(args.configurations, scale)
    for index, c in enumerate(chosen):
        if index % shards == shard - 1 and index not in done:
            plan = plan_of(c, base, hardware)
            probed = might_wait(plan, c)
            if args.bound is None or probed == (args.bound == "host"):
                wanted.append((index, c, plan, probed))
    # One precision after the other, and within it what is streamed last: weights are made and moved once.
    wanted.sort(key=lambda w: (w[1].precision, w[1].on_host, w[1].engine, w[0]))
    expected = sum(predicted_seconds(plan, c, args.steps, probed) for _, c, plan, probed in wanted)
    expected += MAKING * len({c.precision for _, c, *_ in wanted})
    print(f"{len(wanted)} configurations, about {expected:.0f} s expected", flush=True)
    if args.list:
        met = {p for _, c, *_ in wanted for p in pairs(c)}
        possible = {p for _, c in zip(range(20_000), drawn(random.Random(0)), strict=False) for p in pairs(c)}
        print(f"of {len(possible)} pairs of values {len(possible - met)} do not meet")
    rows: list[dict[str, Any]] = []
    report = {
        "environment": environment(device),
        "arguments": {k: v for k, v in vars(args).items() if k not in ("json", "merge", "skip")},
        "rows": rows,
    }
    weights, probe = Weights(args.size, device), None
    with tempfile.TemporaryDirectory() as folder:
        spec = base.transformer
        samples = Samples(Path(folder) / "cache", spec.hidden, spec.in_channels)
        for index, c, plan, probed in wanted:
            seconds = predicted_seconds(plan, c, args.steps, probed)
            row = {"index": index, "held_out": index % 3 == 2 and not args.launching, "card": card,
                   "machine": args.machine, "shared_host": args.shared_host,
                   "waits": waits(plan), **asdict(c), **predictions(plan)}  # fmt: skip
            rows.append(row)
            begun = time.perf_counter()
            if args.list:
                row["outcome"] = f"{seconds:.0f} s, {row.get('predicted_ms', 0):.0f} ms a step, " \
                                 f"{row['predicted_allocated'] / 2**30:.1f} GiB"  # fmt: skip
            elif begun - started + seconds > args.seconds:
                rows.pop()
                print("no time left for: " + show({**row, "outcome": f"{seconds:.0f} s"}), flush=True)
                continue
            elif not plan.fits:
                row["outcome"] = "does not fit, by the plan"
            else:
                carried_out = plan if real else on_processor(plan)
                model = weights.of(c.precision, c.on_host)
                if probed:
                    probe = probe or Probe(device)
                row |= outcome(carried_out, model, samples, c, args.steps, Path(folder),
                               probe=probe if probed else None)  # fmt: skip
                row |= errors(row) if real else {}
            row["seconds"], row["expected_seconds"] = time.perf_counter() - begun, seconds
            print(f"{len(rows):3} {show(row)} [{row['seconds']:.1f} s]", flush=True)
            write_json(args.json, report)
    print(f"{time.perf_counter() - started:.0f} s, {expected:.0f} s expected")
    if not args.list:
        conclude(report, args.json)


def outcome(
    plan: Plan,
    model: AbstractContextManager[Any],
    samples: Samples,
    c: Configuration,
    steps: int,
    scratch: Path,
    tell: Callable[[str], None] = lambda stage: None,
    probe: Probe | None = None,
) -> dict[str, Any]:
    """What came of one configuration; running out of memory, or a refusal, is an outcome."""
    try:
        with model as frozen:
            return {"outcome": "measured", **run(plan, frozen, samples, c, steps, scratch, tell, probe)}
    except IdeoflowError as error:
        told = error.diagnostics[0]
        return {"outcome": told.message, "notes": list(told.notes)}
    except Exception as error:  # a fault of the engine: told in the row, and the others still run
        traceback.print_exc()
        return {"outcome": f"failed: {type(error).__name__}: {error}"[:300]}


if __name__ == "__main__":
    main()
