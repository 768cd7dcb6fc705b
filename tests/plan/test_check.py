"""A plan is run only as it was made: what changed is named."""

import dataclasses

from ideoflow.plan import check_digests, make_plan, named_hardware
from ideoflow.plan.check import changed_since, changed_values, plan_changes
from ideoflow.plan.document import Cached


def planned(base, recipe, data, card="rtx-4090"):
    return make_plan(recipe, base, data, named_hardware(card))


def test_nothing_changed(full_base, write_recipe, summarize):
    plan = planned(full_base, write_recipe(), summarize())
    assert check_digests(plan, write_recipe("# a comment is no change\n"), full_base, summarize()) == []


def test_each_setting_that_changed_is_named(full_base, write_recipe, summarize):
    plan = planned(full_base, write_recipe("[train]\nsteps = 500\n"), summarize())
    (problem,) = check_digests(plan, write_recipe("[adapter]\nrank = 8\n"), full_base, summarize())
    assert problem.code.id == "IP004" and problem.is_error and "portrait.toml" in problem.cure
    assert set(problem.notes) == {"train.steps: 500 -> 1000", "adapter.rank: 32 -> 8"}


def test_changed_data(full_base, write_recipe, summarize):
    plan = planned(full_base, write_recipe(), summarize())
    more = dataclasses.replace(summarize(pictures=50), digest="e" * 64)
    (problem,) = check_digests(plan, write_recipe(), full_base, more)
    assert problem.code.id == "IP005" and "pictures: 48 -> 50" in problem.notes
    edited = dataclasses.replace(summarize(), digest="e" * 64)
    (problem,) = check_digests(plan, write_recipe(), full_base, edited)
    assert problem.notes == ("as many and of the same sizes as before, but not the same",)
    encoded = dataclasses.replace(edited, cached=(Cached("bfloat16", 48, 48),))
    assert check_digests(plan, write_recipe(), full_base, encoded)[0].notes == problem.notes


def test_data_is_not_compared_where_none_was_planned(full_base, write_recipe, summarize):
    plan = planned(full_base, write_recipe(), None)
    assert check_digests(plan, write_recipe(), full_base, summarize()) == []


def test_changed_base(full_base, write_recipe, summarize):
    plan = planned(full_base, write_recipe(), summarize())
    other = dataclasses.replace(full_base, digest="f" * 64)
    (problem,) = check_digests(plan, write_recipe(), other, summarize())
    assert problem.code.id == "IP006" and any(note.startswith("digest: ") for note in problem.notes)


def test_everything_changed_is_told_at_once(full_base, nano_base, write_recipe, summarize):
    plan = planned(full_base, write_recipe(), summarize())
    other = dataclasses.replace(summarize(), digest="e" * 64)
    problems = check_digests(plan, write_recipe("[adapter]\nrank = 8\n"), nano_base, other)
    assert [p.code.id for p in problems] == ["IP004", "IP005", "IP006"]


def test_changed_values_names_additions_and_removals():
    old = {"a": {"b": 1, "c": [1, 2]}, "d": [{"e": 1}], "g": 0}
    new = {"a": {"b": 1, "c": [1, 3]}, "d": [{"e": 2}, {"e": 3}]}
    assert changed_values(old, new) == [
        "a.c: [1, 2] -> [1, 3]",
        "d.0.e: 1 -> 2",
        "g: 0 -> (absent)",
        "d.1.e: (absent) -> 3",
    ]
    assert changed_values(old, old) == []


def test_the_difference_of_two_plans(full_base, write_recipe, summarize):
    small = planned(full_base, write_recipe(), summarize())
    large = planned(full_base, write_recipe(), summarize(), "h200")
    assert plan_changes(small, small) == []
    lines = plan_changes(small, large)
    assert "machine: RTX 4090 -> H200" in lines
    assert "decision.checkpointing: on -> off" in lines
    assert any(line.startswith("peak GiB.train: ") for line in lines)


def test_what_a_run_goes_on_with_that_it_was_not_begun_with(full_base, write_recipe, summarize, tmp_path):
    plan, file = planned(full_base, write_recipe(), summarize()), tmp_path / "plan.json"
    assert changed_since(file, plan) == []
    file.write_text(plan.to_json())
    assert changed_since(file, plan) == []
    more = dataclasses.replace(summarize(), digest="e" * 64)
    (data,) = changed_since(file, planned(full_base, write_recipe(), more))
    assert data == "the pictures or captions have changed since this run began"
    recipe, data = changed_since(
        file, planned(full_base, write_recipe("[train]\nlearning_rate = 1e-5\n"), more)
    )
    assert recipe == "the recipe has changed since this run began: train.learning_rate: 0.0001 -> 1e-05"
    for damaged in ("{", "[]", '{"tables": {}}'):
        file.write_text(damaged)
        (told,) = changed_since(file, plan)
        assert "plan.json cannot be read" in told
