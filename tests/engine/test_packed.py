"""Packed layouts against diffusers' constants and an independent, per-token construction."""

import pytest
import torch
from diffusers.models.transformers import transformer_ideogram4 as reference

from ideoflow.engine import packed
from ideoflow.engine.packed import PackedLayout


def test_constants_are_those_of_diffusers():
    assert packed.INERT_INDICATOR == reference.SEQUENCE_PADDING_INDICATOR
    assert packed.IMAGE_INDICATOR == reference.OUTPUT_IMAGE_INDICATOR
    assert packed.TEXT_INDICATOR == reference.LLM_TOKEN_INDICATOR
    assert packed.IMAGE_POSITION_OFFSET == reference.IMAGE_POSITION_OFFSET


def test_tokens_one_by_one():
    layout = PackedLayout((2, 0, 1), ((1, 2), (2, 3), (3, 1)), multiple=8)
    t = layout.tensors()
    expected = []
    for sample, (text, (rows, columns)) in enumerate(zip(layout.text_lengths, layout.grids, strict=True)):
        expected += [(sample, packed.TEXT_INDICATOR, i, i, i) for i in range(text)]
        base = packed.IMAGE_POSITION_OFFSET
        expected += [
            (sample, packed.IMAGE_INDICATOR, base, base + row, base + column)
            for row in range(rows)
            for column in range(columns)
        ]
    assert layout.tokens == len(expected) == 14 and layout.total == 16
    expected += [(-1, packed.INERT_INDICATOR, 0, 0, 0)] * 2
    got = torch.cat([t.segment_ids[:, None], t.indicator[:, None], t.position_ids], 1)
    assert got.tolist() == [list(row) for row in expected]
    assert t.cu_seqlens.tolist() == [0, 4, 10, 14] and t.lengths.tolist() == [4, 6, 4]
    assert t.sample_index.tolist() == [max(row[0], 0) for row in expected]
    assert not layout.equal and PackedLayout((2, 4), ((2, 2), (1, 2))).equal


def test_diffusers_inputs_scatter_in_order():
    layout = PackedLayout((2, 1), ((1, 2), (2, 1)), multiple=4)
    latents, text = torch.arange(1.0, 5).view(4, 1), torch.arange(10.0, 13).view(3, 1)
    inputs = layout.diffusers_inputs(latents, text)
    assert inputs["hidden_states"].flatten().tolist() == [0, 0, 1, 2, 0, 3, 4, 0]
    assert inputs["encoder_hidden_states"].flatten().tolist() == [10, 11, 0, 0, 12, 0, 0, 0]
    assert {name: tuple(value.shape[:2]) for name, value in inputs.items()} == dict.fromkeys(inputs, (1, 8))


@pytest.mark.parametrize(
    ("lengths", "grids", "multiple"),
    [((), (), 1), ((1,), (), 1), ((-1,), ((1, 1),), 1), ((1,), ((0, 1),), 1)],
)
def test_impossible_layouts_raise(lengths, grids, multiple):
    with pytest.raises(ValueError):
        PackedLayout(lengths, grids, multiple)
