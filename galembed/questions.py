"""Question trees: what a backbone's head answers.

Galaxy Zoo's trees say what volunteers are asked, in which order, and which vote columns hold the answers. A question
may also ask for a number instead of a choice.
"""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import yaml
from numpy.typing import ArrayLike, NDArray

from galembed.errors import ArtifactNotFound, SchemaMismatch, UnreadableInput

WIDTH: Final = 100
"""Columns of text."""

_PACKAGED: Final = Path(__file__).parent / "question_trees"
_COLUMN: Final = re.compile(r"[A-Za-z0-9_-]+")
_KEYS: Final = {"name", "suffix", "questions", "campaigns"}
_QUESTION_KEYS: Final = {"answers", "after", "kind", "unit"}


@dataclass(frozen=True)
class Question:
    """One question, with its answers in the campaign's own order.

    Attributes
    ----------
    name : str
        Without the campaign's suffix, e.g. ``bar``; in a tree of several campaigns with it, e.g. ``bar-dr5``.
    answers : tuple of str
    after : tuple of str
        ``question_answer`` of every answer that leads here; empty where the question is always asked.
    kind : str
        ``votes``: which of the answers, as the fraction of the votes that each gets; with one vote per galaxy, the
        probability of each class. ``value``: a number, the question's only answer.
    unit : str
        Of a ``value``; empty where it has none.
    """

    name: str
    answers: tuple[str, ...]
    after: tuple[str, ...] = ()
    kind: str = "votes"
    unit: str = ""


@dataclass(frozen=True)
class QuestionTree:
    """The questions of one campaign, or of several, parents before children.

    Vote columns follow Galaxy Zoo's convention, ``{question}{suffix}_{answer}``: ``bar-dr5_strong``.

    Attributes
    ----------
    name : str
    suffix : str
        Empty in a tree of several campaigns, where each question's name ends in its campaign's.
    questions : tuple of Question
    campaigns : tuple of str
        Names of the trees that were combined; empty in a tree of one campaign.

    Raises
    ------
    SchemaMismatch
        If there is no question, one of votes has fewer than two answers, one of a value has not exactly one, one is
        asked after an answer that no earlier question of votes has, or two have a column in common, or names would
        make columns that are not letters, digits, ``-`` and ``_``.
    """

    name: str
    suffix: str
    questions: tuple[Question, ...]
    campaigns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.questions:
            raise SchemaMismatch(f"question tree {self.name} has no questions")
        known: set[str] = set()
        for question in self.questions:
            unknown = [parent for parent in question.after if parent not in known]
            if unknown:
                raise SchemaMismatch(
                    f"question tree {self.name}: {question.name} is asked after {unknown}, "
                    "which no earlier question has as an answer"
                )
            _check_kind(self.name, question)
            if question.kind == "votes":
                known |= {f"{question.name}_{answer}" for answer in question.answers}
        bad = [column for column in self.columns if not _COLUMN.fullmatch(column)]
        if bad:
            raise SchemaMismatch(
                f"question tree {self.name}: {bad[0]!r} cannot be a column; write it in letters, digits, - and _"
            )
        names = [question.name for question in self.questions]
        twice = sorted({text for texts in (names, self.columns) for text in texts if texts.count(text) > 1})
        if twice:
            raise SchemaMismatch(
                f"question tree {self.name}: {', '.join(twice[:3])} occurs more than once; "
                "rename it, or give each campaign its own suffix"
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """Vote columns of all answers, question by question."""
        return tuple(f"{q.name}{self.suffix}_{answer}" for q in self.questions for answer in q.answers)

    @property
    def kinds(self) -> tuple[str, ...]:
        """``votes`` or ``value``, question by question."""
        return tuple(question.kind for question in self.questions)

    @property
    def values(self) -> dict[str, str]:
        """Columns that hold a number instead of a fraction, with its unit."""
        return {f"{q.name}{self.suffix}_{q.answers[0]}": q.unit for q in self.questions if q.kind == "value"}

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
            Fraction of each question's votes that an answer gets, in the order of `columns`; the columns of values
            are not looked at.

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
            q.name: {"answers": list(q.answers)}
            | ({"after": list(q.after)} if q.after else {})
            | ({"kind": q.kind, "unit": q.unit} if q.kind != "votes" else {})
            for q in self.questions
        }
        campaigns = {"campaigns": list(self.campaigns)} if self.campaigns else {}
        return {"name": self.name, "suffix": self.suffix, "questions": questions} | campaigns

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuestionTree:
        """Read the form that `to_dict` writes and that the packaged YAML files have.

        Raises
        ------
        SchemaMismatch
            If a key is absent or unknown, a list is none, an answer is neither text nor an integer, or what is
            described is no `QuestionTree`.
        """
        try:
            found = {"name": str(data["name"]), "suffix": str(data["suffix"]), "questions": data["questions"].items()}
            unknown = sorted(set(data) - _KEYS)
        except (KeyError, TypeError, AttributeError) as error:
            raise SchemaMismatch(
                "a question tree needs name, suffix and questions, each question with answers; "
                f"reading one failed at {error}"
            ) from error
        if unknown:
            raise SchemaMismatch(f"a question tree has {', '.join(sorted(_KEYS))}; got {', '.join(map(str, unknown))}")
        questions = tuple(_question(str(name), entry) for name, entry in found["questions"])
        return cls(found["name"], found["suffix"], questions, tuple(map(str, data.get("campaigns", ()))))


