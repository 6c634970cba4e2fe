"""Results from other machines: verified without a store, and shown as marked rows."""

import json
import shutil
from pathlib import Path

import pytest

from hyperfitting.errors import UserError
from hyperfitting.reporting.community import contributions, read_contributor
from hyperfitting.reporting.report import write_report
from hyperfitting.sweep.spec import SPEC_FILE, read_sweep_spec
from hyperfitting.verify.run_checks import check_run
from hyperfitting.verify.sweep_checks import check_contributors, run_folders
from tests.records import ttr_record, write_sweep

COMMUNITY = Path(__file__).resolve().parents[1] / "docs/results/community"
WHO = "name: Ada & Co\nhardware: 8x H100\n"
REPORT = {"tables": {"t": {"rows": ["system"], "columns": {"TTR": {"key": "gen/ttr"}}}}}


def contributed(folder: Path) -> list[tuple[str, str, str]]:
    """Return the failed checks of a folder of contributions."""
    if not list(folder.rglob("results.json")):
        return []
    checks = [(run.name, check) for run in run_folders(folder) for check in check_run(run)]
    checks += [("", check) for check in check_contributors(folder)]
    unsigned = [p.name for p in folder.iterdir() if p.is_dir() and not (p / "who.yaml").is_file()]
    return [(run, c.name, c.detail) for run, c in checks if c.outcome == "failed"] + [
        (name, "who.yaml", "is missing") for name in unsigned
    ]


def test_every_contribution_to_this_repository_verifies() -> None:
    assert contributed(COMMUNITY) == []


def test_a_contribution_verifies_without_its_store_until_it_is_edited(
    debug_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "ada/debug/run"
    run.mkdir(parents=True)
    for name in ("results.json", "predictions.npz", "continuations.html", "SHA256SUMS"):
        shutil.copy(debug_run / "run" / name, run)
    if (debug_run / "run/code.diff").is_file():
        shutil.copy(debug_run / "run/code.diff", run)
    assert contributed(tmp_path) == [("ada", "who.yaml", "is missing")]
    (tmp_path / "ada/who.yaml").write_text(WHO)
    assert contributed(tmp_path) == []
    record = json.loads((run / "results.json").read_text())
    record["per_text"]["tuned"]["gen/ttr"][0] = 0.9
    (run / "results.json").write_text(json.dumps(record))
    failed = {check for _, check, _ in contributed(tmp_path)}
    assert {"files", "scores"} <= failed


def test_rows_of_others_follow_ours_with_who_and_hardware(tmp_path: Path) -> None:
    ours, theirs = ttr_record([0.5, 0.5], 0.5), ttr_record([0.7, 0.7], 0.7)
    sweep = write_sweep(tmp_path / "sweeps/x", REPORT, {"tuned_0": ours})
    ada = tmp_path / "reports/community/ada"
    ada.mkdir(parents=True)
    other = write_sweep(ada / "x", REPORT, {"tuned_0": theirs})
    (ada / "who.yaml").write_text(WHO)
    rows = (write_report(sweep) / "t.md").read_text().splitlines()
    labels = [row.split("|")[1].strip() for row in rows if row.startswith("|")]
    cells = dict(zip(labels, (row for row in rows if row.startswith("|")), strict=True))
    mine, hers = "tuned", "tuned (by Ada & Co, 8x H100)"
    assert "0.5" in cells[mine] and "0.7" in cells[hers]
    assert labels.index(hers) > labels.index(mine)
    spec = json.loads((other / SPEC_FILE).read_text())
    (other / SPEC_FILE).write_text(json.dumps(spec | {"name": "another"}))
    assert contributions(ada.parent, read_sweep_spec(sweep)) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name: Ada", "hardware"),
        ("name: Ada\nhardware: x\nkey: 1", "key"),
        ("name: [Ada]\nhardware: x", "name"),
        ("name: {", "is not valid"),
        ("", "is not valid"),
        ("name: ''\nhardware: x", "name"),
    ],
)
def test_a_mistake_in_who_yaml_is_named(text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "who.yaml").write_text(text)
    with pytest.raises(UserError, match=problem):
        read_contributor(tmp_path / "who.yaml")
