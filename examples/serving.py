"""Trains two tasks so that a server of LoRA adapters takes them, and has the base answer with each.

    python examples/serving.py meta-llama/Llama-3.2-1B stories.txt films.txt

Without arguments it makes a small Llama with random weights, and two texts. The server is vLLM where it is installed,
else PEFT, which loads the same folders.
"""

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator

import gradsel

RANK = 8  # at most 512 for vLLM

if len(sys.argv) > 2:
    name, *paths = sys.argv[1:]
else:
    from made import small_llama, text

    name = small_llama("made/llama")
    paths = [text("made/stories.txt", "story"), text("made/films.txt", "film")]

tokenizer = AutoTokenizer.from_pretrained(name)
adapters = {}
for path in paths:
    task = Path(path).stem
    model = AutoModelForCausalLM.from_pretrained(name)
    tokens = torch.tensor(tokenizer(Path(path).read_text())["input_ids"])
    data = [{"input_ids": block, "labels": block} for block in tokens.split(32) if len(block) == 32]
    batches = [default_data_collator(data[start : start + 8]) for start in range(0, len(data), 8)]

    # The two weights of every neuron with the largest gradient, from 8 inputs a matrix: a LoRA of rank 8.
    policy = gradsel.PerNeuron(2, columns=RANK)
    gradsel.attach(model, gradsel.select(model, batches, gradsel.cross_entropy, policy, kinds={"bias": "freeze"}))
    optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=1e-2)
    for _ in range(3):
        for batch in batches:
            gradsel.cross_entropy(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()

    export = gradsel.Delta.of(model).to_lora(f"runs/serving/{task}", AutoModelForCausalLM.from_pretrained(name))
    print(export)
    adapters[task] = export.folders[0]

modules = " ".join(f"{task}={folder}" for task, folder in adapters.items())
print(f"vllm serve {name} --enable-lora --max-lora-rank {RANK} --lora-modules {modules}")

if importlib.util.find_spec("vllm"):
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLM(name, enable_lora=True, max_lora_rank=RANK)
    for number, (task, folder) in enumerate(adapters.items(), 1):
        request = LoRARequest(task, number, str(folder))
        [answer] = engine.generate("the", SamplingParams(temperature=0, max_tokens=6), lora_request=request)
        print(task, "->", answer.outputs[0].text)
else:
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(name)
    for task, folder in adapters.items():
        base = base if isinstance(base, PeftModel) else PeftModel.from_pretrained(base, folder, adapter_name=task)
        if task not in base.peft_config:
            base.load_adapter(folder, adapter_name=task)
        base.set_adapter(task)
        words = base.generate(**tokenizer("the", return_tensors="pt"), max_new_tokens=6, do_sample=False)
        print(task, "->", tokenizer.decode(words[0]))
