"""A model taken in, and given back as ONNX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
import onnx_graphsurgeon as gs
from onnx import ModelProto, helper
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from onnx_graphsurgeon.logger import G_LOGGER

from onnx_attrib.ir.declarations import rank_of
from onnx_attrib.ir.emitting import IR_VERSION, Emitter
from onnx_attrib.ir.nodes import captures, restore, set_aside
from onnx_attrib.ir.reading import OPSET
from onnx_attrib.ir.sealing import Sealing
from onnx_attrib.protos import captures_of, inner_names


class Graph(Sealing):
    """A model at opset 21, open for surgery.

    ``model`` must be normalized: opset 21, no local functions, constants as initializers, and
    types and shapes inferred into ``value_info``. It is taken over, not copied. ``outputs``: how
    the model declares its outputs, which may say less of their shapes than is known.
    """

    def __init__(self, model: ModelProto, outputs: Sequence[onnx.ValueInfoProto] = ()) -> None:
        self._interface = {info.name: info for info in outputs}
        self._header = ModelProto()
        for field, value in model.ListFields():
            if field.name == "metadata_props":
                self._header.metadata_props.extend(value)
            elif field.name in ("producer_name", "producer_version", "domain", "doc_string"):
                setattr(self._header, field.name, value)
            elif field.name == "model_version":
                self._header.model_version = value
        self._imports = {o.domain: o.version for o in model.opset_import if o.domain}
        self._graph_metadata = list(model.graph.metadata_props)
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        kept = [set_aside(node) for node in model.graph.node]
        with G_LOGGER.suppress(G_LOGGER.ERROR):
            self.gs = gs.import_onnx(model)
        for tensor in self.gs.tensors().values():
            if isinstance(tensor.dtype, int):
                # graphsurgeon leaves types that plain numpy lacks as enumeration values.
                # (Undefined: a sequence or a map.)
                code = tensor.dtype
                holder = tensor._values if isinstance(tensor, gs.Constant) else tensor
                holder.dtype = helper.tensor_dtype_to_np_dtype(code) if code else None
        self._tensors = dict(self.gs.tensors())
        for node, proto in zip(self.gs.nodes, kept, strict=True):
            if proto is not None:
                node.kept = proto
                node.captures = [self._tensor(name) for name in captures_of(proto)]
        self._names = set(self._tensors) | {node.name for node in self.gs.nodes}
        self._names |= {name for proto in kept if proto for name in inner_names(proto)}
        self.own = frozenset(self._tensors)
        self.stated = set()
        self._counters = {}
        self._constants = {}
        self._wide, self._inferred = {}, {}
        self._sink = self.gs.nodes
        self.op = Emitter(self)

    def to_proto(self) -> ModelProto:
        """The model as ONNX: opset 21, IR 10, metadata restored."""
        self.gs.opset = OPSET
        self.gs.ir_version = IR_VERSION
        imports = {"": OPSET, **self._imports}
        self.gs.import_domains = [helper.make_opsetid(*entry) for entry in imports.items()]
        model = gs.export_onnx(self.gs, do_type_check=False)
        for exported, node in zip(model.graph.node, self.nodes, strict=True):
            restore(exported, node)
        present = {t.name for t in model.graph.initializer}
        for node in self.nodes:
            for tensor in captures(node):
                if isinstance(tensor, gs.Constant) and tensor.name not in present:
                    present.add(tensor.name)
                    model.graph.initializer.append(OnnxExporter.export_tensor_proto(tensor))
        for info in model.graph.output:
            declared = self._interface.get(info.name)
            # A file may declare another rank than its outputs have.
            if declared is not None and rank_of(declared) in (None, rank_of(info)):
                info.CopyFrom(declared)
        stated = [info for info in model.graph.value_info if info.name in self.stated]
        del model.graph.value_info[:]
        model.graph.value_info.extend(stated)
        model.graph.metadata_props.extend(self._graph_metadata)
        model.MergeFrom(self._header)
        return model

    def set_metadata(self, entries: Mapping[str, str]) -> None:
        """Add (or replace) entries of the model's metadata_props."""
        kept = [prop for prop in self._header.metadata_props if prop.key not in entries]
        del self._header.metadata_props[:]
        self._header.metadata_props.extend(kept)
        for key, value in entries.items():
            self._header.metadata_props.add(key=key, value=value)
