"""The machine at hand: NVIDIA cards through NVML, the host through psutil, nothing through torch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from ideoflow.diagnostics import Span, closest, fail
from ideoflow.diagnostics.codes.plan import NO_GPU, NO_NVML, UNKNOWN_GPU
from ideoflow.plan.document import GPU_PACKAGES, Hardware
from ideoflow.plan.profiles import (
    find_profile,
    hardware_from_profile,
    link_gbps,
    profile_names,
    profile_rates,
)
from ideoflow.processes import this_process

_DRIVER = Path("/proc/driver/nvidia/version")


def named_hardware(name: str) -> Hardware:
    """The machine that ``name`` stands for: a card's name, or a size such as ``16gb``.

    Raises:
        IdeoflowError: if no such card is known.
    """
    hardware = hardware_from_profile(name)
    if hardware is None:
        near = closest(name.lower(), profile_names())
        known = ", ".join(profile_names())
        cure = f"did you mean {near}?" if near else f"a memory size such as 16gb, or one of: {known}"
        fail(UNKNOWN_GPU, f"no card is known as '{name}'", cure=cure)
    return hardware


def detect_hardware(device: str = "auto", *, folder: Path = Path(), span: Span | None = None) -> Hardware:
    """The machine at hand.

    Args:
        device: ``auto`` (the GPU where there is one), ``cuda`` or ``cpu``.
        folder: where results go; its free disk space is noted.
        span: the place in the recipe that asks for ``device``.

    Raises:
        IdeoflowError: if ``cuda`` is asked for and no NVIDIA card answers, or a driver is there but
            the package that asks it is not.
    """
    gpu = None if device == "cpu" else _nvidia()
    if gpu is None and device == "cuda":
        cure = "set memory.device = 'auto' or 'cpu', or plan for a named card with --gpu"
        fail(NO_GPU, "device is 'cuda', but no NVIDIA GPU answers here", span, cure=cure)
    return _with_host(gpu or _host_processor(), folder)


def _nvidia() -> Hardware | None:
    """The first visible NVIDIA card, of several processes each one's own, or None where there is none."""
    visible, own = os.environ.get("CUDA_VISIBLE_DEVICES"), this_process().local_rank
    first = str(own)
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        # Where there are fewer than processes, that is told when they join; until then the first one counts.
        first = names[own] if own < len(names) else names[0]
    if first in ("", "-1"):
        return None
    try:
        import pynvml
    except ImportError:
        if _DRIVER.exists():
            cure = "pip install nvidia-ml-py, or name the card: --gpu rtx-4090"
            fail(NO_NVML, "there is an NVIDIA driver, but nvidia-ml-py is not installed", cure=cure)
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        if first.isdigit():
            index = int(first)
            if own and index >= pynvml.nvmlDeviceGetCount():
                index = 0
            return _read_card(pynvml, pynvml.nvmlDeviceGetHandleByIndex(index))
        return _read_card(pynvml, pynvml.nvmlDeviceGetHandleByUUID(first))
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _read_card(nvml: Any, handle: Any) -> Hardware:
    def ask(function: str) -> Any:
        """One fact, or None: some boards and virtual machines do not answer every question."""
        try:
            return getattr(nvml, function)(handle)
        except nvml.NVMLError:
            return None

    name = nvml.nvmlDeviceGetName(handle)
    name = name.decode() if isinstance(name, bytes) else name
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    capability = ask("nvmlDeviceGetCudaComputeCapability")
    major_minor = (int(capability[0]), int(capability[1])) if capability else None
    # An idle link drops to generation 1, so the greatest is asked for, and the width that is really wired.
    generation, lanes = ask("nvmlDeviceGetMaxPcieLinkGeneration"), ask("nvmlDeviceGetCurrPcieLinkWidth")
    others = {
        process.pid
        for kind in ("Compute", "Graphics")
        for process in ask(f"nvmlDeviceGet{kind}RunningProcesses") or ()
    }
    profile = find_profile(name, memory.total)
    rates = profile_rates(profile) if profile else None
    if rates and generation and lanes:
        rates = replace(rates, host_gbps=link_gbps(int(generation), int(lanes)))
    return Hardware(
        name.removeprefix("NVIDIA ").removeprefix("GeForce "),
        "cuda",
        memory.total,
        memory.free,
        major_minor,
        fast_bf16=major_minor is None or major_minor >= (8, 0),
        pcie_generation=generation,
        pcie_width=lanes,
        other_processes=len(others - {os.getpid()}),
        rates=rates,
        packages=tuple(name for name in GPU_PACKAGES if _installed(name)),
        note="" if profile else "a card of unknown speed",
    )


def _installed(package: str) -> bool:
    """Whether a package is there, without importing it."""
    if importlib.util.find_spec(package.replace("-", "_")):
        return True
    try:  # flash-attn-4 shares its import name with FlashAttention-2
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def _host_processor() -> Hardware:
    import psutil

    memory, sharers = psutil.virtual_memory(), this_process().local_ranks
    apple = platform.system() == "Darwin" and platform.machine() == "arm64"
    name = f"{psutil.cpu_count(logical=False) or os.cpu_count() or 1}-core {platform.machine()} CPU"
    return Hardware(
        name,
        "mps" if apple else "cpu",
        memory.total,
        memory.available // sharers,
        fast_bf16=_cpu_has_bf16(),
        rates=None,
    )


def _cpu_has_bf16() -> bool:
    """Whether the processor multiplies bf16 natively (Intel AMX or AVX-512 BF16, Arm BF16)."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    line = next((x for x in flags.splitlines() if x.startswith(("flags", "Features"))), "")
    return bool({"amx_bf16", "avx512_bf16", "bf16"} & set(line.split()))


def _with_host(hardware: Hardware, folder: Path) -> Hardware:
    import psutil

    existing = next((p for p in (folder.absolute(), *folder.absolute().parents) if p.exists()), None)
    memory = psutil.virtual_memory()
    return replace(
        hardware,
        host_bytes=memory.total,
        host_free_bytes=memory.available // this_process().local_ranks,
        disk_free_bytes=shutil.disk_usage(existing).free if existing else None,
    )
