"""Every option composes, the defaults are the paper's, and bad values get a clear message."""

import inspect
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
import transformers
import yaml

from hyperfitting.config import RunConfig, conf_dir
from hyperfitting.data.config import TextsConfig
from hyperfitting.decoding.config import CitationBlockerConfig, ControlConfig
from hyperfitting.errors import UserError, near_matches
from hyperfitting.fields import RECORD, RUNTIME, changes_results, differing_fields
from hyperfitting.runtime.code_version import code_version
from tests.cli import hyperfit
from tests.conftest import Compose

GROUPS = ("dataset", "decode", "evaluation", "hardware", "intervention", "model", "optimizer",
          "preset", "trainer", "tracking", "tuning")  # fmt: skip
OPTIONS = [(g, p.stem) for g in GROUPS for p in sorted((conf_dir() / g).glob("*.yaml"))]


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes(compose: Compose, group: str, option: str) -> None:
    values = yaml.safe_load((conf_dir() / group / f"{option}.yaml").read_text())
    open_fields = [f"{group}.{k}=x" for k, v in values.items() if k == "path" and v is None]
    if group == "dataset" and "image" in values:
        open_fields.append("preset=images")
    if option == "task_vector":
        open_fields.append("dataset@intervention.dataset=shakespeare")
    compose(f"{group}={option}", *open_fields)


def test_weights_that_would_lose_their_updates_are_refused_unless_forced(compose: Compose) -> None:
    low = "model.dtype=bfloat16"
    with pytest.raises(UserError, match=r"(?s)model\.dtype=bfloat16.*optimizer=adam_bf16"):
        compose(low)
    forced = "trainer.allow_lost_updates=true"
    for allowed in ("optimizer=adam_bf16", "tuning=none", "tuning=lora", forced):
        assert compose(low, allowed).model.dtype == "bfloat16"


def test_tf32_is_for_float32_weights(compose: Compose) -> None:
    assert compose("trainer.precision=tf32").trainer.precision == "tf32"
    with pytest.raises(UserError, match=r"changes nothing for weights in bfloat16"):
        compose("trainer.precision=tf32", "model.dtype=bfloat16", "optimizer=adam_bf16")


@pytest.mark.parametrize("experiment", sorted((conf_dir() / "experiment").glob("*.yaml")))
def test_every_experiment_composes(compose: Compose, experiment: Path) -> None:
    compose(f"experiment={experiment.stem}")


def test_a_hub_model_and_dataset_give_the_papers_protocol(compose: Compose) -> None:
    cfg = compose("model=tinyllama", "dataset=wikitext")
    assert (cfg.dataset.n_train, cfg.dataset.seq_len) == (2000, 256)
    assert (cfg.trainer.epochs, cfg.trainer.batch_size) == (20, 8)
    assert cfg.optimizer["_target_"] == "torch.optim.Adam"
    assert (cfg.optimizer["lr"], cfg.optimizer["weight_decay"]) == (1e-6, 0)
    assert (cfg.tuning.method, cfg.trainer.clip_norm, cfg.trainer.dropout) == ("full", None, False)
    assert (cfg.evaluation.context_len, cfg.evaluation.max_new_tokens) == (32, [96, 224])


def test_the_paper_preset_undoes_all_that_the_embedded_one_changes(compose: Compose) -> None:
    paper = compose("model=smollm2_135m", "preset=paper")
    plain = compose("model=smollm2_135m", "~preset")
    assert paper == plain


def test_one_seed_sets_all_and_each_can_be_set(compose: Compose) -> None:
    cfg = compose("seed=7", "trainer.seed=3")
    assert (cfg.dataset.seed, cfg.trainer.seed, cfg.decode.seed) == (7, 3, 7)


def groups() -> list[type]:
    """The dataclasses of all config groups, and RunConfig."""
    parts: list[type] = [RunConfig, CitationBlockerConfig, ControlConfig, TextsConfig]
    return parts + [part for part in get_type_hints(RunConfig).values() if is_dataclass(part)]


