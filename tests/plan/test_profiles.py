"""Cards are found by the names that people and NVML give them, and by nothing that merely looks alike."""

import re

import pytest

from ideoflow.plan.profiles import (
    GIB,
    MIB,
    PROFILES,
    find_profile,
    hardware_from_profile,
    link_gbps,
    profile_names,
)

# name, memory in MiB as NVML tells it (None: a name typed by a person), the profile's key
NAMES = [
    ("rtx-4090", None, "rtx-4090"),
    ("4090", None, "rtx-4090"),
    ("RTX4090", None, "rtx-4090"),
    ("4070ti", None, "rtx-4070-ti"),
    ("a100", None, "a100-80gb"),
    ("h100-80gb", None, "h100"),
    ("h100-sxm", None, "h100"),
    ("NVIDIA GeForce RTX 4090", 24564, "rtx-4090"),
    ("NVIDIA GeForce RTX 4070 Ti SUPER", 16376, "rtx-4070-ti-super"),
    ("NVIDIA GeForce RTX 4060 Ti", 8188, "rtx-4060-ti"),
    ("NVIDIA GeForce RTX 4060 Ti", 16380, "rtx-4060-ti-16gb"),
    ("NVIDIA A100-SXM4-80GB", 81920, "a100-80gb"),
    ("NVIDIA A100-PCIE-40GB", 40960, "a100-40gb"),
    ("NVIDIA H100 80GB HBM3", 81559, "h100"),
    ("NVIDIA H100 PCIe", 81559, "h100-pcie"),
    ("NVIDIA H200", 143771, "h200"),
    ("NVIDIA RTX 6000 Ada Generation", 49140, "rtx-6000-ada"),
    ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 97887, "rtx-pro-6000"),
    ("Tesla T4", 15360, "t4"),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", 16376, None),  # another chip
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 9856, None),  # a slice of one
    ("NVIDIA H100 80GB HBM3", 9856, None),
    ("GeForce GTX 1080", 8192, None),
    ("4091", None, None),
    ("", None, None),
]


@pytest.mark.parametrize(("name", "mib", "key"), NAMES)
def test_names(name, mib, key):
    found = find_profile(name, mib and mib * MIB)
    assert (found and found.key) == key


def test_every_profile_is_found_under_its_own_key_and_title():
    assert len(set(profile_names())) == len(PROFILES)
    for p in PROFILES:
        assert find_profile(p.key) is p
        assert find_profile(p.title, p.mib * MIB) is p


@pytest.mark.parametrize("profile", PROFILES, ids=lambda p: p.key)
def test_a_profile_makes_sense(profile):
    hardware = hardware_from_profile(profile.key)
    assert 0.7 * hardware.total_bytes < hardware.free_bytes < hardware.total_bytes
    # FP8 units came with compute capability 8.9 (Ada), FP4 with 10.0 (Blackwell).
    if profile.kind == "cuda":
        assert (profile.fp8 is not None) == (profile.capability >= (8, 9))
        assert (profile.fp4 is not None) == (profile.capability >= (10, 0))
        assert hardware.fast_bf16 == (profile.capability >= (8, 0))
    rates = [profile.fp32, profile.bf16, profile.fp8, profile.fp4]
    known = [r for r in rates if r is not None]
    assert known == sorted(known)
    assert hardware.rates.source and hardware.rates.host_gbps > 5


@pytest.mark.parametrize(("name", "gib"), [("16gb", 16), ("8GB", 8), ("80gib", 80), ("24-gb", 24)])
def test_plain_sizes(name, gib):
    hardware = hardware_from_profile(name)
    assert hardware.total_bytes == gib * GIB > hardware.free_bytes
    assert hardware.rates is None and hardware.compute_capability is None


def test_free_memory_of_a_4090_leaves_what_torch_sees_less_a_desktop():
    # torch.cuda.mem_get_info on a 4090 gives a total of 25 393 692 672 bytes (23.65 GiB).
    free = hardware_from_profile("rtx-4090").free_bytes
    assert 22.5 * GIB < free < 25_393_692_672


def test_link_speed_against_the_raw_rates_of_the_standard():
    # Raw, one way, x16: 15.75, 31.5 and 63 GB/s for generations 3, 4 and 5.
    for generation, raw in ((3, 15.75), (4, 31.5), (5, 63.0)):
        assert link_gbps(generation, 16) == pytest.approx(0.875 * raw, rel=0.01)
        assert link_gbps(generation, 8) == pytest.approx(0.4375 * raw, rel=0.01)


def test_an_unknown_name_is_none():
    assert hardware_from_profile("toaster") is None
    assert not re.search(r"\s", "".join(profile_names()))
