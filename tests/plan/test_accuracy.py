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
    ("memory_error", "all", 60, 0.02, 0.05, 0.015),
    ("memory_error", "held out", 20, 0.02, 0.05, 0.015),
    # One row that is not held out took 17 % longer: 4-bit weights in CUDA graphs, moments in host memory.
    ("time_error", "all", 34, 0.18, 0.1, 0.04),
    ("time_error", "held out", 11, 0.1, 0.1, 0.04),
    # Of steps that wait for the host, or might: for a host as fast as a probe beside them says. One took 15 %
    # longer, FP8 weights fetched by Linears; all others at most 10 %.
    ("launch_error", "all", 25, 0.16, 0.18, 0.06),
    ("launch_error", "held out", 10, 0.16, 0.18, 0.07),
)


def test_plans_are_as_near_as_they_say():
    """One test, since planning all rows again takes the longest of it."""
    from plan_accuracy import planned_again

    rows = planned_again([row for row in ROWS if row["outcome"] == "measured"])
    for key, chosen, count, below, above, mean in BOUNDS:
        those = [r for r in rows if key in r and (chosen == "all" or r["held_out"])]
        found = [r[key] for r in those]
        told = key, chosen, worst(those, key)
        assert len(found) >= count, told
        assert -below <= min(found) and max(found) <= above, told
        assert statistics.mean(map(abs, found)) <= mean, told