def test_every_field_is_documented_and_declares_which_id_it_enters() -> None:
    assert len(groups()) == 14
    for part in groups():
        source = "".join(inspect.getsource(base) for base in part.__mro__ if is_dataclass(base))
        for field in fields(part):
            assert field.metadata["enters"], f"{part.__name__}.{field.name}"
            if is_dataclass(get_type_hints(part)[field.name]):
                continue
            after = source.split(f"    {field.name}: ", 1)[1]
            lines = after.split("\n", 1)[1].lstrip()
            assert lines.startswith('"""'), f"{part.__name__}.{field.name}"


def test_runtime_fields_change_no_result_and_others_do(compose: Compose) -> None:
    record = asdict(compose("preset=debug"))
    elsewhere = ("hardware.threads=1", "tracking.project=other", "store=other", "plan=true")
    assert list(differing_fields(record, compose("preset=debug", *elsewhere))) == []
    other = compose("preset=debug", "trainer.epochs=9", "decode.name=x", "seed=3")
    assert set(differing_fields(record, other)) == {
        "trainer.epochs", "decode.name", "seed", "dataset.seed", "trainer.seed", "decode.seed",
    }  # fmt: skip
    several = compose("preset=debug", "evaluation=embedded")
    old = asdict(several)
    # a record from before the fields existed: their defaults
    del old["trainer"]["swaps"], old["evaluation"]["datasets"]["news"]["chat"]
    del old["intervention"], old["mechanism"], old["decode"]["control"]
    assert list(differing_fields(old, several)) == []
    old["evaluation"]["datasets"]["news"]["text_field"] = "other"
    assert list(differing_fields(old, several)) == ["evaluation.datasets.news.text_field"]
    del old["evaluation"]["datasets"]["news"]
    assert list(differing_fields(old, several)) == ["evaluation.datasets"]
    assert not changes_results(RunConfig, "hardware")
    assert changes_results(RunConfig, "optimizer")
    assert {RECORD, RUNTIME} < {f.metadata["enters"] for part in groups() for f in fields(part)}


