"""Makes a trainable model out of a plan, in a fixed order: load, adapt, checkpoint, compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from diffusers import Ideogram4Transformer2DModel
from diffusers.models.transformers.transformer_ideogram4 import Ideogram4AttnProcessor
from torch import Tensor, nn

from ideoflow.diagnostics import fail
from ideoflow.diagnostics.codes.engine import NO_DEVICE, NO_SCRATCH
from ideoflow.diagnostics.codes.plan import CANNOT_BE_DONE
from ideoflow.engine.adapt import add_adapter
from ideoflow.engine.fused import FusedTransformer
from ideoflow.engine.fused.attention import Kernel
from ideoflow.engine.fused.graphs import GraphedSteps
from ideoflow.engine.masters import HostMasters
from ideoflow.engine.offload import HostMemory, Shards, offload_groups, stream_blocks
from ideoflow.engine.processes import ALONE, Processes
from ideoflow.engine.step import (
    TrainingSample,
    accumulate,
    accumulate_packed,
    predict_packed,
    predict_velocity,
)
from ideoflow.kernels.budget import AWAY, ROUNDING
from ideoflow.model.load import PRECISIONS, load_transformer
from ideoflow.model.random import random_transformer
from ideoflow.plan.document import Plan
from ideoflow.processes import this_process
from ideoflow.resources import user_cache


def plan_device(plan: Plan) -> torch.device:
    """The device that the plan was made for; of several processes, each one's own.

    Raises:
        IdeoflowError: when this machine has none.
    """
    device = torch.device(str(plan.value("device")))
    if device.type == "cuda" and not torch.cuda.is_available():
        cure = "set memory.device = 'cpu', or install a torch build for your GPU and driver"
        fail(NO_DEVICE, "the plan is for a GPU, but torch finds none", cure=cure)
    process = this_process()
    if device.type == "cuda" and process.ranks > 1:  # by number: a new thread's own is the first
        return torch.device("cuda", process.local_rank)
    return device


def plan_quantizer(plan: Plan) -> torch.device:
    """Where weights are rounded while they load."""
    return plan_device(plan) if plan.value("quantize_via") == "gpu" else torch.device("cpu")


def plan_dtype(plan: Plan) -> torch.dtype:
    """Type of the arithmetic, and of the frozen weights that are not quantised."""
    return PRECISIONS[str(plan.value("precision"))]


class UnpaddedAttention(Ideogram4AttnProcessor):
    """Diffusers' attention without its mask.

    Diffusers always passes a [1, 1, L, L] mask of segments. One sample alone, without padding, is one
    segment, so the mask is all true; leaving it out gives the same result through the fast kernels.
    """

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
    ) -> Tensor:
        return super().__call__(attn, hidden_states, None, image_rotary_emb)


@dataclass
class Trainable:
    """The model with its adapter, and how the plan's engine computes with it.

    Args:
        transformer: frozen base with PEFT's layers; names and files are theirs on every path.
        parameters: the trained tensors by name, float32.
        predict: velocity of one sample, as :func:`ideoflow.engine.step.predict_velocity` gives it.
        gradients: adds a batch's gradients, as :func:`ideoflow.engine.step.accumulate` does.
        release: gives back memory that only training needs; training may go on afterwards.
        streamed: weights wait elsewhere, and come to the device when they are needed.
        shards: this process's pieces of the weights, where these are cut up among the processes.
        overlaps: ``gradients`` is one backward pass, in which hooks on the parameters run.
        masters: the parameters and their gradients, where those are on the host.
    """

    transformer: Ideogram4Transformer2DModel
    parameters: dict[str, nn.Parameter]
    predict: Callable[[Tensor, Tensor, Tensor, tuple[int, int]], Tensor]
    gradients: Callable[[list[TrainingSample], float], Tensor]
    release: Callable[[], None] = lambda: None
    streamed: bool = False
    shards: Sequence[Tensor] = ()
    overlaps: bool = False
    masters: HostMasters | None = None


def loading_options(plan: Plan) -> dict[str, Any]:
    """How :func:`~ideoflow.model.load.load_transformer` is to hold the plan's base."""
    return {
        "precision": str(plan.value("precision")),
        "device": plan_device(plan),
        "quantize_on": plan_quantizer(plan),
        "streamed": plan.value("offload") != "none",
    }


