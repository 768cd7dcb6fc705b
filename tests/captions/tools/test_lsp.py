"""A real exchange with the language server, over stdio, by a client that knows only the protocol."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("pygls")

COMMAND = [sys.executable, "-m", "ideoflow", "captions", "lsp", "--stdio"]


class Client:
    """JSON-RPC 2.0 with Content-Length headers (LSP 3.17, base protocol)."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.messages: queue.Queue = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.number = 0

    def _read(self) -> None:
        while line := self.process.stdout.readline():
            length = int(line.split(b":")[1])
            while self.process.stdout.readline() != b"\r\n":
                pass
            self.messages.put(json.loads(self.process.stdout.read(length)))

    def send(self, message: dict) -> None:
        body = json.dumps({"jsonrpc": "2.0", **message}).encode()
        self.process.stdin.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        self.process.stdin.flush()

    def notify(self, method: str, **params) -> None:
        self.send({"method": method, "params": params})

    def request(self, method: str, **params):
        self.number += 1
        self.send({"id": self.number, "method": method, "params": params})
        while True:
            message = self.messages.get(timeout=30)
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]

    def diagnostics(self, version: int) -> list[dict]:
        while True:
            message = self.messages.get(timeout=30)
            if message.get("method") == "textDocument/publishDiagnostics":
                params = message["params"]
                if params.get("version") == version:
                    return params["diagnostics"]


@pytest.fixture
def client():
    client = Client()
    client.request("initialize", processId=None, rootUri=None, capabilities={})
    client.notify("initialized")
    yield client
    client.request("shutdown")
    client.notify("exit")
    assert client.process.wait(timeout=30) == 0


TEXT = """\
style dusk
  aesthetics: Calm.
  lighting: Cool.
  photo: 35mm.
  medium: Photograph.

image a.jpg
  😀 A boat at sea.
  style: dsuk
  background:   A lake.

image b.jpg
  background: A pond.
  obj [380, 590, 660, 720]: A boat
"""


def open_file(client: Client, path: Path, text: str) -> str:
    path.write_text(text)
    item = {"uri": path.as_uri(), "languageId": "icap", "version": 1, "text": text}
    client.notify("textDocument/didOpen", textDocument=item)
    return item["uri"]


def change(client: Client, uri: str, version: int, text: str) -> None:
    identifier = {"uri": uri, "version": version}
    client.notify("textDocument/didChange", textDocument=identifier, contentChanges=[{"text": text}])


def test_diagnostics_follow_the_typing(client, tmp_path):
    uri = open_file(client, tmp_path / "a.icap", TEXT)
    found = client.diagnostics(1)
    by_line = {d["range"]["start"]["line"]: d for d in found}
    assert by_line[8]["code"].startswith("IC") and "dusk" in by_line[8]["message"], (
        "a suggestion for the typo"
    )
    assert by_line[13]["range"] == {
        "start": {"line": 13, "character": 6},
        "end": {"line": 13, "character": 26},
    }
    assert by_line[13]["severity"] == 1 and by_line[13]["source"] == "ideoflow"
    good = TEXT.replace("dsuk", "dusk").replace("[380, 590, 660, 720]", "y380..660 x590..720")
    # fast typing: only the last of three versions is compiled and answered
    for version in (2, 3):
        change(client, uri, version, TEXT)
    change(client, uri, 4, good)
    assert client.diagnostics(4) == []
    # places count UTF-16 units: the emoji is two of them
    change(client, uri, 5, good.replace("😀 A boat", "😀 <b> A \x07boat"))
    bell = next(d for d in client.diagnostics(5) if d["range"]["start"]["line"] == 7)
    assert bell["range"]["start"]["character"] == 2 + 2 + len(" <b> A ")
    client.notify("textDocument/didClose", textDocument={"uri": uri})


def apply(text: str, edits: list[dict]) -> str:
    (edit,) = edits
    start, end = edit["range"]["start"], edit["range"]["end"]
    lines = text.split("\n")
    assert (start["line"], start["character"]) == (0, 0)
    assert (end["line"], end["character"]) == (len(lines) - 1, len(lines[-1]))
    return edit["newText"]


def test_formatting_is_that_of_the_command(client, tmp_path):
    good = TEXT.replace("dsuk", "dusk").replace("[380, 590, 660, 720]", "x590..720   y380..660")
    uri = open_file(client, tmp_path / "a.icap", good)
    options = {"tabSize": 2, "insertSpaces": True}
    edits = client.request("textDocument/formatting", textDocument={"uri": uri}, options=options)
    formatted = apply(good, edits)
    subprocess.run([sys.executable, "-m", "ideoflow", "captions", "fmt", tmp_path / "a.icap"], check=True)
    assert formatted == (tmp_path / "a.icap").read_text() != good
    change(client, uri, 2, formatted)
    assert client.request("textDocument/formatting", textDocument={"uri": uri}, options=options) == []
    change(client, uri, 3, TEXT)
    edits = client.request("textDocument/formatting", textDocument={"uri": uri}, options=options)
    assert not edits, "a file with errors is left as it is"


def test_completion_and_hover(client, tmp_path):
    uri = open_file(client, tmp_path / "a.icap", TEXT)

    def at(line: int, character: int) -> dict:
        return {"textDocument": {"uri": uri}, "position": {"line": line, "character": character}}

    styles = client.request("textDocument/completion", **at(8, 9))
    assert [item["label"] for item in styles] == ["dusk"]
    keys = client.request("textDocument/completion", **at(9, 2))
    assert {"background", "obj", "text", "style"} <= {item["label"] for item in keys}
    hover = client.request("textDocument/hover", **at(13, 10))["contents"]
    assert hover["kind"] == "markdown" and hover["value"].startswith("**IC")
    code = hover["value"][2:7]
    explained = subprocess.run(
        [sys.executable, "-m", "ideoflow", "explain", code], capture_output=True, text=True
    )
    assert explained.stdout.split("\n\n")[1].split("\n")[0] in hover["value"]
    assert "everything behind" in client.request("textDocument/hover", **at(9, 5))["contents"]["value"]
    assert client.request("textDocument/hover", **at(1, 16)) is None


def test_json_captions_are_checked_too(client, tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"high_level_description": 3}')
    item = {"uri": path.as_uri(), "languageId": "json", "version": 1, "text": path.read_text()}
    client.notify("textDocument/didOpen", textDocument=item)
    assert any(d["severity"] == 1 for d in client.diagnostics(1))


def test_without_pygls_the_command_says_what_to_install(monkeypatch, capsys):
    from ideoflow.cli import main

    monkeypatch.delitem(sys.modules, "ideoflow.captions.lsp", raising=False)
    monkeypatch.setitem(sys.modules, "pygls", None)
    monkeypatch.setitem(sys.modules, "lsprotocol", None)
    assert main(["captions", "lsp"]) == 1
    assert "IC750" in (err := capsys.readouterr().err) and "ideoflow[editor]" in err
