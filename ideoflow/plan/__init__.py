"""Plans: what fits, how long it takes and why, decided before anything heavy is loaded."""

from ideoflow.plan.check import check_digests
from ideoflow.plan.decide import make_plan
from ideoflow.plan.document import Plan, load_plan
from ideoflow.plan.hardware import detect_hardware, named_hardware

__all__ = ["Plan", "check_digests", "detect_hardware", "load_plan", "make_plan", "named_hardware"]