def _check_kind(tree: str, question: Question) -> None:
    where, count = f"question tree {tree}: {question.name}", len(question.answers)
    if question.kind not in ("votes", "value"):
        raise SchemaMismatch(f"{where} is of kind {question.kind!r}; choose votes or value")
    if question.kind == "votes" and count < 2:
        raise SchemaMismatch(f"{where} needs two answers or more, got {question.answers}")
    if question.kind == "value" and count != 1:
        raise SchemaMismatch(f"{where} asks for a value, which is one answer, got {question.answers}")
    if question.kind == "votes" and question.unit:
        raise SchemaMismatch(f"{where} counts votes, which have no unit, got {question.unit!r}")


def _question(name: str, entry: Any) -> Question:
    if not isinstance(entry, Mapping) or "answers" not in entry or set(entry) - _QUESTION_KEYS:
        raise SchemaMismatch(
            f"question {name} needs answers, and may have after, kind and unit, nothing else; got {entry!r}"
        )
    lists = {key: entry.get(key, []) for key in ("answers", "after")}
    for key, values in lists.items():
        if not isinstance(values, list | tuple):
            raise SchemaMismatch(f"question {name}: {key} must be a list, got {values!r}")
        for value in values:
            if not isinstance(value, str | int) or isinstance(value, bool):
                hint = '; YAML reads yes and no as that: write "yes" and "no"' if isinstance(value, bool) else ""
                raise SchemaMismatch(f"question {name}: {key} holds {value!r}, which is no text{hint}")
    answers, after = (tuple(map(str, lists[key])) for key in ("answers", "after"))
    return Question(name, answers, after, str(entry.get("kind", "votes")), str(entry.get("unit", "")))


def combined(name: str, trees: Sequence[QuestionTree]) -> QuestionTree:
    """Return one tree with the questions of several campaigns.

    A galaxy of one campaign has no votes on the questions of the others, which then teach nothing.

    Parameters
    ----------
    name : str
    trees : sequence of QuestionTree

    Returns
    -------
    QuestionTree
        Its columns are those of `trees`, one after the other.

    Raises
    ------
    SchemaMismatch
        If two of them have a column in common.
    """
    questions = []
    for tree in trees:
        spelt = {
            f"{q.name}_{answer}": f"{q.name}{tree.suffix}_{answer}" for q in tree.questions for answer in q.answers
        }
        for question in tree.questions:
            after = tuple(spelt[parent] for parent in question.after)
            questions.append(replace(question, name=f"{question.name}{tree.suffix}", after=after))
    return QuestionTree(name, "", tuple(questions), tuple(c for tree in trees for c in tree.campaigns or (tree.name,)))


def packaged_trees() -> tuple[str, ...]:
    """Return the names of the packaged question trees, in alphabetical order."""
    return tuple(sorted(file.stem for file in _PACKAGED.glob("*.yaml")))