@pytest.mark.parametrize(
    ("override", "names", "says"),
    [
        ("trainer.batch_size=0", "trainer.batch_size=0", "1 or more"),
        ("trainer.epochs=-1", "trainer.epochs=-1", "1 or more"),
        ("hardware.micro_batch_size=0", "hardware.micro_batch_size=0", "1 or more"),
        ("dataset.n_train=-5", "dataset.n_train=-5", "1 or more"),
        ("dataset.seq_len=1", "dataset.seq_len=1", "2 or more"),
        ("dataset.holdout_fraction=1.5", "dataset.holdout_fraction=1.5", "below 1"),
        ("evaluation.max_new_tokens=[]", "evaluation.max_new_tokens=[]", "valid: [96]"),
        ("evaluation.max_new_tokens=[96,0]", "evaluation.max_new_tokens=0", "1 or more"),
        ("evaluation.text_len=32", "evaluation.text_len=32", "33 or more"),
        ("evaluation.unit=chars", "evaluation.unit=chars", "token, word"),
        ("evaluation.bleu_n=97", "evaluation.bleu_n=97", "at most 96"),
        ("decode.no_repeat_ngram_size=129", "decode.no_repeat_ngram_size=129", "at most 128"),
        ("decode.repetition_penalty=0", "decode.repetition_penalty=0", "above 0"),
        ("decode.temperature=0.5", "decode.temperature=0.5", "decode.strategy=sample"),
        ("decode.num_beams=4", "decode.num_beams=4", "decode.strategy=beam"),
        ("decode.strategy=beam", "decode.num_beams=1", "2 or more"),
        ("decode.strategy=contrastive", "decode.top_k=None", "decode=contrastive"),
        ("decode.top_p=0", "decode.top_p=0", "above 0, at most 1"),
        ("decode.top_p=1.01", "decode.top_p=1.01", "above 0, at most 1"),
        ("decode.top_p=nan", "decode.top_p=nan", "above 0, at most 1"),
        ("decode.min_p=-0.1", "decode.min_p=-0.1", "0 or more, at most 1"),
        ("decode.typical_p=0", "decode.typical_p=0", "above 0, at most 1"),
        ("decode.temperature=0", "decode.temperature=0", "above 0"),
        ("decode.strategy=gredy", "decode.strategy=gredy", "did you mean greedy?"),
        ("tuning.method=lora2", "tuning.method=lora2", "none, full, late_stage"),
        ("tuning.last_blocks=3", "tuning.last_blocks=3", "late_stage or late_stage_lora"),
        ("tuning=lora tuning.lora_rank=0", "tuning.lora_rank=0", "1 or more"),
        ("tuning=late_stage tuning.lora_rank=4", "tuning.lora_rank=4", "lora or late_stage_lora"),
        ("tuning=lora tuning.lora_dropout=0.1", "tuning.lora_dropout=0.1", "trainer.dropout=true"),
        (
            "trainer.activation_cache=float16",
            "trainer.activation_cache=float16",
            "float32, bfloat16, off",
        ),
        ("trainer.clip_norm=inf", "trainer.clip_norm=inf", "above 0"),
        ("optimizer.lr=-1", "optimizer.lr=-1", "0 or more"),
        ("optimizer.lr=fast", "optimizer.lr=fast", "0 or more"),
        ("dataset=files", "dataset.path=None", "dataset.path=…"),
        ("dataset=fiction_stories", "dataset.path=None", "dataset.path=…"),
        ("model=local", "model.path=None", "model.path=DIR"),
        ("seed=-1", "seed=-1", "0 or more"),
        ("+trainer.epoch=3", "trainer.epoch=3", "did you mean epochs"),
        ("trainer.val_prompt_len=999", "trainer.val_prompt_len=999", "dataset.seq_len=128"),
    ],
)
def test_a_bad_value_names_field_value_and_remedy(
    compose: Compose, override: str, names: str, says: str
) -> None:
    with pytest.raises(UserError) as told:
        compose(*override.split())
    assert names in str(told.value)
    assert says in str(told.value)


@pytest.mark.parametrize(
    ("overrides", "names", "says"),
    [
        (["decode=top_p", "decode.temperature=0"], "decode.temperature=0", "above 0"),
        (
            ["decode=contrastive", "decode.penalty_alpha=1.5"],
            "decode.penalty_alpha=1.5",
            "at most 1",
        ),
        (["decode=beam", "decode.top_p=0.9"], "decode.top_p=0.9", "decode.strategy=sample"),
        (
            ["decode=citation_blocker", "decode.citation_blocker.n=128"],
            "decode.citation_blocker.n=128",
            "at most 127",
        ),
        (
            ["evaluation=embedded", "evaluation.datasets.news.path=null"],
            "evaluation.datasets.news.path=None",
            "evaluation.datasets.news.path=…",
        ),
        (
            ["evaluation=embedded", "+evaluation.datasets.news.patch=x"],
            "evaluation.datasets.news.patch=x",
            "did you mean path?",
        ),
    ],
)
def test_a_bad_combination_names_field_value_and_remedy(
    compose: Compose, overrides: list[str], names: str, says: str
) -> None:
    with pytest.raises(UserError) as told:
        compose(*overrides)
    assert names in str(told.value)
    assert says in str(told.value)


def test_the_decodings_of_the_papers_have_their_settings(compose: Compose) -> None:
    top_p = compose("decode=top_p").decode
    assert (top_p.top_p, top_p.temperature, top_p.top_k) == (0.9, 0.7, 50)
    blocker = compose("decode=citation_blocker").decode.citation_blocker
    assert (blocker.enabled, blocker.n, blocker.whole_words) == (True, 5, True)
    both = compose("decode=top_p", "decode.citation_blocker.enabled=true").decode
    assert (both.strategy, both.citation_blocker.enabled) == ("sample", True)


