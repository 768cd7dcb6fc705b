"""The plan: everything that a run needs to know, decided and written down before it starts.

A :class:`Plan` is a frozen value, and plan.json is the same thing as text: equal plans give equal bytes, and
reading the text gives the plan back. The engine reads a plan and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ideoflow.diagnostics import Collector, Diagnostic, Span, fail
from ideoflow.diagnostics.codes import Code
from ideoflow.diagnostics.codes.plan import BAD_PLAN, NO_PLAN, OTHER_FORMAT
from ideoflow.model.base import BaseFacts
from ideoflow.plan.codec import Mismatch, decode, encode
from ideoflow.recipe import RecipeTables
from ideoflow.recipe.load import load_tables

FORMAT = 5

# What the fused engine is made of: its kernels, and attention over samples of mixed lengths.
GPU_PACKAGES = ("triton", "cudnn", "flash-attn-4")

Value = str | bool | int | float
Phase = Literal["text", "latents", "train", "sample"]
PHASES: tuple[Phase, ...] = ("text", "latents", "train", "sample")


@dataclass(frozen=True)
class Rejected:
    """An alternative that was not taken; the deltas are against what was, in the peak and in one step.

    ``delta_bytes`` and ``delta_ms`` are None where the alternative cannot run here at all.
    """

    value: Value
    reason_code: str
    delta_bytes: int | None = None
    delta_ms: float | None = None


@dataclass(frozen=True)
class Decision:
    """One thing that was decided: what, by whom (the recipe or the planner) and why."""

    id: str
    value: Value
    source: Literal["recipe", "auto"]
    reason_code: str
    reason: str
    evidence: str = ""
    rejected: tuple[Rejected, ...] = ()


@dataclass(frozen=True)
class Bucket:
    """Crops of one size, after resizing; ``width`` and ``height`` in pixels.

    ``cut_away`` is the mean part of a picture's area, 0..1, that lies outside the crop; ``enlarged`` counts
    those that have fewer pixels than the size.
    """

    width: int
    height: int
    count: int
    cut_away: float = 0.0
    enlarged: int = 0


@dataclass(frozen=True)
class Cached:
    """What of a data set is encoded already, in one type of numbers: captions (prompts too) and crops."""

    dtype: str
    captions: int
    crops: int


@dataclass(frozen=True)
class DataSummary:
    """Facts about the data set.

    ``text_tokens`` is the (least, median, greatest) length of its captions in tokens, and ``digest`` changes
    with any picture or caption. ``captions`` counts the different texts that are encoded, variants included
    (None: one a crop), and ``cached`` says what of all this the machine at hand has encoded before.
    """

    pictures: int
    warnings: int
    buckets: tuple[Bucket, ...]
    text_tokens: tuple[int, int, int]
    text_tokens_estimated: bool
    digest: str
    captions: int | None = None
    cached: tuple[Cached, ...] = ()

    @property
    def texts(self) -> int:
        """Different texts that are encoded."""
        return self.crops if self.captions is None else self.captions

    def cached_as(self, dtype: str) -> Cached:
        """What is encoded already in numbers of type ``dtype``, as torch calls it."""
        return next((c for c in self.cached if c.dtype == dtype), Cached(dtype, 0, 0))

    @property
    def crops(self) -> int:
        """What is encoded: every crop of every picture, each with words of its own."""
        return sum(b.count for b in self.buckets)


@dataclass(frozen=True)
class Rates:
    """What a device does in a second, dense and without sparsity.

    ``bf16_tflops``, ``fp8_tflops`` and ``fp32_tflops`` are of matrix products (None: no such units);
    ``memory_gbps`` and ``host_gbps`` are 1e9 bytes/s to its own memory and to the host's. ``source`` says
    where the figures are from.
    """

    bf16_tflops: float
    fp32_tflops: float
    memory_gbps: float
    host_gbps: float
    fp8_tflops: float | None = None
    fp4_tflops: float | None = None
    source: str = ""


@dataclass(frozen=True)
class Hardware:
    """The machine that a plan is for; sizes in bytes.

    On a CPU ``total_bytes`` and ``free_bytes`` are the host's own. ``free_bytes`` is what a run may take.
    ``compute_capability`` is CUDA's, ``rates`` None where nothing is known of the device's speed.
    ``packages`` are those of :data:`GPU_PACKAGES` that are installed; a card that is only named has all.
    """

    name: str
    kind: Literal["cuda", "cpu", "mps", "rocm"]
    total_bytes: int
    free_bytes: int
    compute_capability: tuple[int, int] | None = None
    fast_bf16: bool = True
    host_bytes: int | None = None
    host_free_bytes: int | None = None
    disk_free_bytes: int | None = None
    pcie_generation: int | None = None
    pcie_width: int | None = None
    other_processes: int = 0
    rates: Rates | None = None
    packages: tuple[str, ...] = ()
    source: Literal["measured", "profile"] = "measured"
    note: str = ""


@dataclass(frozen=True)
class LedgerLine:
    """Bytes that one thing holds at the peak of a phase, and where the figure comes from."""

    phase: Phase
    name: str
    bytes: int
    calibrated: bool
    evidence: str


@dataclass(frozen=True)
class Ledger:
    """Predicted device memory, line by line, for each phase of a run."""

    lines: tuple[LedgerLine, ...]

    def of(self, phase: Phase) -> tuple[LedgerLine, ...]:
        """The lines of one phase."""
        return tuple(line for line in self.lines if line.phase == phase)

    def peak(self, phase: Phase) -> int:
        """Bytes at the peak of ``phase``; 0 for a phase that does not happen."""
        return self._peaks[phase]

    @cached_property
    def _peaks(self) -> dict[Phase, int]:
        peaks = dict.fromkeys(PHASES, 0)
        for line in self.lines:
            peaks[line.phase] += line.bytes
        return peaks

    @property
    def peak_phase(self) -> Phase:
        """The phase that needs most."""
        return max(PHASES, key=self.peak)

    @property
    def peak_bytes(self) -> int:
        return self.peak(self.peak_phase)


@dataclass(frozen=True)
class TimePart:
    """Milliseconds of one optimiser step that one kind of work takes."""

    name: str
    ms: float
    evidence: str


@dataclass(frozen=True)
class TimeEstimate:
    """Predicted wall time: one optimiser step by parts, and the stages of the whole run in seconds."""

    parts: tuple[TimePart, ...]
    compile_seconds: float
    encode_seconds: float
    train_seconds: float
    sample_seconds: float
    calibrated: bool
    evidence: str

    @property
    def step_ms(self) -> float:
        """One optimiser step, accumulation included."""
        return sum(part.ms for part in self.parts)

    @property
    def total_seconds(self) -> float:
        return self.compile_seconds + self.encode_seconds + self.train_seconds + self.sample_seconds


@dataclass(frozen=True)
class DiskSizes:
    """Bytes that a run writes: the adapter's file, and the two caches (None where the data is unknown)."""

    adapter: int
    checkpoint: int
    latents: int | None
    text: int | None


