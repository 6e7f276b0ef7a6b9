"""Which compiled models a CUDA graph can hold."""

from __future__ import annotations

import os

import onnx
from onnx import GraphProto, ModelProto

from onnx_attrib.errors import OptionError
from onnx_attrib.feeds import Port
from onnx_attrib.model_io import Source
from onnx_attrib.protos import subgraphs

_CONTROL = frozenset({"If", "Loop", "Scan"})
_CUDA = "CUDAExecutionProvider"


def with_capture(providers: list[object]) -> list[object]:
    """The providers, CUDA with its graphs enabled; OptionError if CUDA is not the first."""
    first = providers[0] if providers else ""
    name, options = first if isinstance(first, tuple) else (first, {})
    if name != _CUDA:
        raise OptionError(f"cuda_graph needs {_CUDA} as the first provider, not {name}")
    return [(name, {**options, "enable_cuda_graph": "1"}), *providers[1:]]


def check_capturable(model: Source, ports: list[Port]) -> None:
    """Raise OptionError, with every reason, for a model that a CUDA graph cannot hold.

    ``ports``: its inputs and outputs. A graph has fixed shapes and no control flow.
    """
    problems = [f"{port} has no fixed shape" for port in ports if _open(port)]
    found = [_told(kind, name) for kind, name in _control(_parsed(model).graph)]
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        problems.append(
            f"it has control flow: {', '.join(found[:3])}{more} (a method that averages has none "
            "if its option 'chunk' holds all draws)"
        )
    if problems:
        raise OptionError(f"a CUDA graph cannot hold the model: {'; '.join(problems)}")


def _open(port: Port) -> bool:
    return not all(isinstance(size, int) for size in port.shape)


def _told(kind: str, name: str) -> str:
    return f"{kind} '{name}'" if name else kind


def _control(graph: GraphProto) -> list[tuple[str, str]]:
    return [(n.op_type, n.name) for n in graph.node if n.op_type in _CONTROL or any(subgraphs(n))]


def _parsed(model: Source) -> ModelProto:
    if isinstance(model, bytes):
        return onnx.load_from_string(model)
    if isinstance(model, str | os.PathLike):
        return onnx.load(model, load_external_data=False)
    return model


__all__ = ["check_capturable", "with_capture"]
