"""The nano base: a complete tiny Ideogram 4 in diffusers' own classes and layout, made from a seed.

It has every part of the released model (conditional and unconditional transformer, 36-layer Qwen3-VL text
body, FLUX.2 autoencoder, byte-level tokenizer with the chat template, scheduler) at sizes that a laptop
trains in a minute, so that the whole path can be tried, tested and demonstrated without a GPU or a download.
Nobody trained it: its weights are random, but for a colour path through the autoencoder and a linear
denoiser through the transformers, so that samples are coloured shapes rather than static. It knows nothing,
and an adapter trained on it is good for nothing else.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Ideogram4Pipeline,
    Ideogram4Transformer2DModel,
)
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLModel

from ideoflow.diagnostics import fail
from ideoflow.diagnostics.codes.model import NO_DOWNLOAD
from ideoflow.model.base import NANO_TEXT, NANO_TRANSFORMER, NANO_VAE
from ideoflow.model.latents import patchify
from ideoflow.model.quiet import disable_progress_bars

# Qwen's chat template, reduced to the one message with text parts that the model is trained on.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

# What the tokenizer's merges are learnt from: the keys of a caption and the commonest words of descriptions.
_CORPUS = """
{"high_level_description":"A photograph of","style_description":{"aesthetics":"","lighting":"","photo":"",
"medium":"Photograph.","color_palette":["#000000","#FFFFFF"]},"compositional_deconstruction":{"background":"",
"elements":[{"type":"obj","bbox":[100,200,300,400],"desc":""},{"type":"text","bbox":[0,0,1000,1000],"text":"",
"desc":""}]}} "art_style":" the a an of and in on at with to from by over under against behind beside between
left right top bottom centre center edge corner half third upper lower middle foreground background small
large tall wide long short round dark light bright soft warm cool white black red green blue yellow orange
brown grey gray purple pink golden wooden metal glass stone water sky cloud sun moon tree grass leaf flower
house street road wall window door table chair cup plate hand face eye hair person woman man child cat dog
bird boat car sign letters headline typography font serif sans bold thin light shadow reflection texture
grain film photograph photo picture image camera lens close-up wide shot portrait landscape scene view
morning evening night day summer winter natural muted vivid contrast quiet minimal clean simple detailed
"""


def make_nano(folder: Path, seed: int = 0) -> Path:
    """Writes the nano base to ``folder``, complete or not at all.

    Raises:
        IdeoflowError: when the folder cannot be written.
    """
    disable_progress_bars()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".nano-", dir=folder.parent) as scratch:
            nano_pipeline(seed).save_pretrained(scratch)
            Path(scratch).chmod(0o755)
            _move(Path(scratch), folder)
    except OSError as error:
        cure = "free some space (30 MB), or set IDEOFLOW_CACHE to a folder that can be written"
        fail(
            NO_DOWNLOAD, f"the nano base cannot be written to {folder}: {error.strerror or error}", cure=cure
        )
    return folder


def _move(made: Path, folder: Path) -> None:
    if folder.exists() and not (folder / "model_index.json").is_file():
        shutil.rmtree(folder)
    try:
        made.rename(folder)
        made.mkdir()  # so that the temporary folder's own clean-up finds something
    except OSError:
        if not (folder / "model_index.json").is_file():  # else another process was faster
            raise


def nano_pipeline(seed: int = 0) -> Ideogram4Pipeline:
    """The whole nano model in memory, float32, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = _tokenizer()
        return Ideogram4Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=_vae(),
            text_encoder=_text_encoder(),
            tokenizer=tokenizer,
            transformer=_transformer(),
            unconditional_transformer=_transformer(),
        )


def _transformer() -> Ideogram4Transformer2DModel:
    sizes = {name: getattr(NANO_TRANSFORMER, name) for name in NANO_TRANSFORMER.__slots__}
    model = Ideogram4Transformer2DModel(**sizes, mrope_section=(6, 5, 5)).eval()
    _denoise_linearly(model)
    return model


@torch.no_grad()
def _denoise_linearly(model: Ideogram4Transformer2DModel) -> None:
    """Lets the model predict, on top of its random blocks, the best velocity that knows nothing of pictures.

    For unit white data, x = (1 - sigma) x0 + sigma eps and v = x0 - eps, so E[v | x] = a x with
    a = (1 - 2 sigma) / s^2 and s^2 = (1 - sigma)^2 + sigma^2. The first 128 channels of the stream carry x;
    the last layer's norm divides them by s sqrt(128 / 192), and its scale, a linear function of the time
    features, is fitted to a s sqrt(128 / 192). Without this, an untrained base predicts noise of its own and
    an adapter spends all its steps on learning to be quiet.
    """
    channels, hidden = model.in_channels, model.hidden_size
    model.input_proj.weight.copy_(2 * torch.eye(hidden, channels))
    model.input_proj.bias.zero_()
    model.embed_image_indicator.weight.mul_(0.1)
    model.final_layer.linear.weight.copy_(torch.eye(channels, hidden))
    model.final_layer.linear.bias.zero_()

    t = torch.linspace(0.001, 0.999, 512)
    sigma = 1 - t
    spread = ((1 - sigma) ** 2 + sigma**2).sqrt()
    wanted = (1 - 2 * sigma) / spread * (channels / hidden) ** 0.5
    features = torch.nn.functional.silu(torch.nn.functional.silu(model.adaln_proj(model.t_embedding(t))))
    with_bias = torch.cat([features, torch.ones(len(t), 1)], dim=1).double()
    # A little ridge keeps the weights small, so that the fit outlives their rounding to bf16 or FP8.
    gram = with_bias.T @ with_bias + 1e-3 * torch.eye(with_bias.shape[1], dtype=torch.float64)
    fitted = torch.linalg.solve(gram, with_bias.T @ (wanted - 1).double()).float()
    model.final_layer.adaln_modulation.weight.copy_(fitted[:-1].expand(hidden, -1))
    model.final_layer.adaln_modulation.bias.fill_(float(fitted[-1]))


