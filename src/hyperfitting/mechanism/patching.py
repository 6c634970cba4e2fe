"""Activation patching: does one block's output of the tuned model break the base model's loop?

The base model's greedy continuation of a context begins to repeat a span of `LOOP_TOKENS` tokens at
some position. There, once, the output of block k is replaced by the tuned model's, given the same
preceding tokens; everything before and after is the base model's own. For each block separately:

    base continuations -> patch_states   the tuned model's block outputs at these positions
                       -> patching       by text and block, what changes

Decoding is the run's; the position is the last of its prefix, so nothing before it changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hyperfitting.data.sequences import load_evaluation_texts
from hyperfitting.decoding.backends.plain import PlainBackend
from hyperfitting.decoding.constraints import Constraints
from hyperfitting.decoding.generate import eos_ids
from hyperfitting.errors import UserError
from hyperfitting.evaluation.arrays import load_continuations, save_array
from hyperfitting.evaluation.setting import LazyModel, Setting
from hyperfitting.mechanism.hidden_states import hidden_states_of, recorded_states
from hyperfitting.metrics.diversity import LOOP_TOKENS
from hyperfitting.models.layers import blocks
from hyperfitting.store.artifact import Artifact, Step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERSION = 1
N_NEW = 32
"""Tokens that are decoded from the patched position on."""
PATCHING = ("changed", "broken")
"""By text and block: whether the next token is another than in the base model's continuation; and
whether none of the spans of `LOOP_TOKENS` tokens within the next `N_NEW` is a repeat, so that one
that begins in the last ``LOOP_TOKENS - 1`` of these is not seen.

There is no unpatched row beside the patched ones: the continuation was decoded in other batches,
and on a GPU by another backend, so where two tokens are nearly tied, `changed` may be rounding."""
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
        version=VERSION,
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
                    model = base()
                    constraints = Constraints(
                        setting.decode, eos_ids(model), setting.evaluation.context_len
                    )
                    tokens = patched_continuations(
                        model, prefix[:-1], torch.from_numpy(states[row]), constraints
                    )
                    values["changed"][row] = tokens[:, 0] != prefix[-1]
                    values["broken"][row] = [not _repeats(prefix[:-1], new) for new in tokens]
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


def repeat_prefix(tokens: NDArray[np.int64], start: int) -> NDArray[np.int64] | None:
    """Return a text up to and including the token with which it begins to repeat itself.

    Args:
        tokens: (T,) context and continuation.
        start: length of the context.

    Returns:
        (t + 1,), where t is the first position of the continuation at which a span of
        `LOOP_TOKENS` tokens begins that has begun before; None if there is none.
    """
    seen: set[tuple[int, ...]] = set()
    for t in range(len(tokens) - LOOP_TOKENS + 1):
        span = tuple(tokens[t : t + LOOP_TOKENS].tolist())
        if t >= start and span in seen:
            return tokens[: t + 1]
        seen.add(span)
    return None


def _repeats(prefix: NDArray[np.int64], new_tokens: NDArray[np.int64]) -> bool:
    return repeat_prefix(np.concatenate([prefix, new_tokens]), len(prefix)) is not None


@torch.inference_mode()
def block_outputs(model: PreTrainedModel, prefix: NDArray[np.int64]) -> Tensor:
    """Return the output (L, H) of each block at the position that predicts a prefix's last token.

    Args:
        model: in evaluation mode.
        prefix: (t + 1,) tokens; the last one is what is predicted.
    """
    with recorded_states(blocks(model)) as states:
        model(input_ids=_ids(model, prefix[None, :-1]), use_cache=False)
    return torch.stack([state[0, -1].float().cpu() for state in states[1:]])


@torch.inference_mode()
def patched_continuations(
    model: PreTrainedModel, prefix: NDArray[np.int64], states: Tensor, constraints: Constraints
) -> NDArray[np.int64]:
    """Continue a prefix greedily, with the output of one block replaced at its last position.

    The blocks are the rows of one batch over the same cache: a step for all of them costs little
    more than for one.

    Args:
        model: in evaluation mode.
        prefix: (t,) tokens.
        states: (L, H) the outputs of its blocks at the last of them, one for each row.
        constraints: of decoding.

    Returns:
        (L, N_NEW) greedy tokens, a row for each block patched.
    """
    n_blocks = len(states)
    cached = PlainBackend().start(model, len(prefix) + N_NEW)
    if len(prefix) > 1:
        cached(_ids(model, prefix[None, :-1]))
        cached.expand(n_blocks)
    tokens = _ids(model, prefix[None]).expand(n_blocks, -1)  # (L, t)
    with _patched(model, states.to(model.device, model.dtype)):
        logits = cached(tokens[:, -1:])  # (L, V)
    for step in range(N_NEW):
        if step:
            logits = cached(tokens[:, -1:])
        chosen = constraints(tokens, logits).argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, chosen], dim=1)
    new_tokens: NDArray[np.int64] = tokens[:, len(prefix) :].cpu().numpy()
    return new_tokens


@contextmanager
def _patched(model: PreTrainedModel, states: Tensor) -> Iterator[None]:
    """Replace the output of block k in row k by ``states[k]``, at the last position."""

    def hook_of(k: int) -> Any:
        def replace(_: Any, __: Any, output: Any) -> Any:
            hidden = hidden_states_of(output).clone()  # (L, 1, H)
            hidden[k, -1] = states[k]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return replace

    hooks = [block.register_forward_hook(hook_of(k)) for k, block in enumerate(blocks(model))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _ids(model: PreTrainedModel, tokens: NDArray[np.int64]) -> Tensor:
    return torch.as_tensor(tokens, dtype=torch.long, device=model.device)


def _stack(states: Sequence[Tensor | None], shape: tuple[int, int]) -> NDArray[np.float32]:
    """Return (N, L, H), NaN for a text without a repeat. ``shape``: (L, H)."""
    rows = [torch.full(shape, torch.nan) if state is None else state for state in states]
    stacked: NDArray[np.float32] = torch.stack(rows).numpy()
    return stacked
