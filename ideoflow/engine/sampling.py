"""Validation pictures: flow-matching Euler steps with guidance, from cached text features.

The same as ``Ideogram4Pipeline.__call__`` with the caption's tokens unpadded; a test compares the two.
v = g * conditional + (1 - g) * unconditional, where the unconditional velocity is the second transformer's
(true asymmetric guidance) or, as the plan says, the conditional one's without text tokens (proxy).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from ideoflow.data.encode import release
from ideoflow.engine.offload import move_unstreamed, stream_blocks
from ideoflow.engine.schedule import PRESETS, sampling_sigmas
from ideoflow.engine.setup import Trainable, UnpaddedAttention, plan_device, plan_dtype, plan_quantizer
from ideoflow.engine.step import predict_velocity
from ideoflow.model.latents import decode_tokens
from ideoflow.model.load import load_transformer, load_vae, told
from ideoflow.model.spec import PIXELS_PER_TOKEN
from ideoflow.plan.document import Plan

# velocity(latents (tokens, 128), time (1,)) -> (tokens, 128)
Velocity = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def denoise(
    conditional: Velocity,
    unconditional: Velocity,
    noise: Tensor,
    scheduler: FlowMatchEulerDiscreteScheduler,
    sigmas: list[float],
    guidance: list[float],
) -> Tensor:
    """Noise (tokens, 128) float32 -> image tokens (tokens, 128) float32."""
    scheduler.set_timesteps(sigmas=sigmas, device=noise.device)
    latents = noise
    for t, g in zip(scheduler.timesteps, guidance, strict=True):
        time = (1 - t.float() / scheduler.config.num_train_timesteps).reshape(1)
        v = conditional(latents, time).float()
        if g != 1:  # at guidance 1 the unconditional velocity has no weight
            v = g * v + (1 - g) * unconditional(latents, time).float()
        # The scheduler integrates noise minus data, the model predicts data minus noise.
        latents = scheduler.step(-v, t, latents, return_dict=False)[0]
    return latents


class Sampler:
    """Makes the plan's validation pictures; what it loads stays on the host between samplings."""

    def __init__(self, plan: Plan, model: Trainable) -> None:
        assert plan.base.folder is not None
        self.plan, self.model, self.folder = plan, model, plan.base.folder
        self.device, self.dtype = plan_device(plan), plan_dtype(plan)
        host = torch.device("cpu")
        own = self.folder / "scheduler"  # the parts beside a single file may come without one
        with told(own):
            self.scheduler = (
                FlowMatchEulerDiscreteScheduler.from_pretrained(own)
                if own.is_dir()
                else FlowMatchEulerDiscreteScheduler()
            )
        self.vae = load_vae(self.folder, dtype=self.dtype, device=host)
        self.unconditional, self.stream = None, None
        if plan.value("unconditional") != "proxy":
            self.unconditional = load_transformer(
                self.folder,
                "unconditional_transformer",
                precision=str(plan.value("precision")),
                device=host,
                file=plan.base.files.get("unconditional_transformer"),
                quantize_on=plan_quantizer(plan),
            )
            self.unconditional.set_attn_processor(UnpaddedAttention())
        if self.unconditional is not None and plan.value("unconditional") == "streamed":
            self.stream = stream_blocks(self.unconditional, self.device)

    def sample(self, texts: list[Tensor], numbers: Sequence[int] | None = None) -> list[Image.Image]:
        """One picture for each caption's text features (text tokens, hidden).

        ``numbers`` are the prompts' own, where they are not all of them; a picture's noise is by its number.
        """
        self.model.release()
        training = self.model.transformer.training
        self.model.transformer.eval()
        self._move_unconditional(self.device)
        tokens = [
            self._tokens(text, index) for index, text in zip(numbers or range(len(texts)), texts, strict=True)
        ]
        self._move_unconditional(torch.device("cpu"))
        self.vae.to(self.device)
        pictures = [self._decode(t) for t in tokens]
        self.vae.to("cpu")
        release(self.device)
        self.model.transformer.train(training)
        return pictures

    def _move_unconditional(self, device: torch.device) -> None:
        """All of it, or where its blocks are streamed the rest of it; slots are made at the first use."""
        if self.stream is not None and self.unconditional is not None:
            self.stream.release()
            move_unstreamed(self.unconditional, device)
        elif self.unconditional is not None:
            self.unconditional.to(device)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of image tokens."""
        settings, resolution = self.plan.tables.validate, self.plan.tables.data.resolution
        height, width = settings.height or resolution, settings.width or resolution
        return height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN

    def seed(self, index: int) -> int:
        """Seed of the noise of prompt number ``index``."""
        return self.plan.tables.validate.seed + index

    def _tokens(self, text: Tensor, index: int) -> Tensor:
        settings, (rows, columns) = self.plan.tables.validate, self.grid
        preset = PRESETS[settings.preset]
        steps = settings.steps or preset.steps
        sigmas = sampling_sigmas(
            steps, rows * PIXELS_PER_TOKEN, columns * PIXELS_PER_TOKEN, preset.mu, preset.std
        )
        channels = self.model.transformer.config.in_channels
        chance = torch.Generator().manual_seed(self.seed(index))
        noise = torch.randn(rows * columns, channels, generator=chance).to(self.device)
        without_text = (
            partial(predict_velocity, self.unconditional) if self.unconditional else self.model.predict
        )
        return denoise(
            lambda x, t: self.model.predict(x, t, text, self.grid),
            lambda x, t: without_text(x, t, text[:0], self.grid),
            noise,
            self.scheduler,
            sigmas,
            preset.guidance(steps, settings.guidance),
        )

    def _decode(self, tokens: Tensor) -> Image.Image:
        pixels = decode_tokens(self.vae, tokens[None], self.grid)
        picture: Image.Image = VaeImageProcessor().postprocess(pixels, output_type="pil")[0]
        return picture


def write_picture(picture: Image.Image, file: Path) -> Path:
    """Writes a PNG."""
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file, optimize=True)
    return file
