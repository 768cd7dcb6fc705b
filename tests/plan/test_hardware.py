"""What NVML and the host say, against a stand-in for a machine with a card; never through torch."""

import sys
import types
from pathlib import Path

import psutil
import pytest

from ideoflow.diagnostics import IdeoflowError
from ideoflow.plan import detect_hardware, hardware, named_hardware

MIB = 1 << 20


class NvmlError(Exception):
    """Stands in for pynvml.NVMLError."""


@pytest.fixture
def nvml(monkeypatch):
    """A made-up pynvml with one 4090; tests change its answers."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    module = types.ModuleType("pynvml")
    module.NVMLError = NvmlError
    module.asked = []
    memory = types.SimpleNamespace(total=24564 * MIB, free=23000 * MIB)
    answers = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: module.asked.append("shutdown"),
        "nvmlDeviceGetHandleByIndex": lambda index: module.asked.append(index),
        "nvmlDeviceGetHandleByUUID": lambda uuid: module.asked.append(uuid),
        "nvmlDeviceGetName": lambda _: "NVIDIA GeForce RTX 4090",
        "nvmlDeviceGetMemoryInfo": lambda _: memory,
        "nvmlDeviceGetCudaComputeCapability": lambda _: (8, 9),
        "nvmlDeviceGetMaxPcieLinkGeneration": lambda _: 4,
        "nvmlDeviceGetCurrPcieLinkWidth": lambda _: 8,
        "nvmlDeviceGetComputeRunningProcesses": lambda _: [types.SimpleNamespace(pid=1)],
        "nvmlDeviceGetGraphicsRunningProcesses": lambda _: [types.SimpleNamespace(pid=n) for n in (1, 2)],
    }
    for name, answer in answers.items():
        setattr(module, name, answer)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


def refuse(*_):
    raise NvmlError("not supported")


def test_a_card_is_described(nvml, tmp_path):
    found = detect_hardware(folder=tmp_path)
    assert (found.name, found.kind, found.compute_capability) == ("RTX 4090", "cuda", (8, 9))
    assert (found.total_bytes, found.free_bytes) == (24564 * MIB, 23000 * MIB)
    assert found.other_processes == 2 and found.source == "measured"
    # The rates are the profile's, but for the link, which here has 8 lanes.
    profile = named_hardware("rtx-4090").rates
    assert found.rates.bf16_tflops == profile.bf16_tflops
    assert found.rates.host_gbps == pytest.approx(profile.host_gbps / 2, rel=0.02)
    assert found.host_bytes == psutil.virtual_memory().total and found.disk_free_bytes > 0
    assert nvml.asked == [0, "shutdown"]


def test_questions_that_a_board_does_not_answer_are_left_open(nvml):
    for question in ("CudaComputeCapability", "MaxPcieLinkGeneration", "ComputeRunningProcesses"):
        setattr(nvml, f"nvmlDeviceGet{question}", refuse)
    found = detect_hardware()
    assert found.kind == "cuda" and found.compute_capability is None and found.pcie_generation is None
    assert found.other_processes == 2


def test_a_slice_of_a_card_has_no_known_speed(nvml):
    nvml.nvmlDeviceGetName = lambda _: "NVIDIA H100 80GB HBM3"
    assert detect_hardware().rates is None


@pytest.mark.parametrize(
    ("visible", "asked"), [("2,0", 2), ("GPU-abc", "GPU-abc"), ("", None), ("-1", None), (None, 0)]
)
def test_cuda_visible_devices_is_obeyed(visible, asked, nvml, monkeypatch):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = detect_hardware()
    assert found.kind == ("cpu" if asked is None else "cuda")
    assert nvml.asked[:1] == ([] if asked is None else [asked])


@pytest.mark.parametrize(("visible", "asked"), [(None, 1), ("2,0", 0), ("GPU-a,GPU-b", "GPU-b")])
def test_each_of_several_processes_asks_for_its_own_card(visible, asked, nvml, monkeypatch):
    launched = {"WORLD_SIZE": 2, "RANK": 1, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 1}
    for name, value in (launched | {"MASTER_ADDR": "here"}).items():
        monkeypatch.setenv(name, str(value))
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvml.nvmlDeviceGetCount = lambda: 4
    assert detect_hardware().kind == "cuda" and nvml.asked[0] == asked


@pytest.mark.parametrize("question", ["nvmlInit", "nvmlDeviceGetHandleByIndex"])
def test_without_a_card_the_processor_is_planned_for(question, nvml):
    setattr(nvml, question, refuse)
    found = detect_hardware()
    assert found.kind in ("cpu", "mps") and found.free_bytes <= found.total_bytes
    assert found.rates is None


def test_device_cpu_does_not_ask_for_a_card(nvml):
    assert detect_hardware("cpu").kind in ("cpu", "mps") and nvml.asked == []


def test_device_cuda_without_a_card_is_a_diagnostic(nvml):
    nvml.nvmlInit = refuse
    with pytest.raises(IdeoflowError, match="IP011"):
        detect_hardware("cuda")


def test_a_driver_without_the_package_is_a_diagnostic(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(hardware, "_DRIVER", tmp_path / "absent")
    assert detect_hardware().kind in ("cpu", "mps")
    monkeypatch.setattr(hardware, "_DRIVER", Path(__file__))
    with pytest.raises(IdeoflowError, match="IP012"):
        detect_hardware()


def test_an_unknown_card_suggests_the_nearest():
    with pytest.raises(IdeoflowError) as caught:
        named_hardware("rtx-4091")
    (problem,) = caught.value.diagnostics
    assert problem.code.id == "IP010" and "rtx-4090" in problem.cure
    with pytest.raises(IdeoflowError) as caught:
        named_hardware("toaster")
    assert "16gb" in caught.value.diagnostics[0].cure


@pytest.mark.gpu
def test_nvml_agrees_with_torch():
    import torch

    found = detect_hardware()
    assert found.compute_capability == torch.cuda.get_device_capability(0)
    free, total = torch.cuda.mem_get_info(0)
    assert found.total_bytes == pytest.approx(total, rel=0.02)
    assert found.free_bytes == pytest.approx(free, rel=0.05)
