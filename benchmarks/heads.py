"""Two heads for vote counts on the same features: ours, and that of "Scaling Laws for Galaxy Images" (Zoobot).

    python benchmarks/heads.py --survey SURVEY --data ../shared/data --out docs/heads.md

SURVEY is what `galembed simulate SURVEY --bricks 0 --cutouts 3000 --seed 7` wrote. Both heads are linear maps of the
same frozen, standardised features, fitted by Adam and L-BFGS to the same Dirichlet-multinomial likelihood; the strength
of the weight decay is chosen on the validation part, for each head its own. A seed draws the parts (60%, 20%, 20%) and
the first weights, and in a synthetic set everything.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from galembed.backbones import Backbone, load_backbone
from galembed.errors import GalembedError
from galembed.network import GalaxyNetwork
from galembed.questions import question_tree
from galembed.runtimes.torch import load_network
from galembed.sources import open_source
from training.data.images import VotedImages, open_voted_images
from training.data.votes import read_vote_table
from training.loss import dirichlet_multinomial_nll
from training.scores.metrics import count_cdf, coverage, fraction_rmse

DECAY = (1.0, 1e-1, 1e-2, 1e-3)
ADAM_STEPS = 60
PRECISIONS = (0.3, 3.0, 30.0, 300.0, 3000.0)


class PaperHead(nn.Module):
    """Concentrations 1 + 100 sigmoid(z) of one linear layer."""

    def __init__(self, dim: int, answers: tuple[int, ...]) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, sum(answers))
        nn.init.constant_(self.linear.bias, -3.0)  # a = 6: at 0 it would begin at 51, far too sure

    def forward(self, features: Tensor) -> Tensor:
        return 1 + 100 * torch.sigmoid(self.linear(features))


class OurHead(nn.Module):
    """The head of `GalaxyNetwork`."""

    def __init__(self, dim: int, answers: tuple[int, ...]) -> None:
        super().__init__()
        backbone = load_backbone()
        self.network = GalaxyNetwork(
            "test_convnext",
            {},
            mapping=backbone.contract.mapping,
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
            answers=answers,
        )
        self.network.encoder = nn.Identity()
        self.network.head = nn.Linear(dim, sum(answers))
        self.network.precision = nn.Linear(dim, len(answers))

    def forward(self, features: Tensor) -> Tensor:
        return self.network.concentrations(features)


HEADS: dict[str, Callable[[int, tuple[int, ...]], nn.Module]] = {"ours": OurHead, "paper": PaperHead}


@dataclass(frozen=True)
class Votes:
    """Features (n, dim), counts (n, answer), and the concentrations that made them where they are known."""

    features: Tensor
    counts: Tensor
    answers: tuple[int, ...]
    truth: Tensor | None = None


@dataclass(frozen=True)
class Score:
    """Of a held-out part: nats per galaxy, over questions; RMSE of fractions; share inside 50% and 90% intervals."""

    nll: float
    rmse: float
    half: float
    nine_tenths: float


def score(concentrations: Tensor, votes: Votes) -> Score:
    rmses, halves, wides = [], [], []
    nll = dirichlet_multinomial_nll(votes.counts.double(), concentrations.double(), votes.answers).sum(dim=1).mean()
    edges = np.cumsum([0, *votes.answers])
    for start, end in itertools.pairwise(edges):
        k, a = votes.counts[:, start:end].numpy(), concentrations[:, start:end].double().numpy()
        rmses.append(fraction_rmse(a / a.sum(axis=1, keepdims=True), k))
        asked = np.rint(k.sum(axis=1)) > 0
        cdf = count_cdf(k[asked], a[asked])
        halves.append(coverage(*cdf, 0.5).mean())
        wides.append(coverage(*cdf, 0.9).mean())
    return Score(float(nll), float(np.nanmean(rmses)), float(np.mean(halves)), float(np.mean(wides)))


def fitted(head: str, train: Votes, validation: Votes, seed: int) -> nn.Module:
    """Return the head with the weight decay that does best on the validation part.

    Each is fitted anew, twice: by L-BFGS at once, and after some steps of Adam. L-BFGS alone can throw a sigmoid to its
    flat end at the first step, where it stays. What fits the training part better is kept.
    """
    best: tuple[float, nn.Module | None] = (np.inf, None)
    for decay in DECAY:
        fits = []
        for adam_steps in (0, ADAM_STEPS):
            torch.manual_seed(seed)
            model = HEADS[head](train.features.shape[1], train.answers)
            fits.append((fit(model, train, decay, adam_steps), model))
        _, model = min(fits, key=lambda found: found[0])
        with torch.no_grad():
            found = score(model(validation.features), validation).nll
        if found < best[0]:
            best = (found, model)
    if best[1] is None:
        raise ArithmeticError(f"no fit of the {head} head is finite")
    return best[1]


def fit(model: nn.Module, train: Votes, decay: float, adam_steps: int) -> float:
    """Fit a head and return what it then loses on the training part, decay included."""
    weights = [p for p in model.parameters() if p.ndim > 1]

    def loss() -> Tensor:
        nll = dirichlet_multinomial_nll(train.counts, model(train.features), train.answers).sum(dim=1).mean()
        return nll + decay * sum(weight.square().sum() for weight in weights)

    adam = torch.optim.Adam(model.parameters(), lr=0.1)
    slower = torch.optim.lr_scheduler.CosineAnnealingLR(adam, ADAM_STEPS)
    for _ in range(adam_steps):
        adam.zero_grad()
        loss().backward()
        adam.step()
        slower.step()
    lbfgs = torch.optim.LBFGS(model.parameters(), max_iter=150, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        lbfgs.zero_grad()
        found = loss()
        found.backward()
        return found

    lbfgs.step(closure)
    with torch.no_grad():
        return float(loss())


def parts(votes: Votes, seed: int) -> tuple[Votes, Votes, Votes]:
    """Return the parts of 60%, 20% and 20%, features standardised by the first."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(votes.features)))
    ends = [0, int(0.6 * len(order)), int(0.8 * len(order)), len(order)]
    mean, std = (f(votes.features[order[: ends[1]]], dim=0) for f in (torch.mean, torch.std))
    found = []
    for start, end in itertools.pairwise(ends):
        rows = order[start:end]
        truth = None if votes.truth is None else votes.truth[rows]
        features = (votes.features[rows] - mean) / (std + 1e-6)
        found.append(Votes(features, votes.counts[rows], votes.answers, truth))
    return found[0], found[1], found[2]


