"""From pictures on a disk to batches: how fast is each part, and what does it hold?

    python benchmarks/data.py --json benchmarks/results/data.json         # everything but scale and encoders
    python benchmarks/data.py --only scale --json scale.json              # an index of 10 million pictures
    python benchmarks/data.py --only encoders --base /dev/shm/base --json encoders.json     # on a GPU
    python benchmarks/data.py --only encoders --size nano                 # a try without a GPU

`decode`: photographs of 12 megapixels through decoding, colour, crop and resize to 1024 x 1024, in one thread
and in all cores. `cache`: shards written and read against plain files of the same bytes on the same disk, and
bytes a token of a caption. `index`: memory and time of the index over a million entries. `batches`: what
assembling the batches of a training step takes on its own thread, and how long the training thread waits for
it with a step of 250 ms. `scale`: an index of 20 million entries (10 million pictures, each with a caption),
snapshot included. `encoders`: the text encoder streamed layer by layer against a resident one, and the
autoencoder.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from common import environment, write_json
from diffusers import Ideogram4Pipeline, Ideogram4Transformer2DModel
from full_size import make_base
from PIL import Image
from transformers import AutoConfig, Qwen3VLConfig, Qwen3VLModel

from ideoflow.captions.boxes import Geometry
from ideoflow.data import shards
from ideoflow.data.cache import SHARD_BYTES, TensorCache
from ideoflow.data.encode import Encoded, encode_in_turn, release
from ideoflow.data.keys import cache_key
from ideoflow.data.pixels import load_pixels
from ideoflow.data.shards import Index, Shard
from ideoflow.data.survey import Sample, Share
from ideoflow.engine.batches import Batches
from ideoflow.model import text
from ideoflow.model.checkpoint import Checkpoint
from ideoflow.model.load import load_vae, read_tensors
from ideoflow.model.nano import make_nano
from ideoflow.model.text import TextEncoder
from ideoflow.recipe import parse_recipe

GRID = (64, 64)  # 1024 x 1024
HIDDEN, CHANNELS, TEXT_TOKENS = 4608, 128, 300
STEP_SECONDS = 0.250


def timed(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def decode(scratch: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Pictures a second through decode and crop, from JPEG files of 4000 x 3000."""
    coarse = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    photograph = Image.fromarray(coarse).resize((4000, 3000), Image.Resampling.BICUBIC)
    samples = []
    for n in range(8):
        file = scratch / f"{n}.jpg"
        photograph.rotate(90 * (n % 4)).save(file, quality=92)
        samples.append(Sample(file, (1024, 1024), Geometry(4000, 3000, (500, 0, 3500, 3000)), ""))
    many = samples * args.repeat
    alone = len(samples) / timed(lambda: [load_pixels(s) for s in samples])
    cores = os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        together = len(many) / timed(lambda: list(pool.map(load_pixels, many)))
    return {"file_megabytes": samples[0].picture.stat().st_size / 1e6, "threads": cores,
            "pictures_per_second_1_thread": alone, "pictures_per_second_all_threads": together}  # fmt: skip


