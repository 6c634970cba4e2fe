"""The axes of a sweep and what a command overrides of them."""

import re
from itertools import product
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hyperfitting.errors import UserError
from hyperfitting.sweep.runs import SweepRun, expand_runs, parse_axes

PARSER = OverridesParser.create()


def expand(
    axes: dict[str, Any], *command: str, base_overrides: tuple[str, ...] = ()
) -> list[SweepRun]:
    return expand_runs(base_overrides, parse_axes(axes), command, PARSER)


def test_axes_form_a_product_and_names_are_built_from_the_labels() -> None:
    runs = expand(
        {"model": {"base, greedy": ["tuning=none"], "tuned": []}, "seed": [0, 1]},
        "trainer.epochs=3",
        base_overrides=("preset=debug", "trainer.epochs=2"),
    )
    assert [run.name for run in runs] == [
        "base-greedy_seed=0", "base-greedy_seed=1", "tuned_seed=0", "tuned_seed=1",
    ]  # fmt: skip
    # the command's override replaces the experiment's, and those of the axes come last
    assert runs[0].overrides == ("preset=debug", "trainer.epochs=3", "tuning=none", "seed=0")
    assert runs[3].labels == {"model": "tuned", "seed": "1"}


def test_several_values_in_the_command_are_an_axis_and_replace_the_experiments() -> None:
    runs = expand({"seed": [0, 1]}, "seed=5,6,7", "tuning=full,none")
    assert [run.labels for run in runs] == [
        {"seed": seed, "tuning": tuning} for seed, tuning in product("567", ("full", "none"))
    ]
    assert [run.name for run in expand({"seed": [0, 1]}, "seed=5")] == ["only"]


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_an_override_that_adds_its_field_replaces_the_axis_too(prefix: str) -> None:
    assert [run.overrides for run in expand({"seed": [0, 1]}, f"{prefix}seed=7")] == [
        (f"{prefix}seed=7",)
    ]
    runs = expand({"seed": [0, 1]}, f"{prefix}seed=7,8")
    assert [run.labels for run in runs] == [{"seed": "7"}, {"seed": "8"}]
    assert [run.overrides for run in runs] == [(f"{prefix}seed=7",), (f"{prefix}seed=8",)]


@pytest.mark.parametrize("prefix", ["", "+", "++", "~"])
def test_what_an_axis_sets_cannot_be_overridden(prefix: str) -> None:
    with pytest.raises(UserError, match="axis 'model' varies") as raised:
        expand({"model": {"base": ["tuning=none"]}}, f"{prefix}tuning=full")
    assert str(raised.value).startswith("tuning=full: ")


@pytest.mark.parametrize(
    ("axes", "field"),
    [
        ({"model": {"a": "tuning=none"}}, "model.a"),
        ({"model": {"a": 5}}, "model.a"),
        ({"model": {"a": {"tuning": "none"}}}, "model.a"),
        ({"seed": []}, "axes.seed"),
        ({"seed": None}, "axes.seed"),
        ({"seed": 0}, "axes.seed=0: is neither"),
        ({"seed": "0,1"}, "axes.seed=0,1: is neither"),
    ],
)
def test_an_invalid_axis_is_refused_with_its_name(axes: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError, match=field):
        expand(axes)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=20)
@given(values)
@example([None, "null", "0,1", "a b", "[x]", ""])
def test_hydra_reads_the_value_that_the_axis_has(value: Any) -> None:
    (run,) = expand({"key": [value]})
    (override,) = PARSER.parse_overrides(list(run.overrides))
    assert override.value() == value
    assert type(override.value()) is type(value)


@given(st.dictionaries(st.text(min_size=1, max_size=150), st.just([]), min_size=1, max_size=12))
def test_no_two_runs_share_a_folder(options: dict[str, list[str]]) -> None:
    # labels that differ only in punctuation or in case, and labels that are too long for a path
    names = [
        run.name
        for run in expand({"axis": {label: [f"seed={i}"] for i, label in enumerate(options)}})
    ]
    assert len({name.lower() for name in names}) == len(options)
    for name in names:
        assert len(name) <= 120
        assert re.fullmatch(r"[\w=.+-]+", name)
        assert name not in (".", "..")
