"""Activation patching of a run's texts, as artifacts.

    base continuations -> patch_states   the tuned model's block outputs where they begin to repeat
                       -> patching       by text and block, what changes

Decoding is the run's; the position is the last of its prefix, so nothing before it changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hyperfitting.data.sequences import load_evaluation_texts
from hyperfitting.decoding.constraints import Constraints
from hyperfitting.decoding.generate import eos_ids
from hyperfitting.errors import UserError
from hyperfitting.evaluation.arrays import load_continuations, save_array
from hyperfitting.evaluation.setting import LazyModel, Setting
from hyperfitting.mechanism.patching import (
    N_NEW,
    block_outputs,
    norm_matched_random_patch,
    patch_effect,
    patched_continuations,
    repeat_prefix,
)
from hyperfitting.metrics.diversity import LOOP_TOKENS
from hyperfitting.store.artifact import Artifact, Step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STATES_VERSION = 1
VERSION = 2
PATCHING = ("changed", "broken", "random_changed", "random_broken")
"""By text and block: whether the next token is another than without the patch; and whether none of
the spans of `LOOP_TOKENS` tokens within the next `N_NEW` is a repeat, so that one that begins in
the last ``LOOP_TOKENS - 1`` of these is not seen. Then the same of the norm-matched random patch.

NaN for a text without a repeat, also where rounding alone undoes it: the continuation was decoded
in other batches, on a GPU by another backend, and two tokens may be nearly tied."""
_STATES_FILE = "states.npy"


@dataclass(frozen=True)
class _RepeatedTexts:
    """The base model's continuations of a dataset, up to where they begin to repeat themselves."""

    setting: Setting
    dataset: str
    continuations: Artifact

    @property
    def inputs(self) -> dict[str, str]:
        """The ids of what they are read from."""
        texts = self.setting.texts[self.dataset]
        return {"texts": texts.id, "continuations": self.continuations.id}

    def prefixes(self) -> list[NDArray[np.int64] | None]:
        """Return `repeat_prefix` of each text."""
        start = self.setting.evaluation.context_len
        contexts = load_evaluation_texts(self.setting.texts[self.dataset]).tokens[:, :start]
        samples = load_continuations(self.continuations)
        return [
            repeat_prefix(np.array([*context, *sample["tokens"]]), start)
            for context, sample in zip(contexts, samples, strict=True)
        ]


def patching_steps(
    setting: Setting,
    base: LazyModel,
    tuned: LazyModel,
    dataset: str,
    continuations: Artifact,
) -> dict[str, Step]:
    """Return the steps of patching a dataset's texts, inputs first.

    Args:
        setting: texts and decoding.
        base: the model that is patched.
        tuned: the model whose block outputs are taken.
        dataset: name of the evaluation dataset.
        continuations: the base model's.
    """
    texts = _RepeatedTexts(setting, dataset, continuations)
    states = _patch_states_step(texts, tuned)
    return {
        f"patching/states/{dataset}": states,
        f"patching/{dataset}": _patching_step(texts, base, states.artifact),
    }


def _patch_states_step(texts: _RepeatedTexts, tuned: LazyModel) -> Step:
    setting = texts.setting

    def build(work: Path) -> None:
        prefixes = texts.prefixes()
        states: list[Tensor | None] = []
        task = f"reading blocks of {tuned.label} on {texts.dataset}"
        with setting.progress(task, len(prefixes), "texts") as advance:
            for prefix in prefixes:
                states.append(None if prefix is None else block_outputs(tuned(), prefix))
                advance(1)
        shape = tuned.state.base.shape()  # (L, H)
        np.save(work / _STATES_FILE, _stack(states, shape), allow_pickle=False)

    artifact = setting.store.artifact(
        "patch_states",
        version=STATES_VERSION,
        config={"loop_tokens": LOOP_TOKENS},
        inputs=texts.inputs | {"model": tuned.state.id},
    )
    return Step(artifact, build)


def _patching_step(texts: _RepeatedTexts, base: LazyModel, states_artifact: Artifact) -> Step:
    setting = texts.setting

    def build(work: Path) -> None:
        states = np.load(states_artifact.file(_STATES_FILE), allow_pickle=False)  # (N, L, H)
        values = {name: np.full(states.shape[:2], np.nan) for name in PATCHING}
        task = f"patching {base.label} on {texts.dataset}"
        with setting.progress(task, len(states), "texts") as advance:
            for row, prefix in enumerate(texts.prefixes()):
                if prefix is not None:
                    measured = _measure(base(), prefix, torch.from_numpy(states[row]), setting)
                    for name in PATCHING:
                        values[name][row] = measured[name]
                advance(1)
        for name in PATCHING:
            save_array(work, name, values[name])

    artifact = setting.store.artifact(
        "patching",
        version=VERSION,
        config={
            "loop_tokens": LOOP_TOKENS,
            "new_tokens": N_NEW,
            "decode": setting.decode.id_config(blocked=False),
        },
        inputs=texts.inputs | {"model": base.state.id, "states": states_artifact.id},
    )
    return Step(artifact, build)


def _measure(
    model: PreTrainedModel, prefix: NDArray[np.int64], tuned: Tensor, setting: Setting
) -> dict[str, NDArray[np.float64]]:
    """Return `PATCHING` (L,) of one text. ``tuned``: (L, H) `block_outputs` of the tuned model."""
    constraints = Constraints(setting.decode, eos_ids(model), setting.evaluation.context_len)
    own = block_outputs(model, prefix)
    patches = {"": tuned, "random_": norm_matched_random_patch(own, tuned, crc32(prefix.tobytes()))}
    measured = {}
    for kind, states in patches.items():
        tokens = patched_continuations(model, prefix[:-1], states, constraints)
        measured[f"{kind}changed"], measured[f"{kind}broken"] = patch_effect(prefix[:-1], tokens)
    return measured


def load_patching(steps: Sequence[Step], block: int) -> dict[str, NDArray[np.float32]]:
    """Return `PATCHING` (N,) of one block, the first is 1; NaN for a text without a repeat."""
    return {
        name: np.concatenate(
            [
                np.load(step.artifact.file(f"{name}.npy"), allow_pickle=False)[:, block - 1]
                for step in steps
            ]
        )
        for name in PATCHING
    }


def check_block(block: int | None, n_blocks: int) -> None:
    """Refuse a block that the model does not have."""
    if block is not None and block > n_blocks:
        raise UserError(
            "the model has fewer blocks",
            field="evaluation.patch_block",
            value=block,
            valid=f"1 to {n_blocks}",
        )


def _stack(states: Sequence[Tensor | None], shape: tuple[int, int]) -> NDArray[np.float32]:
    """Return (N, L, H), NaN for a text without a repeat. ``shape``: (L, H)."""
    rows = [torch.full(shape, torch.nan) if state is None else state for state in states]
    stacked: NDArray[np.float32] = torch.stack(rows).numpy()
    return stacked
