"""``captions lsp``: a language server for caption files, over stdio (Language Server Protocol 3.17, pygls).

It does what the command line does, while one types: diagnostics with their cures, formatting, completion of
keys, styles and palettes, and hover texts that explain a diagnostic's code. All of it comes from the
compiler; the server only translates places and shapes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from lsprotocol import types
from pygls.lsp.server import LanguageServer
from pygls.uris import to_fs_path
from pygls.workspace import TextDocument

from ideoflow import __version__
from ideoflow.captions import compile_caption, format_icap, read_json_caption
from ideoflow.captions.completion import complete, describe
from ideoflow.diagnostics import Diagnostic, IdeoflowError, Span
from ideoflow.diagnostics.codes import find_code

PAUSE_SECONDS = 0.15  # typing faster than this is compiled once

_SEVERITY = {
    "error": types.DiagnosticSeverity.Error,
    "warning": types.DiagnosticSeverity.Warning,
    "note": types.DiagnosticSeverity.Information,
}
_KINDS = {
    "keyword": types.CompletionItemKind.Keyword,
    "snippet": types.CompletionItemKind.Snippet,
    "color": types.CompletionItemKind.Color,
    "class": types.CompletionItemKind.Class,
    "file": types.CompletionItemKind.File,
    "field": types.CompletionItemKind.Field,
    "constant": types.CompletionItemKind.Constant,
}


def make_server() -> LanguageServer:
    """A server that is ready for :meth:`start_io`."""
    # Whole documents: captions are small, and pygls counts lines otherwise than this project does
    # (str.splitlines also splits at U+2028), which would garble incremental edits.
    server = LanguageServer("ideoflow-captions", __version__, types.TextDocumentSyncKind.Full)

    @server.feature(types.TEXT_DOCUMENT_DID_OPEN)
    def did_open(ls: LanguageServer, params: types.DidOpenTextDocumentParams) -> None:
        _publish(ls, params.text_document.uri)

    @server.feature(types.TEXT_DOCUMENT_DID_CHANGE)
    async def did_change(ls: LanguageServer, params: types.DidChangeTextDocumentParams) -> None:
        document = params.text_document
        await asyncio.sleep(PAUSE_SECONDS)
        if ls.workspace.get_text_document(document.uri).version == document.version:
            _publish(ls, document.uri)

    @server.feature(types.TEXT_DOCUMENT_DID_SAVE)
    def did_save(ls: LanguageServer, params: types.DidSaveTextDocumentParams) -> None:
        # A saved file may be used by others that are open.
        for uri in ls.workspace.text_documents:
            _publish(ls, uri)

    @server.feature(types.TEXT_DOCUMENT_DID_CLOSE)
    def did_close(ls: LanguageServer, params: types.DidCloseTextDocumentParams) -> None:
        empty = types.PublishDiagnosticsParams(uri=params.text_document.uri, diagnostics=[])
        ls.text_document_publish_diagnostics(empty)

    @server.feature(types.TEXT_DOCUMENT_FORMATTING)
    def formatting(ls: LanguageServer, params: types.DocumentFormattingParams) -> list[types.TextEdit] | None:
        document = ls.workspace.get_text_document(params.text_document.uri)
        if _is_json(document):
            return None
        try:
            formatted = format_icap(document.source, _path(document))
        except IdeoflowError:
            return None  # a file with errors is left as it is; the errors are on show already
        if formatted == document.source:
            return []
        lines = document.source.split("\n")
        end = types.Position(len(lines) - 1, ls.workspace.position_codec.client_num_units(lines[-1]))
        return [types.TextEdit(types.Range(types.Position(0, 0), end), formatted)]

    @server.feature(
        types.TEXT_DOCUMENT_COMPLETION, types.CompletionOptions(trigger_characters=["@", ":", " "])
    )
    def completion(ls: LanguageServer, params: types.CompletionParams) -> list[types.CompletionItem]:
        document = ls.workspace.get_text_document(params.text_document.uri)
        if _is_json(document):
            return []
        line, column = _place(ls, document, params.position)
        path = to_fs_path(document.uri)
        return [
            types.CompletionItem(
                offer.label,
                kind=_KINDS[offer.kind],
                detail=offer.about,
                insert_text=offer.insert,
                insert_text_format=types.InsertTextFormat.Snippet,
            )
            for offer in complete(document.source, line, column, Path(path) if path else None)
        ]

    @server.feature(types.TEXT_DOCUMENT_HOVER)
    def hover(ls: LanguageServer, params: types.HoverParams) -> types.Hover | None:
        document = ls.workspace.get_text_document(params.text_document.uri)
        line, column = _place(ls, document, params.position)
        parts = [_explain(d) for d in diagnose(document) if _covers(d.span, line + 1, column + 1)]
        parts = list(dict.fromkeys(parts))
        if not parts and not _is_json(document) and (word := describe(document.source, line, column)):
            parts = [word]
        if not parts:
            return None
        return types.Hover(types.MarkupContent(types.MarkupKind.Markdown, "\n\n---\n\n".join(parts)))

    return server


def serve() -> None:
    """Serves on standard input and output until the client leaves."""
    make_server().start_io()


def diagnose(document: TextDocument) -> Sequence[Diagnostic]:
    """Everything the compiler has to say of an open document."""
    path = _path(document)
    if _is_json(document):
        return read_json_caption(document.source, path=path).diagnostics
    return compile_caption(document.source, path=path, base_dir=Path(path).parent).diagnostics


def _publish(ls: LanguageServer, uri: str) -> None:
    document = ls.workspace.get_text_document(uri)
    found = [_translate(ls, d, document) for d in diagnose(document)]
    ls.text_document_publish_diagnostics(
        types.PublishDiagnosticsParams(uri=uri, version=document.version, diagnostics=found)
    )


def _translate(ls: LanguageServer, d: Diagnostic, document: TextDocument) -> types.Diagnostic:
    message = "\n".join(part for part in (d.message, *d.notes, f"help: {d.cure}" if d.cure else "") if part)
    return types.Diagnostic(
        _range(ls, d.span, document), message, _SEVERITY[d.severity], d.code.id, source="ideoflow"
    )


def _range(ls: LanguageServer, span: Span | None, document: TextDocument) -> types.Range:
    """A span in the client's units; what is in another file or has no line is shown at the top."""
    if span is None or not span.line or span.path != _path(document):
        return types.Range(types.Position(0, 0), types.Position(0, 1))
    lines = document.source.removeprefix("\ufeff").split("\n")

    def position(line: int, column: int) -> types.Position:
        text = lines[line - 1] if line <= len(lines) else ""
        return types.Position(line - 1, ls.workspace.position_codec.client_num_units(text[: column - 1]))

    start = position(span.line, span.column)
    return types.Range(start, position(span.end_line or span.line, span.end_column or span.column))


def _place(ls: LanguageServer, document: TextDocument, position: types.Position) -> tuple[int, int]:
    """Line and column from 0, in characters."""
    lines = document.source.split("\n")
    found = ls.workspace.position_codec.position_from_client_units(lines, position)
    return found.line, found.character


def _covers(span: Span | None, line: int, column: int) -> bool:
    if span is None or not span.line:
        return False
    end = (span.end_line or span.line, span.end_column or span.column)
    return (span.line, span.column) <= (line, column) <= end


def _explain(d: Diagnostic) -> str:
    code = find_code(d.code.id)
    return f"**{d.code.id}: {d.code.title}**\n\n{code.explanation if code else ''}"


def _path(document: TextDocument) -> str:
    return str(to_fs_path(document.uri) or document.uri)


def _is_json(document: TextDocument) -> bool:
    return str(document.uri).lower().endswith(".json")
