"""Fine-tunes a language model with transformers' Trainer: the parts of gradsel, one by one, in your own script.

    python examples/llm.py meta-llama/Llama-3.2-1B text.txt

Without arguments it makes a small Llama with random weights, and a text.
"""

import sys
from pathlib import Path

import torch
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

# Blocks of 32 tokens; a language model's labels are its inputs.
tokens = torch.tensor(tokenizer(Path(path).read_text())["input_ids"])
data = [{"input_ids": block, "labels": block} for block in tokens.split(32) if len(block) == 32]
batches = [default_data_collator(data[start : start + 8]) for start in range(0, len(data), 8)]


def next_token(model, batch):
    return model(**batch).loss


# The three rows of every matrix with the largest gradient. Embeddings, tied to the output or not, stay as they are.
selection = gradsel.select(model, batches, next_token, gradsel.Rows(3))
print(gradsel.attach(model, selection))

trainer = Trainer(
    model,
    TrainingArguments("runs/llm", num_train_epochs=3, learning_rate=3e-3, logging_steps=10, report_to="none"),
    train_dataset=data,
)
trainer.train()

delta = gradsel.save_delta(model, "runs/llm/story.safetensors")
print(f"{Path('runs/llm/story.safetensors').stat().st_size:,} bytes")

# Later: the same model from the hub, and the task's file.
again = AutoModelForCausalLM.from_pretrained(name)
gradsel.Delta.load("runs/llm/story.safetensors").apply_(again)
