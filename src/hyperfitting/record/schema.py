"""results.json: the record of a run, as typed, versioned classes.

The record is the interface for tables, figures, pages and other readers. Beside it lies
`predictions.npz`, with what both models predicted at every position of the reference texts. Raise
`SCHEMA_VERSION` when a field changes; docs/results-format.md and its JSON Schema are generated from
these classes (`make docs`). (One file, as the classes are the documentation of the format.)
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from hyperfitting.metrics.estimate import Difference, Estimate
from hyperfitting.progress import MetricsRow
from hyperfitting.record.chat import CHAT, Chat
from hyperfitting.record.downstream import Downstream
from hyperfitting.record.mechanism import Mechanism
from hyperfitting.record.recognition import Recognition
from hyperfitting.record.texts import NO_OVERLAP, Continuation, SampleText
from hyperfitting.runtime.code_version import CodeVersion
from hyperfitting.runtime.machine import Machine
from hyperfitting.runtime.strict_model import StrictModel

SCHEMA_VERSION = 10
Side = Literal["tuned", "base", "reference"]
NAMED_GROUPS = ("model", "dataset", "decode")
"""Config groups whose choice has a name that reports show."""
SIDES: tuple[Side, ...] = ("tuned", "base", "reference")
"""The tuned model; the base model; the reference texts, scored as if the base had written them."""


class ModelInfo(StrictModel):
    """The base model."""

    name: str = Field(description="`model.name`")
    id: str = Field(description="determines its weights: a hash, or a commit, and the dtype")
    location: str = Field(
        description="where its files come from: `repo@commit` on the Hub, or a folder"
    )


class DatasetInfo(StrictModel):
    """The documents that were trained on, and how they were split."""

    name: str = Field(description="`dataset.name`")
    fingerprint: str = Field(description="id of the documents' artifact")
    source: str = Field(
        description="what they are read from: `repo@commit` on the Hub, or a hash of the files"
    )
    documents: int = Field(description="documents, with exact copies")
    distinct: int = Field(description="without exact copies")
    groups: int = Field(description="groups of near-duplicates, which are split as one")
    held_out: int = Field(description="documents held out for evaluation, one of each group")
    validation: int = Field(description="documents for validation, one of each group")
    train: int = Field(description="documents for training")
    near_duplicate_train_sequences: int = Field(
        description="training sequences that nearly repeat another one"
    )


class Timings(StrictModel):
    """Wall-clock times; durations are in seconds."""

    run_seconds: float = Field(description="this run, without what existed already")
    build_seconds: dict[str, float] = Field(
        description="by artifact, how long building it took when it was built; without those whose "
        "build was interrupted and resumed"
    )
    finished_at: str | None = Field(
        default=None,
        pattern=r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z$",
        description="when the record was made, in UTC, such as `2026-11-28T12:40:00Z`; null: an "
        "earlier version made it",
    )


class Sample(StrictModel):
    """One evaluation text."""

    dataset: str = Field(description="name of its evaluation dataset")
    context: SampleText = Field(description="the text that both models were given")
    tuned: Continuation = Field(description="the tuned model's continuation")
    base: Continuation = Field(description="the base model's continuation")
    reference: Continuation = Field(
        description="how the original document continues, as far as it is scored"
    )


class Slice(StrictModel):
    """Scores over one evaluation dataset (or all), at one length of the continuations."""

    dataset: str | None = Field(description="evaluation dataset; null: all texts")
    max_new_tokens: int = Field(description="length of the continuations, in tokens")
    tuned: dict[str, Estimate] = Field(description="by metric, of the tuned model")
    base: dict[str, Estimate] = Field(
        description="the same of the base model, on the same texts with the same decoding"
    )
    reference: dict[str, Estimate] = Field(
        description="`gen/` metrics of the references, as if the base model had written them"
    )
    difference: dict[str, Difference] = Field(
        description="tuned minus base, paired by text, with the p-value of a permutation test"
    )

    def estimates(self, side: Side) -> dict[str, Estimate]:
        """Return one side's estimates by metric."""
        estimates: dict[str, Estimate] = getattr(self, side)
        return estimates


class NextToken(StrictModel):
    """A candidate for the next token."""

    text: str = Field(description="its text")
    id: int = Field(description="token id")
    probability: float = Field(description="its probability")
    in_training_data: bool = Field(description="whether a training sequence contains it")


class Position(StrictModel):
    """The most likely next tokens at one position of a text."""

    tuned: list[NextToken] = Field(description="by the tuned model, most likely first")
    base: list[NextToken] = Field(description="by the base model, most likely first")


class NextTokens(StrictModel):
    """The most likely next tokens along a dataset's first text (`evaluation.top_tokens`)."""

    token_texts: list[str] = Field(description="text of each token of the text (T)")
    positions: list[Position] = Field(description="after each token but the last (T - 1)")


