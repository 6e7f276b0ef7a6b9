"""The model to be judged: from the attributed tensor to the explained output.

Where an inner tensor is attributed (an embedding), the model is cut there: a first part computes it
from the data, and all else (scores, attributions, randomised weights) is of the part behind it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import onnx
from onnx import ModelProto, ValueInfoProto

from onnx_attrib.errors import OptionError
from onnx_attrib.feeds import Array, Port
from onnx_attrib.forward import excerpt
from onnx_attrib.ir import Shape, Tensor
from onnx_attrib.ir.declarations import type_proto
from onnx_attrib.job import Choice, Job, Request
from onnx_attrib.methods.perturbation import occlusion
from onnx_attrib.model_io import Source, load
from onnx_attrib.passes.apart import apart
from onnx_attrib.passes.normalize import normalize
from onnx_attrib.passes.quantized import mark, unmark
from onnx_attrib.passes.scope import scope
from onnx_attrib.recipe import PREFIX
from onnx_attrib.session import (
    Provider,
    onnxruntime,
    open_session,
    port_of,
    providers_for,
    run_session,
    session_options,
)


class Subject:
    """A model between one attributed tensor and the explained output.

    ``name``, ``output``: what these two are called; ``output_shape``: None where the rank is
    unknown; ``inputs``: the model's own inputs; ``inner``: whether the attributed tensor is none
    of them; ``source``: what methods are compiled from; ``part``: the model from the attributed
    tensor to the explained output; ``apart``: whether samples are known not to
    depend on each other; ``digest``: SHA-256 of the model's file.
    """

    def __init__(
        self,
        model: Source,
        inputs: str | None = None,
        output: str | None = None,
        threads: int | None = None,
        providers: Sequence[Provider] | None = None,
    ) -> None:
        """Load and cut the model; OptionError if several tensors would be attributed."""
        self._threads, self._providers = threads, providers
        self.file = str(model) if isinstance(model, str | os.PathLike) else None
        original, self.digest = load(model)
        self.metadata = {prop.key: prop.value for prop in original.metadata_props}
        if f"{PREFIX}method" in self.metadata:
            raise OptionError("the model is compiled already: give the one it was compiled from")
        kept = ModelProto()
        kept.CopyFrom(original)
        job = _scoped(original, inputs, output)
        tensor, explained = job.scope.inputs[0], job.scope.output
        self.name, self.output = tensor.name, explained.name
        self.output_shape: Shape | None = job.graph.shape(explained)
        self.inputs = [_port(job, t) for t in job.graph.inputs]
        self.inner = all(port.name != self.name for port in self.inputs)
        self.apart, self.notes = job.apart, list(job.notes)
        whole = job.graph.to_proto()
        self.part = _behind(whole, tensor, explained)
        self._body = self._opened(self.part)
        self._head = self._opened(excerpt(whole, [self.name])) if self.inner else None
        self.source = self.part if self.inner else kept
        ports = {port.name: port for port in map(port_of, self._body.get_inputs())}
        self.port = ports.pop(self.name)
        """Of the attributed tensor."""
        self.others = tuple(ports)
        """What else the explained output is computed from."""

    @property
    def classes(self) -> int | None:
        """How many classes the explained output has, [N, classes], as far as it is declared."""
        shape = self.output_shape
        return shape[1] if shape and len(shape) == 2 and isinstance(shape[1], int) else None

    def _opened(self, model: ModelProto) -> Any:
        ort = onnxruntime()
        options = session_options(ort, self._threads)
        # Between many short runs, waiting threads would keep the cores from others.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        chosen = providers_for(ort, self._providers)
        return open_session(ort, model, chosen, "the model", options=options)

    def attributed(self, feeds: Mapping[str, Array]) -> Array:
        """The value of the attributed tensor."""
        if self._head is None:
            return feeds[self.name]
        read = {argument.name for argument in self._head.get_inputs()}
        (found,) = run_session(
            self._head, [self.name], {k: v for k, v in feeds.items() if k in read}
        )
        return found

    def explained(self, feeds: Mapping[str, Array]) -> Array:
        """The explained output, from the attributed tensor and the others."""
        (found,) = run_session(self._body, [self.output], feeds)
        return found


def _scoped(model: ModelProto, inputs: str | None, output: str | None) -> Job:
    """The model normalized, with what is attributed and explained found in it."""
    choice = Choice(occlusion, occlusion.defaults)  # which asks for no derivative
    request = Request(
        choices=(choice,),
        inputs=None if inputs is None else (inputs,),
        output=output,
        target="argmax",
        targets=None,
        baseline="zeros",
        delta=False,
        source="",
    )
    job = Job(normalize(model), request, choice)
    for apply in (mark, scope, apart, unmark):
        apply(job)
    names = job.scope.names
    if len(names) > 1:
        raise OptionError(
            f"one tensor is evaluated, and the model has {len(names)} to attribute to: choose "
            f"{' or '.join(names)} (inputs=, --input); the others stay as given"
        )
    return job


def _port(job: Job, tensor: Tensor) -> Port:
    dtype = None if tensor.dtype is None else job.graph.dtype(tensor)
    return Port(tensor.name, dtype, job.graph.shape(tensor) or ())


def _behind(whole: ModelProto, tensor: Tensor, output: Tensor) -> ModelProto:
    """The part of the model that computes ``output`` from ``tensor``, an input of it."""
    part = excerpt(whole, [output.name], {tensor.name: _declared(tensor)})
    part.metadata_props.extend(whole.metadata_props)
    for node in part.graph.node:
        for k, name in enumerate(node.output):
            if name == tensor.name:
                # What else the node computes is still needed.
                node.output[k] = f"{name}/computed"
    part.graph.output[0].CopyFrom(_declared(output))
    onnx.checker.check_model(part)
    return part


def _declared(tensor: Tensor) -> ValueInfoProto:
    return ValueInfoProto(name=tensor.name, type=type_proto(tensor))


__all__ = ["Subject"]
