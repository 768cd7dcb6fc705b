"""The caption language: text a person writes -> the JSON that Ideogram 4 was trained on, and back.

::

    text --parser--> Document --emit--> captions (canonical JSON)
    JSON --repair--> captions --decompile--> Document --format--> text

``grammar/caption.lark`` is the language; ``docs/captions.md`` tells it with its reasons.
"""

from ideoflow.captions.check_files import check_captions
from ideoflow.captions.checks import check_caption
from ideoflow.captions.decompile import decompile_caption
from ideoflow.captions.emit import compile_caption, fill_placeholders, placeholders_in, prose_of
from ideoflow.captions.format import format_icap
from ideoflow.captions.parser import parse_icap
from ideoflow.captions.repair import read_json_caption, wrap_text
from ideoflow.captions.result import CompiledCaption, CompileResult
from ideoflow.captions.rules import to_json

__all__ = [
    "CompileResult",
    "CompiledCaption",
    "check_caption",
    "check_captions",
    "compile_caption",
    "decompile_caption",
    "fill_placeholders",
    "format_icap",
    "parse_icap",
    "placeholders_in",
    "prose_of",
    "read_json_caption",
    "to_json",
    "wrap_text",
]
