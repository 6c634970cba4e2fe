"""A small study for tests, with texts that are awkward to carry through files."""

from pathlib import Path

from hyperfitting.preference.items import (
    Annotator,
    Aspect,
    Form,
    Item,
    Origin,
    Question,
    Task,
    Text,
    write_task,
)

AWKWARD = (
    "=1+1", "+cmd|' /C calc'!A0", "-2", "@SUM(A1)", "\tindented", "'quoted'", "''", " =1",
    'she said "no", twice', "two\nlines\n\nand more", "<script>alert(1)</script> & more",
    "naïve – “quotes” 漢字 🙂", "{{ 7 * 7 }} ${x} %s", "ends with a backslash \\",
)  # fmt: skip


def make_item(
    number: int, run_text: str, real_text: str, context: str = "It was", **fields: object
) -> Item:
    """One item: the run's text first, the real one second."""
    tuned = Origin(run="hidden-run", side="tuned", sample=number)
    reference = Origin(run="hidden-run", side="reference", sample=number)
    return Item.model_validate(
        {
            "dataset": "hidden-dataset", "length": 96, "context": f"{context} {number}",
            "first": Text(text=run_text, origin=tuned),
            "second": Text(text=real_text, origin=reference),
        } | fields
    )  # fmt: skip


def make_task(
    items: list[Item],
    annotators: tuple[str, ...] = ("alice", "bob"),
    form: Form = "p1",
    aspects: tuple[Aspect, ...] = (),
) -> Task:
    """A study in which everybody judges everything."""
    ids = tuple(item.id for item in items)
    return Task(
        sweep="hidden-sweep",
        question=Question(
            form=form, wording="Which continuation do you prefer?",
            guidelines="Read both & decide.\nLength does not matter.", aspects=aspects,
        ),
        seed=0, votes=len(annotators), texts={},
        annotators={name: Annotator(kind="script", items=ids) for name in annotators},
        items=tuple(items),
    )  # fmt: skip


def write_study(folder: Path, task: Task) -> Path:
    """Write its task file; return its folder."""
    write_task(folder, task)
    return folder


def awkward_task(**fields: object) -> Task:
    """A study of the awkward texts."""
    items = [
        make_item(n, text, f"{AWKWARD[-n - 1]} real", context=text)
        for n, text in enumerate(AWKWARD)
    ]
    return make_task(items, **fields)