def question_tree(name: str | Path = "decals_dr5") -> QuestionTree:
    """Return a packaged question tree, or one of the user's own.

    Parameters
    ----------
    name : str or Path
        One of `packaged_trees`, or the path of a YAML file of the same form: ``name``, ``suffix`` and ``questions``,
        or ``name`` and ``campaigns``, a list of packaged names and of such files beside it, to combine.

    Raises
    ------
    ArtifactNotFound
        If no tree of that name is packaged, and no such file is there.
    UnreadableInput
        If the file is not YAML, or describes a question twice.
    SchemaMismatch
        If what it describes is no question tree.
    """
    if str(name) in packaged_trees():
        return _read(_PACKAGED / f"{name}.yaml")
    if not Path(name).is_file():
        near = difflib.get_close_matches(str(name), packaged_trees(), n=2)
        meant = f" did you mean {' or '.join(near)}?" if near else ""
        raise ArtifactNotFound(
            f"no question tree is called {str(name)!r}, and no such file is there;{meant} "
            f"packaged are {', '.join(packaged_trees())}; or give a YAML file of the same form"
        )
    return _read(Path(name))


class _Loader(yaml.SafeLoader):
    """Refuses a key that occurs twice, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: list[Any] = []
        for key, _ in node.value:
            if key.value in keys:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} occurs twice", key.start_mark)
            keys.append(key.value)
        return super().construct_mapping(node, deep)


def _read(file: Path, *, combines: bool = True) -> QuestionTree:
    try:
        data = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UnreadableInput(f"{file} cannot be read as a question tree ({' '.join(str(error).split())})") from error
    try:
        if combines and isinstance(data, Mapping) and set(data) == {"name", "campaigns"}:
            return combined(str(data["name"]), [_campaign(str(entry), file) for entry in data["campaigns"]])
        return QuestionTree.from_dict(data)
    except SchemaMismatch as error:
        raise SchemaMismatch(f"{file}: {error}") from error


def _campaign(name: str, beside: Path) -> QuestionTree:
    own = beside.parent / name
    return _read(own, combines=False) if name not in packaged_trees() and own.is_file() else question_tree(name)


def trees_text() -> str:
    """Return the packaged question trees as text: name, numbers of questions and answers, suffix or campaigns."""
    rows = [f"{'name':<18}{'questions':>9}{'answers':>9}  suffix of the vote columns"]
    for tree in map(question_tree, packaged_trees()):
        what = " + ".join(tree.campaigns) if tree.campaigns else tree.suffix or "none"
        start = f"{tree.name:<18}{len(tree.questions):>9}{len(tree.columns):>9}  "
        rows.append(_filled(what, start, " " * len(start)))
    return "\n".join([*rows, "", "`galembed questions NAME` draws one; NAME may be the path of your own, as YAML."])


def tree_text(tree: QuestionTree) -> str:
    """Return a question tree as indented text.

    Questions end in a question mark. One that a single answer leads to stands below that answer; one that several lead
    to stands at the left, and each of them points to it by an arrow.
    """
    columns = f"{tree.columns[0]} ... {tree.columns[-1]}"
    head = [
        f"{tree.name}: {len(tree.questions)} questions, {len(tree.columns)} answers",
        _filled(columns, "vote columns ", " " * 13),
        *([_filled(", ".join(tree.campaigns), "campaigns ", " " * 10)] if tree.campaigns else []),
        "",
    ]
    at_the_left = (question for question in tree.questions if len(question.after) != 1)
    return "\n".join([*head, *(line for question in at_the_left for line in _drawn(tree, question, ""))])


def _drawn(tree: QuestionTree, question: Question, indent: str) -> Iterable[str]:
    if question.kind == "value":
        unit = f" [{question.unit}]" if question.unit else ""
        yield _filled(f"a number{unit}, {question.answers[0]}", f"{indent}{question.name}? ", f"{indent}    ")
        return
    leads = {answer: _led_to(tree, f"{question.name}_{answer}") for answer in question.answers}
    if any(leads.values()):
        yield f"{indent}{question.name}?"
    else:
        yield _filled(", ".join(question.answers), f"{indent}{question.name}? ", f"{indent}    ")
    if len(question.after) > 1:
        yield _filled(" or ".join(question.after), f"{indent}  after ", f"{indent}    ")
    if not any(leads.values()):
        return
    for answer, children in leads.items():
        shared = ", ".join(child.name for child in children if len(child.after) > 1)
        yield _filled(f"-> {shared}" if shared else "", f"{indent}  {answer} ", f"{indent}    ").rstrip()
        for child in children:
            if len(child.after) == 1:
                yield from _drawn(tree, child, f"{indent}    ")


def _led_to(tree: QuestionTree, answer: str) -> list[Question]:
    return [question for question in tree.questions if answer in question.after]


def _filled(text: str, first: str, rest: str) -> str:
    return (
        textwrap.fill(text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)
        if text
        else first
    )