def compare(make: Callable[[int], Votes], seeds: Iterable[int]) -> dict[str, list[Score]]:
    """Return scores on the last part, seed by seed; `truth` where it is known."""
    scores: dict[str, list[Score]] = {}
    for seed in seeds:
        train, validation, test = parts(make(seed), seed)
        for head in HEADS:
            model = fitted(head, train, validation, seed)
            with torch.no_grad():
                predicted = model(test.features)
            scores.setdefault(head, []).append(score(predicted, test))
        if test.truth is not None:
            scores.setdefault("truth", []).append(score(test.truth, test))
    return scores


def synthetic(precision: float | None, seed: int, n: int = 3000, dim: int = 16, volunteers: int = 40) -> Votes:
    """Draw votes whose log fractions (down to about 0.001) are linear in the features.

    A `precision` of None draws from the paper's own head instead, with linear logits of its concentrations.
    """
    rng = np.random.default_rng([seed, 17])
    answers = (3, 2, 6)
    features = rng.normal(size=(n, dim))
    columns = []
    for count in answers:
        z = features @ rng.normal(0, 2 / np.sqrt(dim), (dim, count))
        if precision is None:
            columns.append(1 + 100 / (1 + np.exp(-z)))
        else:
            fractions = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
            columns.append(precision * (0.001 + (1 - 0.001 * count) * fractions))
    counts = [
        np.stack([rng.multinomial(volunteers, rng_dirichlet(rng, row)) for row in concentrations])
        for concentrations in columns
    ]
    as_tensor = [torch.tensor(np.concatenate(arrays, axis=1), dtype=torch.float32) for arrays in (columns, counts)]
    return Votes(torch.tensor(features, dtype=torch.float32), as_tensor[1], answers, as_tensor[0])


def rng_dirichlet(rng: np.random.Generator, concentrations: np.ndarray) -> np.ndarray:
    """Draw from a Dirichlet distribution, also where all gammas would underflow to 0."""
    logs = np.log(rng.gamma(concentrations + 1)) + np.log(rng.random(len(concentrations))) / concentrations
    shares = np.exp(logs - logs.max())
    return np.asarray(shares / shares.sum())


