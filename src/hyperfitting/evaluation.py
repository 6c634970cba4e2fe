"""From models to what they do on the evaluation texts, each step an artefact.

How a model predicts the texts, what it writes after their contexts, and how the original model reads
that. The original model's are made once for all members that share texts and decoding.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from hyperfitting import models
from hyperfitting.config import STRATEGY_FIELDS, DecodeConfig, ModelConfig, RunConfig
from hyperfitting.data.corpus import load_corpus, load_evaluation_texts
from hyperfitting.decoding.blocker import CitationBlocker
from hyperfitting.decoding.generate import STEP_MEASURES, continue_texts
from hyperfitting.decoding.likelihood import MEASURES, features, measure
from hyperfitting.metrics import mauve
from hyperfitting.models import BaseModel, ModelState
from hyperfitting.progress import Progress
from hyperfitting.scoring import Corpus, Output
from hyperfitting.store import Artefact, Store, write_json

VERSION = 2
_READ = ("loss", "rank")


class LoadedModel:
    """A model state that is read from disk when first needed, and then kept."""

    def __init__(self, state: ModelState, device: torch.device) -> None:
        self.state, self.device = state, device
        self._model: PreTrainedModel | None = None

    def __call__(self) -> PreTrainedModel:
        """Return the model on its device, in evaluation mode."""
        if self._model is None:
            self._model = self.state.load(self.device)
        return self._model

    def release(self) -> None:
        """Let go of the model's memory."""
        self._model = None

    @property
    def label(self) -> str:
        """What a person calls it."""
        return "the tuned model" if self.state.tuned else "the original model"


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

    def compare(
        self, base: BaseModel, tuned: Artefact | None
    ) -> tuple[Output, Output, Output, dict[str, Artefact]]:
        """Return what the tuned and the original model do, the texts themselves, and the artefacts.

        Args:
            base: the original model.
            tuned: the tuned one; none: the original model takes its place.
        """
        original = LoadedModel(ModelState(base), self.device)
        final = original
        if tuned is not None:
            final = LoadedModel(ModelState(base, tuned, self.cfg.evaluation.state), self.device)
        made: dict[str, Artefact] = {}
        outputs = []
        for name, model in (("tuned", final), ("original", original)):
            likely = {texts: self.likelihoods(model, texts) for texts in self.sets}
            written = {texts: self.continuations(model, texts) for texts in self.sets}
            for kind, found in (("likelihoods", likely), ("continuations", written)):
                for texts, artefact in found.items():
                    made[f"{name}_{kind}/{texts}"] = artefact
                    artefact.ensure()
            if model is not original:
                model.release()  # one model in memory at a time
            outputs.append((likely, written))
        found = []
        for name, (likely, written) in zip(("tuned", "original"), outputs, strict=True):
            # of its own continuations the original model's reading is known already
            read = dict(written)
            if name == "tuned" and tuned is not None:
                read = {texts: self.reading(original, texts, written[texts]) for texts in self.sets}
                made |= {f"tuned_readings/{texts}": artefact for texts, artefact in read.items()}
            found.append(
                self._output(likely, written, read, self._mauve_features(base, written, made, name))
            )
        original.release()
        return found[0], found[1], self._reference(base, found[1]), made

    def _reference(self, base: BaseModel, original: Output) -> Output:
        """Return the texts as if the original model had written them, as it has read them."""
        evaluation = self.cfg.evaluation
        texts = np.concatenate([load_evaluation_texts(artefact) for artefact in self.sets.values()])
        tokens = texts[:, evaluation.context_len :][:, : evaluation.longest].tolist()
        decode = base.tokenizer().decode
        read = {
            name: values[:, evaluation.context_len - 1 :][:, : evaluation.longest]
            for name, values in original.likelihood.items()
        }
        return Output(
            original.sets,
            original.likelihood,
            steps=read,
            reading=read,
            samples=[{"tokens": text, "pieces": pieces(decode, text)} for text in tokens],
        )

    def counted(self, base: BaseModel) -> Corpus:
        """Return the training sequences in the unit that n-gram metrics count."""
        words = self.cfg.evaluation.unit == "word"
        return Corpus(load_corpus(self.corpus).train, base.tokenizer().decode if words else None)

    def likelihoods(self, model: LoadedModel, texts: str) -> Artefact:
        """Return the artefact of how a model predicts a set's texts.

        Its files, for each measure of `metrics.distribution`: ``NAME.npy`` (N, text_len - 1).
        """

        def make(work: Path) -> None:
            tokens = load_evaluation_texts(self.sets[texts])
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
        )

    def continuations(self, model: LoadedModel, texts: str) -> Artefact:
        """Return the artefact of a model's continuations: `continuations.json`, one object a text.

        Each has `tokens` (ids), `pieces` (the text of each token; they join to the continuation),
        `context` and `reference` (text). Beside it, for each of `STEP_MEASURES`, ``NAME.npy``
        (N, new_tokens).
        """
        evaluation, hardware = self.cfg.evaluation, self.cfg.hardware
        blocked = self._blocked(model.state)

        def make(work: Path) -> None:
            model.state.base.check_length(
                "evaluation.context_len + evaluation.new_tokens",
                evaluation.context_len + evaluation.longest,
            )
            tokens = load_evaluation_texts(self.sets[texts])
            contexts = tokens[:, : evaluation.context_len]
            tokenizer = model.state.base.tokenizer()
            blocker = self._blocker(tokenizer) if blocked else None
            task = f"continuing {texts} with {model.label}"
            with self.show(task, len(contexts) * evaluation.longest, "tokens") as advance:
                made = continue_texts(
                    model(),
                    contexts,
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
                        "context": tokenizer.decode(text[: evaluation.context_len]),
                        "reference": tokenizer.decode(text[evaluation.context_len :]),
                        "tokens": continuation,
                        "pieces": pieces(tokenizer.decode, continuation),
                    }
                    for text, continuation in zip(tokens.tolist(), made.tokens, strict=True)
                ],
            )
            for name in STEP_MEASURES:
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
        )

    def reading(self, model: LoadedModel, texts: str, written: Artefact) -> Artefact:
        """Return the artefact of how a model reads what another wrote.

        Its files: ``loss.npy`` and ``rank.npy`` (N, new_tokens) of each token, NaN past the end.
        """
        context_len = self.cfg.evaluation.context_len

        def make(work: Path) -> None:
            contexts = load_evaluation_texts(self.sets[texts])[:, :context_len]
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
        )

    def _mauve_features(
        self, base: BaseModel, written: Mapping[str, Artefact], made: dict[str, Artefact], name: str
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """Return features (N, H) of contexts with continuations, and of the texts themselves."""
        chosen = self.cfg.evaluation.mauve
        if chosen is None:
            return None
        if chosen != "original":
            base = models.base_model(
                ModelConfig(name="mauve", source="local", path=chosen), self.store
            )
        reader = LoadedModel(ModelState(base), self.device)
        found = {}
        for side in ("continuation", "reference"):
            for texts, artefact in written.items():
                made[f"{name}_mauve_{side}/{texts}"] = self._features(reader, side, texts, artefact)
            found[side] = np.concatenate(
                [
                    np.load(made[f"{name}_mauve_{side}/{texts}"].file("features.npy"))
                    for texts in written
                ]
            )
        reader.release()
        return found["continuation"], found["reference"]

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

    def _blocked(self, state: ModelState) -> bool:
        """Return whether the citation blocker is on. An original model has nothing to cite."""
        return self.cfg.decode.citation_blocker.enabled and state.tuned is not None

    def _blocker(self, tokenizer: Any) -> CitationBlocker:
        anchor = tokenizer("a", add_special_tokens=False).input_ids
        before = len(tokenizer.decode(anchor))
        return CitationBlocker(
            load_corpus(self.corpus).train,
            self.cfg.decode.citation_blocker,
            lambda token: str(tokenizer.decode([*anchor, token]))[before:],
        )

    def _output(
        self,
        likely: Mapping[str, Artefact],
        written: Mapping[str, Artefact],
        read: Mapping[str, Artefact],
        mauve_features: tuple[NDArray[np.float32], NDArray[np.float32]] | None,
    ) -> Output:
        samples = {texts: _samples(artefact) for texts, artefact in written.items()}
        return Output(
            sets=[texts for texts, found in samples.items() for _ in found],
            likelihood=_joined(likely, MEASURES),
            steps=_joined(written, STEP_MEASURES),
            reading=_joined(read, _READ),
            samples=[sample for found in samples.values() for sample in found],
            mauve_features=mauve_features,
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


def pieces(decode: Callable[[list[int]], str], tokens: list[int], window: int = 8) -> list[str]:
    """Return the text of each token, so that the pieces join to the text of all.

    A token that is only part of a character gives "", and the one that completes it the character.

    Args:
        decode: the tokenizer's, from ids to text.
        tokens: (T,) ids.
        window: tokens before it that can change how one is written.
    """
    found: list[str] = []
    done = 0  # tokens whose text is out
    for end in range(1, len(tokens) + 1):
        start = max(0, done - window)
        before, now = decode(tokens[start:done]), decode(tokens[start:end])
        complete = not now.endswith("\ufffd") or end == len(tokens) or end - done >= window
        found.append(now[len(before) :] if complete else "")
        done = end if complete else done
    return found
