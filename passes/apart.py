"""Find out whether the samples of a batch are explained independently of each other.

Precondition: scope. Postcondition: ``job.apart`` tells; if it is true, a batch may be run in parts.
"""

from __future__ import annotations

from onnx_attrib.job import Job
from onnx_attrib.passes.samples import batch_symbol, kept_apart
from onnx_attrib.passes.stack import downstream


def apart(job: Job) -> None:
    """Trace the batch axis from the model's inputs through all nodes."""
    graph, sources = job.graph, list(job.graph.inputs)
    batch = batch_symbol(graph, sources)
    job.apart = (
        batch is not None
        and batch == job.scope.batch
        and kept_apart(graph, sources, downstream(graph, graph.nodes, sources), batch) is not None
    )


__all__ = ["apart"]
