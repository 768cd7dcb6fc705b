"""``ideoflow plan``: exit codes, what goes where, and that nothing heavy is loaded."""

import json
import os
import subprocess
import sys

import pytest

from ideoflow import resources
from ideoflow.cli import main
from ideoflow.plan import Plan, load_plan
from ideoflow.plan.decide import for_processes

CAPTION = "A red barn in a field.\nbackground: Wheat under a blue sky.\nobj: A red barn.\n"


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe for the released model (not downloaded) on two small pictures."""
    from PIL import Image

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("IDEOFLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name, size in (("barn", (1024, 1024)), ("field", (1280, 832))):
        Image.new("RGB", size, "red").save(pictures / f"{name}.png")
        (pictures / f"{name}.icap").write_text(CAPTION, encoding="utf-8")
    file = tmp_path / "barn.toml"
    file.write_text(
        '[model]\nbase = "ideogram-ai/ideogram-4-fp8"\n[data]\nimages = "pictures"\n'
        '[validate]\nprompts = ["pictures/*.icap"]\n',
        encoding="utf-8",
    )
    return file


@pytest.fixture
def nano(recipe):
    """The same pictures on the nano base, which is planned at once, in one small size."""
    text = recipe.read_text(encoding="utf-8").replace("ideogram-ai/ideogram-4-fp8", "nano")
    text = text[: text.index("[validate]")] + "resolution = 64\n[adapter]\nrank = 4\n[train]\nbatch = 2\n"
    recipe.write_text(text, encoding="utf-8")
    return recipe


def run(capsys, *argv):
    code = main(["plan", *map(str, argv)])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_plan_that_fits(recipe, capsys):
    code, out, err = run(capsys, recipe, "--gpu", "rtx-4090")
    assert code == 0
    for words in ("RTX 4090", "2 pictures with captions, 2 sizes", "9.28 G parameters",
                  "stored as fp8", "activation_budget  0.45", "fits", "adapter 251 MB"):  # fmt: skip
        assert words in out
    assert err == ""


def test_several_processes_are_on_the_page_and_one_leaves_no_trace(recipe, capsys):
    code, out, _ = run(capsys, recipe, "--gpu", "h100", "--processes", "2")
    assert code == 0 and "2 x H100" in out
    assert "2 GPUs, global batch 2 = 2 x batch 1 x accumulation 1" in " ".join(out.split())
    two = json.loads(run(capsys, recipe, "--gpu", "h100", "--processes", "2", "--json")[1])
    one = json.loads(run(capsys, recipe, "--gpu", "h100", "--json")[1])
    explained = run(capsys, recipe, "--gpu", "h100", "--processes", "2", "--explain", "processes")[1]
    assert explained.startswith("processes = 2   set by torchrun or --processes")
    lines = [line for line in two["ledger"]["lines"] if line["name"] == "NCCL"]
    assert [line["phase"] for line in lines] == ["train"]
    two["ledger"]["lines"].remove(lines[0])
    (decided,) = [d for d in two["decisions"] if d["id"] == "processes"]
    two["decisions"].remove(decided)
    assert decided["value"] == 2 and two["ledger"] == one["ledger"] and two["time"] == one["time"]
    assert [d["id"] for d in two["decisions"]] == [d["id"] for d in one["decisions"]]


def test_a_finished_plan_is_carried_out_by_another_number_of_processes(recipe, capsys):
    made = [Plan.from_json(run(capsys, recipe, "--gpu", "h100", "--processes", n, "--json")[1]) for n in "12"]
    assert [plan.processes for plan in made] == [1, 2]
    for plan in made:
        again = [for_processes(plan, n) for n in (1, 2, 3)]
        assert [(p.processes, p.ledger.peak_bytes) for p in again[:2]] == [
            (p.processes, p.ledger.peak_bytes) for p in made
        ]
        assert again[2].processes == 3 and again[2].ledger == again[1].ledger


def test_every_line_fits_80_columns_and_ends_without_blanks(recipe, capsys):
    for card in ("rtx-4090", "8gb", "h200", "m3-max"):
        _, out, _ = run(capsys, recipe, "--gpu", card, "--batch", "1,2,4", "--rank", "8,32")
        assert all(len(line) <= 80 and line == line.rstrip() for line in out.splitlines())
        assert "\x1b" not in out


def test_a_plan_that_does_not_fit_exits_with_2_and_says_what_would(recipe, capsys):
    code, out, err = run(capsys, recipe, "--gpu", "2gb")
    assert code == 2
    assert "over by" in out and "What would make it fit, cheapest first" in out and "another card" in out
    assert "IP020" in err


def test_json_is_the_plan_and_nothing_else(recipe, capsys):
    code, out, _ = run(capsys, recipe, "--gpu", "h200", "--json")
    assert code == 0
    plan = Plan.from_json(out)
    assert plan.data.pictures == 2 and plan.hardware.name == "H200"
    assert json.loads(out)["recipe_path"].endswith("barn.toml")


def test_the_page_is_written(recipe, capsys, tmp_path):
    file = tmp_path / "plan.html"
    assert run(capsys, recipe, "--gpu", "h200", "--html", file)[0] == 0
    assert "H200" in file.read_text(encoding="utf-8")


def test_a_full_disk_leaves_no_half_page_and_devices_stay_devices(nano, capsys, tmp_path, monkeypatch):
    link, file = tmp_path / "link", tmp_path / "plan.html"
    link.symlink_to(os.devnull)
    assert run(capsys, nano, "--gpu", "h100", "--html", link)[0] == 0 and link.is_symlink()

    def full(handle):
        raise OSError("no space left")

    monkeypatch.setattr(resources.os, "fsync", full)
    for option in ("--html", "-o"):
        code, _, told = run(capsys, nano, "--gpu", "h100", option, file)
        assert code == 1 and "IP009" in told and "no space left" in told
    assert not list(tmp_path.glob("*plan.html*"))


def test_written_shown_and_compared(recipe, capsys, tmp_path):
    file = tmp_path / "deep" / "barn.plan.json"
    code, out, _ = run(capsys, recipe, "--gpu", "h200", "-o", file)
    assert code == 0 and f"ideoflow run {file}" in out
    assert load_plan(file).fits
    code, shown, _ = run(capsys, file)
    assert code == 0 and "H200" in shown
    assert run(capsys, recipe, "--gpu", "h200", "--diff", file)[1] == f"the same as {file}\n"
    _, out, _ = run(capsys, recipe, "--gpu", "rtx-4090", "--diff", file)
    assert "decision.checkpointing: off -> on" in out.splitlines()


@pytest.mark.parametrize("card", ["rtx-4090", "h100", "16gb", "m3-max"])
def test_a_plan_that_is_read_is_written_again_byte_by_byte(card, nano, capsys, tmp_path):
    file = tmp_path / "barn.plan.json"
    assert run(capsys, nano, "--gpu", card, "-o", file)[0] == 0
    assert run(capsys, file, "--json")[1] == file.read_text(encoding="utf-8")


def test_tables_of_alternatives(recipe, capsys):
    _, out, _ = run(
        capsys,
        recipe,
        "--gpu",
        "h200",
        "--compare",
        "rtx-4090,4gb",
        "--batch",
        "1,2",
        "--resolution",
        "512,1024",
    )
    table = out[out.index("batch") :].splitlines()
    assert table[0].split() == ["batch", "1", "2"]
    assert [line.split("  ")[0] for line in table[1:4]] == ["H200", "RTX 4090", "4 GB card"]
    assert "over by" in table[3]
    assert "resolution" in out
    _, alone, _ = run(capsys, recipe, "--gpu", "h200", "--compare", "rtx-4090")
    assert "peak, a step" in alone and "each is planned for itself" in alone


def test_a_variant_is_the_recipe_with_that_value(recipe, capsys):
    """The table's cell against a plan of the changed recipe."""
    _, out, _ = run(capsys, recipe, "--gpu", "h200", "--rank", "128")
    cell = out[out.index("\nrank") :].splitlines()[2].split()[1]
    recipe.write_text(recipe.read_text(encoding="utf-8") + "[adapter]\nrank = 128\n", encoding="utf-8")
    plan = Plan.from_json(run(capsys, recipe, "--gpu", "h200", "--json")[1])
    assert cell == f"{plan.ledger.peak_bytes / 2**30:.1f}"


