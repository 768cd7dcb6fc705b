"""The fused engine: a step's forward and backward pass on packed tokens, written out (see ``transformer.py``)."""

from ideoflow.engine.fused.transformer import FusedTransformer, adapter_parameters

__all__ = ["FusedTransformer", "adapter_parameters"]
