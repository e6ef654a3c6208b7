"""The part "llama": selecting on and training a model shaped like Llama-3.2-1B, in bfloat16, on sequences of 1024.

The weights are random. Their gradients spread over more columns than those of a trained model, so selections of single
entries read more inputs here and cost more than they would on a real model.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import gradsel
from benchmarks.gpu.alone import alone
from gradsel.experiments.cost.comparing import Comparison
from gradsel.experiments.cost.contenders import (
    Batch,
    Contender,
    Entry,
    Method,
    Row,
    Running,
    Selections,
    Task,
    training,
)
from gradsel.experiments.cost.methods import FULL, LORA, OURS, generic
from gradsel.experiments.cost.timing import release

LENGTH, SAMPLES = 1024, (1, 4)
SECONDS = 20.0  # for the rounds of one comparison
NOTE = "random weights"
CONFIG = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
TOY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 200,
}  # fmt: skip


def llama(device: str, config: dict[str, int], length: int) -> nn.Module:
    """Random bfloat16 weights, made on the device; in training mode, in which checkpointing works."""
    import transformers

    settings = transformers.LlamaConfig(
        **config, tie_word_embeddings=True, use_cache=False, max_position_embeddings=length, attn_implementation="sdpa"
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = transformers.LlamaForCausalLM(settings)
    finally:
        torch.set_default_dtype(before)
    return model.to(device).train()


def random_batch(samples: int, length: int, vocabulary: int, device: str) -> Batch:
    """Tokens, which are the targets too: the model shifts them itself."""
    tokens = torch.randint(vocabulary, (samples, length), generator=torch.Generator().manual_seed(samples)).to(device)
    return tokens, tokens


def next_token(model: Any, batch: Batch) -> Tensor:
    """transformers' own loss: cross-entropy of the next token, of logits in float32."""
    return model(input_ids=batch[0], labels=batch[1]).loss


def selecting(policy: Any, k: int, name: str, make: Callable[[], nn.Module], batch: Batch) -> Entry:
    """``select()`` on one batch: each gradient is ranked and freed as soon as backward has it."""

    def start() -> Running:
        model = make()

        def run() -> gradsel.Selection:
            return gradsel.select(model, [batch], next_token, policy, memory="streaming", progress=False)

        return Running(run, {"trained": run().trainable_count(), "note": "streaming, one batch"})

    return Entry(name, k, start)


def forward_and_backward(make: Callable[[], nn.Module], batch: Batch) -> Entry:
    """What selecting is measured against: all gradients of one batch, without ranking any."""

    def start() -> Running:
        contender = Contender(make(), next_token)

        def run() -> None:
            contender.step(batch)
            contender.model.zero_grad(set_to_none=True)

        return Running(run, {"note": "all gradients at once"})

    return Entry("forward and backward", 0, start)


def checkpointed(method: Method) -> Method:
    """The same with the activations of every block computed again in backward."""

    def build(model: Any) -> Contender:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return method.build(model)

    return dataclasses.replace(method, name=f"{method.name}, checkpointed", build=build)


def run(context: Any) -> list[Row]:
    try:
        return measured(context)
    finally:
        release()


def measured(context: Any) -> list[Row]:
    return [row for comparison in comparisons(context) for row in comparison.measure(context)]


def comparisons(context: Any) -> list[Comparison]:
    """The important ones first; nothing is prepared before an entry starts."""
    config, length = (TOY, 16) if context.small else (CONFIG, LENGTH)
    base = functools.cache(lambda: llama(context.device, config, length))
    batches = {samples: random_batch(samples, length, config["vocab_size"], context.device) for samples in SAMPLES}
    select = functools.cache(lambda: Selections(base(), [batches[1]], next_token))
    entrances = tuple(f"model.layers.0.self_attn.{x}_proj" for x in "qkv")
    task = Task(next_token, r"model\.layers\..*_proj", None, entrances, lambda *args: select()(*args))
    methods = generic(task, torch.bfloat16, ks=(1, 2, 3))
    policies = [
        *((gradsel.PerNeuron(k), k, "GPS") for k in (1, 2, 3)),
        (gradsel.Rows(3), 3, "GRFT rows"),
        (gradsel.Columns(3), 3, "GRFT columns"),
    ]
    ratios = {"of_full": FULL, "of_bfloat16_lora": f"{LORA}, bfloat16 adapters"}
    again = [checkpointed(method) for method in methods if method.name == LORA or (method.name, method.k) == (OURS, 1)]

    def make() -> nn.Module:
        return copy.deepcopy(base())

    def steps_of(chosen: Sequence[Method], samples: int) -> list[Entry]:
        return [training(method, make, batches[samples], lambda: NOTE) for method in chosen]

    def comparison(operation: str, samples: int, entries: list[Entry], *against: Any) -> Comparison:
        size = f"{'toy Llama' if context.small else 'Llama-3.2-1B'}, {samples} x {length} tokens"
        shared = {"part": "llama", "operation": operation, "size": size, "dtype": "bfloat16"}
        calls = 2 if operation == "training step" else 1
        return Comparison(shared, entries, calls, 0.0 if context.small else SECONDS, *against, tokens=samples * length)

    found = []
    for samples in reversed(SAMPLES):
        found.append(comparison("training step", samples, steps_of(methods, samples), LORA, ratios))
    for samples in SAMPLES:
        entries = [selecting(policy, k, name, make, batches[samples]) for policy, k, name in policies]
        entries.append(forward_and_backward(make, batches[samples]))
        found.append(comparison("selection", samples, entries, entries[-1].name))
    for samples in reversed(SAMPLES):
        found.append(comparison("training step", samples, steps_of(again, samples), f"{LORA}, checkpointed"))
    return found


if __name__ == "__main__":
    alone(run, __doc__.partition("\n")[0])
