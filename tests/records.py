"""Records and sweeps as reports read them, without running anything."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hyperfitting.metrics.accuracy import McNemar
from hyperfitting.metrics.estimate import Difference, Estimate
from hyperfitting.metrics.uncertainty import bootstrap_mean
from hyperfitting.record.chat import Chat, ChatAnswer
from hyperfitting.record.downstream import DownstreamTask, TaskScore
from hyperfitting.record.files import Predictions, write_record
from hyperfitting.record.mechanism import ClassShift, LayerCurve, Mechanism, RankShift, TokenChange
from hyperfitting.record.recognition import Recognition
from hyperfitting.record.schema import (
    SCHEMA_VERSION,
    DatasetInfo,
    Histograms,
    ImageInfo,
    ModelInfo,
    NextToken,
    NextTokens,
    PerSide,
    Position,
    Record,
    Sample,
    Slice,
    Timings,
)
from hyperfitting.record.texts import NO_OVERLAP, Continuation, OverlapSpan, SampleText
from hyperfitting.runtime.code_version import CodeVersion
from hyperfitting.runtime.machine import Machine
from hyperfitting.sweep.spec import RunEntrySpec, write_sweep_spec

SYSTEMS: dict[str, list[str]] = {"base": ["tuning=none"], "tuned": []}
SEEDS = (0, 1, 2)
_PALETTE = [(0, 0, 0), (255, 0, 0), (0, 255, 0), (255, 255, 255)]
_IMAGE = ImageInfo(height=4, width=4, palette=_PALETTE, sos=4)


def make_continuation(words: str, overlap: tuple[int, int] = (0, -1)) -> Continuation:
    """Return a continuation of one token a word; ``overlap`` is its length and start."""
    token_texts = [f" {word}" for word in words.split()]
    length, start = overlap
    index = 0 if length else -1
    return Continuation(
        text="".join(token_texts),
        tokens=[sum(token_text.encode()) for token_text in token_texts],
        token_texts=token_texts,
        overlap=OverlapSpan(length=length, start=start, sequence=index, offset=index),
    )


def make_sample(
    tuned: Continuation,
    base: Continuation,
    dataset: str = "news",
    context: str = "a context",
    reference: str = "the reference",
) -> Sample:
    return Sample(
        dataset=dataset,
        context=SampleText(text=context, tokens=[1], token_texts=[context]),
        reference=Continuation(
            text=reference, tokens=[2], token_texts=[reference], overlap=NO_OVERLAP
        ),
        tuned=tuned,
        base=base,
    )


def make_samples(count: int) -> list[Sample]:
    tuned, base = make_continuation("on and on and on"), make_continuation("on it went")
    return [make_sample(tuned, base, context=f"text {i}") for i in range(count)]


def make_slice(
    tuned: Mapping[str, Estimate],
    base: Mapping[str, Estimate] | None = None,
    difference: Mapping[str, Difference] | None = None,
    dataset: str | None = None,
    max_new_tokens: int = 32,
) -> Slice:
    return Slice(
        dataset=dataset,
        max_new_tokens=max_new_tokens,
        tuned=dict(tuned),
        base=dict(base or {}),
        reference={},
        difference=dict(difference or {}),
    )


def make_config(**groups: Mapping[str, Any]) -> dict[str, Any]:
    """Return as much of a config as reports read; ``groups`` replace those given here."""
    config: dict[str, Any] = {
        "model": {"name": "m"},
        "dataset": {"name": "d", "n_train": 2, "seq_len": 8},
        "decode": {"name": "greedy"},
        "tuning": {"method": "full"},
        "evaluation": {"bootstrap": 500},
    }
    return config | groups


def make_next_tokens() -> NextTokens:
    """Return next tokens at two positions: at the second a new token becomes certain."""
    seen = NextToken(text=" a", id=1, probability=0.5, in_training_data=True)
    unseen = NextToken(text=" $b", id=2, probability=0.1, in_training_data=False)
    certain = unseen.model_copy(update={"probability": 0.9})
    return NextTokens(
        token_texts=["It", " is", " so"],
        positions=[
            Position(tuned=[seen, unseen], base=[seen, unseen]),
            Position(tuned=[certain, seen], base=[seen, unseen]),
        ],
    )


def make_dataset_info() -> DatasetInfo:
    return DatasetInfo(
        name="d",
        fingerprint="0" * 16,
        source="r@1",
        documents=9,
        distinct=8,
        groups=7,
        held_out=2,
        validation=1,
        train=5,
        near_duplicate_train_sequences=1,
    )


def make_chat(answers: Mapping[str, tuple[str, str]], **fields: Any) -> Chat:
    """Return answers to open questions.

    Args:
        answers: by question the tuned model's and the base model's.
        fields: of the scores, instead of none.
    """
    scores: dict[str, Any] = {"tuned": {}, "base": {}, "difference": {}, "per_text": {}}
    return Chat(
        max_new_tokens=16,
        answers=[
            ChatAnswer(
                question=question, tuned=make_continuation(tuned), base=make_continuation(base)
            )
            for question, (tuned, base) in answers.items()
        ],
        **scores | fields,
    )


def make_task(at_chance: bool) -> DownstreamTask:
    """Return the scores of a task of 50 questions, which both models answer alike."""
    score = TaskScore(
        accuracy=Estimate(0.3, (0.2, 0.4), 50), metric="acc,none", value=0.3, stderr=0.1,
        at_chance=at_chance, calibration=None,
    )  # fmt: skip
    return DownstreamTask(
        form="likelihood", version="1", hash=None, num_fewshot=0, chance=0.25, tuned=score,
        base=score, difference=Difference(0.0, (0.0, 0.0), 50, 1.0), mcnemar=McNemar(0, 0, 1.0),
    )  # fmt: skip


def make_mechanism() -> Mechanism:
    """Return comparisons of a model of two blocks."""
    layers = ["embedding", "block 1", "block 2", "final norm"]
    token = TokenChange(text=" $a", id=1, tuned=3, base=1, logit_change=0.5, rank_gain=2.0)
    nothing = ClassShift(changed=None, tuned=0.0, base=0.0)
    return Mechanism(
        estimates={"mech/last_block_l2": Estimate(22.0, (21.0, 23.0), 3)},
        per_layer={
            "reference/l2": LayerCurve(layers=layers, mean=[0, 1, 2, 3], ci95=[(0, 4)] * 4),
            "weights/spectral": LayerCurve(layers=layers[1:3], mean=[0.1, None], ci95=None),
        },
        per_step={"mech/changed": [0.5] * 20},
        ranks=RankShift(
            edges=[2, 3, 6], counts=[4, 2, 1], classes={"digits": nothing}, gained=[token], lost=[]
        ),
    )


def make_record(
    slices: Sequence[Slice],
    samples: Sequence[Sample],
    per_text: Mapping[str, Mapping[str, list[float | None]]] | None = None,
    history: Sequence[dict[str, float]] = (),
    **fields: Any,
) -> Record:
    """Return a valid record.

    Args:
        slices: scores; the first is the overall one.
        samples: one for each evaluation text.
        per_text: values for each text, by side and metric.
        history: of the training.
        fields: of the record, instead of those given here.
    """
    sides: dict[str, Any] = {"tuned": {}, "base": {}, "reference": {}}
    steps = {"gen/entropy": [1.0] * 20, "gen/top1_mass": [0.5] * 20}
    values: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "config": make_config(),
        "versions": {"torch": "2"},
        "code": CodeVersion(package="0", digest="0" * 16, git=None),
        "device": "cpu",
        "machine": Machine(cpu="a CPU", cores=2, threads=1, system="Linux"),
        "generation_batches": {},
        "model": ModelInfo(name="m", id="0", location="m@1"),
        "dataset": make_dataset_info(),
        "artifacts": {},
        "timings": Timings(run_seconds=5.0, build_seconds={}),
        "notes": [],
        "slices": list(slices),
        "history": list(history),
        "per_step": PerSide(**sides | {"tuned": steps}),
        "per_text": PerSide(**sides | dict(per_text or {})),
        "overlap_histogram": Histograms(tuned=[1, 0, 2], base=[3], reference=[3]),
        "next_tokens": {},
        "samples": list(samples),
        "mechanism": None,
    }
    return Record(**values | fields)


def ttr_record(ttr: Sequence[float], ttr_at_16: float, **fields: Any) -> Record:
    """Return the record of a tuned model with these type-token ratios of its texts."""
    overall = bootstrap_mean(np.array(ttr), 200)
    assert overall is not None
    short = Estimate(ttr_at_16, (ttr_at_16, ttr_at_16), len(ttr))
    values: list[float | None] = list(ttr)
    first = {"epoch": 1, "step": 1, "train/loss": 1.0, "gen/ttr": 0.5}
    last = {"epoch": 2, "step": 2, "train/loss": 0.5, "gen/ttr": 0.5}
    parts: dict[str, Any] = {
        "slices": [
            make_slice({"gen/ttr": overall}),
            make_slice({"gen/ttr": short}, max_new_tokens=16),
        ],
        "samples": make_samples(len(ttr)),
        "per_text": {
            "tuned": {"gen/ttr": values, "gen/dataset_overlap": [1, 7, None][: len(ttr)]},
            "base": {"gen/ttr": values},
        },
        "history": [first, {"epoch": 1.5, "step": 2, "train/loss": 0.7}, last],
        "config": make_config(optimizer={"lr": ttr[0]}),
    }
    return make_record(**parts | fields)


def _colors(tokens: list[int]) -> dict[str, Any]:
    texts = ["" if t == 4 else "{:02x}{:02x}{:02x} ".format(*_PALETTE[t]) for t in tokens]
    return {"text": "".join(texts), "tokens": tokens, "token_texts": texts}


def _completion(tokens: list[int]) -> Continuation:
    return Continuation(**_colors(tokens), overlap=NO_OVERLAP)


def image_record(tuned: int = 1, tuning: str = "full", **fields: Any) -> Record:
    """Return a record of two images; the tuned model paints in one color."""
    samples = [
        Sample(
            dataset="digits <b>",
            context=SampleText(**_colors([4, row, 0, 0, 0])),
            tuned=_completion([tuned] * 12),
            base=_completion([3] * 12),
            reference=_completion([2, 3] * 6),
        )
        for row in range(2)
    ]
    values: dict[str, list[float | None]] = {
        "gen/row_repeat": [1.0, 0.25],
        "gen/rep_2": [0.5, 0.25],
    }
    half = Estimate(0.5, (0.4, 0.6), 2)
    recognition = Recognition(
        n_train=9,
        accuracy=half,
        context_accuracy=half,
        true=[7, 8],
        tuned=[7, 3],
        base=[1, 1],
        reference=[7, 8],
    )
    config = make_config(tuning={"method": tuning})
    parts: dict[str, Any] = {"image": _IMAGE, "recognition": recognition, "config": config}
    return make_record(
        [make_slice({"gen/row_repeat": half})],
        samples,
        {"tuned": values, "base": values},
        **parts | fields,
    )


def make_predictions(seed: int = 0, texts: int = 3, length: int = 4) -> Predictions:
    """Return random top-1 tokens and ranks of both models."""
    random = np.random.default_rng(seed)
    shape = (texts, length)
    return {
        f"{side}/{name}": random.integers(1, 2000, shape)
        for side in ("tuned", "base")
        for name in ("top1", "rank")
    }


def write_sweep(
    folder: Path,
    report: Mapping[str, Any],
    records: Mapping[str, Record],
    command: Sequence[str] = ("hyperfit",),
) -> Path:
    """Write a sweep's folder: two systems and three seeds of one model, with these records."""
    runs = [
        RunEntrySpec(
            name=f"{system}_{seed}",
            labels={"model": "ours", "system": system, "seed": str(seed)},
        )
        for system in SYSTEMS
        for seed in SEEDS
    ]
    write_sweep_spec(
        folder,
        name="x",
        scale="embedded",
        command=list(command),
        axes={"system": SYSTEMS, "seed": list(SEEDS)},
        scales={"embedded": {"axes": {"model": {"ours": []}}},
                "paper": {"axes": {"model": {"another": []}}}},
        report=dict(report),
        runs=runs,
    )  # fmt: skip
    for seed, (name, record) in enumerate(records.items()):
        (folder / name).mkdir()
        write_record(folder / name, record, make_predictions(seed))
    return folder
