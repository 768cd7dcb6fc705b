"""The recipe for each size of card fits the cards of that size, as the planner sees them."""

import json

import pytest

from ideoflow.cli import main
from ideoflow.resources import recipes

CARDS = {
    "8gb": ("rtx-4060", "rtx-3070", "8gb"),
    "12gb": ("rtx-4070", "rtx-3060", "12gb"),
    "16gb": ("rtx-4080", "rtx-5060-ti-16gb", "16gb"),
    "24gb": ("rtx-4090", "rtx-3090", "24gb"),
    "48gb": ("l40s", "rtx-a6000", "48gb"),
    "80gb": ("h100", "a100-80gb", "80gb"),
}


@pytest.fixture(autouse=True)
def no_download(monkeypatch, tmp_path):
    """The released sizes, not what some cache holds."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))


def test_there_is_one_for_each_size():
    assert {f.stem for f in (recipes() / "cards").glob("*.toml")} == set(CARDS)


@pytest.mark.parametrize(("size", "card"), [(size, card) for size, cards in CARDS.items() for card in cards])
def test_it_fits_with_room_to_spare(size, card, capsys):
    assert main(["plan", str(recipes() / "cards" / f"{size}.toml"), "--gpu", card, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    peak = {}
    for line in plan["ledger"]["lines"]:
        peak[line["phase"]] = peak.get(line["phase"], 0) + line["bytes"]
    assert max(peak.values()) <= 0.95 * plan["hardware"]["free_bytes"]
    decided = {d["id"]: d["value"] for d in plan["decisions"]}
    assert (decided["engine"], decided["precision"]) == ("fused", "fp8")
    assert (decided["offload"] == "stream") == (size in ("8gb", "12gb"))
    assert decided["unconditional"] == ("streamed" if size in ("8gb", "12gb", "16gb") else "loaded")


def test_a_smaller_card_is_told_so(capsys):
    assert main(["plan", str(recipes() / "cards" / "16gb.toml"), "--gpu", "rtx-4070"]) == 2
    assert "memory.offload" in capsys.readouterr().out
