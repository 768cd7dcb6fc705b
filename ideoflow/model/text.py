"""Captions to the text features that the transformer attends to, without ever holding the text encoder.

The result is that of ``Ideogram4Pipeline.encode_prompt`` (diffusers 0.42) followed by the transformer's own
frozen norm and projection: chat template, tokens, the outputs of 13 decoder layers of Qwen3-VL with the layer
index varying fastest, RMS norm, Linear. The projected features are 11.6 times smaller than the raw ones (4608
against 53248 numbers a token) and lose nothing while those two layers stay frozen.

The 16 GB of the text encoder are streamed: many captions go through one layer while the next is being read,
and then it makes room, so that a card that can train the adapter can encode its captions. Nor are the raw
features ever held. With W the projection's weight, g the norm's and f = (f_1 ... f_13) the tapped outputs,

    W (g f / rms(f)) + b  =  (sum over k of W_k (g_k f_k)) / rms(f) + b,   rms(f)^2 = mean of f^2 + eps,

so each tapped layer adds its part and is forgotten. Captions of about one length are run together, padded at
their ends: attention is causal, so no token of a caption sees what comes after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerBase
from transformers.masking_utils import create_causal_mask

from ideoflow.diagnostics import Span, fail
from ideoflow.diagnostics.codes.model import NOT_FINITE, TOO_LONG
from ideoflow.model.checkpoint import Checkpoint
from ideoflow.model.fit import beside_decoder, decoder_prefix
from ideoflow.model.load import complete, in_template, load_tokenizer, read_tensors, told
from ideoflow.model.spec import TAPPED_LAYERS

# Tokens of the captions that go through a layer in turn. Their states and sums take 26 KB a token at the true
# size: with two layers and the projection all stays under 3 GiB.
TOKENS_AT_ONCE = 32768
# Tokens, padding included, that go through a layer in one call: enough to fill a card. A processor gains
# nothing by it, and alone each caption has the same bits in any company.
TOKENS_A_BATCH = {"cuda": 4096, "cpu": 1}
_NORM_EPS = 1e-6  # of llm_cond_norm
_PROJECTION = ("llm_cond_norm.weight", "llm_cond_proj.weight", "llm_cond_proj.bias")


def tokenize(
    tokenizer: PreTrainedTokenizerBase, caption: str, *, max_tokens: int, span: Span | None = None
) -> list[int]:
    """Token ids of a caption inside the chat template.

    Raises:
        IdeoflowError: when there are more than ``max_tokens``.
    """
    text = in_template(tokenizer, caption)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) > max_tokens:
        cure = "shorten descriptions, or drop the least important elements"
        notes = (f"it begins {caption[:80]}",)
        message = f"a caption of {len(ids)} tokens; the limit is {max_tokens}"
        fail(TOO_LONG, message, span, cure=cure, notes=notes)
    return ids


class TextEncoder:
    """Tokenizer, streamed decoder and projection together: captions in, projected features out.

    Args:
        folder: a base in diffusers' layout; of its transformer only two layers are read.
        dtype: of the decoder's arithmetic and of the result.
        device: where the arithmetic is done, and where the results are.
        max_tokens: longer captions are refused.
        transformer: a single file that takes the place of the base's transformer.

    Raises:
        IdeoflowError: when files are missing or damaged.
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype, device: torch.device, max_tokens: int,
                 transformer: Path | None = None) -> None:  # fmt: skip
        self.part, self.dtype, self.device, self.max_tokens = (
            folder / "text_encoder",
            dtype,
            device,
            max_tokens,
        )
        self.tokenizer = load_tokenizer(folder)
        with told(self.part):
            # Buffers (rotary frequencies) are in no file, so they are computed; parameters stay empty.
            with init_empty_weights(include_buffers=False):
                self.decoder = AutoModel.from_config(AutoConfig.from_pretrained(self.part)).language_model
            self.decoder.requires_grad_(False).eval().rotary_emb.to(device)
            self.weights = Checkpoint(self.part)
        self.shapes = {name: p.shape for name, p in self.decoder.named_parameters()}
        self.prefix = self._find_prefix()
        place = transformer or folder / "transformer"
        projection = read_tensors(place, _PROJECTION, dtype=torch.float32, device=device)
        for name, value in projection.items():
            if not value.isfinite().all():
                cure = "remove the file and download it again"
                fail(NOT_FINITE, f"{place}: {name} holds numbers that are not finite", cure=cure)
        norm, weight, bias = projection.values()
        taps = len(TAPPED_LAYERS)
        # The layer index varies fastest in a feature vector: column h * 13 + k is unit h after the k-th tap.
        self.norm_by_tap = norm.unflatten(0, (-1, taps)).T.contiguous()
        self.weight_by_tap = weight.to(dtype).unflatten(1, (-1, taps)).permute(2, 0, 1).contiguous()
        self.bias = bias
        # Layers are fetched beside the arithmetic.
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def _find_prefix(self) -> str:
        """What the decoder's names begin with in the files; checks that they are all there."""
        found = set(self.weights.names())
        prefix = decoder_prefix(found)
        wanted = {prefix + name for name in self.shapes}
        extra = {name for name in found - wanted if not beside_decoder(name)}
        complete(self.part, wanted - found, extra, ())
        return prefix

    def encode(self, caption: str, span: Span | None = None) -> Tensor:
        """Canonical JSON caption -> (tokens, hidden) projected features.

        Raises:
            IdeoflowError: when it is too long.
        """
        return next(self.encode_tokens([self.tokens(caption, span)]))[0]

    def tokens(self, caption: str, span: Span | None = None) -> list[int]:
        """Token ids of a caption in the chat template; raises like :func:`tokenize`."""
        return tokenize(self.tokenizer, caption, max_tokens=self.max_tokens, span=span)

    def encode_tokens(
        self,
        captions: Sequence[list[int]],
        progress: Callable[[int], None] = lambda done: None,
        *,
        before_results: Callable[[], None] = lambda: None,
        result_bytes: int | None = None,
    ) -> Iterator[list[Tensor]]:
        """Token ids -> (tokens, hidden) projected features, for as many captions at a time as go together.

        Args:
            progress: gets how many captions are done, after each layer.
            before_results: called each time when all but the last step of the arithmetic is done.
            result_bytes: at most about so many bytes of features at a time.
        """
        together = TOKENS_AT_ONCE
        if result_bytes is not None:
            together = min(together, result_bytes // (self.bias.shape[0] * self.dtype.itemsize))
        before = 0
        for group in _groups(captions, together):

            def layers_done(share: float, before: int = before, size: int = len(group)) -> None:
                progress(before + int(size * share))

            yield self._encode_group(group, layers_done, before_results)
            before += len(group)

    @torch.no_grad()
    def _encode_group(
        self,
        captions: Sequence[list[int]],
        progress: Callable[[float], None],
        before_results: Callable[[], None],
    ) -> list[Tensor]:
        batches = _batches(captions, TOKENS_A_BATCH["cuda" if self.device.type == "cuda" else "cpu"])
        ids = [_padded([captions[c] for c in batch]).to(self.device) for batch in batches]
        table = self._read("embed_tokens.weight")
        states = [nn.functional.embedding(i, table) for i in ids]
        del table
        places = [torch.arange(i.shape[1], device=self.device).expand(i.shape) for i in ids]
        # Text has the same position on all three axes of the rotary embedding.
        rotary = [
            self.decoder.rotary_emb(s, p.expand(3, *p.shape)) for s, p in zip(states, places, strict=True)
        ]
        masks = [
            create_causal_mask(
                config=self.decoder.config,
                inputs_embeds=s,
                attention_mask=torch.ones_like(i),
                past_key_values=None,
                position_ids=p,
            )
            for s, i, p in zip(states, ids, places, strict=True)
        ]
        hidden = self.bias.shape[0]
        sums = [torch.zeros(*i.shape, hidden, device=self.device) for i in ids]
        squares = [torch.zeros(*i.shape, 1, device=self.device) for i in ids]
        last = TAPPED_LAYERS[-1]
        for index, layer in enumerate(self._layers(last + 1)):
            for b, state in enumerate(states):
                states[b] = layer(
                    state,
                    attention_mask=masks[b],
                    position_ids=places[b],
                    past_key_values=None,
                    position_embeddings=rotary[b],
                )
            if index in TAPPED_LAYERS:
                tap = TAPPED_LAYERS.index(index)
                norm, weight = self.norm_by_tap[tap], self.weight_by_tap[tap].float()
                for state, total, square in zip(states, sums, squares, strict=True):
                    f = state.float()
                    square += f.square().sum(-1, keepdim=True)
                    total += (f * norm) @ weight.T
            progress((index + 1) / (last + 1))
        before_results()
        features = self.norm_by_tap.numel()
        found: dict[int, Tensor] = {}
        for batch, total, square in zip(batches, sums, squares, strict=True):
            for row, caption in enumerate(batch):
                one = total[row, : len(captions[caption])], square[row, : len(captions[caption])]
                found[caption] = (one[0] * (one[1] / features + _NORM_EPS).rsqrt() + self.bias).to(self.dtype)
        return [found[caption] for caption in range(len(captions))]

    def _layers(self, count: int) -> Iterator[nn.Module]:
        """The first decoder layers, each there while it is used; the next one is read meanwhile."""
        with ThreadPoolExecutor(1, thread_name_prefix="layers") as reader:
            upcoming = reader.submit(self._read_layer, 0)
            for index in range(count):
                layer = self.decoder.layers[index]
                layer.load_state_dict(upcoming.result(), assign=True)
                if index + 1 < count:
                    upcoming = reader.submit(self._read_layer, index + 1)
                yield layer
                if self.copies is not None:
                    # The host runs ahead of the device: without this, more than two layers might be there.
                    torch.cuda.current_stream(self.device).synchronize()
                layer.to("meta")

    def _read_layer(self, index: int) -> dict[str, Tensor]:
        """The weights of a layer, on the device."""
        names = [name for name, _ in self.decoder.layers[index].named_parameters()]
        if self.copies is None:
            return {n: self._read(f"layers.{index}.{n}") for n in names}
        with torch.cuda.stream(self.copies):
            weights = {n: self._read(f"layers.{index}.{n}") for n in names}
        self.copies.synchronize()
        return weights

    def _read(self, name: str) -> Tensor:
        with told(self.part):
            value = self.weights.dense(self.prefix + name, self.dtype, self.device)
        if value.shape != self.shapes[name]:
            complete(self.part, (), (), [f"{name} ({list(value.shape)}, not {list(self.shapes[name])})"])
        return value


def _groups(captions: Sequence[list[int]], tokens: int) -> Iterator[Sequence[list[int]]]:
    """Runs of captions with at most ``tokens`` in all, and at least one caption each."""
    start, total = 0, 0
    for index, caption in enumerate(captions):
        if index > start and total + len(caption) > tokens:
            yield captions[start:index]
            start, total = index, 0
        total += len(caption)
    if start < len(captions):
        yield captions[start:]


def _batches(captions: Sequence[list[int]], tokens: int) -> list[list[int]]:
    """Which captions to pad to one length, by index: neighbours in length, at most ``tokens`` padded."""
    batches: list[list[int]] = []
    for caption in sorted(range(len(captions)), key=lambda c: len(captions[c])):
        if batches and (len(batches[-1]) + 1) * len(captions[caption]) <= tokens:
            batches[-1].append(caption)
        else:
            batches.append([caption])
    return batches


def _padded(captions: Sequence[list[int]]) -> Tensor:
    """Token ids [captions, longest]; any token will do as padding."""
    longest = max(map(len, captions))
    return torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens in captions])
