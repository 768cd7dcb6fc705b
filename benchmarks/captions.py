"""How fast the caption language is, how much memory it takes, how short it is; and a fuzzer.

    python benchmarks/captions.py --json out.json             # speed, memory, cores, size
    python benchmarks/captions.py --only fuzz --count 100000  # nothing but diagnostics may come

Speed is captions compiled a second on one core, from text to JSON that was validated. Each
caption is different: the shipped ones with words exchanged, so that lengths and boxes are realistic.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from ideoflow import resources
from ideoflow.captions import (
    compile_caption,
    decompile_caption,
    format_icap,
    prose_of,
    read_json_caption,
    to_json,
)
from ideoflow.captions.rules import follows_rules
from ideoflow.diagnostics import IdeoflowError, render_text

Captions = list[tuple[str, dict[str, Any]]]


def shipped() -> Captions:
    """The captions of the quickstart, compiled."""
    found = []
    for path in sorted((resources.recipes() / "quickstart").glob("*.icap")):
        result = compile_caption(path.read_text(encoding="utf-8"), path=str(path))
        found += [(path.with_suffix(".jpg").name, one.caption) for one in result.captions]
    return found


def variations(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """``count`` different captions: the shipped ones with words of their own put in other places."""
    chance = random.Random(seed)
    captions = [caption for _, caption in shipped()]
    words = sorted({word for caption in captions for word in re.findall(r"[a-z]{4,}", to_json(caption))})

    def vary(text: str) -> str:
        parts = text.split(" ")
        for _ in range(3):
            parts[chance.randrange(len(parts))] = chance.choice(words)
        return " ".join(parts)

    for number in range(count):
        caption = json.loads(to_json(captions[number % len(captions)]))
        caption["high_level_description"] = vary(caption["high_level_description"])
        for element in caption["compositional_deconstruction"]["elements"]:
            element["desc"] = vary(element["desc"])
        yield caption


def rate(work: Callable[[Any], Any], inputs: Sequence[Any], captions: int) -> float:
    """Captions a second of processor time, the best of three runs."""
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        for one in inputs:
            work(one)
        best = min(best, time.process_time() - start)
    return captions / best


def speed(count: int) -> dict[str, float]:
    captions = list(variations(count))
    sidecars = [decompile_caption([(None, caption)]) for caption in captions]
    many = [decompile_caption([(f"{n}.jpg", c) for n, c in enumerate(captions)], share_styles=True)]
    lines = [to_json(caption) for caption in captions]
    jobs: dict[str, tuple[Callable[[Any], Any], Sequence[Any]]] = {
        "compile, one caption a file": (compile_caption, sidecars),
        "compile, one file, shared styles": (compile_caption, many),
        "format": (format_icap, sidecars),
        "decompile": (lambda caption: decompile_caption([(None, caption)]), captions),
        "read and check JSON": (read_json_caption, lines),
    }
    return {name: rate(work, inputs, count) for name, (work, inputs) in jobs.items()}


def memory(count: int) -> dict[str, float]:
    """Resident MiB after each tenth of ``count`` captions, compiled one after the other."""
    process, table = psutil.Process(), {}
    for number, caption in enumerate(variations(count), 1):
        compile_caption(decompile_caption([(None, caption)]))
        if number % (count // 10) == 0:
            gc.collect()
            table[f"{number:,}"] = process.memory_info().rss / 2**20
    return table


def compile_some(job: tuple[int, int]) -> tuple[float, float]:
    """Compiles captions for a while; returns how many a second of wall time and of processor time."""
    count, seed = job
    texts = [decompile_caption([(None, caption)]) for caption in variations(count, seed)]
    start, worked = time.perf_counter(), time.process_time()
    for text in texts:
        compile_caption(text)
    return count / (time.perf_counter() - start), count / (time.process_time() - worked)


def scaling(count: int, most: int) -> dict[str, float]:
    """Captions a second, all processes together; by processor time it does not matter what else runs here."""
    table = {}
    for jobs in range(1, most + 1):
        with ProcessPoolExecutor(jobs) as pool:
            rates = list(pool.map(compile_some, [(count, seed) for seed in range(jobs)]))
        table[f"{jobs} processes, wall time"] = sum(wall for wall, _ in rates)
        table[f"{jobs} processes, processor time"] = sum(worked for _, worked in rates)
    return table


def size() -> dict[str, float]:
    """Characters of the caption language over characters of the canonical JSON.

    Most of a caption is its words, which no notation can shorten; "syntax" leaves them out on both sides.
    """
    captions = shipped()
    examples = sorted(Path(__file__).parents[1].glob("tests/captions/golden/quickstart_*.icap"))
    sets: dict[str, Captions] = {"12 shipped": captions, "120 of one set": [("", c) for c in variations(120)]}
    for path in examples:
        sets[path.stem] = [("", compile_caption(path.read_text("utf-8")).captions[0].caption)]
    table = {}
    for name, some in sets.items():
        alone = "".join(decompile_caption([(None, caption)]) for _, caption in some)
        # As many as an ordinary training set has, so that a style is written once for all of them.
        several = some if len(some) > 1 else some * 12
        named = [(f"{number}.jpg", caption) for number, (_, caption) in enumerate(several)]
        shared = decompile_caption(named, share_styles=True)
        for how, text, of in (("a file each", alone, some), ("styles shared", shared, several)):
            whole = sum(len(to_json(caption)) for _, caption in of)
            words = sum(len(text) for _, caption in of for _, text in prose_of(caption))
            table[f"{name}, {how}"] = len(text) / whole
            if how == "a file each":
                table[f"{name}, {how}, syntax"] = (len(text) - words) / (whole - words)
    written = sum(len(p.read_text("utf-8")) for p in (resources.recipes() / "quickstart").glob("*.icap"))
    table["12 shipped, as written"] = written / sum(len(to_json(caption)) for _, caption in captions)
    return table


# The fuzzer ---------------------------------------------------------------------------------------------

PIECES = [
    *(
        '"',
        "\\",
        "\\u",
        "#",
        "#FFF",
        "#12345G",
        ":",
        "\n",
        "\r\n",
        "\r",
        "\t",
        "  ",
        "    ",
        "\0",
        "\ufeff",
        "\ud800",
    ),
    *(
        "\u2028",
        "🎞️",
        "غ",
        "y1..2",
        "x9%..1px",
        "w40%",
        "center",
        "obj ",
        "text ",
        "style a",
        "image b",
        "use ",
    ),
    *(
        "palette c: ",
        "defaults",
        "photo: ",
        "art_style: ",
        "@d",
        "{",
        "}",
        "[",
        "]",
        ",",
        "null",
        "NaN",
        "1e999",
    ),
    *("[1,2,3,4]", "<token>", "“", "”", "background:", "color_palette", "bbox", "type"),
]


def mutated(chance: random.Random, text: str) -> str:
    """The text with one to eight pieces inserted, cut, doubled or exchanged."""
    for _ in range(chance.randint(1, 8)):
        a, b = sorted((chance.randint(0, len(text)), chance.randint(0, len(text))))
        b = min(b, a + chance.choice((1, 3, 20, 400)))
        match chance.randrange(6):
            case 0 | 1:
                text = text[:a] + chance.choice(PIECES) + text[a:]
            case 2:
                text = text[:a] + text[b:]
            case 3:
                text = text[:b] + text[a:b] + text[b:]
            case 4:
                text = (
                    text[:a]
                    + chr(chance.choice((chance.randrange(128), chance.randrange(0x11000))))
                    + text[b:]
                )
            case 5:
                lines = text.split("\n")
                chance.shuffle(lines)
                text = "\n".join(lines[: chance.randint(1, 40)])
    return text


def fuzz(count: int, seed: int) -> dict[str, float]:
    """Compiles, formats and reads mutated inputs; anything but captions and diagnostics ends the program."""
    chance = random.Random(seed)
    captions = shipped()
    seeds = [decompile_caption([(None, c)]) for _, c in captions] + [
        decompile_caption(captions, share_styles=True)
    ]
    seeds += [
        p.read_bytes().decode("utf-8") for p in Path(__file__).parents[1].glob("tests/captions/golden/*.icap")
    ]
    lines = [to_json(c) for _, c in captions] + [json.dumps(c, indent=2) for _, c in captions]
    tally = {"inputs": 0, "captions": 0, "with errors": 0, "formatted": 0}
    for _ in range(count):
        tally["inputs"] += 1
        is_json = chance.random() < 0.3
        text = mutated(chance, chance.choice(lines if is_json else seeds))
        try:
            result = read_json_caption(text) if is_json else compile_caption(text)
            render_text(result.diagnostics)
            if not all(follows_rules(one.caption) for one in result.captions):
                raise AssertionError("a caption against the rules")
            tally["captions"] += len(result.captions)
            tally["with errors"] += bool(result.errors)
            for one in result.captions[:1]:
                back = compile_caption(decompile_caption([(None, one.caption)]))
                if [b.json for b in back.captions] != [one.json]:
                    raise AssertionError("decompile and compile do not give the same bytes")
            if not is_json:
                try:
                    once = format_icap(text)
                except IdeoflowError as error:
                    if any(d.code.id == "IC125" for d in error.diagnostics):
                        raise AssertionError("the formatter disagrees with itself") from None
                else:
                    tally["formatted"] += 1
                    if [c.json for c in compile_caption(once).captions] != [c.json for c in result.captions]:
                        raise AssertionError("formatting changed a caption")
        except Exception:
            print(f"input {tally['inputs']} of seed {seed}:\n{text!r}")
            raise
    return dict(tally)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["speed", "memory", "scaling", "size", "fuzz"])
    parser.add_argument("--count", type=int, default=100_000, help="captions for memory, inputs for fuzz")
    parser.add_argument("--jobs", type=int, default=2, help="most processes for scaling")
    parser.add_argument("--seed", type=int, default=0, help="of the fuzzer")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    questions: dict[str, Callable[[], dict[str, float]]] = {
        "speed": lambda: speed(2_000),
        "memory": lambda: memory(args.count),
        "scaling": lambda: scaling(5_000, args.jobs),
        "size": size,
        "fuzz": lambda: fuzz(args.count, args.seed),
    }
    units = {"speed": "captions/s of one core", "memory": "MiB resident", "scaling": "captions/s",
             "size": "characters over JSON", "fuzz": "count"}  # fmt: skip
    wanted = [args.only] if args.only else [name for name in questions if name != "fuzz"]
    figures: dict[str, Any] = {"python": platform.python_version(), "machine": platform.processor() or "cpu"}
    for name in wanted:
        figures[name] = questions[name]()
        print(f"\n{name} ({units[name]})")
        for what, value in figures[name].items():
            print(f"  {what:<45} {value:>10,.3f}" if value < 10 else f"  {what:<45} {value:>10,.0f}")
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
