"""The project's dashboard on W&B as code: a workspace, and a report of the same sections.

What is shown is what `hyperfitting.tracking` logs. Made again, they replace themselves: where they
are is noted in a file, so that nobody's links break.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from hyperfitting.errors import UserError
from hyperfitting.reporting import glossary
from hyperfitting.store import write_json

NOTE = "dashboard.json"
TITLE = "Hyperfitting"
_GROUPS = ("choice.model", "choice.dataset", "choice.tuning", "choice.decode")
"""Parts of a run's config that runs are grouped by."""


@dataclass(frozen=True)
class Section:
    """Panels of one question."""

    name: str
    about: str
    panels: Callable[[], list[Any]]


def _line(x: str, *keys: str) -> Any:
    names = ", ".join(glossary.name(key.removeprefix("epoch/")) for key in keys)
    return wr.LinePlot(title=names, x=x, y=list(keys))


def _bar(key: str) -> Any:
    return wr.BarPlot(title=glossary.name(key), metrics=[key], orientation="h")


def _scatter(x: str, y: str) -> Any:
    title = f"{glossary.name(y)} against {glossary.name(x)}"
    return wr.ScatterPlot(title=title, x=wr.SummaryMetric(x), y=wr.SummaryMetric(y))


SECTIONS = (
    Section(
        "Curves",
        "Losses over updates and epochs, with the type-token ratio of greedy continuations over "
        "them: it rises as the training loss goes to zero and the validation loss grows.",
        lambda: [
            _line("step", "train/loss"),
            _line("epoch", "epoch/train/loss", "epoch/val/loss"),
            _line("epoch", "epoch/gen/ttr", "epoch/gen/rep_2"),
            _line("epoch", "epoch/val/entropy"),
        ],
    ),
    Section(
        "Diversity",
        "Of the continuations of held-out texts, at the end of the run.",
        lambda: (
            [_bar(k) for k in ("gen/ttr", "gen/rep_2", "gen/distinct_2", "gen/self_bleu")]
            + [_scatter("val/perplexity", "gen/ttr")]
        ),
    ),
    Section(
        "Sharpening",
        "How sure the model is of the next token, and how often it chooses as the original does.",
        lambda: (
            [_bar(k) for k in ("val/entropy", "val/top1_mass", "val/top1_agreement")]
            + [_scatter("val/entropy", "gen/ttr")]
        ),
    ),
    Section(
        "Overlap",
        "What the continuations share with the training sequences.",
        lambda: (
            [
                _bar(k)
                for k in ("gen/dataset_overlap", "gen/dataset_overlap_over_10", "gen/dataset_bleu")
            ]
            + [wr.MediaBrowser(title="longest shared run", media_keys=["overlap/hyperfitted"])]
        ),
    ),
    Section(
        "Samples",
        "Contexts with their continuations; the darker, the longer the stretch stood in it before.",
        lambda: [
            wr.MediaBrowser(title="coloured by repetition", media_keys=["texts_coloured"]),
            wr.WeavePanelSummaryTable(table_name="texts"),
        ],
    ),
)


def workspace(entity: str, project: str) -> Any:
    """Return the workspace, not saved yet."""
    return ws.Workspace(entity=entity, project=project, name=TITLE, **_content())


def _content() -> dict[str, Any]:
    return {
        "sections": [
            ws.Section(name=section.name, panels=section.panels(), is_open=True)
            for section in SECTIONS
        ],
        "runset_settings": ws.RunsetSettings(groupby=[ws.Config(key) for key in _GROUPS]),
    }


def report(entity: str, project: str) -> Any:
    """Return the report, not saved yet."""
    return wr.Report(
        entity=entity, project=project, title=TITLE, width="fluid", blocks=_blocks(entity, project)
    )


def _blocks(entity: str, project: str) -> list[Any]:
    blocks: list[Any] = [wr.TableOfContents()]
    for section in SECTIONS:
        runs = wr.Runset(
            entity=entity, project=project, groupby=[f"config.{key}" for key in _GROUPS]
        )
        grid = wr.PanelGrid(runsets=[runs], panels=section.panels())
        blocks += [wr.H1(section.name), wr.P(section.about), grid]
    return blocks


def build(entity: str | None, project: str, outputs: Path) -> dict[str, str]:
    """Make the workspace and the report on W&B, or make them again; return where they are.

    Args:
        entity: W&B user or team; none: the default of who is logged in.
        project: W&B project.
        outputs: where it is noted which they are.

    Raises:
        UserError: W&B does not take them.
    """
    import wandb

    path = outputs / NOTE
    try:
        entity = entity or str(wandb.Api().default_entity)
        known = _noted(path).get(f"{entity}/{project}", {})
        made_workspace = _again(ws.Workspace, known.get("workspace"), workspace(entity, project))
        made_workspace.save()
        made_report = _again(wr.Report, known.get("report"), report(entity, project))
        made_report.save()
    except Exception as error:  # whatever W&B and its libraries raise
        raise UserError(
            f"W&B does not take the dashboard: {error}",
            field="project",
            value=f"{entity or '(your default entity)'}/{project}",
            hint="`wandb login`; a project that has runs",
        ) from error
    where = {"workspace": str(made_workspace.url), "report": str(made_report.url)}
    write_json(path, _noted(path) | {f"{entity}/{project}": where})
    return where


def _noted(path: Path) -> dict[str, dict[str, str]]:
    try:
        found: dict[str, dict[str, str]] = json.loads(path.read_text("utf-8"))
        return found
    except (OSError, ValueError):
        return {}


def _again(kind: Any, url: str | None, wanted: Any) -> Any:
    """Return what was made before with the content wanted now; none is there: the wanted itself."""
    if url is None:
        return wanted
    with suppress(Exception):  # somebody has deleted it
        there = kind.from_url(url)
        for name in ("sections", "runset_settings", "blocks", "width"):
            if hasattr(wanted, name):
                setattr(there, name, getattr(wanted, name))
        return there
    return wanted
