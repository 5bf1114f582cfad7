"""The numbers of an evaluation as tables: by question, answer and campaign. No network, no files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from galembed.questions import QuestionTree, packaged_trees, question_tree
from training.scores.metrics import (
    LEAST_VOTES,
    Agreement,
    Reliability,
    Volunteers,
    agreement,
    constant_concentrations,
    count_cdf,
    coverage,
    enough_votes,
    fraction_errors,
    mean_fractions,
    pit_mass,
    predicted_fractions,
    reliability,
    value_errors,
    volunteers,
    vote_nll,
)


def _field(name: str, dtype: pa.DataType, doc: str, unit: str = "") -> pa.Field:
    return pa.field(name, dtype, metadata={"doc": doc} | ({"unit": unit} if unit else {}))


_CAMPAIGN = _field("campaign", pa.string(), "question tree that the question is of")
_QUESTION = _field("question", pa.string(), "name in the backbone's tree")
_COMPARED = _field("compared", pa.int64(), "galaxies with enough votes on the question; what follows is over these")


def _float(name: str, doc: str, unit: str = "") -> pa.Field:
    return _field(name, pa.float64(), f"{doc}; NaN where there is nothing to measure it on", unit)


def _coverages(*, errors: bool = False) -> list[pa.Field]:
    fields = []
    for level in (50, 90):
        name = f"coverage_{level}"
        fields.append(_float(name, f"how often counts lie in the predicted central {level}% interval"))
        if errors:
            fields.append(_float(f"{name}_error", "its standard error over galaxies"))
    return fields


QUESTIONS: Final = pa.schema(
    [
        _CAMPAIGN,
        _QUESTION,
        _field("galaxies", pa.int64(), "galaxies with votes on the question"),
        _float("nll", "mean negative log-likelihood of their votes", "nat"),
        _float("nll_constant", "the same of the one best Dirichlet distribution for all, in hindsight", "nat"),
        _COMPARED,
        _float("rmse", "root of the mean squared error of vote fractions, over galaxies and answers"),
        _float("rmse_constant", "the same of their mean fractions"),
        _float("rmse_noise", "the same of the counted fractions themselves, from the number of votes they rest on"),
        _float("mae", "mean absolute error of vote fractions"),
        _float("error", "rmse without that noise: from what all volunteers there are would answer; 0 if below"),
        _float("squared_error", "its square, which as an estimate without bias may be below 0"),
        _float("error_low", "lower end of its 95% interval, over 10 galaxies or more"),
        _float("error_high", "upper end"),
        _float("error_constant", "the same error of the mean fractions"),
        _float("error_one", "expected error, so defined, of one volunteer; of k volunteers 1/sqrt(k) of it"),
        _float("volunteers", "number of volunteers with the backbone's error; infinite if none is seen"),
        _float("volunteers_low", "lower end of its 95% interval"),
        _float("volunteers_high", "upper end"),
        _float("volunteers_constant", "number of volunteers with the error of the mean fractions"),
        *_coverages(errors=True),
        _field("agreed", pa.int64(), "galaxies on which volunteers agree; what follows is over these"),
        _float("accuracy", "share whose likeliest answer is the volunteers'"),
        _float("accuracy_low", "lower end of its 95% interval"),
        _float("accuracy_high", "upper end"),
        _float("balanced_accuracy", "mean recall over the answers"),
        _float("accuracy_constant", "accuracy of always giving the commonest answer"),
    ]
)
"""One row for each question of votes."""

ANSWERS: Final = pa.schema(
    [
        _CAMPAIGN,
        _QUESTION,
        _field("answer", pa.string(), "name in the tree"),
        _COMPARED,
        _float("counted", "mean fraction of the votes"),
        _float("bias", "mean of predicted minus counted fraction"),
        _float("mse", "mean squared error of the fraction"),
        _float("rmse", "its root"),
        _float("mae", "mean absolute error of the fraction"),
        _float("rmse_constant", "rmse of the mean fraction"),
        *_coverages(),
    ]
)
"""One row for each answer."""

VALUES: Final = pa.schema(
    [
        _CAMPAIGN,
        _QUESTION,
        _field("unit", pa.string(), "of the columns rmse, mae, bias and rmse_constant"),
        _field("galaxies", pa.int64(), "galaxies with a number"),
        _float("rmse", "root of the mean squared error"),
        _float("mae", "mean absolute error"),
        _float("bias", "mean of predicted minus given"),
        _float("rmse_constant", "rmse of the mean: the standard deviation of the given numbers"),
        _float("r2", "share of the variance that is explained"),
    ]
)
"""One row for each question that asks for a number."""

CAMPAIGNS: Final = pa.schema(
    [
        _CAMPAIGN,
        _field("galaxies", pa.int64(), "galaxies with votes on any of its questions"),
        _field("questions", pa.int64(), "questions with something to compare; means are over these"),
        _field("answers", pa.int64(), "their answers"),
        _float("nll", "negative log-likelihood of a galaxy's votes, summed over questions, mean over galaxies", "nat"),
        _float("nll_constant", "the same of the best constant answers", "nat"),
        _float("mse", "mean over answers of the mean squared error of vote fractions"),
        _float("rmse", "mean over answers of the root mean squared error"),
        _float("mae", "mean over answers of the mean absolute error"),
        _float("rmse_constant", "mean over answers of the rmse of the mean fraction"),
        _float("volunteers", "number of volunteers with the backbone's squared error, averaged over questions"),
        _float("coverage_50", "mean over questions"),
        _float("coverage_90", "mean over questions"),
        _float("accuracy", "mean over questions"),
        _float("balanced_accuracy", "mean over questions"),
    ]
)
"""One row for each campaign, and one for all together if there are several."""

RELIABILITY: Final = pa.schema(
    [
        _CAMPAIGN,
        _QUESTION,
        _float("low", "lower edge of the bin of predicted fractions"),
        _float("high", "upper edge"),
        _field("count", pa.int64(), "galaxies times answers"),
        _float("predicted", "mean predicted fraction"),
        _float("counted", "mean counted fraction"),
        _float("error", "standard error of their difference"),
    ]
)
"""One row for each question and bin."""

PIT: Final = pa.schema(
    [
        _CAMPAIGN,
        _QUESTION,
        _float("low", "lower edge of the bin"),
        _float("high", "upper edge"),
        _COMPARED,
        _float("error", "standard error of the share over galaxies"),
        _float("share", "of the counts' places in their predicted distributions, mean over answers"),
    ]
)
"""One row for each question and bin: the probability integral transform of the counts."""


def score(
    tree: QuestionTree, targets: NDArray[Any], predictions: NDArray[Any], *, least: int = LEAST_VOTES
) -> dict[str, pa.Table]:
    """Score predictions, question by question.

    Parameters
    ----------
    tree : QuestionTree
    targets : ndarray, shape (galaxy, answer)
        Votes, 0 = not asked; numbers in the columns of values, NaN = no label.
    predictions : ndarray, shape (galaxy, answer)
        Dirichlet concentrations, and numbers in the columns of values: see `GalaxyNetwork.concentrations`.
    least : int
        Votes that a galaxy needs on a question where fractions are compared.

    Returns
    -------
    dict of str to pa.Table
        `QUESTIONS`, `ANSWERS`, `VALUES`, `CAMPAIGNS`, `RELIABILITY` and `PIT` by their names in lower case. A question
        without votes has a row in the first alone.
    """
    rows: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("questions", "answers", "values", "reliability", "pit")
    }
    campaigns = dict(zip(tree.slices, campaigns_of(tree), strict=True))
    for question in tree.questions:
        where, key = tree.slices[question.name], {"campaign": campaigns[question.name], "question": question.name}
        known, guess = np.asarray(targets[:, where], np.float64), np.asarray(predictions[:, where], np.float64)
        if question.kind == "value":
            rows["values"].append(key | {"unit": question.unit} | vars(value_errors(guess[:, 0], known[:, 0])))
            continue
        asked = known.sum(axis=1) > 0
        if not asked.any():
            rows["questions"].append(key | _unasked())
            continue
        for name, found in _question_rows(question.answers, known[asked], guess[asked], least).items():
            rows[name] += [key | row for row in found]
    schemas = {"questions": QUESTIONS, "answers": ANSWERS, "values": VALUES, "reliability": RELIABILITY, "pit": PIT}
    tables = {name: pa.Table.from_pylist(rows[name], schema) for name, schema in schemas.items()}
    summary = _campaign_rows(tree, campaigns, np.asarray(targets), rows)
    return tables | {"campaigns": pa.Table.from_pylist(summary, CAMPAIGNS)}


def campaigns_of(tree: QuestionTree) -> list[str]:
    """Return the campaign of each question: the tree's name, or, in a tree of several, the one whose question it is.

    Questions of a campaign that is not packaged are told apart by what follows the last ``-`` of their names.
    """
    if not tree.campaigns:
        return [tree.name] * len(tree.questions)
    owners = {
        f"{question.name}{campaign.suffix}": campaign.name
        for campaign in map(question_tree, sorted(set(tree.campaigns) & set(packaged_trees())))
        for question in campaign.questions
    }
    return [owners.get(question.name, question.name.rpartition("-")[2]) for question in tree.questions]


def _unasked() -> dict[str, Any]:
    counts = dict.fromkeys(("galaxies", "compared", "agreed"), 0)
    return dict.fromkeys(QUESTIONS.names[2:], math.nan) | counts


def _question_rows(
    names: Sequence[str], votes: NDArray[np.float64], concentrations: NDArray[np.float64], least: int
) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of one question, of galaxies that were asked it, for each table."""
    fractions, constant = predicted_fractions(concentrations), mean_fractions(votes, least)
    errors, flat = fraction_errors(fractions, votes, least), fraction_errors(constant, votes, least)
    enough = enough_votes(votes, least)
    below, upto = count_cdf(votes[enough], concentrations[enough])
    covered = {f"coverage_{level}": coverage(below, upto, level / 100) for level in (50, 90)}
    question = {
        "galaxies": len(votes),
        "nll": vote_nll(votes, concentrations).mean(),
        "nll_constant": vote_nll(votes, constant_concentrations(votes)).mean(),
        "compared": errors.galaxies,
        "rmse": np.sqrt(errors.mse.mean()),
        "rmse_constant": np.sqrt(flat.mse.mean()),
        "mae": errors.mae.mean(),
        **_worth(volunteers(fractions, votes, least), volunteers(constant, votes, least)),
        **_agreed(agreement(fractions, votes, least)),
    }
    for name, shares in covered.items():
        question[name], question[f"{name}_error"] = _mean_and_error(shares)
    answers = [
        {
            "answer": name,
            "compared": errors.galaxies,
            "counted": constant[i],
            "bias": errors.bias[i],
            "mse": errors.mse[i],
            "rmse": np.sqrt(errors.mse[i]),
            "mae": errors.mae[i],
            "rmse_constant": np.sqrt(flat.mse[i]),
            **{key: _mean_and_error(shares[:, [i]])[0] for key, shares in covered.items()},
        }
        for i, name in enumerate(names)
    ]
    found = {"questions": [question], "answers": answers}
    if not errors.galaxies:
        return found
    reliable = reliability(fractions, votes, least)
    return found | {"reliability": _reliability_rows(reliable), "pit": _pit_rows(below, upto, reliable.edges)}


