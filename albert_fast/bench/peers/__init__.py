"""Who is measured: implementations of the whole model (`PEERS`), and of single operations (`OPERATION_PEERS`).

To add one: a class of `base.Peer` or `operations.OperationPeer` in a file of its own here, and a line below. Without
touching the package: the same class in any file, with `albert-fast bench --peer FILE`, or in an installed package that
names it as an entry point of `albert_fast.peers`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

from albert_fast.bench.peers.albert_fast import AlbertFast, Reference, serving_backends
from albert_fast.bench.peers.base import Peer, call
from albert_fast.bench.peers.cut_cross_entropy import CutCrossEntropy
from albert_fast.bench.peers.flash_attn import FlashAttn
from albert_fast.bench.peers.liger import Liger
from albert_fast.bench.peers.onnxruntime import OnnxRuntime
from albert_fast.bench.peers.openvino import OpenVino
from albert_fast.bench.peers.operations import AlbertFastOperations, OperationPeer, ReferenceOperations
from albert_fast.bench.peers.pytorch import PyTorch
from albert_fast.bench.peers.transformers import (
    TransformersAccelerated,
    TransformersAttention,
    TransformersCompile,
    TransformersEager,
    TransformersFlash,
    TransformersInt8,
    TransformersSdpa,
)

__all__ = [
    "OPERATION_PEERS",
    "PEERS",
    "PLUG_INS",
    "AlbertFast",
    "Kind",
    "OperationPeer",
    "Peer",
    "Reference",
    "add",
    "add_installed",
    "call",
    "serving_backends",
]

PEERS: dict[str, type[Peer]] = {
    peer.name: peer
    for peer in (
        AlbertFast,
        Reference,
        TransformersEager,
        TransformersSdpa,
        TransformersFlash,
        TransformersInt8,
        TransformersCompile,
        TransformersAttention,
        TransformersAccelerated,
        OnnxRuntime,
        OpenVino,
    )
}

OPERATION_PEERS: dict[str, type[OperationPeer]] = {
    peer.name: peer for peer in (AlbertFastOperations, ReferenceOperations, PyTorch, Liger, CutCrossEntropy, FlashAttn)
}

Kind: TypeAlias = type[Peer] | type[OperationPeer]

# What `add` was given, and found: the processes of peers add the same.
PLUG_INS: dict[str, Kind] = {}

ENTRY_POINTS = "albert_fast.peers"


def add(plug_in: str) -> Kind:
    """Adds a user's peer, if it is not there yet: that of a Python file, or of an entry point, by its name.

    Raises:
        ValueError: there is no such file or entry point, it cannot be imported, it has another number of peers than
            one, or the peer has the name of one that is there.
    """
    if plug_in in PLUG_INS:
        return PLUG_INS[plug_in]
    peer = _of_file(Path(plug_in)) if plug_in.endswith(".py") else _of_entry_point(plug_in)
    if not isinstance(getattr(peer, "name", None), str):
        raise ValueError(f"--peer {plug_in}: {peer.__name__} has no `name`; a string was expected")
    known: dict[str, type] = OPERATION_PEERS if issubclass(peer, OperationPeer) else PEERS
    if peer.name in known:
        raise ValueError(f"--peer {plug_in} is named {peer.name!r}, as another one is; a name of its own was expected")
    known[peer.name] = PLUG_INS[plug_in] = peer
    return peer


def add_installed() -> list[Kind]:
    """Adds the peers that installed packages name as entry points. Nobody asked for them: one that is broken is left
    out, with a warning."""
    added = []
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            added.append(add(point.name))
        except ValueError as error:
            warnings.warn(f"an installed peer is left out: {str(error).removeprefix('--peer ')}", stacklevel=2)
    return added


@contextlib.contextmanager
def _reported(plug_in: str | Path) -> Iterator[None]:
    """Whatever importing raises is said in one line."""
    try:
        yield
    except ImportError as error:
        raise ValueError(
            f"--peer {plug_in} cannot be imported ({error}): name what it needs in `packages`, and import it where it "
            "is used; it is then listed as absent"
        ) from None
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"--peer {plug_in} cannot be imported ({said})") from error


def _of_file(file: Path) -> Kind:
    if not file.is_file():
        raise ValueError(f"--peer is {str(file)!r}, which does not exist; a Python file was expected")
    spec = importlib.util.spec_from_file_location(f"albert_fast_plug_in_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    with _reported(file):
        spec.loader.exec_module(module)
    own = [value for value in vars(module).values() if _is_peer(value) and value.__module__ == module.__name__]
    if len(own) != 1:
        names = ", ".join(peer.__name__ for peer in own) or "none"
        raise ValueError(f"--peer {file} has these peers: {names}; one class of Peer or OperationPeer was expected")
    return own[0]


def _of_entry_point(name: str) -> Kind:
    points = importlib.metadata.entry_points(group=ENTRY_POINTS, name=name)
    if not points:
        raise ValueError(f"--peer is {name!r}; a Python file, or an entry point of {ENTRY_POINTS}, was expected")
    with _reported(name):
        peer = next(iter(points)).load()
    if not _is_peer(peer):
        raise ValueError(f"--peer {name} is {peer!r}; a class of Peer or OperationPeer was expected")
    return peer


def _is_peer(value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, Peer | OperationPeer) and not inspect.isabstract(value)
