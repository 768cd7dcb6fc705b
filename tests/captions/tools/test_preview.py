"""The sheet in a real browser: what it draws, what it hides, and that captions cannot inject anything."""

from __future__ import annotations

import colorsys
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ideoflow.captions.convert_item import Options
from ideoflow.captions.preview import THUMBNAIL, write_preview
from ideoflow.diagnostics import IdeoflowError

CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--virtual-time-budget=8000",
    "--window-size=1300,900",
]

MARKUP = "<img src=x onerror=\"document.title='owned'\">"
EVIL = f"</script><script>document.title='owned'</script>{MARKUP} @@DATA@@ <!-- & ' \""


def caption(*elements, **parts):
    composition = {"background": "A lake.", "elements": list(elements)}
    return json.dumps({**parts, "compositional_deconstruction": composition})


def browse(page: Path, *more: str, fragment: str = "") -> str:
    """The document after its script has run."""
    profile = page.parent / "profile"
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *more, f"file://{page}{fragment}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def dump(page: Path, fragment: str = "", wanted: str = "") -> str:
    """The document as HTML; on a busy machine Chromium may write it out before the first card is filled."""
    for _ in range(5):
        dom = browse(page, "--dump-dom", fragment=fragment)
        if wanted in body(dom):
            break
    return dom


def body(dom: str) -> str:
    """The sheet itself, without the data it was made from."""
    return dom[dom.index('<main id="sheet"') : dom.index("</main>")]


@pytest.fixture
def folder(tmp_path):
    source = tmp_path / "set"
    source.mkdir()
    Image.new("RGB", (1200, 800), "#1040A0").save(source / "boat.png")
    box = {"type": "obj", "bbox": [250, 500, 750, 1000], "desc": "A boat", "color_palette": ["#FF8800"]}
    words = {"type": "text", "bbox": [0, 0, 200, 400], "text": "STILL\nWATER", "desc": "A headline"}
    (source / "boat.json").write_text(caption(box, words))
    Image.new("L", (50, 500)).save(source / "evil.jpg")
    (source / "evil.json").write_text(caption({"type": "text", "text": EVIL, "desc": EVIL},
                                              high_level_description=EVIL))  # fmt: skip
    Image.new("RGBA", (60, 40), (0, 0, 0, 0)).save(source / "bad.png")
    (source / "bad.icap").write_text("A boat\nobj [1, 2, 3, 4]: x\n")
    (source / "lone.icap").write_text("A lonely caption.\nbackground: x\n")
    (source / "broken.jpg").write_bytes(b"no picture")
    (source / "broken.txt").write_text("A broken picture.")
    return source


def test_the_file_is_complete_and_loads_nothing(folder, tmp_path):
    page = tmp_path / "sheet.html"
    report = write_preview([folder], page, Options(), title=EVIL, jobs=1)
    assert (report.cards, report.errors) == (5, 1)
    text = page.read_text()
    assert "default-src 'none'" in text
    outside = text
    for data in re.findall(r'<script type="application/json" class="item">(.*?)</script>', text):
        outside = outside.replace(data, "")
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:|//)|url\(|@import|fetch\(", outside)

    class Tags(HTMLParser):
        scripts = 0

        def handle_starttag(self, tag, attributes):
            self.scripts += tag == "script"
            assert tag != "img", "markup from a caption"

    parser = Tags()
    parser.feed(text)
    assert parser.scripts == 5 + 3 + 1, "five captions, three pictures that can be read, the program"


