"""One damaged tensor anywhere in a base: inspecting and reading it refuse it alike, by file and key."""

import json
import shutil

import pytest
import torch
from checkpoint_forms import FORMS
from damage import SPAN, edit, refused, store, weights
from diffusers import AutoencoderKLFlux2
from safetensors.torch import load_file, save_file

from ideoflow.diagnostics import IdeoflowError
from ideoflow.diagnostics.codes import model as codes
from ideoflow.model.base import locate_base
from ideoflow.model.inspect import inspect

W1 = "layers.1.feed_forward.w1.weight"
STATE = f"{W1}.quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="module")
def forms(nano_folder):
    """forms(name) -> a fresh dict of the nano transformer's tensors in that form."""
    state = load_file(nano_folder / "transformer" / "diffusion_pytorch_model.safetensors")
    made = {}

    def form(name):
        if name not in made:
            made[name] = {k: v.contiguous() for k, v in FORMS[name][0](state).items()}
        return dict(made[name])

    return form


# Names and shapes -----------------------------------------------------------------------------------------

KEYS = {
    "transformer": W1,
    "unconditional_transformer": "layers.0.attention.norm_q.weight",
    "text_encoder": "language_model.layers.3.mlp.up_proj.weight",
    "vae": "encoder.conv_in.weight",
}


@pytest.mark.parametrize(("part", "key"), KEYS.items())
def test_a_tensor_that_does_not_fit_its_part(copy, part, key):
    whole = load_file(weights(copy, part))
    file = store(copy, part, {k: v for k, v in whole.items() if k != key})
    refused(copy, f"{file}: tensors are missing: {key}")
    store(copy, part, {**whole, "stranger.weight": torch.zeros(1)})
    refused(copy, f"{file}: tensors are not known: stranger.weight")
    shape = list(whole[key].shape)
    store(copy, part, {**whole, key: whole[key][1:].contiguous()})
    refused(copy, f"{file}: tensors are of the wrong shape: {key} ([{shape[0] - 1}", f"not {shape})")


@pytest.mark.parametrize("form", ["original layout, FP8, [out]", "ComfyUI", "NF4, nested"])
def test_a_tensor_that_does_not_fit_in_other_forms(copy, forms, form):
    whole = forms(form)
    key = next(k for k in whole if k.endswith("layers.0.attention_norm1.weight"))
    file = store(copy, "transformer", {k: v for k, v in whole.items() if k != key})
    refused(copy, f"{file}: tensors are missing: layers.0.attention_norm1.weight")
    store(copy, "transformer", {**whole, key: torch.ones(7)})
    refused(copy, f"{file}: tensors are of the wrong shape: {key} ([7], not [192])")


@pytest.mark.parametrize("key", ["layers.0.feed_forward.w1.weight", "layers.0.attention.norm_q.weight"])
def test_sizes_are_told_by_the_blocks_that_have_them(forms, tmp_path, key):
    whole, file = forms("diffusers, bf16"), tmp_path / "x.safetensors"
    for state, what in (
        ({k: v for k, v in whole.items() if k != key}, f"missing: {key}"),
        ({**whole, key: whole[key][1:].contiguous()}, f"of the wrong shape: {key} ("),
        ({k: v for k, v in whole.items() if not k.endswith(key[9:])}, f"missing: {key}"),
    ):
        save_file(state, file)
        (problem,) = inspect(file).problems
        assert problem.message.startswith(f"{file}: tensors are {what}")


def test_a_file_of_several_is_named(copy, forms):
    whole, place = forms("diffusers, bf16"), copy / "transformer"
    weights(copy, "transformer").unlink()
    names = sorted(whole)
    extra = {"stranger.weight": torch.zeros(1)}
    save_file({k: whole[k] for k in names[::2]} | extra, place / "a.safetensors")
    save_file({k: whole[k] for k in names[1::2]}, place / "b.safetensors")
    refused(copy, f"{place / 'a.safetensors'}: tensors are not known: stranger.weight")
    odd = {names[1]: whole[names[1]].int()}
    save_file({k: whole[k] for k in names[::2]}, place / "a.safetensors")
    save_file({k: whole[k] for k in names[1::2]} | odd, place / "b.safetensors")
    refused(copy, f"{place / 'b.safetensors'}: {names[1]} is stored as I32")


