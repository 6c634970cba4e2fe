"""A sweep is pinned to the code of its finished and running runs (`sweep.json`).

Other code is what changes `CodeVersion.digest`: an edit of a report or of a config file does not.
What is pinned is records. Artifacts of the store are shared: their ids hold what determines them.
"""

from pathlib import Path

from rich.console import Console

from hyperfitting.errors import UserError
from hyperfitting.fields import one_of
from hyperfitting.record.files import RECORD_FILE
from hyperfitting.runtime.code_version import CodeVersion, code_version
from hyperfitting.sweep.spec import SPEC_FILE, read_sweep_spec
from hyperfitting.sweep.state import RunFolder

_FIELD = "hydra.sweeper.code_change"


def pinned_folder(folder: Path, code_change: str, console: Console) -> Path:
    """Return the folder in which this code runs a sweep, and print why if it is another one.

    Args:
        folder: that of the command.
        code_change: `new_folder`, or `continue`: in the same folder all the same.
        console: to print on.

    Raises:
        UserError: there is no such choice.
    """
    one_of(_FIELD, code_change, ("new_folder", "continue"))
    code, pin = code_version(), pinned_code(folder)
    if pin is None or pin.digest == code.digest:
        return folder
    n_finished = len(list(folder.glob(f"*/{RECORD_FILE}")))
    n_running = sum(RunFolder(path).is_locked() for path in folder.glob("*/"))
    if not n_finished and not n_running:
        return folder
    runs = f"{folder.name} has {n_finished} finished and {n_running} running runs of other code"
    if code_change == "continue":
        console.print(
            f"{runs} ({pin}); the others run with this code ({code}); its report lists both"
        )
        return folder
    new_folder = folder.with_name(f"{folder.name}_{code.digest[:8]}")
    console.print(
        f"{runs} ({pin}); with this code ({code}) the sweep is run again in {new_folder}, where "
        f"artifacts with the same id are reused.\n  try:   {_FIELD}=continue to finish "
        f"{folder.name} with this code instead, or check out the other"
    )
    return new_folder


def pinned_code(folder: Path) -> CodeVersion | None:
    """Return the code that the sweep in a folder is pinned to; none: no sweep, or unknown."""
    try:
        return read_sweep_spec(folder).code if (folder / SPEC_FILE).is_file() else None
    except UserError:  # damaged or of another version: it is written again
        return None


def check_pin(folder: Path) -> None:
    """Refuse to run one run of a sweep with other code than the sweep began with.

    (The files were edited while it runs, or a node has another installation.)

    Raises:
        UserError: the code is another.
    """
    code, pin = code_version(), pinned_code(folder)
    if pin is not None and pin.digest != code.digest:
        raise UserError(
            f"the sweep was begun by {pin}, and this process is {code}",
            hint="the same command again: runs of different code get different folders",
        )
