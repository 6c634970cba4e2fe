"""`plan=true`: what would be built, how long it takes, and whether it fits into memory."""

import io
import itertools
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from rich.console import Console

from hyperfitting.config import RunConfig
from hyperfitting.errors import UserError
from hyperfitting.models.base import base_model
from hyperfitting.models.size import model_size
from hyperfitting.pipeline.build import build_pipeline
from hyperfitting.store.artifact import Step, Store
from hyperfitting.sweep import throughput
from hyperfitting.sweep.plan import Plan, PlannedMemory, PlannedRun, make_plan, show
from hyperfitting.sweep.throughput import DeviceSpec, Throughput, device_spec
from hyperfitting.training.flops import training_flops
from tests.conftest import Compose

CPU = DeviceSpec("cpu", count=1, memory_bytes=1e9, flops_per_second=None)
OTHER_GPU = ["plan=true", "hardware.plan_gpu_memory_gb=80", "hardware.plan_gpu_tflops=400"]
MODEL_8B = [
    "preset=debug", *OTHER_GPU, "model.architecture.hidden_size=4096",
    "model.architecture.num_hidden_layers=32", "model.architecture.intermediate_size=14336",
    "model.architecture.num_attention_heads=32", "model.architecture.num_key_value_heads=8",
    "+model.architecture.vocab_size=128256", "model.architecture.tie_word_embeddings=false",
    "dataset.seq_len=256", "trainer.batch_size=8",
]  # fmt: skip


def step(store: Store, name: str, flops: float, kind: str = "tuned") -> Step:
    artifact = store.artifact(kind, version=1, config={"name": name}, inputs={})
    return Step(artifact, lambda folder: None, lambda: flops)


def build(store: Store, name: str, flops: float, seconds: float) -> None:
    """Build an artifact whose manifest records this many FLOPs and seconds."""
    artifact = step(store, name, flops).ensure()
    manifest = artifact.manifest()
    assert manifest.flops == flops
    (artifact.folder / "manifest.json").write_text(
        json.dumps(asdict(manifest) | {"seconds": seconds})
    )


def test_duration_follows_from_the_throughput_of_builds_of_similar_size(store: Store) -> None:
    build(store, "small", 1e3, 1.0)
    build(store, "medium", 1e9, 10.0)
    build(store, "large", 2e9, 10.0)
    predicted = Throughput(store.folder, CPU)
    assert predicted.seconds(step(store, "new", 3e9)) == pytest.approx(3e9 / 1.5e8)
    assert predicted.seconds(step(store, "new", 2e3)) == pytest.approx(2.0)


def test_builds_within_a_factor_of_100_count_where_none_is_more_similar(store: Store) -> None:
    """5,000 optimizer steps are predicted from 80, not from a matrix product."""
    build(store, "80 steps", 80e9, 10.0)
    predicted = Throughput(store.folder, CPU)
    assert predicted.seconds(step(store, "5,000 steps", 5e12)) == pytest.approx(625)
    build(store, "800 steps", 800e9, 200.0)
    predicted = Throughput(store.folder, CPU)
    assert predicted.seconds(step(store, "5,000 steps", 5e12)) == pytest.approx(1250)


def test_without_a_similar_build_duration_follows_from_a_matrix_product(store: Store) -> None:
    build(store, "small", 1e3, 1.0)
    predicted = Throughput(store.folder, CPU)
    matmul = predicted.matmul_flops_per_second("tuned")
    assert predicted.seconds(step(store, "new", 1e14)) == pytest.approx(1e14 / (0.6 * matmul))