@pytest.mark.parametrize("other", ["original layout, FP8, [out]", "ComfyUI"])
def test_two_models_in_one_folder(copy, forms, other):
    place = copy / "transformer"
    first = weights(copy, "transformer").rename(place / "a.safetensors")
    save_file(forms(other), place / "b.safetensors")
    for read in (lambda: locate_base(str(copy), span=SPAN), lambda: inspect(place)):
        with pytest.raises(IdeoflowError) as caught:
            read()
        (diagnostic,) = caught.value.diagnostics
        assert diagnostic.code is codes.UNSUPPORTED_FORM and "name one of them" in diagnostic.cure
        assert str(first) in diagnostic.message and str(place / "b.safetensors") in diagnostic.message
    # diffusers has a name of its own for what it reads of a folder, so that variants may lie beside it.
    first.rename(place / "diffusion_pytorch_model.safetensors")
    assert locate_base(str(copy)).storage == "float32"


def test_the_second_transformer_sees_no_text(copy):
    whole = load_file(weights(copy, "unconditional_transformer"))
    blind = {k: v for k, v in whole.items() if not k.startswith("llm_cond_")}
    store(copy, "unconditional_transformer", blind)
    assert locate_base(str(copy)).has_unconditional and not inspect(copy).problems


def test_an_autoencoder_that_is_built_otherwise_is_left_to_its_class(copy):
    config = json.loads((copy / "vae" / "config.json").read_text())
    shutil.rmtree(copy / "vae")
    narrow = {k: v for k, v in config.items() if not k.startswith("_")}
    narrow["decoder_block_out_channels"] = (8, 16, 16, 16)
    AutoencoderKLFlux2(**narrow).save_pretrained(copy / "vae")
    assert locate_base(str(copy)).present


def test_a_part_that_a_base_lacks(copy):
    shutil.rmtree(copy / "vae")
    with pytest.raises(IdeoflowError, match="has no folder vae"):
        inspect(copy)


@pytest.mark.parametrize("shape", [(575,), (1, 576), (5, 2), (2, 2, 144)])
def test_a_scale_that_belongs_to_no_row(copy, forms, shape):
    """Blocks of 128 x 128 or columns: other ways to quantise, whose weights would be read wrongly."""
    whole = forms("split, FP8, [out]")
    file = store(copy, "transformer", {**whole, f"{W1}_scale": torch.ones(shape)})
    refused(copy, f"{file}: {W1}_scale has the shape {list(shape)}", code=codes.UNSUPPORTED_FORM)


SCALES = {
    "not a number": lambda t: spoilt(t, "_scale", torch.nan),
    "infinite": lambda t: spoilt(t, "_scale", torch.inf),
    "zero": lambda t: spoilt(t, "_scale", 0),
    "in bfloat16": lambda t: {k: v.bfloat16() for k, v in spoilt(t, "_scale", -1).items()},
}


@pytest.mark.parametrize("damage", SCALES.values(), ids=SCALES)
def test_a_scale_that_is_no_number_above_0(copy, forms, damage):
    whole = forms("split, FP8, [out]")
    file = store(copy, "transformer", whole | damage(whole))
    refused(copy, f"{file}: {W1}_scale holds scales that are not finite or not above 0")


def test_scales_that_are_all_missing(copy, forms):
    whole = forms("split, FP8, [out]")
    store(copy, "transformer", {k: v for k, v in whole.items() if not k.endswith("_scale")})
    refused(copy, "numbers of 128 and above, and has no scale")
    cast = {
        k: v.to(v.dtype if v.ndim < 2 else torch.float8_e4m3fn) for k, v in forms("diffusers, bf16").items()
    }
    store(copy, "transformer", cast)
    assert locate_base(str(copy)).storage == "fp8", "plain numbers in e4m3 need none"


