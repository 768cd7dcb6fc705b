"""The hub's own client against a small hub on this machine: what is refused, missing, or cut off."""

import json
import os
import subprocess
import sys
import threading
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from checkpoint_forms import FORMS
from safetensors.torch import load, save

COMMIT = "a" * 40
# One process for all of a test's downloads: it takes seconds to start.
ASK = """
import json, os, sys
import huggingface_hub.constants
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 1 << 16  # what the client counts as received, usually 10 MB
from ideoflow.diagnostics import IdeoflowError
from ideoflow.model.base import locate_base
from ideoflow.model.hub import fetch_base
for line in sys.stdin:
    name, revision, token, *parts = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    try:
        facts = fetch_base(locate_base(name, revision=revision, parts=parts[0] if parts else None), revision)
        answer = [facts.present, str(facts.folder), facts.storage]
    except IdeoflowError as error:
        (d,) = error.diagnostics
        answer = [d.code.id, d.message, d.cure]
    print(json.dumps(answer), flush=True)
"""


class Hub(BaseHTTPRequestHandler):
    """Repositories ``owner/X``; ``gated`` ones want the right token."""

    protocol_version = "HTTP/1.1"

    def answer(self, status, body=b"", length=None, **headers):
        self.send_response(status)
        for name, value in {"Content_Length": len(body) if length is None else length, **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        server, place = self.server, self.path.partition("?")[0].removeprefix("/api/models").strip("/")
        owner, name, *rest = place.split("/", 4)
        revision, path = (rest[1], rest[2:]) if rest else ("main", [])
        files = server.repositories.get(f"{owner}/{name}")
        if files is None:
            return self.answer(401, X_Error_Code="RepoNotFound")
        if revision not in ("main", "v1", COMMIT):
            return self.answer(404, X_Error_Code="RevisionNotFound")
        if "/api/" in self.path:
            about = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": [{"rfilename": n} for n in files]}
            tree = [
                {"type": "file", "path": n, "size": len(content), "oid": sha256(content).hexdigest()}
                for n, content in files.items()
            ]
            body = json.dumps(tree if "/tree/" in self.path else about).encode()
            return self.answer(200, body, Content_Type="application/json")
        if name == "gated" and self.headers["Authorization"] != "Bearer accepted":
            return self.answer(403 if self.headers["Authorization"] else 401, X_Error_Code="GatedRepo")
        if path[0] not in files:
            return self.answer(404, X_Error_Code="EntryNotFound")
        content = files[path[0]]
        known = {
            "ETag": f'"{sha256(content).hexdigest()}"',
            "X_Repo_Commit": COMMIT,
            "Accept_Ranges": "bytes",
        }
        if self.command == "HEAD":
            return self.answer(200, length=len(content), **known)
        wanted = self.headers["Range"]
        start = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else 0
        server.asked.append((path[0], start))
        rest = content[start:]
        span = {"Content_Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if wanted else {}
        if name == "cut" and not start and len(rest) > 1 << 20:
            self.answer(200, rest[: len(rest) // 2], length=len(rest), **known)
            self.close_connection = True  # the line breaks half way
            return None
        return self.answer(206 if wanted else 200, rest, **known, **span)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(nano_folder, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    files = (f for f in nano_folder.rglob("*") if f.is_file())
    server.files = {f.relative_to(nano_folder).as_posix(): f.read_bytes() for f in files}
    server.repositories = dict.fromkeys(("owner/open", "owner/gated", "owner/cut"), server.files)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def ask(hub, tmp_path, *cases, **environment):
    """[present, folder, storage], or [code, message, cure], for each (name, revision, token[, parts])."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    place = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run([sys.executable, "-c", ASK], input="\n".join(map(json.dumps, cases)), text=True,
                          capture_output=True, env=clean | place | environment, check=True)  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_what_the_hub_answers_is_told(hub, tmp_path):
    cases = [
        ("owner/gated", None, None),
        ("owner/gated", None, "other"),
        ("owner/open", "v9", None),
        ("owner/none", None, None),
        ("owner/open", "v1", None),
        ("owner/gated", None, "accepted"),
    ]
    no_token, no_licence, no_revision, unknown, there, accepted = ask(hub, tmp_path, *cases)
    assert no_token[0] == "IM004" and "no token" in no_token[1]
    assert "hf auth login" in no_token[2] and "https://huggingface.co/owner/gated" in no_token[2]
    assert no_licence[0] == "IM004" and "accept the licence" in no_licence[2]
    assert no_revision[0] == "IM005" and "no revision 'v9'" in no_revision[1]
    assert unknown[0] == "IM001" and "owner/none" in unknown[1]
    assert there[0] is True and there[1].endswith(COMMIT), "a pinned revision is the commit that it names"
    assert accepted[0] is True


def test_a_single_file_on_the_hub(hub, nano_folder, tmp_path):
    """Of a repository that is no base one file is downloaded, if it is named, and none otherwise."""
    file = "split_files/ideogram4_fp8_scaled.safetensors"
    weights = "transformer/diffusion_pytorch_model.safetensors"
    dense = {k: v.contiguous() for k, v in load((nano_folder / weights).read_bytes()).items()}
    other = "split_files/ideogram4_unconditional_fp8_scaled.safetensors"
    hub.repositories["owner/comfy"] = dict.fromkeys((other, file), save(FORMS["ComfyUI"][0](dense)))
    named = f"owner/comfy/{file}"
    whole, none, here, again, revised, with_hub_parts = ask(
        hub, tmp_path,
        ("owner/comfy", None, None),
        ("owner/comfy/none.safetensors", None, None, str(nano_folder)),
        (named, None, None, str(nano_folder)),
        (named, None, None, str(nano_folder)),
        (named, "v1", None, str(nano_folder)),
        (named, "v1", None, "owner/open"),
    )  # fmt: skip
    assert whole[0] == "IM002" and "owner/comfy has no folder transformer" in whole[1]
    assert f"'{named}'" in whole[2] and "model.parts" in whole[2]
    assert none[0] == "IM001" and "owner/comfy has no file 'none.safetensors'" in none[1]
    assert here == again == revised == [True, str(nano_folder), "fp8"]
    assert with_hub_parts[0] is True and with_hub_parts[1].endswith(COMMIT) and with_hub_parts[2] == "fp8"
    asked = [name for name, _ in hub.asked]
    assert asked.count(file) == 1 and other not in asked and weights not in asked


def test_a_download_that_breaks_off_goes_on_where_it_was(hub, tmp_path):
    (first,) = ask(hub, tmp_path, ("owner/cut", None, None))
    assert first[0] is True
    large = {name: len(content) for name, content in hub.files.items() if len(content) > 1 << 20}
    for name, size in large.items():
        again = [start for asked, start in hub.asked if asked == name]
        assert again[0] == 0 and len(again) == 2 and size // 2 - (1 << 16) <= again[1] <= size // 2
    hub.asked.clear()
    assert ask(hub, tmp_path, ("owner/cut", None, None)) == [first]
    assert large and not hub.asked, "what is here is not fetched again"


def test_offline_names_the_setting(hub, tmp_path):
    ((code, message, cure),) = ask(hub, tmp_path, ("owner/open", None, None), HF_HUB_OFFLINE="1")
    assert code == "IM005" and "HF_HUB_OFFLINE is set" in message and "unset" in cure
    assert not hub.asked
