"""The nano base: the same for the same seed, whole or not there, and a model that diffusers runs."""

import hashlib
import multiprocessing
import os
from pathlib import Path

import pytest
import torch
from diffusers import Ideogram4Pipeline

from ideoflow.diagnostics import IdeoflowError
from ideoflow.diagnostics.codes import model as codes
from ideoflow.model import nano
from ideoflow.model.base import COMPONENTS, locate_base
from ideoflow.model.nano import ensure_nano, make_nano


def digests(folder):
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_the_same_seed_makes_the_same_files(nano_folder, tmp_path):
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    again, other = make_nano(tmp_path / "again"), make_nano(tmp_path / "other", seed=1)
    assert torch.equal(torch.random.get_rng_state(), before), "the caller's random numbers are left alone"
    assert digests(again) == digests(nano_folder)
    assert digests(other).keys() == digests(again).keys()
    different = {n for n, d in digests(other).items() if d != digests(again)[n]}
    assert {n for n in different if n.endswith(".safetensors")} == different and len(different) == 4


def test_it_is_small_and_has_every_part(nano_folder):
    assert sum(p.stat().st_size for p in nano_folder.rglob("*") if p.is_file()) < 30_000_000
    assert {*COMPONENTS, "scheduler", "unconditional_transformer"} == {
        p.name for p in nano_folder.iterdir() if p.is_dir()
    }
    assert locate_base(str(nano_folder)).has_unconditional


def test_diffusers_samples_a_picture(pipeline):
    assert isinstance(pipeline, Ideogram4Pipeline)
    pictures = [
        pipeline(
            "a red boat",
            height=64,
            width=96,
            num_inference_steps=2,
            guidance_scale=3.0,
            guidance_schedule=None,
            max_sequence_length=64,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        ).images[0]
        for seed in (0, 0, 1)
    ]
    assert pictures[0].shape == (64, 96, 3) and pictures[0].std() > 0.01
    assert (pictures[0] == pictures[1]).all() and (pictures[0] != pictures[2]).any()


def test_the_tokenizer_gives_back_any_text(pipeline):
    for text in ("a cat", '{"desc":"naïve café"}', "日本語 🦝\n\ttab", "<token>"):
        ids = pipeline.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert pipeline.tokenizer.decode(ids) == text


def test_latents_of_pictures_have_about_unit_variance(pipeline):
    from ideoflow.model.latents import encode_pixels

    coarse = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    pictures = torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bicubic") * 2 - 1
    tokens = encode_pixels(pipeline.vae, pictures)
    assert abs(tokens.mean()) < 0.3 and 0.5 < tokens.std() < 2


def _make(folder, start):
    torch.set_num_threads(1)  # a forked process has none of its parent's other threads
    start.wait()
    ensure_nano(Path(folder))


def test_two_processes_make_it_at_once(nano_folder, tmp_path):
    context = multiprocessing.get_context("fork")
    start = context.Barrier(2)
    makers = [context.Process(target=_make, args=(str(tmp_path / "nano"), start)) for _ in range(2)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join(120)
    assert [maker.exitcode for maker in makers] == [0, 0]
    assert digests(tmp_path / "nano") == digests(nano_folder)
    assert [p.name for p in tmp_path.iterdir()] == ["nano"], "nothing else is left"


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interruption_leaves_nothing(raised, tmp_path, monkeypatch):
    def save_pretrained(self, folder):
        (Path(folder) / "transformer").mkdir()
        (Path(folder) / "model_index.json").write_text("{}")
        raise raised

    monkeypatch.setattr(Ideogram4Pipeline, "save_pretrained", save_pretrained)
    with pytest.raises((KeyboardInterrupt, IdeoflowError)) as caught:
        make_nano(tmp_path / "nano")
    assert list(tmp_path.iterdir()) == []
    if isinstance(caught.value, IdeoflowError):
        (diagnostic,) = caught.value.diagnostics
        assert diagnostic.code is codes.NO_DOWNLOAD and "No space left" in diagnostic.message


def test_a_half_made_folder_of_another_program_is_replaced(nano_folder, tmp_path):
    (tmp_path / "nano" / "transformer").mkdir(parents=True)
    (tmp_path / "nano" / "transformer" / "config.json").write_text("{")
    said = []
    ensure_nano(tmp_path / "nano", said.append)
    assert digests(tmp_path / "nano") == digests(nano_folder)
    ensure_nano(tmp_path / "nano", said.append)
    assert len(said) == 1, "made once"


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(IdeoflowError) as caught:
        ensure_nano(tmp_path / "file" / "nano")
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code is codes.NO_DOWNLOAD and "IDEOFLOW_CACHE" in diagnostic.cure


def test_others_may_read_it(nano_folder):
    mask = os.umask(0)
    os.umask(mask)
    readable = [p for p in nano_folder.rglob("*") if p.is_file() and p.stat().st_mode & 0o444 & ~mask]
    assert len(readable) == len(digests(nano_folder))
    assert nano_folder.stat().st_mode & 0o777 == 0o777 & ~mask


def test_the_chat_template_is_qwens(pipeline):
    """Qwen3-VL's own template gives this text for one user message with one text part."""
    messages = [{"role": "user", "content": [{"type": "text", "text": "a {b}"}]}]
    text = pipeline.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\na {b}<|im_end|>\n<|im_start|>assistant\n"
    ids = pipeline.tokenizer(text, add_special_tokens=False)["input_ids"]
    specials = [nano.SPECIAL_TOKENS.index(t) for t in ("<|im_start|>", "<|im_end|>", "<|im_start|>")]
    assert [i for i in ids if i < len(nano.SPECIAL_TOKENS)] == specials
