"""Keys follow everything that an encoded value depends on, and nothing else."""

import os
import shutil
import sqlite3
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ideoflow.captions.boxes import Geometry
from ideoflow.data import keys as module
from ideoflow.data.cache import TensorCache
from ideoflow.data.encode import Encoder
from ideoflow.data.keys import Keys, PictureDigests, share_of, with_encoding
from ideoflow.data.pictures import TarMember, picture_digest
from ideoflow.data.survey import Prompt, Sample, read_dataset
from ideoflow.diagnostics import IdeoflowError
from ideoflow.model.base import locate_base
from ideoflow.plan.document import Cached

KEYS = Keys("vae", "text", "bfloat16", 2048)


def test_a_caption_s_key_changes_with_what_counts():
    other = [replace(KEYS, text="c"), replace(KEYS, dtype="float32"), replace(KEYS, max_tokens=100)]
    found = {KEYS.caption("a"), KEYS.caption("b"), *(k.caption("a") for k in other)}
    assert len(found) == 5 and Keys("vae", "text", "bfloat16", 2048).caption("a") in found
    assert all(len(key) == 32 and int(key, 16) >= 0 for key in found)


def test_a_picture_s_key_changes_with_what_counts(tmp_path):
    sample = Sample(tmp_path / "a.png", (64, 96), Geometry(100, 150, (0, 0.5, 100, 150)), "caption")
    changed = [
        replace(sample, size=(96, 64)),
        replace(sample, geometry=Geometry(100, 150, (0, 0.5, 100, 149.9))),
        replace(sample, geometry=replace(sample.geometry, flip=True)),
    ]
    found = {KEYS.latents(s, "p") for s in (sample, *changed)}
    found |= {KEYS.latents(sample, "q"), replace(KEYS, vae="c").latents(sample, "p")}
    found |= {replace(KEYS, dtype="float32").latents(sample, "p")}
    assert len(found) == 7
    # Neither words nor the length that captions may have nor the file's name touch the pixels.
    same = [replace(sample, caption="other"), replace(sample, picture=tmp_path / "b.png")]
    assert {KEYS.latents(s, "p") for s in same} | {replace(KEYS, max_tokens=5).latents(sample, "p")} == {
        KEYS.latents(sample, "p")
    }


def change_weights(part, *, only=""):
    """Other numbers in the tensors of a part whose names begin so."""
    for file in part.glob("*.safetensors"):
        tensors = load_file(file)
        changed = {n: t + 1 if n.startswith(only) else t for n, t in tensors.items()}
        save_file(changed, file, {"format": "pt"})


def append(file, text):
    file.write_text(file.read_text() + text)


