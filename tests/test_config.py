"""Every option composes, the defaults are the paper's, and bad values get a clear message."""

import inspect
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml

from hyperfitting import config
from hyperfitting.config import RunConfig, conf_dir
from hyperfitting.errors import UserError, near_matches
from tests.conftest import Compose, hyperfit

GROUPS = ("dataset", "decode", "evaluation", "hardware", "model", "optimizer", "preset", "trainer",
          "tracking", "tuning")  # fmt: skip
OPTIONS = [(g, p.stem) for g in GROUPS for p in sorted((conf_dir() / g).glob("*.yaml"))]


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes(compose: Compose, group: str, option: str) -> None:
    open_fields = [
        f"{group}.{key}=x"
        for key, value in yaml.safe_load(
            (conf_dir() / group / f"{option}.yaml").read_text()
        ).items()
        if key == "path" and value is None
    ]
    compose(f"{group}={option}", *open_fields)


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
    assert (cfg.evaluation.context_len, cfg.evaluation.new_tokens) == (32, [96, 224])


def test_the_paper_preset_undoes_all_that_the_embedded_one_changes(compose: Compose) -> None:
    paper = compose("model=smollm2_135m", "preset=paper")
    plain = compose("model=smollm2_135m", "~preset")
    assert paper == plain


def test_one_seed_sets_all_and_each_can_be_set(compose: Compose) -> None:
    cfg = compose("seed=7", "trainer.seed=3")
    assert (cfg.dataset.seed, cfg.trainer.seed, cfg.decode.seed) == (7, 3, 7)


def test_every_field_is_documented() -> None:
    parts = [part for part in vars(config).values() if is_dataclass(part) and part is not RunConfig]
    assert len(parts) == 10
    for part in parts:
        source = "".join(
            inspect.getsource(one) for one in part.__mro__ if one.__module__ == config.__name__
        )
        for one in fields(part):
            after = source.split(f"    {one.name}: ", 1)[1]
            assert after.split("\n", 1)[1].lstrip().startswith('"""'), f"{part.__name__}.{one.name}"


@pytest.mark.parametrize(
    ("override", "names", "says"),
    [
        ("trainer.batch_size=0", "trainer.batch_size=0", "1 or more"),
        ("trainer.epochs=-1", "trainer.epochs=-1", "1 or more"),
        ("hardware.micro_batch_size=0", "hardware.micro_batch_size=0", "1 or more"),
        ("dataset.n_train=-5", "dataset.n_train=-5", "1 or more"),
        ("dataset.seq_len=1", "dataset.seq_len=1", "2 or more"),
        ("evaluation.share=1.5", "evaluation.share=1.5", "below 1"),
        ("evaluation.new_tokens=[]", "evaluation.new_tokens=[]", "valid: [96]"),
        ("evaluation.new_tokens=[96,0]", "evaluation.new_tokens=0", "1 or more"),
        ("evaluation.text_len=32", "evaluation.text_len=32", "33 or more"),
        ("evaluation.unit=chars", "evaluation.unit=chars", "token, word"),
        ("evaluation.bleu_n=97", "evaluation.bleu_n=97", "at most 96"),
        ("decode.no_repeat_ngram=129", "decode.no_repeat_ngram=129", "at most 128"),
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
        ("trainer.trunk_cache=float16", "trainer.trunk_cache=float16", "float32, bfloat16, off"),
        ("trainer.clip_norm=inf", "trainer.clip_norm=inf", "above 0"),
        ("optimizer.lr=-1", "optimizer.lr=-1", "0 or more"),
        ("optimizer.lr=fast", "optimizer.lr=fast", "0 or more"),
        ("dataset=files", "dataset.path=None", "dataset.path=…"),
        ("dataset=fiction_stories", "dataset.path=None", "dataset.path=…"),
        ("model=local", "model.path=None", "model.path=DIR"),
        ("seed=-1", "seed=-1", "0 or more"),
        ("+trainer.epoch=3", "trainer.epoch=3", "did you mean epochs"),
        ("trainer.epoch_context_len=999", "trainer.epoch_context_len=999", "dataset.seq_len=128"),
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
        (["decode=contrastive", "decode.alpha=1.5"], "decode.alpha=1.5", "at most 1"),
        (["decode=beam", "decode.top_p=0.9"], "decode.top_p=0.9", "decode.strategy=sample"),
        (
            ["decode=citation_blocker", "decode.citation_blocker.n=128"],
            "decode.citation_blocker.n=128",
            "at most 127",
        ),
        (
            ["evaluation=embedded", "evaluation.contexts.news.path=null"],
            "evaluation.contexts.news.path=None",
            "evaluation.contexts.news.path=…",
        ),
        (
            ["evaluation=embedded", "+evaluation.contexts.news.patch=x"],
            "evaluation.contexts.news.patch=x",
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


def test_evaluation_sets_are_datasets_and_more_can_be_added(compose: Compose) -> None:
    paper = compose("model=tinyllama", "evaluation=paper").evaluation
    assert [(name, texts.source) for name, texts in paper.contexts.items()] == [
        ("fiction", "hub"), ("wikipedia", "hub"), ("news", "hub"),
    ]  # fmt: skip
    assert (paper.n_texts, paper.new_tokens) == (100, [96, 224])
    more = compose(
        "evaluation=embedded",
        "+dataset@evaluation.contexts.mine=files",
        "evaluation.contexts.mine.path=x.txt",
    ).evaluation
    assert list(more.contexts) == ["fiction", "wikipedia", "news", "mine"]


def test_near_matches_are_near() -> None:
    assert near_matches("tinylama", ["tinyllama", "gpt2"]) == "did you mean tinyllama?"
    assert near_matches("xyz", ["tinyllama", "gpt2"]) == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["model=tinylama"], ["model=tinylama", "did you mean tinyllama", "gpt2"]),
        (["trainer.epoch=3"], ["trainer.epoch", "did you mean epochs"]),
        (["trainers=paper"], ["trainers"]),
        (["trainer.epochs=many"], ["trainer.epochs", "many"]),
        (["experiment=seed"], ["experiment=seed", "did you mean seeds"]),
        (["trainer.epochs=[1"], ["trainer.epochs"]),
        (["scale=paper"], ["scale=paper", "changes nothing without an experiment"]),
        (["experiment=table1", "tuning=full"], ["tuning=full", "the experiment fixes this"]),
        (["experiment=table1", "scale=papr"], ["scale=papr", "did you mean paper"]),
        (
            ["-m", "dataset.n_train=0", "seed=0,1"],
            ["dataset.n_train=0", "1 or more", "member seed=0"],
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
    assert "Traceback" not in done.stdout + done.stderr


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


def test_your_own_defaults_are_composed_last(tmp_path: Path) -> None:
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "default.yaml").write_text("# @package _global_\nseed: 42\n")
    done = hyperfit(tmp_path, "--config-dir", str(tmp_path), "--cfg", "job")
    assert "seed: 42" in done.stdout