def _text_encoder() -> Qwen3VLModel:
    sizes = {name: getattr(NANO_TEXT, name) for name in NANO_TEXT.__slots__}
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 64,
        "out_hidden_size": 32,
        "deepstack_visual_indexes": [0],
    }
    text = {**sizes, "rope_parameters": rope, "max_position_embeddings": 4096, "tie_word_embeddings": True}
    return Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision)).eval()


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NANO_TEXT.vocab_size,
        special_tokens=SPECIAL_TOKENS,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_CORPUS.splitlines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


def _vae() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        block_out_channels=NANO_VAE.block_out_channels,
        layers_per_block=NANO_VAE.layers_per_block,
        latent_channels=NANO_VAE.latent_channels,
        norm_num_groups=_GROUPS,
    ).eval()
    _carry_colours(vae)
    _fit_latent_statistics(vae)
    return vae


# Channels come in groups that are normalised together; four of them make [+x, -x, +K, -K] below.
_GROUPS = 4
_K = 10.0


@torch.no_grad()
def _carry_colours(vae: AutoencoderKLFlux2) -> None:
    """Lets the first three latent channels carry red, green and blue: 8 x 8 means in, interpolation out.

    So that pictures come out blurred but recognisable from weights that nobody trained. Residual branches are
    silenced; the remaining channels keep their random weights. The group norm and SiLU at the end of encoder
    and decoder are made transparent by giving each colour a group with [+x, -x, +K, -K]: its mean is 0, its
    deviation nearly the constant sqrt(K^2 / 2 + x^2 / 2) (scaled for the group's size), and
    silu(y) - silu(-y) = y.
    """
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            module.conv2.weight.zero_()
            module.conv2.bias.zero_()
            if module.conv_shortcut is not None:
                _pass_colours(module.conv_shortcut, torch.ones(1, 1))
        elif isinstance(module, Attention):
            module.to_out[0].weight.zero_()
            module.to_out[0].bias.zero_()
    center = torch.zeros(3, 3)
    center[1, 1] = 1
    mean = torch.zeros(3, 3)
    mean[:2, :2] = 0.25
    tent = torch.outer(torch.tensor([0.25, 0.5, 0.25]), torch.tensor([0.25, 0.5, 0.25]))
    encoder, decoder = vae.encoder, vae.decoder
    _pass_colours(encoder.conv_in, center)
    for block in encoder.down_blocks[:-1]:
        _pass_colours(block.downsamplers[0].conv, mean)
    _to_pairs(encoder.down_blocks[-2].downsamplers[0].conv, mean, encoder.conv_norm_out)
    _from_pairs(encoder.conv_out, encoder.conv_norm_out)
    _pass_colours(vae.quant_conv, torch.ones(1, 1))
    _pass_colours(vae.post_quant_conv, torch.ones(1, 1))
    _pass_colours(decoder.conv_in, center)
    for block in decoder.up_blocks[:-1]:
        _pass_colours(block.upsamplers[0].conv, tent)
    _to_pairs(decoder.up_blocks[-1].resnets[0].conv_shortcut, torch.ones(1, 1), decoder.conv_norm_out)
    _from_pairs(decoder.conv_out, decoder.conv_norm_out)


def _pass_colours(conv: nn.Conv2d, kernel: Tensor) -> None:
    """Output channels 0..2 become ``kernel`` over input channels 0..2, and nothing else."""
    conv.weight[:3] = 0
    conv.bias[:3] = 0
    for c in range(3):
        conv.weight[c, c] = kernel


def _to_pairs(conv: nn.Conv2d, kernel: Tensor, norm: nn.GroupNorm) -> None:
    """Output group g becomes [+x, -x, +K, -K, 0...] of colour g, and ``norm`` undoes the division by K."""
    size = norm.num_channels // norm.num_groups
    for c in range(3):
        group = slice(c * size, (c + 1) * size)
        conv.weight[group] = 0
        conv.bias[group] = 0
        conv.weight[c * size, c] = kernel
        conv.weight[c * size + 1, c] = -kernel
        conv.bias[c * size + 2] = _K
        conv.bias[c * size + 3] = -_K
        norm.weight[group] = _K * (2 / size) ** 0.5


def _from_pairs(conv: nn.Conv2d, norm: nn.GroupNorm) -> None:
    """Output channels 0..2 become silu(+x) - silu(-x) of their group, which is x."""
    size = norm.num_channels // norm.num_groups
    conv.weight[:3] = 0
    conv.bias[:3] = 0
    for c in range(3):
        conv.weight[c, c * size, 1, 1] = 1
        conv.weight[c, c * size + 1, 1, 1] = -1


@torch.no_grad()
def _fit_latent_statistics(vae: AutoencoderKLFlux2) -> None:
    """Sets the batch-norm statistics from smooth random pictures, so that latents have unit variance."""
    coarse = torch.rand(8, 3, 8, 8)
    pictures = torch.nn.functional.interpolate(coarse, size=(128, 128), mode="bicubic") * 2 - 1
    patches = patchify(vae.encode(pictures.clamp(-1, 1)).latent_dist.mode()).flatten(0, 1)
    vae.bn.running_mean.copy_(patches.mean(0))
    vae.bn.running_var.copy_(patches.var(0))


def ensure_nano(folder: Path, say: Callable[[str], None] = lambda _: None) -> Path:
    """The nano base's folder; made first if it is not there."""
    if not (folder / "model_index.json").is_file():
        say(f"making the nano base in {folder}")
        make_nano(folder)
    return folder
