"""What is cached is what the encoders give, bit for bit; what goes wrong loses nothing that was cached."""

import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from ideoflow.captions import to_json
from ideoflow.data import cache as cache_module
from ideoflow.data import encode
from ideoflow.data.cache import TensorCache
from ideoflow.data.encode import Encoder
from ideoflow.data.pixels import load_pixels
from ideoflow.data.shards import Index, join_keys
from ideoflow.data.survey import read_dataset
from ideoflow.data.upkeep import verify
from ideoflow.diagnostics import IdeoflowError
from ideoflow.diagnostics.codes import data as codes
from ideoflow.diagnostics.codes import model as model_codes
from ideoflow.model.latents import encode_pixels
from ideoflow.model.load import load_vae
from ideoflow.model.text import TextEncoder
from ideoflow.recipe import CaptionSettings

CPU = torch.device("cpu")


@pytest.fixture
def encoder_for(nano_base, tmp_path):
    def make(**changes):
        options = {"dtype": torch.float32, "device": CPU} | changes
        options["captions"] = CaptionSettings(**options.pop("captions", {}))
        cache = options.pop("cache", None) or TensorCache(tmp_path / "cache")
        base = replace(nano_base, digest=options.pop("base_digest", nano_base.digest))
        return Encoder(base, cache, **options)

    return make


@pytest.fixture
def samples(folder, picture, recipe):
    """Four pictures of two sizes with prose captions."""
    for n, (width, height) in enumerate([(64, 64), (96, 64), (100, 70), (64, 64)]):
        picture(width, height, seed=n).save(folder / f"{n}.jpg", quality=95)
        (folder / f"{n}.txt").write_text(f"picture {n}")
    return read_dataset(recipe()).samples


def entries(encoder):
    return set(join_keys(index_of(encoder).rows))


def index_of(encoder):
    index = Index(encoder.cache.folder)
    index.refresh()
    return index


def pictures(encoder, samples):
    """Encodes them; says where they are."""
    encoder.encode_pictures(samples)
    return encoder.encoded(samples)


def wrapped(elements):
    return to_json({"compositional_deconstruction": {"background": "sea", "elements": elements}})


def tensors(encoder, where):
    return encoder.cache.get(where.latents), encoder.cache.get(where.texts[0])


