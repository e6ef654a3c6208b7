"""Whether a server of LoRA adapters would take an adapter: the rules that vLLM applies when it loads one.

They are those of ``PEFTHelper`` (vllm/lora/peft_helper.py) and ``LoRAModel`` (vllm/lora/lora_model.py), written anew.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

#: The last names of the layers that vLLM's Llama can adapt.
LLAMA_MODULES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
#: vLLM's choices for max_lora_rank.
MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass
class Accepted:
    """An adapter that passed; its config as the server understands it."""

    config: dict

    def rank(self, module: str) -> int:
        return self._pattern("rank_pattern", module, self.config["r"])

    def scaling(self, module: str) -> float:
        return self._pattern("alpha_pattern", module, self.config["lora_alpha"]) / self.rank(module)

    def _pattern(self, key, module, default):
        found = [v for k, v in (self.config.get(key) or {}).items() if re.match(rf"(.*\.)?({k})$", module)]
        return found[0] if found else default


def accept(folder: Path, modules: set[str], max_lora_rank: int) -> Accepted:
    """The adapter in a folder, or an AssertionError that says which rule it breaks."""
    assert max_lora_rank in MAX_RANKS
    config = json.loads((folder / "adapter_config.json").read_text())
    assert {"r", "lora_alpha", "target_modules"} <= config.keys()
    assert config["r"] > 0
    assert max([config["r"], *(config.get("rank_pattern") or {}).values()]) <= max_lora_rank
    assert config.get("bias", "none") == "none"
    assert set(config.get("modules_to_save") or ()) <= {"classifier", "score"}
    refused = ("use_dora", "use_qalora", "use_bdlora", "lora_bias", "layer_replication", "alora_invocation_tokens")
    assert not any(config.get(key) for key in refused)
    assert not isinstance(config.get("init_lora_weights", True), str)
    found = Accepted(config)
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        assert name.startswith("base_model.model."), name
        path = name.removeprefix("base_model.model.")
        if (saved := path.rpartition(".")[0]) in (config.get("modules_to_save") or ()):
            assert saved in ("classifier", "score")
            continue
        module, letter, last = path.rsplit(".", 2)
        assert letter in ("lora_A", "lora_B"), name
        assert last == "weight", name
        assert module.rpartition(".")[2] in modules, name
        assert any(module == each or module.endswith(f".{each}") for each in config["target_modules"]), name
        pairs.setdefault(module, {})[letter] = tuple(tensor.shape)
    for module, shapes in pairs.items():
        assert shapes["lora_A"][0] == shapes["lora_B"][1] == found.rank(module), module
    assert pairs
    return found