def test_explain_one_decision(recipe, capsys):
    code, out, _ = run(capsys, recipe, "--gpu", "h200", "--explain", "activation_budget")
    assert code == 0
    assert out.startswith("activation_budget = 1.0   decided by the planner")
    rows = [line.split() for line in out.splitlines()[3:]]
    assert rows[0] == ["GiB", "a", "step"] and [row[0] for row in rows[1:]] == ["1.0", "0.0", "0.9"]
    assert float(rows[1][1]) > float(rows[3][1]) > float(rows[2][1]) and rows[1][4:] == ["this", "plan"]


VALUES = ("--gpu", "--compare", "--batch", "--resolution", "--rank", "--explain", "--diff", "-o", "--html")


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (("--gpu", "rtx-4091"), "IP010"),
        (("--gpu", "0gb"), "IP010"),
        *(((option, value), "IP032") for option in VALUES for value in ("", " ")),
        (("--compare", ","), "IP010"),
        (("--compare", "h100,,l4"), "IP010"),
        (("--batch", "1,,2"), "IP008"),
        (("--rank", "\N{SUPERSCRIPT TWO}"), "IP008"),
        (("--calibrate", "--gpu", ""), "IP032"),
        (("--gpu", "h100", "--explain", "complie"), "IP007"),
        (("--gpu", "h100", "--explain", "processes"), "IP007"),
        (("--gpu", "h100", "--batch", "1,two"), "IP008"),
        (("--gpu", "h100", "--resolution", "1000"), "IP008"),
        (("--gpu", "h100", "--compare", "toaster"), "IP010"),
        (("--gpu", "h100", "--diff", "absent.json"), "IP001"),
        (("--gpu", "h100", "-o", "."), "IP009"),
        (("--gpu", "h100", "--json", "--batch", "1,2"), "IP030"),
        (("--gpu", "h100", "--explain", "engine", "--diff", "p.json"), "IP030"),
    ],
)
def test_mistakes_are_diagnostics(argv, code, nano, capsys):
    exit_code, _, err = run(capsys, nano, *argv)
    assert exit_code == 1 and f"[{code}]" in err and "help" in err


