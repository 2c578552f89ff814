"""One gradient for the table that two operations share.

ALBERT's word table embeds the inputs and scores the outputs. Autograd would make two dense gradients of it, 15 MB each
in float32, and add them up. The loss's comes first in every backward; where it has come, the embeddings' is given
sparse, a row for each token, and autograd adds that to the loss's, in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# Leaf -> the backward in which it got a dense gradient last.
_backward_of_leaf = WeakIdKeyDictionary()


def _leaf(ctx: Any, index: int) -> Tensor | None:
    """The leaf that gets the gradient of the operator's input `index` as it is; None where something lies between."""
    return getattr(ctx.next_functions[index][0], "variable", None)


def note_dense_gradient(ctx: Any, index: int) -> None:
    """This backward gives the operator's input `index` a dense gradient."""
    leaf = _leaf(ctx, index)
    if leaf is not None and not torch.compiler.is_compiling():
        _backward_of_leaf[leaf] = torch._C._current_graph_task_id()


def has_dense_gradient(ctx: Any, index: int) -> bool:
    """Whether the operator's input `index` has been given one in the same backward: a sparse one can then be added."""
    leaf = _leaf(ctx, index)
    if leaf is None or torch.compiler.is_compiling():
        return False
    return _backward_of_leaf.get(leaf) == torch._C._current_graph_task_id()