def embedded(images: VotedImages, backbone: Backbone, answers: tuple[int, ...]) -> Votes:
    """Return the backbone's features of all readable images, in their own votes' order."""
    network = load_network(backbone).eval()
    pixels, rows = [], []
    for number, cutout in enumerate(found for _, found in images.reader.cutouts(images.rows, backbone.contract)):
        if not isinstance(cutout, GalembedError):
            pixels.append(torch.from_numpy(cutout.pixels))
            rows.append(number)
    features = []
    with torch.inference_mode():
        for start in range(0, len(pixels), 128):
            batch = torch.stack(pixels[start : start + 128])
            features.append(network.features(network.channels(batch, images.reader.kind)))
    return Votes(torch.cat(features).clone(), torch.from_numpy(images.targets[rows]), answers)


def simulated_votes(survey: Path, backbone: Backbone) -> Votes:
    tree = question_tree("decals_dr5")
    return embedded(open_voted_images(survey, tree), backbone, tuple(len(q.answers) for q in tree.questions))


def real_votes(data: Path, backbone: Backbone) -> Votes:
    """Return 700 SDSS galaxies with the votes of Galaxy Zoo 2; counts from fractions, so not whole."""
    tree = question_tree("gz2")
    table = read_vote_table(data / "votes" / "gz2_votes_1000_open.parquet", tree)
    with tempfile.TemporaryDirectory() as folder:
        pictures = pq.read_table(data / "images" / "gz2_votes_1000" / "gz2_votes_1000_open.parquet")
        for name, jpeg in zip(pictures["dr7objid"].to_pylist(), pictures["jpeg"].to_pylist(), strict=True):
            (Path(folder) / f"{name}.jpg").write_bytes(jpeg)
        reader = open_source(folder, crop=0.5)
        rows = reader.sources().table
        place = {name: number for number, name in enumerate(table.ids)}
        targets = table.votes[[place[Path(name).stem] for name in rows["source_id"].to_pylist()]]
        return embedded(VotedImages(reader, rows, targets), backbone, tuple(len(q.answers) for q in tree.questions))


def row(name: str, scores: dict[str, list[Score]]) -> str:
    """Return a table row: mean and standard deviation over seeds, and the mean paired difference."""

    def cell(head: str, field: str, digits: int) -> str:
        values = np.array([getattr(one, field) for one in scores[head]])
        return f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}"

    paired = np.array([a.nll - b.nll for a, b in zip(scores["ours"], scores["paper"], strict=True)])
    cells = [
        name,
        *(cell(head, "nll", 3) if head in scores else "" for head in ("ours", "paper", "truth")),
        f"{paired.mean():+.3f} ± {paired.std(ddof=1) / np.sqrt(len(paired)):.3f}",
        *(cell(head, "rmse", 4) for head in HEADS),
        *(f"{cell(head, 'half', 2)}, {cell(head, 'nine_tenths', 2)}" for head in HEADS),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--survey", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="the table in this Markdown file is replaced; printed as well")
    options = parser.parse_args()
    backbone = load_backbone()
    simulated, real = simulated_votes(options.survey, backbone), real_votes(options.data, backbone)
    sets: list[tuple[str, Callable[[int], Votes]]] = [
        (f"simulated survey ({len(simulated.features)})", lambda _: simulated),
        (f"Galaxy Zoo 2 ({len(real.features)})", lambda _: real),
        *((f"precision {p:g}", lambda seed, p=p: synthetic(p, seed)) for p in PRECISIONS),
        ("the paper's head", lambda seed: synthetic(None, seed)),
    ]
    rows = [
        "| votes (galaxies) | NLL, ours | NLL, paper | NLL, truth | ours - paper | RMSE, ours | RMSE, paper "
        "| in 50%, 90% interval, ours | the same, paper |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, make in sets:
        rows.append(row(name, compare(make, range(options.seeds))))
        print(rows[-1], file=sys.stderr, flush=True)
    table = "\n".join(rows)
    print(table)
    if options.out:
        before, _, rest = options.out.read_text(encoding="utf-8").partition("| votes (galaxies)")
        after = rest[rest.rindex("|\n") + 2 :] if rest else ""
        options.out.write_text(f"{before}{table}\n{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
