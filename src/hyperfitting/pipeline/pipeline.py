"""Every artifact of a run as one list of steps, and the phases that walk it.

    documents -> sequences -> tuned, validation -> continuations -> base_loglikelihoods -> scores
              -> evaluation_texts -------------> token_stats ---------------------------->
                                                 mechanism: both models compared -------->

An intervention or a control (`mechanism`) takes the tuned model's place: its steps come between.

`run.py` calls the phases in order: prepare, train, generate, score. The plan and the sweep walk
`Pipeline.steps`. All ids are known before anything is built. (One file, so that the order of
everything in a run is read in one place.)
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import compress
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from hyperfitting.config import RunConfig
from hyperfitting.data.sequences import (
    SplitSizes,
    load_evaluation_texts,
    load_sequences,
    load_split_sizes,
)
from hyperfitting.data.tokenization import token_text_in_context
from hyperfitting.evaluation.arrays import load_batch_sizes
from hyperfitting.evaluation.artifacts import ModelArtifacts
from hyperfitting.evaluation.chat import ChatArtifacts, build_chat, check_chat
from hyperfitting.evaluation.contamination import (
    contaminated,
    contamination_notes,
    training_texts,
)
from hyperfitting.evaluation.downstream.artifacts import DownstreamArtifacts
from hyperfitting.evaluation.downstream.results import build_downstream
from hyperfitting.evaluation.images import image_scoring
from hyperfitting.evaluation.next_tokens import load_next_tokens
from hyperfitting.evaluation.outputs import contexts, model_output, reference_output
from hyperfitting.evaluation.scoring import Comparison, NgramCorpus, score
from hyperfitting.evaluation.setting import LazyModel
from hyperfitting.mechanism.artifacts import MechanismArtifacts
from hyperfitting.mechanism.notes import replacement_notes
from hyperfitting.mechanism.parts import check_last_blocks
from hyperfitting.mechanism.patching_steps import check_block, load_patching
from hyperfitting.mechanism.results import build_mechanism
from hyperfitting.models.base import BaseModel
from hyperfitting.progress import MetricsRow, ProgressReporter
from hyperfitting.record.chat import Chat
from hyperfitting.record.downstream import Downstream
from hyperfitting.record.mechanism import Mechanism
from hyperfitting.record.schema import ImageInfo, ModelInfo, NextTokens
from hyperfitting.store.artifact import Artifact, DamagedArtifactError, Step
from hyperfitting.training.artifact import TrainingJob

_DATA = ("documents", "images", "sequences")
"""Kinds that are built before training."""
_MAX_REBUILDS = 3
"""Times that one damaged artifact is built again; a disk that damages it more often is broken."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Models:
    """The models of a run, loaded when first used."""

    base: LazyModel
    tuned: LazyModel | None
    """The tuned model, or an intervention or control in its place. None: `tuning=none`."""
    features: LazyModel | None
    """Gives MAUVE's features; none: MAUVE is not measured."""
    uncontrolled: LazyModel | None = None
    """The tuned model itself, where a control is evaluated in its place."""

    def release(self) -> None:
        """Free the memory of all of them."""
        for model in (self.base, self.tuned, self.features, self.uncontrolled):
            if model is not None:
                model.release()


