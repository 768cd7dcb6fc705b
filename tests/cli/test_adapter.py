"""``ideoflow adapter``: commands, exit codes, what is printed; the examples of docs/adapters.md."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ideoflow import resources
from ideoflow.cli import main

KEY = "diffusion_model.layers.{}.attention.qkv"
DOCS = Path(__file__).resolve().parents[2] / "docs" / "adapters.md"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A LoRA for nano, in ComfyUI's form."""
    g = torch.Generator().manual_seed(0)
    state = {}
    for n in range(2):
        state[f"{KEY.format(n)}.lora_A.weight"] = torch.randn(4, 192, generator=g)
        state[f"{KEY.format(n)}.lora_B.weight"] = torch.randn(576, 4, generator=g)
        state[f"{KEY.format(n)}.alpha"] = torch.tensor(2.0)
    monkeypatch.chdir(tmp_path)
    save_file(state, "sailboats.safetensors", {"modelspec.title": "sailboats"})
    return tmp_path / "sailboats.safetensors"


def test_info_as_text_and_json(file: Path, capsys: Any) -> None:
    assert main(["adapter", "info", "sailboats.safetensors"]) == 0
    text = capsys.readouterr().out
    assert "lora in the form of comfyui; loads in ComfyUI and diffusers" in text
    assert "2 modules in 2 blocks: attention.qkv" in text and "modelspec.title: sailboats" in text
    assert main(["adapter", "info", "sailboats.safetensors", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ranks"] == {"4": 2} and found["scales"] == {"0.5": 2} and found["dtype"] == "float32"
    assert found["parameters"] == 2 * 4 * (192 + 576) and found["bytes"] == file.stat().st_size
    assert found["digest"] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_the_examples_of_the_docs_work_as_they_stand(file: Path, capsys: Any) -> None:
    blocks = re.findall(r"^```console\n(.*?)^```", DOCS.read_text(encoding="utf-8"), re.S | re.M)
    commands = [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    assert {shlex.split(c)[2] for c in commands} == {"info", "convert", "merge", "resize"}
    for command in commands:
        program, *argv = shlex.split(command)
        assert program == "ideoflow" and main(argv) == 0, command
    out = capsys.readouterr().out
    assert "kept" in out and "weights changed" in out
    assert main(["adapter", "info", "smaller.safetensors"]) == 0
    assert "ranks 2x2" in capsys.readouterr().out


def test_a_dora_by_lycoris_rule_is_told_and_keeps_its_rule(file: Path, capsys: Any) -> None:
    state = load_file(file) | {f"{KEY.format(n)}.dora_scale": torch.ones(576, 1) for n in range(2)}
    save_file(state, "dora.safetensors")
    for name, smaller in (("dora", "resized"), ("resized", "again")):
        assert main(["adapter", "info", f"{name}.safetensors"]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert (
            "dora in the form of comfyui; loads in neither" in text and "ComfyUI would compute other" in text
        )
        resize = ["adapter", "resize", f"{name}.safetensors", f"{smaller}.safetensors", "--rank", "2"]
        assert main(resize) == 0
        capsys.readouterr()
    convert = ["adapter", "convert", "dora.safetensors", "a.safetensors", "--to", "kohya"]
    assert main(convert) == 1 and "--base" in capsys.readouterr().err
    assert main([*convert, "--base", "nano"]) == 0 and main(["adapter", "info", "a.safetensors"]) == 0
    assert "loads in ComfyUI, not in diffusers" in capsys.readouterr().out


def test_mistakes_are_diagnostics(file: Path, capsys: Any) -> None:
    assert main(["adapter", "info", "nothing.safetensors"]) == 1
    assert "IA004" in capsys.readouterr().err
    file.write_bytes(file.read_bytes()[:-4])
    assert main(["adapter", "convert", "sailboats.safetensors", "b.safetensors", "--to", "kohya"]) == 1
    assert "IA005" in capsys.readouterr().err and not Path("b.safetensors").exists()
    for wrong in (["--rank", "0"], ["--energy", "1.5"], []):
        with pytest.raises(SystemExit) as caught:
            main(["adapter", "resize", "a", "b", *wrong])
        assert caught.value.code == 2


def test_nothing_is_replaced_and_nothing_written_that_is_not_opened(file: Path, capsys: Any) -> None:
    before = file.read_bytes()
    Path("folder").mkdir()
    Path("other.safetensors").write_text("mine")
    for out, word in (
        (file.name, "there already"), ("other.safetensors", "there already"), ("folder", "there already"),
        ("x.pt", "safetensors"), ("plain", "safetensors"), ("x" * 300 + ".safetensors", "too long"),
    ):  # fmt: skip
        for command in (
            ["convert", file.name, out, "--to", "kohya"],
            ["resize", file.name, out, "--rank", "2"],
        ):
            assert main(["adapter", *command]) == 1
            told = " ".join(capsys.readouterr().err.split())
            assert "IA001" in told and word in told and "Traceback" not in told
    assert main(["adapter", "convert", file.name, "folder", "--to", "peft"]) == 1
    assert main(["adapter", "convert", file.name, "new", "--to", "kohya", "--base", ""]) == 1
    assert file.read_bytes() == before and Path("other.safetensors").read_text() == "mine"
    assert sorted(p.name for p in Path().iterdir()) == ["folder", "other.safetensors", file.name]


def test_a_full_disk_leaves_nothing(file: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(resources.os, "fsync", full)
    for out, form in (("new", "peft"), ("new.safetensors", "kohya")):
        assert main(["adapter", "convert", file.name, out, "--to", form]) == 1
        assert "No space left" in capsys.readouterr().err
    assert main(["adapter", "merge", file.name, "nano", "merged"]) == 1
    assert [p.name for p in Path().iterdir()] == [file.name]