CHANGES = {
    "autoencoder": (lambda f: change_weights(f / "vae"), {"latents"}),
    "text encoder": (lambda f: change_weights(f / "text_encoder"), {"caption"}),
    "configuration": (lambda f: append(f / "text_encoder/config.json", " "), {"caption"}),
    "chat template": (lambda f: (f / "tokenizer/chat_template.jinja").write_text("other"), {"caption"}),
    "projection": (lambda f: change_weights(f / "transformer", only="llm_cond_"), {"caption"}),
    "blocks": (lambda f: change_weights(f / "transformer", only="layers."), set()),
    "second transformer": (lambda f: shutil.rmtree(f / "unconditional_transformer"), set()),
    "names of files": (lambda f: (f / "README.json").write_text("{}"), set()),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_base_changes_the_keys_of_what_it_encodes_differently(nano_base, tmp_path, what):
    folder = tmp_path / "base"
    shutil.copytree(nano_base.folder, folder)
    change, expected = CHANGES[what]
    before = Keys.of(locate_base(str(folder)), "float32", 99)
    change(folder)
    after = Keys.of(locate_base(str(folder)), "float32", 99)
    sample = Sample(tmp_path / "a.png", (64, 96), Geometry(100, 150, (0, 0, 100, 150)), "caption")
    changed = {"caption"} if before.caption("a") != after.caption("a") else set()
    changed |= {"latents"} if before.latents(sample, "p") != after.latents(sample, "p") else set()
    assert changed == expected


def test_a_projection_from_a_single_file_has_its_own_keys(nano_base, tmp_path):
    """The same numbers under ComfyUI's names give the same keys, others do not."""
    tensors = load_file(next((nano_base.folder / "transformer").glob("*.safetensors")))
    for name, add in (("same", 0), ("other", 1)):
        named = {f"model.diffusion_model.{n}": t + add for n, t in tensors.items()}
        save_file(named, tmp_path / f"{name}.safetensors")
    parts = str(nano_base.folder)
    whole, same, other = (
        Keys.of(base, "float32", 99)
        for base in (
            locate_base(parts),
            locate_base(str(tmp_path / "same.safetensors"), parts=parts),
            locate_base(str(tmp_path / "other.safetensors"), parts=parts),
        )
    )
    assert same == whole and (other.vae, other.text != whole.text) == (whole.vae, True)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_shares_are_even_and_cover_everything_once(ranks):
    keys = [KEYS.caption(str(n)) for n in range(2000)]
    owners = [[r for r in range(ranks) if share_of(key, r, ranks)] for key in keys]
    assert all(len(o) == 1 for o in owners)
    counts = [sum(o == [r] for o in owners) for r in range(ranks)]
    assert min(counts) > 0.8 * 2000 / ranks


@pytest.fixture
def pictures(tmp_path):
    files = [tmp_path / f"{n}.bin" for n in range(4)]
    for n, file in enumerate(files):
        file.write_bytes(bytes([n]) * 1000)
        os.utime(file, (1e9, 1e9))
    return files


@pytest.fixture
def settled(monkeypatch):
    """Files that were just made count as old enough to be remembered."""
    monkeypatch.setattr("ideoflow.data.memory._RACY_NS", -1)


def read_again(monkeypatch):
    read = []
    monkeypatch.setattr(module, "picture_digest", lambda p: read.append(p) or picture_digest(p))
    return read


def test_digests_are_remembered_until_a_file_changes(pictures, tmp_path, settled, monkeypatch):
    memory = tmp_path / "memory" / "pictures.sqlite"
    truth = [picture_digest(p) for p in pictures]
    assert PictureDigests(memory).known(pictures) == [None] * 4
    assert PictureDigests(memory).of(pictures) == truth
    read = read_again(monkeypatch)
    assert PictureDigests(memory).of(pictures) == truth and read == []
    assert PictureDigests(memory).known(pictures) == truth
    pictures[1].write_bytes(b"x" * 1000)  # as long as before
    os.utime(pictures[1], (1e9, 1e9))  # and of the same age: the inode's own time tells
    assert PictureDigests(memory).of(pictures) == [truth[0], picture_digest(pictures[1]), *truth[2:]]
    assert read == [pictures[1]]


def test_what_was_just_written_is_not_trusted(pictures, tmp_path, monkeypatch):
    digests = PictureDigests(tmp_path / "pictures.sqlite")
    digests.of(pictures)
    assert digests.known(pictures) == [None] * 4


def test_members_of_a_tar_have_digests_of_their_own(pictures, tmp_path, settled, monkeypatch):
    tar = tmp_path / "a.tar"
    tar.write_bytes(b"".join(p.read_bytes() for p in pictures))
    members = [TarMember(tar, p.name, 1000 * n, 1000) for n, p in enumerate(pictures)]
    digests = PictureDigests(tmp_path / "pictures.sqlite")
    assert digests.of(members) == [picture_digest(p) for p in pictures]
    read = read_again(monkeypatch)
    assert digests.of(members) == [picture_digest(p) for p in pictures] and read == []


def test_a_memory_that_cannot_be_used_costs_only_time(pictures, tmp_path, settled):
    truth = [picture_digest(p) for p in pictures]
    damaged = tmp_path / "damaged.sqlite"
    damaged.write_bytes(b"no database" * 1000)
    with sqlite3.connect(tmp_path / "other.sqlite") as other:
        other.execute("CREATE TABLE pictures (unlike)")
    (tmp_path / "folder.sqlite").mkdir()
    for file in (damaged, tmp_path / "other.sqlite", tmp_path / "folder.sqlite", pictures[0] / "in a file"):
        assert PictureDigests(file).of(pictures) == truth


def test_a_picture_that_is_gone_is_told(pictures, tmp_path):
    pictures[2].unlink()
    with pytest.raises(IdeoflowError):
        PictureDigests(tmp_path / "m.sqlite").of(pictures)


@pytest.fixture
def project(folder, picture, recipe):
    """Three pictures, one with elements to shuffle, and a recipe whose cache is its own."""
    for n in range(3):
        picture(64, 64, seed=n).save(folder / f"{n}.png")
        os.utime(folder / f"{n}.png", (1e9, 1e9))
        (folder / f"{n}.icap").write_text(
            "A boat.\n" + "".join(f"obj: Thing {m}.\n" for m in range(4 * (n == 0)))
        )
    return recipe(
        "", f'[captions]\nshuffle = true\nvariants = 5\n[cache]\nfolder = "{folder.parent / "cache"}"\n'
    )


def test_a_plan_counts_what_is_to_be_encoded(project, folder, nano_base, settled):
    dataset, prompts = read_dataset(project), (Prompt("p", "a prompt"), Prompt("q", "another"))

    def summary(base=nano_base):
        return with_encoding(dataset.summary(), project, dataset, prompts, base)

    assert summary().captions == 5 + 1, "two pictures share a caption without elements"
    assert summary().cached == ()
    encoder = Encoder(nano_base, TensorCache(folder.parent / "cache"),
                      dtype=torch.float32, device=torch.device("cpu"),
                      captions=project.tables.captions)  # fmt: skip
    encoder.encode_captions([*encoder.texts(dataset.samples[0]), "a prompt"])
    encoder.encode_pictures(dataset.samples[:2])
    assert summary().cached == (Cached("float32", 6, 2),)
    assert summary().cached_as("bfloat16") == Cached("bfloat16", 0, 0)
    assert summary(replace(nano_base, digest="another")).cached == () and summary(None).cached == ()
    (folder / "1.png").touch()  # may have changed: unknown until it is read
    assert summary().cached == (Cached("float32", 6, 1),)


def test_very_large_sets_are_only_counted(project, nano_base, monkeypatch):
    monkeypatch.setattr(module, "_LOOK_AT_MOST", 10)
    dataset = read_dataset(project)
    found = with_encoding(dataset.summary(), project, dataset, (), nano_base)
    assert found.captions == 15 and found.cached == ()
