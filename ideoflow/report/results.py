"""The top of the page: how the run went, its adapter file, and the pictures before and after."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ideoflow.model.spec import TransformerSpec
from ideoflow.plan.adapters import rank_words
from ideoflow.plan.document import Plan
from ideoflow.report.history import History, Sample
from ideoflow.report.markup import Child, Html, tag
from ideoflow.report.parts import masthead, remark, section
from ideoflow.report.pictures import embed, mean_change, open_picture, spread
from ideoflow.report.training import trend
from ideoflow.report.units import duration, number, plural, size, without_home

# What keeps a page of many prompts and steps at a size that can be sent around.
LARGE, MEDIUM, SMALL = 768, 384, 224  # longer side in pixels: few prompts, many prompts, filmstrip
MANY_PROMPTS, MOST_PROMPTS, STRIP = 12, 48, 8
_LONG_SENTENCE = 320


def find_file(folder: Path, recorded: str) -> Path:
    """A file that the run recorded, wherever the folder has been moved to since."""
    return next((f for f in (folder / recorded, folder / Path(recorded).name) if f.is_file()), Path(recorded))


# Headline -------------------------------------------------------------------------------------------------


def status(plan: Plan, history: History) -> tuple[str, str]:
    """(style, sentence) of how the run ended."""
    done, total = f"{history.step:,}", plural(plan.tables.train.steps, "step")
    if history.ending == "finished":
        return "good", f"Finished: {done} of {total}"
    again = f"`ideoflow run {without_home(plan.recipe_path)}` goes on"
    if history.ending == "stopped":
        return "warn", f"Stopped after {done} of {total}; {again}"
    if not history.starts:
        return "warn", "Nothing has been recorded of this run yet"
    kept = f"step {history.checkpoint:,}" if history.checkpoint else "the beginning"
    return "warn", f"Not ended after {done} of {total}: still running, or cut off; {again} from {kept}"


def headline(folder: Path, plan: Plan, history: History) -> Html:
    """Name, state and the figures that are asked for first."""
    style, sentence = status(plan, history)
    adapter, train = plan.tables.adapter, plan.tables.train
    file = find_file(folder, history.adapter) if history.adapter else None
    tiles = [("steps", f"{history.step:,}", f"of {train.steps:,}")]
    if history.seconds is not None:
        partly = len(history.starts) > 1 and history.ending == "open"
        note = "without a start that was cut off" if partly else "wall time"
        tiles.append(("time", duration(history.seconds), note))
    found = trend([s.loss for s in history.steps if s.loss is not None])
    if found:
        (before, _), (after, _), count = found
        tiles.append(("loss", f"{before:.2f} → {after:.2f}", f"mean of the first and last {count} steps"))
    peaks = [stage.peak_bytes for stage in history.stages if stage.peak_bytes is not None]
    if peaks:
        device = "process memory" if plan.hardware.kind == "cpu" else "device memory"
        tiles.append(("peak", size(max(peaks)), device))
    if file and file.is_file():
        tiles.append(("adapter", size(file.stat().st_size), f"{adapter.kind}, {rank_words(adapter)}"))
    if plan.data:
        tiles.append(("pictures", f"{plan.data.pictures:,}", plural(len(plan.data.buckets), "size")))
    return masthead("Ideogram 4 LoRA, training report", plan, sentence, style, tiles)


def use_it(folder: Path, plan: Plan, history: History) -> Html | None:
    """Where the adapter is and how it is loaded."""
    if not history.adapter:
        return None
    file = find_file(folder, history.adapter)
    if not file.is_file():
        return section(
            "use", "The adapter", remark(f"The adapter file {file.name} is no longer where it was written.")
        )
    shown = without_home(file.as_posix())
    written = size(file.stat().st_size)
    kind, form = plan.tables.adapter.kind, plan.tables.output.format
    comfy: list[Child] = [
        tag(
            "p",
            "Copy the file into this folder and choose it in a ",
            tag("b", "LoraLoaderModelOnly"),
            " node.",
        ),
        tag("pre", tag("code", "ComfyUI/models/loras/"), class_="code", tabindex="0"),
    ]
    if plan.base.transformer != TransformerSpec():
        spec = plan.base.transformer
        comfy.append(
            remark(
                f"This base has {spec.num_layers} blocks of width {spec.hidden}. The released Ideogram 4 "
                "that ComfyUI loads has other sizes, so this adapter fits only its own base."
            )
        )
    if form == "diffusers":
        comfy = [remark("ComfyUI has no q, k and v apart: set output.format = 'comfyui', or convert the file "
                        "with ideoflow adapter convert.")]  # fmt: skip
    if form == "both" and kind != "lora":
        file = file.with_suffix(".diffusers.safetensors")
    python = tag("pre", tag("code", snippet(plan, file)), class_="code", tabindex="0")
    if form == "comfyui" and kind != "lora":
        python = remark(
            f"diffusers does not read a {kind} from this file; docs/adapters.md says what reads it."
        )
    how = tag(
        "div",
        tag("div", tag("h3", "diffusers"), python),
        tag("div", tag("h3", "ComfyUI"), *comfy),
        class_="two",
    )
    return section(
        "use",
        "The adapter",
        tag("p", tag("code", shown, class_="path"), f" ({written})"),
        _disclosed("How to load it in diffusers and ComfyUI", how),
    )


def snippet(plan: Plan, file: Path) -> str:
    """Python that loads the adapter with diffusers."""
    validate, resolution, kind = plan.tables.validate, plan.tables.data.resolution, plan.hardware.kind
    # torch calls AMD's cards cuda as well.
    device = "" if kind == "cpu" else f'.to("{"cuda" if kind == "rocm" else kind}")'
    load = "transformer.load_lora_adapter" if plan.tables.adapter.kind == "lokr" else "load_lora_weights"
    lines = (
        "from pathlib import Path",
        "",
        "import torch",
        "from diffusers import Ideogram4Pipeline",
        "",
        "pipeline = Ideogram4Pipeline.from_pretrained(",
        f"    {_base(plan)},",
        f"    dtype=torch.{'bfloat16' if plan.base.storage == 'bf16' else 'float32'},",
        f"){device}",
        f"pipeline.{load}(",
        f"    {_path(file.parent)},",
        f"    weight_name={file.name!r},",
        ")",
        "",
        "# JSON, as `ideoflow captions compile` writes it",
        'caption = Path("caption.json").read_text(encoding="utf-8")',
        "picture = pipeline(",
        "    caption,",
        f"    width={validate.width or resolution},",
        f"    height={validate.height or resolution},",
        ").images[0]",
        'picture.save("picture.png")',
    )
    return "\n".join(lines)


def _base(plan: Plan) -> str:
    """What ``from_pretrained`` is given: a hub id, or the base's folder on this disk."""
    folder, revision = plan.base.folder, plan.tables.model.revision
    if folder is None or "snapshots" in folder.parts:
        return f"{plan.base.name!r}" + (f", revision={revision!r}" if revision else "")
    return _path(folder)


