"""Tasks of ours over packaged texts and templates: no network.

`local_KIND_DOMAIN` is answered by likelihood, `local_KIND_DOMAIN_gen` as generation: the model
writes greedily and its answer is extracted. The questions of both are the same. Texts are held-out
documents only, which no tuning on the same packaged texts has seen.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

from hyperfitting.data.splits import shuffled

VERSION = 1
"""Of the questions and prompts; raising it makes new artifacts."""
PREFIX = "local_"
_GENERATION = "_gen"
DOMAINS = ("news", "wikipedia", "shakespeare")
MAX_QUESTIONS = 200
_MIN_WORDS, _MAX_WORDS = 30, 80
"""Of a passage."""
_PER_DOCUMENT = 4
"""Passages of one document, so that questions come from many."""

_SENTENCE = re.compile(r"\S.*?[.!?][\"'”’)]*(?=\s|$)")
_LAST_WORD = re.compile(r"(.*)\s([A-Za-z]{4,})[.!?]$")

Row = dict[str, Any]
"""A question: `context`, `choices` (none: a free answer), `gold` (index), `prompt`, `answer`."""


@dataclass(frozen=True)
class LocalTask:
    """What a task's name says."""

    kind: str
    domain: str | None
    """None: from templates."""
    generates: bool

    @property
    def questions(self) -> str:
        """Name of its questions, the same for both forms."""
        return f"{self.kind}_{self.domain}" if self.domain else self.kind


def names() -> list[str]:
    """Return the names of all local tasks."""
    questions = [f"{kind}_{d}" for kind in _FROM_TEXTS for d in DOMAINS] + [*_FROM_TEMPLATES]
    return [f"{PREFIX}{name}{end}" for name in questions for end in ("", _GENERATION)]


def parse(name: str) -> LocalTask:
    """Return what the name of a local task says."""
    questions = name.removeprefix(PREFIX).removesuffix(_GENERATION)
    generates = name.endswith(_GENERATION)
    if questions in _FROM_TEMPLATES:
        return LocalTask(questions, None, generates)
    kind, _, domain = questions.rpartition("_")
    return LocalTask(kind, domain, generates)


def chance(name: str) -> float | None:
    """Return the accuracy of guessing among the choices; none: free answers, or not ours."""
    return _CHANCE.get(parse(name).kind) if name in names() else None


def make_questions(task: LocalTask, held_out: Sequence[str]) -> list[Row]:
    """Return at most `MAX_QUESTIONS` questions; the same for the same documents.

    Args:
        task: which.
        held_out: documents; of templates none.
    """
    rng = random.Random(f"{task.questions}/{VERSION}")  # noqa: S311  (seeded by the task: the same questions in every run)
    if task.domain is None:
        rows = list(_FROM_TEMPLATES[task.kind](rng))
        rng.shuffle(rows)
    else:
        rows = list(_FROM_TEXTS[task.kind](list(_passages(held_out)), rng))
    return rows[:MAX_QUESTIONS]


def harness_config(name: str, questions: str) -> dict[str, Any]:
    """Return a local task as the harness reads it, from Python or as YAML.

    Args:
        name: of the task.
        questions: path of the JSON lines.
    """
    task = parse(name)
    config: dict[str, Any] = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": questions}},
        "test_split": "test",
        "metadata": {"version": VERSION},
    }
    if task.generates:
        pattern = _ANSWER_PATTERNS.get(task.kind, r"([A-D])\b")
        extract = [
            {"function": "regex", "regex_pattern": pattern},
            {"function": "take_first"},
        ]
        return config | {
            "output_type": "generate_until",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 8},
            "filter_list": [{"name": "answer", "filter": extract}],
            "metric_list": [_metric("exact_match")],
        }
    config |= {"doc_to_text": "{{context}}", "target_delimiter": ""}
    config["metric_list"] = [_metric("acc")]
    if task.kind == "last_word":
        return config | {"output_type": "loglikelihood", "doc_to_target": "{{' ' + answer}}"}
    return config | {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
    }


def _metric(name: str) -> dict[str, Any]:
    return {"metric": name, "aggregation": "mean", "higher_is_better": True}


def _passages(documents: Sequence[str]) -> Iterator[list[str]]:
    """Yield passages as lists of three or more consecutive sentences, a few of each document."""
    for document in shuffled(documents, 0):
        yield from islice(_cut(document), _PER_DOCUMENT)


def _cut(document: str) -> Iterator[list[str]]:
    passage: list[str] = []
    for sentence in _SENTENCE.findall(re.sub(r"\s+", " ", document)):
        passage.append(sentence)
        n_words = sum(len(part.split()) for part in passage)
        if n_words >= _MIN_WORDS and len(passage) >= 3:
            if n_words <= _MAX_WORDS:
                yield passage
            passage = []


