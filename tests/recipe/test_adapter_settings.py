"""Settings of [adapter] that are refused, each at its place."""

from typing import get_args, get_type_hints

import pytest
from peft import LoKrConfig, LoraConfig

from ideoflow.diagnostics import IdeoflowError
from ideoflow.diagnostics.codes import recipe as codes
from ideoflow.recipe import parse_recipe

HEAD = '[model]\nbase = "nano"\n[data]\nimages = "pictures"\n'
CASES = {
    "table of whole numbers": (
        "[adapter]\nrank_pattern = { '*.w2' = 8.5 }",
        codes.WRONG_TYPE,
        "{ '*.w2' = 8.5 }",
        "must be a table of whole numbers, not a table holding a number",
        "",
    ),
    "too small in a table": (
        "[adapter.alpha_pattern]\n'*.w2' = 0",
        codes.BAD_VALUE,
        "0",
        "'*.w2' is 0.0, but must be above 0",
        "",
    ),
    "rank of nothing": (
        "[adapter]\ntargets = 'attention'\nrank_pattern = { '*.w2' = 8 }",
        codes.IMPOSSIBLE_PAIR,
        "{ '*.w2' = 8 }",
        "'*.w2' in rank_pattern matches none of the targets",
        "",
    ),
    "qkv apart in a lokr": (
        "[adapter]\nkind = 'lokr'\nrank_pattern = { '*.to_k' = 8 }",
        codes.IMPOSSIBLE_PAIR,
        "{ '*.to_k' = 8 }",
        "parts q, k and v",
        "the same value",
    ),
    "rslora of a lokr": (
        "[adapter]\nkind = 'lokr'\nrslora = true",
        codes.IMPOSSIBLE_PAIR,
        "true",
        "rslora is for lora and dora",
        "remove rslora",
    ),
    "init of a lokr": (
        "[adapter]\nkind = 'lokr'\ninit = 'gaussian'",
        codes.IMPOSSIBLE_PAIR,
        "'gaussian'",
        "init = 'gaussian' is for lora and dora, and kind is 'lokr'",
        "remove init",
    ),
    "a lokr's init": (
        "[adapter]\ninit = 'lycoris'",
        codes.IMPOSSIBLE_PAIR,
        "'lycoris'",
        "init = 'lycoris' is for lokr, and kind is 'lora'",
        "kind = 'lokr'",
    ),
    "a start that is not the base": (
        "[adapter]\ninit = false",
        codes.OTHER_TRAINER,
        "false",
        "'init' cannot be false: it leaves no factor zero",
        "'default'",
    ),
    "factor of a lora": (
        "[adapter]\nfactor = 8",
        codes.IMPOSSIBLE_PAIR,
        "8",
        "factor is for lokr",
        "kind = 'lokr'",
    ),
    "rank of full matrices": (
        "[adapter]\nkind = 'lokr'\nfull_matrix = true\nrank = 8",
        codes.IMPOSSIBLE_PAIR,
        "8",
        "full_matrix leaves no factor low-rank",
        "remove rank",
    ),
    "no reader": (
        "[adapter]\nkind = 'loha'\n[output]\nformat = 'both'",
        codes.IMPOSSIBLE_PAIR,
        "'both'",
        "no reader for a loha",
        "'comfyui'",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_is_refused_at_its_place(name):
    extra, code, under, message, cure = CASES[name]
    with pytest.raises(IdeoflowError) as caught:
        parse_recipe(HEAD + extra)
    (diagnostic,) = caught.value.diagnostics
    span = diagnostic.span
    assert diagnostic.code is code and span.line > 4
    assert message in diagnostic.message and cure in diagnostic.cure
    assert span.source[span.column - 1 : span.end_column - 1] == under


@pytest.mark.parametrize("config", [(LoraConfig, "init_lora_weights"), (LoKrConfig, "init_weights")])
def test_every_start_that_peft_has_is_offered_or_refused_by_name(config):
    cls, field = config
    literals = [o for o in get_args(get_type_hints(cls)[field]) if get_args(o)]
    for start in (name for literal in literals for name in get_args(literal)):
        text = f"{HEAD}[adapter]\ninit = '{start.replace('[number of iters]', '16')}'"
        try:
            assert parse_recipe(f"{text}\nkind = '{'lokr' if cls is LoKrConfig else 'lora'}'")
        except IdeoflowError as error:
            (diagnostic,) = error.diagnostics
            assert diagnostic.code is codes.OTHER_TRAINER and start[:5] in diagnostic.message


def test_tables_of_ranks_and_alphas_are_read():
    text = "[adapter]\nrank_pattern = { '*.w2' = 8 }\n[adapter.alpha_pattern]\n'layers.0.*' = 4\n"
    adapter = parse_recipe(HEAD + text).tables.adapter
    assert adapter.rank_pattern == {"*.w2": 8} and adapter.alpha_pattern == {"layers.0.*": 4.0}
