"""Model families, their weights and their checkpoints: what the runtime knows of a model before it runs.

Importing this package loads no family, no transformers and no checkpoint library; `load_spec` does, when called.
"""

from .parts import Part, Piece, Weight
from .rope import RopeSpec
from .spec import ModelSpec, load_spec
from .weight_names import WeightNames
from .weights import layer_weights, model_weights, tensor_shapes, whole

__all__ = [
    "ModelSpec",
    "Part",
    "Piece",
    "RopeSpec",
    "Weight",
    "WeightNames",
    "layer_weights",
    "load_spec",
    "model_weights",
    "tensor_shapes",
    "whole",
]
