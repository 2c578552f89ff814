"""transformers' AlbertLayer, which keeps its input alone where gradient checkpointing is wanted: what transformers' own
does not do (its oldest open wish, transformers issue 17464). It runs where the kernels do not; they recompute by
themselves.
"""

from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.albert import modeling_albert


class AlbertLayer(GradientCheckpointingLayer, modeling_albert.AlbertLayer):
    pass
