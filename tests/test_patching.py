"""Activation patching against a plain full forward pass with a hook, without cache or batch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hyperfitting.decoding.config import DecodeConfig
from hyperfitting.decoding.constraints import Constraints
from hyperfitting.errors import UserError
from hyperfitting.mechanism.patching import (
    N_NEW,
    block_outputs,
    norm_matched_random_patch,
    patch_effect,
    patched_continuations,
    repeat_prefix,
)
from hyperfitting.mechanism.patching_steps import PATCHING
from hyperfitting.metrics.diversity import LOOP_TOKENS
from hyperfitting.models.base import BaseModel
from hyperfitting.models.layers import blocks
from hyperfitting.models.loading import load
from hyperfitting.record.files import RECORD_FILE, read_record
from hyperfitting.record.schema import Record
from tests.cli import hyperfit
from tests.conftest import Compose

PREFIX = np.random.default_rng(0).integers(0, 256, 9)
NO_CONSTRAINTS = Constraints(DecodeConfig("greedy", stop_at_eos=True, seed=0), [], 4)


def other_model(base: BaseModel) -> Any:
    """The base model with other weights, as a tuned one has."""
    model = load(base).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def patched_by_hand(model: Any, tuned: Any, block: int) -> list[int]:
    """Greedy tokens: every step a full forward pass, with the block's output at one place."""
    outputs: list[Any] = []
    hook = blocks(tuned)[block].register_forward_hook(lambda *a: outputs.append(a[-1]))
    tuned(torch.as_tensor(PREFIX[None]), use_cache=False)
    hook.remove()
    state = (outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0])[0, -1]

    def patch(_: Any, __: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[0, len(PREFIX) - 1] = state
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    tokens = PREFIX.tolist()
    hook = blocks(model)[block].register_forward_hook(patch)
    for _ in range(N_NEW):
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
        tokens.append(int(logits.argmax()))
    hook.remove()
    return tokens[len(PREFIX) :]


def test_patched_texts_are_those_of_a_plain_hooked_forward_pass(any_base: BaseModel) -> None:
    model, tuned = load(any_base).eval(), other_model(any_base)
    states = block_outputs(tuned, np.append(PREFIX, 0))
    tokens = patched_continuations(model, PREFIX, states, NO_CONSTRAINTS)
    expected = [patched_by_hand(model, tuned, block) for block in range(len(states))]
    assert tokens[1:].tolist() == expected
    unpatched = patched_by_hand(model, model, 0)  # its own states change nothing
    assert tokens[0].tolist() == unpatched
    own = block_outputs(model, np.append(PREFIX, 0))
    assert {
        tuple(row) for row in patched_continuations(model, PREFIX, own, NO_CONSTRAINTS).tolist()
    } == {tuple(unpatched)}
    assert any(row != unpatched for row in expected)
    assert not any(block._forward_hooks for block in blocks(model))


def test_the_last_blocks_output_alone_decides_the_next_token(base: BaseModel) -> None:
    """With the same final norm and output layer, patching it gives the tuned model's token."""
    model, tuned = load(base).eval(), load(base).eval()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in blocks(tuned).parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        expected = tuned(torch.as_tensor(PREFIX[None])).logits[0, -1].argmax()
    states = block_outputs(tuned, np.append(PREFIX, 0))
    tokens = patched_continuations(model, PREFIX, states, NO_CONSTRAINTS)
    assert tokens[-1, 0] == expected  # the last row is of the last block


def test_the_control_is_as_far_in_a_direction_of_its_own() -> None:
    generator = np.random.default_rng(0)
    states, others = (
        torch.tensor(generator.normal(size=(6, 4_000)), dtype=torch.float32) for _ in range(2)
    )
    control = norm_matched_random_patch(states, others, seed=1)
    moved, distance = (control - states).numpy(), (others - states).numpy()
    np.testing.assert_allclose(
        np.linalg.norm(moved, axis=1), np.linalg.norm(distance, axis=1), rtol=1e-5
    )
    cosines = np.corrcoef(np.concatenate([moved, distance])) - np.eye(12)
    assert np.abs(cosines).max() < 5 / np.sqrt(4_000)  # no block shares a direction
    assert norm_matched_random_patch(states, others, seed=1).equal(control)
    assert not norm_matched_random_patch(states, others, seed=2).equal(control)
    unmoved = norm_matched_random_patch(states, states, seed=1)
    assert unmoved.equal(states)


def test_a_text_that_does_not_repeat_unpatched_does_not_count() -> None:
    unit = np.arange(LOOP_TOKENS)
    prefix = np.concatenate([unit, [50]])
    repeating = np.resize(unit, N_NEW)
    other = np.concatenate([[60], np.arange(100, 99 + N_NEW)])
    changed, broken = patch_effect(prefix, np.stack([repeating, repeating, other]))
    assert changed.tolist() == [0, 1]
    assert broken.tolist() == [0, 1]
    for measured in patch_effect(prefix, np.stack([other, repeating, other])):
        assert np.isnan(measured).all()


def test_a_repeat_begins_where_a_span_was_seen_before() -> None:
    def prefix(tokens: list[int], start: int) -> list[int] | None:
        found: NDArray[np.int64] | None = repeat_prefix(np.array(tokens), start)
        return None if found is None else found.tolist()

    n = LOOP_TOKENS
    unit = list(range(n))
    assert prefix([*unit, 50, *unit], 4) == [*unit, 50, 0]
    assert prefix([*unit, 50, *unit[:-1]], 4) is None  # a token too short
    assert prefix([*unit, *unit], n + 1) is None  # it begins in the context
    assert prefix([7] * (n + 3), 0) == [7, 7]  # spans may overlap
    assert prefix(list(range(5 * n)), 0) is None


def record(folder: Path) -> Record:
    return read_record(folder / RECORD_FILE)


def test_a_run_measures_one_block_and_a_sweep_shares_all(debug_run: Path) -> None:
    plain = record(debug_run / "run")
    store = debug_run / "outputs/store"
    for block in (1, 4):
        result = hyperfit(
            debug_run, "preset=debug", f"hydra.run.dir=patched_{block}",
            f"evaluation.patch_block={block}",
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert len(list((store / "patching").glob("*/manifest.json"))) == 1
    patched = record(debug_run / "patched_4")
    for name in PATCHING:
        estimate = patched.overall.tuned[f"patch/{name}"]
        assert estimate.n == 4  # all base texts of the debug run are loops
        assert 0 <= estimate.mean <= 1
        assert f"patch/{name}" not in plain.overall.tuned
    kept = {key: value for key, value in patched.overall.tuned.items() if "patch/" not in key}
    assert kept == plain.overall.tuned
    assert patched.overall.difference == plain.overall.difference


def test_a_block_beyond_the_model_is_refused_before_training(tmp_path: Path) -> None:
    result = hyperfit(tmp_path, "preset=debug", "evaluation.patch_block=5")
    assert result.returncode == 1
    assert "evaluation.patch_block=5: the model has fewer blocks" in result.stderr
    assert not (tmp_path / "outputs/store/tuned").exists()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ("evaluation.patch_block=1 tuning=none", "needs a tuned model"),
        ("evaluation.patch_block=1 decode=top_p", "only with decode.strategy=greedy"),
        ("evaluation.patch_block=0", "1 or more"),
    ],
)
def test_a_bad_patch_names_field_and_remedy(compose: Compose, overrides: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        compose("preset=debug", *overrides.split())
    assert says in str(error.value)