def _worth(own: Volunteers, constant: Volunteers) -> dict[str, float]:
    number, low, high = own.as_good_as
    return {
        "rmse_noise": math.sqrt(own.noise),
        "error": _root(own.mse),
        "squared_error": own.mse,
        "error_low": _root(own.low),
        "error_high": _root(own.high),
        "error_constant": _root(constant.mse),
        "error_one": own.error_of(1),
        "volunteers": number,
        "volunteers_low": low,
        "volunteers_high": high,
        "volunteers_constant": constant.as_good_as[0],
    }


def _root(value: float) -> float:
    """Return the square root, 0 of what is below 0; NaN stays."""
    return math.nan if math.isnan(value) else math.sqrt(max(value, 0.0))


def _agreed(found: Agreement) -> dict[str, float]:
    return {
        "agreed": found.galaxies,
        "accuracy": found.accuracy,
        "accuracy_low": found.low,
        "accuracy_high": found.high,
        "balanced_accuracy": found.balanced,
        "accuracy_constant": found.commonest,
    }


def _reliability_rows(found: Reliability) -> list[dict[str, Any]]:
    return [
        {
            "low": found.edges[i],
            "high": found.edges[i + 1],
            "count": int(found.count[i]),
            "predicted": found.predicted[i],
            "counted": found.observed[i],
            "error": found.error[i],
        }
        for i in range(len(found.count))
    ]


