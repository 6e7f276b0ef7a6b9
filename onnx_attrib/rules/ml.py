"""Operators of ``ai.onnx.ml`` around networks: scaling, picking, linear and kernel models.

What converters of scikit-learn emit. Decisions (labels, thresholds) carry no derivative; trees are
refused, for a sum of steps has none either. ONNX Runtime computes all of these in float32 whatever
the input's type, and so do the definitions here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from onnx_attrib.ir import Tensor
from onnx_attrib.rules.base import Barrier, Composite, Linear, Site, Unsupported, add, only
from onnx_attrib.rules.indexing import SAME_INDICES

DOMAIN = "ai.onnx.ml"
F32 = np.float32

Definition = Callable[[Site], Sequence[Tensor | None]]


def composite(op: str, decompose: Definition, covers: tuple[int, ...] | None = (0,)) -> None:
    if covers is None:
        add(Composite(op=op, domain=DOMAIN, decompose=decompose))
    else:
        add(Composite(op=op, domain=DOMAIN, decompose=decompose, covers=only(*covers)))


def numbers(s: Site, name: str) -> np.ndarray:
    """An attribute that lists floats; empty where it is absent."""
    return np.asarray(s.attr(name) or (), F32)


def single(s: Site, tensor: Tensor) -> Tensor:
    """The tensor in float32."""
    if s.graph.dtype(tensor) == F32:
        return tensor
    result: Tensor = s.op.Cast(tensor, to=F32)
    return result


def rows(s: Site) -> Tensor:
    """The input as [N, C] in float32; one sample may come without its batch axis."""
    x = single(s, s.x())
    if s.rank(x) == 1:
        x = s.op.Unsqueeze(x, [0])
    return x


# -- scaling, picking ------------------------------------------------------------------------------


def scaled_back(s: Site, i: int) -> Tensor:
    """Forward form y = (x − offset) · scale, per column. Backward returns m · scale."""
    m = s.op.Mul(s.m, numbers(s, "scale"))
    kind = s.graph.dtype(s.x())
    return m if kind == F32 else s.op.Cast(m, to=kind)


def normalizer_definition(s: Site) -> Sequence[Tensor]:
    """Each row over its maximum, the sum of its absolute values, or its length (unless zero)."""
    op, x = s.op, single(s, s.x())
    kinds = {"MAX": op.ReduceMax, "L1": op.ReduceL1, "L2": op.ReduceL2}
    norm = kinds[s.attr("norm")](x, [-1], keepdims=1)
    return [op.Mul(x, op.Reciprocal(op.Where(op.Equal(norm, 0.0), F32(1), norm)))]


def imputer_definition(s: Site) -> Sequence[Tensor]:
    """Entries with the value that stands for "missing" are replaced by a number per column."""
    op, x, missing = s.op, s.x(), s.attr("replaced_value_float")
    absent = op.IsNaN(x) if np.isnan(missing) else op.Equal(x, float(missing))
    return [op.Where(absent, numbers(s, "imputed_value_floats"), x)]


def extractor_definition(s: Site) -> Sequence[Tensor]:
    """Columns by index; a vector becomes one row."""
    op, x = s.op, s.x(0)
    picked = op.Gather(x, op.Reshape(s.x(1), [-1]), axis=-1)
    return [op.Unsqueeze(picked, [0]) if s.rank(x) == 1 else picked]


def vectorizer_definition(s: Site) -> Sequence[Tensor]:
    """The columns of all inputs side by side."""
    parts = [single(s, x) for x in s.inputs if x is not None]
    return [s.op.Concat(*parts, axis=1)]


add(Linear(op="Scaler", domain=DOMAIN, pull=scaled_back, flow="scales"))
composite("Normalizer", normalizer_definition)
add(
    Composite(
        op="Imputer",
        domain=DOMAIN,
        decompose=imputer_definition,
        covers=only(0),
        caveat="exact where the same entries are missing at x and x̄",
    )
)
add(
    Composite(
        op="ArrayFeatureExtractor",
        domain=DOMAIN,
        decompose=extractor_definition,
        blocked=frozenset({1}),
        caveat=SAME_INDICES,
    )
)
composite("FeatureVectorizer", vectorizer_definition, None)

# -- linear models ---------------------------------------------------------------------------------


def transformed(s: Site, scores: Tensor) -> Tensor:
    """Scores [N, E] after the node's post_transform."""
    op, kind = s.op, s.attr("post_transform")
    if kind == "NONE":
        return scores
    result: Tensor
    if kind == "LOGISTIC":
        result = op.Sigmoid(scores)
    elif kind == "SOFTMAX":
        result = op.Softmax(scores, axis=-1)
    else:
        raise Unsupported(f"post_transform {kind}")
    return result


def linear_scores(s: Site, count: int) -> Tensor:
    """X · Wᵀ + b, [N, count]."""
    weights = numbers(s, "coefficients").reshape(count, -1)
    scores = s.op.MatMul(rows(s), np.ascontiguousarray(weights.T))
    offsets = numbers(s, "intercepts")
    return s.op.Add(scores, offsets) if offsets.size else scores


def regressor_definition(s: Site) -> Sequence[Tensor]:
    return [transformed(s, linear_scores(s, int(s.attr("targets") or 1)))]


def class_count(s: Site) -> int:
    names = ("classlabels_ints", "classlabels_strings")
    return max(len(s.attr(name) or ()) for name in names)