@pytest.mark.parametrize("option", [("--gpu", "h100"), ("--batch", "1,2"), ("--compare", "h100")])
def test_a_finished_plan_is_not_made_again(option, nano, capsys, tmp_path):
    file = tmp_path / "barn.plan.json"
    assert run(capsys, nano, "--gpu", "h200", "-o", file)[0] == 0
    code, _, err = run(capsys, file, *option)
    assert code == 1 and "[IP030]" in err and "give the recipe" in err


def test_explain_all_tells_every_decision_within_80_columns(recipe, capsys):
    plan = Plan.from_json(run(capsys, recipe, "--gpu", "rtx-3060", "--json")[1])
    _, out, _ = run(capsys, recipe, "--gpu", "rtx-3060", "--explain", "all")
    heads = [line for line in out.splitlines() if " = " in line and not line.startswith(" ")]
    assert [line.split(" = ")[0] for line in heads] == [d.id for d in plan.decisions]
    assert max(map(len, out.splitlines())) <= 80


def test_the_page_says_what_waits_on_the_host(recipe, capsys):
    _, out, _ = run(capsys, recipe, "--gpu", "rtx-3060")
    host = next(line.split() for line in out.splitlines() if line.startswith("  host"))
    # Both transformers' blocks in FP8, 8.07 GiB each, and half a GiB of moments or more.
    assert 16.1 < float(host[1]) < 20


def test_a_damaged_plan_is_a_diagnostic(tmp_path, capsys):
    file = tmp_path / "old.plan.json"
    file.write_text("{}", encoding="utf-8")
    code, _, err = run(capsys, file)
    assert code == 1 and "IP002" in err


def test_the_shipped_quickstart_is_planned_for_this_machine(capsys, monkeypatch):
    from ideoflow.resources import recipes

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code, out, _ = run(capsys, recipes() / "quickstart.toml")
    assert code == 0 and "nano" in out and "fits" in out


def test_torch_is_not_loaded(recipe):
    report = "import sys; print(*{m.partition('.')[0] for m in sys.modules})"
    call = f"from ideoflow.cli import main; main(['plan', {str(recipe)!r}, '--gpu', 'rtx-4090'])"
    done = subprocess.run([sys.executable, "-c", f"{call}\n{report}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "ideoflow" in loaded
    assert not loaded & {"torch", "diffusers", "transformers", "peft", "accelerate", "numpy"}


def test_calibrating_makes_later_plans_predict_what_was_measured(nano, capsys, monkeypatch):
    from ideoflow.plan.calibration import load_calibration

    assert Plan.from_json(run(capsys, nano, "--json")[1]).time is None
    code, out, err = run(capsys, nano, "--calibrate")
    assert code == 0 and "measuring float32, 32 px, batch 2" in err
    rows = [line.split() for line in out.splitlines()[1:]]
    assert [" ".join(row[:5]) for row in rows] == [
        f"float32, {side} px, batch {batch}" for side in (64, 32) for batch in (1, 2)
    ]
    runs = load_calibration()[0].runs
    assert len(runs) == 4 and all(r.measured_moving == r.predicted_moving for r in runs)
    assert [f"{r.measured_step_ms:.0f}" for r in runs] == [row[9] for row in rows]
    time = Plan.from_json(run(capsys, nano, "--json")[1]).time
    factors = sorted(r.measured_step_ms / r.predicted_step_ms for r in runs)
    assert time.calibrated and factors[0] < factors[-1]
    # Measured again, the predictions that are shown first are those that came of the first time.
    monkeypatch.setattr("ideoflow.workflow._measure", lambda plan: (None, 12.0))
    _, again, _ = run(capsys, nano, "--calibrate")
    assert [r.split()[7] for r in again.splitlines()[1:]] == [row[11] for row in rows]


def test_calibrating_a_processor_needs_no_recipe_but_a_small_base(recipe, capsys, monkeypatch):
    monkeypatch.setattr("ideoflow.workflow._measure", lambda plan: (None, 12.0))
    code, out, _ = run(capsys, "--calibrate")
    assert code == 0 and out.count("12 ms") >= 2 and "float32, 128 px, batch 1" in out
    code, _, err = run(capsys, recipe, "--calibrate")
    assert code == 1 and "IP028" in err and "too large for a processor" in err


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (("--calibrate", "--gpu", "h100"), "IP028"),
        (("some.plan.json", "--calibrate"), "IP028"),
        (("absent.toml", "--calibrate"), "IR"),
        ((), "IP029"),
    ],
)
def test_mistakes_in_calibrating_are_diagnostics(argv, code, capsys):
    exit_code, _, err = run(capsys, *argv)
    assert exit_code == 1 and f"[{code}" in err and "help" in err
