"""From models to what they do on the evaluation texts, each step an artefact.

How a model predicts the texts, what it writes after their contexts, and how the original model
reads that. The original model's are made once for all members that share texts and decoding.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from hyperfitting import costs, models
from hyperfitting.config import STRATEGY_FIELDS, DecodeConfig, ModelConfig, RunConfig
from hyperfitting.data.corpus import load_corpus, load_evaluation_texts, piece_in_text, pieces
from hyperfitting.decoding.blocker import CitationBlocker
from hyperfitting.decoding.likelihood import MEASURES, features, likeliest, measure
from hyperfitting.metrics import mauve
from hyperfitting.metrics.distribution import CHOICE_MEASURES
from hyperfitting.models import BaseModel, ModelState
from hyperfitting.progress import Progress
from hyperfitting.scoring import CountedCorpus, Output
from hyperfitting.store import Artefact, Store, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERSION = 3
_READ = ("loss", "rank")


class LoadedModel:
    """A model state that is read from disk when first needed, and then kept."""

    def __init__(self, state: ModelState, device: torch.device, spread: bool = False) -> None:
        self.state, self.device, self.spread = state, device, spread
        self._model: PreTrainedModel | None = None

    def __call__(self) -> PreTrainedModel:
        """Return the model on its device, in evaluation mode."""
        if self._model is None:
            self._model = self.state.load(self.device, self.spread)
        return self._model

    def release(self) -> None:
        """Let go of the model's memory."""
        self._model = None

    @property
    def label(self) -> str:
        """What a person calls it."""
        return "the tuned model" if self.state.tuned else "the original model"


@dataclass(frozen=True)
class _Did:
    """What one model did on each set of texts, by its name."""

    model: LoadedModel
    likelihoods: dict[str, Artefact]
    continuations: dict[str, Artefact]
    distributions: dict[str, Artefact]
    """Of the first text, if they are to be kept."""
    readings: dict[str, Artefact] = field(default_factory=dict)
    """How the original model reads its continuations; none: it is the original model."""
    features: dict[str, Artefact] = field(default_factory=dict)
    """For MAUVE, of its continuations and of the texts."""

    def by_kind(self) -> dict[str, dict[str, Artefact]]:
        """Return all artefacts."""
        return {kind: found for kind, found in vars(self).items() if kind != "model"}

    def all(self) -> list[Artefact]:
        """Return all artefacts in a row."""
        return [artefact for found in self.by_kind().values() for artefact in found.values()]

    def own(self) -> list[Artefact]:
        """Return what the model makes by itself."""
        return [
            *self.likelihoods.values(),
            *self.continuations.values(),
            *self.distributions.values(),
        ]


