"""What an adapter of each kind is made of, and so what it takes: numbers learnt, numbers in its file, memory.

For a Linear [out, in], with rank r (``ideoflow.model.spec`` has the sizes, PEFT the definitions):

| kind | weight update | numbers |
|---|---|---|
| lora | B A | r (out + in) |
| dora | rows of W + B A, each scaled to a learnt length | r (out + in) + out |
| loha | (B1 A1) * (B2 A2), elementwise | 2 r (out + in) |
| lokr | w1 (x) w2, out = a b, in = c d, w1 [a, c], w2 [b, d] | a c or r (a + c), and b d or r (b + d) |

A LoKr's w2 (and where w1 is low-rank, its second factor) is one for q, k and v of a block: their updates are
then the thirds of one Kronecker product [3a, c] (x) [b, d] on the fused qkv matrix, which ComfyUI can load.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import isqrt, sqrt
from typing import TypeVar

from ideoflow.model.spec import TransformerSpec
from ideoflow.recipe import AdapterSettings

T = TypeVar("T")
QKV = ("to_q", "to_k", "to_v")


@dataclass(frozen=True)
class AdaptedModule:
    """One adapted Linear [outputs, inputs]; ``rank`` and ``alpha`` as PEFT is told."""

    name: str
    outputs: int
    inputs: int
    rank: int
    alpha: float

    @property
    def attention(self) -> str | None:
        """Where it is one of q, k, v: the attention that it belongs to, ``layers.0.attention``."""
        parent, _, leaf = self.name.rpartition(".")
        return parent if leaf in QKV else None

    def scale(self, settings: AdapterSettings) -> float:
        """What the update is multiplied by."""
        return self.alpha / (sqrt(self.rank) if settings.rslora else self.rank)


@dataclass(frozen=True)
class Kronecker:
    """Shapes of a LoKr: w1 [a, c] and w2 [b, d], each whole or a product of two matrices of its rank."""

    a: int
    b: int
    c: int
    d: int
    whole_first: bool
    whole_second: bool


def adapted_modules(
    settings: AdapterSettings, spec: TransformerSpec, targets: Iterable[str]
) -> tuple[AdaptedModule, ...]:
    """The Linears that are adapted, each with its own rank and alpha."""
    sizes = spec.linears()
    found = []
    for name in targets:
        outputs, inputs = sizes[name]
        rank = _matching(settings.rank_pattern, name, settings.rank)
        alpha = _matching(settings.alpha_pattern, name, settings.alpha or float(rank))
        if settings.full_matrix:  # a rank that PEFT leaves every factor whole for, and the scale 1
            rank = max(outputs, inputs)
            alpha = float(rank)
        found.append(AdaptedModule(name, outputs, inputs, rank, alpha))
    return tuple(found)


def _matching(patterns: Mapping[str, T], name: str, default: T) -> T:
    for glob, value in patterns.items():
        default = value if fnmatchcase(name, glob) else default
    return default


def factorise(dimension: int, factor: int | None) -> tuple[int, int]:
    """A side of a LoKr as a product: ``factor`` times the rest where it divides, else the largest divisor up
    to ``factor`` and the square root (PEFT's ``factorization``)."""
    if factor and dimension % factor == 0:
        return factor, dimension // factor
    most = min(isqrt(dimension), factor or dimension)
    first = next(n for n in range(most, 0, -1) if dimension % n == 0)
    return first, dimension // first


def kronecker(settings: AdapterSettings, module: AdaptedModule) -> Kronecker:
    """The shapes that PEFT gives a LoKr on ``module``."""
    (a, b), (c, d) = (factorise(n, settings.factor) for n in (module.outputs, module.inputs))
    whole_first = not (settings.decompose_both and module.rank < max(a, c) / 2)
    return Kronecker(a, b, c, d, whole_first, module.rank >= max(b, d) / 2)


@dataclass(frozen=True)
class AdapterSize:
    """What an adapter costs where PEFT computes it.

    Args:
        parameters: numbers that are learnt.
        outputs, weights: sums over the adapted Linears of their outputs, and of out x in; ``block_outputs``
            and ``block_weights`` are those of the block that has most, ``largest`` the largest out x in.
        workspace: bytes of the matrices of a weight's size that are alive at once in the reference engine.
    """

    kind: str
    parameters: int
    outputs: int = 0
    block_outputs: int = 0
    weights: int = 0
    block_weights: int = 0
    largest: int = 0
    workspace: int = 0

    @property
    def multiplied(self) -> int:
        """Numbers that each token meets in a product: PEFT makes the dense update of a LoKr or LoHa."""
        return self.weights if self.kind in ("lokr", "loha") else self.parameters

    @property
    def built(self) -> int:
        """Numbers of dense matrices that are made in every pass: updates, or for DoRA's lengths of rows."""
        return 0 if self.kind == "lora" else self.weights

    def kept(self, tokens: int, element: int, *, block: bool) -> int:
        """Bytes that autograd keeps beyond a LoRA's, of one block or of all.

        A dense update in float32 until the gradient of its input is computed; for DoRA, the base layer's
        result and the LoRA's, in float32, whose products with the row scales are differentiated.
        """
        if self.kind == "dora":
            return tokens * (element + 4) * (self.block_outputs if block else self.outputs)
        dense = self.block_weights if block else self.weights
        return 4 * dense if self.kind in ("lokr", "loha") else 0


def adapter_size(settings: AdapterSettings, modules: Sequence[AdaptedModule]) -> AdapterSize:
    """Counts one adapter."""
    blocks: dict[str, list[AdaptedModule]] = {}
    for module in modules:
        blocks.setdefault(module.name.split(".")[1], []).append(module)
    outputs = [sum(m.outputs for m in block) for block in blocks.values()]
    weights = [sum(m.outputs * m.inputs for m in block) for block in blocks.values()]
    largest = max((m.outputs * m.inputs for m in modules), default=0)
    workspace = max((_workspace(settings.kind, m) for m in modules), default=0)
    parameters = learnt_numbers(settings, modules)
    return AdapterSize(settings.kind, parameters, sum(outputs), max(outputs, default=0), sum(weights),
                       max(weights, default=0), largest, workspace)  # fmt: skip


def _workspace(kind: str, m: AdaptedModule) -> int:
    """Float32 matrices beyond those that are kept.

    Going backward, a LoKr has the update's gradient and a copy of it, a LoHa four such; going forward, a DoRA
    has the update, the weight in two types and their sum, and the identity [in, in] that PEFT multiplies.
    """
    square = 4 * m.inputs**2 if kind == "dora" else 0
    return {"lora": 0, "dora": 16, "lokr": 8, "loha": 16}[kind] * m.outputs * m.inputs + square


def learnt_numbers(settings: AdapterSettings, modules: Iterable[AdaptedModule]) -> int:
    """Numbers that are learnt; what q, k and v of a LoKr share is counted once."""
    total, shared = 0, set[str | None]()
    for m in modules:
        if settings.kind == "lokr":
            k = kronecker(settings, m)
            total += k.a * k.c if k.whole_first else k.a * m.rank
            if m.attention is None or m.attention not in shared:
                total += 0 if k.whole_first else m.rank * k.c
                total += k.b * k.d if k.whole_second else m.rank * (k.b + k.d)
            shared.add(m.attention)
        else:
            factors = m.rank * (m.outputs + m.inputs)
            total += {"lora": factors, "dora": factors + m.outputs, "loha": 2 * factors}[settings.kind]
    return total


def file_numbers(settings: AdapterSettings, modules: Sequence[AdaptedModule], form: str) -> int:
    """Numbers in the adapter file of a form of ``output.format``.

    With one qkv, a LoRA (a LoHa: each of its two) has the A's of q, k and v stacked, and their B's on a block
    diagonal whose zeros are stored too; a LoKr has rows of zeros in w1 for what is not adapted.
    """
    if form == "both":
        return sum(file_numbers(settings, modules, one) for one in forms_of(form))
    if form == "diffusers":
        return sum(learnt_numbers(settings, [m]) for m in modules)
    total = 0
    for group in together(modules):
        whole = 3 if group[0].attention else 1
        m, rank = group[0], sum(m.rank for m in group)
        if settings.kind == "lokr":
            k = kronecker(settings, m)
            total += whole * k.a * k.c if k.whole_first else m.rank * (whole * k.a + k.c)
            total += k.b * k.d if k.whole_second else m.rank * (k.b + k.d)
            continue
        factors = rank * (whole * m.outputs + m.inputs)
        extra = whole * m.outputs if settings.kind == "dora" else 0
        total += 2 * factors if settings.kind == "loha" else factors + extra
    return total


def together(modules: Iterable[AdaptedModule]) -> Iterator[list[AdaptedModule]]:
    """The modules by matrix of the fused layout: q, k, v of a block together, every other alone."""
    groups: dict[str, list[AdaptedModule]] = {}
    for module in modules:
        groups.setdefault(module.attention or module.name, []).append(module)
    yield from groups.values()


def rank_words(settings: AdapterSettings) -> str:
    """``rank 32``, ``ranks 8 to 32``, or what a LoKr has in its place."""
    if settings.full_matrix:
        return "full matrices"
    ranks = {settings.rank, *settings.rank_pattern.values()}
    return f"rank {settings.rank}" if len(ranks) == 1 else f"ranks {min(ranks)} to {max(ranks)}"


def forms_of(format: str) -> tuple[str, ...]:
    """The forms that ``output.format`` asks for."""
    return ("comfyui", "diffusers") if format == "both" else (format,)
