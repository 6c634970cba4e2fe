"""`hyperfit-write`: continue any prompt with the base and the tuned model of a finished run.

Side by side on a terminal, as the tokens are chosen, with repetition highlighted; one after the
other where the output goes to a file or a pipe.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperfitting.errors import UserError
from hyperfitting.failures import exit_status
from hyperfitting.runtime.logs import log_warnings

if TYPE_CHECKING:
    from rich.console import Console

    from hyperfitting.apps.finished_run import FinishedRun
    from hyperfitting.decoding.config import DecodeConfig

OnTexts = Callable[[list[int], list[str]], None]
"""Receives a continuation so far: token ids, and the text of each."""
_SIDES = ("base", "tuned")
_RUN_SETTINGS = ("seed", "stop_at_eos")
"""Decode settings of a run that no option of the group sets."""


def write(arguments: argparse.Namespace) -> None:
    """Continue the prompt, and print each continuation.

    Raises:
        UserError: the run cannot be opened or is of images, or the prompt is empty or too long.
    """
    from hyperfitting.apps.finished_run import open_run
    from hyperfitting.formatting import make_console

    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    run = open_run(arguments.run, arguments.store, arguments.device)
    if run.record.image is not None:
        raise UserError(
            "is a run of images, and prompts are text",
            field="RUN",
            value=arguments.run,
            hint="its completed images are in continuations.html",
        )
    decode = decode_config(run.record.config["decode"], arguments.overrides)
    new_tokens = arguments.max_new_tokens or run.record.overall.max_new_tokens
    tokens = _prompt_tokens(run, prompt, new_tokens)
    sides = [side for side in _SIDES if side == "base" or run.tuned is not None]
    console = make_console()
    show = _columns if console.is_terminal else _in_turn
    with show(console, sides) as on_texts:
        for side in sides:
            continue_prompt(run, side, tokens, new_tokens, decode, partial(on_texts, side))
    if len(sides) == 1:
        console.print("note: this run trained nothing (tuning=none)")


def decode_config(recorded: dict[str, Any], overrides: Sequence[str]) -> "DecodeConfig":
    """Return the run's decode config with overrides: `decode=NAME`, and `decode.FIELD=VALUE`.

    Raises:
        UserError: an override is of another group.
    """
    import hydra
    from omegaconf import OmegaConf

    from hyperfitting.config import conf_dir, register
    from hyperfitting.decoding.config import ControlConfig, DecodeConfig

    for override in overrides:
        if not override.startswith(("decode=", "decode.")):
            raise UserError(
                "is not about decoding", field="override", value=override,
                valid="decode=NAME and decode.FIELD=VALUE", hint="decode=top_p decode.seed=1",
            )  # fmt: skip
    if any(override.startswith("decode=") for override in overrides):
        register()
        settings = [f"decode.{name}={json.dumps(recorded[name])}" for name in _RUN_SETTINGS]
        with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
            composed = hydra.compose("config", overrides=[*settings, *overrides])
        values = OmegaConf.to_container(composed.decode, resolve=True)
    else:
        values = OmegaConf.merge(
            recorded, OmegaConf.from_dotlist(list(overrides)).get("decode", {})
        )
    merged = OmegaConf.merge(OmegaConf.structured(DecodeConfig), values)
    config: DecodeConfig = OmegaConf.to_object(merged)  # type: ignore[assignment] # from a schema
    recorded_control = ControlConfig(**recorded["control"])
    if config.control.is_on and config.control != recorded_control:
        raise UserError(
            "a control is a model of its own, which this run did not evaluate",
            field="decode.control.method",
            value=config.control.method,
            hint=f"hyperfit decode={config.name}, then its run",
        )
    return replace(config, control=recorded_control)


def continue_prompt(
    run: "FinishedRun",
    side: str,
    prompt: list[int],
    max_new_tokens: int,
    decode: "DecodeConfig",
    on_texts: OnTexts,
) -> None:
    """Continue a prompt with one of a run's models, which is in memory only for that.

    Args:
        run: a finished run.
        side: `base` or `tuned`.
        prompt: token ids.
        max_new_tokens: of the continuation.
        decode: how tokens are chosen; the citation blocker is for the tuned model.
        on_texts: called after each token.
    """
    from hyperfitting.data.tokenization import token_texts
    from hyperfitting.decoding.stream import stream_continuation
    from hyperfitting.evaluation.artifacts import citation_blocker

    tokenizer = run.pipeline.base.tokenizer()
    model = run.pipeline.models.base if side == "base" else run.pipeline.models.tuned
    if model is None:
        raise ValueError("the run has no tuned model")
    blocker = None
    if decode.citation_blocker.enabled and side == "tuned":
        blocker = citation_blocker(run.pipeline.sequences.ensure(), decode, tokenizer)

    def on_tokens(tokens: list[int]) -> None:
        on_texts(tokens, token_texts(tokenizer.decode, tokens, prompt))

    try:
        stream_continuation(model(), prompt, max_new_tokens, decode, on_tokens, blocker)
    finally:
        model.release()


def _prompt_tokens(run: "FinishedRun", prompt: str, max_new_tokens: int) -> list[int]:
    from hyperfitting.data.tokenization import DocumentTokenizer

    text = prompt.rstrip("\n")
    tokens = DocumentTokenizer(run.pipeline.base)(text)
    if not text.strip() or not tokens:
        raise UserError(
            "is empty",
            field="PROMPT",
            value=prompt,
            valid="the beginning of a text, or - for stdin",
        )
    run.pipeline.base.check_length("PROMPT and --max-new-tokens", len(tokens) + max_new_tokens)
    return tokens


@contextmanager
def _columns(
    console: "Console", sides: Sequence[str]
) -> Iterator[Callable[[str, list[int], list[str]], None]]:
    """Show the continuations in columns while they grow, and whole at the end or Ctrl+C.

    A thread draws: Ctrl+C would interrupt the main one while it does, and lines would show twice.
    """
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    from hyperfitting.reporting.terminal import highlighted

    color = not console.no_color
    texts = {side: Text() for side in sides}
    table_width = console.width - len("^C")  # which a terminal shows after the last line
    width = table_width // len(sides) - 2

    def table(height: int | None) -> Table:
        columns = Table(box=None, padding=(0, 2, 0, 0), width=table_width, show_edge=False)
        for side in sides:
            columns.add_column(f"{side} model", ratio=1, overflow="fold")
        columns.add_row(*(_last_lines(texts[side], console, width, height) for side in sides))
        return columns

    height = max(3, console.height - 3)
    with Live(table(height), console=console, refresh_per_second=10, transient=True) as live:

        def on_texts(side: str, tokens: list[int], token_texts: list[str]) -> None:
            texts[side] = highlighted(token_texts, tokens, color)
            live.update(table(height))

        try:
            yield on_texts
        finally:
            live.stop()
            console.print(table(None))


def _last_lines(text: Any, console: "Console", width: int, height: int | None) -> Any:
    """Return the end of a text that fits into this many lines."""
    if height is None:
        return text
    from rich.text import Text

    return Text("\n").join(text.wrap(console, width)[-height:])


@contextmanager
def _in_turn(
    console: "Console", sides: Sequence[str]
) -> Iterator[Callable[[str, list[int], list[str]], None]]:
    """Print the continuations one after the other, each under its name, token by token."""
    from hyperfitting.formatting import printable

    shown: list[str] = []  # the names shown so far
    rest: list[str] = []  # texts of tokens of the last one that are not printed yet
    n_printed = 0

    def print_rest(n: int) -> None:
        nonlocal rest, n_printed
        printed, rest = rest[:n], rest[n:]  # before print: if Ctrl+C ends it, rest is printed
        n_printed += n
        print(printable("".join(printed)), end="", flush=True)

    def on_texts(side: str, tokens: list[int], token_texts: list[str]) -> None:
        nonlocal rest, n_printed
        if side not in shown:
            print_rest(len(rest))
            print(f"{chr(10) * 2 if shown else ''}# {side}")
            shown.append(side)
            n_printed = 0
        rest = token_texts[n_printed:]
        is_cut = bool(rest) and rest[-1].endswith("\ufffd")  # within a character, as it seems
        print_rest(len(rest) - is_cut)

    try:
        yield on_texts
    finally:
        print_rest(len(rest))
        print()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hyperfit-write",
        description="Continue a prompt with the base and the tuned model of a finished run.",
        epilog="Example: hyperfit-write latest 'Once upon a time' decode=top_p decode.seed=1",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder, or: latest")
    parser.add_argument("prompt", metavar="PROMPT", help="the beginning of a text; -: from stdin")
    parser.add_argument(
        "overrides", metavar="OVERRIDE", nargs="*",
        help="decode=NAME or decode.FIELD=VALUE (default: as the run was evaluated)",
    )  # fmt: skip
    parser.add_argument(
        "-n", "--max-new-tokens", type=_positive, metavar="N",
        help="length of a continuation, in tokens (default: as the run was evaluated)",
    )  # fmt: skip
    parser.add_argument("--store", type=Path, help="the run's artifacts (default: as recorded)")
    parser.add_argument("--device", default="auto", help="as hardware.device (%(default)s)")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parsed = _parser().parse_intermixed_args(arguments)
    log_warnings()
    sys.exit(exit_status(lambda: write(parsed)))


if __name__ == "__main__":
    main()
