"""Put what needs the target behind what does not.

ONNX Runtime executes from the last node backwards: of what a node reads it first computes what
stands last in the file. So the gradient that arrives at an operator comes before the operator's own
slope there, which is then computed from one activation, used, and forgotten. The other way round,
slopes are all computed on the way forward, and what they are computed through is kept beside them
(DeepLIFT of VGG-11 at batch 8: 69 MiB → 51 MiB).

Precondition: a finished, sorted graph. Postcondition: the same nodes, sorted.
"""

from __future__ import annotations

from onnx_attrib.job import Job


def late(job: Job) -> None:
    """Move the nodes that depend on a seed to the end, in their order."""
    graph, changing = job.graph, {seed.name for seed in job.seeds}
    first, last = [], []
    for node in graph.nodes:
        if any(t.name in changing for t in (*graph.uses(node), *node.outputs)):
            changing.update(t.name for t in node.outputs if t.name)
            last.append(node)
        else:
            first.append(node)
    graph.nodes[:] = [*first, *last]


__all__ = ["late"]