def test_a_scale_of_what_has_none(copy, forms):
    whole = forms("split, FP8, [out]")
    norm = "layers.1.attention_norm1.weight"
    file = store(copy, "transformer", {**whole, f"{norm}_scale": torch.ones(192)})
    refused(copy, f"{file}: {norm}_scale stands beside F32 [192], which has no scale")
    store(copy, "transformer", {**whole, W1: whole[W1].float()})
    refused(copy, f"{file}: {W1}_scale stands beside F32 [512, 192]")


@pytest.mark.parametrize("turn", [lambda w: w[1:], lambda w: w.T])
def test_a_weight_of_another_shape_beside_its_scale(copy, forms, turn):
    whole = forms("split, FP8, [out]")
    file = store(copy, "transformer", {**whole, W1: turn(whole[W1]).contiguous()})
    refused(copy, f"{file}: tensors are of the wrong shape: {W1} (")


STATISTICS = {
    "negative": ("bn.running_var", lambda v: v - 9, "not finite or not above 0"),
    "not a number": ("bn.running_mean", lambda v: v * torch.nan, "not finite"),
    "integers": ("bn.running_var", lambda v: v.int(), "is stored as I32"),
}


@pytest.mark.parametrize(("key", "damage", "told"), STATISTICS.values(), ids=STATISTICS)
def test_statistics_that_no_latents_have(copy, key, damage, told):
    file = edit(copy, "vae", lambda tensors: {**tensors, key: damage(tensors[key])})
    refused(copy, f"{file}: {key} ", told)


# What stands beside 4-bit codes ---------------------------------------------------------------------------


def state(tensors, **changes):
    """The state of a weight's codes with other entries; those of None are taken out."""
    facts = json.loads(bytes(tensors[STATE].numpy())) | changes
    return text(json.dumps({key: value for key, value in facts.items() if value is not None}))


def text(content):
    return {STATE: torch.tensor(list(content.encode()), dtype=torch.uint8)}


def cut(tensors, side, count):
    return {W1 + side: tensors[W1 + side][:-count].contiguous()}


def spoilt(tensors, side, value, place=0):
    """One number of a tensor replaced."""
    changed = tensors[W1 + side].clone()
    changed[place] = value
    return {W1 + side: changed}


