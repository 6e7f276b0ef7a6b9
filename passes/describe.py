"""Write into the model's metadata how it was compiled.

Precondition: a finished graph. Postcondition: ``onnx_attrib.*`` entries, as
:class:`onnx_attrib.recipe.Recipe` reads them.
"""

from __future__ import annotations

import json

import numpy as np

from onnx_attrib.job import Job
from onnx_attrib.version import VERSION


def describe(job: Job) -> None:
    """Enter methods, options, names, target, baseline and the source's checksum."""
    request, choices = job.request, job.request.choices
    several = len(choices) > 1
    options = {choice.method.name: dict(choice.options) for choice in choices}
    values = {
        "version": VERSION,
        "method": ",".join(options),
        "options": json.dumps(options if several else dict(choices[0].options), default=str),
        "output": job.scope.output.name,
        "output_shape": json.dumps(job.graph.shape(job.scope.output)),
        "inputs": json.dumps(job.scope.names),
        "target": json.dumps(request.target),
        "targets": json.dumps(request.targets),
        "reduce": json.dumps(request.reduce),
        "normalize": json.dumps(request.normalize),
        "baseline": json.dumps(_baseline(job)),
        "apart": json.dumps(job.apart),
        "precision": request.precision,
        "source_sha256": request.source,
    }
    job.graph.set_metadata({f"onnx_attrib.{key}": value for key, value in values.items()})


def _baseline(job: Job) -> object:
    given = job.request.baseline
    if not any(choice.method.needs_reference for choice in job.request.choices):
        return None
    if isinstance(given, np.ndarray) and given.ndim == 0:
        return float(given)
    return given if isinstance(given, str | int | float) else "array"
