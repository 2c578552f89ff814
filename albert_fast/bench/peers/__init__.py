"""Who is measured. To add one: a class of `base.Peer` in a file of its own here, and a line in `PEERS`."""

from albert_fast.bench.peers.albert_fast import AlbertFast, Reference, serving_backends
from albert_fast.bench.peers.base import Peer, call
from albert_fast.bench.peers.onnxruntime import OnnxRuntime
from albert_fast.bench.peers.openvino import OpenVino
from albert_fast.bench.peers.transformers import (
    TransformersAccelerated,
    TransformersAttention,
    TransformersCompile,
    TransformersEager,
    TransformersSdpa,
)

__all__ = ["PEERS", "AlbertFast", "Peer", "Reference", "call", "serving_backends"]

PEERS: dict[str, type[Peer]] = {
    peer.name: peer
    for peer in (
        AlbertFast,
        Reference,
        TransformersEager,
        TransformersSdpa,
        TransformersCompile,
        TransformersAttention,
        TransformersAccelerated,
        OnnxRuntime,
        OpenVino,
    )
}
