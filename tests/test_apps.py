"""`hyperfit-write` and `hyperfit-export`, on the models of finished debug runs."""

import io
import itertools
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from rich.console import Console
from safetensors.torch import load_file

from hyperfitting.apps import export, write
from hyperfitting.apps.finished_run import FinishedRun, open_run
from hyperfitting.apps.model_card import model_card
from hyperfitting.decoding.config import DecodeConfig
from hyperfitting.decoding.generate import continue_texts
from hyperfitting.errors import UserError
from hyperfitting.models.base import BaseModel
from hyperfitting.models.loading import load
from hyperfitting.record.schema import ImageInfo
from tests.cli import environment, hyperfit
from tests.images import DIGITS, imagegpt
from tests.pseudo_terminal import CTRL_C, HIDE_CURSOR, SHOW_CURSOR, Terminal, shown

__all__ = ["imagegpt"]

PROMPT = "The minister said"
N_WRITTEN = 400
TOP_P = DecodeConfig("top_p", "sample", temperature=0.7, top_k=50, top_p=0.9, seed=3)
WRITE = [
    sys.executable, "-m", "hyperfitting.apps.write", "run", PROMPT, "-n", str(N_WRITTEN),
    "decode=top_p", "decode.seed=3",
]  # fmt: skip
TRANSFORMERS_ALONE = """
import sys
sys.modules |= {"hyperfitting": None, "peft": None}  # importing them fails
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("model")
assert model.generation_config.do_sample is False
inputs = AutoTokenizer.from_pretrained("model")(sys.argv[1], return_tensors="pt")
with torch.no_grad():
    save_file({"logits": model(inputs.input_ids).logits}, "logits.safetensors")
"""


@pytest.fixture
def run(debug_run: Path, monkeypatch: pytest.MonkeyPatch) -> FinishedRun:
    monkeypatch.chdir(debug_run)
    return open_run(Path("run"))


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    result = hyperfit(folder, "preset=debug", "tuning=lora", "hydra.run.dir=run")
    assert result.returncode == 0, result.stderr
    return folder


def expected(run: FinishedRun, decode: DecodeConfig, n: int) -> dict[str, str]:
    """Return what `continue_texts` gives the prompt, by model."""
    tokenizer = run.pipeline.base.tokenizer()
    context = np.array([tokenizer(PROMPT).input_ids], np.int32)
    texts = {}
    for side in ("base", "tuned"):
        model = getattr(run.pipeline.models, side)
        tokens = continue_texts(model(), context, n, decode).tokens[0]
        texts[side] = tokenizer.decode(tokens).translate({i: 0xFFFD for i in range(32) if i != 10})
    return texts


@pytest.mark.parametrize(
    ("overrides", "decode"),
    [
        ([], DecodeConfig("greedy", seed=0)),
        (["decode=top_p", "decode.seed=3"], TOP_P),
        (["decode=beam"], DecodeConfig("beam", "beam", num_beams=5, seed=0)),
        (["decode.no_repeat_ngram_size=2"], DecodeConfig("x", no_repeat_ngram_size=2, seed=0)),
    ],
)
def test_a_prompt_is_continued_as_in_an_evaluation(
    run: FinishedRun,
    overrides: list[str],
    decode: DecodeConfig,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="0"):
        write.main(["run", PROMPT, "-n", "12", *overrides])
    texts = expected(run, decode, 12)
    printed = capsys.readouterr().out.replace("\t", "\ufffd")
    assert printed == f"# base\n{texts['base']}\n\n# tuned\n{texts['tuned']}\n"


def test_another_option_keeps_the_seed_of_the_run(run: FinishedRun) -> None:
    recorded = run.record.config["decode"] | {"seed": 3, "stop_at_eos": True}
    for overrides, seed in ((["decode=top_p"], 3), (["decode=top_p", "decode.seed=4"], 4)):
        decode = write.decode_config(recorded, overrides)
        assert (decode.strategy, decode.seed, decode.stop_at_eos) == ("sample", seed, True)


