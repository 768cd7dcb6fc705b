"""Packed sequences: the samples of a batch laid end to end on one token axis, with no padding between them.

Each sample is ``[text tokens][image tokens]``, image tokens in row-major order of their grid. After the last
sample come *inert* tokens, as many as bring the length to a multiple of ``multiple``; they belong to no
sample, nothing attends to them, and their gradient is zero.

A :class:`PackedLayout` is a description made of Python integers only (hashable, so that what depends on
shapes alone can be cached under it); :meth:`PackedLayout.tensors` gives the index tensors on a device.
The rejected alternative, padding every sample to the longest caption, spends up to a third of a step on
tokens that are thrown away, and its [B, 1, L, L] mask keeps attention off the fast kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

import torch
from torch import Tensor

# The values that diffusers' Ideogram4Transformer2DModel expects; a test compares them with its own.
INERT_INDICATOR = -1
IMAGE_INDICATOR = 2
TEXT_INDICATOR = 3
IMAGE_POSITION_OFFSET = 65536


@dataclass(frozen=True)
class PackedTensors:
    """Index tensors of a layout on one device; L = ``layout.total``, B = samples.

    Attributes:
        cu_seqlens: int32 [B + 1], where each sample starts; the last entry is the number of real tokens.
        lengths: int32 [B], tokens of each sample.
        sample_index: int32 [L], the sample of each token; 0 for inert tokens, so that it is always an index.
        position_ids: int64 [L, 3], (t, h, w); inert tokens say 0.
        segment_ids: int64 [L], the sample of each token, -1 for inert ones.
        indicator: int64 [L], TEXT_INDICATOR, IMAGE_INDICATOR or INERT_INDICATOR.
        text_index: int64 [text tokens], where the packed text features go.
        image_index: int64 [image tokens], where the packed latents go and the velocities come from.
    """

    cu_seqlens: Tensor
    lengths: Tensor
    sample_index: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    indicator: Tensor
    text_index: Tensor
    image_index: Tensor


@dataclass(frozen=True)
class PackedLayout:
    """Which tokens a packed batch holds.

    Args:
        text_lengths: text tokens of each sample; 0 is allowed (no caption: the unconditional proxy).
        grids: (rows, columns) of image tokens of each sample; pixels / 16.
        multiple: the packed length is rounded up to a multiple of this with inert tokens.

    Raises:
        ValueError: if the two tuples differ in length, are empty, or hold a size that makes no sense.
    """

    text_lengths: tuple[int, ...]
    grids: tuple[tuple[int, int], ...]
    multiple: int = 1

    def __post_init__(self) -> None:
        if not self.grids or len(self.text_lengths) != len(self.grids):
            raise ValueError(f"{len(self.text_lengths)} text lengths for {len(self.grids)} image grids")
        if min(self.text_lengths) < 0 or min(min(g) for g in self.grids) < 1 or self.multiple < 1:
            raise ValueError(f"impossible sizes in {self}")

    @property
    def samples(self) -> int:
        return len(self.grids)

    @cached_property
    def image_lengths(self) -> tuple[int, ...]:
        return tuple(rows * columns for rows, columns in self.grids)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sample, text and image."""
        return tuple(text + image for text, image in zip(self.text_lengths, self.image_lengths, strict=True))

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each sample starts on the token axis, and where the last one ends: B + 1 integers."""
        return tuple(accumulate(self.lengths, initial=0))

    @property
    def tokens(self) -> int:
        """Real tokens."""
        return self.starts[-1]

    @property
    def total(self) -> int:
        """Length of the token axis: real and inert tokens."""
        return -(-self.tokens // self.multiple) * self.multiple

    @property
    def text_total(self) -> int:
        return sum(self.text_lengths)

    @property
    def image_total(self) -> int:
        return sum(self.image_lengths)

    @property
    def max_length(self) -> int:
        return max(self.lengths)

    @property
    def equal(self) -> bool:
        """Whether all samples have the same number of tokens, so that attention can run as a plain batch."""
        return len(set(self.lengths)) == 1

    def tensors(self, device: torch.device | str = "cpu") -> PackedTensors:
        """The index tensors on ``device``, 60 bytes a token; the 16 most recent are kept."""
        return _tensors(self, torch.device(device))

    def diffusers_inputs(self, latents: Tensor, text: Tensor) -> dict[str, Tensor]:
        """What diffusers' ``Ideogram4Transformer2DModel.forward`` takes for this layout, as one sequence.

        Args:
            latents: [image tokens, channels], packed over samples.
            text: [text tokens, features], packed over samples.

        Returns:
            ``hidden_states`` [1, L, channels], ``encoder_hidden_states`` [1, L, features], ``position_ids``
            [1, L, 3], ``segment_ids`` and ``indicator`` [1, L]. A time per sample, [B], becomes one per token
            with ``timestep[sample_index][None]``.
        """
        t = self.tensors(latents.device)
        hidden = latents.new_zeros(self.total, latents.shape[-1]).index_copy(0, t.image_index, latents)
        features = text.new_zeros(self.total, text.shape[-1]).index_copy(0, t.text_index, text)
        return {"hidden_states": hidden[None], "encoder_hidden_states": features[None],
                "position_ids": t.position_ids[None], "segment_ids": t.segment_ids[None],
                "indicator": t.indicator[None]}  # fmt: skip


def sent(value: Tensor, device: torch.device) -> Tensor:
    """A host's tensor on ``device``.

    To a GPU it goes from pinned memory. A copy from any other makes the host wait until the GPU has come to
    it, and captions of new lengths bring new tensors in nearly every step: the GPU would then wait for the
    host all through the next forward pass, instead of finding its work launched ahead.
    """
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # kept tensors must serve training too, whoever asks first
def _tensors(layout: PackedLayout, device: torch.device) -> PackedTensors:
    total = layout.total
    sample = torch.zeros(total, dtype=torch.int32)
    segment = torch.full((total,), -1, dtype=torch.int64)
    indicator = torch.full((total,), INERT_INDICATOR, dtype=torch.int64)
    position = torch.zeros(total, 3, dtype=torch.int64)
    for b, (start, text, (rows, columns)) in enumerate(
        zip(layout.starts, layout.text_lengths, layout.grids, strict=False)
    ):
        image, end = start + text, start + text + rows * columns
        sample[start:end] = b
        segment[start:end] = b
        indicator[start:image] = TEXT_INDICATOR
        indicator[image:end] = IMAGE_INDICATOR
        position[start:image] = torch.arange(text)[:, None]
        grid = torch.cartesian_prod(
            torch.zeros(1, dtype=torch.int64), torch.arange(rows), torch.arange(columns)
        )
        position[image:end] = grid + IMAGE_POSITION_OFFSET
    parts = {
        "cu_seqlens": torch.tensor(layout.starts, dtype=torch.int32),
        "lengths": torch.tensor(layout.lengths, dtype=torch.int32),
        "sample_index": sample,
        "position_ids": position,
        "segment_ids": segment,
        "indicator": indicator,
        "text_index": (indicator == TEXT_INDICATOR).nonzero().flatten(),
        "image_index": (indicator == IMAGE_INDICATOR).nonzero().flatten(),
    }
    return PackedTensors(**{name: sent(value, device) for name, value in parts.items()})