def _path(path: Path) -> str:
    short = without_home(path.as_posix())
    return f"Path({short!r}).expanduser()" if short.startswith("~") else repr(short)


# Pictures -------------------------------------------------------------------------------------------------


def pictures(folder: Path, plan: Plan, history: History) -> Html:
    """Before and after of each prompt, and the steps between."""
    prompts: dict[str, list[Sample]] = {}
    for sample in history.samples:
        prompts.setdefault(sample.prompt, []).append(sample)
    if not prompts:
        why = "The recipe names no prompts" if not plan.tables.validate.prompts else "No picture was made"
        return section("pictures", "Before and after", remark(f"{why}, so there is nothing to compare."))
    shown = list(prompts.items())[:MOST_PROMPTS]
    side = LARGE if len(shown) <= MANY_PROMPTS else MEDIUM
    left_out = len(prompts) - len(shown)
    more = (
        f"{plural(left_out, 'more prompt')} left out to keep this page small; the run's folder has them all."
    )
    return section(
        "pictures",
        "Before and after",
        remark("The same caption, the same seed, the same noise: only the adapter differs. ", guidance(plan)),
        [_prompt(folder, name, samples, side) for name, samples in shown],
        remark(more) if left_out else None,
    )


def guidance(plan: Plan) -> str:
    """How the pictures were sampled, in a sentence or two."""
    settings = plan.tables.validate
    steps = f", {plural(settings.steps, 'step')}" if settings.steps else ""
    how = f"Sampled with the preset '{settings.preset}'{steps}"
    if settings.guidance is not None:
        how += f", guidance {number(settings.guidance)}"
        if settings.guidance == 1:
            return how + ": at guidance 1 no unconditional velocity takes part."
    decided = {decision.id: decision.value for decision in plan.decisions}.get("unconditional")
    if decided is None:
        return how + "."
    if decided in ("loaded", "streamed"):
        return (
            how + ", true asymmetric guidance: the base's second transformer gave the unconditional velocity."
        )
    return (
        how
        + ", proxy guidance: the second transformer was not loaded, so the unconditional velocity came from "
        "the trained transformer without text."
    )