@dataclass(frozen=True)
class Evaluator:
    """What all models of a member are evaluated on, and how."""

    cfg: RunConfig
    sets: Mapping[str, Artefact]
    """Evaluation texts by the name of their set."""
    corpus: Artefact
    """What the tuned model was trained on."""
    store: Store
    device: torch.device
    show: Progress

    def __post_init__(self) -> None:
        if self.cfg.evaluation.mauve is not None:
            mauve.check_installed()

    def _loaded(self, state: ModelState) -> LoadedModel:
        return LoadedModel(state, self.device, self.cfg.hardware.spread)

    def check(self, base: BaseModel) -> None:
        """Refuse what would fail only after training.

        Raises:
            UserError: the continuations would be longer than the model was made for.
        """
        evaluation = self.cfg.evaluation
        base.check_length(
            "evaluation.context_len + evaluation.new_tokens",
            evaluation.context_len + evaluation.longest,
        )

    def handles(self, base: BaseModel, tuned: Artefact | None) -> tuple[_Did, _Did]:
        """Return the artefacts of what the tuned and the original model do; nothing is made.

        Args:
            base: the original model.
            tuned: the tuned one; none: the original model takes its place.
        """
        original = self._loaded(ModelState(base))
        before = self._did(original)
        if tuned is None:
            return before, before
        state = ModelState(base, tuned, self.cfg.evaluation.state)
        after = self._did(self._loaded(state))
        for name in self.sets:
            after.readings[name] = self.reading(original, name, after.continuations[name])
        return after, before

    def compare(
        self, base: BaseModel, tuned: Artefact | None
    ) -> tuple[Output, Output, Output, dict[str, Artefact]]:
        """Return what the tuned and the original model do, the texts themselves, and the artefacts.

        Args:
            base: the original model.
            tuned: the tuned one; none: the original model takes its place.
        """
        after, before = self.handles(base, tuned)
        for did in (after, before):
            for artefact in did.own():
                artefact.ensure()
            if did is not before:
                did.model.release()  # one model in memory at a time
        outputs = [self._output(did) for did in (after, before)]
        before.model.release()
        if self.cfg.evaluation.mauve is not None:
            outputs = self._with_mauve(base, outputs, (after, before))
        artefacts = {
            f"{who}_{kind}/{name}": artefact
            for who, did in (("tuned", after), ("original", before))
            for kind, found in did.by_kind().items()
            for name, artefact in found.items()
        }
        return outputs[0], outputs[1], self._reference(outputs[1]), artefacts

    def _did(self, model: LoadedModel) -> _Did:
        """Return the artefacts of what a model makes of all texts by itself."""
        return _Did(
            model,
            {name: self.likelihoods(model, name) for name in self.sets},
            {name: self.continuations(model, name) for name in self.sets},
            {name: self.distributions(model, name) for name in self.sets}
            if self.cfg.evaluation.top_tokens
            else {},
        )

    def _reference(self, original: Output) -> Output:
        """Return the texts as if the original model had written them, as it has read them."""
        start, length = self.cfg.evaluation.context_len, self.cfg.evaluation.longest
        texts = [load_evaluation_texts(artefact) for artefact in self.sets.values()]
        read = {
            name: values[:, start - 1 :][:, :length] for name, values in original.likelihood.items()
        }
        return Output(
            original.sets,
            original.likelihood,
            steps=read,
            reading=read,
            samples=[
                {"tokens": tokens[start:][:length], "pieces": pieces[start:][:length]}
                for one in texts
                for tokens, pieces in zip(one.tokens.tolist(), one.pieces, strict=True)
            ],
        )

    def counted(self, base: BaseModel) -> CountedCorpus:
        """Return the training sequences in the unit that n-gram metrics count."""
        words = self.cfg.evaluation.unit == "word"
        return CountedCorpus(
            load_corpus(self.corpus).train, base.tokenizer().decode if words else None
        )

    def likelihoods(self, model: LoadedModel, texts: str) -> Artefact:
        """Return the artefact of how a model predicts a set's texts.

        Its files, for each measure of `metrics.distribution`: ``NAME.npy`` (N, text_len - 1).
        """

        def make(work: Path) -> None:
            tokens = load_evaluation_texts(self.sets[texts]).tokens
            with self.show(f"scoring {texts} with {model.label}", tokens.size, "tokens") as advance:
                found = measure(model(), tokens, self.cfg.hardware.evaluation_batch_size, advance)
            for name in MEASURES:
                _save(work, name, found[name])

        return self.store.artefact(
            "likelihoods",
            version=VERSION,
            config={},
            inputs={"model": model.state.id, "texts": self.sets[texts].id},
            make=make,
            work=self._work(model.state.base, self.cfg.evaluation.whole),
        )

    def continuations(self, model: LoadedModel, texts: str) -> Artefact:
        """Return the artefact of a model's continuations: `continuations.json`, one object a text.

        Each has `tokens` (ids), `pieces` (the text of each token; they join to the continuation),
        `context` and `reference` (text). Beside it, for each of `CHOICE_MEASURES`, ``NAME.npy``
        (N, new_tokens).
        """
        evaluation, hardware = self.cfg.evaluation, self.cfg.hardware
        blocked = self._blocked(model.state)

        def make(work: Path) -> None:
            from hyperfitting.decoding.generate import continue_texts

            self.check(model.state.base)
            given = load_evaluation_texts(self.sets[texts])
            start = evaluation.context_len
            tokenizer = model.state.base.tokenizer()
            blocker = self._blocker(tokenizer) if blocked else None
            task = f"continuing {texts} with {model.label}"
            total = len(given.tokens) * evaluation.longest
            with self.show(task, total, "tokens") as advance:
                made = continue_texts(
                    model(),
                    given.tokens[:, :start],
                    evaluation.longest,
                    self.cfg.decode,
                    hardware.generation_batch_size,
                    advance,
                    blocker,
                )
            write_json(
                work / "continuations.json",
                [
                    {
                        "context": "".join(text[:start]),
                        "reference": "".join(text[start:]),
                        "tokens": continuation,
                        "pieces": pieces(tokenizer.decode, continuation, tokens[:start]),
                    }
                    for tokens, text, continuation in zip(
                        given.tokens, given.pieces, made.tokens, strict=True
                    )
                ],
            )
            for name in CHOICE_MEASURES:
                _save(work, name, made.measures[name])

        return self.store.artefact(
            "continuations",
            version=VERSION,
            config={
                "decode": determining(self.cfg.decode, blocked),
                "context_len": evaluation.context_len,
                "new_tokens": evaluation.longest,
            },
            inputs={"model": model.state.id, "texts": self.sets[texts].id}
            | ({"blocked": self.corpus.id} if blocked else {}),
            make=make,
            work=self._work(
                model.state.base,
                evaluation.context_len + evaluation.longest,
                self.cfg.decode.candidates,
            ),
        )

    def distributions(self, model: LoadedModel, texts: str) -> Artefact:
        """Return the artefact of the likeliest next tokens along a set's first text.

        Its file `distributions.json`: `text`, the pieces of its T tokens; and for each of them but
        the first, k times: `ids`, `pieces`, `mass` of what a model thought likeliest there.
        """
        k = self.cfg.evaluation.top_tokens

        def make(work: Path) -> None:
            given = load_evaluation_texts(self.sets[texts])
            ids, mass = likeliest(model(), given.tokens[0], k)
            piece = piece_in_text(model.state.base.tokenizer())
            write_json(
                work / "distributions.json",
                {
                    "text": given.pieces[0],
                    "ids": ids.tolist(),
                    "pieces": [[piece(token) for token in row] for row in ids.tolist()],
                    "mass": [[round(float(p), 6) for p in row] for row in mass],
                },
            )

        return self.store.artefact(
            "distributions",
            version=VERSION,
            config={"top_tokens": k},
            inputs={"model": model.state.id, "texts": self.sets[texts].id},
            make=make,
        )

    def reading(self, model: LoadedModel, texts: str, written: Artefact) -> Artefact:
        """Return the artefact of how a model reads what another wrote.

        Its files: ``loss.npy`` and ``rank.npy`` (N, new_tokens) of each token, NaN past the end.
        """
        context_len = self.cfg.evaluation.context_len

        def make(work: Path) -> None:
            contexts = load_evaluation_texts(self.sets[texts]).tokens[:, :context_len]
            tokens = [s["tokens"] for s in _samples(written)]
            lengths = np.array([len(text) for text in tokens])
            whole = np.zeros((len(tokens), context_len + self.cfg.evaluation.longest), np.int32)
            whole[:, :context_len] = contexts
            for row, text in zip(whole, tokens, strict=True):
                row[context_len : context_len + len(text)] = text
            task = f"reading {texts} of the tuned model with {model.label}"
            with self.show(task, whole.size, "tokens") as advance:
                found = measure(model(), whole, self.cfg.hardware.evaluation_batch_size, advance)
            past = np.arange(self.cfg.evaluation.longest) >= lengths[:, None]
            for name in _READ:
                _save(work, name, np.where(past, np.nan, found[name][:, context_len - 1 :]))

        return self.store.artefact(
            "readings",
            version=VERSION,
            config={},
            inputs={"model": model.state.id, "continuations": written.id},
            make=make,
            work=self._work(model.state.base, context_len + self.cfg.evaluation.longest),
        )

    def _with_mauve(
        self, base: BaseModel, outputs: list[Output], dids: tuple[_Did, _Did]
    ) -> list[Output]:
        """Return the outputs with the features that MAUVE compares."""
        if self.cfg.evaluation.mauve != "original":
            chosen = ModelConfig(name="mauve", source="local", path=self.cfg.evaluation.mauve)
            base = models.base_model(chosen, self.store)
        reader = self._loaded(ModelState(base))
        found = []
        for output, did in zip(outputs, dids, strict=True):
            of: dict[str, NDArray[np.float32]] = {}
            for side in ("continuation", "reference"):
                made = {
                    name: self._features(reader, side, name, artefact)
                    for name, artefact in did.continuations.items()
                }
                of[side] = _joined(made, ("features",))["features"]
                did.features.update({f"{side}/{name}": one for name, one in made.items()})
            found.append(replace(output, mauve_features=(of["continuation"], of["reference"])))
        reader.release()
        return found

    def _features(self, reader: LoadedModel, side: str, texts: str, written: Artefact) -> Artefact:
        """Return the artefact of the last hidden states of texts: `features.npy` (N, H)."""
        limit = self.cfg.evaluation.context_len + self.cfg.evaluation.longest

        def make(work: Path) -> None:
            samples, tokenizer = _samples(written), reader.state.base.tokenizer()
            whole = [
                s["context"] + ("".join(s["pieces"]) if side == "continuation" else s["reference"])
                for s in samples
            ]
            ids = [list(tokenizer(text).input_ids)[:limit] for text in whole]
            with self.show(f"MAUVE features of {texts}", len(ids), "texts") as advance:
                found = features(reader(), ids, self.cfg.hardware.evaluation_batch_size, advance)
            _save(work, "features", found)

        of = (
            {"continuations": written.id}
            if side == "continuation"
            else {"texts": self.sets[texts].id}
        )
        return self.store.artefact(
            "features",
            version=VERSION,
            config={"side": side, "limit": limit},
            inputs={"model": reader.state.id} | of,
            make=make,
        )

    def _work(self, base: BaseModel, length: int, times: int = 1) -> Callable[[], float]:
        """Return the function that counts the operations of passes over a set's texts."""
        return lambda: (
            times * costs.forward(base.size(self.store), self.cfg.evaluation.n_texts, length)
        )

    def _blocked(self, state: ModelState) -> bool:
        """Return whether the citation blocker is on. An original model has nothing to cite."""
        return self.cfg.decode.citation_blocker.enabled and state.tuned is not None

    def _blocker(self, tokenizer: Any) -> CitationBlocker:
        return CitationBlocker(
            load_corpus(self.corpus).train,
            self.cfg.decode.citation_blocker,
            piece_in_text(tokenizer),
        )

    def _output(self, did: _Did) -> Output:
        samples = {name: _samples(artefact) for name, artefact in did.continuations.items()}
        return Output(
            sets=[name for name, found in samples.items() for _ in found],
            likelihood=_joined(did.likelihoods, MEASURES),
            steps=_joined(did.continuations, CHOICE_MEASURES),
            # of its own continuations the original model's reading is known already
            reading=_joined(did.readings or did.continuations, _READ),
            samples=[sample for found in samples.values() for sample in found],
        )


def _save(work: Path, name: str, values: NDArray[Any]) -> None:
    kind = np.int32 if name == "top1" else np.float32
    np.save(work / f"{name}.npy", values.astype(kind), allow_pickle=False)


def _joined(artefacts: Mapping[str, Artefact], names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """Return arrays of all sets one under the other."""
    return {
        name: np.concatenate([np.load(a.file(f"{name}.npy")) for a in artefacts.values()])
        for name in names
    }


def _samples(written: Artefact) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(written.file("continuations.json").read_text("utf-8"))
    return found


def determining(decode: DecodeConfig, blocked: bool) -> dict[str, Any]:
    """Return what of a decode config changes its tokens: greedy has no seed, for one."""
    shared = ("strategy", "repetition_penalty", "no_repeat_ngram", "stop_at_eos")
    names = (*shared, *STRATEGY_FIELDS[decode.strategy])
    found = {name: getattr(decode, name) for name in names}
    if decode.strategy == "sample":
        found["seed"] = decode.seed
    if blocked:
        found["citation_blocker"] = asdict(decode.citation_blocker)
    return found
