"""What the zoo of model families is made of: the expectations for one model, losses, and layers of our own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import transformers as hf
from torch import Tensor, nn


@dataclass
class Family:
    """What is expected of one model.

    Args:
        make: builds it.
        loss: the selection loss; ``batch`` is a seed.
        rules: lines "action, kind: names", with ``#`` for numbers and ``{a,b}`` for alternatives.
        blocks: the names of its blocks, written in the same way.
        no_gradient: the ranked parameters that the loss does not reach.
    """

    make: Callable[[], nn.Module]
    loss: Callable[[nn.Module, int], Tensor]
    rules: str
    blocks: str = ""
    no_gradient: str = ""


def expand(text: str) -> Iterator[str]:
    """All names that ``a.{b,c}.d`` stands for."""
    start, brace, rest = text.partition("{")
    if not brace:
        yield text
        return
    options, _, rest = rest.partition("}")
    for option in options.split(","):
        for tail in expand(rest):
            yield start + option + tail


def names_in(text: str) -> list[str]:
    return [name for word in text.split() for name in expand(word)]


def expected_rules(family: Family) -> dict[str, tuple[str, str]]:
    """Action and reason of every parameter, keyed by its name with ``#`` for numbers."""
    found: dict[str, tuple[str, str]] = {}
    for line in family.rules.strip().splitlines():
        title, _, names = line.partition(":")
        action, _, kind = title.strip().partition(" ")
        for name in names_in(names):
            assert name not in found, f"{name} is expected twice"
            found[name] = (action, "neither weight nor bias" if kind == "other" else kind)
    return found


def fits(name: str, pattern: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\#", r"\d+"), name) is not None


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(seed: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(seed))


def drawn(output: Tensor) -> Tensor:
    """A scalar that depends on every entry of ``output`` in its own way."""
    return (output * noise(99, *output.shape)).square().mean() + (output * noise(98, *output.shape)).mean()


VOCABULARY = 30
TEXT = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
NARROW = TEXT | {"intermediate_size": 12}  # for experts, so that the hidden state can show all units inside one
BERT = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 16, "num_labels": 3}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
          "patch_size": 4, "num_labels": 3}  # fmt: skip


def logits(model: nn.Module, seed: int) -> Tensor:
    return drawn(model(tokens(seed)).logits)


def images(size: int) -> Callable[[nn.Module, int], Tensor]:
    def loss(model: nn.Module, seed: int) -> Tensor:
        output = model(noise(seed, 2, 3, size, size))
        return drawn(getattr(output, "logits", output))

    return loss


def sam() -> nn.Module:
    return hf.SamModel(hf.SamConfig(
        vision_config=hf.SamVisionConfig(
            hidden_size=16, output_channels=8, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4,
            window_size=2, global_attn_indexes=[1], num_pos_feats=4, mlp_dim=24,
        ),
        prompt_encoder_config=hf.SamPromptEncoderConfig(
            hidden_size=8, image_size=16, patch_size=4, mask_input_channels=8
        ),
        mask_decoder_config=hf.SamMaskDecoderConfig(
            hidden_size=8, mlp_dim=12, num_hidden_layers=2, num_attention_heads=2, iou_head_hidden_dim=8
        ),
    ))  # fmt: skip


def sam_loss(model: nn.Module, seed: int) -> Tensor:
    """Asks for masks in both ways: with only one of them, some of the decoder's small MLPs have no effect."""
    total = torch.zeros(())
    for several in (True, False):
        output = model(
            noise(seed, 1, 3, 16, 16),
            input_points=torch.tensor([[[[3.0, 9.0], [12.0, 5.0]]]]),
            input_masks=noise(seed + 1, 1, 1, 16, 16),
            multimask_output=several,
        )
        total = total + drawn(output.pred_masks) + drawn(output.iou_scores)
    return total


def t5_loss(model: nn.Module, seed: int) -> Tensor:
    return drawn(model(input_ids=tokens(seed), decoder_input_ids=tokens(seed + 1)).logits)


def vit_loss(model: nn.Module, seed: int) -> Tensor:
    """A loss of masked patches and of the pooled state."""
    output = model(noise(seed, 2, 3, 8, 8), bool_masked_pos=torch.tensor([[True, False, False, True]] * 2))
    return drawn(output.last_hidden_state) + drawn(output.pooler_output)


def states(model: nn.Module, seed: int) -> Tensor:
    return drawn(model(tokens(seed)).last_hidden_state)


def dbrx() -> nn.Module:
    return hf.DbrxForCausalLM(hf.DbrxConfig(
        d_model=16, n_heads=2, n_layers=2, max_seq_len=16, vocab_size=VOCABULARY,
        ffn_config={"ffn_hidden_size": 12, "moe_num_experts": 3, "moe_top_k": 2, "hidden_size": 16},
        attn_config={"kv_n_heads": 1, "rope_theta": 1e4, "clip_qkv": 8.0},
    ))  # fmt: skip


def convbert() -> nn.Module:
    return hf.ConvBertModel(hf.ConvBertConfig(**BERT, num_groups=2, embedding_size=16, head_ratio=2))


class Convolutions(nn.Module):
    """All kinds of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.up = nn.ConvTranspose2d(12, 8, 2, stride=2)
        self.up_grouped = nn.ConvTranspose2d(8, 6, 3, groups=2)
        self.line = nn.Conv1d(6, 5, 3)
        self.up_line = nn.ConvTranspose1d(5, 9, 2, groups=1)
        self.volume = nn.Conv3d(1, 2, 2)
        self.up_volume = nn.ConvTranspose3d(2, 4, 2, groups=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.grouped(self.bn(self.stem(x)).tanh()).tanh()).tanh()
        x = self.up_grouped(self.up(x).tanh()).tanh().flatten(2)
        x = self.up_line(self.line(x).tanh()).tanh()
        x = self.up_volume(self.volume(x[:, None, None].repeat(1, 1, 3, 1, 1)).tanh())
        return self.head(x.flatten(2).mean(2))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, 2, bidirectional=True, proj_size=3, batch_first=True)
        self.gru = nn.GRU(6, 5, batch_first=True)
        self.rnn = nn.RNN(5, 4, batch_first=True)
        self.classifier = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.rnn(self.gru(self.lstm(x)[0])[0])[0])


class CrossAttention(nn.Module):
    """nn.MultiheadAttention with separate matrices and biases for keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=5, vdim=6, add_bias_kv=True, batch_first=True)
        self.mix = nn.Bilinear(8, 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.attention(x, x[..., :5], x[..., :6], need_weights=False)[0]
        return self.mix(mixed, x[..., :4])


def sequence(width: int) -> Callable[[nn.Module, int], Tensor]:
    return lambda model, seed: drawn(model(noise(seed, 2, 6, width)))