def forget(folder: Path) -> None:
    """Drops files from the page cache, so that the next read comes from the disk."""
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cache(scratch: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Write and read rates of latents at 1024, in GB/s, against plain files; and bytes a token of text."""
    count = max(8, args.megabytes // 2)
    value = torch.randn(GRID[0] * GRID[1], CHANNELS)
    size = count * value.nbytes
    keys = [cache_key("latents", number=n) for n in range(count)]
    plain, folder = scratch / "plain", scratch / "cache"
    plain.mkdir()

    def write_plain() -> None:
        whole = value.numpy().tobytes() * (SHARD_BYTES // value.nbytes)
        for n in range(0, size, len(whole)):
            with (plain / str(n)).open("wb") as stream:
                stream.write(whole[: size - n])
                os.fsync(stream.fileno())

    def write_cache() -> None:
        made = TensorCache(folder)
        for key in keys:
            made.put(key, value, kind="latents", base="b")
        made.flush()

    buffer = bytearray(value.nbytes)

    def read_plain(piece: tuple[Path, int]) -> None:
        file, begin = piece
        with file.open("rb", buffering=0) as stream:
            stream.seek(begin)
            stream.readinto(buffer)

    rates = {"disk_write": size / timed(write_plain) / 1e9, "cache_write": size / timed(write_cache) / 1e9}
    files = [p for p in folder.iterdir() if p.suffix == shards.SUFFIX]
    header = timed(lambda: [shards.read_shard(f) for f in files]) / len(files)
    read = TensorCache(folder)
    pieces = [(f, n) for f in sorted(plain.iterdir()) for n in range(0, f.stat().st_size, value.nbytes)]
    order = np.random.default_rng(1).permutation(count)
    for what, places in (("cold", range(count)), ("warm", range(count)), ("cold_random_order", order)):
        if "cold" in what:
            forget(plain), forget(folder)
        seconds = {"disk": 0.0, "cache": 0.0}
        for turn in np.array_split(np.array(places), 16):  # by turns: the disk may be faster at times
            seconds["disk"] += timed(lambda turn=turn: [read_plain(pieces[n]) for n in turn])
            seconds["cache"] += timed(lambda turn=turn: [read.get(keys[n]) for n in turn])
        rates |= {f"{name}_read_{what}": size / s / 1e9 for name, s in seconds.items()}

    text = TensorCache(scratch / "text")
    for n in range(100):
        features = torch.zeros(TEXT_TOKENS, HIDDEN, dtype=torch.bfloat16)
        text.put(cache_key("text", number=n), features, kind="text", base="b")
    text.flush()
    stored = sum(p.stat().st_size for p in (scratch / "text").iterdir())
    return {
        "gigabytes": size / 1e9,
        "gb_per_s": rates,
        "header_of_a_shard_ms": 1e3 * header,
        "text_bytes_per_token": stored / (100 * TEXT_TOKENS),
        "raw_text_bytes_per_token": 13 * 4096 * 2,
        "entry_bytes_beside_the_numbers": stored / 100 - TEXT_TOKENS * HIDDEN * 2,
    }


def synthetic(entries: int, kind: str, size: int, seed: int) -> list[tuple[Shard, shards.Arrays]]:
    """Shards of made-up entries of ``size`` bytes, full as real ones are, without their files."""
    chance = np.random.default_rng(seed)
    each = SHARD_BYTES // size
    found = []
    for start in range(0, entries, each):
        count = min(each, entries - start)
        rows = shards._empty(count)
        rows["high"][:], rows["low"][:] = chance.integers(0, 2**63, (2, count), dtype=np.uint64)
        rows["begin"][:], rows["length"][:] = np.arange(count) * size, size
        name = shards.new_shard_name(kind)
        found.append((Shard(name, size * count, kind, "b" * 64, "F32", CHANNELS, count), rows))
    return found


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def index(scratch: Path, args: argparse.Namespace, entries: int = 1_000_000) -> dict[str, Any]:
    """Memory and speed of an index over ``entries`` entries, half of them latents and half text."""
    parts = synthetic(entries // 2, "latents", GRID[0] * GRID[1] * CHANNELS * 4, 0)
    parts += synthetic(entries // 2, "text", TEXT_TOKENS * HIDDEN * 2, 1)
    keys = shards.join_keys(parts[0][1])[:100] + [cache_key("text", number=n) for n in range(100)]
    made = Index(scratch / "index")
    started = time.perf_counter()
    made._take(parts)
    sort = time.perf_counter() - started
    names = len(made.shards)
    found = timed(lambda: [made.find(k) for k in keys]) / len(keys)
    asked = [cache_key("text", number=n) for n in range(100_000)]
    many = timed(lambda: made.has(asked))
    (scratch / "index").mkdir()
    write = timed(made._write_snapshot)
    again, before = Index(scratch / "index"), resident()
    read = timed(again._read_snapshot)
    grown = resident() - before
    assert len(again.shards) == names and again.rows["high"][-1] == made.rows["high"][-1]
    return {
        "entries": entries,
        "files": names,
        "array_bytes_per_entry": made.nbytes / entries,
        "arrays_megabytes": made.nbytes / 1e6,
        "process_grows_megabytes": grown / 1e6,
        "sort_seconds": sort,
        "find_microseconds": 1e6 * found,
        "ask_for_100000_seconds": many,
        "snapshot_megabytes": (scratch / "index" / "index.npz").stat().st_size / 1e6,
        "snapshot_write_seconds": write,
        "snapshot_read_seconds": read,
    }


def batches(scratch: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Assembling the batches of steps at 1024 with captions of 300 tokens."""
    made = TensorCache(scratch / "batches")
    data = []
    for n in range(64):
        keys = cache_key("latents", number=n), cache_key("text", number=n)
        made.put(keys[0], torch.randn(GRID[0] * GRID[1], CHANNELS), kind="latents", base="b")
        text = torch.randn(TEXT_TOKENS + n, HIDDEN).bfloat16()
        made.put(keys[1], text, kind="text", base="b")
        data.append(Encoded(keys[0], (keys[1],), GRID))
    made.flush()
    results: dict[str, Any] = {"simulated_step_ms": 1e3 * STEP_SECONDS}
    for size in (1, 4):
        head = "[model]\nbase = 'nano'\n[data]\nimages = 'x'\n[train]\nsteps = 1000\n"
        tables = parse_recipe(f"{head}batch = {size}\n").tables
        reader = Batches(tables, data, [Share("x", 0, 64)], made)
        reader.of(0)
        assembling = statistics.median(timed(partial(reader.read, step)) for step in range(10))
        waits = []
        for step in range(1, 13):
            started = time.perf_counter()
            held = reader.of(step)
            waits.append(time.perf_counter() - started)
            time.sleep(STEP_SECONDS)  # the device at work
            del held  # not within what is timed: giving memory back takes longer than the hand-over
        results[f"batch_{size}"] = {
            "assembling_ms_on_its_own_thread": 1e3 * assembling,
            "training_thread_waits_ms": 1e3 * statistics.median(waits[1:]),
            "training_thread_waits_share_of_step": statistics.median(waits[1:]) / STEP_SECONDS,
        }
    return results


def scale(scratch: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The index of 10 million pictures with a caption each."""
    return index(scratch, args, entries=args.entries)


def encoders(scratch: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Encoders of random numbers: text streamed layer by layer and by a resident model, and pictures."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    base = args.base or scratch / "base"
    if args.size == "full":
        make_base(base, "fp8", str(device), parts=("text_encoder", "vae"))
    elif not base.exists():
        make_nano(base)
    release(device)
    chance = np.random.default_rng(0)
    words = AutoConfig.from_pretrained(base / "text_encoder").text_config.vocab_size
    captions = [chance.integers(0, words, n).tolist() for n in chance.integers(200, 401, args.captions)]
    results: dict[str, Any] = {"tokens": sum(map(len, captions)), "tokens_at_once": text.TOKENS_AT_ONCE}
    # Files into the page cache, kernels loaded.
    told(lambda: streamed_text(base, captions[:2], dtype, device), "the first two captions")
    made = {}
    for name, run in (("streamed", streamed_text), ("resident", resident_text)):
        way = partial(encoding, partial(run, base, captions, dtype, device), device)
        results[name], made[name] = told(way, f"{len(captions)} captions, {name}")
        results[name]["captions_per_second"] = len(captions) / results[name]["seconds"]
        print(f"    {results[name]}", flush=True)
    results["streamed_share_of_resident_speed"] = (
        results["resident"]["seconds"] / results["streamed"]["seconds"]
    )
    results["least_cosine"] = min(
        torch.nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0).item()
        for a, b in list(zip(made["streamed"], made["resident"], strict=True))[::8]
    )
    for name, layout in (("", torch.contiguous_format), ("_channels_last", torch.channels_last)):
        way = partial(encoding, partial(autoencoder, base, args, dtype, device, layout), device)
        rates, _ = told(way, f"{args.pictures} pictures{name.replace('_', ' ')}")
        results[f"autoencoder{name}"] = rates | {"pictures_per_second": args.pictures / rates["seconds"]}
    return results


def told(run: Callable[[], Any], what: str) -> Any:
    """Runs a stage and tells its seconds."""
    started = time.perf_counter()
    result = run()
    print(f"  {what}: {time.perf_counter() - started:.1f} s", flush=True)
    return result


def encoding(run: Callable[[], Any], device: torch.device) -> tuple[dict[str, float], Any]:
    """Peak of one way to encode, loading included, and its seconds without loading; and what it gave."""
    release(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, made = run()
    rates = {"seconds": seconds}
    if device.type == "cuda":
        rates["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        rates["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    return rates, made


def streamed_text(
    base: Path, captions: list[list[int]], dtype: torch.dtype, device: torch.device
) -> tuple[float, list[torch.Tensor]]:
    """As ideoflow does it: reading the layers is part of the work."""
    encoder = TextEncoder(base, dtype=dtype, device=device, max_tokens=2048)
    started = time.perf_counter()
    found = [features.cpu() for group in encoder.encode_tokens(captions) for features in group]
    return time.perf_counter() - started, found


@torch.no_grad()
def resident_text(
    base: Path, captions: list[list[int]], dtype: torch.dtype, device: torch.device
) -> tuple[float, list[torch.Tensor]]:
    """The plain way: transformers' model as a whole on the device, diffusers' norm and projection."""
    with init_empty_weights(include_buffers=False):
        model = Qwen3VLModel(Qwen3VLConfig.from_pretrained(base / "text_encoder"))
    # transformers cannot read the release's FP8 form: our reader's numbers, its own arithmetic.
    weights = Checkpoint(base / "text_encoder")
    held = {name: weights.dense(name, dtype, device) for name, _ in model.named_parameters()}
    model.load_state_dict(held, strict=False, assign=True)
    model.to(device).eval()
    config = Ideogram4Transformer2DModel.load_config(base / "transformer")
    with torch.device("meta"):
        whole = Ideogram4Transformer2DModel.from_config(config)
    names = ("llm_cond_norm.weight", "llm_cond_proj.weight", "llm_cond_proj.bias")
    for name, value in read_tensors(base / "transformer", names, dtype=dtype, device=device).items():
        whole.get_submodule(name.rpartition(".")[0]).load_state_dict(
            {name.rpartition(".")[2]: value}, assign=True, strict=False
        )
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    found = []
    for tokens in captions:
        ids = torch.tensor([tokens], device=device)
        places = torch.arange(len(tokens), device=device)[None]
        tapped = Ideogram4Pipeline._get_text_encoder_hidden_states(model, ids, torch.ones_like(ids), places)
        features = torch.stack(tapped, -1).flatten(-2)
        found.append(whole.llm_cond_proj(whole.llm_cond_norm(features))[0].cpu())
    return time.perf_counter() - started, found


def autoencoder(
    base: Path,
    args: argparse.Namespace,
    dtype: torch.dtype,
    device: torch.device,
    layout: torch.memory_format,
) -> tuple[float, None]:
    """Pictures of 1024 x 1024 (nano: 128 x 128) through the autoencoder, decoded beforehand."""
    side = 128 if args.size == "nano" else 1024
    vae = load_vae(base, dtype=dtype, device=device).to(memory_format=layout)
    pixels = torch.rand(3, side, side) * 2 - 1
    decoded: Future[torch.Tensor] = Future()
    decoded.set_result(pixels.pin_memory() if device.type == "cuda" else pixels)

    def encode(count: int) -> None:
        deque(encode_in_turn(vae, [("", decoded)] * count), maxlen=0)

    encode(3)  # chooses kernels
    return timed(partial(encode, args.pictures)), None


PARTS = {"decode": decode, "cache": cache, "index": index, "batches": batches, "scale": scale,
         "encoders": encoders}  # fmt: skip
USUAL = ("decode", "cache", "index", "batches")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(USUAL))
    parser.add_argument(
        "--folder", type=Path, help="a folder on the disk to measure; default: the temporary one"
    )
    parser.add_argument("--megabytes", type=int, default=2048, help="latents to write and read")
    parser.add_argument("--repeat", type=int, default=8, help="times that eight photographs are decoded")
    parser.add_argument("--entries", type=int, default=20_000_000, help="entries of the index in `scale`")
    parser.add_argument("--size", choices=["full", "nano"], default="full", help="of the encoders")
    parser.add_argument("--base", type=Path, help="where to make (or find) the base of the encoders")
    parser.add_argument("--captions", type=int, default=1000, help="captions for the encoders")
    parser.add_argument("--pictures", type=int, default=64, help="pictures for the autoencoder")
    parser.add_argument("--note", default="", help="kept in the JSON: what else the machine was doing")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = environment(device) | {"cores": os.cpu_count(), "note": args.note}
    # Parts that are measured elsewhere, or at other times, stay in the file.
    there = json.loads(Path(args.json).read_text()) if args.json and Path(args.json).exists() else {}
    results: dict[str, Any] = {name: part for name, part in there.items() if name in PARTS}
    for name in args.only:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
            results[name] = PARTS[name](Path(scratch), args) | {"machine": machine}
        print(f"{name}: {time.perf_counter() - started:.0f} s")
        show(results[name])
        sys.stdout.flush()
        write_json(args.json, results)


def show(rows: dict[str, Any], indent: str = "  ") -> None:
    for name, value in rows.items():
        if isinstance(value, dict):
            print(f"{indent}{name}")
            show(value, indent + "  ")
        else:
            print(
                f"{indent}{name:<40} {value:,.4g}"
                if isinstance(value, float)
                else f"{indent}{name:<40} {value}"
            )


if __name__ == "__main__":
    main()