def _pit_rows(
    below: NDArray[np.float64], upto: NDArray[np.float64], edges: NDArray[np.float64]
) -> list[dict[str, Any]]:
    rows = []
    for low, high in pairwise(edges.tolist()):
        share, error = _mean_and_error(pit_mass(below, upto, low, high))
        rows.append({"low": low, "high": high, "compared": len(below), "share": share, "error": error})
    return rows


def _mean_and_error(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the mean of (galaxy, answer), and its standard error over galaxies, whose answers are not independent."""
    each = values.mean(axis=1)
    if len(each) < 2:
        return (float(each.mean()) if len(each) else math.nan), math.nan
    return float(each.mean()), float(each.std(ddof=1) / math.sqrt(len(each)))


def _campaign_rows(
    tree: QuestionTree,
    campaigns: Mapping[str, str],
    targets: NDArray[Any],
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
) -> list[dict[str, Any]]:
    """Return a row for each campaign with votes, then one for all of them if there are several."""
    voted = {question.name for question in tree.questions if question.kind == "votes"}
    names = list(dict.fromkeys(row["campaign"] for row in rows["questions"] if row["galaxies"]))
    groups = {name: {q for q in voted if campaigns[q] == name} for name in names}
    if len(names) > 1:
        groups["all"] = voted
    summary = []
    for name, members in groups.items():
        columns = np.concatenate([np.arange(len(tree.columns))[tree.slices[q]] for q in members])
        galaxies = int((targets[:, columns] > 0).any(axis=1).sum())
        asked = [row for row in rows["questions"] if row["question"] in members and row["galaxies"]]
        compared = [row for row in asked if row["compared"]]
        answers = [row for row in rows["answers"] if row["question"] in members and row["compared"]]
        missed = _mean(row["squared_error"] for row in compared)  # not cut off at 0, which would be biased
        summary.append(
            {
                "campaign": name,
                "galaxies": galaxies,
                "questions": len(compared),
                "answers": len(answers),
                "nll": sum(row["nll"] * row["galaxies"] for row in asked) / galaxies,
                "nll_constant": sum(row["nll_constant"] * row["galaxies"] for row in asked) / galaxies,
                **{key: _mean(row[key] for row in answers) for key in ("mse", "rmse", "mae", "rmse_constant")},
                "volunteers": _mean(row["error_one"] ** 2 for row in compared) / missed
                if missed > 0 or math.isnan(missed)
                else math.inf,
                **{
                    key: _mean(row[key] for row in compared)
                    for key in ("coverage_50", "coverage_90", "accuracy", "balanced_accuracy")
                },
            }
        )
    return summary


def _mean(values: Iterable[float]) -> float:
    """Return the mean of the values that are not NaN; NaN if there is none."""
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan
