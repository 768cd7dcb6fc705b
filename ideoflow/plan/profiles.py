"""Cards that people own: memory, abilities and speed, for plans made without the card at hand.

Matrix rates are dense (no sparsity) with float32 accumulation, in TFLOP/s. GeForce cards do half there of
what they do with float16 accumulation: twice their float32 rate in bf16, four times in FP8. Memory is what
``nvidia-smi`` reports, in MiB; bandwidth in GB/s. They are peaks: what a training step gets of them is the
time model's efficiency, which is measured.

| cards | sources |
|---|---|
| all NVIDIA | compute capability: developer.nvidia.com/cuda-gpus |
| RTX 30 | NVIDIA's GA102 white paper; its announced figures of the 3070, 3080 and 3090 |
| RTX 40 | NVIDIA's Ada white paper (a 4090: 82.6 float32, 165.2 bf16, 330.3 FP8) |
| RTX 50 | NVIDIA's RTX Blackwell white paper (a 5090: 3352 sparse FP4, half of it dense) |
| A10, A10G, A100, A6000, T4 | NVIDIA's data sheets; the A10G's as AWS gives them |
| L4, L40S, RTX 6000 Ada, RTX PRO 6000 | NVIDIA's data sheets, whose starred or sparse figures are halved |
| H100, H200, B200 | NVIDIA's data sheets, halved likewise; a B200's memory as DGX B200's, 180 GB |
| MI300X | AMD's data sheet |
| Apple | Apple's bandwidths; float32 rates are cores x clock x 256, as others measured the clocks |
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from ideoflow.plan.document import GPU_PACKAGES, Hardware, Rates

MIB, GIB = 1 << 20, 1 << 30
# The driver keeps this share for itself: torch sees 143156 of an H200's 143771 MiB, 24217 of a 4090's 24564.
DRIVER_SHARE = 0.015
# A desktop with a browser on the same card, which GeForce cards usually carry.
_DESKTOP = 700 * MIB


@dataclass(frozen=True)
class Profile:
    """A card as its maker describes it.

    ``pcie`` is (generation, lanes); ``capability`` CUDA's; rates as in the module's docstring.
    """

    key: str
    title: str
    mib: int
    capability: tuple[int, int] | None
    bf16: float
    fp32: float
    bandwidth: float
    pcie: tuple[int, int] | None
    fp8: float | None = None
    fp4: float | None = None
    desktop: bool = False
    kind: str = "cuda"


def _geforce(
    key: str,
    mib: int,
    capability: tuple[int, int],
    fp32: float,
    bandwidth: float,
    pcie: tuple[int, int] = (4, 16),
    fp4: float | None = None,
) -> Profile:
    """GeForce since Ampere: bf16 at twice the float32 rate, FP8 (from sm_89) at four times."""
    title = "RTX " + key.removeprefix("rtx-").replace("-", " ").replace("ti", "Ti").replace("super", "Super")
    title = re.sub(r"(\d+)gb", r"\1GB", title)
    fp8 = 4 * fp32 if capability >= (8, 9) else None
    return Profile(key, title, mib, capability, 2 * fp32, fp32, bandwidth, pcie, fp8, fp4, desktop=True)


_AMPERE, _ADA, _HOPPER, _BLACKWELL, _RTX_BLACKWELL = (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)

PROFILES: tuple[Profile, ...] = (
    _geforce("rtx-3060", 12288, _AMPERE, 12.7, 360),
    _geforce("rtx-3060-ti", 8192, _AMPERE, 16.2, 448),
    _geforce("rtx-3070", 8192, _AMPERE, 20.3, 448),
    _geforce("rtx-3080", 10240, _AMPERE, 29.8, 760),
    _geforce("rtx-3080-ti", 12288, _AMPERE, 34.1, 912),
    _geforce("rtx-3090", 24576, _AMPERE, 35.6, 936),
    _geforce("rtx-3090-ti", 24564, _AMPERE, 40.0, 1008),
    _geforce("rtx-4060", 8188, _ADA, 15.1, 272, (4, 8)),
    _geforce("rtx-4060-ti", 8188, _ADA, 22.1, 288, (4, 8)),
    _geforce("rtx-4060-ti-16gb", 16380, _ADA, 22.1, 288, (4, 8)),
    _geforce("rtx-4070", 12282, _ADA, 29.1, 504),
    _geforce("rtx-4070-super", 12282, _ADA, 35.5, 504),
    _geforce("rtx-4070-ti", 12282, _ADA, 40.1, 504),
    _geforce("rtx-4070-ti-super", 16376, _ADA, 44.1, 672),
    _geforce("rtx-4080", 16376, _ADA, 48.7, 717),
    _geforce("rtx-4080-super", 16376, _ADA, 52.2, 736),
    _geforce("rtx-4090", 24564, _ADA, 82.6, 1008),
    _geforce("rtx-5060-ti", 8151, _RTX_BLACKWELL, 23.7, 448, (5, 8), 379),
    _geforce("rtx-5060-ti-16gb", 16311, _RTX_BLACKWELL, 23.7, 448, (5, 8), 379),
    _geforce("rtx-5070", 12227, _RTX_BLACKWELL, 30.9, 672, (5, 16), 494),
    _geforce("rtx-5070-ti", 16303, _RTX_BLACKWELL, 43.9, 896, (5, 16), 703),
    _geforce("rtx-5080", 16303, _RTX_BLACKWELL, 56.3, 960, (5, 16), 900),
    _geforce("rtx-5090", 32607, _RTX_BLACKWELL, 104.8, 1792, (5, 16), 1676),
    Profile("t4", "T4", 15360, (7, 5), 65, 8.1, 320, (3, 16)),
    Profile("a10", "A10", 23028, _AMPERE, 125, 31.2, 600, (4, 16)),
    Profile("a10g", "A10G", 23028, _AMPERE, 70, 35, 600, (4, 16)),
    Profile("l4", "L4", 23034, _ADA, 121, 30.3, 300, (4, 16), 242),
    Profile("l40s", "L40S", 46068, _ADA, 362, 91.6, 864, (4, 16), 733),
    Profile("rtx-a6000", "RTX A6000", 49140, _AMPERE, 154.8, 38.7, 768, (4, 16)),
    Profile("rtx-6000-ada", "RTX 6000 Ada", 49140, _ADA, 364, 91.1, 960, (4, 16), 728),
    Profile("rtx-pro-6000", "RTX PRO 6000", 97887, _RTX_BLACKWELL, 503, 125, 1792, (5, 16), 1007, 2015),
    Profile("a100-40gb", "A100 40GB", 40960, (8, 0), 312, 19.5, 1555, (4, 16)),
    Profile("a100-80gb", "A100 80GB", 81920, (8, 0), 312, 19.5, 2039, (4, 16)),
    Profile("h100-pcie", "H100 PCIe", 81559, _HOPPER, 756, 51, 2000, (5, 16), 1513),
    Profile("h100", "H100", 81559, _HOPPER, 989, 67, 3350, (5, 16), 1979),
    Profile("h200", "H200", 143771, _HOPPER, 989, 67, 4800, (5, 16), 1979),
    Profile("b200", "B200", 183359, _BLACKWELL, 2250, 75, 8000, (5, 16), 4500, 9000),
    Profile("mi300x", "MI300X", 196288, None, 1307, 163.4, 5300, (5, 16), 2615, kind="rocm"),
    Profile("m2-ultra", "Apple M2 Ultra", 131072, None, 27.2, 27.2, 800, None, kind="mps"),
    Profile("m3-max", "Apple M3 Max", 65536, None, 14.1, 14.1, 400, None, kind="mps"),
    Profile("m4-max", "Apple M4 Max", 65536, None, 18.4, 18.4, 546, None, kind="mps"),
)
_BY_KEY = {p.key: p for p in PROFILES}
_ALIASES = {
    "a100": "a100-80gb",
    "h100-sxm": "h100",
    "rtx-4060-ti-8gb": "rtx-4060-ti",
    "rtx-3060-12gb": "rtx-3060",
}
_SIZE = re.compile(r"([1-9]\d{0,2})(?:-?gi?b)")


def profile_names() -> list[str]:
    """Every name that ``--gpu`` takes, besides plain sizes such as ``16gb``."""
    return [p.key for p in PROFILES]


@cache
def _normal(name: str) -> str:
    """A name as the table has it: ``rtx-4090`` for ``NVIDIA GeForce RTX 4090`` and for ``4090``."""
    words = re.sub(r"[\s_-]+", "-", name.strip().lower())
    words = re.sub(r"\b(nvidia|geforce|amd|instinct|apple|tesla)\b-?", "", words)
    words = re.sub(
        r"-(sxm\d?|hbm\de?|generation|gpu|blackwell|workstation|server|edition|max-q)\b", "", words
    )
    words = re.sub(r"-pcie(?=-\d+gb)", "", words)
    words = re.sub(r"^rtx(?=\d)", "rtx-", words).strip("-")
    words = re.sub(r"(?<=\d)(?=ti\b|super\b)", "-", words)
    words = f"rtx-{words}" if re.match(r"[345]0\d0\b", words) else words
    return _ALIASES.get(words, words)


def find_profile(name: str, total_bytes: int | None = None) -> Profile | None:
    """The profile of a card by its name, as people or as NVML write it.

    One name may come with several memory sizes, of which ``total_bytes`` chooses. It must agree within a
    tenth: a slice of a card (MIG) and a laptop's chip of the same name are other devices.
    """
    wanted = _normal(name)
    if total_bytes is None:
        return _BY_KEY.get(wanted) or _BY_KEY.get(re.sub(r"-\d+gb$", "", wanted))
    bare = re.sub(r"-\d+gb$", "", wanted)
    family = [p for p in PROFILES if re.sub(r"-\d+gb$", "", p.key) == bare]
    return next((p for p in family if abs(p.mib * MIB - total_bytes) < 0.1 * total_bytes), None)


def profile_rates(profile: Profile) -> Rates:
    """The profile's speeds, with what its link to the host carries in practice."""
    host = link_gbps(*profile.pcie) if profile.pcie else profile.bandwidth
    source = f"data sheet of the {profile.title}"
    return Rates(profile.bf16, profile.fp32, profile.bandwidth, host, profile.fp8, profile.fp4, source)


