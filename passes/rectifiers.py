"""Say what a method that changes ReLUs only left as it is.

Precondition: the sweeps are done. Postcondition: ``job.notes`` names the operators through which
such a method passed the plain gradient. Raises CompileError if the sweeps met no ReLU: the result
would be the gradient under another name.
"""

from __future__ import annotations

from onnx_attrib.errors import CompileError
from onnx_attrib.job import Job


def rectifiers(job: Job) -> None:
    """Judge by what the sweeps met."""
    if job.method.clusters != "rectifiers":
        return
    name, plain = job.method.name, ", ".join(job.met.get("plain", {}))
    if "rectifier" not in job.met:
        where = f"between {' or '.join(job.scope.names)} and {job.scope.output.name}"
        found = f" (only {plain})" if plain else ""
        raise CompileError(
            f"method '{name}' changes ReLUs and their kin, and there is none {where}{found}; "
            "use 'gradient' or 'saliency'"
        )
    if plain:
        job.notes.append(f"{name} changes ReLUs and their kin; the plain gradient passes {plain}")
