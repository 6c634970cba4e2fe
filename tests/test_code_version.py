"""Which code made a record: digest, uncommitted changes, and the pin of a sweep."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from hyperfitting.errors import UserError
from hyperfitting.formatting import make_console
from hyperfitting.reporting.cli import refuse_changes
from hyperfitting.reporting.sweep_records import load_sweep
from hyperfitting.runtime.code_version import (
    CodeVersion,
    Git,
    code_digest,
    code_version,
    read_checkout,
)
from hyperfitting.sweep.code_pin import check_pin, pinned_folder
from hyperfitting.sweep.spec import SPEC_FILE
from hyperfitting.sweep.state import RunFolder
from tests.records import ttr_record, write_sweep

OTHER = CodeVersion(package="0", digest="f" * 16, git=None)


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
    result = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return result.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    package = root / "src/hyperfitting"
    (package / "reporting").mkdir(parents=True)
    (root / "conf").mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text("x = 1\n")
    (package / "reporting" / "b.py").write_text("y = 1\n")
    (root / ".gitignore").write_text("conf/local/\n")
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "first")
    return root


def test_uncommitted_changes_are_kept_and_apply_to_the_commit(
    checkout: Path, tmp_path: Path
) -> None:
    package = checkout / "src/hyperfitting"
    clean, diff = read_checkout(package)
    assert clean == Git(commit=git(checkout, "rev-parse", "HEAD"), dirty=False, diff_sha256=None)
    assert diff == ""
    (package / "a.py").write_text("x = 'ä'\n")
    (package / "new file.py").write_text("z = 1\n")
    (package / "bytes.npy").write_bytes(bytes(range(256)))
    state, diff = read_checkout(package)
    assert state is not None and state.dirty and state.commit == clean.commit
    subprocess.run(["git", "clone", "--quiet", checkout, tmp_path / "clone"], check=True)
    (tmp_path / "x.diff").write_text(diff)
    git(tmp_path / "clone", "apply", str(tmp_path / "x.diff"))
    for name in ("a.py", "new file.py", "bytes.npy"):
        copied = tmp_path / "clone/src/hyperfitting" / name
        assert copied.read_bytes() == (package / name).read_bytes()


def test_what_is_outside_of_code_and_configs_is_in_no_diff(checkout: Path) -> None:
    (checkout / ".env").write_text("WANDB_API_KEY=secret")
    (checkout / "notes.txt").write_text("secret")
    (checkout / "conf/local").mkdir()
    (checkout / "conf/local/default.yaml").write_text("secret")
    state, diff = read_checkout(checkout / "src/hyperfitting")
    assert (state and state.dirty, diff) == (False, "")


def test_a_package_that_no_checkout_tracks_has_no_commit(checkout: Path) -> None:
    installed = checkout / ".venv/hyperfitting"
    shutil.copytree(checkout / "src/hyperfitting", installed)
    assert read_checkout(installed) == (None, "")


def test_the_digest_is_of_what_numbers_depend_on(checkout: Path) -> None:
    package = checkout / "src/hyperfitting"
    before = code_digest(package)
    (package / "reporting/b.py").write_text("y = 2\n")
    assert code_digest(package) == before
    (package / "a.py").rename(package / "c.py")
    assert code_digest(package) != before


def test_nothing_that_the_digest_covers_imports_what_it_leaves_out() -> None:
    """Else other code could make the numbers; the entry point alone draws a page and tracks."""
    from hyperfitting.runtime.code_version import _NO_RESULTS, _PACKAGE

    left_out = tuple(f"hyperfitting.{name}" for name in _NO_RESULTS)
    offending = {
        str(path.relative_to(_PACKAGE))
        for path in _PACKAGE.rglob("*.py")
        if path.relative_to(_PACKAGE).parts[0] not in _NO_RESULTS
        and any(f"from {name}" in path.read_text() for name in left_out)
    }
    assert offending == {"run.py"}


def pinned(folder: Path, code: CodeVersion) -> Path:
    write_sweep(folder, {}, {"tuned_0": ttr_record([0.5, 0.6], 0.7)})
    spec = json.loads((folder / SPEC_FILE).read_text())
    (folder / SPEC_FILE).write_text(json.dumps(spec | {"code": code.model_dump()}))
    return folder


def test_runs_of_other_code_keep_their_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    console, digest = make_console(), code_version().digest
    other = pinned(tmp_path / "other", OTHER)
    assert pinned_folder(other, "new_folder", console) == tmp_path / f"other_{digest[:8]}"
    printed = capsys.readouterr().out
    assert "f" * 16 in printed and digest in printed and "code_change=continue" in printed
    assert pinned_folder(other, "continue", console) == other
    same = pinned(tmp_path / "same", code_version())
    assert pinned_folder(same, "new_folder", console) == same
    assert pinned_folder(tmp_path / "new", "new_folder", console) == tmp_path / "new"
    shutil.rmtree(other / "tuned_0")
    assert pinned_folder(other, "new_folder", console) == other  # no run is of it
    with RunFolder(other / "tuned_1").lock():
        assert pinned_folder(other, "new_folder", console) == tmp_path / f"other_{digest[:8]}"
    assert pinned_folder(other, "new_folder", console) == other
    with pytest.raises(UserError, match="new_folder, continue"):
        pinned_folder(same, "mix", console)
    check_pin(same)
    with pytest.raises(UserError, match="the same command again"):
        check_pin(other)


def test_runs_with_changes_are_not_published(tmp_path: Path) -> None:
    dirty = Git(commit="1" * 40, dirty=True, diff_sha256="0" * 64)
    changed = CodeVersion(package="0", digest="a" * 16, git=dirty)
    records = {
        "tuned_0": ttr_record([0.5, 0.6], 0.7, code=changed),
        "tuned_1": ttr_record([0.5, 0.6], 0.7, code=OTHER),
    }
    folder = write_sweep(tmp_path / "x", {}, records)
    with pytest.raises(UserError, match="made with uncommitted changes: tuned_0"):
        refuse_changes(folder)
    code = load_sweep(folder).provenance()["Code"]
    assert "with changes (code aaaa" in code and "tuned_1" in code
    refuse_changes(write_sweep(tmp_path / "y", {}, {"tuned_1": records["tuned_1"]}))
