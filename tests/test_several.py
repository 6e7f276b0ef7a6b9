"""Several methods and several targets in one graph, and attributions reduced and normalized."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper, numpy_helper

import onnx_attrib
from onnx_attrib import Explainer, OptionError
from onnx_attrib.recipe import Recipe

HEAD = '<ir_version: 8, opset_import: ["" : 17]>'
RNG = np.random.default_rng(7)

METHODS = ["deeplift", "gradient", "saliency", "integrated-gradients"]


def network(dtype: str = "float32", seed: int = 0) -> ModelProto:
    """Two channels in, a smooth layer, four classes out."""
    rng = np.random.default_rng(seed)
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    arrays = {
        "w": rng.normal(size=(5, 2, 3, 3)).astype(dtype),
        "v": rng.normal(size=(5 * 9, 4)).astype(dtype),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Tanh", ["c"], ["t"]),
        helper.make_node("Flatten", ["t"], ["f"]),
        helper.make_node("MatMul", ["f", "v"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", element, ["N", 2, 5, 5])],
        [helper.make_tensor_value_info("y", element, ["N", 4])],
        [numpy_helper.from_array(a, name) for name, a in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def images(count: int, seed: int = 1, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 2, 5, 5)).astype(dtype)


def close(a: Any, b: Any, relative: float = 1e-5) -> None:
    b = np.asarray(b, np.float64)
    np.testing.assert_allclose(a, b, rtol=0, atol=relative * max(np.abs(b).max(initial=0), 1e-30))


# -- several methods -------------------------------------------------------------------------------


def test_several_methods_are_what_each_is_alone() -> None:
    x, target = images(3), np.array([0, 3, -1])
    both = Explainer(onnx_attrib.compile(network(), METHODS, delta=True))
    result = both(x, target=target)
    assert both.methods == tuple(METHODS) == tuple(result.by_method)
    assert set(result.delta_by_method) == {"deeplift", "integrated-gradients"}
    for method in METHODS:
        complete = method in result.delta_by_method
        alone = Explainer(onnx_attrib.compile(network(), method, delta=complete))(x, target=target)
        close(result.by_method[method]["x"], alone.attributions["x"])
        if complete:
            np.testing.assert_allclose(result.delta_by_method[method], alone.delta, atol=1e-5)
    assert result.attributions is result.by_method["deeplift"]
    assert result.delta is result.delta_by_method["deeplift"]
    assert list(result.outputs) == ["y"]


def test_one_method_is_a_mapping_too() -> None:
    result = Explainer(onnx_attrib.compile(network(), "gradient"))(images(2))
    assert result.by_method == {"gradient": result.attributions}
    assert result.delta_by_method == {}


def test_options_of_several() -> None:
    methods = {"deeplift": {"product": "gradient"}, "integrated_gradients": {}}
    explain = Explainer(onnx_attrib.compile(network(), methods, steps=7))
    assert explain.method == "deeplift,integrated-gradients"
    assert explain.options["deeplift"]["product"] == "gradient"
    assert explain.recipe.methods["integrated-gradients"]["steps"] == 7
    both = onnx_attrib.compile(network(), {"integrated-gradients": {"steps": 3}, "gradient": {}})
    assert Explainer(both).options["integrated-gradients"]["steps"] == 3
    for wrong, message in (
        (["gradient", "gradient"], "named twice"),
        (["gradient", "Gradient"], "named twice"),
        ([], "no method"),
        (["gradient", "deepliftt"], "did you mean 'deeplift'"),
        ({"gradient": {"steps": 3}}, "has no option 'steps'"),
    ):
        with pytest.raises(OptionError, match=message):
            onnx_attrib.compile(network(), wrong)
    with pytest.raises(OptionError, match="no method here has an option 'step': did you mean"):
        onnx_attrib.compile(network(), ["gradient", "integrated-gradients"], step=3)


# -- several targets -------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("targets", ["top3", [2, -1, 0, 2]])
def test_several_targets_are_what_each_is_alone(targets: Any, count: int) -> None:
    x = images(count)
    model = onnx_attrib.compile(network(), ["deeplift", "gradient"], targets=targets, delta=True)
    explain = Explainer(model)
    assert not explain.takes_target
    result = explain(x)
    y = result.outputs["y"]
    if targets == "top3":
        wanted = np.argsort(-y, axis=1)[:, :3]
        assert explain.targets == 3
    else:
        wanted = np.array([[2, row.argmax(), 0, 2] for row in y])
        assert explain.targets == (2, -1, 0, 2)
    assert result.target is not None
    assert result.score is not None
    np.testing.assert_array_equal(result.target, wanted)
    np.testing.assert_array_equal(result.score, np.take_along_axis(y, wanted, 1))
    for method in ("deeplift", "gradient"):
        single = Explainer(onnx_attrib.compile(network(), method))
        several = result.by_method[method]["x"]
        assert several.shape == (count, wanted.shape[1], 2, 5, 5)
        for k in range(wanted.shape[1]):
            close(several[:, k], single(x, target=wanted[:, k]).attributions["x"])
    assert result.delta is not None
    assert result.delta.shape == wanted.shape
    assert np.abs(result.delta).max() < 1e-4


def test_equal_classes_in_the_order_of_topk() -> None:
    text = f"{HEAD} g (float[N, 4] x) => (float[N, 4] y) {{ y = Mul (x, x) }}"
    model = onnx_attrib.compile(onnx.parser.parse_model(text), "gradient", targets="top4")
    x = np.array([[1, 2, -1, 1], [3, 3, 3, 3], [0, -2, 2, 0]], np.float32)
    result = Explainer(model)(x)
    assert result.target is not None
    assert result.target.tolist() == [[1, 0, 2, 3], [0, 1, 2, 3], [1, 2, 0, 3]]
    expected = np.eye(4)[result.target] * (2 * x)[:, None]
    np.testing.assert_allclose(result.attributions["x"], expected)


def test_targets_of_an_inner_output_and_beside_an_input_of_that_name() -> None:
    text = f"""{HEAD} g (float[N, 3] target) => (float[N, 1] z) <int64[1] axis = {{1}}>
    {{ y = Mul (target, target)  z = ReduceSum <keepdims = 1> (y, axis) }}"""
    source = onnx.parser.parse_model(text)
    explain = Explainer(onnx_attrib.compile(source, "gradient", output="y", targets="top2"))
    result = explain(np.array([[1, -3, 2]]))
    assert result.target is None
    assert result.score is None
    expected = [[[0, -6, 0], [0, 0, 4]]]
    np.testing.assert_allclose(result.attributions["target"], expected)


def test_targets_refused() -> None:
    for targets, message in (
        ("top5", "top5 of the 4 classes"),
        ("top0", "neither topK"),
        ([4], "out of range"),
        ([], "empty"),
        ([0.5], "whole numbers"),
    ):
        with pytest.raises(OptionError, match=message):
            onnx_attrib.compile(network(), targets=targets)
    with pytest.raises(OptionError, match="not both"):
        onnx_attrib.compile(network(), targets="top2", target=1)
    explain = Explainer(onnx_attrib.compile(network(), targets="top2"))
    with pytest.raises(OptionError, match="several targets at once"):
        explain(images(1), target=1)
    text = f"{HEAD} g (float[N, C] x) => (float[N, C] y) {{ y = Mul (x, x) }}"
    explain = Explainer(onnx_attrib.compile(onnx.parser.parse_model(text), targets=[0, 9]))
    with pytest.raises(OptionError, match="target 9 is out of range"):
        explain(np.ones((2, 3)))


# -- reduced and normalized ------------------------------------------------------------------------


def reduced(a: np.ndarray, axis: int, how: str) -> np.ndarray:
    """The same, entry by entry, of a float64 array."""
    moved = np.moveaxis(a, axis, -1)
    result = np.empty(moved.shape[:-1])
    for place in np.ndindex(result.shape):
        entries = moved[place].tolist()
        if how == "sum":
            result[place] = sum(entries)
        elif how == "abs-max":
            result[place] = max(abs(v) for v in entries)
        else:
            result[place] = sum(v * v for v in entries) ** 0.5
    return np.expand_dims(result, axis)


def normalized(a: np.ndarray) -> np.ndarray:
    """Each sample by its largest absolute value."""
    sizes = [max((abs(v) for v in row.ravel()), default=0.0) or 1.0 for row in a]
    return np.stack([row / size for row, size in zip(a, sizes, strict=True)])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("how", ["sum", "abs-max", "l2"])
@pytest.mark.parametrize(("axis", "number"), [("channels", 1), ("last", 3), (2, 2), ("2", 2)])
def test_reduce(axis: Any, number: int, how: str, normalize: bool) -> None:
    x = images(4)
    full = Explainer(onnx_attrib.compile(network(), ["deeplift", "gradient"], targets="top2"))(x)
    model = onnx_attrib.compile(
        network(),
        ["deeplift", "gradient"],
        targets="top2",
        delta=True,
        reduce={axis: how.replace("-", "_")},
        normalize=normalize,
    )
    onnx.checker.check_model(model, full_check=True)
    declared = {
        o.name: [d.dim_param or d.dim_value for d in o.type.tensor_type.shape.dim]
        for o in model.graph.output
    }
    explain = Explainer(model)
    result = explain(x)
    assert explain.recipe.reduce == {axis if axis in ("channels", "last") else 2: how}
    assert explain.recipe.normalize is normalize
    for method, attributions in result.by_method.items():
        for k in range(2):
            a = full.by_method[method]["x"][:, k].astype(np.float64)
            expected = reduced(a, number, how)
            expected = normalized(expected) if normalize else expected
            close(attributions["x"][:, k], expected)
        assert declared[f"x_attribution_{method}"] == ["N", *attributions["x"].shape[1:]]
        if normalize:
            largest = np.abs(attributions["x"]).max(axis=(2, 3, 4))
            np.testing.assert_array_equal(largest, np.ones((4, 2)))
    # The delta is that of the whole attribution.
    assert result.delta is not None
    assert np.abs(result.delta).max() < 1e-4


def test_reductions_follow_one_another() -> None:
    x = images(2)
    full = Explainer(onnx_attrib.compile(network(), "gradient", target=1))(x).attributions["x"]
    model = onnx_attrib.compile(
        network(), "gradient", target=1, reduce={"channels": "sum", "last": "abs-max"}
    )
    a = reduced(reduced(full.astype(np.float64), 1, "sum"), 3, "abs-max")
    close(Explainer(model)(x).attributions["x"], a)


SCALED = f"""{HEAD}
g (float[N, 3, 2] x) => (float[N, 1] y) <float[1] factor = {{SCALE}}, int64[2] axes = {{1, 2}}>
{{ q = Mul (x, factor)  s = ReduceSum <keepdims = 0> (q, axes)  y = Unsqueeze (s, last) }}
""".replace("int64[2]", "int64[1] last = {1}, int64[2]")


@pytest.mark.parametrize("how", ["sum", "abs-max", "l2"])
@pytest.mark.parametrize("scale", ["1e-30", "1e30"])
def test_extreme_sizes(scale: str, how: str) -> None:
    source = onnx.parser.parse_model(SCALED.replace("SCALE", scale))
    x = RNG.normal(size=(2, 3, 2)).astype(np.float32)
    expected = reduced(x.astype(np.float64) * float(scale), 1, how)
    for normalize in (False, True):
        model = onnx_attrib.compile(
            source, "gradient-x-input", reduce={"channels": how}, normalize=normalize
        )
        result = Explainer(model)(x).attributions["x"]
        close(result, normalized(expected) if normalize else expected)


@pytest.mark.parametrize("how", ["sum", "abs-max", "l2"])
def test_float16_does_not_overflow_on_the_way(how: str) -> None:
    text = f"""{HEAD} g (float16[N, 64, 3] x) => (float16[N, 64, 3] y) {{ y = Mul (x, x) }}"""
    source = onnx.parser.parse_model(text)
    # Slopes of 34, whose squares add up to more than 65504.
    x = np.full((2, 64, 3), 17.0, np.float16) * np.array([1, 0.5, -1], np.float16)
    slopes = 2 * x.astype(np.float64)
    for normalize in (False, True):
        model = onnx_attrib.compile(
            source, "gradient", target="seed", reduce={"channels": how}, normalize=normalize
        )
        result = Explainer(model)(x, seed=np.ones_like(x)).attributions["x"]
        assert result.dtype == np.float16
        expected = reduced(slopes, 1, how)
        close(result, normalized(expected) if normalize else expected, 1e-3)


def test_zeros_stay_zeros_and_samples_apart() -> None:
    text = f"{HEAD} g (float[N, 3] x) => (float[N, 2] y) <float[3, 2] w = {{1, 0, 2, 0, -4, 0}}>"
    source = onnx.parser.parse_model(f"{text} {{ y = MatMul (x, w) }}")
    explain = Explainer(onnx_attrib.compile(source, "gradient", targets=[0, 1], normalize=True))
    a = explain(np.ones((2, 3))).attributions["x"]
    np.testing.assert_array_equal(a, [[[0.25, 0.5, -1], [0, 0, 0]]] * 2)
    explain = Explainer(onnx_attrib.compile(source, "gradient-x-input", target=0, normalize=True))
    x = np.array([[1, 1, 1], [0, 0, 0], [1e-3, 0, 0], [-8, 0, 1]])
    a = explain(x).attributions["x"]
    np.testing.assert_allclose(a, [[0.25, 0.5, -1], [0, 0, 0], [1, 0, 0], [-1, 0, -0.5]])
    assert explain(np.ones((0, 3))).attributions["x"].shape == (0, 3)
    chosen = onnx_attrib.compile(source, "saliency", target="input", normalize=True)
    feeds = {"x": np.ones((2, 3), "f4"), "target": np.array([0, 5])}
    outside = Explainer(chosen)._runner.on_host(feeds)[1]
    assert outside[0].max() == 1
    assert np.isnan(outside[1]).all()


def test_samples_along_another_axis() -> None:
    source = onnx.parser.parse_model(f"""{HEAD}
    states (float[2, N, 4] x) => (float[N, 4] y) <int64[1] first = {{0}}>
    {{ y = ReduceSum <keepdims = 0> (x, first) }}""")
    x = RNG.normal(size=(2, 3, 4)).astype(np.float32)
    explain = Explainer(
        onnx_attrib.compile(source, "gradient-x-input", target="seed", normalize=True)
    )
    result = explain(x, seed=np.ones((3, 4))).attributions["x"]
    close(result, x / np.abs(x).max(axis=(0, 2), keepdims=True))
    with pytest.raises(OptionError, match="axis 1 of 'x' is that of the samples"):
        onnx_attrib.compile(source, "gradient", target="seed", reduce="channels=sum")


def test_tensors_without_the_axis_stay_as_they_are() -> None:
    source = onnx.parser.parse_model(f"""{HEAD}
    two (float[N, 3, 4] a, float[N, 3] b) => (float[N, 3] y) <int64[1] last = {{2}}>
    {{ s = ReduceSum <keepdims = 0> (a, last)  y = Mul (s, b) }}""")
    result = Explainer(onnx_attrib.compile(source, "gradient", reduce="channels=sum"))(
        {"a": np.ones((2, 3, 4)), "b": np.ones((2, 3))}
    )
    assert result.attributions["a"].shape == (2, 1, 4)
    assert result.attributions["b"].shape == (2, 3)


@pytest.mark.parametrize(
    ("reduce", "message"),
    [
        ("channels", "not of the form AXIS=HOW"),
        ("chanels=sum", "did you mean 'channels'"),
        ("channels=mean", "choose from: sum, abs-max, l2"),
        ({0: "sum"}, "no axis '0'"),
        ({-1: "sum"}, "no axis '-1'"),
        ({4: "sum"}, "no axis '4' to reduce: the attribution of 'x' has rank 4"),
        (["channels"], "neither AXIS=HOW nor a mapping"),
    ],
)
def test_reduce_refuses(reduce: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        onnx_attrib.compile(network(), "gradient", reduce=reduce)


def test_channels_need_three_axes() -> None:
    source = onnx.parser.parse_model(
        f"{HEAD} g (float[N, 3] x) => (float[N, 3] y) {{ y = Exp(x) }}"
    )
    with pytest.raises(OptionError, match="channels are axis 1 of three axes or more"):
        onnx_attrib.compile(source, "gradient", reduce="channels=sum")
    assert Explainer(onnx_attrib.compile(source, "gradient", reduce="last=l2")).recipe.reduce


def test_recipe_of_a_file_without_the_newer_entries() -> None:
    model = onnx_attrib.compile(network(), "gradient", target=(1,))
    entries = {p.key: p.value for p in model.metadata_props}
    for name in ("targets", "reduce", "normalize"):
        del entries[f"onnx_attrib.{name}"]
    recipe = Recipe.read(entries)
    assert recipe is not None
    assert (recipe.targets, dict(recipe.reduce), recipe.normalize) == (None, {}, False)
    assert recipe.method == "gradient"
