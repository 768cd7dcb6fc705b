"""Checkpoints against crashes and damage."""

import json
import multiprocessing
import os
import subprocess
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ideoflow.artifacts import Checkpoints, set_aside
from ideoflow.diagnostics import IdeoflowError
from ideoflow.diagnostics.codes.artifacts import DAMAGED_CHECKPOINT, OTHER_RUN, UNWRITABLE


def tensors(value: float) -> dict[str, Tensor]:
    return {"w": torch.full((5,), value)}


IDENTITY = {"base": "b", "rank": 4}


def test_checkpoints_come_back_and_old_ones_go(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, IDENTITY, keep=2)
    for step in (1, 2, 3):
        store.save(step, tensors(step), tensors(10 * step), {"recipe": "r"})
    found, warnings = store.newest()
    assert found is not None and not warnings
    assert found.step == 3 and torch.equal(found.adapter["w"], tensors(3)["w"])
    assert torch.equal(found.optimizer["w"], tensors(30)["w"]) and found.facts == {"recipe": "r"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000003"]


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, name: str, damage: str) -> None:
    store = Checkpoints(tmp_path, IDENTITY, keep=3)
    store.save(1, tensors(1), tensors(1), {})
    file = store.save(2, tensors(2), tensors(2), {}) / name
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 0x40
        file.write_bytes(content)
    found, warnings = store.newest()
    if name == "state.json" and damage == "flip":
        assert found is not None  # one flipped bit of a JSON text may still be the same facts
    else:
        assert found is not None and found.step == 1
        assert [w.code for w in warnings] == [DAMAGED_CHECKPOINT]


def test_another_run_is_not_continued_and_can_be_set_aside(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    Checkpoints(folder / "checkpoints", IDENTITY, keep=1).save(1, tensors(1), tensors(1), {})
    with pytest.raises(IdeoflowError) as caught:
        Checkpoints(folder / "checkpoints", {"base": "b", "rank": 8}, keep=1).newest()
    assert [d.code for d in caught.value.diagnostics] == [OTHER_RUN]
    assert "rank" in caught.value.diagnostics[0].message
    first, second = set_aside(folder), set_aside(folder)
    assert first is not None and first.name == "out.old-1" and second is None
    assert (first / "checkpoints" / "step-000001" / "state.json").exists()


def test_a_full_disk_is_told_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk]).returncode
    ):
        pytest.skip("needs the right to mount a tmpfs")
    try:
        store = Checkpoints(disk, IDENTITY, keep=2)
        store.save(1, tensors(1), tensors(1), {})
        with pytest.raises(IdeoflowError) as caught:
            store.save(2, {"w": torch.zeros(50_000)}, tensors(2), {})
        assert [d.code for d in caught.value.diagnostics] == [UNWRITABLE]
        found, _ = store.newest()
        assert found is not None and found.step == 1
        assert [p.name for p in disk.iterdir()] == ["step-000001"]
    finally:
        subprocess.run(["umount", disk], check=True)


def _save_forever(folder: Path, ready: Event) -> None:
    torch.set_num_threads(1)
    store = Checkpoints(folder, IDENTITY, keep=2)
    found, _ = store.newest()
    step = found.step if found else 0
    ready.set()
    while True:
        step += 1
        adapter = {"w": torch.full((400_000,), float(step))}
        store.save(step, adapter, {"m": torch.zeros(400_000)}, {})


def test_killed_while_writing_the_last_good_checkpoint_is_there(tmp_path: Path) -> None:
    """A child writes checkpoints without end; SIGKILL at odd moments never leaves a broken newest one."""
    context = multiprocessing.get_context("fork")
    last = 0
    for wait in (0.05, 0.11, 0.17):
        ready = context.Event()
        process = context.Process(target=_save_forever, args=(tmp_path, ready))
        process.start()
        assert ready.wait(60)
        time.sleep(wait)
        process.kill()
        process.join()
        found, warnings = Checkpoints(tmp_path, IDENTITY, keep=2).newest()
        assert not warnings
        step = found.step if found else 0
        assert step >= last
        if found:
            assert torch.equal(found.adapter["w"], torch.full((400_000,), float(step)))
        last = step
    assert last > 0


def test_files_hold_no_pickle(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, IDENTITY, keep=1)
    place = store.save(1, tensors(1), tensors(1), {})
    assert {p.suffix for p in place.iterdir()} == {".safetensors", ".json"}
    json.loads((place / "state.json").read_text())
    assert load_file(place / "adapter.safetensors").keys() == {"w"}
