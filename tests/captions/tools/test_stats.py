"""Counts against hand counts, token lengths against transformers' own tokenisation and a byte tokenizer."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from ideoflow.captions.convert_item import Options
from ideoflow.captions.stats import TRAITS, Distribution, gather_stats, render_stats
from ideoflow.captions.tokens import LIMIT, TokenCounter
from ideoflow.diagnostics import IdeoflowError

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% for part in message.content %}{{ part.text }}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(folder: Path, template: str | None = TEMPLATE) -> Path:
    """A byte-level BPE without merges: one token a UTF-8 byte, so lengths can be counted by hand."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.enable_truncation(10)  # some tokenizer files ask for it; a count must not obey
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if template is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


CAPTIONS = ["A boat.", "", "静かな水 😀", 'quotes " and \\ \n', "x" * 5000]


def test_lengths_are_bytes_plus_the_template(tmp_path):
    counter = TokenCounter(byte_tokenizer(tmp_path / "t"))
    around = len("<|user|><|end|><|assistant|>")
    assert counter.has_template
    assert counter.count(CAPTIONS) == [len(c.encode()) + around for c in CAPTIONS]
    bare = TokenCounter(byte_tokenizer(tmp_path / "b", None) / "tokenizer.json")
    assert not bare.has_template
    assert bare.count(CAPTIONS) == [len(c.encode()) for c in CAPTIONS]
    assert bare.count(["\ud800"]), "a lone surrogate is counted, not a crash"


def test_lengths_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = byte_tokenizer(tmp_path / "t")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    theirs.chat_template = TEMPLATE
    theirs.backend_tokenizer.no_truncation()
    for caption, ours in zip(CAPTIONS, TokenCounter(folder).count(CAPTIONS), strict=True):
        messages = [{"role": "user", "content": [{"type": "text", "text": caption}]}]
        text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert ours == len(theirs(text, add_special_tokens=False)["input_ids"])


def test_the_template_is_found_where_transformers_keeps_it(tmp_path):
    jinja = byte_tokenizer(tmp_path / "j", None)
    (jinja / "chat_template.jinja").write_text("{{ messages[0].content[0].text }}!")
    named = byte_tokenizer(tmp_path / "n", None)
    templates = [{"name": "tool", "template": "no"}, {"name": "default", "template": "??"}]
    (named / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    base = byte_tokenizer(tmp_path / "base" / "tokenizer").parent
    assert [TokenCounter(p).count(["abc"]) for p in (jinja, named, base)] == [[4], [2], [31]]


@pytest.mark.parametrize("spoil", [
    lambda f: (f / "tokenizer.json").unlink(),
    lambda f: (f / "tokenizer.json").write_text("{"),
    lambda f: (f / "tokenizer_config.json").write_text("{"),
    lambda f: (f / "chat_template.jinja").write_text("{% for %}"),
    lambda f: (f / "chat_template.jinja").write_text("{{ no_such_function() }}"),
])  # fmt: skip
def test_what_is_no_tokenizer_is_told(tmp_path, spoil):
    folder = byte_tokenizer(tmp_path / "t")
    spoil(folder)
    with pytest.raises(IdeoflowError) as raised:
        TokenCounter(folder)
    assert raised.value.diagnostics[0].code.id == "IC740"


def test_counts_and_shares(tmp_path):
    style = {"aesthetics": "Calm.", "lighting": "Cool.", "photo": "35mm.", "medium": "Photograph."}
    boxed = {"type": "obj", "bbox": [0, 0, 9, 9], "desc": "A small boat", "color_palette": ["#112233"]}
    words = {"type": "text", "text": "not counted as prose", "desc": "Sign"}

    def caption(*elements, **parts):
        return {**parts, "compositional_deconstruction": {"background": "Lake.", "elements": list(elements)}}

    captions = [
        caption(boxed, words, high_level_description="One two.", style_description=style),
        caption(boxed, style_description={**style, "color_palette": ["#AABBCC"]}),
        caption(),
        caption(),
    ]
    lines = [json.dumps({"file_name": f"{i}.jpg", "caption": c}) for i, c in enumerate(captions)]
    (tmp_path / "m.jsonl").write_text("\n".join([*lines, '{"file_name": "bad.jpg", "text": "{"}']))
    tokenizer = byte_tokenizer(tmp_path / "t")
    stats = gather_stats([tmp_path / "m.jsonl"], Options(), tokenizer=tokenizer, jobs=1)
    found = stats.as_dict()
    assert (found["captions"], found["failed"], found["duplicates"]) == (4, 1, 1)
    assert found["shares"] == {
        "description": 0.25, "style": 0.5, "photo": 0.5, "art": 0.0, "style palette": 0.25,
        "element palette": 0.5, "elements": 0.5, "boxes": 0.5, "all boxes": 0.25, "text": 0.25,
    }  # fmt: skip
    assert (found["elements"], found["text_elements"], found["boxes"]) == (3, 1, 2)
    assert found["media"] == {"Photograph.": 2}
    # One two. Lake. Calm. Cool. 35mm. Photograph. A small boat, Sign
    assert found["lengths"]["words"]["maximum"] == 2 + 1 + 4 + 3 + 1
    sizes = [len(json.dumps(c, separators=(",", ":")).encode()) + 28 for c in captions]
    assert found["lengths"]["tokens"]["maximum"] == max(sizes)
    assert found["over_limit"] == 0 and found["chat_template_counted"]
    text = render_stats(stats)
    assert "4 captions, 1 failed, 1 exact duplicates" in text and "25.0%" in text


def test_captions_over_the_limit_are_named(tmp_path):
    lines = [json.dumps({"file_name": f"{i}.jpg", "text": "x" * i * 1000}) for i in range(1, 5)]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    stats = gather_stats([tmp_path / "m.jsonl"], Options(), tokenizer=byte_tokenizer(tmp_path / "t"), jobs=1)
    assert stats.as_dict()["over_limit"] == 3
    assert [name for name, tokens in stats.too_long if tokens > LIMIT] == ["2.jpg", "3.jpg", "4.jpg"]


def test_quantiles_are_nearest_rank():
    import numpy as np

    numbers = [random.Random(0).randrange(1000) for _ in range(777)]
    ours = Distribution.of(numbers)
    quantiles = np.quantile(numbers, [0, 0.5, 0.95, 1], method="inverted_cdf")
    assert [ours.minimum, ours.median, ours.p95, ours.maximum] == quantiles.tolist()
    assert ours.mean == pytest.approx(np.mean(numbers))
    assert Distribution.of([]) is None and Distribution.of([7]) == Distribution(1, 7, 7, 7, 7, 7.0)


def test_an_empty_folder_is_told(tmp_path):
    with pytest.raises(IdeoflowError):
        gather_stats([tmp_path], Options(), jobs=1)


def test_every_trait_has_words():
    assert len(set(TRAITS.values())) == len(TRAITS)