@dataclass(frozen=True)
class Pipeline:
    """A run's way from its config to its scores."""

    cfg: RunConfig
    base: BaseModel
    documents: Step
    sequences: Step
    evaluation_documents: dict[str, Step]
    evaluation_texts: dict[str, Step]
    """By evaluation dataset."""
    training: TrainingJob | None
    """None: the base model is evaluated by itself."""
    trained_on: list[Artifact]
    """All training sequences: evaluation texts that they contain are left out."""
    replacement: dict[str, Step]
    """What takes the tuned model's place, by name, inputs first; empty: nothing does."""
    patching: dict[str, Step]
    """Activation patching of each evaluation dataset, inputs first; empty: not done."""
    models: Models
    base_artifacts: ModelArtifacts
    tuned_artifacts: ModelArtifacts
    """The base model's if nothing is trained."""
    mechanism: MechanismArtifacts
    """Comparisons of the two models."""
    downstream: DownstreamArtifacts
    """Both models' answers to benchmarks."""
    chat: ChatArtifacts | None
    """Both models' answers to open questions; none: not asked for."""
    progress: ProgressReporter

    def named_steps(self) -> Iterator[tuple[str, Step]]:
        """Yield every step with the name that the record gives its artifact, inputs first."""
        if self.base.step is not None:
            yield "model", self.base.step
        yield "documents", self.documents
        for name, step in self.evaluation_documents.items():
            yield f"evaluation_documents/{name}", step
        for name, step in self.evaluation_texts.items():
            yield f"evaluation_texts/{name}", step
        yield "sequences", self.sequences
        if self.training is not None:
            yield from self.training.steps(self.progress).items()
            yield from self.replacement.items()
            for name, step in self.tuned_artifacts.named():
                yield f"tuned/{name}", step
        for name, step in self.base_artifacts.named():
            yield f"base/{name}", step
        for name, step in self.mechanism.named():
            yield f"mechanism/{name}", step
        yield from self.patching.items()
        yield from self.downstream.named()
        if self.chat is not None:
            yield from self.chat.named()

    @property
    def steps(self) -> list[Step]:
        """Every step, inputs first, each artifact once."""
        return list({step.artifact.id: step for _, step in self.named_steps()}.values())

    @property
    def artifacts(self) -> dict[str, Artifact]:
        """Every artifact, by the name that the record gives it."""
        return {name: step.artifact for name, step in self.named_steps()}

    def prepare(self) -> None:
        """Get the base model and build everything that comes before training.

        Raises:
            UserError: the model or a dataset is unavailable, the device cannot train as
                configured, or what the config asks for is too long for the model; nothing has been
                trained then.
        """
        if self.training is not None and not self.training.is_done:
            self.training.check_device()
        self.base.ensure()
        self._retrying(self.base.folder)  # verifies every file of a converted model
        self.base.check_length(
            "evaluation.context_len + evaluation.max_new_tokens", self.cfg.evaluation.total_len
        )
        check_chat(self.cfg.evaluation, self.base)
        for step in (*self.evaluation_documents.values(), *self.evaluation_texts.values()):
            self._ensure(step)
        n_blocks, _ = self.base.shape()
        check_last_blocks(n_blocks, self.cfg.intervention.last_blocks)
        check_block(self.cfg.evaluation.patch_block, n_blocks)
        other_data = (s for s in self.replacement.values() if s.artifact.kind in _DATA)
        for step in (self.documents, self.sequences, *other_data):
            self._ensure(step)

    def train(self) -> Iterator[MetricsRow]:
        """Train, or read the history of a training that is done; yield its metrics row by row."""
        if self.training is None:
            return
        rebuilds: Counter[str] = Counter()
        while True:
            try:
                yield from self.training.run(self.progress)
                return
            except DamagedArtifactError as error:  # found before the first row
                self._rebuild(error, rebuilds)

    def generate(self) -> None:
        """Build what each model predicts and generates, with one model in memory at a time.

        Only the comparisons of `mechanism` need both.
        """
        tuned, base = self.tuned_artifacts, self.base_artifacts
        self._build(self.replacement)
        self.models.release()
        if tuned is not base:
            self._build(tuned.token_stats, tuned.continuations, tuned.next_tokens)
            self.models.release()
        self._build(base.token_stats, base.continuations, base.next_tokens)
        self._build(tuned.base_loglikelihoods, dict(self.mechanism.named()))
        self.models.release()
        for step in self.patching.values():  # the tuned model's states, then the base model
            self._ensure(step)
            self.models.release()
        self._build(self.downstream.inputs)
        for side in ("tuned", "base"):
            self._build(getattr(self.downstream, side))
            if self.chat is not None:
                self._ensure(getattr(self.chat, side))
            self.models.release()
        self._build(tuned.mauve_features, base.mauve_features)
        self._build(tuned.image_features, base.image_features)
        self.models.release()

    def score(self) -> Comparison:
        """Return the scores of the tuned model, the base model and the references."""
        return self._retrying(self._score)

    def mechanism_results(self, comparison: Comparison) -> Mechanism | None:
        """Return the comparisons of the two models, if any are asked for."""
        if not self.cfg.mechanism.measures:
            return None
        token_text = cache(token_text_in_context(self.base.tokenizer()))
        resamples = self.cfg.evaluation.bootstrap
        return self._retrying(
            lambda: build_mechanism(self.mechanism, comparison, token_text, resamples)
        )

    def downstream_results(self) -> Downstream | None:
        """Return what both models answered to the benchmarks, if any are asked for."""
        resamples = self.cfg.evaluation.bootstrap
        return self._retrying(lambda: build_downstream(self.downstream, resamples))

    def chat_results(self) -> Chat | None:
        """Return what both models answered to open questions, if they were asked."""
        chat = self.chat
        if chat is None:
            return None
        return self._retrying(lambda: build_chat(chat, self._corpus(), self.cfg.evaluation))

    def next_tokens(self) -> dict[str, NextTokens]:
        """Return the most likely next tokens along each dataset's first text, if asked for."""
        return self._retrying(
            lambda: {
                name: load_next_tokens(
                    step.artifact,
                    self.base_artifacts.next_tokens[name].artifact,
                    load_sequences(self.sequences.artifact).train,
                )
                for name, step in self.tuned_artifacts.next_tokens.items()
            }
        )

    def history(self) -> list[MetricsRow]:
        """Return the rows of all epochs of the training."""
        if self.training is None:
            return []
        return [row for row in self._retrying(self.training.history) if "epoch" in row]

    def notes(self) -> list[str]:
        """Return what a reader of the record must know about the run itself."""
        notes = contamination_notes(self._retrying(lambda: self._contaminated))
        if self.training is None and self.cfg.decode.citation_blocker.enabled:
            notes.append(
                "the base model has no training data to quote: the blocker forbids nothing"
            )
        cfg = self.cfg
        notes += self._retrying(
            lambda: list(replacement_notes(cfg.intervention, cfg.decode.control, self.replacement))
        )
        sizes = self.split_sizes()
        if sizes.near_duplicate_train_sequences:
            notes.append(
                f"{sizes.near_duplicate_train_sequences} of {self.cfg.dataset.n_train} training "
                "sequences nearly repeat others"
            )
        return notes

    def generation_batches(self) -> dict[str, list[int]]:
        """Return how many texts each batch held, by the name of the continuations."""
        return self._retrying(
            lambda: {
                name: load_batch_sizes(artifact)
                for name, artifact in self.artifacts.items()
                if artifact.kind == "continuations"
            }
        )

    def model_info(self) -> ModelInfo:
        """Return which base model it is."""
        return ModelInfo(name=self.base.name, id=self.base.id, location=self.base.location)

    def image_info(self) -> ImageInfo | None:
        """Return what shows the tokens of an image model as images; None: its tokens are text."""
        image_format, image = self.base.image_format(), self.cfg.dataset.image
        if image_format is None or image is None:
            return None
        return ImageInfo(
            height=image_format.height,
            width=image_format.width,
            palette=image_format.colors.tolist(),
            sos=image_format.sos if image.prepend_sos else None,
        )

    def split_sizes(self) -> SplitSizes:
        """Return how the documents that are trained on were split."""
        return self._retrying(lambda: load_split_sizes(self.sequences.artifact))

    def _score(self) -> Comparison:
        base = model_output(self.base_artifacts)
        references = {
            name: load_evaluation_texts(step.artifact)
            for name, step in self.evaluation_texts.items()
        }
        kept = ~np.concatenate(list(self._contaminated.values()))
        return score(
            replace(model_output(self.tuned_artifacts), patching=self._patching()).select(kept),
            base.select(kept),
            reference_output(base, references.values(), self.cfg.evaluation).select(kept),
            list(compress(contexts(references.values(), self.cfg.evaluation), kept)),
            self._corpus(),
            self.cfg.evaluation,
            image_scoring(self.base.image_format(), self.cfg.dataset),
        )

    def _corpus(self) -> NgramCorpus:
        """Return the training sequences in the unit that n-gram metrics count."""
        train = load_sequences(self.sequences.artifact).train
        in_words = self.cfg.evaluation.unit == "word"
        return NgramCorpus(train, self.base.tokenizer().decode if in_words else None)

    def _patching(self) -> dict[str, NDArray[np.float32]]:
        """Return what activation patching measured at the block of the config, by text."""
        block = self.cfg.evaluation.patch_block
        if block is None:
            return {}
        return load_patching([self.patching[f"patching/{n}"] for n in self.evaluation_texts], block)

    @cached_property
    def _contaminated(self) -> dict[str, NDArray[np.bool_]]:
        """By evaluation dataset, which of its texts the training sequences contain."""
        return contaminated(
            {n: load_evaluation_texts(step.artifact) for n, step in self.evaluation_texts.items()},
            training_texts(self.trained_on, self.base.tokenizer().decode),
        )

    def _build(self, *groups: dict[str, Step]) -> None:
        for steps in groups:
            for step in steps.values():
                self._ensure(step)

    def _ensure(self, step: Step) -> None:
        """Build a step, and first again whatever input of it turns out to be damaged."""
        self._retrying(step.ensure)

    def _retrying(self, action: Callable[[], Result]) -> Result:
        """Return the result of an action; damaged artifacts that it reads are built again."""
        rebuilds: Counter[str] = Counter()
        while True:
            try:
                return action()
            except DamagedArtifactError as error:
                self._rebuild(error, rebuilds)

    def _rebuild(self, error: DamagedArtifactError, rebuilds: Counter[str]) -> None:
        """Build a damaged artifact again; one that is no step is built by the code that reads it.

        (The model's size and the activation cache: they are inputs of plans and of the training.)

        Raises:
            DamagedArtifactError: it has been built again too often.
        """
        rebuilds[error.artifact.id] += 1
        if rebuilds[error.artifact.id] > _MAX_REBUILDS:
            raise error
        for step in self.steps:
            if step.artifact.id == error.artifact.id:
                self._ensure(step)
