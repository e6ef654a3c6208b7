"""From a PEFT script to gradsel, and back to a PEFT adapter: what changes, and that the results agree.

    python examples/from_peft.py meta-llama/Llama-3.2-1B text.txt

Without arguments it makes a small Llama with random weights, and a text.
"""

import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, default_data_collator

import gradsel
from gradsel.training import Trainer

if len(sys.argv) > 2:
    name, path = sys.argv[1:3]
else:
    from made import small_llama, text

    name, path = small_llama("made/llama"), text("made/text.txt")

tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
tokens = torch.tensor(tokenizer(Path(path).read_text())["input_ids"])
data = [{"input_ids": block, "labels": block} for block in tokens.split(32) if len(block) == 32]
batches = [default_data_collator(data[start : start + 8]) for start in range(0, len(data), 8)]

# In place of model = get_peft_model(model, LoraConfig(r=4)). Whole columns and no biases, so the result is a LoRA.
selection = gradsel.select(model, batches, gradsel.cross_entropy, gradsel.Columns(4), kinds={"bias": "freeze"})
gradsel.attach(model, selection)

# The Trainer as before. Its checkpoints hold what is trained.
arguments = TrainingArguments("runs/from_peft", num_train_epochs=2, learning_rate=3e-3, report_to="none")
Trainer(model, arguments, train_dataset=data).train()

# In place of model.save_pretrained(folder): an adapter that PEFT, and what is built on it, loads.
delta = gradsel.Delta.of(model, selection=selection)
print(delta.to_lora("runs/from_peft/adapter", AutoModelForCausalLM.from_pretrained(name)))

# In place of model.merge_and_unload(): the weights are the fine-tuned ones already, to the bit.
tuned = gradsel.detach(model).eval()
adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(name), "runs/from_peft/adapter").eval()
with torch.no_grad():
    difference = (tuned(batches[0]["input_ids"]).logits - adapted(batches[0]["input_ids"]).logits).abs().max()
print(f"largest difference between logits: {float(difference):.1e}")
assert difference < 1e-4
