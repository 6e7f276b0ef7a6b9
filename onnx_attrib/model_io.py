"""Reading and writing model files."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from pathlib import Path
from typing import Any, TypeAlias

import onnx
from google.protobuf.message import DecodeError, Message
from onnx import ModelProto, TensorProto, numpy_helper

from onnx_attrib.errors import ModelError

PROTOBUF_LIMIT = 2**31 - 1
"""A protobuf message cannot be written past 2 GiB; weights then go beside the file."""
_MARGIN = 2**24
_SMALL, _PAGE = 1024, 4096
_DATA_TYPES = frozenset(TensorProto.DataType.values()) - {TensorProto.UNDEFINED}

Source: TypeAlias = str | os.PathLike[str] | bytes | ModelProto


def load(source: Source) -> tuple[ModelProto, str]:
    """The model, with external data in memory, and the SHA-256 of its source.

    ``source``: a path, the bytes of a file, or a ModelProto (which is copied, not changed).
    The digest of a path is that of the file, followed by the files with its external data in the
    order of their names: ``cat model.onnx model.onnx.data | sha256sum``.
    Raises ModelError if it is missing, truncated or not an ONNX model.
    """
    if isinstance(source, ModelProto):
        model = ModelProto()
        model.CopyFrom(source)
        return model, _digest_of_model(model)
    if isinstance(source, bytes):
        return _parse(source, "the given bytes"), hashlib.sha256(source).hexdigest()
    path = Path(source)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read '{path}': {error.strerror or error}") from None
    model = _parse(data, f"'{path}'")
    digest = hashlib.sha256(data)
    del data
    beside = sorted(external_files(model))
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
        for name in beside:
            _update(digest, path.parent / name)
    except Exception as error:  # onnx raises several kinds for missing or short data files
        raise ModelError(f"cannot read the external data of '{path}': {_line(error)}") from None
    return model, digest.hexdigest()


def external_files(message: Message) -> set[str]:
    """The files, relative to the model's, that hold tensors of a model or of a part of it."""
    if isinstance(message, TensorProto):
        outside = message.data_location == TensorProto.EXTERNAL
        return {e.value for e in message.external_data if outside and e.key == "location"}
    found = set[str]()
    for descriptor, value in message.ListFields():
        if descriptor.message_type is not None:
            for part in [value] if isinstance(value, Message) else value:
                found |= external_files(part)
    return found


def _update(digest: Any, path: Path) -> None:
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)


def _parse(data: bytes, name: str) -> ModelProto:
    model = ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        raise ModelError(f"{name} is not an ONNX model, or it is truncated") from None
    if not model.HasField("graph") or not model.opset_import:
        raise ModelError(f"{name} is not an ONNX model: it holds no graph or no opset")
    fault = _damage(model)
    if fault:
        raise ModelError(f"{name} is damaged: {fault}")
    return model


def _damage(message: Message) -> str | None:
    """What protobuf lets pass: a text that is none, a data type that does not exist."""
    if isinstance(message, TensorProto):
        # Its other fields are data, which reading would copy.
        if message.data_type not in _DATA_TYPES:
            return f"tensor {message.name!r} has the unknown data type {message.data_type}"
        return None if isinstance(message.name, str) else "a name in it is not text"
    for descriptor, value in message.ListFields():
        if descriptor.message_type is not None:
            for part in [value] if isinstance(value, Message) else value:
                if fault := _damage(part):
                    return fault
        elif descriptor.type == descriptor.TYPE_STRING:
            # Text that is not UTF-8 comes as bytes.
            texts = [value] if isinstance(value, str | bytes) else value
            if any(isinstance(text, bytes) for text in texts):
                return "a name in it is not text"
        elif descriptor.name == "elem_type" and value and value not in _DATA_TYPES:
            return f"a tensor has the unknown data type {value}"
    return None


def is_large(model: ModelProto) -> bool:
    """Whether a model is too large for one protobuf message."""
    # ByteSize() writes the whole model out to count; weights alone tell in most cases.
    weights = sum(_bytes_of(tensor) for tensor in model.graph.initializer)
    return weights + _MARGIN >= PROTOBUF_LIMIT or model.ByteSize() + _MARGIN >= PROTOBUF_LIMIT


def _bytes_of(tensor: TensorProto) -> int:
    if tensor.data_type in (TensorProto.STRING, TensorProto.UNDEFINED):
        return 0
    size: int = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return math.prod(tensor.dims) * size


def _weights_apart(model: ModelProto, data: Path) -> ModelProto:
    """A copy of ``model`` that reads its large weights from the file ``data``, which is written.

    onnx.save_model would move the weights out of the caller's model.
    """
    slim = ModelProto()
    for part, whole in ((slim, model), (slim.graph, model.graph)):
        for field, value in whole.ListFields():
            if field.name in ("graph", "initializer"):
                continue
            if field.message_type is None:
                setattr(part, field.name, value)
            else:
                getattr(part, field.name).extend(value)
    with data.open("wb") as file:
        for tensor in model.graph.initializer:
            kept = slim.graph.initializer.add()
            if tensor.data_type == TensorProto.STRING or _bytes_of(tensor) < _SMALL:
                kept.CopyFrom(tensor)
                continue
            kept.name, kept.data_type = tensor.name, tensor.data_type
            kept.doc_string = tensor.doc_string
            kept.dims.extend(tensor.dims)
            kept.data_location = TensorProto.EXTERNAL
            content = tensor.raw_data or numpy_helper.to_array(tensor).tobytes()
            # Pages can be mapped into memory where tensors start on them.
            file.write(bytes(-file.tell() % _PAGE))
            place = {"location": data.name, "offset": file.tell(), "length": len(content)}
            for key, value in place.items():
                kept.external_data.add(key=key, value=str(value))
            file.write(content)
    return slim


def _digest_of_model(model: ModelProto) -> str:
    if not is_large(model):
        return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()
    digest = hashlib.sha256()
    for part in (*model.graph.node, *model.graph.initializer):
        digest.update(part.SerializeToString(deterministic=True))
    return digest.hexdigest()


def save(model: ModelProto, path: str | os.PathLike[str]) -> list[Path]:
    """Write a model so that either the whole file appears or nothing changes.

    Past 2 GiB the weights go to ``<path>.data``. Returns the files written.
    Raises ModelError if the place cannot be written.
    """
    path = Path(path)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            temporary, names = Path(folder) / path.name, [path.name]
            if not is_large(model):
                temporary.write_bytes(model.SerializeToString())
            else:
                names.insert(0, f"{path.name}.data")
                slim = _weights_apart(model, Path(folder) / names[0])
                temporary.write_bytes(slim.SerializeToString())
            for name in names:
                os.replace(Path(folder) / name, path.parent / name)
            return [path.parent / name for name in names]
    except OSError as error:
        raise ModelError(f"cannot write '{path}': {error.strerror or error}") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
