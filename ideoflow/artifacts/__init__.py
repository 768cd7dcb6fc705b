"""What a run leaves behind: adapter files that others read, and checkpoints from which training goes on."""

from ideoflow.artifacts.checkpoints import Checkpoint, Checkpoints, prepare_output, set_aside

__all__ = ["Checkpoint", "Checkpoints", "prepare_output", "set_aside"]
