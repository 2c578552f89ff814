"""This package inside transformers: `accelerate(model)` in place, `restore(model)`, `explain(model, **inputs)`.

Needs transformers (the extra `hf`). Only the encoders inside a model change; its own class, its parameters and their
names, its checkpoints and its hooks stay what they are.
"""

from albert_fast.hf.accelerate import Path, accelerate, explain, restore
from albert_fast.hf.guards import NotAcceleratedError

__all__ = ["NotAcceleratedError", "Path", "accelerate", "explain", "restore"]
