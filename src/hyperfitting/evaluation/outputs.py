"""From a model's artifacts to what is scored: arrays and samples of all evaluation texts."""

from collections.abc import Iterable, Mapping

from hyperfitting.data.sequences import EvaluationTexts
from hyperfitting.evaluation.arrays import load_arrays, load_continuations
from hyperfitting.evaluation.artifacts import LOGLIKELIHOODS, ModelArtifacts
from hyperfitting.evaluation.config import EvaluationConfig
from hyperfitting.evaluation.forward import TOKEN_STATS
from hyperfitting.evaluation.scoring import ModelOutput, TokenizedText
from hyperfitting.metrics.distribution import STEP_STATS
from hyperfitting.metrics.inputs import FeaturePair
from hyperfitting.store.artifact import Step


def model_output(artifacts: ModelArtifacts) -> ModelOutput:
    """Return what a model predicted and generated; its artifacts must be built."""
    samples = {
        name: load_continuations(step.artifact) for name, step in artifacts.continuations.items()
    }
    return ModelOutput(
        datasets=[name for name, texts in samples.items() for _ in texts],
        token_stats=load_arrays(artifacts.token_stats, TOKEN_STATS),
        step_stats=load_arrays(artifacts.continuations, STEP_STATS),
        # the base model's own step statistics are its log-likelihoods
        base_loglikelihoods=load_arrays(
            artifacts.base_loglikelihoods or artifacts.continuations, LOGLIKELIHOODS
        ),
        continuations=[TokenizedText(**text) for texts in samples.values() for text in texts],
        mauve_features=_features(artifacts.mauve_features),
        image_features=_features(artifacts.image_features),
    )


def _features(steps: Mapping[str, Step]) -> FeaturePair | None:
    """Return the features of continuations (N, D) and of references (N, D); none: not computed."""
    if not steps:
        return None
    continuations, references = (
        load_arrays({n: s for n, s in steps.items() if n.startswith(kind)}, ("features",))
        for kind in ("continuation/", "reference/")
    )
    return continuations["features"], references["features"]


def reference_output(
    base: ModelOutput, references: Iterable[EvaluationTexts], evaluation: EvaluationConfig
) -> ModelOutput:
    """Return the references as if the base model had generated them.

    Args:
        base: the base model's output.
        references: the evaluation texts of each dataset, in the order of the output.
        evaluation: where continuations start and how long they are.
    """
    start, length = evaluation.context_len, evaluation.continuation_len
    stats = {name: values[:, start - 1 :][:, :length] for name, values in base.token_stats.items()}
    return ModelOutput(
        datasets=base.datasets,
        token_stats=base.token_stats,
        step_stats=stats,
        base_loglikelihoods=stats,
        continuations=_texts(references, slice(start, start + length)),
    )


def contexts(
    references: Iterable[EvaluationTexts], evaluation: EvaluationConfig
) -> list[TokenizedText]:
    """Return what the models continue, in the order of their outputs."""
    return _texts(references, slice(evaluation.context_len))


def _texts(references: Iterable[EvaluationTexts], part: slice) -> list[TokenizedText]:
    return [
        TokenizedText(tokens[part], texts[part])
        for dataset in references
        for tokens, texts in zip(dataset.tokens.tolist(), dataset.token_texts, strict=True)
    ]
