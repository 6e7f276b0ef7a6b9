"""What the passes share that rewrite a finished graph node by node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from onnx_attrib.ir import Graph, Node, Tensor, bodies
from onnx_attrib.job import Job


class Rewriting:
    """A finished, sorted graph and who makes and reads its tensors.

    (A tensor's own list of producers may hold nodes that were shared away.)
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._makers = {t.name: node for node in graph.nodes for t in node.outputs}
        self._readers = Counter(t.name for node in graph.nodes for t in graph.uses(node))
        self._readers.update(t.name for t in graph.outputs)

    def maker(self, tensor: Tensor, *ops: str) -> Node | None:
        """The node that makes a tensor, if it is one of these operators (or any)."""
        node = self._makers.get(tensor.name)
        return (
            node if node is not None and not node.domain and node.op in (ops or node.op) else None
        )

    def readers(self, tensor: Tensor) -> int:
        """How many nodes read a tensor (an output of the model counts as one more)."""
        return self._readers[tensor.name]

    def number(self, tensor: Tensor) -> float | None:
        """The value of a constant of one entry; None for any other tensor."""
        value = self.graph.value(tensor)
        return float(value.reshape(())) if value is not None and value.size == 1 else None

    def each(self, change: Callable[[Node], None]) -> None:
        """Let ``change`` alter each node, and emit what this then reads; drop what is dead."""
        graph = self.graph
        nodes, kept = graph.nodes[:], list[Node]()
        graph.nodes.clear()
        for node in nodes:
            with graph.collect() as made:
                if not node.domain:
                    change(node)
            self._makers.update((t.name, one) for one in made for t in one.outputs)
            kept += [*made, node]
        graph.nodes[:] = graph.prune(kept, graph.outputs)


def for_cpu(job: Job) -> bool:
    """Whether the result is tuned for ONNX Runtime's CPU kernels, which compute in float32."""
    return job.request.provider == "portable" and job.request.precision == "keep"


def constant(graph: Graph, nodes: Iterable[Node]) -> set[str]:
    """The names of what ``nodes`` (sorted) make from constants alone."""
    found = set[str]()
    for node in nodes:
        used = graph.uses(node)
        if used and not bodies(node) and all(is_constant(graph, t, found) for t in used):
            found.update(t.name for t in node.outputs if t.name)
    return found


def is_constant(graph: Graph, tensor: Tensor, constants: set[str]) -> bool:
    """Whether a tensor is a constant or one of those that :func:`constant` found."""
    return tensor.name in constants or graph.value(tensor) is not None


__all__ = ["Rewriting", "constant", "for_cpu", "is_constant"]
