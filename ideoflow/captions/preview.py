"""``captions preview``: one HTML file of all pictures with boxes, texts and palettes drawn over them.

The file is complete in itself: styles, script and thumbnails are inside, nothing is loaded from a network,
and a content security policy forbids it. Captions travel as JSON in inert script elements with every ``<``
escaped, and the page sets them as text only, so no caption can inject markup. Cards are filled when they
come near the window, so that a sheet of 1,000 pictures opens at once.
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO
from urllib.parse import quote

from ideoflow.captions import check_caption
from ideoflow.captions.convert_item import Compiled, Options, compile_source
from ideoflow.captions.inputs import Item, check_paths, find, locate_image, read
from ideoflow.captions.pool import ordered_map
from ideoflow.diagnostics import Diagnostic, IdeoflowError, Span
from ideoflow.diagnostics.codes import caption_tools as codes

if TYPE_CHECKING:
    from PIL import Image

THUMBNAIL = 512  # longest side of an embedded picture in pixels; at quality 70 about 30 kB each


@dataclass(frozen=True, slots=True)
class Card:
    """One picture of the sheet: what the page needs, and the embedded thumbnail as a data URI or ``""``."""

    data: dict[str, Any]
    thumbnail: str = ""


@dataclass(slots=True)
class PreviewReport:
    """How many cards, and how many of them have errors or warnings."""

    cards: int = 0
    errors: int = 0
    warnings: int = 0


def write_preview(
    paths: Sequence[str | Path],
    out: str | Path,
    options: Options,
    *,
    link: bool = False,
    title: str = "",
    jobs: int | None = None,
    on_progress: Callable[[PreviewReport], None] = lambda _: None,
) -> PreviewReport:
    """Writes the sheet of every caption under ``paths`` to ``out``.

    Args:
        link: refer to the pictures by relative path instead of embedding thumbnails: a small file that must
            stay where it is.
        title: heading of the sheet; the first path's name by default.

    Raises :class:`IdeoflowError` for paths without captions or an output that cannot be written.
    """
    given = [str(p) for p in paths]
    check_paths(given)
    target = Path(out).absolute()
    heading = title or f"Captions of {Path(given[0]).absolute().name}"
    template = Path(__file__).with_name("preview.html").read_text(encoding="utf-8")
    head, tail = template.split("@@DATA@@")
    head = head.replace("@@TITLE@@", html.escape(heading))
    report = PreviewReport()
    work = partial(make_cards, options=options, link_from=str(target.parent) if link else None)
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w", encoding="utf-8", errors="replace", newline="\n") as file:
            file.write(head)
            items = find(given, options.columns)
            for cards in ordered_map(work, items, jobs=jobs or os.cpu_count() or 1, chunk=16):
                for card in cards:
                    _write_card(file, card, report)
                on_progress(report)
            file.write(tail)
    except OSError as error:
        raise IdeoflowError(
            Diagnostic(codes.UNREADABLE, f"{target} cannot be written: {error.strerror}", Span(str(target)))
        ) from None
    if not report.cards:
        part.unlink()
        where = ", ".join(given)
        raise IdeoflowError(Diagnostic(codes.NO_INPUT, f"there is no caption in {where}", Span(given[0])))
    part.replace(target)
    return report


def make_cards(items: list[Item], options: Options, link_from: str | None) -> list[Card]:
    """The cards of some items; runs in a worker."""
    return [card for item in items for card in _cards(item, options, link_from)]


def _cards(item: Item, options: Options, link_from: str | None) -> list[Card]:
    cards = []
    for found in read(item, options.columns):
        if isinstance(found, Diagnostic):
            cards.append(_card(Path(item.path).name, item.path, item.image or "", None, [found], link_from))
            continue
        captions, said = compile_source(found, options)
        errors = [d for d in said if d.is_error]
        if errors or (said and not captions):
            cards.append(_card(found.name, found.path, found.image, None, errors or said, link_from))
        starts = [c.origin.span.line if c.origin.span else 0 for c in captions]
        for number, compiled in enumerate(captions):
            own = [d for d in said if not d.is_error and _owner(d, starts) == number]
            cards.append(_card(compiled.name, found.path, compiled.image, compiled, own, link_from))
    return cards


def _owner(d: Diagnostic, starts: list[int]) -> int:
    """A warning belongs to the last caption that begins at or above it."""
    line = d.span.line if d.span else 0
    return max(0, sum(start <= line for start in starts) - 1)


def _card(name: str, source: str, image: str, compiled: Compiled | None, said: Sequence[Diagnostic],
          link_from: str | None) -> Card:  # fmt: skip
    data: dict[str, Any] = {"name": name, "source": Path(source).name, "caption": None, "picture": ""}
    said = list(said)
    path = locate_image(image) if image else None
    picture = None
    if path is not None:
        try:
            picture = _open(path)
        except (OSError, ValueError, SyntaxError) as error:  # Pillow raises all three for broken files
            message = f"{path.name} cannot be read as a picture: {error}"
            said.append(Diagnostic(codes.BAD_PICTURE, message, severity=codes.BAD_PICTURE.severity))
    if compiled is not None:
        data["caption"] = compiled.caption
        small = picture.image if picture else None
        said += check_caption(compiled.caption, path=source, locate=compiled.origin.locate, image=small)
    data["said"] = [
        {"code": d.code.id, "severity": d.severity, "message": d.message, "cure": d.cure} for d in said
    ]
    if picture is None or path is None:
        return Card(data)
    data |= {"width": picture.image.width, "height": picture.image.height, "size": picture.size}
    if link_from is not None:
        data["picture"] = quote(os.path.relpath(path, link_from).replace(os.sep, "/"))
        return Card(data)
    data["picture"] = "embedded"
    return Card(data, picture.data_uri())


@dataclass(frozen=True, slots=True)
class _Picture:
    """A picture, upright and small, and its full size in words."""

    image: Image.Image
    size: str

    def data_uri(self) -> str:
        buffer = io.BytesIO()
        self.image.save(buffer, "JPEG", quality=70)
        return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _open(path: Path) -> _Picture:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            # JPEG decodes at a fraction of its size, many times faster.
            size = image.size
            image.draft("RGB", (THUMBNAIL, THUMBNAIL))
            ImageOps.exif_transpose(image, in_place=True)
            full = size if (image.width > image.height) == (size[0] > size[1]) else size[::-1]
            image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
            if image.has_transparency_data:
                over = image.convert("RGBA")
                flat = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
            else:
                flat = image
            return _Picture(flat.convert("RGB"), f"{full[0]} x {full[1]}")
    except Image.DecompressionBombError as error:
        raise OSError(str(error)) from None


def _write_card(file: TextIO, card: Card, report: PreviewReport) -> None:
    # In a script element only "<" can end it or open a comment; JSON allows the escape in any string.
    data = json.dumps(card.data, ensure_ascii=False).replace("<", "\\u003c")
    file.write(f'<script type="application/json" class="item">{data}</script>\n')
    if card.thumbnail:
        file.write(f'<script type="text/plain" id="picture-{report.cards}">{card.thumbnail}</script>\n')
    severities = {d["severity"] for d in card.data["said"]}
    report.cards += 1
    report.errors += "error" in severities
    report.warnings += "warning" in severities