def build(plan: Plan, processes: Processes = ALONE) -> Trainable:
    """Loads the base, puts a fresh adapter on it, and sets up the engine that the plan chose.

    A base that is not on this disk is made of random numbers, for whoever measures speed and memory; a run's
    base is fetched before.
    """
    options = loading_options(plan)
    if plan.base.present and plan.base.folder:
        file = plan.base.files.get("transformer")
        return set_up(plan, load_transformer(plan.base.folder, file=file, **options), processes)
    return set_up(plan, random_transformer(asdict(plan.base.transformer), **options), processes)


def set_up(plan: Plan, transformer: Ideogram4Transformer2DModel, processes: Processes = ALONE) -> Trainable:
    """Puts a fresh adapter on a frozen base, held as the plan says, and sets up the engine around it."""
    device, offload = plan_device(plan), str(plan.value("offload"))
    source: HostMemory | Shards | None = None
    if offload == "stream":
        source = HostMemory(device)
    elif offload == "shard":
        source = _shards(device, processes)
    shards = source.buffers if isinstance(source, Shards) else ()
    transformer.set_attn_processor(UnpaddedAttention())
    parameters = add_adapter(transformer, plan)
    if plan.value("engine") == "fused":
        fused = FusedTransformer(
            transformer,
            linear=str(plan.value("matmul")),
            attention=cast(Kernel, plan.value("attention")),
            activation_budget=float(plan.value("activation_budget")),
            offload=AWAY[str(plan.value("activation_offload"))],
            rounded=plan.value("activation_offload") in ROUNDING,
            exact_blocks=int(plan.value("exact_blocks")),
            dtype=plan_dtype(plan),
        )
        if source:
            fused.stream(source=source)
        trained, masters = list(parameters.values()), None
        if plan.value("optimizer_state") == "offload":
            masters = fused.masters_on_host(trained)
        graphs = GraphedSteps(fused, trained) if plan.value("graphs") == "on" else None
        return Trainable(
            transformer,
            parameters,
            partial(predict_packed, fused),
            partial(accumulate_packed, fused, graphs=graphs),
            graphs.release if graphs else lambda: None,
            offload != "none",
            shards,
            overlaps=graphs is None and masters is None,
            masters=masters,
        )
    if source:
        stream_blocks(transformer, device, source)
    elif offload != "none":
        _offload_groups(transformer, device, offload, plan)
    if plan.value("checkpointing") == "on":
        transformer.enable_gradient_checkpointing()
    if plan.value("compile") == "regional":
        compile_blocks(transformer)
    return Trainable(
        transformer,
        parameters,
        partial(predict_velocity, transformer),
        partial(accumulate, transformer),
        streamed=offload != "none",
        shards=shards,
    )


def _shards(device: torch.device, processes: Processes) -> Shards:
    """This process's place among those that share the weights."""
    group = processes.weights_group(device)
    if device.type == "cuda" and group is None:
        message = "offload = 'shard' moves weights from GPU to GPU by NCCL, which this torch is built without"
        fail(CANNOT_BE_DONE, message, cure="set memory.offload = 'stream', or install a torch with NCCL")
    return Shards(device, processes.rank, processes.ranks, group)


def compile_blocks(transformer: Ideogram4Transformer2DModel) -> None:
    """Compiles the blocks' own forward, and not what hooks do before it: those of the streamer put the
    weights in place, which must be done anew in every pass. The blocks share their code."""
    for block in transformer.layers:
        block.forward = torch.compile(block.forward)


def _offload_groups(
    transformer: Ideogram4Transformer2DModel, device: torch.device, offload: str, plan: Plan
) -> None:
    """diffusers' group offloading, with what the recipe says of its groups."""
    memory, folder = plan.tables.memory, None
    if offload == "disk":
        parent = Path(memory.offload_folder) if memory.offload_folder else user_cache() / "offloaded"
        try:
            parent.mkdir(parents=True, exist_ok=True)
            # Goes with the model: what an earlier run left under the same names must not be read.
            scratch = TemporaryDirectory(prefix="weights-", dir=parent)
        except OSError as error:
            cure = "give another memory.offload_folder, on a disk with room for the weights"
            fail(NO_SCRATCH, f"cannot write to {parent}: {error.strerror or error}", cure=cure)
        transformer.offloaded_to = scratch
        folder = Path(scratch.name)
    level, blocks = ("leaf", 1) if offload == "leaf" else ("block", memory.offload_blocks)
    offload_groups(transformer, device, level, blocks=blocks, streams=memory.offload_streams, folder=folder)