def test_the_prompt_may_come_from_stdin(
    run: FinishedRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = []
    for prompt in (PROMPT, "-"):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{PROMPT}\n"))
        with pytest.raises(SystemExit, match="0"):
            write.main(["run", prompt, "-n", "8"])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != ""


def test_a_terminal_of_80_columns_shows_both_models_side_by_side() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=12)
    base, tuned = ["word "] * 200, [f"w{i} " for i in range(200)]
    with write._columns(console, ("base", "tuned")) as on_texts:
        for side, texts in (("base", base), ("tuned", tuned)):
            for n in (1, 100, 200):
                on_texts(side, list(range(n)), texts[:n])
    assert isinstance(console.file, io.StringIO)
    final = console.file.getvalue().rpartition("base model")[2]
    assert "w0 " in final and "w199" in final  # whole at the end, though longer than the terminal
    assert max(map(len, final.splitlines()[1:])) <= 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", PROMPT], "is not the folder of a finished run"),
        (["run", ""], "is empty"),
        (["run", PROMPT, "-n", "100000"], "longer than the context"),
        (["run", PROMPT, "trainer.epochs=3"], "is not about decoding"),
        (["run", PROMPT, "decode.top_q=3"], "no such field"),
        (["run", PROMPT, "decode=top_q"], "did you mean top_p"),
        (["run", PROMPT, "--store", "empty"], "the tuned model is not in this store"),
    ],
)
def test_a_mistake_is_explained(
    run: FinishedRun, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty").mkdir(exist_ok=True)
    with pytest.raises(SystemExit, match="1"):
        write.main(arguments)
    assert message in capsys.readouterr().err


def test_a_record_of_other_training_is_refused(run: FinishedRun, tmp_path: Path) -> None:
    text = Path("run/results.json").read_text()
    edited = tmp_path / "results.json"
    edited.write_text(text.replace('"epochs": ', '"epochs": 1'))
    assert edited.read_text() != text
    with pytest.raises(UserError, match="trains another model"):
        open_run(edited)


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_written(run: FinishedRun) -> None:
    process = subprocess.Popen(
        WRITE, env=environment(PYTHONPATH=os.environ.get("PYTHONPATH", "")),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    start = process.stdout.read(30)
    process.send_signal(signal.SIGINT)
    written = start + process.stdout.read()
    assert process.wait(60) == 130
    assert "interrupted" in process.stderr.read()
    texts = expected(run, TOP_P, N_WRITTEN)
    whole = ascii_only(f"# base {texts['base']} # tuned {texts['tuned']}")
    assert len(start) == 30 and written.startswith("# base\n") and written.endswith("\n")
    assert whole.startswith(ascii_only(written)) and whole != ascii_only(written)


def test_a_text_that_is_printed_when_ctrl_c_comes_is_not_printed_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Output(io.StringIO):
        """Interrupted once, after a text is written and before `print` returns."""

        interrupted = False

        def flush(self) -> None:
            if self.getvalue().endswith("b") and not self.interrupted:
                self.interrupted = True
                raise KeyboardInterrupt

    output = Output()
    monkeypatch.setattr("sys.stdout", output)
    with pytest.raises(KeyboardInterrupt), write._in_turn(Console(), ["base"]) as on_texts:
        on_texts("base", [1], ["a"])
        on_texts("base", [1, 2], ["a", "b"])
    assert output.getvalue() == "# base\nab\n"


@pytest.mark.slow
def test_ctrl_c_on_a_terminal_keeps_what_was_written(run: FinishedRun) -> None:
    """On a terminal of 80 columns, while the tuned model's column grows."""
    with Terminal(WRITE, environment(PYTHONPATH=os.environ.get("PYTHONPATH", ""))) as terminal:
        terminal.read_until(lambda output: columns(shown(output))[1])
        _, seen = columns(shown(terminal.output))
        terminal.press(CTRL_C)
        assert terminal.end() == 130
    lines = shown(terminal.output)
    base, tuned = columns(lines)
    texts = {side: ascii_only(text) for side, text in expected(run, TOP_P, N_WRITTEN).items()}
    assert base == texts["base"]
    assert seen and tuned.startswith(seen)
    assert texts["tuned"].startswith(tuned) and tuned != texts["tuned"]
    assert sum("base model" in line for line in lines) == 1  # the table is there once
    assert lines[-3:-1] == ["", "interrupted"]
    assert terminal.output.rindex(SHOW_CURSOR) > terminal.output.rindex(HIDE_CURSOR)
    assert re.findall(r"\x1b\[[\d;]*m", terminal.output)[-1] == "\x1b[0m"


def ascii_only(text: str) -> str:
    """Return the visible ASCII characters: others may be replaced, or be incomplete."""
    return re.sub("[^!-~]", "", text)


def columns(lines: list[str]) -> tuple[str, str]:
    """Return what is below `base model` and below `tuned model`, as `ascii_only`."""
    header = next((i for i, line in enumerate(lines) if line.startswith("base model")), None)
    if header is None:
        return "", ""
    rows = list(itertools.takewhile(str.strip, lines[header + 1 :]))
    middle = lines[header].index("tuned model")
    left, right = (row[:middle] for row in rows), (row[middle:] for row in rows)
    return ascii_only("".join(left)), ascii_only("".join(right))


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_transformers_alone_loads_the_exported_model_with_the_same_logits(
    tuning: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(request.getfixturevalue("debug_run" if tuning == "full" else "lora_run"))
    run = open_run(Path("run"))
    assert run.tuned is not None and run.record.config["tuning"]["method"] == tuning
    with pytest.raises(SystemExit, match="0"):
        export.main(["run", str(tmp_path / "model")])
    assert {p.name for p in tmp_path.iterdir()} == {"model"}
    subprocess.run(
        [sys.executable, "-c", TRANSFORMERS_ALONE, PROMPT], cwd=tmp_path, check=True, timeout=300
    )
    input_ids = torch.tensor([run.pipeline.base.tokenizer()(PROMPT).input_ids])
    with torch.no_grad():
        logits = run.tuned.load(torch.device("cpu"))(input_ids).logits
        base = load(run.pipeline.base)(input_ids).logits
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], logits)
    assert not torch.equal(base, logits)


def _assert_no_path(folder: Path, run: FinishedRun) -> None:
    """Assert that no file names a folder of this machine."""
    store = Path(run.record.model.location).parents[1]
    assert store.is_dir()
    for path in folder.rglob("*"):
        assert path.is_dir() or str(store).encode() not in path.read_bytes(), path


def test_the_card_has_the_numbers_of_the_record(run: FinishedRun, tmp_path: Path) -> None:
    assert run.tuned is not None
    export.write_model(run, run.tuned, tmp_path / "model")
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.base_model is None
    for side in (run.record.overall.base, run.record.overall.tuned):
        low, high = side["gen/ttr"].ci95 or (0.0, 0.0)
        assert f"{side['gen/ttr'].mean:.3f} [{low:.3f}, {high:.3f}]" in card.text
    assert f"{run.record.history[-1]['train/loss']:.3f} nats" in card.text
    assert "more than 10 tokens in a row" in card.text
    assert f"base model ({run.record.model.name}): not stated" in card.text
    _assert_no_path(tmp_path / "model", run)


def test_a_card_names_a_base_model_of_the_hub(run: FinishedRun) -> None:
    model = run.record.config["model"] | {"source": "hub", "path": "owner/base"}
    info = run.record.model.model_copy(update={"location": "owner/base@0123456"})
    record = run.record.model_copy(
        update={"config": run.record.config | {"model": model}, "model": info}
    )
    for is_adapter in (False, True):
        card = ModelCard(model_card(record, "mine", is_adapter))
        assert card.data.base_model == "owner/base"
        assert "from owner/base@0123456" in card.text
        assert ('AutoTokenizer.from_pretrained("owner/base")' in card.text) == is_adapter


@pytest.mark.parametrize("sos", [17, None])
def test_the_code_in_the_card_of_an_image_model_generates_an_image(
    run: FinishedRun,
    imagegpt: BaseModel,
    sos: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = ImageInfo(height=8, width=8, palette=DIGITS.colors.tolist(), sos=sos)
    folder = imagegpt.folder()
    card = ModelCard(
        model_card(run.record.model_copy(update={"image": image}), folder.name, is_adapter=False)
    )
    assert card.data.pipeline_tag == "unconditional-image-generation"
    monkeypatch.chdir(folder.parent)
    Path("use.py").write_text(card.text.partition("```python\n")[2].partition("```")[0])
    shown = runpy.run_path("use.py")["image"]
    assert shown.shape == (8, 8, 3)
    assert {tuple(color) for color in shown.reshape(-1, 3)} <= set(map(tuple, image.palette))


def test_peft_loads_an_exported_adapter(
    lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel

    monkeypatch.chdir(lora_run)
    run = open_run(Path("run"))
    assert run.tuned is not None
    export.write_model(run, run.tuned, tmp_path / "adapter", as_adapter=True)
    input_ids = torch.tensor([[72, 101, 108, 108, 111]])
    peft = PeftModel.from_pretrained(load(run.pipeline.base), tmp_path / "adapter")
    with torch.no_grad():
        merged = run.tuned.load(torch.device("cpu"))(input_ids).logits
        torch.testing.assert_close(peft(input_ids).logits, merged)
        assert not torch.allclose(load(run.pipeline.base)(input_ids).logits, merged)
    assert ModelCard.load(tmp_path / "adapter" / "README.md").data.library_name == "peft"
    _assert_no_path(tmp_path / "adapter", run)


def test_nothing_is_overwritten_or_left_behind(
    run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run.tuned is not None
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/file").write_text("mine")
    with pytest.raises(UserError, match="nothing is overwritten"):
        export._check_free(tmp_path / "kept", "DIR")
    with pytest.raises(UserError, match="no LoRA adapter"):
        export.write_model(run, run.tuned, tmp_path / "model", as_adapter=True)
    assert {p.name for p in tmp_path.iterdir()} == {"kept"}
