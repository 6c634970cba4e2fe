"""Check that a model is causal, and that its KV cache gives the same logits.

By running it on a few tokens: the config is not reliable. BERT-like encoders load as causal
language models but attend to the future unless `is_decoder` is set, and not every cache is correct.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from hyperfitting.errors import UserError
from hyperfitting.formatting import first_line
from hyperfitting.models.layers import cache_argument
from hyperfitting.runtime.distributed import reshard

_N_TOKENS = 8
_N_TRIES = 3
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.2}
"""By dtype of the weights, relative to the range of the logits."""
WORKING = (
    "a decoder with a cache, such as Llama, Mistral, Qwen, Gemma, Phi, OLMo, GPT-2, GPT-NeoX, OPT, "
    "Falcon, Bloom, Mixtral, Jamba, Mamba, Mamba2 or FalconMamba"
)


@torch.no_grad()  # not inference_mode: a model may keep tensors of this pass, and be trained later
def check_causal(model: PreTrainedModel, name: str) -> None:
    """Refuse a model whose logits depend on later tokens, or are others with its cache.

    A short text passes through the model whole, and in two parts: all tokens but the last, and the
    last with the cache of the others. The logits of all tokens must agree. Every rank of a sharded
    model must call this. It changes neither the model nor the random number generators.

    Args:
        model: on its device.
        name: of the model, for the message.

    Raises:
        UserError: it is not a causal decoder with a cache.
    """
    was_training = model.training
    model.eval()
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(d.index or 0 for d in devices)):
        try:
            problem = _problem(model, name)
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            problem = f"{name} does not run as a decoder ({first_line(error)})"
        finally:
            reshard(model)
            model.train(was_training)
    if problem:
        raise UserError(
            problem, field="model.path", value=model.config._name_or_path, valid=WORKING
        )


def _problem(model: PreTrainedModel, name: str) -> str:
    """Return why a model is not a causal decoder with a cache; "" if it is one."""
    argument = cache_argument(model)
    problem = ""
    for seed in range(_N_TRIES):
        ids = _tokens(model, seed)  # (1, T)
        whole = _logits(model(input_ids=ids, use_cache=False))  # (T, V)
        start = model(input_ids=ids[:, :-1], use_cache=True)
        if not _agree(model, _logits(start), whole[:-1]):
            problem = (
                f"{name} is no causal model: its logits of a token depend on the tokens after it, "
                "so that its loss would not be that of next-token prediction (if it was trained as "
                "a decoder, its config.json lacks is_decoder: true)"
            )
            continue
        cache = getattr(start, argument, None)
        if not isinstance(cache, Cache):
            return f"{type(model).__name__} has no cache that can be copied and reordered"
        step = model(input_ids=ids[:, -1:], use_cache=True, **{argument: cache})
        if _agree(model, _logits(step), whole[-1:]):
            return ""
        problem = f"{type(model).__name__} has other logits with its cache than without it"
    return problem


def _tokens(model: PreTrainedModel, seed: int) -> Tensor:
    """Return a short text (1, T) of tokens from the middle of the vocabulary."""
    vocab_size = model.get_input_embeddings().num_embeddings
    longest = getattr(model.config, "max_position_embeddings", None) or _N_TOKENS
    steps = torch.arange(min(_N_TOKENS, longest) if longest > 1 else _N_TOKENS)
    ids: Tensor = (steps * 7 + seed * 101 + vocab_size // 2) % vocab_size
    return ids[None].to(next(model.parameters()).device)


def _logits(output: Any) -> Tensor:
    """Return the logits (T, V) of an output for one text, float32."""
    logits: Tensor = output.logits[0].float()
    return logits


def _agree(model: PreTrainedModel, actual: Tensor, expected: Tensor) -> bool:
    """Return whether logits (T, V) are equal, up to rounding.

    Inputs of another shape take other kernels, so that each layer rounds otherwise: in SmolLM2 by
    1e-6 of the logits' range in float32, 4e-3 in float16 and 3e-2 in bfloat16. A leak or a lost
    position is of the order of the logits; in BERT's kinds with random weights, where attention has
    little effect, 1e-3.
    Rounding can also send a token to another expert, but hardly in each of some texts: one in which
    all agree is enough.
    """
    tolerance = _TOLERANCE.get(model.dtype, max(_TOLERANCE.values()))
    extent = expected.amax() - expected.amin()
    return bool((actual - expected).abs().amax() <= tolerance * extent)
