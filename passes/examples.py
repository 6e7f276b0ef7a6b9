"""Find by example how sizes depend on the batch where ONNX's shape inference does not.

Inference by symbols gives up where sizes are reckoned with (heads folded into the batch, a token
expanded to it), inference by numbers does not. So the open dimensions that lead the inputs are
given numbers, three times over; a dimension that is each time the same number, or the same multiple
of one of these, is taken to be that.

Precondition: shapes inferred by symbols. Postcondition: dimensions unknown before are known, as
numbers or as k*N.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import onnx
from onnx import ModelProto

from onnx_attrib.errors import ModelError
from onnx_attrib.passes.samples import multiple

Dims = list[int | str | None]
_EXAMPLES = ((11, 13, 17), (1009, 1013, 1019), (1, 1, 1))
"""Sizes for as many open dimensions: primes far apart, of which rounded quotients differ, and ones,
which are broadcast where others are not. (ONNX's inference spells out lists of so many sizes.)"""


def by_example(model: ModelProto, infer: Callable[[ModelProto], ModelProto]) -> None:
    """Fill in the model's shapes. ``infer``: inference that also folds arithmetic on sizes."""
    infos = [info for info in (*model.graph.value_info, *model.graph.output) if _open(info)]
    leading = [known[0] for i in model.graph.input if (known := dims(i))]
    symbols = {dim: None for dim in leading if isinstance(dim, str)}
    if not infos or not 0 < len(symbols) <= len(_EXAMPLES[0]):
        return
    try:
        seen = [
            _shapes(infer(_sized(model, dict(zip(symbols, sizes, strict=False)))))
            for sizes in _EXAMPLES
        ]
    except ModelError:  # not every size makes sense to every model
        return
    for info in infos:
        found = [shapes.get(info.name) for shapes in seen]
        shape = info.type.tensor_type.shape
        for axis, dim in enumerate(shape.dim):
            sizes = [known[axis] for known in found if known and len(known) == len(shape.dim)]
            if not _vague(dim) or len(sizes) < len(found):
                continue
            name = _named(sizes, list(symbols))
            if isinstance(name, int):
                dim.dim_value = name
            elif name is not None:
                dim.dim_param = name


def dims(info: onnx.ValueInfoProto) -> Dims | None:
    """What is declared of a tensor's dimensions; None if its rank is unknown."""
    tensor = info.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return [
        d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in tensor.shape.dim
    ]


def vague(dim: int | str | None) -> bool:
    """Whether a dimension is unknown: inference makes symbols up for those."""
    return dim is None or (isinstance(dim, str) and dim.startswith("unk__"))


def _vague(dim: onnx.TensorShapeProto.Dimension) -> bool:
    return not dim.HasField("dim_value") and vague(dim.dim_param or None)


def _open(info: onnx.ValueInfoProto) -> bool:
    return any(map(_vague, info.type.tensor_type.shape.dim))


def _sized(model: ModelProto, sizes: dict[str, int]) -> ModelProto:
    """A copy whose inputs have these sizes, and which says nothing of other shapes."""
    copy = ModelProto()
    copy.CopyFrom(model)
    del copy.graph.value_info[:]
    for info in copy.graph.input:
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]
    for info in copy.graph.output:
        if info.type.HasField("tensor_type"):
            info.type.tensor_type.ClearField("shape")
    return copy


def _shapes(model: ModelProto) -> dict[str, Dims | None]:
    """The shapes of a model's tensors, also of those that have become constants."""
    graph = model.graph
    infos: Iterable[onnx.ValueInfoProto] = (*graph.value_info, *graph.output)
    found = {info.name: dims(info) for info in infos}
    found.update((t.name, list(t.dims)) for t in graph.initializer)
    return found


def _named(sizes: Sequence[int | str | None], symbols: Sequence[str]) -> int | str | None:
    """What a dimension is that has these sizes in the examples; None if it is something else."""
    first = sizes[0]
    if not all(isinstance(size, int) for size in sizes) or not isinstance(first, int):
        return None
    if len(set(sizes)) == 1:
        return first
    for k, symbol in enumerate(symbols):
        times = first // _EXAMPLES[0][k]
        if times and all(
            size == times * example[k] for size, example in zip(sizes, _EXAMPLES, strict=True)
        ):
            return multiple(times, symbol)
    return None


__all__ = ["by_example", "dims", "vague"]