def link_gbps(generation: int, lanes: int) -> float:
    """Practical GB/s of a PCI Express link: 8, 16, 32 GT/s a lane, 128b/130b coding, seven eighths of that.

    An H200's link of generation 5 carried 55.3 GB/s of its 63 either way.

    PCI Express Base Specification: generation 3 is 8 GT/s, and each one after it doubles.
    """
    per_lane = 2.0 ** (generation - 3) * 8 / 8 * 128 / 130
    return round(0.875 * per_lane * lanes, 1)


def hardware_from_profile(name: str) -> Hardware | None:
    """The machine that ``--gpu NAME`` stands for: a card's name, or a memory size such as ``16gb``."""
    size = _SIZE.fullmatch(name.strip().lower())
    if size:
        total = int(size[1]) * GIB
        free = total - int(DRIVER_SHARE * total) - (_DESKTOP if total <= 32 * GIB else 0)
        note = "a card of this size, of unknown speed"
        return Hardware(
            f"{size[1]} GB card", "cuda", total, free, packages=GPU_PACKAGES, source="profile", note=note
        )
    profile = find_profile(name)
    if profile is None:
        return None
    total = profile.mib * MIB
    free = total - int(DRIVER_SHARE * total) - (_DESKTOP if profile.desktop else 0)
    note = "free memory assumes a desktop on the same card" if profile.desktop else ""
    if profile.kind == "mps":
        # macOS lets the GPU take about three quarters of the unified memory.
        free, note = total * 3 // 4, "unified memory: the GPU may take about three quarters"
    generation, lanes = profile.pcie or (None, None)
    return Hardware(
        profile.title,
        profile.kind,  # type: ignore[arg-type]
        total,
        free,
        profile.capability,
        fast_bf16=profile.capability is None or profile.capability >= (8, 0),
        pcie_generation=generation,
        pcie_width=lanes,
        rates=profile_rates(profile),
        packages=GPU_PACKAGES if profile.kind == "cuda" else (),
        source="profile",
        note=note,
    )
