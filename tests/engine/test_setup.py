"""What the plan says of weights and moments is done, and costs nothing but time where it should not."""

import gc
from pathlib import Path

import pytest
import torch
from nano_runs import HEAD, one_photograph
from safetensors.torch import load_file
from torch import nn

from ideoflow.diagnostics import IdeoflowError
from ideoflow.engine.setup import build
from ideoflow.kernels.float8 import Float8Linear, Int8Linear
from ideoflow.model.four_bit import FrozenLinear4bit
from ideoflow.workflow import prepare, run

BASE = (
    HEAD
    + """[adapter]
rank = 24
[train]
steps = 4
learning_rate = 1e-2
checkpoint_every = 2
[output]
dtype = "float32"
folder = "{folder}"
[memory]
checkpointing = "on"
{memory}
"""
)
SAME = {
    "stream": 'offload = "stream"',
    "block": 'offload = "block"\noffload_blocks = 2',
    "leaf": 'offload = "leaf"\noffload_streams = false',
    "disk": 'offload = "disk"\noffload_folder = "{here}/scratch"',
    "moments on the host": 'optimizer_state = "cpu"',
}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("setup")
    one_photograph(folder)
    return folder


def adapter(project, name, memory=""):
    recipe = project / f"{name}.toml"
    text = BASE.format(folder=project / name, memory=memory.format(here=project))
    recipe.write_text(text)
    made = run(prepare(recipe)).adapter
    return load_file(made)


@pytest.fixture(scope="module")
def plain(project):
    return adapter(project, "plain")


@pytest.mark.parametrize("name", SAME)
def test_what_waits_elsewhere_learns_the_same(project, plain, name):
    learnt = adapter(project, name.replace(" ", "-"), SAME[name])
    assert learnt.keys() == plain.keys() and all(torch.equal(learnt[k], plain[k]) for k in plain)
    gc.collect()
    assert not list(project.glob("scratch/*")), "what was written for the run goes with it"


@pytest.mark.parametrize("memory", ['optimizer_state = "8bit"', 'precision = "int8"', 'precision = "nf4"'])
def test_what_is_rounded_learns_nearly_the_same(project, plain, memory):
    learnt = adapter(project, memory[-5:-1].strip('" '), memory)
    assert any(not torch.equal(learnt[k], plain[k]) for k in plain)
    size = sum(float(v.square().sum()) for v in plain.values())
    error = sum(float((learnt[k] - plain[k]).square().sum()) for k in plain)
    assert error < 0.2 * size


def test_a_run_goes_on_with_another_kind_of_moments(project, plain):
    """Stopped after two steps with moments on the host, continued with 8-bit ones: near the whole run."""
    recipe = project / "switch.toml"
    text = BASE.format(folder=project / "switch", memory='optimizer_state = "cpu"')
    recipe.write_text(text.replace("steps = 4", "steps = 2"))
    run(prepare(recipe))
    recipe.write_text(BASE.format(folder=project / "switch", memory='optimizer_state = "8bit"'))
    learnt = load_file(run(prepare(recipe)).adapter)
    size = sum(float(v.square().sum()) for v in plain.values())
    assert sum(float((learnt[k] - plain[k]).square().sum()) for k in plain) < 0.1 * size


@pytest.mark.parametrize(
    ("precision", "kind"), [("fp8", Float8Linear), ("int8", Int8Linear), ("nf4", FrozenLinear4bit)]
)
def test_the_precision_is_that_of_the_plan(plan_of, precision, kind):
    model = build(plan_of(**{"memory.precision": precision, "memory.quantize_via": "cpu"})).transformer
    frozen = [m for m in model.layers.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad]
    assert frozen and all(type(m) is kind for m in frozen)


def test_a_disk_that_cannot_be_written_is_told(plan_of, tmp_path):
    (tmp_path / "file").touch()
    settings = {"memory.offload": "disk", "memory.offload_folder": str(tmp_path / "file" / "x")}
    with pytest.raises(IdeoflowError) as caught:
        build(plan_of(**settings))
    assert caught.value.diagnostics[0].code.id == "IE006"