def test_the_matrix_product_has_the_precision_of_the_build(
    compose: Compose, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU multiplies up to 20 times faster in bfloat16 than in float32."""
    speeds = {"float32": 1e12, "tf32": 5e12, "bfloat16": 1e13}
    monkeypatch.setattr(throughput, "measure_matmul", lambda _, precision: speeds[precision])

    def seconds(kind: str, *overrides: str) -> float:
        spec = device_spec(compose("preset=debug", "hardware.device=cpu", *overrides))
        return Throughput(store.folder, spec).seconds(step(store, "new", 1e14, kind))

    assert seconds("tuned") == pytest.approx(10 * seconds("tuned", "trainer.precision=bfloat16"))
    assert seconds("token_stats", "trainer.precision=bfloat16") == seconds("token_stats")
    assert seconds("tuned") == pytest.approx(5 * seconds("tuned", "trainer.precision=tf32"))
    low = ["model.dtype=bfloat16", "optimizer=adam_bf16"]
    for kind in ("tuned", "token_stats"):
        assert seconds(kind) == pytest.approx(10 * seconds(kind, *low))


@pytest.mark.parametrize(
    ("device_type", "n", "setting"), [("cpu", 512, "highest"), ("cuda", 8192, "high")]
)
def test_the_matrix_product_is_large_enough_for_the_device(
    monkeypatch: pytest.MonkeyPatch, device_type: str, n: int, setting: str
) -> None:
    """On a fake GPU, whose first products are slow and whose clock jitters."""
    products: list[tuple[torch.Size, torch.dtype, str]] = []
    clock = itertools.accumulate(
        seconds for end in (9.0, 9.0, 9.0, 2.0, 1.0, 7.0, 2.0, 2.0) for seconds in (0.0, end)
    )
    randn = torch.randn
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(torch, "randn", lambda *shape, device: randn(1, 1).expand(*shape))
    monkeypatch.setattr(torch, "empty_like", lambda tensor: tensor[:1, :1])

    def mm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        products.append((a.shape, a.dtype, torch.get_float32_matmul_precision()))

    monkeypatch.setattr(torch, "mm", mm)
    speed = throughput.measure_matmul.__wrapped__(device_type, "tf32")
    assert speed == pytest.approx(2 * n**3 / 2.0)
    assert products == [((n, n), torch.float32, setting)] * 8
    assert torch.get_float32_matmul_precision() == "highest"


def test_builds_on_this_machine_say_nothing_about_another_gpu(store: Store) -> None:
    build(store, "similar", 1e14, 1.0)
    gpus = DeviceSpec("cuda", count=4, memory_bytes=80e9, flops_per_second=4e14)
    predicted = Throughput(store.folder, gpus)
    assert predicted.seconds(step(store, "new", 1e14)) == pytest.approx(1e14 / (0.6 * 4e14 * 4))
    continuations = step(store, "new", 1e14, "continuations")  # generated by one process
    assert predicted.seconds(continuations) == pytest.approx(1e14 / (0.2 * 4e14))


def plan_of(store: Store, configs: dict[str, RunConfig]) -> Plan:
    for cfg in configs.values():
        cfg.store = str(store.folder)
    return make_plan(configs)


def shown(plan: Plan) -> str:
    console = Console(file=io.StringIO(), width=200)
    show(plan, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_all_gpus_of_this_machine_are_planned_for(
    compose: Compose, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput, "num_processes", lambda hardware: hardware.num_processes or 8)
    weights = []
    for n in ("null", "8", "1"):
        memory = (
            plan_of(
                store, {"run": compose("preset=debug", "plan=true", f"hardware.num_processes={n}")}
            )
            .runs[0]
            .memory
        )
        assert memory.training is not None
        weights.append(memory.training.weights)
    assert weights[0] == weights[1] == pytest.approx(weights[2] / 8)


def test_the_number_of_other_gpus_has_to_be_given(compose: Compose, store: Store) -> None:
    cfg = compose(*MODEL_8B, "hardware=fsdp")
    with pytest.raises(UserError, match=r"hardware\.num_processes=8"):
        plan_of(store, {"run": cfg})


@pytest.mark.parametrize(
    ("overrides", "ratio"),
    [([], 1.0), (["hardware.activation_checkpointing=true"], 4 / 3), (["tuning=lora"], 2 / 3)],
)
def test_recomputed_activations_are_a_third_more_work(
    compose: Compose, store: Store, overrides: list[str], ratio: float
) -> None:
    """(Of the blocks: the output layer, 7% of the parameters, is not computed again.)"""

    def flops(*more: str) -> float:
        cfg = compose(*MODEL_8B, "trainer.epochs=100", "trainer.eval_every_epochs=100", *more)
        size = model_size(base_model(cfg.model, store), store)
        return training_flops(cfg.training, cfg.dataset, size)

    assert flops(*overrides) / flops() == pytest.approx(ratio, rel=0.03)
    if not overrides:
        more = flops("trainer.target_accuracy=0.99", "trainer.eval_every_epochs=1")
        assert more / flops("trainer.eval_every_epochs=1") == pytest.approx(4 / 3, rel=0.05)


def test_the_planned_time_of_a_training_is_linear_in_its_epochs(
    compose: Compose, store: Store
) -> None:
    overrides = [*MODEL_8B, "trainer.eval_every_epochs=1"]
    seconds = [
        plan_of(store, {"run": compose(*overrides, f"trainer.epochs={epochs}")}).runs[0].seconds
        for epochs in (100, 200, 400)
    ]
    # 8.03e9 parameters, 6 FLOPs for each of them and token, at 0.6 of 400 TFLOP/s
    cfg = compose(*overrides)
    tokens = cfg.dataset.n_train * cfg.dataset.seq_len
    assert seconds[1] - seconds[0] > 100 * tokens * 6 * 7.5e9 / (0.6 * 4e14)
    assert seconds[2] - seconds[1] == pytest.approx(2 * (seconds[1] - seconds[0]))


def test_an_artifact_that_several_runs_share_counts_once(compose: Compose, store: Store) -> None:
    plan = plan_of(
        store,
        {
            "greedy": compose("preset=debug", *OTHER_GPU),
            "top_p": compose("preset=debug", *OTHER_GPU, "decode=top_p"),
        },
    )
    first, second = plan.runs
    assert first.todo == "train, generate, evaluate"
    assert second.todo == "generate"
    assert first.builds["tuned"] == 1
    assert second.builds["tuned"] == 0
    assert second.builds["continuations"] == 2  # of both models, with the other decoding


def test_what_a_remote_store_has_is_copied_and_takes_no_time(
    compose: Compose, tmp_path: Path
) -> None:
    """Another machine has everything before the texts; one of its manifests is damaged."""
    overrides = ["preset=debug", *OTHER_GPU, f"store={tmp_path / 'here'}"]
    remote, empty = tmp_path / "remote", tmp_path / "empty"
    empty.mkdir()
    pipeline = build_pipeline(compose(*overrides, f"store={remote}"), torch.device("cpu"))
    made = itertools.takewhile(lambda s: s.artifact.kind != "continuations", pipeline.steps)
    for artifact in [step.artifact for step in made]:
        with artifact.building() as work:
            assert work is not None
            (work / "file").write_bytes(b"1234")
    (artifact.folder / "manifest.json").write_text("{}")
    n_copied = len(list(remote.glob("*/*/manifest.json"))) - 1
    alone = make_plan({"run": compose(*overrides)}).runs[0]
    stores = f"remote_stores=[{empty},{remote}]"
    copied = make_plan({"run": compose(*overrides, stores)}).runs[0]
    assert artifact.kind == "token_stats"
    assert copied.todo == f"{n_copied} copied from {remote}; generate, evaluate"
    assert copied.builds.total() == alone.builds.total() - n_copied
    assert copied.seconds < alone.seconds
    assert copied.disk_bytes == 4 * n_copied
    assert alone.memory is not None and alone.memory.training is not None
    assert copied.memory is not None and copied.memory.training is None


def test_finished_runs_take_no_time(compose: Compose, store: Store) -> None:
    cfg = compose("preset=debug", *OTHER_GPU)
    cfg.store = str(store.folder)
    plan = make_plan({"run": cfg}, finished=frozenset({"run"}))
    assert plan.seconds == 0
    assert "nothing: finished" in shown(plan)
    assert not store.folder.exists()


@pytest.mark.parametrize(("workers", "expected"), [(1, 60), (2, 30), (3, 30)])
def test_workers_divide_the_time_but_not_that_of_one_run(workers: int, expected: float) -> None:
    memory = PlannedMemory(available=1.0, evaluation=0.5, training=None, hint="")
    runs = [PlannedRun(str(n), Counter(), Counter(), n, memory, 0.0) for n in (10.0, 20.0, 30.0)]
    startup = Plan(runs[:1]).seconds - 10
    assert Plan(runs, workers).seconds == pytest.approx(startup + expected)


def test_a_model_too_large_for_the_gpu_is_reported_with_its_largest_part(
    compose: Compose, store: Store
) -> None:
    plan = plan_of(store, {"run": compose(*MODEL_8B)})
    assert 16 * 8.03e9 < plan.runs[0].peak_bytes < 17 * 8.03e9
    output = shown(plan)
    assert "run: needs 12" in output  # 4 x 4 bytes for each parameter, 128 GB and more
    assert "80.0 GB are available; the largest part, optimizer" in output
    assert "try:" in output


def test_comparing_two_models_takes_the_memory_of_both(compose: Compose, store: Store) -> None:
    def evaluation_bytes(*overrides: str) -> float:
        cfg = compose(*MODEL_8B, f"store={store.folder}", *overrides)
        memory = make_plan({"run": cfg}).runs[0].memory
        assert memory is not None
        return memory.evaluation

    one = evaluation_bytes()
    both = evaluation_bytes("mechanism.measures=[weights]")
    assert both - one == pytest.approx(8.03e9 * 4, rel=0.01)
    # of each of 34 layers three matrices of sums, in float64
    sums = evaluation_bytes("mechanism.measures=[geometry]") - both
    assert sums == pytest.approx(34 * 3 * 4096**2 * 8, rel=0.01)
    # a device map divides the weights, but all sums are on the first GPU
    placed = ["hardware.device_map=auto", "hardware.num_processes=4"]
    divided = evaluation_bytes("mechanism.measures=[weights]", *placed)
    assert both - divided == pytest.approx(2 * 8.03e9 * 4 * 3 / 4, rel=0.01)
    assert evaluation_bytes("mechanism.measures=[geometry]", *placed) - divided == sums


def test_deriving_weights_is_counted_in_host_memory(compose: Compose, store: Store) -> None:
    def memory(*overrides: str) -> PlannedMemory:
        cfg = compose(*MODEL_8B, f"store={store.folder}", "intervention=interpolate", *overrides)
        planned = make_plan({"run": cfg}).runs[0].memory
        assert planned is not None
        return planned

    low = memory("tuning=lora", "model.dtype=bfloat16")
    # the base model, the tuned one with merged adapters, the derived weights
    deriving, writing = low.host.values()
    assert deriving == pytest.approx(8.03e9 * (2 + 2 + 4), rel=0.01)
    assert writing < 0.05 * 8.03e9 * 4  # adapters
    assert low.evaluation == pytest.approx(8.03e9 * 4, rel=0.05)  # float32, as derived
    cfg = compose(*MODEL_8B, f"store={store.folder}", "intervention=interpolate")
    plan = make_plan({"run": cfg})
    assert "intervention takes 64." in shown(plan)
    assert "writing the trained parameters, by rank 0, takes 32.1 GB" in shown(plan)


def test_tf32_is_planned_only_for_a_device_that_has_it(compose: Compose, store: Store) -> None:
    overrides = ["preset=debug", "hardware.device=cpu", "trainer.precision=tf32"]
    with pytest.raises(UserError, match=r"trainer\.precision=tf32: the device \(cpu\) has no TF32"):
        plan_of(store, {"run": compose(*overrides)})
    plan_of(store, {"run": compose(*overrides, *OTHER_GPU)})
    plan_of(store, {"run": compose(*overrides, "tuning=none")})


def test_a_run_that_fits_is_not_reported(compose: Compose, store: Store) -> None:
    plan = plan_of(store, {"run": compose("preset=debug", *OTHER_GPU)})
    assert plan.runs[0].peak_bytes < 80e9
    assert "needs" not in shown(plan)


def test_the_plan_builds_nothing_but_sizes(compose: Compose, store: Store, tmp_path: Path) -> None:
    plan_of(store, {"run": compose("preset=debug", *OTHER_GPU)})
    kinds = {path.parent.parent.name for path in store.folder.glob("*/*/manifest.json")}
    assert kinds.isdisjoint({"documents", "sequences", "tuned", "continuations", "token_stats"})