def both_classes(s: Site, score: Tensor) -> Tensor:
    """The scores of two classes from one, the way ONNX Runtime writes them."""
    op, kind = s.op, s.attr("post_transform")
    if kind == "LOGISTIC":
        return op.Sigmoid(op.Concat(op.Neg(score), score, axis=1))
    if kind == "NONE":
        return op.Concat(op.Sub(F32(1), score), score, axis=1)
    raise Unsupported(f"post_transform {kind} of a single score for two classes")


def classifier_definition(s: Site) -> Sequence[Tensor | None]:
    """Labels, through which nothing flows, and the scores of the classes."""
    offsets, classes = numbers(s, "intercepts"), class_count(s)
    count = max(offsets.size, 1) if offsets.size else classes
    scores = linear_scores(s, count)
    if count == 1 and classes == 2:
        return [None, both_classes(s, scores)]
    return [None, transformed(s, scores)]


composite("LinearRegressor", regressor_definition)
composite("LinearClassifier", classifier_definition)

# -- support vectors -------------------------------------------------------------------------------


def kernel(s: Site, vectors: np.ndarray) -> Tensor:
    """K(x, v) for each sample and each support vector, [N, V]."""
    op, x, kind = s.op, rows(s), s.attr("kernel_type")
    gamma, coefficient, degree = (float(p) for p in (*numbers(s, "kernel_params"), 0, 0, 0)[:3])
    if kind == "RBF":
        apart = op.Sub(op.Unsqueeze(x, [1]), vectors[None])
        squared = op.ReduceSum(op.Mul(apart, apart), [2], keepdims=0)
        return op.Exp(op.Mul(squared, F32(-gamma)))
    product = op.MatMul(x, np.ascontiguousarray(vectors.T))
    if kind == "LINEAR":
        return product
    affine = op.Add(op.Mul(product, F32(gamma)), F32(coefficient))
    if kind == "POLY":
        return op.Pow(affine, F32(degree))
    if kind == "SIGMOID":
        return op.Tanh(affine)
    raise Unsupported(f"kernel_type {kind}")


def support_regressor_definition(s: Site) -> Sequence[Tensor]:
    """Σ coefficient · K(x, v) + rho."""
    if s.attr("one_class"):
        raise Unsupported("one_class gives a decision, 1 or -1")
    count, offset = int(s.attr("n_supports") or 0), numbers(s, "rho")
    coefficients = numbers(s, "coefficients")
    if count:
        vectors = numbers(s, "support_vectors").reshape(count, -1)
        value = s.op.MatMul(kernel(s, vectors), coefficients[:, None])
    else:
        value = s.op.MatMul(rows(s), coefficients[:, None])
    return [transformed(s, s.op.Add(value, offset[:1]))]


def support_classifier_definition(s: Site) -> Sequence[Tensor | None]:
    """Labels, and the scores: one for each pair of classes (−score and score for two classes).

    With Platt's parameters, two classes have the probabilities p and 1 − p, p the logistic of
    −(a · score + b); for more, ONNX Runtime solves equations by iteration.
    """
    op, classes = s.op, class_count(s)
    supports = [int(n) for n in s.attr("vectors_per_class") or ()]
    if not supports:
        weights = numbers(s, "coefficients").reshape(classes, -1)
        scores = op.Add(op.MatMul(rows(s), np.ascontiguousarray(weights.T)), numbers(s, "rho"))
        return [None, transformed(s, scores)]
    slopes, offsets = numbers(s, "prob_a"), numbers(s, "prob_b")
    if slopes.size and classes > 2:
        raise Unsupported("the probabilities of more than two classes are found by iteration")
    total = sum(supports)
    vectors = numbers(s, "support_vectors").reshape(total, -1)
    coefficients = numbers(s, "coefficients").reshape(classes - 1, total)
    starts = np.concatenate([[0], np.cumsum(supports)])
    pairs = [(i, j) for i in range(classes) for j in range(i + 1, classes)]
    weights = np.zeros((total, len(pairs)), F32)
    for column, (i, j) in enumerate(pairs):
        first, second = slice(starts[i], starts[i + 1]), slice(starts[j], starts[j + 1])
        weights[first, column] = coefficients[j - 1, first]
        weights[second, column] = coefficients[i, second]
    scores = op.Add(op.MatMul(kernel(s, vectors), weights), numbers(s, "rho")[: len(pairs)])
    if slopes.size:
        power = op.Add(op.Mul(scores, slopes), offsets)
        return [None, op.Concat(op.Sigmoid(op.Neg(power)), op.Sigmoid(power), axis=1)]
    if classes == 2:
        return [None, transformed(s, op.Concat(op.Neg(scores), scores, axis=1))]
    return [None, transformed(s, scores)]


composite("SVMRegressor", support_regressor_definition)
composite("SVMClassifier", support_classifier_definition)

# -- decisions -------------------------------------------------------------------------------------


STEPS = "trees are sums of steps and have no derivative; the method 'occlusion' needs none"


def no_trees(s: Site) -> Sequence[Tensor | None]:
    raise Unsupported(STEPS)


for name in ("TreeEnsemble", "TreeEnsembleClassifier", "TreeEnsembleRegressor"):
    add(Composite(op=name, domain=DOMAIN, decompose=no_trees, refused=STEPS))
for name in ("Binarizer", "CategoryMapper", "LabelEncoder", "OneHotEncoder", "ZipMap"):
    add(Barrier(op=name, domain=DOMAIN))
