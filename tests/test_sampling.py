"""Resizing, sampling at positions, pooling over regions: linear maps against their adjoints.

The transposes are held against the identity ⟨m, F x⟩ = ⟨Fᵀ m, x⟩ on ONNX Runtime's own outputs,
so a mode or a rounding that differs from the kernel's shows. What is not linear (positions,
offsets) is held against differences inside a cell, where the samples are polynomials.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnx_attrib

from . import numeric
from .numeric import Array
from .single import (
    CPU_ONLY,
    Single,
    Symbols,
    batch,
    check_conserved,
    check_exact,
    every,
    loaded_operators,
    single,
)

RNG = np.random.default_rng(0)
FORMS: tuple[Symbols | None, ...] = (None, batch, every)


def normal(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def floats(*values: float) -> Array:
    return np.array(values, np.float32)


# -- Resize ----------------------------------------------------------------------------------------

TRANSFORMS = (
    "half_pixel half_pixel_symmetric pytorch_half_pixel align_corners asymmetric tf_crop_and_resize"
).split()
KINDS: dict[str, list[dict[str, Any]]] = {
    "nearest": [
        {"nearest_mode": mode}
        for mode in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
    ],
    "linear": [{}, {"antialias": 1}],
    "cubic": [
        {},
        {"cubic_coeff_a": -0.5, "exclude_outside": 1},
        {"antialias": 1, "exclude_outside": 1},
    ],
}


def resizings(transform: str) -> Iterator[tuple[dict[str, Array | None], dict[str, Any]]]:
    """Inputs after the data, and attributes, for data [2, 3, 7, 9]."""
    roi = floats(0, 0, 0.1, -0.2, 1, 1, 0.8, 1.1) if transform.startswith("tf") else None
    yield {"roi": roi, "scales": None, "sizes": np.array([2, 3, 12, 5])}, {}
    yield {"roi": roi, "scales": None, "sizes": np.array([2, 3, 7, 27])}, {}
    yield {"roi": roi, "scales": floats(1, 1, 1.7, 0.6)}, {}
    yield {"roi": roi, "scales": floats(1, 1, 2, 3)}, {}
    last_first = None if roi is None else roi[[3, 2, 7, 6]]
    yield {"roi": last_first, "scales": floats(2.5, 3)}, {"axes": [3, 2]}
    if roi is None:
        for policy in ("not_larger", "not_smaller"):
            keep = {"axes": [2, 3], "keep_aspect_ratio_policy": policy}
            yield {"roi": None, "scales": None, "sizes": np.array([13, 30])}, keep


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("mode", KINDS)
def test_resize_is_transposed(mode: str, transform: str) -> None:
    x, forms = normal(2, 3, 7, 9), itertools.cycle([None, every])
    for kind in KINDS[mode]:
        for inputs, more in resizings(transform):
            attributes = {
                "mode": mode,
                "coordinate_transformation_mode": transform,
                "extrapolation_value": 3.0,
                **kind,
                **more,
            }
            check_exact(
                single("Resize", {"x": x, **inputs}, inputs.keys(), next(forms), **attributes)
            )


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 2, 3, 4, 5)])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_resize_of_other_ranks(mode: str, shape: tuple[int, ...]) -> None:
    factors = [1.0, 1.0, *[2.0, 1.5, 3.0][: len(shape) - 2]]
    for scales in (factors, [1, 1, *[2] * (len(shape) - 2)]):
        inputs = {"x": normal(*shape), "roi": None, "scales": floats(*scales)}
        for symbols in (None, every):
            check_exact(single("Resize", inputs, ("scales",), symbols, mode=mode))


@pytest.mark.parametrize("form", [None, every])
@pytest.mark.parametrize("mode", KINDS)
def test_resize_to_sizes_known_at_run_time(mode: str, form: Symbols | None) -> None:
    x = normal(2, 3, 5, 6)
    check_exact(
        single("Resize", {"x": x, "roi": None, "scales": floats(1, 1, 1.5, 2)}, (), form, mode=mode)
    )
    sizes = {"x": x, "roi": None, "scales": None, "sizes": np.array([2, 3, 4, 11])}
    check_exact(single("Resize", sizes, (), form, mode=mode))


def test_resize_along_batch_and_channels() -> None:
    inputs = {"x": normal(2, 3, 4, 5), "roi": None, "scales": floats(2, 3, 1, 1.5)}
    check_exact(single("Resize", inputs, ("scales",), mode="nearest"))


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_upsample_of_old_opsets(mode: str) -> None:
    inputs = {"x": normal(2, 3, 4, 5), "scales": floats(1, 1, 2, 3)}
    check_exact(single("Upsample", inputs, ("scales",), batch, opset=9, mode=mode))


def test_resize_folds_to_matrix_products(tmp_path: Path) -> None:
    inputs = {"x": normal(2, 3, 4, 5), "roi": None, "scales": floats(1, 1, 2, 3)}
    smooth = single("Resize", inputs, ("scales",), batch, mode="linear")
    assert sorted(loaded_operators(smooth, tmp_path)) == ["MatMul", "MatMul", "Resize"]
    nearest = single("Resize", inputs, ("scales",), every, mode="nearest")
    assert sorted(loaded_operators(nearest, tmp_path)) == ["AveragePool", "Mul", "Resize"]


def test_resize_conserves() -> None:
    inputs = {"x": normal(2, 3, 4, 5), "roi": None, "scales": floats(1, 1, 1.5, 3)}
    case = single("Resize", inputs, ("scales",), batch, mode="cubic")
    check_conserved(case)
    check_conserved(case, shared=True)


def test_one_factor_for_all_axes_is_refused() -> None:
    inputs = {"x": normal(1, 1, 2, 4), "roi": None, "scales": None, "sizes": np.array([1, 1, 7, 8])}
    case = single("Resize", inputs, ("sizes",), keep_aspect_ratio_policy="not_larger")
    with pytest.raises(onnx_attrib.CompileError, match="keep_aspect_ratio_policy over all axes"):
        onnx_attrib.compile(case.model, method="gradient")


# -- GridSample, AffineGrid ------------------------------------------------------------------------

SAMPLERS = [
    {"mode": mode, "padding_mode": padding, "align_corners": corners}
    for mode in ("nearest", "linear", "cubic")
    for padding in ("zeros", "border", "reflection")
    for corners in (0, 1)
]


def inside_cells(sizes: tuple[int, ...], out: tuple[int, ...], corners: int) -> Array:
    """Positions up to two entries outside, none near an entry or halfway between two."""
    columns = []
    for size in reversed(sizes):
        entry = RNG.integers(-2, size + 1, (2, *out)) + RNG.choice([0.25, 0.7], (2, *out))
        columns.append(2 * entry / max(size - 1, 1) - 1 if corners else (2 * entry + 1) / size - 1)
    return np.stack(columns, -1).astype(np.float32)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: "-".join(map(str, s.values())))
def test_grid_sample(sampler: dict[str, Any]) -> None:
    cases = [((4, 5), (2, 3)), ((1, 4), (2, 2))]
    if sampler["mode"] != "cubic":
        cases.append(((3, 2, 4), (2, 1, 2)))
    for sizes, out in cases:
        grid = inside_cells(sizes, out, sampler["align_corners"])
        inputs = {"x": normal(2, 2, *sizes), "grid": grid}
        case = single("GridSample", inputs, (), batch, **sampler)
        check_exact(case)
        check_grid_slope(case)
        check_conserved(case, "x", "grid")
    free = single("GridSample", inputs, (), every, **sampler)
    check_exact(free)
    check_conserved(free, "grid")


def check_grid_slope(case: Single) -> None:
    """Each coordinate's derivative, by central differences that stay inside the cell.

    They are exact for linear samples; for cubic ones they are extrapolated from two steps.
    """
    seed = normal(*case.y.shape)
    compiled = onnx_attrib.compile(case.model, method="gradient", target="seed", inputs=["grid"])
    slope = numeric.run(compiled, {**case.feeds, "seed": seed})["grid_attribution"]
    grid = case.feeds["grid"]

    def score(moved: Array) -> Array:
        y = case.session.run(None, {**case.feeds, "grid": moved.astype(np.float32)})[0]
        return np.asarray((y.astype(np.float64) * seed).sum(1))

    for axis in range(grid.shape[-1]):
        unit = np.eye(grid.shape[-1])[axis]
        near, far = (
            (score(grid + h * unit) - score(grid - h * unit)) / (2 * h) for h in (0.01, 0.02)
        )
        np.testing.assert_allclose(slope[..., axis], (4 * near - far) / 3, 2e-3, 2e-3)


def test_grid_sample_of_a_moving_grid_and_fixed_data() -> None:
    fixed = {"x": normal(2, 2, 4, 5), "grid": inside_cells((4, 5), (3, 3), 0)}
    case = single("GridSample", fixed, ("x",), mode="linear")
    check_conserved(case, "grid")
    # Where a coordinate does not move, the quotient's limit is its derivative.
    numeric.check_conservation(case.model, (case.feeds, {"grid": case.feeds["grid"]}))


@pytest.mark.parametrize("size", [(2, 3, 4, 5), (2, 1, 3, 4, 2)])
@pytest.mark.parametrize("corners", [0, 1])
def test_affine_grid(corners: int, size: tuple[int, ...], tmp_path: Path) -> None:
    spatial = len(size) - 2
    inputs = {"x": normal(2, spatial, spatial + 1), "size": np.array(size)}
    for fixed, symbols in ((("size",), None), ((), None), (("size",), batch), ((), every)):
        check_exact(single("AffineGrid", inputs, fixed, symbols, align_corners=corners))
    case = single("AffineGrid", inputs, ("size",), batch, align_corners=corners)
    check_conserved(case)
    assert loaded_operators(case, tmp_path).count("AffineGrid") == 1


# -- DeformConv, Col2Im, CenterCropPad -------------------------------------------------------------


def deform_case(fixed: tuple[str, ...], symbols: Symbols | None, **attributes: Any) -> Single:
    """X [2, 4, 5, 5] under a kernel [3, 2], offsets away from whole numbers."""
    group, offset_group = attributes.get("group", 1), attributes.get("offset_group", 1)
    pads, strides = attributes.get("pads", [0] * 4), attributes.get("strides", [1, 1])
    dilations = attributes.get("dilations", [1, 1])
    out = [
        (5 + pads[k] + pads[k + 2] - dilations[k] * (size - 1) - 1) // strides[k] + 1
        for k, size in enumerate((3, 2))
    ]
    whole = RNG.integers(-2, 2, (2, offset_group * 12, *out))
    inputs = {
        "x": normal(2, 4, 5, 5),
        "weight": normal(4, 4 // group, 3, 2),
        "offset": (whole + RNG.uniform(0.3, 0.7, whole.shape)).astype(np.float32),
        "bias": normal(4),
        "mask": normal(2, offset_group * 6, *out),
    }
    return single("DeformConv", inputs, fixed, symbols, **attributes)


@pytest.mark.parametrize(
    "attributes",
    [
        {"pads": [1, 0, 1, 2]},
        {"strides": [2, 1], "dilations": [1, 2], "pads": [1, 1, 1, 1]},
        {"group": 2, "offset_group": 2, "kernel_shape": [3, 2]},
        {"offset_group": 2},
    ],
)
def test_deform_conv(attributes: dict[str, Any], tmp_path: Path) -> None:
    case = deform_case((), None, **attributes)
    for name in ("x", "weight", "bias", "mask"):
        check_exact(case, name)
    layer = deform_case(("weight", "bias"), batch, **attributes)
    check_exact(layer)
    check_offset_slope(layer)
    check_conserved(layer, "x", "offset", "mask")
    check_conserved(case, "x", "weight", "offset", "bias", "mask")
    assert loaded_operators(layer, tmp_path).count("DeformConv") == 1


def check_offset_slope(case: Single) -> None:
    """Along rows or columns alone, samples are linear in the offset within a cell."""
    seed, offset = normal(*case.y.shape), case.feeds["offset"]
    compiled = onnx_attrib.compile(case.model, method="gradient", target="seed", inputs=["offset"])
    slope = numeric.run(compiled, {**case.feeds, "seed": seed})["offset_attribution"]
    for part in (0, 1):
        step = np.zeros(offset.shape, np.float32)
        step[:, part::2] = RNG.uniform(-0.1, 0.1, step[:, part::2].shape)
        up, down = (
            case.session.run(None, {**case.feeds, "offset": offset + sign * step})[0]
            for sign in (1, -1)
        )
        expected = float(np.sum((up - down).astype(np.float64) / 2 * seed))
        found = float(np.sum(slope.astype(np.float64) * step))
        np.testing.assert_allclose(found, expected, 1e-3, 1e-4)


@pytest.mark.parametrize(
    ("image", "block", "attributes"),
    [
        ([5, 6], [2, 3], {"strides": [2, 1]}),
        ([5, 5], [1, 5], {"pads": [0, 1, 0, 2]}),
        ([7, 6], [2, 2], {"dilations": [1, 3], "strides": [3, 2], "pads": [1, 0, 1, 1]}),
        ([9], [3], {"strides": [2]}),
        ([3, 4, 5], [1, 2, 2], {}),
    ],
)
def test_col2im(
    image: list[int], block: list[int], attributes: dict[str, Any], tmp_path: Path
) -> None:
    rank = len(image)
    pads = np.array(attributes.get("pads", [0] * 2 * rank)).reshape(2, rank).sum(0)
    reach = np.array(attributes.get("dilations", [1] * rank)) * (np.array(block) - 1) + 1
    strides = np.array(attributes.get("strides", [1] * rank))
    blocks = int(np.prod((np.array(image) + pads - reach) // strides + 1))
    inputs = {
        "x": normal(2, 3 * int(np.prod(block)), blocks),
        "image_shape": np.array(image),
        "block_shape": np.array(block),
    }
    for fixed in (("image_shape", "block_shape"), ()):
        for symbols in FORMS:
            check_exact(single("Col2Im", inputs, fixed, symbols, **attributes))
    case = single("Col2Im", inputs, ("image_shape", "block_shape"), batch, **attributes)
    check_conserved(case, shared=True)
    assert loaded_operators(case, tmp_path).count("Col2Im") == 1


@pytest.mark.parametrize(
    ("shape", "axes"),
    [([10, 7, 9], None), ([3, 12, 4], None), ([5, 8], [1, 2]), ([8, 5], [-1, 0]), ([6], [1])],
)
def test_center_crop_pad(shape: list[int], axes: list[int] | None) -> None:
    attributes = {} if axes is None else {"axes": axes}
    inputs = {"x": normal(6, 9, 7), "shape": np.array(shape)}
    for fixed, symbols in ((("shape",), None), ((), None), (("shape",), every), ((), every)):
        check_exact(single("CenterCropPad", inputs, fixed, symbols, **attributes))


# -- regions ---------------------------------------------------------------------------------------

# Inside, reaching outside, nearly empty, beyond the end.
_FIRST = floats(1, 2, 6, 7, 0, 0, 3, 3, -2, -3, 4, 9)
_SECOND = floats(4, 4, 4.2, 4.1, 8, 8, 30, 30, 2.5, 1.2, 9.7, 8.8)
BOXES = np.concatenate([_FIRST, _SECOND]).reshape(-1, 4)
OWNERS = np.array([0, 1, 1, 0, 1, 0])


@pytest.mark.parametrize("ratio", [2, 0, 1])
@pytest.mark.parametrize("transform", ["half_pixel", "output_half_pixel"])
@pytest.mark.parametrize("mode", ["avg", "max"])
def test_roi_align(mode: str, transform: str, ratio: int) -> None:
    inputs = {"x": normal(2, 3, 9, 11), "rois": BOXES, "batch_indices": OWNERS}
    attributes = {
        "mode": mode,
        "coordinate_transformation_mode": transform,
        "sampling_ratio": ratio,
        "output_height": 3,
        "output_width": 2,
    }
    for scale, fixed, symbols in (
        (1.0, ("rois", "batch_indices"), None),
        (0.5, ("rois", "batch_indices"), batch),
        (1.0, (), every),
    ):
        case = single("RoiAlign", inputs, fixed, symbols, spatial_scale=scale, **attributes)
        check_exact(case, homogeneous=True)
        check_conserved(case)


def test_regions_of_other_samples_do_not_share_a_baseline() -> None:
    """A baseline of batch 1 is repeated: regions name their sample by number."""
    inputs = {"x": normal(2, 3, 9, 11), "rois": BOXES, "batch_indices": OWNERS}
    case = single("RoiAlign", inputs, (), batch, output_height=2, output_width=2, sampling_ratio=2)
    compiled = onnx_attrib.compile(
        case.model, method="deeplift", inputs=["x"], baseline="input", target="seed"
    )
    one, seed = normal(1, 3, 9, 11), np.ones_like(case.y)
    results = [
        numeric.run(compiled, {**case.feeds, "seed": seed, "x_baseline": given})["x_attribution"]
        for given in (one, np.repeat(one, 2, 0))
    ]
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("pooled", [[3, 2], [1, 1], [4, 5]])
def test_max_roi_pool(pooled: list[int]) -> None:
    inputs = {"x": normal(2, 3, 9, 11), "rois": np.c_[OWNERS, BOXES].astype(np.float32)}
    for scale, fixed, symbols in (
        (1.0, ("rois",), None),
        (0.5, ("rois",), batch),
        (1.0, (), every),
    ):
        attributes = {"pooled_shape": pooled, "spatial_scale": scale}
        case = single("MaxRoiPool", inputs, fixed, symbols, **attributes)
        check_exact(case, homogeneous=True)
        check_conserved(case)


# -- norms over windows, MaxUnpool -----------------------------------------------------------------

WINDOWS: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((2, 3, 8), {"kernel_shape": [3], "strides": [2]}),
    ((2, 2, 8, 6), {"kernel_shape": [3, 2], "strides": [2, 2], "ceil_mode": 1}),
    ((2, 2, 7, 6), {"kernel_shape": [3, 3], "auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ((2, 2, 7, 6), {"kernel_shape": [2, 2], "auto_pad": "VALID", "dilations": [2, 3]}),
    ((2, 2, 4, 5, 3), {"kernel_shape": [2, 2, 2], "pads": [1, 0, 0, 0, 1, 0]}),
    (
        (2, 2, 8, 6),
        {"kernel_shape": [3, 2], "pads": [1, 0, 1, 0], "dilations": [1, 2], "ceil_mode": 1},
    ),
]


@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_norms(p: int, tmp_path: Path) -> None:
    cases: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
        *(("LpPool", shape, attributes) for shape, attributes in WINDOWS),
        ("GlobalLpPool", (2, 3, 4, 5), {}),
    ]
    for op, shape, attributes in cases:
        for symbols in FORMS:
            case = single(op, {"x": normal(*shape)}, (), symbols, p=p, **attributes)
            check_exact(case, homogeneous=True)
            check_conserved(case)
        zeros = {"x": np.zeros(shape, np.float32)}
        numeric.check_conservation(case.model, (case.feeds, zeros))
        assert sum(op_type in CPU_ONLY for op_type in loaded_operators(case, tmp_path)) == 1


@pytest.mark.parametrize("p", [2, 3])
def test_norms_have_a_gradient_at_zero(p: int) -> None:
    x = normal(1, 1, 6)
    x[..., :3] = 0
    case = single("LpPool", {"x": x}, p=p, kernel_shape=[2])
    compiled = onnx_attrib.compile(case.model, method="gradient", target="seed")
    result = numeric.run(compiled, {**case.feeds, "seed": np.ones_like(case.y)})
    assert np.isfinite(result["x_attribution"]).all()
    assert not result["x_attribution"][..., :2].any()


@pytest.mark.parametrize("duplicates", [False, True])
@pytest.mark.parametrize("shape", [None, [2, 3, 5, 5]])
def test_max_unpool(shape: list[int] | None, duplicates: bool, tmp_path: Path) -> None:
    total = 6 * (16 if shape is None else 25)
    places = RNG.integers(0, total // 8, 24) if duplicates else RNG.permutation(total)[:24]
    inputs = {
        "x": normal(2, 3, 2, 2),
        "places": places.reshape(2, 3, 2, 2),
        "shape": None if shape is None else np.array(shape),
    }
    attributes = {"kernel_shape": [2, 2], "strides": [2, 2]}
    for fixed, symbols in ((("places", "shape"), None), (("shape",), None), ((), every)):
        check_exact(single("MaxUnpool", inputs, fixed, symbols, **attributes))
    case = single("MaxUnpool", inputs, ("places", "shape"), **attributes)
    check_conserved(case)
    assert loaded_operators(case, tmp_path).count("MaxUnpool") == 1
