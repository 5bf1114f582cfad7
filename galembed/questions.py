"""Galaxy Zoo question trees: what volunteers are asked, in which order, and the vote columns that hold the answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import yaml
from numpy.typing import ArrayLike, NDArray

from galembed.errors import ArtifactNotFound, SchemaMismatch


@dataclass(frozen=True)
class Question:
    """One question, with its answers in the campaign's own order.

    Attributes
    ----------
    name : str
        Without the campaign's suffix, e.g. ``bar``.
    answers : tuple of str
    after : tuple of str
        ``question_answer`` of every answer that leads here; empty where the question is always asked.
    """

    name: str
    answers: tuple[str, ...]
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class QuestionTree:
    """The questions of one campaign, parents before children.

    Vote columns follow Galaxy Zoo's convention, ``{question}{suffix}_{answer}``: ``bar-dr5_strong``.

    Raises
    ------
    SchemaMismatch
        If a question is asked after an answer that no earlier question has.
    """

    name: str
    suffix: str
    questions: tuple[Question, ...]

    def __post_init__(self) -> None:
        known: set[str] = set()
        for question in self.questions:
            unknown = [parent for parent in question.after if parent not in known]
            if unknown:
                raise SchemaMismatch(
                    f"question tree {self.name}: {question.name} is asked after {unknown}, "
                    "which no earlier question has as an answer"
                )
            known |= {f"{question.name}_{answer}" for answer in question.answers}

    @property
    def columns(self) -> tuple[str, ...]:
        """Vote columns of all answers, question by question."""
        return tuple(f"{q.name}{self.suffix}_{answer}" for q in self.questions for answer in q.answers)

    @property
    def slices(self) -> dict[str, slice]:
        """Where each question's answers lie along the answer axis."""
        ends = np.cumsum([len(q.answers) for q in self.questions])
        return {q.name: slice(int(end) - len(q.answers), int(end)) for q, end in zip(self.questions, ends, strict=True)}

    def probability_asked(self, fractions: ArrayLike) -> NDArray[np.float64]:
        """Return the probability that a volunteer is asked each question.

        Parameters
        ----------
        fractions : array_like, shape (..., answer)
            Fraction of each question's votes that an answer gets, in the order of `columns`.

        Returns
        -------
        ndarray, shape (..., question), float64
            Sum over a question's parent answers of P(parent's question asked) x fraction; 1 at the root. NaN passes
            through to all questions below.
        """
        fractions = np.asarray(fractions, dtype=np.float64)
        reached: dict[str, NDArray[np.float64]] = {}
        asked = []
        for question, where in zip(self.questions, self.slices.values(), strict=True):
            if question.after:
                probability = np.sum([reached[parent] for parent in question.after], axis=0)
            else:
                probability = np.ones(fractions.shape[:-1])
            asked.append(probability)
            for i, answer in enumerate(question.answers):
                reached[f"{question.name}_{answer}"] = probability * fractions[..., where.start + i]
        return np.stack(asked, axis=-1)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form that `from_dict` reads back."""
        questions = {
            q.name: {"answers": list(q.answers)} | ({"after": list(q.after)} if q.after else {}) for q in self.questions
        }
        return {"name": self.name, "suffix": self.suffix, "questions": questions}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuestionTree:
        """Read the form that `to_dict` writes and that the packaged YAML files have.

        Raises
        ------
        SchemaMismatch
            If a key is absent or an answer list is empty.
        """
        try:
            questions = tuple(
                Question(name, tuple(map(str, entry["answers"])), tuple(entry.get("after", ())))
                for name, entry in data["questions"].items()
            )
            tree = cls(str(data["name"]), str(data["suffix"]), questions)
        except (KeyError, TypeError, AttributeError) as error:
            raise SchemaMismatch(
                "a question tree needs name, suffix and questions, each question with answers; "
                f"reading one failed at {error}"
            ) from error
        return tree


def question_tree(name: str = "decals_dr5") -> QuestionTree:
    """Return a packaged question tree.

    Raises
    ------
    ArtifactNotFound
        If no tree of that name is packaged.
    """
    folder = resources.files("galembed") / "question_trees"
    known = sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    if name not in known:
        raise ArtifactNotFound(f"no question tree is called {name!r}; packaged are {known}")
    return QuestionTree.from_dict(yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8")))