def _prompt(folder: Path, name: str, samples: Sequence[Sample], side: int) -> Html:
    first, last, between = samples[0], samples[-1], samples[1:-1]
    caption = next((s.caption for s in reversed(samples) if s.caption), "")
    seed = next((s.seed for s in samples if s.seed is not None), None)
    sentence, pretty = read_caption(caption)
    shown = [(first, _when(first, len(samples)))]
    if last is not first:
        shown.append((last, f"after {plural(last.step, 'step')}"))
    opened = [open_picture(folder, sample.file) for sample, _ in shown]
    pair = [_figure(p, s, side, text) for p, (s, text) in zip(opened, shown, strict=True)]
    chosen = spread(between, STRIP)
    strip = [_figure(open_picture(folder, s.file), s, SMALL, f"step {s.step:,}") for s in chosen]
    facts = []
    if (change := _change(opened)) is not None:
        facts.append(f"Mean change of a pixel: {change * 100:.2g} % of full range.")
    if len(chosen) < len(between):
        facts.append(f"{len(chosen)} of the {len(between):,} pictures in between are shown.")
    return tag(
        "article",
        tag("h3", tag("bdi", name), None if seed is None else tag("small", f"seed {seed}")),
        tag("p", sentence, class_="sentence", dir="auto") if sentence else None,
        tag("div", pair, class_="pair"),
        _strip(strip) if strip else None,
        remark(" ".join(facts)) if facts else None,
        _disclosed("Caption", tag("pre", pretty, dir="auto", tabindex="0")) if pretty else None,
        class_="prompt",
    )


def _strip(figures: Sequence[Html]) -> Html:
    items = [tag("li", figure) for figure in figures]
    return tag("ol", items, class_="strip", tabindex="0", aria_label="the steps between")


def _disclosed(summary: str, inside: Html) -> Html:
    return tag("details", tag("summary", summary), inside)


def _change(opened: Sequence[Image.Image | str]) -> float | None:
    match opened:
        case [Image.Image() as before, Image.Image() as after]:
            return mean_change(before, after)
    return None


def _when(first: Sample, count: int) -> str:
    if first.step == 0:
        return "before training"
    alone = "; there is no other to compare with" if count == 1 else ", the first picture there is"
    return f"after {plural(first.step, 'step')}{alone}"


def _figure(picture: Image.Image | str, sample: Sample, side: int, text: str) -> Html:
    if isinstance(picture, str):
        name = Path(sample.file).name or "the picture"
        inside = tag("div", f"{name} {picture}", class_="missing")
    else:
        shown = embed(picture, side)
        alt = f"{sample.prompt[:120]}, {text}"
        inside = tag("img", src=shown.uri, width=shown.width, height=shown.height, alt=alt, loading="lazy")
    return tag("figure", inside, tag("figcaption", text))


def read_caption(caption: str) -> tuple[str, str]:
    """(first sentence to show, pretty text) of a caption: JSON with indents, prose as it is."""
    try:
        data = json.loads(caption)
        pretty = _pretty(data)
    except (ValueError, RecursionError):
        return "", caption
    if not isinstance(data, dict):
        return "", caption
    sentence = str(data.get("high_level_description") or "")
    if len(sentence) > _LONG_SENTENCE:
        sentence = sentence[:_LONG_SENTENCE].rsplit(" ", 1)[0] + " …"
    return sentence, pretty


def _pretty(value: Any, indent: str = "") -> str:
    """JSON with indents, but lists of plain values, such as boxes, on one line."""
    deeper = indent + "  "
    if isinstance(value, dict) and value:
        items = [f"{json.dumps(k, ensure_ascii=False)}: {_pretty(v, deeper)}" for k, v in value.items()]
        return "{\n" + ",\n".join(deeper + item for item in items) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return "[\n" + ",\n".join(deeper + _pretty(item, deeper) for item in value) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False)
