"""The fused engine: a step on packed tokens, its backward pass written out (see ``transformer.py``)."""

from ideoflow.engine.fused.transformer import FusedTransformer, adapter_parameters

__all__ = ["FusedTransformer", "adapter_parameters"]