def no_loading(monkeypatch):
    def load(*_, **__):
        pytest.fail("an encoder was loaded although everything is cached")

    monkeypatch.setattr(encode, "load_vae", load)
    monkeypatch.setattr(encode, "TextEncoder", load)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_holds_what_the_encoders_give(encoder_for, samples, nano_base, dtype, monkeypatch):
    seen = []
    encoder = encoder_for(dtype=dtype, progress=lambda *event: seen.append(event))
    encoder.encode_captions([s.caption for s in samples] + ["a prompt"])
    encoded = pictures(encoder, samples)
    steps = [e for e in seen if e[0] == "captions"]  # layer by layer: all captions advance together
    assert steps == sorted(steps) and (steps[0], steps[-1]) == (("captions", 0, 5), ("captions", 5, 5))
    assert [e for e in seen if e[0] == "pictures"] == [("pictures", n, 4) for n in range(5)]

    vae = load_vae(nano_base.folder, dtype=dtype, device=CPU)
    text = TextEncoder(nano_base.folder, dtype=dtype, device=CPU, max_tokens=2048)
    for sample, where in zip(samples, encoded, strict=True):
        latents, features = tensors(encoder, where)
        assert torch.equal(latents, encode_pixels(vae, load_pixels(sample)[None])[0])
        assert torch.equal(features, text.encode(sample.caption))
        assert where.grid == (sample.size[1] // 16, sample.size[0] // 16)
        assert latents.shape == (where.grid[0] * where.grid[1], 128) and latents.dtype == torch.float32
        assert features.dtype == dtype
    assert torch.equal(encoder.text_features("a prompt"), text.encode("a prompt"))

    no_loading(monkeypatch)
    encoder.encode_captions([s.caption for s in samples])
    assert encoder.encode_pictures(samples) == 0 and encoder.encoded(samples) == encoded


@pytest.mark.gpu
def test_pictures_that_follow_each_other_on_a_gpu_are_as_alone(encoder_for, samples, nano_base):
    """The next one is launched before the last one is fetched: none gets another's numbers."""
    device = torch.device("cuda")
    encoder = encoder_for(dtype=torch.bfloat16, device=device)
    many = [s for s in samples for _ in range(3)]
    vae = load_vae(nano_base.folder, dtype=torch.bfloat16, device=device)
    for sample, where in zip(many, pictures(encoder, many), strict=True):
        alone = encode_pixels(vae, load_pixels(sample)[None])[0].cpu()
        assert torch.equal(encoder.cache.get(where.latents), alone)


def test_a_damaged_entry_is_made_anew(encoder_for, samples):
    encoder = encoder_for()
    encoder.encode_captions([s.caption for s in samples])
    encoded = pictures(encoder, samples)
    before = [tensors(encoder, e) for e in encoded]
    for file in encoder.cache.folder.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    assert encoder.encode_captions([s.caption for s in samples]) == 4
    assert encoder.encode_pictures(samples) == 4 and encoder.encoded(samples) == encoded
    for (a, b), where in zip(before, encoded, strict=True):
        latents, features = tensors(encoder, where)
        assert torch.equal(a, latents) and torch.equal(b, features)


def test_what_changes_is_encoded_again_and_nothing_else(encoder_for, samples, folder, picture, recipe):
    encoder = encoder_for()
    first = pictures(encoder, samples)
    picture(96, 64, seed=9).save(folder / "1.jpg")
    (folder / "2.txt").write_text("other words")
    second = pictures(encoder, read_dataset(recipe()).samples)
    assert [a.latents == b.latents for a, b in zip(first, second, strict=True)] == [True, False, True, True]
    assert [a.texts == b.texts for a, b in zip(first, second, strict=True)] == [True, True, False, True]
    square = pictures(encoder, read_dataset(recipe("aspect = 'square'")).samples)
    assert [a.latents == b.latents for a, b in zip(second, square, strict=True)] == [True, False, False, True]
    for other in (encoder_for(dtype=torch.bfloat16), encoder_for(base_digest="another base")):
        assert not {e.latents for e in pictures(other, samples[:1])} & {e.latents for e in first}


def test_truncated_pictures_are_told_and_the_others_cached(encoder_for, samples, monkeypatch):
    for n in (1, 3):
        content = samples[n].picture.read_bytes()
        samples[n].picture.write_bytes(content[: len(content) // 2])
    encoder = encoder_for()
    with pytest.raises(IdeoflowError) as caught:
        encoder.encode_pictures(samples)
    assert [(d.code, d.span.path) for d in caught.value.diagnostics] == [
        (codes.BAD_PICTURE, str(samples[n].picture)) for n in (1, 3)
    ]
    assert len(entries(encoder)) == 2
    no_loading(monkeypatch)
    assert encoder.encode_pictures([samples[0], samples[2]]) == 0


def test_captions_that_are_too_long_are_told_and_the_others_cached(encoder_for):
    encoder = encoder_for(captions={"max_tokens": 40})
    captions = ["short", "boat " * 100, "brief", "sea " * 100]
    with pytest.raises(IdeoflowError) as caught:
        encoder.encode_captions(captions)
    assert [d.code for d in caught.value.diagnostics] == [model_codes.TOO_LONG] * 2
    assert len(entries(encoder)) == 2
    assert encoder.text_features("brief").shape[0] <= 40


def test_a_lower_limit_refuses_what_a_higher_one_cached(encoder_for):
    encoder_for().encode_captions(["boat " * 20])
    with pytest.raises(IdeoflowError):
        encoder_for(captions={"max_tokens": 8}).encode_captions(["boat " * 20])


def test_a_cache_that_is_emptied_while_it_is_used(encoder_for, samples):
    encoder = encoder_for()
    (where,) = pictures(encoder, samples[:1])
    for file in encoder.cache.folder.rglob("*.safetensors"):
        file.unlink()
    with pytest.raises(IdeoflowError) as caught:
        tensors(encoder, where)
    assert caught.value.diagnostics[0].code is codes.CACHE_LOST


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_loses_nothing(encoder_for, samples, small_disk, monkeypatch):
    """Sixteen tokens take 8 KiB and twenty-four 12 KiB: a filler leaves room for one of them or two."""
    monkeypatch.setattr(cache_module, "_LARGEST_ROOM", 4096)
    encoder = encoder_for(cache=TensorCache(small_disk / "cache"))
    encoder.encode_pictures(samples[:1])
    filler = small_disk / "filler"
    filler.write_bytes(bytes(28 * 1024))
    with pytest.raises(IdeoflowError) as caught:
        encoder.encode_pictures(samples)
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code is codes.CACHE_UNWRITABLE and "No space left" in diagnostic.message
    kept = entries(encoder)
    assert 2 <= len(kept) < 4 and all(key in encoder.cache for key in kept), "what fitted is kept"
    assert index_of(encoder).damaged == []
    assert [p for p in small_disk.rglob(".*") if p.is_file()] == [], "nothing half-written is left"
    filler.unlink()
    assert encoder.encode_pictures(samples) == 4 - len(kept) and kept < entries(encoder)
    no_loading(monkeypatch)
    encoder.encode_pictures(samples)


def test_each_sample_has_its_captions_variants(encoder_for, samples):
    caption = wrapped([{"type": "obj", "desc": f"object {n}"} for n in range(5)])
    several = replace(samples[0], caption=caption, alternatives=(wrapped([]),))
    encoder = encoder_for(captions={"shuffle": True, "variants": 6})
    texts = encoder.texts(several)
    assert len(texts) == 6 and texts[:2] == (caption, wrapped([]))
    assert encoder.encode_captions(texts) == 6
    (where,) = encoder.encoded([several])
    assert len(set(where.texts)) == 6 and not any(encoder.cache.missing(where.texts))
    plain = encoder_for()
    assert plain.encode_captions(plain.texts(several)) == 0, "captions as they are were among them"


@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_share_the_work(encoder_for, samples, ranks, monkeypatch):
    captions = [f"caption {n}" for n in range(7)]
    parts = [encoder_for(rank=rank, ranks=ranks) for rank in range(ranks)]
    assert sum(p.encode_captions(captions) for p in parts) == 7
    assert sum(p.encode_pictures(samples) for p in parts) == 4
    no_loading(monkeypatch)
    alone = encoder_for()
    assert alone.encode_captions(captions) == 0 and alone.encode_pictures(samples) == 0
    held = join_keys(index_of(alone).rows)
    assert len(held) == len(set(held)) == 11, "nothing twice"


def _encode_until_killed(base, cache, samples, log):
    """In a process of its own: fills a cache in shards of 64 KiB, and notes the bytes of what it encoded."""
    torch.set_num_threads(1)
    for module in (cache_module, encode):
        module.SHARD_BYTES = KILLED_SHARD
    pixels, tokens = encode.encode_pixels, TextEncoder.encode_tokens

    def note(values):
        os.write(log, f"{sum(v.nbytes for v in values)}\n".encode())
        return values

    encode.encode_pixels = lambda *args: note(pixels(*args))
    TextEncoder.encode_tokens = lambda *args, **options: map(note, tokens(*args, **options))
    made = Encoder(base, TensorCache(cache), dtype=torch.float32, device=CPU,
                   captions=CaptionSettings())  # fmt: skip
    made.encode_captions([s.caption for s in samples])
    made.encode_pictures(samples)
    os._exit(0)


KILLED_SHARD = 64 << 10


def test_kills_at_any_moment_cost_at_most_a_shard(nano_base, folder, picture, recipe, tmp_path):
    """Killed twenty times while it fills the cache: nothing is lost or damaged, and little is made twice."""
    pictures = 100  # more than are encoded between twenty kills
    for n in range(pictures):
        picture(64, 64, seed=n).save(folder / f"{n:03}.png")
        (folder / f"{n:03}.txt").write_text(f"picture {n}" if n < 12 else "a picture")
    samples = read_dataset(recipe()).samples
    cache, log = tmp_path / "cache", tmp_path / "log"
    context = multiprocessing.get_context("fork")
    chance = random.Random(0)

    def noted():
        return [int(n) for n in log.read_text().split()]

    kills, kept, twice = 0, {}, 0
    with log.open("ab", buffering=0) as stream:
        while True:
            process = context.Process(
                target=_encode_until_killed, args=(nano_base, cache, samples, stream.fileno())
            )
            before = len(noted())
            process.start()
            if kills < 20:
                # Somewhere within the next few encodings, and between two; several captions are one.
                goal = before + chance.randrange(0, 2 if kills < 4 else 8)
                while len(noted()) < goal and process.is_alive():
                    time.sleep(0.001)
                time.sleep(chance.uniform(0, 0.01))
                process.kill()
            process.join()
            index = Index(cache)
            index.refresh()
            now = dict(zip(join_keys(index.rows), index.rows["length"].tolist(), strict=True))
            assert index.damaged == [] and kept.items() <= now.items(), "what was there stays, and is whole"
            lost = sum(noted()[before:]) - (sum(now.values()) - sum(kept.values()))
            assert 0 <= lost <= KILLED_SHARD
            kept, twice = now, twice + lost
            if process.exitcode == 0:
                break
            kills += 1
    assert kills == 20 and len(kept) == pictures + 13 and twice > 0
    assert verify(cache).good and verify(cache).entries == pictures + 13

    truth = TensorCache(cache)
    vae = load_vae(nano_base.folder, dtype=torch.float32, device=CPU)
    made = Encoder(nano_base, truth, dtype=torch.float32, device=CPU,
                   captions=CaptionSettings())  # fmt: skip
    text = TextEncoder(nano_base.folder, dtype=torch.float32, device=CPU, max_tokens=2048)
    for sample, where in list(zip(samples, made.encoded(samples), strict=True))[::20]:
        assert torch.equal(truth.get(where.latents), encode_pixels(vae, load_pixels(sample)[None])[0])
        assert torch.equal(truth.get(where.texts[0]), text.encode(sample.caption))


@pytest.mark.parametrize(
    ("part", "key", "named"),
    [
        ("text_encoder", "language_model.layers.3.mlp.up_proj.weight", "the caption {"),
        ("transformer", "llm_cond_proj.bias", "transformer: llm_cond_proj.bias holds"),
        ("vae", "encoder.conv_in.weight", "the picture "),
    ],
)
def test_what_is_not_finite_is_named_and_never_cached(
    nano_base, tmp_path, encoder_for, samples, part, key, named
):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(nano_base.folder, tmp_path / "base")
    file = next((folder / part).glob("*.safetensors"))
    tensors = load_file(file)
    whole = tensors[key].clone()
    tensors[key].view(-1)[0] = torch.nan
    save_file(tensors, file)
    encoder = encoder_for()
    encoder.folder = folder
    captions = {caption for sample in samples for caption in encoder.texts(sample)}
    for work in (lambda: encoder.encode_captions(captions), lambda: encoder.encode_pictures(samples)):
        try:
            work()
        except IdeoflowError as error:
            (told,) = error.diagnostics
    assert (
        told.code is model_codes.NOT_FINITE and named in told.message and str(folder / part) in told.message
    )
    save_file({**tensors, key: whole}, file)  # with the same digest, as far as samples tell
    encoder.encode_captions(captions)
    encoder.encode_pictures(samples)
    for sample in encoder.encoded(samples):
        assert all(encoder.cache.get(k).isfinite().all() for k in (sample.latents, *sample.texts))
