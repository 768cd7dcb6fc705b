"""Plans made today against what a GPU measured: every row of benchmarks/results/plan-accuracy.json."""

import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
ROWS = json.loads((ROOT / "benchmarks/results/plan-accuracy.json").read_text(encoding="utf-8"))["rows"]


def worst(rows, key):
    return {f"{r[key]:+.1%}": {k: r[k] for k in ("index", "engine", "precision", "batch", "pixels")}
            for r in sorted(rows, key=lambda r: abs(r[key]))[-3:]}  # fmt: skip


# (error, which rows, how many at least, most below, most above, mean)
BOUNDS = (
    ("memory_error", "all", 65, 0.02, 0.05, 0.015),
    ("memory_error", "held out", 22, 0.02, 0.05, 0.015),
    ("step_error", "all", 65, 0.11, 0.1, 0.04),
    ("step_error", "held out", 22, 0.1, 0.1, 0.04),
    ("time_error", "held out", 11, 0.1, 0.1, 0.04),
    # Of steps that wait for the host, or might: for a host as fast as a probe beside them says.
    ("launch_error", "held out", 11, 0.1, 0.1, 0.055),
)


def test_plans_are_as_near_as_they_say():
    """One test, since planning all rows again takes the longest of it."""
    from plan_accuracy import by_configuration, planned_again

    rows = planned_again([row for row in ROWS if row["outcome"] == "measured"])
    for key, chosen, count, below, above, mean in BOUNDS:
        those = [r for r in rows if key in r and (chosen == "all" or r["held_out"])]
        found = list(by_configuration(those, key).values())
        told = key, chosen, worst(those, key)
        assert len(found) >= count, told
        assert -below <= min(found) and max(found) <= above, told
        assert statistics.mean(map(abs, found)) <= mean, told
