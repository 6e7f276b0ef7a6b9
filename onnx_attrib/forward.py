"""The forward part of a compiled model by itself, also from the middle on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, ValueInfoProto

from onnx_attrib.errors import CompileError
from onnx_attrib.feeds import Array, line
from onnx_attrib.ir import captured_names, subgraphs
from onnx_attrib.recipe import Recipe
from onnx_attrib.session import open_session, run_session


class Forward:
    """From a model's inputs, and values for the tensors in ``cut``, to some of its tensors."""

    def __init__(
        self,
        ort: ModuleType,
        model: ModelProto,
        outputs: Sequence[str],
        cut: Sequence[str] = (),
        *,
        optimized: bool = True,
    ) -> None:
        part = excerpt(model, outputs, cut)
        self.reads = {info.name for info in part.graph.input}
        self._outputs = list(outputs)
        providers = ["CPUExecutionProvider"]
        self._quiet = ort.RunOptions()
        # A failure is raised; it need not be printed too.
        self._quiet.log_severity_level = 4
        self._session = open_session(ort, part, providers, "the forward part", optimized=optimized)

    def __call__(self, feeds: Mapping[str, Array]) -> list[Array]:
        """The outputs; feeds that nothing here reads are left out."""
        read = {name: value for name, value in feeds.items() if name in self.reads}
        try:
            found = run_session(self._session, self._outputs, read, self._quiet)
            return [np.asarray(y) for y in found]
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            raise CompileError(f"ONNX Runtime failed to run the model: {line(error)}") from None


def excerpt(
    model: ModelProto,
    outputs: Sequence[str],
    cut: Sequence[str] | Mapping[str, ValueInfoProto] = (),
) -> ModelProto:
    """The part of a model that computes ``outputs``, where ``cut`` tensors are given.

    ``cut``: how they are declared, by name; or names of attributed tensors of a compiled model: the
    outputs of their attributions tell their types.
    """
    graph = model.graph
    needed, nodes = set(outputs), []
    for node in reversed(graph.node):
        if any(name in needed and name not in cut for name in node.output):
            nodes.append(node)
            needed.update(read_by(node))
    part = ModelProto(ir_version=model.ir_version)
    part.opset_import.extend(model.opset_import)
    part.functions.extend(model.functions)
    part.graph.name = graph.name
    part.graph.node.extend(reversed(nodes))
    part.graph.initializer.extend(t for t in graph.initializer if t.name in needed)
    own = {info.name for info in graph.input}
    part.graph.input.extend(info for info in graph.input if info.name in needed)
    part.graph.input.extend(
        cut[name] if isinstance(cut, Mapping) else attributed(model, name)
        for name in cut
        if name not in own and name in needed
    )
    for name in outputs:
        # ONNX Runtime infers what is not declared.
        part.graph.output.append(onnx.ValueInfoProto(name=name))
    return part


def attributed(model: ModelProto, name: str) -> onnx.ValueInfoProto:
    """Type and shape of an attributed tensor, as those of its first attribution tell."""
    recipe = Recipe.read({prop.key: prop.value for prop in model.metadata_props})
    assert recipe is not None
    wanted = recipe.attribution(name, next(iter(recipe.methods)))
    info = onnx.ValueInfoProto()
    info.CopyFrom(next(output for output in model.graph.output if output.name == wanted))
    info.name, dims = name, info.type.tensor_type.shape.dim
    if recipe.targets is not None:
        del dims[1]
    if recipe.reduce:
        # What was reduced to one may have had any size.
        for dim in dims[1:]:
            dim.Clear()
    return info


def read_by(node: NodeProto) -> Iterator[str]:
    """Names that a node reads, what its subgraphs capture included."""
    yield from (name for name in node.input if name)
    for inner in subgraphs(node):
        yield from captured_names(inner)


def computed_from(model: ModelProto, names: Sequence[str]) -> set[str]:
    """Names of the tensors that are computed from ``names``."""
    reached, found = set(names), set[str]()
    for node in model.graph.node:
        if any(name in reached for name in read_by(node)):
            found.update(name for name in node.output if name)
            reached.update(node.output)
    return found


__all__ = ["Forward", "attributed", "computed_from", "excerpt", "read_by"]
