"""Messages and exit statuses of failures."""

import errno
import logging
import os
import resource
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from hyperfitting.config import conf_dir, register
from hyperfitting.config_errors import quote
from hyperfitting.errors import UserError, exhausted_resource
from hyperfitting.failures import exit_status, explain
from hyperfitting.models.base import BaseModel
from hyperfitting.models.loading import load
from tests.cli import command, environment


def test_a_user_error_names_field_value_valid_values_and_a_hint() -> None:
    error = UserError("out of range", field="seed", value=-1, valid="0 or more", hint="seed=0")
    assert str(error) == "seed=-1: out of range\n  valid: 0 or more\n  try:   seed=0"
    assert explain(error, None) == str(error)


def test_a_user_error_can_name_its_run_and_be_moved_to_another_place_of_the_config() -> None:
    error = UserError("is needed", field="dataset.path", value=None, hint="dataset.path=DIR")
    assert str(error.for_run("seed=1")).startswith("dataset.path=None: is needed (run seed=1)")
    renamed = error.renamed("dataset.", "evaluation.datasets.news.")
    assert renamed.field == "evaluation.datasets.news.path"
    assert renamed.hint == "evaluation.datasets.news.path=DIR"
    assert renamed.problem == error.problem


def test_what_a_terminal_would_execute_is_escaped() -> None:
    name = "a\x1b[31m\nb\u202e\udce9é.txt"
    error = UserError("line 1 of \x1b]0;x", field="dataset.path", value=name, hint="two\nlines")
    assert str(error) == (
        "dataset.path=a\\x1b[31m\\nb\\u202e\\udce9é.txt: line 1 of \\x1b]0;x\n  try:   two\nlines"
    )
    assert "\x1b" not in explain(OSError("\x1b[31m"), None)


@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left on the disk", "store="),
        (RuntimeError("CUDA out of memory. Tried …"), "out of memory", "micro_batch_size"),
        (MemoryError(), "out of memory: MemoryError", "tuning=late_stage"),
        (FloatingPointError("training diverged"), "non-finite values", "optimizer.lr"),
    ],
)
def test_a_known_failure_is_explained_with_a_remedy(
    error: Exception, message: str, hint: str
) -> None:
    explained = explain(error, None)
    assert explained.startswith(message)
    assert hint in explained.partition("try:")[2]


def test_a_full_disk_is_recognized_behind_another_error() -> None:
    error = RuntimeError("unexpected pos 64 vs 0")  # as torch.save raises it
    error.__context__ = OSError(errno.EDQUOT, "Disk quota exceeded")
    assert explain(error, None).startswith("no space left on the disk")


@pytest.mark.parametrize(
    ("error", "name", "message"),
    [
        (RuntimeError("can't start new thread"), "RLIMIT_NPROC", "(limit: 77777 of this user)"),
        (BlockingIOError(errno.EAGAIN, "fork"), "RLIMIT_NPROC", "no more threads or processes"),
        (OSError(errno.ENFILE, "open"), "RLIMIT_NOFILE", "(limit: 77777 of this process)"),
        (OSError(errno.ENOMEM, "mmap"), "RLIMIT_AS", "out of memory"),
        (OSError(errno.EFBIG, "write"), "RLIMIT_FSIZE", "no space left on the disk"),
    ],
)
def test_a_used_up_resource_is_named_with_its_limit(
    error: Exception, name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (77777, 77777))
    wrapped = ValueError("its weights cannot be read")
    wrapped.__cause__ = error
    for shown in (error, wrapped):
        assert message in explain(shown, None)
        assert "(limit: 77777" in explain(shown, None)
        assert "\n  try:   " in explain(shown, None)


def test_an_error_that_only_the_user_can_fix_is_no_used_up_resource() -> None:
    assert exhausted_resource(UserError("Too many open files")) is None
    try:
        raise ValueError from None
    except ValueError as error:
        error.__context__ = OSError(errno.EMFILE, "unrelated")
        assert exhausted_resource(error) is None


def test_a_model_is_not_blamed_for_too_many_open_files(base: BaseModel) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises((UserError, OSError)) as raised:
            load(base)
        explained = explain(raised.value, None)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert explained.startswith("too many files are open (limit: 3 of this process)")
    assert "ulimit -n" in explained