def test_evaluation_datasets_are_datasets_and_more_can_be_added(compose: Compose) -> None:
    paper = compose("model=tinyllama", "evaluation=paper").evaluation
    assert [(name, texts.source) for name, texts in paper.datasets.items()] == [
        ("fiction", "hub"), ("wikipedia", "hub"), ("news", "hub"),
    ]  # fmt: skip
    assert (paper.n_texts, paper.max_new_tokens) == (100, [96, 224])
    more = compose(
        "evaluation=embedded",
        "+dataset@evaluation.datasets.mine=files",
        "evaluation.datasets.mine.path=x.txt",
    ).evaluation
    assert list(more.datasets) == ["fiction", "wikipedia", "news", "mine"]


def test_near_matches_are_near() -> None:
    assert near_matches("tinylama", ["tinyllama", "gpt2"]) == "did you mean tinyllama?"
    assert near_matches("xyz", ["tinyllama", "gpt2"]) == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["model=tinylama"], ["model=tinylama", "did you mean tinyllama", "gpt2"]),
        (["trainer.epoch=3"], ["trainer.epoch", "did you mean epochs"]),
        (["trainers=paper"], ["trainers"]),
        (["lr=1e-3"], ["lr=…: no such field", "did you mean optimizer.lr?"]),
        (["trainer.learning_rate=1e-3"], ["no such field", "did you mean optimizer.lr?"]),
        (["prest=debug"], ["valid: hydra, seed", "did you mean preset?"]),
        (["seed=0,1"], ["seed=0,1: several values", "try:   -m seed=0,1\n"]),
        (
            ["evaluation.max_new_tokens=96"],
            ["evaluation.max_new_tokens is a list", "'evaluation.max_new_tokens=[VALUE]'"],
        ),
        (
            ["model=tiny", "model.revision=abc"],
            ["model.revision=abc", "only with model.source=hub"],
        ),
        (["dataset.split=test"], ["dataset.split=test", "only with dataset.source=hub or files"]),
        (["trainer.epochs=many"], ["trainer.epochs", "many"]),
        (["experiment=seed"], ["experiment=seed", "did you mean seeds"]),
        (["trainer.epochs=[1"], ["trainer.epochs"]),
        (["scale=paper"], ["scale=paper", "changes nothing without an experiment"]),
        (["experiment=table1", "tuning=full"], ["tuning=full", "the experiment sets this"]),
        (["experiment=table1", "scale=papr"], ["scale=papr", "did you mean paper"]),
        (
            ["-m", "dataset.n_train=0", "seed=0,1"],
            ["dataset.n_train=0", "1 or more", "run seed=0"],
        ),
    ],
)
def test_a_bad_command_line_gets_one_message_and_no_traceback(
    tmp_path: Path, arguments: list[str], says: list[str]
) -> None:
    done = hyperfit(tmp_path, *arguments)
    assert done.returncode == 1
    for part in says:
        assert part in done.stderr
    for unwanted in ("Traceback", "Error executing job"):
        assert unwanted not in done.stdout + done.stderr


def test_help_lists_the_groups_and_imports_nothing_heavy(tmp_path: Path) -> None:
    done = hyperfit(tmp_path, "--help")
    assert done.returncode == 0
    for group in (*GROUPS, "experiment"):
        assert f"\n{group}: " in done.stdout
    import subprocess
    import sys

    code = (
        "import sys; sys.argv = ['hyperfit', '--cfg', 'job']\n"
        "from hyperfitting.run import main\n"
        "try: main()\n"
        "finally: print([m for m in ('torch', 'transformers', 'wandb') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_version_is_of_this_code_and_its_packages(tmp_path: Path) -> None:
    done = hyperfit(tmp_path, "--version")
    assert done.returncode == 0
    assert str(code_version()) in done.stdout
    assert f"transformers {transformers.__version__}" in done.stdout


def test_your_own_defaults_are_composed_last(tmp_path: Path) -> None:
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "default.yaml").write_text("# @package _global_\nseed: 42\n")
    done = hyperfit(tmp_path, "--config-dir", str(tmp_path), "--cfg", "job")
    assert "seed: 42" in done.stdout
