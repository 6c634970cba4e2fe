"""Features for MAUVE: a model's last hidden states of whole texts, as artifacts."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from hyperfitting.data.sequences import load_evaluation_texts
from hyperfitting.evaluation.arrays import load_continuations, save_array
from hyperfitting.evaluation.forward import last_hidden_states
from hyperfitting.evaluation.setting import LazyModel, Setting
from hyperfitting.store.artifact import Artifact, Step

VERSION = 1


def mauve_features_steps(
    setting: Setting, model: LazyModel, continuations: Mapping[str, Artifact]
) -> Iterator[tuple[str, Step]]:
    """Yield the steps of MAUVE's features, of contexts with continuations and of references."""
    for dataset, artifact in continuations.items():
        yield f"continuation/{dataset}", _features_step(setting, model, dataset, artifact)
    for dataset in continuations:
        yield f"reference/{dataset}", _features_step(setting, model, dataset, None)


def _features_step(
    setting: Setting, model: LazyModel, dataset: str, continuations: Artifact | None
) -> Step:
    """Return the step of the last hidden states of whole texts: `features.npy` (N, H).

    Args:
        setting: texts and lengths.
        model: gives the hidden states.
        dataset: evaluation dataset.
        continuations: their artifact; none: of the references.
    """
    limit, texts = setting.evaluation.total_len, setting.texts[dataset]

    def build(work: Path) -> None:
        parts = load_evaluation_texts(texts).token_texts
        if continuations is not None:
            start = setting.evaluation.context_len
            parts = [
                context[:start] + continuation["token_texts"]
                for context, continuation in zip(
                    parts, load_continuations(continuations), strict=True
                )
            ]
        whole = ["".join(part) for part in parts]
        tokenizer = model.state.base.tokenizer()
        ids = [list(tokenizer(text).input_ids)[:limit] for text in whole]
        with setting.progress(f"MAUVE features of {dataset}", len(ids), "texts") as advance:
            features = last_hidden_states(
                model(), ids, setting.hardware.evaluation_batch_size, advance
            )
        save_array(work, "features", features)

    artifact = setting.store.artifact(
        "mauve_features",
        version=VERSION,
        config={"limit": limit},
        inputs={"model": model.state.id}
        | (
            {"continuations": continuations.id}
            if continuations is not None
            else {"texts": texts.id}
        ),
    )
    return Step(artifact, build)
