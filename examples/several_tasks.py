"""Two tasks on one base model: a file of a few kilobytes each, which take turns in the same weights.

    python examples/several_tasks.py distilbert/distilbert-base-uncased reviews.csv topics.csv

Without arguments it makes two small tables, and a small BERT with random weights.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import gradsel
from gradsel.training import Config

if len(sys.argv) > 2:
    base, *tables = sys.argv[1:]
else:
    from made import reviews, small_bert, topics

    base, tables = small_bert("made/bert"), [reviews("made/reviews.csv"), topics("made/topics.csv")]

# One run a task. Each leaves a delta, which holds the head of its task, too.
results = {}
for table in tables:
    task = Path(table).stem
    settings = {
        "data": {"path": table},
        "model": {"name": base},
        "method": {"name": "gps", "options": {"k": 2}},
        "recipe": {"epochs": 20, "learning_rate": 3e-2, "batch_size": 16},
        "output": {"folder": f"runs/tasks/{task}"},
    }
    results[task] = gradsel.finetune(Config.from_dict(settings))

# One model in memory. Heads may differ in size; a switch writes the trained entries and nothing else.
model = AutoModelForSequenceClassification.from_pretrained(base).eval()
tokenizer = AutoTokenizer.from_pretrained(base)
bank = gradsel.TaskBank(model)
for task, result in results.items():
    bank.add(task, result.folder / "delta.safetensors")

text = tokenizer("a warm story", return_tensors="pt")
for task, result in results.items():
    bank.activate(task)
    with torch.no_grad():
        shares = model(**text).logits.softmax(-1)[0]
    print(f"{task}: top-1 {result.metrics['top1']:.1f} %, {result.results['bytes']:,} bytes, {shares.tolist()}")
    assert len(shares) == result.results["classes"]

bank.activate(None)  # the base again, to the bit
bank.save("runs/tasks/bank")
print(bank.overlap())