GONE = [".absmax", ".nested_absmax", ".nested_quant_map", ".quant_map", STATE.removeprefix(W1), ""]
# nested or not, what replaces tensors, and which is told to be wrong, how
ODD = {
    "scales cut": (False, lambda t: cut(t, ".absmax", 3), ".absmax", "is F32 [1533], and 1536 of F32"),
    "coded scales cut": (True, lambda t: cut(t, ".absmax", 3), ".absmax", "is U8 [1533], and 1536 of U8"),
    "their scales cut": (True, lambda t: cut(t, ".nested_absmax", 1), ".nested_absmax", "6 of F32"),
    "scales of another type": (
        False, lambda t: {f"{W1}.absmax": t[f"{W1}.absmax"].half()}, ".absmax", "is F16"
    ),
    "codes cut": (False, lambda t: cut(t, "", 64), "", "is U8 [49088, 1], and 49152 of U8"),
    "codes of another type": (False, lambda t: {W1: t[W1].view(torch.int8)}, "", "is I8"),
    "numbers cut": (False, lambda t: cut(t, ".quant_map", 8), ".quant_map", "is F32 [8], and 16 of F32"),
    "numbers zero": (False, lambda t: {f"{W1}.quant_map": torch.zeros(16)}, ".quant_map", "do not ascend"),
    "numbers of scales zero": (
        True, lambda t: {f"{W1}.nested_quant_map": torch.zeros(256)}, ".nested_quant_map", "do not ascend"
    ),
    "scales not finite": (False, lambda t: spoilt(t, ".absmax", torch.nan), ".absmax", "not finite"),
    "scales below 0": (False, lambda t: spoilt(t, ".absmax", -1), ".absmax", "not finite or below 0"),
    "scales zero": (False, lambda t: {f"{W1}.absmax": 0 * t[f"{W1}.absmax"]}, ".absmax", "are all 0"),
    "their scales infinite": (
        True, lambda t: spoilt(t, ".nested_absmax", torch.inf), ".nested_absmax", "not finite"
    ),
    "numbers infinite": (
        False, lambda t: spoilt(t, ".quant_map", torch.inf, -1), ".quant_map", "are not within -1 and 1"
    ),
    "state zero": (False, lambda t: {STATE: torch.zeros_like(t[STATE])}, STATE, "is damaged: Expecting"),
    "state of no object": (False, lambda t: text("[1]"), STATE, "no JSON object"),
    "state of no text": (False, lambda t: {STATE: torch.full((9,), 255).byte()}, STATE, "is damaged"),
    "state cut deep": (False, lambda t: text("[" * 100_000), STATE, "is damaged"),
    "another code": (False, lambda t: state(t, quant_type="fp4"), STATE, '"quant_type": "fp4"'),
    "another block": (False, lambda t: state(t, blocksize=128), ".absmax", "in blocks of 128"),
    "odd block": (False, lambda t: state(t, blocksize="64"), STATE, '"blocksize": "64"'),
    "no shape": (False, lambda t: state(t, shape=None), STATE, "lacks 'shape'"),
    "odd shape": (False, lambda t: state(t, shape=[512, -192]), STATE, "-192"),
    "odd type": (False, lambda t: state(t, dtype="complex64"), STATE, "complex64"),
    "no offset": (True, lambda t: state(t, nested_offset=None), STATE, "lacks 'nested_offset'"),
    "odd offset": (True, lambda t: state(t, nested_offset="x"), STATE, "is damaged"),
    "another shape": (False, lambda t: state(t, shape=[192, 512]), "", "([192, 512], not [512, 192])"),
}  # fmt: skip


@pytest.mark.parametrize("side", GONE)
def test_what_belongs_beside_codes_is_missed(copy, forms, side):
    tensors = forms("NF4, nested")
    del tensors[W1 + side]
    file = store(copy, "transformer", tensors)
    refused(copy, f"{file}: tensors are missing: {W1}{side}")


@pytest.mark.parametrize(("nested", "damage", "key", "what"), ODD.values(), ids=ODD)
def test_what_does_not_belong_beside_codes(copy, forms, nested, damage, key, what):
    tensors = forms("NF4, nested" if nested else "NF4")
    file = store(copy, "transformer", tensors | damage(tensors))
    refused(copy, f"{file}: ", W1 + key.removeprefix(W1), what)


def test_many_alike_are_counted(copy, forms):
    tensors = forms("NF4")
    tensors |= {k: v[1:].contiguous() for k, v in tensors.items() if k.endswith(".absmax")}
    store(copy, "transformer", tensors)
    problems = inspect(copy).problems
    assert len(problems) == 3 and problems[-1].notes == ("and 45 more like it",)


def test_an_encoder_in_four_bits_is_held_to_the_same(copy):
    whole, key = load_file(weights(copy, "text_encoder")), "language_model.layers.3.mlp.up_proj.weight"
    packed, sides = {}, {}
    for name, value in FORMS["NF4"][0]({"layers.0.weight": whole[key]}).items():
        (sides if name.count(".") > 2 else packed)[name.replace("layers.0.weight", key)] = value
    store(copy, "text_encoder", whole | packed | sides)
    assert not inspect(copy).problems
    sides[f"{key}.absmax"] = sides[f"{key}.absmax"][1:].contiguous()
    file = store(copy, "text_encoder", whole | packed | sides)
    refused(copy, f"{file}: {key}.absmax is F32 [31], and 32 of F32")
