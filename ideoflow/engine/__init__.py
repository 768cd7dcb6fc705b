"""Carries a plan out: sets the model up, trains, samples. It decides nothing and prints nothing.

The engine reads a :class:`~ideoflow.plan.document.Plan`, never a recipe, and tells what happens through
:mod:`ideoflow.engine.events`.
"""

from ideoflow.engine.warm import grow_memory, keep_compiled

# Before torch is imported here: Inductor fixes its cache's folder as soon as some library imports it.
keep_compiled()
grow_memory()
