"""Messages and exit statuses of failures."""

import errno
import signal
import subprocess
from pathlib import Path

import pytest

from hyperfitting.errors import UserError
from hyperfitting.failures import explain
from tests.conftest import command, environment


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
