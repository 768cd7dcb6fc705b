"""The examples in docs/captions.md compile."""

import re
from pathlib import Path

from ideoflow.captions import compile_caption
from ideoflow.captions.regions import PLACES, REGIONS

PAGE = (Path(__file__).parents[2] / "docs" / "captions.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_examples_compile(tmp_path):
    first, many, prose, shared = EXAMPLES
    (tmp_path / "film.icap").write_text("style noon\n  lighting: Noon.\n", encoding="utf-8")
    shared = shared.replace("../styles/", "")
    for text, count in (
        (shared + "\n" + first.replace("style: dusk-film\n", ""), 1),
        (shared + "\n" + many, 2),
    ):
        result = compile_caption(text, base_dir=tmp_path)
        assert result.diagnostics == () and len(result.captions) == count
    assert result.captions[1].caption["style_description"]["photo"].startswith("35mm")
    quoted = compile_caption(prose + "aesthetics: a\nart_style: b\n").captions[0].caption
    assert quoted["style_description"]["medium"] == 'Two lines,\nand a "quote" at the end'
    assert quoted["compositional_deconstruction"]["background"].endswith("5 # or more")


def test_the_boxes_of_the_table_are_boxes():
    rows = re.findall(
        r"^\| (`[^|]*`) \|", PAGE[PAGE.index("### Boxes") : PAGE.index("### Colours")], re.MULTILINE
    )
    boxes = [box for row in rows for box in re.findall(r"`([^`]+)`", row)]
    assert len(boxes) == 8
    for box in boxes:
        result = compile_caption(f"background: x\nobj {box}: y\n", image_size=(1536, 1024))
        assert result.diagnostics == () and "bbox" in result.captions[0].json, box


def test_every_place_and_region_is_on_the_page():
    assert [name for name in PLACES if f"`{name}`" not in PAGE] == []
    for name in REGIONS:
        side, _, part = name.partition("-")
        assert f"`{name}`" in PAGE or (f"`{side}-`" in PAGE and f"-{part}`" in PAGE), name
