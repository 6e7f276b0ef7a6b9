"""Tensors that stay where they are: OrtValues and DLPack objects as a session's inputs and outputs.

A DLPack object on the host (a torch tensor there) is as good as an array and is read as one; one
on a device is bound to the session as it is, without a copy.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto

from onnx_attrib.errors import OptionError
from onnx_attrib.feeds import Array, Port, fit, line, shape_fits, show_shape
from onnx_attrib.session import array_of, dtype_named, onnxruntime, ort_value

Device = tuple[str, int]
"""A device as ONNX Runtime names it: ``("cpu", 0)``, ``("cuda", 1)``."""

_HOST, _DEFAULT_STREAM = 1, 1
"""DLPack's numbers of the CPU, and of CUDA's default stream."""
_CUDA = "CUDAExecutionProvider"


@dataclass(frozen=True)
class Resident:
    """A tensor bound as it is. ``owner``: what was given, whose memory ``value`` shares."""

    value: Any
    dtype: np.dtype[Any] | None
    shape: tuple[int, ...]
    owner: Any

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    def numpy(self) -> Array:
        """A copy on the host."""
        found: Array = array_of(self.value)
        return found


def taken(value: Any, name: str) -> Any:
    """A :class:`Resident` for an OrtValue and for a DLPack object that numpy cannot read.

    Other DLPack objects, on the host, become arrays; anything else stays as it is.
    Raises OptionError, which calls the value ``name``, where ONNX Runtime cannot take it.
    """
    kinds = onnxruntime().OrtValue
    if isinstance(value, np.ndarray | np.generic | Resident):
        return value
    try:
        if isinstance(value, kinds):
            return _held(value, value)
        if not hasattr(value, "__dlpack_device__"):
            return value
        place = int(value.__dlpack_device__()[0])
        if place == _HOST and "bfloat16" not in str(getattr(value, "dtype", "")):
            return value if hasattr(value, "__array__") else np.from_dlpack(value)
        if not hasattr(kinds, "from_dlpack"):
            raise TypeError("this ONNX Runtime reads no DLPack tensors; upgrade it")
        return _held(kinds.from_dlpack(value if place == _HOST else _Ordered(value)), value)
    except Exception as error:  # each framework has its own
        raise OptionError(f"{name} cannot be read where it is: {line(error)}") from None


class _Ordered:
    """A DLPack object that waits for its producer: its work on other CUDA streams comes first."""

    def __init__(self, value: Any) -> None:
        self._value = value
        self.dtype = getattr(value, "dtype", None)

    def __dlpack__(self) -> Any:
        return self._value.__dlpack__(stream=_DEFAULT_STREAM)


def _held(value: Any, owner: Any) -> Resident:
    return Resident(value, dtype_named(value.data_type()), tuple(value.shape()), owner)


def fitted(port: Port, value: Any) -> Array | Resident:
    """``value`` as the port takes it: a resident as it is, anything else as an array.

    Raises OptionError for a resident of another type or shape: only arrays are cast and completed.
    """
    held = taken(value, port.name)
    if not isinstance(held, Resident):
        return fit(port, held)
    if held.dtype != port.dtype or not shape_fits(held.shape, port.shape):
        raise OptionError(
            f"{port.name} is {held.dtype} {list(held.shape)}; the model takes {port.dtype} "
            f"{show_shape(port.shape)}, and what is on a device is taken as it is"
        )
    return held


def on_host(value: Array | Resident | None) -> Array | None:
    """A value as an array."""
    return value.numpy() if isinstance(value, Resident) else value


def device_of(session: Any) -> Device:
    """Where a session's outputs can stay: the device of its first provider."""
    first = session.get_providers()[0]
    if first != _CUDA:
        return "cpu", 0
    return "cuda", int(session.get_provider_options()[first].get("device_id", 0))


def run_bound(
    session: Any, outputs: Sequence[str], feeds: Mapping[str, Array | Resident], device: Device
) -> list[Any]:
    """The outputs as OrtValues on ``device``; inputs are not copied if they are there."""
    binding = session.io_binding()
    held = {name: _value(value) for name, value in feeds.items()}
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    for name in outputs:
        binding.bind_output(name, *device)
    binding.synchronize_inputs()
    session.run_with_iobinding(binding)
    binding.synchronize_outputs()
    return list(binding.get_outputs())


def _value(value: Array | Resident) -> Any:
    return value.value if isinstance(value, Resident) else ort_value(value)


class Captured:
    """A session whose inputs and outputs have fixed places on a device, as CUDA graphs need them.

    The first run records the graph, later ones replay it. One run at a time.
    """

    def __init__(self, session: Any, inputs: Sequence[Port], outputs: Sequence[Port]) -> None:
        self._session, self._device = session, device_of(session)
        self._inputs = {port.name: self._place(port) for port in inputs}
        self._outputs = {port.name: self._place(port) for port in outputs}
        self._binding = session.io_binding()
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in self._outputs.items():
            self._binding.bind_ortvalue_output(name, value)
        self._lock = threading.Lock()

    def _place(self, port: Port) -> Any:
        kind: Any = port.dtype
        if port.dtype is not None and port.dtype.name == "bfloat16":
            kind = int(TensorProto.BFLOAT16)
        values = onnxruntime().OrtValue
        return values.ortvalue_from_shape_and_type(list(port.shape), kind, *self._device)

    def run(self, feeds: Mapping[str, Array | Resident]) -> list[Any]:
        """The outputs as OrtValues of their own."""
        with self._lock:
            for name, value in feeds.items():
                narrow = value.dtype is not None and value.dtype.name == "bfloat16"
                plain = not isinstance(value, Resident) and not narrow
                self._inputs[name].update_inplace(value if plain else _value(value))
            self._binding.synchronize_inputs()
            self._session.run_with_iobinding(self._binding)
            self._binding.synchronize_outputs()
            return [self._copy(value) for value in self._outputs.values()]

    def _copy(self, value: Any) -> Any:
        values = onnxruntime().OrtValue
        copy = values.ortvalue_from_shape_and_type(
            list(value.shape()), value.element_type(), *self._device
        )
        if math.prod(value.shape()):
            copy.update_inplace(value)
        return copy


__all__ = [
    "Captured",
    "Device",
    "Resident",
    "device_of",
    "fitted",
    "on_host",
    "run_bound",
    "taken",
]