def _last_words(passages: Sequence[list[str]]) -> Iterator[tuple[str, str]]:
    """Yield passages without their last word, and that word: of four or more letters."""
    for passage in passages:
        if match := _LAST_WORD.fullmatch(" ".join(passage)):
            yield match[1].rstrip(), match[2]


def _last_word(passages: Sequence[list[str]], rng: random.Random) -> Iterator[Row]:
    """Yield the last word of a passage as the question (Paperno et al., 2016: LAMBADA's form)."""
    del rng
    for context, word in _last_words(passages):
        yield {"context": context, "choices": [], "gold": 0, "prompt": context, "answer": word}


def _cloze(passages: Sequence[list[str]], rng: random.Random) -> Iterator[Row]:
    """Yield last words with three that end other passages; all of the same case."""
    pairs = list(_last_words(passages))
    words = sorted({word for _, word in pairs})
    for context, word in pairs:
        others = [w for w in words if w != word and w[0].isupper() == word[0].isupper()]
        if len(others) >= 3:
            yield _choice_row(rng, context, f" {word}", [f" {w}" for w in rng.sample(others, 3)])


def _sentence_order(passages: Sequence[list[str]], rng: random.Random) -> Iterator[Row]:
    """Yield a sentence that two others follow, in their order or the other way around."""
    for first, second, third, *_ in passages:
        yield _choice_row(rng, first, f" {second} {third}", [f" {third} {second}"])


def _choice_row(rng: random.Random, context: str, answer: str, others: Sequence[str]) -> Row:
    choices = [answer, *others]
    rng.shuffle(choices)
    letters = "ABCD"[: len(choices)]
    listed = "".join(
        f"\n{letter}.{choice}" for letter, choice in zip(letters, choices, strict=True)
    )
    gold = choices.index(answer)
    return {
        "context": context,
        "choices": choices,
        "gold": gold,
        "prompt": f"Which of {', '.join(letters)} goes on?\n{context} ...{listed}\nAnswer:",
        "answer": letters[gold],
    }


_NOUNS = ("key", "door", "letter", "teacher", "picture", "road", "student", "farmer", "book", "dog")
_PLACES = ("near the", "behind the", "next to the")
_ENDINGS = ("old", "in the garden", "very small", "from London")


def _agreement(rng: random.Random) -> Iterator[Row]:
    """Yield subjects with an attractor of the other number (Linzen et al., 2016)."""
    for noun, place, other, verb in product(_NOUNS, _PLACES, _NOUNS, ("is", "are")):
        if other == noun:
            continue
        subject, attractor, wrong = noun, f"{other}s", "are"
        if verb == "are":
            subject, attractor, wrong = f"{noun}s", other, "is"
        context = f"The {subject} {place} {attractor}"
        end = rng.choice(_ENDINGS)
        row = _choice_row(rng, context, f" {verb} {end}.", [f" {wrong} {end}."])
        yield row | {
            "prompt": f"Fill in is or are.\n{context} ___ {end}.\nAnswer:",
            "answer": verb,
        }


def _arithmetic(rng: random.Random) -> Iterator[Row]:
    """Yield sums and differences up to 40, after two that are solved."""
    for a, b, sign in product(range(1, 21), range(1, 21), "+-"):
        result = a + b if sign == "+" else a - b
        if result < 0:
            continue
        near = {result + d for d in (-10, -2, -1, 1, 2, 10)}
        wrong = rng.sample(sorted(n for n in near if n >= 0), 3)
        context = f"2 + 3 = 5\n9 - 2 = 7\n{a} {sign} {b} ="
        row = _choice_row(rng, context, f" {result}", [f" {n}" for n in wrong])
        yield row | {"prompt": context, "answer": str(result)}


_FROM_TEXTS: dict[str, Callable[[Sequence[list[str]], random.Random], Iterator[Row]]] = {
    "last_word": _last_word,
    "cloze": _cloze,
    "sentence_order": _sentence_order,
}
_FROM_TEMPLATES: dict[str, Callable[[random.Random], Iterator[Row]]] = {
    "agreement": _agreement,
    "arithmetic": _arithmetic,
}
_ANSWER_PATTERNS = {
    "last_word": r"^\s*([A-Za-z]+)",
    "agreement": r"\b(is|are)\b",
    "arithmetic": r"(-?\d+)",
}
_CHANCE = {"cloze": 1 / 4, "sentence_order": 1 / 2, "agreement": 1 / 2}
"""Arithmetic has four choices by likelihood, and is written freely."""