class PerSide(StrictModel):
    """Per-step means over texts and per-text values: tuned, base and reference."""

    tuned: dict[str, list[float | None]] = Field(description="of the tuned model")
    base: dict[str, list[float | None]] = Field(description="of the base model")
    reference: dict[str, list[float | None]] = Field(description="of the references")

    def values(self, side: Side) -> dict[str, list[float | None]]:
        """Return one side's values by metric."""
        values: dict[str, list[float | None]] = getattr(self, side)
        return values


class Histograms(StrictModel):
    """Counts of texts by the length of their longest overlap: 0, 1, 2, … tokens."""

    tuned: list[int] = Field(description="of the tuned model")
    base: list[int] = Field(description="of the base model")
    reference: list[int] = Field(description="of the references")


class ImageInfo(StrictModel):
    """How the tokens of an image model become images: one a pixel, in raster order."""

    height: int = Field(description="rows of an image")
    width: int = Field(description="pixels of a row")
    palette: list[tuple[int, int, int]] = Field(
        description="red, green and blue (0 to 255) of each token"
    )
    sos: int | None = Field(
        description="the token that begins each context and is no pixel; null: they begin with one"
    )


class Record(StrictModel):
    """The record of a finished run. Only `timings`, `code.git` and `machine` may differ between
    repetitions, and `generation_batches` where the free memory decides."""

    schema_version: int = Field(description=f"version of this format: {SCHEMA_VERSION}")
    config: dict[str, Any] = Field(description="the resolved config")
    versions: dict[str, str] = Field(description="Python and package versions")
    code: CodeVersion = Field(description="the code that made it")
    device: str = Field(description="torch device, with the name of a GPU")
    machine: Machine = Field(description="the machine that it was made on")
    generation_batches: dict[str, list[int]] = Field(
        description="by artifact of continuations, the number of texts in each batch that was "
        "generated: fixed by `hardware.generation_batch_size`, else by the free memory"
    )
    model: ModelInfo = Field(description="the base model")
    dataset: DatasetInfo = Field(description="the documents that were trained on")
    image: ImageInfo | None = Field(
        default=None, description="of an image model; null: its tokens are text"
    )
    recognition: Recognition | None = Field(
        default=None,
        description="predicted classes of completed images; null: there is no classifier",
    )
    artifacts: dict[str, str] = Field(description="folder of each artifact of this run")
    timings: Timings = Field(description="wall-clock times")
    notes: list[str] = Field(
        description="what a reader must know: empty continuations, datasets with one text, …"
    )
    slices: list[Slice] = Field(
        description="scores by dataset and length; the first is overall: all texts, full length"
    )
    history: list[MetricsRow] = Field(
        description="one row per epoch: `epoch`, `step`, `train/loss`, and where it was validated "
        "`val/loss`, `val/entropy`, `gen/ttr`, `gen/rep_2` on the validation sequences"
    )
    per_step: PerSide = Field(
        description="mean `gen/entropy`, `gen/top1_mass` and `gen/ttr_last_96` at each step of the "
        "continuations; null before the 96th"
    )
    per_text: PerSide = Field(description="by metric one value per text (null: it has none)")
    overlap_histogram: Histograms = Field(description="longest overlaps with the training data")
    next_tokens: dict[str, NextTokens] = Field(
        description="by evaluation dataset, the most likely next tokens along its first text"
    )
    samples: list[Sample] = Field(description="one per evaluation text")
    mechanism: Mechanism | None = Field(
        description="base and tuned model compared; null: `mechanism.measures` has none"
    )
    downstream: Downstream | None = Field(
        None,
        description="benchmarks of base and tuned model; null: `evaluation.downstream` is empty",
    )
    chat: Chat | None = Field(
        None, description="answers to open questions; null: `evaluation.chat` is off"
    )

    @model_validator(mode="after")
    def _check(self) -> "Record":
        """Check the invariants across fields that every written record satisfies."""
        for problem in _inconsistencies(self):
            raise ValueError(problem)
        return self

    @property
    def overall(self) -> Slice:
        """The scores over all texts, at full length."""
        return self.slices[0]

    @property
    def is_tuned(self) -> bool:
        """Whether a model was trained; else `tuned` is the base model."""
        return bool(self.config["tuning"]["method"] != "none")

    @property
    def tuned_label(self) -> str:
        """What stands in the tuned model's place, for headings: mostly `tuned` itself."""
        intervention = self.config.get("intervention", {}).get("method", "none")
        control = self.config["decode"].get("control", {}).get("method", "none")
        changes = [change for change in (intervention, control) if change != "none"]
        return " + ".join(changes) or "tuned"

    def steps(self, key: str, side: Side = "tuned") -> list[float | None]:
        """Return a metric at each step of a model's own continuations; empty: none.

        Those that compare both models (`mech/`) are of the side `tuned`.
        """
        values = self.per_step.values(side).get(key)
        if values is None and self.mechanism is not None and side == "tuned":
            values = self.mechanism.per_step.get(key)
        return values or []

    def estimate(self, part: Slice, side: Side, key: str) -> Estimate | None:
        """Return a metric of a slice, or one that compares base and tuned model over all texts."""
        compared = self.mechanism.estimates if self.mechanism and part is self.overall else {}
        if self.downstream and part is self.overall and side != "reference":
            compared = compared | self.downstream.estimates[side]
        return part.estimates(side).get(key) or compared.get(key)

    def name(self, group: str) -> str:
        """Return the name of what was chosen of a config group, such as `model`."""
        return str(self.config[group]["name"])

    def slice_at(self, length: int | None = None, dataset: str | None = None) -> Slice | None:
        """Return the scores of a dataset (none: all) at a length (none: the full one), if any.

        A record of one dataset has no slices by dataset: the overall one is that dataset's. The
        dataset `chat` is the answers to open questions, at the length `chat.max_new_tokens`.
        """
        if dataset == CHAT and (answers := self.answers):
            return answers if length in (None, answers.max_new_tokens) else None
        length = length or self.overall.max_new_tokens
        if {sample.dataset for sample in self.samples} == {dataset}:
            dataset = None
        for part in self.slices:
            if part.max_new_tokens == length and part.dataset == dataset:
                return part
        return None

    @property
    def answers(self) -> Slice | None:
        """The scores of the answers to open questions; none: no question was asked."""
        if self.chat is None:
            return None
        scores = self.chat.model_dump(exclude={"answers", "per_text"})
        return Slice(dataset=CHAT, reference={}, **scores)

    @property
    def texts(self) -> list[Sample]:
        """The samples, then the answers to questions as continuations of these.

        An answer's dataset is `chat`, and it has no reference: an empty text.
        """
        nothing = Continuation(text="", tokens=[], token_texts=[], overlap=NO_OVERLAP)
        return self.samples + [
            Sample(
                dataset=CHAT,
                context=SampleText(text=answer.question, tokens=[], token_texts=[]),
                tuned=answer.tuned,
                base=answer.base,
                reference=nothing,
            )
            for answer in (self.chat.answers if self.chat else ())
        ]

    def text_values(self, side: Side, key: str) -> list[float | None]:
        """Return a metric of each of `texts`; null: it has none."""
        values = self.per_text.values(side).get(key) or [None] * len(self.samples)
        if self.chat is None:
            return values
        missing: list[float | None] = [None] * len(self.chat.answers)
        return values + self.chat.per_text.get(side, {}).get(key, missing)


