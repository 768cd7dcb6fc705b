"""Training on several GPUs against one: the same steps by 1 and by N processes, with the engine's exchange.

    python benchmarks/distributed.py --json out.json          # 1 and 2 GPUs, 1024 x 1024, batch 1 a process
    python benchmarks/distributed.py --size nano --device cpu --pixels 64 --steps 4     # a try without a GPU
    python benchmarks/distributed.py --shard --json out.json  # the blocks' weights cut up among the processes

Starts torchrun for each number of processes. A step is what the engine's is: gradients to None, forward and
backward of the fused engine with the gradients' exchange in between, clipping by the global norm, AdamW. Each
process has pictures of its own; its time is from one synchronised moment to another, over all timed steps,
and the slowest process counts. "alone" is the same without the exchange: what is lost there is the host's.
The goal for two GPUs is 1.95 times the tokens of one.

With --shard, several processes share the blocks' weights, as with memory.offload = "shard"; one process has
all of them. Such weights are made on the host, and each process takes its piece from there block by block.
"held_gib" is what a process has of weights before the first step, in pieces and whole.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import add_adapters, environment, held, make_layout, random_inputs, write_json

from ideoflow.engine.exchange import GradientExchange
from ideoflow.engine.fused import FusedTransformer
from ideoflow.engine.fused.graphs import GraphedSteps
from ideoflow.engine.offload import Shards
from ideoflow.engine.processes import Processes, joined
from ideoflow.processes import this_process

_GOAL = 1.95  # times the tokens of one GPU that two should do


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=["full", "nano"], default="full")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, default=1, help="pictures of each process")
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--text", type=int, default=320, help="text tokens of a sample")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--linear", choices=["fp8", "bf16"], help="default: fp8 on a GPU, bf16 elsewhere")
    parser.add_argument("--attention", choices=["flash4", "cudnn_varlen", "sdpa"])
    parser.add_argument("--graphs", action="store_true", help="replay steps as CUDA graphs")
    parser.add_argument("--shard", action="store_true", help="cut the weights up among several processes")
    parser.add_argument("--budget", type=float, default=1.0, help="activation budget")
    parser.add_argument(
        "--bucket-mib", type=float, help="gradients sent at once; default: as the engine does"
    )
    parser.add_argument("--seconds", type=float, default=120.0, help="limit for each number of processes")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--worker", metavar="FILE", help=argparse.SUPPRESS)  # where a child puts its rows
    args = parser.parse_args()
    if args.graphs and args.shard:
        parser.error("CUDA graphs need all weights on the device: leave out --graphs or --shard")
    return args


def launch(args: argparse.Namespace, processes: int, file: Path) -> list[dict[str, Any]]:
    """The rows that so many processes measured; one that says so where they failed or took too long."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), __file__, *sys.argv[1:], "--worker", str(file)]
    file.unlink(missing_ok=True)
    if processes == 1:  # without torch.distributed, as `ideoflow run` does
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", str(file)]
    failed = {}
    process = subprocess.Popen(command)
    try:
        if code := process.wait(args.seconds):
            failed = {"failed": f"exit code {code}"}
    except subprocess.TimeoutExpired:
        failed = {"failed": f"more than {args.seconds:.0f} s"}
        process.terminate()  # torchrun ends its children
        process.wait()
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    return rows + ([{"processes": processes, **failed}] if failed else [])