def test_a_model_is_not_blamed_for_too_many_threads(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root no limit of them is enforced."""

    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises((UserError, RuntimeError)) as raised:
        load(base)
    assert explain(raised.value, None).startswith("no more threads or processes can be started")


def nothing(_: Any) -> None:
    pass


def hydra_status(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    *arguments: str,
    task: Callable[[Any], None] = nothing,
) -> int:
    """Compose the config as the command does, and run a task with it."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(logging, "raiseExceptions", True)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(sys, "argv", ["hyperfit", *arguments])
    monkeypatch.chdir(folder)
    register()
    decorate = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
    level = logging.getLogger().level
    try:
        return exit_status(decorate(task))
    finally:
        logging.getLogger().setLevel(level)  # Hydra sets it


@pytest.mark.parametrize("path", ["file", "file/run", "link", "x" * 300])
def test_an_output_folder_that_cannot_be_written_to_is_named(
    tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("nowhere")
    assert hydra_status(monkeypatch, tmp_path, f"hydra.run.dir={path}") == 1
    message = capsys.readouterr().err
    assert message.startswith("\nerror: hydra.run.dir=")
    assert "another hydra.run.dir=DIR" in message
    assert "unexpected" not in message


@pytest.mark.parametrize(
    "path", ["a=b.jsonl", "a, b.jsonl", "ü.jsonl", "(x).txt", "it's #1.txt", '"x', "a\\", "{x"]
)
def test_an_override_that_needs_quotes_is_shown_with_them(
    tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if hydra_status(monkeypatch, tmp_path, f"dataset.path={path}") == 0:
        assert path == "a\\"  # as it is
        return
    message = capsys.readouterr().err
    (override,) = shlex.split(message.partition("try:   ")[2])
    (parsed,) = OverridesParser.create().parse_overrides([override])
    assert parsed.key_or_group == "dataset.path"
    assert parsed.value() == path.strip("\"'")


@pytest.mark.parametrize("override", ["foo bar", "dataset.päth=1"])
def test_what_is_no_override_is_refused_with_their_form(
    tmp_path: Path,
    override: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert hydra_status(monkeypatch, tmp_path, override) == 1
    assert "valid: FIELD=VALUE" in capsys.readouterr().err


def test_the_log_file_is_utf_8_in_any_locale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encodings = []

    def task(_: Any) -> None:
        handlers = logging.getLogger().handlers
        encodings.extend(h.encoding for h in handlers if type(h) is logging.FileHandler)

    assert hydra_status(monkeypatch, tmp_path, "hydra.run.dir=run", task=task) == 0
    assert encodings == ["utf-8"]


@given(
    st.text(st.sampled_from("\\\"'=,;$ {}[]()#:aé\t\n") | st.characters(codec="utf-8"), min_size=1)
)
def test_a_quoted_text_is_that_text_in_an_override(text: str) -> None:
    (override,) = OverridesParser.create().parse_overrides([f"dataset.path={quote(text)}"])
    assert override.value() == text


def run_command(task: str, **options: Any) -> subprocess.Popen[str]:
    """Start a process of which `task` is the body of the command."""
    code = f"""
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from hyperfitting.errors import UserError
from hyperfitting.failures import exit_status
def task():
{textwrap.indent(textwrap.dedent(task), "    ")}
sys.exit(exit_status(task, resumes=True))
"""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": {}} | options
    options["env"] = environment(PYTHONUNBUFFERED="", **options["env"])
    return subprocess.Popen([sys.executable, "-c", code], text=True, **options)


def test_what_an_encoding_lacks_is_printed_as_escapes() -> None:
    encoding = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    process = run_command("print('é → 中'); raise UserError('ü')", env=encoding)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (1, "\\xe9 \\u2192 \\u4e2d\n")
    assert stderr == "\nerror: \\xfc\n"


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("print('x' * 100_000)", ""),
        ("print('x'); raise UserError('why')", "\nerror: why\n"),
        ("import rich; rich.print('x'); rich.print('y' * 100_000)", ""),
    ],
)
def test_a_reader_that_has_gone_ends_a_command_quietly(task: str, message: str) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    process = run_command(task, stdout=write_end)
    os.close(write_end)
    assert process.communicate(timeout=60)[1] == message
    assert process.returncode == 128 + signal.SIGPIPE


def test_a_command_without_outputs_or_with_a_full_one_ends_without_a_traceback() -> None:
    with run_command("print('x'); print('y', file=sys.stderr)", preexec_fn=_close_outputs) as quiet:
        quiet.communicate(timeout=60)
    assert quiet.returncode == 0
    with Path("/dev/full").open("w") as full:
        process = run_command("print('x')", stdout=full)
    assert process.communicate(timeout=60)[1] == (
        "\nerror: the output cannot be written: No space left on device\n"
    )
    assert process.returncode == 1


def _close_outputs() -> None:
    os.close(1)
    os.close(2)


@pytest.mark.parametrize("where", ["finally", "atexit"])
def test_a_second_interrupt_still_ends_with_the_message_and_its_status(where: str) -> None:
    task = """
    import atexit
    def clean_up():
        print("cleaning", flush=True); time.sleep(30)
    if WHERE == "atexit":
        atexit.register(clean_up)
    try:
        print("ready", flush=True); time.sleep(30)
    finally:
        if WHERE == "finally":
            clean_up()
    """
    process = run_command(task.replace("WHERE", repr(where)))
    assert process.stdout is not None
    for line in ("ready\n", "cleaning\n"):
        assert process.stdout.readline() == line
        process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert stderr == "\ninterrupted; the same command resumes where it stopped\n"


def test_an_unknown_failure_names_its_type_and_the_log_with_the_traceback() -> None:
    explained = explain(KeyError("x"), Path("run.log"))
    assert explained == "unexpected KeyError: 'x'; the traceback is in run.log"


def test_output_that_nobody_reads_ends_the_process_quietly(tmp_path: Path) -> None:
    with subprocess.Popen(
        command("--help"), cwd=tmp_path, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()  # as `hyperfit --help | true`
        assert process.stderr.read() == ""
    assert process.returncode == 128 + signal.SIGPIPE
