"""ONNX Runtime, where it is installed: sessions for compiled models."""

from __future__ import annotations

import ctypes
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import onnx

from onnx_attrib.errors import ModelError, OptionError, RuntimeMissingError, suggest
from onnx_attrib.feeds import Port, line
from onnx_attrib.model_io import Source, is_large, save
from onnx_attrib.recipe import Recipe

Provider = str | tuple[str, Mapping[str, Any]]

_ERRORS_ONLY = 3
"""ONNX Runtime's severity: its warnings are about graphs, and of no use to who runs one."""


def onnxruntime() -> ModuleType:
    """ONNX Runtime, or RuntimeMissingError that says how to get it."""
    try:
        import onnxruntime
    except ImportError as error:
        found = getattr(error, "name", None) == "onnxruntime"
        raise RuntimeMissingError(
            "running a model needs ONNX Runtime: pip install onnx-attrib[cpu] (or [gpu])"
            if found
            else f"ONNX Runtime cannot be loaded: {line(error)}"
        ) from None
    return onnxruntime


def providers_for(ort: ModuleType, wanted: Sequence[Provider] | None) -> list[Any]:
    available = list(ort.get_available_providers())
    if wanted is None:
        preferred = ("CUDAExecutionProvider", "CPUExecutionProvider")
        return [name for name in preferred if name in available]
    if isinstance(wanted, str):
        wanted = [wanted]
    for provider in wanted:
        name = provider if isinstance(provider, str) else provider[0]
        if name not in available:
            raise OptionError(
                f"this ONNX Runtime has no provider '{name}': {suggest(name, available)}"
            )
    return list(wanted)


def session_options(ort: ModuleType, threads: int | None = None) -> Any:
    """Options of a session that says errors only; ``threads``: how many an operator may use."""
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    if threads is not None:
        if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
            raise OptionError(f"threads must be a whole number from 1, not {threads!r}")
        options.intra_op_num_threads = threads
    return options


def open_session(
    ort: ModuleType,
    model: Source,
    providers: list[Any],
    name: str,
    *,
    optimized: bool = True,
    options: Any = None,
) -> Any:
    """A session; ``name`` is how messages call the model."""
    options = session_options(ort) if options is None else options
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if isinstance(model, str | os.PathLike):
        try:
            with open(model, "rb"):
                pass
        except OSError as error:
            raise ModelError(f"cannot read {name}: {error.strerror or error}") from None
        source: str | bytes = os.fspath(model)
    elif isinstance(model, bytes):
        source = model
    elif not is_large(model):
        source = model.SerializeToString()
    else:
        # Past a protobuf message's limit ONNX Runtime reads files only.
        with tempfile.TemporaryDirectory(prefix="onnx-attrib-") as folder:
            path = os.path.join(folder, "model.onnx")
            save(model, path)
            return open_session(ort, path, providers, name, optimized=optimized, options=options)
    try:
        return ort.InferenceSession(source, sess_options=options, providers=providers)
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        _refuse_uncompiled(model, name)
        raise ModelError(f"ONNX Runtime cannot load {name}: {line(error)}") from None


def _refuse_uncompiled(model: Source, name: str) -> None:
    """Say that a model was never compiled, where that explains more than a failed session."""
    try:
        if isinstance(model, str | os.PathLike):
            model = onnx.load(model, load_external_data=False)
        elif isinstance(model, bytes):
            model = onnx.load_from_string(model)
    except Exception:  # not a model at all: the session's error says so
        return
    if model.HasField("graph"):
        recipe_of({prop.key: prop.value for prop in model.metadata_props}, name)


def recipe_of(metadata: Mapping[str, str], name: str) -> Recipe:
    recipe = Recipe.read(metadata)
    if recipe is None:
        raise ModelError(
            f"{name} was not compiled by onnx-attrib; first: onnx-attrib compile MODEL.onnx"
        )
    return recipe


def run_session(
    session: Any, outputs: Sequence[str], feeds: Mapping[str, Any], options: Any = None
) -> list[Any]:
    """The outputs, also in bfloat16, which ONNX Runtime does not convert to and from numpy."""
    arguments = [*session.get_inputs(), *session.get_outputs()]
    if not any(argument.type == _SIXTEEN for argument in arguments):
        return list(session.run(list(outputs), dict(feeds), options))
    held = {name: ort_value(np.asarray(value)) for name, value in feeds.items()}
    return [array_of(y) for y in session.run_with_ort_values(list(outputs), held, options)]


def ort_value(array: np.ndarray) -> Any:
    """An array as an OrtValue on the host, which shares its memory."""
    values = onnxruntime().OrtValue
    if array.dtype != _bfloat16():
        return values.ortvalue_from_numpy(array)
    code = onnx.TensorProto.BFLOAT16
    return values.ortvalue_from_numpy_with_onnx_type(np.ascontiguousarray(array), code)


def array_of(value: Any) -> Any:
    """An OrtValue's contents on the host."""
    if value.data_type() != _SIXTEEN:
        return value.numpy()
    shape = tuple(value.shape())
    if value.device_name() != "cpu":
        there, kinds = value, onnxruntime().OrtValue
        value = kinds.ortvalue_from_shape_and_type(list(shape), onnx.TensorProto.BFLOAT16)
        value.update_inplace(there)
    memory = (ctypes.c_uint16 * math.prod(shape)).from_address(value.data_ptr())
    return np.array(memory, np.uint16).view(_bfloat16()).reshape(shape)


def port_of(argument: Any) -> Port:
    kind = str(argument.type)
    shape = argument.shape or ()
    return Port(str(argument.name), dtype_named(kind), tuple(shape))


def dtype_named(kind: str) -> np.dtype[Any] | None:
    """The dtype that ONNX Runtime calls ``tensor(float)``; None if numpy has none."""
    return _DTYPES.get(kind)


_SIXTEEN = "tensor(bfloat16)"


def _bfloat16() -> np.dtype[Any]:
    return onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.BFLOAT16)


_DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(double)": np.dtype(np.float64),
    "tensor(float16)": np.dtype(np.float16),
    _SIXTEEN: _bfloat16(),
    "tensor(bool)": np.dtype(np.bool_),
    **{f"tensor({np.dtype(t).name})": np.dtype(t) for t in ("i1", "i2", "i4", "i8")},
    **{f"tensor({np.dtype(t).name})": np.dtype(t) for t in ("u1", "u2", "u4", "u8")},
}