@dataclass(frozen=True)
class Change:
    """A change to the recipe that would save memory; or ``together`` several, which ``value`` then names.

    ``peak_bytes`` is the peak with it, ``delta_ms`` what it adds to one step (None: unknown) and ``quality``
    what it costs in results, 0 for nothing; ``note`` says it in words.
    """

    setting: str
    value: Value
    peak_bytes: int
    fits: bool
    delta_ms: float | None
    quality: int
    note: str

    @property
    def words(self) -> str:
        """What to do: as it stands in the recipe, where it does."""
        others = {"together": f"{self.value}", "other processes": "close the other processes",
                  "another card": f"another card: {self.value}"}  # fmt: skip
        return others.get(self.setting, f"{self.setting} = {self.value}")


@dataclass(frozen=True)
class Digests:
    """What a plan was made from."""

    recipe: str
    captions: str | None
    base: str


@dataclass(frozen=True)
class Plan:
    """A run, decided: all that the engine reads.

    ``tables`` are the recipe's settings with defaults filled in, ``targets`` the modules that get an adapter,
    in the model's order. ``changes`` are ranked, cheapest first, and empty where the plan fits.
    ``host_bytes`` is what waits in the host's memory beside a GPU: weights, moments, activations.
    """

    format: int
    name: str
    recipe_path: str
    digests: Digests
    tables: RecipeTables
    base: BaseFacts
    targets: tuple[str, ...]
    hardware: Hardware
    data: DataSummary | None
    decisions: tuple[Decision, ...]
    ledger: Ledger
    time: TimeEstimate | None
    sizes: DiskSizes
    warnings: tuple[Diagnostic, ...] = ()
    changes: tuple[Change, ...] = ()
    host_bytes: int = 0

    def decision(self, id: str) -> Decision:
        """The decision called ``id``.

        Raises:
            KeyError: if there is none.
        """
        for decision in self.decisions:
            if decision.id == id:
                return decision
        raise KeyError(f"the plan decides nothing called {id!r}")

    def value(self, id: str) -> Value:
        """What was decided for ``id``; raises KeyError like :meth:`decision`."""
        return self.decision(id).value

    @property
    def processes(self) -> int:
        """How many processes train together; a plan for one has no decision about it."""
        return next((int(d.value) for d in self.decisions if d.id == "processes"), 1)

    @property
    def fits(self) -> bool:
        """Whether every phase stays within the device's free memory."""
        return self.ledger.peak_bytes <= self.hardware.free_bytes

    def to_json(self) -> str:
        """plan.json's text: the same bytes for the same plan."""
        return json.dumps(encode(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, path: str | Path = "plan.json") -> Plan:
        """The plan that ``text`` holds; ``path`` is only named in diagnostics.

        Raises:
            IdeoflowError: if it is no plan, damaged, or of another format version.
        """
        span = Span(str(path))
        cure = "make it again: ideoflow plan RECIPE -o FILE"
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            fail(BAD_PLAN, f"not JSON: {error}", span, cure=cure)
        if not isinstance(data, dict) or "format" not in data:
            fail(BAD_PLAN, "not a plan: it has no format version", span, cure=cure)
        if data["format"] != FORMAT:
            wanted = f"this ideoflow reads version {FORMAT}"
            fail(OTHER_FORMAT, f"the plan has format version {data['format']!r}; {wanted}", span, cure=cure)
        try:
            plan = decode(cls, data, special={RecipeTables: lambda tables, _: _tables(tables, span)})
        except Mismatch as mismatch:
            fail(BAD_PLAN, f"'{mismatch.where}': {mismatch}", span, cure=cure)
        assert isinstance(plan, Plan)
        return plan


def load_plan(path: str | Path) -> Plan:
    """Reads a plan file.

    Raises:
        IdeoflowError: if it cannot be read, or as :meth:`Plan.from_json` says.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        fail(
            NO_PLAN, f"cannot read {file}: {reason}", cure="give the path of a file that ideoflow plan wrote"
        )
    return Plan.from_json(text, file)


def _tables(data: Any, span: Span) -> RecipeTables:
    if not isinstance(data, Mapping):
        raise Mismatch("tables", "must be a table")
    problems = Collector()

    def report(code: Code, at: tuple[str | int, ...], message: str, cure: str, label: str) -> None:
        where = ".".join(map(str, ("tables", *at)))
        problems.add(BAD_PLAN, f"'{where}': {message}", span, cure="make the plan again from its recipe")

    # A plan has every table, so a missing one is damage here even where a recipe may leave it out.
    for field in fields(RecipeTables):
        if field.name not in data:
            raise Mismatch(f"tables.{field.name}", "missing")
    tables = load_tables(data, report)
    problems.raise_if_errors()
    assert tables is not None, "load_tables reports what it refuses"
    return tables
