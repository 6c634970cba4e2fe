"""The project's dashboard on W&B as code: a workspace, and a report of the same sections.

The panels show what `hyperfitting.tracking` logs. Building the dashboard again replaces its content
in place: its URLs are kept in a file, so links stay valid.
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
from hyperfitting.metrics.registry import metric
from hyperfitting.runtime.files import make_folder, write_json

URLS_FILE = "dashboard.json"
TITLE = "Hyperfitting"
_GROUPS = ("choice.model", "choice.dataset", "choice.tuning", "choice.decode")
"""Config values that runs are grouped by."""


@dataclass(frozen=True)
class Section:
    """Panels on one question."""

    name: str
    about: str
    panels: Callable[[], list[Any]]


def _label(key: str) -> str:
    return metric(key.removeprefix("epoch/")).axis_label


def _line(x: str, *keys: str) -> Any:
    return wr.LinePlot(title="; ".join(map(_label, keys)), x=x, y=list(keys))


def _bars(*keys: str) -> list[Any]:
    return [wr.BarPlot(title=_label(key), metrics=[key], orientation="h") for key in keys]


def _scatter(x: str, y: str) -> Any:
    title = f"{_label(y)} against {_label(x)}"
    return wr.ScatterPlot(title=title, x=wr.SummaryMetric(x), y=wr.SummaryMetric(y))


SECTIONS = (
    Section(
        "Curves",
        "Losses by step and epoch, with the type-token ratio of greedy continuations: it rises as "
        "the training loss approaches zero and the validation loss increases.",
        lambda: [
            _line("step", "train/loss"),
            _line("epoch", "epoch/train/loss", "epoch/val/loss"),
            _line("epoch", "epoch/gen/ttr", "epoch/gen/rep_2"),
            _line("epoch", "epoch/val/entropy"),
        ],
    ),
    Section(
        "Diversity",
        "Of the continuations of the evaluation texts, at the end of the run.",
        lambda: [
            *_bars("gen/ttr", "gen/rep_2", "gen/distinct_2", "gen/self_bleu"),
            _scatter("val/perplexity", "gen/ttr"),
        ],
    ),
    Section(
        "Sharpening",
        "Entropy and top-1 mass of the next-token distribution, and top-1 agreement with the base "
        "model.",
        lambda: [
            *_bars("val/entropy", "val/top1_mass", "val/top1_agreement"),
            _scatter("val/entropy", "gen/ttr"),
        ],
    ),
    Section(
        "Overlap",
        "What the continuations share with the training sequences.",
        lambda: [
            *_bars("gen/dataset_overlap", "gen/dataset_overlap_over_10", "gen/dataset_bleu"),
            wr.MediaBrowser(title="longest overlap, tokens", media_keys=["overlap/tuned"]),
        ],
    ),
    Section(
        "Samples",
        "Contexts with their continuations; repeated token runs are shaded, longer ones darker.",
        lambda: [
            wr.MediaBrowser(title="repetition", media_keys=["texts_highlighted"]),
            wr.WeavePanelSummaryTable(table_name="texts"),
        ],
    ),
)


def workspace(entity: str, project: str) -> Any:
    """Return the workspace, not saved yet."""
    sections = [
        ws.Section(name=section.name, panels=section.panels(), is_open=True) for section in SECTIONS
    ]
    runset = ws.RunsetSettings(groupby=[ws.Config(key) for key in _GROUPS])
    return ws.Workspace(
        entity=entity, project=project, name=TITLE, sections=sections, runset_settings=runset
    )


def report(entity: str, project: str) -> Any:
    """Return the report, not saved yet."""
    blocks: list[Any] = [wr.TableOfContents()]
    for section in SECTIONS:
        groups = [f"config.{key}" for key in _GROUPS]
        runs = wr.Runset(entity=entity, project=project, groupby=groups)
        grid = wr.PanelGrid(runsets=[runs], panels=section.panels())
        blocks += [wr.H1(section.name), wr.P(section.about), grid]
    return wr.Report(entity=entity, project=project, title=TITLE, width="fluid", blocks=blocks)


def build(entity: str | None, project: str, outputs: Path) -> dict[str, str]:
    """Build the workspace and the report on W&B, or replace their content; return their URLs.

    Args:
        entity: W&B user or team; none: the default of the current login.
        project: W&B project.
        outputs: folder in which their URLs are kept.

    Raises:
        UserError: W&B refuses them, or there can be no such folder.
    """
    import wandb

    path = outputs / URLS_FILE
    make_folder(outputs, "--outputs", "another --outputs DIR")  # before anything is sent
    try:
        entity = entity or str(wandb.Api().default_entity)
        urls = _read_urls(path).get(f"{entity}/{project}", {})
        saved_workspace = _updated(ws.Workspace, urls.get("workspace"), workspace(entity, project))
        saved_workspace.save()
        saved_report = _updated(wr.Report, urls.get("report"), report(entity, project))
        saved_report.save()
    except Exception as error:  # whatever W&B and its libraries raise
        raise UserError(
            f"W&B refuses the dashboard: {error}",
            field="project",
            value=f"{entity or '(your default entity)'}/{project}",
            hint="`wandb login`; a project that has runs",
        ) from error
    urls = {"workspace": str(saved_workspace.url), "report": str(saved_report.url)}
    write_json(path, _read_urls(path) | {f"{entity}/{project}": urls})
    return urls


def _read_urls(path: Path) -> dict[str, dict[str, str]]:
    try:
        urls: dict[str, dict[str, str]] = json.loads(path.read_text("utf-8"))
        return urls
    except (OSError, ValueError):
        return {}


def _updated(kind: Any, url: str | None, new: Any) -> Any:
    """Return the view at a URL with the content of the new one, or the new one if it is gone."""
    if url is None:
        return new
    with suppress(Exception):  # it was deleted
        view = kind.from_url(url)
        for name in ("sections", "runset_settings", "blocks", "width"):
            if hasattr(new, name):
                setattr(view, name, getattr(new, name))
        return view
    return new