def work(args: argparse.Namespace, processes: Processes) -> None:
    """One process's part of a measurement."""
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", this_process().local_rank)
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    gpu = device.type == "cuda"
    linear, attention = args.linear or ("fp8" if gpu else "bf16"), args.attention or "flash4"
    dtype = torch.bfloat16 if gpu else torch.float32
    shards = args.shard and processes.ranks > 1
    precision = "fp8" if linear == "fp8" else "bf16" if gpu else "float32"
    tell = Telling(processes)
    tell("joined")
    model = held(args.size, device, precision, streamed=shards)
    tell("model made")
    parameters = add_adapters(model, args.rank, torch.float32)
    fused = FusedTransformer(model, linear=linear, attention=attention if gpu else "sdpa", dtype=dtype,
                             activation_budget=args.budget)  # fmt: skip
    source = Shards(device, processes.rank, processes.ranks, processes.weights_group(device))
    if shards:
        fused.stream(source=source)
    weights = held_bytes(model, source, parameters)
    graphs = GraphedSteps(fused, parameters) if args.graphs else None
    exchange = None
    if processes.ranks > 1:
        processes.copy_from_first(parameters)
        bucket = int(args.bucket_mib * 2**20) if args.bucket_mib else None
        exchange = GradientExchange(
            parameters, overlaps=graphs is None, group=processes.group(device), bucket_bytes=bucket
        )
    layout = make_layout(args.batch, args.pixels, args.text, mixed=False, multiple=64)
    data = random_inputs(model, layout, seed=2 + processes.rank)
    inputs = [data[name] for name in ("latents", "target", "timestep", "text")]
    inputs[0] = inputs[0].float()
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=gpu)

    def step(exchanged: bool) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        if exchange and exchanged:
            exchange.arm()
        loss = (graphs or fused.add_gradients)(*inputs, layout, float(processes.ranks))
        if exchange and exchanged:
            loss = exchange.finish(loss / processes.ranks)
            processes.any(False)  # whether to stop, which the engine asks once a step
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss

    def synchronise() -> float:
        if gpu:
            torch.cuda.synchronize()
        processes.wait()
        return time.perf_counter()

    rows = []
    tell("set up")
    for kind in ["trained"] + ["alone"] * (processes.ranks > 1):
        for _ in range(args.warmup):
            loss = step(kind == "trained")
            if gpu:
                torch.cuda.synchronize()
            tell(f"{kind}: a step")
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        started = synchronise()
        for _ in range(args.steps):
            loss = step(kind == "trained")
        if gpu:
            torch.cuda.synchronize()
        ms = max(processes.gather(1e3 * (time.perf_counter() - started) / args.steps))
        row = {"processes": processes.ranks, "kind": kind, "shard": shards, "ms": ms, "loss": float(loss),
               "tokens_per_second": processes.ranks * layout.tokens / ms * 1e3,
               "held_gib": max(processes.gather(weights)) / 2**30}  # fmt: skip
        if gpu:
            row["allocated_gib"] = max(processes.gather(torch.cuda.max_memory_allocated() / 2**30))
        if kind == "trained":
            row["adapters_equal"] = equal(processes, parameters)
            row["exchanged_mb"] = sum(p.nbytes for p in parameters) / 1e6
            row["buckets"] = len(exchange.buckets) if exchange else 0
        rows.append(row)
        if processes.first:
            write_json(args.worker, rows)  # type: ignore[arg-type]
        if kind == "trained" and graphs:
            graphs.release()


class Telling:
    """Where the first process is, and when, on standard error: what is known of one that does not end."""

    def __init__(self, processes: Processes) -> None:
        self.first, self.started = processes.first, time.perf_counter()

    def __call__(self, words: str) -> None:
        if self.first:
            print(f"  {time.perf_counter() - self.started:6.1f} s  {words}", file=sys.stderr, flush=True)


def held_bytes(model: torch.nn.Module, source: Shards, parameters: list[torch.nn.Parameter]) -> int:
    """Bytes of frozen weights that this process has: its pieces, and whatever is not cut up."""
    trained = {id(p) for p in parameters}
    frozen = [*(p for p in model.parameters() if id(p) not in trained), *model.buffers(), *source.buffers]
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in frozen)}
    return sum(storages.values())


def equal(processes: Processes, parameters: list[torch.nn.Parameter]) -> bool:
    """Whether all processes have learnt the same, bit for bit."""
    sums = [p.detach().double().sum() for p in parameters]
    return len({tuple(each) for each in processes.gather(torch.stack(sums).tolist())}) == 1


def main() -> None:
    args = arguments()
    if args.worker:
        with joined() as processes:
            work(args, processes)
        return
    device = torch.device(args.device)
    shown = {name: value for name, value in vars(args).items() if name not in ("json", "worker")}
    report: dict[str, Any] = {"environment": environment(device), "arguments": shown, "rows": []}
    scratch = Path(args.json or "distributed.json").with_suffix(".part")
    for count in args.processes:
        os.environ.setdefault("OMP_NUM_THREADS", "4")
        report["rows"] += launch(args, count, scratch)
        scratch.unlink(missing_ok=True)
        speed = {r["processes"]: r["tokens_per_second"] for r in report["rows"] if r.get("kind") == "trained"}
        if 1 in speed:
            report["ratio"] = {str(n): s / speed[1] for n, s in speed.items() if n > 1}
        write_json(args.json, report)
    for row in report["rows"]:
        print(" ".join(f"{k}={v:.5g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
    for count, ratio in report.get("ratio", {}).items():
        goal = f" (goal {_GOAL})" if count == "2" else ""
        print(f"{count} GPUs / one: {ratio:.3f}{goal}")


if __name__ == "__main__":
    main()