def test_embedded_pictures_are_small_and_upright(folder, tmp_path):
    import base64
    import io

    turned = Image.new("RGB", (2000, 1000), "red")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(folder / "turned.jpg", exif=exif)
    (folder / "turned.txt").write_text("Turned.")
    page = tmp_path / "sheet.html"
    write_preview([folder / "turned.txt"], page, Options(), jobs=1)
    data = re.search(r'id="picture-0">data:image/jpeg;base64,([^<]+)<', page.read_text())[1]
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert image.size == (THUMBNAIL // 2, THUMBNAIL)


def test_linked_pictures_are_named_relative_and_quoted(folder, tmp_path):
    shutil.move(folder / "boat.png", folder / "a #1 100%.png")
    shutil.move(folder / "boat.json", folder / "a #1 100%.json")
    page = tmp_path / "deep" / "sheet.html"
    write_preview([folder / "a #1 100%.json"], page, Options(), link=True, jobs=1)
    assert '"picture": "../set/a%20%231%20100%25.png"' in page.read_text()
    assert page.stat().st_size < 40_000


@needs_browser
def test_captions_are_text_whatever_they_hold(folder, tmp_path):
    page = tmp_path / "sheet.html"
    write_preview([folder], page, Options(), title=EVIL, jobs=1)
    dom = dump(page, wanted="<h2")
    assert "owned" not in re.search(r"<title>(.*?)</title>", dom, re.DOTALL)[1].replace("='owned'", "")
    sheet = body(dom)
    assert "onerror" in sheet and "<script" not in sheet and not re.search(r"<img[^>]*onerror", sheet)
    assert "these four numbers" in sheet and "IC730" in sheet and "No picture beside" in sheet


@needs_browser
def test_search_and_counts(folder, tmp_path):
    page = tmp_path / "sheet.html"
    write_preview([folder], page, Options(), jobs=1)
    assert ">5 of 5<" in dump(page)
    for words, count in (
        ("#search:still", 1),
        ("#search:STILL%20water", 1),
        ("#search:IC7", 1),
        ("#search:zzz", 0),
    ):
        dom = dump(page, words)
        assert f">{count} of 5<" in dom
        assert len(re.findall(r"<article(?![^>]*hidden)", dom)) == count


def pixels_near(picture: Path, colour: tuple[int, int, int]) -> np.ndarray:
    with Image.open(picture) as image:
        return (np.abs(np.asarray(image.convert("RGB")).astype(int) - colour).sum(2) < 24).nonzero()


@needs_browser
def test_boxes_are_drawn_where_they_are(folder, tmp_path):
    page, shot = tmp_path / "sheet.html", tmp_path / "shot.png"
    write_preview([folder / "boat.json"], page, Options(), jobs=1)
    for _ in range(5):  # as for dump
        browse(page, f"--screenshot={shot}")
        rows, columns = pixels_near(shot, (0x10, 0x40, 0xA0))  # the picture itself
        if len(rows):
            break
    top, left, height, width = rows.min(), columns.min(), np.ptp(rows), np.ptp(columns)
    orange = tuple(round(255 * v) for v in colorsys.hls_to_rgb(32 / 360, 0.64, 0.9))  # the first hue
    inside = [
        (r, c) for r, c in zip(*pixels_near(shot, orange), strict=True) if left <= c <= left + width + 4
    ]
    r, c = np.array(inside).T
    drawn = [
        (r.min() - top) / height,
        (c.min() - left) / width,
        (r.max() - top) / height,
        (c.max() - left) / width,
    ]
    assert drawn == pytest.approx([0.25, 0.5, 0.75, 1.0], abs=0.03)


@needs_browser
def test_a_thousand_cards_are_filled_only_near_the_window(tmp_path):
    lines = [json.dumps({"file_name": f"{i}.jpg", "text": f"Boat {i}."}) for i in range(1000)]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    page = tmp_path / "sheet.html"
    assert write_preview([tmp_path / "m.jsonl"], page, Options(), jobs=1).cards == 1000
    sheet = body(dump(page, wanted="<h2"))
    assert sheet.count("<article") == 1000
    assert 2 < sheet.count("<h2") < 100


def test_no_captions_leave_no_sheet(tmp_path):
    (tmp_path / "set").mkdir()
    with pytest.raises(IdeoflowError):
        write_preview([tmp_path / "set"], tmp_path / "sheet.html", Options(), jobs=1)
    assert [p.name for p in tmp_path.iterdir()] == ["set"]