def _inconsistencies(record: Record) -> Iterator[str]:
    """Yield which fields do not fit each other, or lack what every run has."""
    if not record.slices:
        yield "slices: there is none"
    if not record.samples:
        yield "samples: there is none"
    for row in record.history:
        if not {"epoch", "step", "train/loss"} <= row.keys():
            yield "history: a row lacks epoch, step or train/loss"
    for dataset, along in record.next_tokens.items():
        if len(along.positions) > len(along.token_texts):
            yield f"next_tokens.{dataset}: more positions than token_texts"
        if any(not position.tuned for position in along.positions):
            yield f"next_tokens.{dataset}: a position without tokens"
    yield from _config_inconsistencies(record.config)
    yield from _text_inconsistencies(record)


def _config_inconsistencies(config: Mapping[str, Any]) -> Iterator[str]:
    reported: dict[tuple[str, str], type] = {(group, "name"): str for group in NAMED_GROUPS}
    reported |= {("tuning", "method"): str, ("evaluation", "bootstrap"): int}
    for (group, name), kind in reported.items():
        values = config.get(group)
        if not isinstance(values, dict) or not isinstance(values.get(name), kind):
            yield f"config.{group}.{name}: is missing or not a {kind.__name__}"


def _text_inconsistencies(record: Record) -> Iterator[str]:
    n = len(record.samples)
    for side in SIDES:
        for key, values in record.per_text.values(side).items():
            if len(values) != n:
                yield f"per_text.{side}.{key}: {len(values)} values of {n} samples"
    for answers in (record.chat.per_text if record.chat else {}).values():
        for key, values in answers.items():
            if len(values) != len(record.texts) - n:
                yield f"chat.per_text: {len(values)} values of {key}, not one per answer"
    for sample in record.texts:
        for text in (sample.context, sample.tuned, sample.base, sample.reference):
            if len(text.tokens) != len(text.token_texts):
                yield f"samples: {len(text.token_texts)} token_texts of {len(text.tokens)} tokens"
