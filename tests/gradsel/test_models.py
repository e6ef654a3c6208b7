"""Selection on real model families: the rules of every parameter, its neuron axis, its masks, and training them.

Models are tiny and randomly initialised; ``ZOO`` holds what is expected of each, the tests are written once.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import gradsel
from gradsel.masks import Frozen, Whole
from gradsel.papers.vit import Attention, VisionTransformer
from gradsel.parameters.blocks import block_names
from gradsel.parameters.rules import parameter_rules
from gradsel.views import NeuronView

# --- The models --------------------------------------------------------------------------------------------------


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
    """Action and reason of every parameter, by its name with ``#`` for numbers."""
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
NARROW = TEXT | {"intermediate_size": 12}  # for experts: a hidden state shows all that is inside one
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
    """Both ways of asking for masks: with one of them alone, some of the decoder's small MLPs decide nothing."""
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
    """Masked patches, and the pooled state."""
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
    """nn.MultiheadAttention with matrices of their own for keys and values, and with biases for them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=5, vdim=6, add_bias_kv=True, batch_first=True)
        self.mix = nn.Bilinear(8, 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.attention(x, x[..., :5], x[..., :6], need_weights=False)[0]
        return self.mix(mixed, x[..., :4])


def sequence(width: int) -> Callable[[nn.Module, int], Tensor]:
    return lambda model, seed: drawn(model(noise(seed, 2, 6, width)))


ZOO: dict[str, Family] = {
    "ViT": Family(
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION)),
        images(8),
        """
        rank weight: vit.embeddings.patch_embeddings.projection.weight \
            vit.layers.#.attention.{q_proj,k_proj,v_proj,o_proj}.weight vit.layers.#.mlp.{fc1,fc2}.weight
        whole bias: vit.embeddings.patch_embeddings.projection.bias \
            vit.layers.#.attention.{q_proj,k_proj,v_proj,o_proj}.bias vit.layers.#.mlp.{fc1,fc2}.bias
        whole head: classifier.{weight,bias}
        freeze token: vit.embeddings.cls_token
        freeze position embedding: vit.embeddings.position_embeddings
        freeze normalisation: vit.layers.#.{layernorm_before,layernorm_after}.{weight,bias} \
            vit.layernorm.{weight,bias}
        """,
        blocks="vit.layers.{0,1}",
    ),
    "ViT without a head": Family(
        lambda: hf.ViTModel(hf.ViTConfig(**VISION), use_mask_token=True),
        vit_loss,
        """
        rank weight: embeddings.patch_embeddings.projection.weight \
            layers.#.attention.{q_proj,k_proj,v_proj,o_proj}.weight layers.#.mlp.{fc1,fc2}.weight \
            pooler.dense.weight
        whole bias: embeddings.patch_embeddings.projection.bias \
            layers.#.attention.{q_proj,k_proj,v_proj,o_proj}.bias layers.#.mlp.{fc1,fc2}.bias pooler.dense.bias
        freeze token: embeddings.{cls_token,mask_token}
        freeze position embedding: embeddings.position_embeddings
        freeze normalisation: layers.#.{layernorm_before,layernorm_after}.{weight,bias} layernorm.{weight,bias}
        """,
        blocks="layers.{0,1}",
    ),
    "Swin": Family(
        lambda: hf.SwinForImageClassification(
            hf.SwinConfig(
                image_size=16, patch_size=2, embed_dim=8, depths=[1, 2], num_heads=[1, 2], window_size=2, num_labels=3
            )
        ),
        images(16),
        """
        rank weight: swin.embeddings.patch_embeddings.projection.weight \
            swin.encoder.layers.#.blocks.#.attention.{q_proj,k_proj,v_proj,o_proj}.weight \
            swin.encoder.layers.#.blocks.#.mlp.{fc1,fc2}.weight swin.encoder.layers.#.downsample.reduction.weight
        whole bias: swin.embeddings.patch_embeddings.projection.bias \
            swin.encoder.layers.#.blocks.#.attention.{q_proj,k_proj,v_proj,o_proj}.bias \
            swin.encoder.layers.#.blocks.#.mlp.{fc1,fc2}.bias
        whole position table: \
            swin.encoder.layers.#.blocks.#.attention.relative_position_bias.relative_position_bias_table
        whole head: classifier.{weight,bias}
        freeze normalisation: swin.embeddings.norm.{weight,bias} \
            swin.encoder.layers.#.blocks.#.{layernorm_before,layernorm_after}.{weight,bias} \
            swin.encoder.layers.#.downsample.norm.{weight,bias} swin.layernorm.{weight,bias}
        """,
        blocks="swin.encoder.layers.0.blocks.0 swin.encoder.layers.1.blocks.{0,1}",
    ),
    "ConvNeXt": Family(
        lambda: hf.ConvNextForImageClassification(
            hf.ConvNextConfig(hidden_sizes=[4, 6, 8, 10], depths=[1, 1, 2, 1], num_labels=3)
        ),
        images(32),
        """
        rank weight: convnext.embeddings.patch_embeddings.weight \
            convnext.encoder.stages.#.layers.#.{dwconv,pwconv1,pwconv2}.weight \
            convnext.encoder.stages.#.downsampling_layer.1.weight
        whole bias: convnext.embeddings.patch_embeddings.bias \
            convnext.encoder.stages.#.layers.#.{dwconv,pwconv1,pwconv2}.bias \
            convnext.encoder.stages.#.downsampling_layer.1.bias
        whole layer scale: convnext.encoder.stages.#.layers.#.layer_scale_parameter
        whole head: classifier.{weight,bias}
        freeze normalisation: convnext.embeddings.layernorm.{weight,bias} \
            convnext.encoder.stages.#.layers.#.layernorm.{weight,bias} \
            convnext.encoder.stages.#.downsampling_layer.0.{weight,bias} convnext.layernorm.{weight,bias}
        """,
        blocks="convnext.encoder.stages.{0,1}.layers.0 convnext.encoder.stages.2.layers.{0,1} "
        "convnext.encoder.stages.3.layers.0",
    ),
    "ConvNeXt V2": Family(
        lambda: hf.ConvNextV2ForImageClassification(
            hf.ConvNextV2Config(hidden_sizes=[4, 6, 8, 10], depths=[1, 1, 2, 1], num_labels=3)
        ),
        images(32),
        """
        rank weight: convnextv2.embeddings.patch_embeddings.weight \
            convnextv2.encoder.stages.#.layers.#.{dwconv,pwconv1,pwconv2}.weight \
            convnextv2.encoder.stages.#.downsampling_layer.1.weight
        whole bias: convnextv2.embeddings.patch_embeddings.bias \
            convnextv2.encoder.stages.#.layers.#.{dwconv,pwconv1,pwconv2}.bias \
            convnextv2.encoder.stages.#.downsampling_layer.1.bias
        whole head: classifier.{weight,bias}
        freeze normalisation: convnextv2.embeddings.layernorm.{weight,bias} \
            convnextv2.encoder.stages.#.layers.#.{layernorm,grn}.{weight,bias} \
            convnextv2.encoder.stages.#.downsampling_layer.0.{weight,bias} convnextv2.layernorm.{weight,bias}
        """,
        blocks="convnextv2.encoder.stages.{0,1}.layers.0 convnextv2.encoder.stages.2.layers.{0,1} "
        "convnextv2.encoder.stages.3.layers.0",
    ),
    "ResNet": Family(
        lambda: hf.ResNetForImageClassification(
            hf.ResNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[2, 1], num_labels=3)
        ),
        images(16),
        """
        rank weight: resnet.embedder.embedder.convolution.weight \
            resnet.encoder.stages.#.layers.#.shortcut.convolution.weight \
            resnet.encoder.stages.#.layers.#.layer.#.convolution.weight
        whole head: classifier.#.{weight,bias}
        freeze normalisation: resnet.embedder.embedder.normalization.{weight,bias} \
            resnet.encoder.stages.#.layers.#.shortcut.normalization.{weight,bias} \
            resnet.encoder.stages.#.layers.#.layer.#.normalization.{weight,bias}
        """,
        blocks="resnet.encoder.stages.0.layers.{0,1} resnet.encoder.stages.1.layers.0",
    ),
    "SAM": Family(
        sam,
        sam_loss,
        """
        rank weight: vision_encoder.patch_embed.projection.weight vision_encoder.layers.#.attn.{qkv,proj}.weight \
            vision_encoder.layers.#.mlp.{lin1,lin2}.weight vision_encoder.neck.{conv1,conv2}.weight \
            prompt_encoder.mask_embed.{conv1,conv2,conv3}.weight \
            mask_decoder.transformer.layers.#.self_attn.{q_proj,k_proj,v_proj,out_proj}.weight \
            mask_decoder.transformer.layers.#.cross_attn_token_to_image.{q_proj,k_proj,v_proj,out_proj}.weight \
            mask_decoder.transformer.layers.#.mlp.{lin1,lin2}.weight \
            mask_decoder.transformer.layers.#.cross_attn_image_to_token.{q_proj,k_proj,v_proj,out_proj}.weight \
            mask_decoder.transformer.final_attn_token_to_image.{q_proj,k_proj,v_proj,out_proj}.weight \
            mask_decoder.{upscale_conv1,upscale_conv2}.weight \
            mask_decoder.output_hypernetworks_mlps.#.{proj_in,proj_out}.weight \
            mask_decoder.output_hypernetworks_mlps.#.layers.#.weight \
            mask_decoder.iou_prediction_head.{proj_in,proj_out}.weight \
            mask_decoder.iou_prediction_head.layers.#.weight
        whole bias: vision_encoder.patch_embed.projection.bias vision_encoder.layers.#.attn.{qkv,proj}.bias \
            vision_encoder.layers.#.mlp.{lin1,lin2}.bias prompt_encoder.mask_embed.{conv1,conv2,conv3}.bias \
            mask_decoder.transformer.layers.#.self_attn.{q_proj,k_proj,v_proj,out_proj}.bias \
            mask_decoder.transformer.layers.#.cross_attn_token_to_image.{q_proj,k_proj,v_proj,out_proj}.bias \
            mask_decoder.transformer.layers.#.mlp.{lin1,lin2}.bias \
            mask_decoder.transformer.layers.#.cross_attn_image_to_token.{q_proj,k_proj,v_proj,out_proj}.bias \
            mask_decoder.transformer.final_attn_token_to_image.{q_proj,k_proj,v_proj,out_proj}.bias \
            mask_decoder.{upscale_conv1,upscale_conv2}.bias \
            mask_decoder.output_hypernetworks_mlps.#.{proj_in,proj_out}.bias \
            mask_decoder.output_hypernetworks_mlps.#.layers.#.bias \
            mask_decoder.iou_prediction_head.{proj_in,proj_out}.bias mask_decoder.iou_prediction_head.layers.#.bias
        whole position table: vision_encoder.layers.#.attn.{rel_pos_h,rel_pos_w}
        freeze position embedding: shared_image_embedding.positional_embedding vision_encoder.pos_embed
        freeze normalisation: vision_encoder.layers.#.{layer_norm1,layer_norm2}.{weight,bias} \
            vision_encoder.neck.{layer_norm1,layer_norm2}.{weight,bias} \
            prompt_encoder.mask_embed.{layer_norm1,layer_norm2}.{weight,bias} \
            mask_decoder.transformer.layers.#.{layer_norm1,layer_norm2,layer_norm3,layer_norm4}.{weight,bias} \
            mask_decoder.transformer.layer_norm_final_attn.{weight,bias} \
            mask_decoder.upscale_layer_norm.{weight,bias}
        freeze embedding: prompt_encoder.{no_mask_embed,not_a_point_embed}.weight \
            prompt_encoder.point_embed.#.weight
        freeze token: mask_decoder.{iou_token,mask_tokens}.weight
        """,
        blocks="vision_encoder.layers.{0,1} mask_decoder.transformer.layers.{0,1} "
        "mask_decoder.output_hypernetworks_mlps.{0,1,2,3}",
    ),
    "ViT of timm": Family(
        lambda: VisionTransformer(8, 4, 3, 16, 2, 2, 2.0, 3),
        images(8),
        """
        rank weight: patch_embed.proj.weight blocks.#.attn.{qkv,proj}.weight blocks.#.mlp.{fc1,fc2}.weight
        whole bias: patch_embed.proj.bias blocks.#.attn.{qkv,proj}.bias blocks.#.mlp.{fc1,fc2}.bias
        whole head: head.{weight,bias}
        freeze token: cls_token
        freeze position embedding: pos_embed
        freeze normalisation: blocks.#.{norm1,norm2}.{weight,bias} norm.{weight,bias}
        """,
        blocks="blocks.{0,1}",
    ),
    "Llama, classifier": Family(
        lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**TEXT, num_labels=3)),
        logits,
        """
        rank weight: model.layers.#.self_attn.{q_proj,k_proj,v_proj,o_proj}.weight \
            model.layers.#.mlp.{gate_proj,up_proj,down_proj}.weight
        whole head: score.weight
        freeze embedding: model.embed_tokens.weight
        freeze normalisation: model.layers.#.{input_layernorm,post_attention_layernorm}.weight model.norm.weight
        """,
        blocks="model.layers.{0,1}",
    ),
    "Llama": Family(
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)),
        logits,
        """
        rank weight: model.layers.#.self_attn.{q_proj,k_proj,v_proj,o_proj}.weight \
            model.layers.#.mlp.{gate_proj,up_proj,down_proj}.weight
        freeze embedding: model.embed_tokens.weight
        freeze normalisation: model.layers.#.{input_layernorm,post_attention_layernorm}.weight model.norm.weight
        freeze output embedding: lm_head.weight
        """,
        blocks="model.layers.{0,1}",
    ),
    "Llama, tied": Family(
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, tie_word_embeddings=True)),
        logits,
        """
        rank weight: model.layers.#.self_attn.{q_proj,k_proj,v_proj,o_proj}.weight \
            model.layers.#.mlp.{gate_proj,up_proj,down_proj}.weight
        freeze embedding, tied: model.embed_tokens.weight
        freeze normalisation: model.layers.#.{input_layernorm,post_attention_layernorm}.weight model.norm.weight
        """,
        blocks="model.layers.{0,1}",
    ),
    "GPT-2": Family(
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(
                vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2
            )
        ),
        logits,
        """
        rank weight: transformer.h.#.attn.{c_attn,c_proj}.weight transformer.h.#.mlp.{c_fc,c_proj}.weight
        whole bias: transformer.h.#.attn.{c_attn,c_proj}.bias transformer.h.#.mlp.{c_fc,c_proj}.bias
        freeze embedding, tied: transformer.wte.weight
        freeze position embedding: transformer.wpe.weight
        freeze normalisation: transformer.h.#.{ln_1,ln_2}.{weight,bias} transformer.ln_f.{weight,bias}
        """,
        blocks="transformer.h.{0,1}",
    ),
    "BERT, classifier": Family(
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**BERT)),
        logits,
        """
        rank weight: bert.encoder.layer.#.attention.self.{query,key,value}.weight \
            bert.encoder.layer.#.attention.output.dense.weight bert.encoder.layer.#.intermediate.dense.weight \
            bert.encoder.layer.#.output.dense.weight bert.pooler.dense.weight
        whole bias: bert.encoder.layer.#.attention.self.{query,key,value}.bias \
            bert.encoder.layer.#.attention.output.dense.bias bert.encoder.layer.#.intermediate.dense.bias \
            bert.encoder.layer.#.output.dense.bias bert.pooler.dense.bias
        whole head: classifier.{weight,bias}
        freeze embedding: bert.embeddings.{word_embeddings,token_type_embeddings}.weight
        freeze position embedding: bert.embeddings.position_embeddings.weight
        freeze normalisation: bert.embeddings.LayerNorm.{weight,bias} \
            bert.encoder.layer.#.attention.output.LayerNorm.{weight,bias} \
            bert.encoder.layer.#.output.LayerNorm.{weight,bias}
        """,
        blocks="bert.encoder.layer.{0,1}",
    ),
    "BERT, tokens": Family(
        lambda: hf.BertModel(hf.BertConfig(**BERT)),
        states,
        """
        rank weight: encoder.layer.#.attention.self.{query,key,value}.weight \
            encoder.layer.#.attention.output.dense.weight encoder.layer.#.intermediate.dense.weight \
            encoder.layer.#.output.dense.weight pooler.dense.weight
        whole bias: encoder.layer.#.attention.self.{query,key,value}.bias \
            encoder.layer.#.attention.output.dense.bias encoder.layer.#.intermediate.dense.bias \
            encoder.layer.#.output.dense.bias pooler.dense.bias
        freeze embedding: embeddings.{word_embeddings,token_type_embeddings}.weight
        freeze position embedding: embeddings.position_embeddings.weight
        freeze normalisation: embeddings.LayerNorm.{weight,bias} \
            encoder.layer.#.attention.output.LayerNorm.{weight,bias} encoder.layer.#.output.LayerNorm.{weight,bias}
        """,
        blocks="encoder.layer.{0,1}",
        no_gradient="pooler.dense.weight",
    ),
    "ConvBERT": Family(
        convbert,
        states,
        """
        rank weight: encoder.layer.#.attention.self.{query,key,value,conv_kernel_layer,conv_out_layer}.weight \
            encoder.layer.#.attention.self.key_conv_attn_layer.{depthwise,pointwise}.weight \
            encoder.layer.#.attention.output.dense.weight encoder.layer.#.intermediate.dense.weight \
            encoder.layer.#.output.dense.weight
        whole bias: \
            encoder.layer.#.attention.self.{query,key,value,key_conv_attn_layer,conv_kernel_layer,conv_out_layer}.bias \
            encoder.layer.#.attention.output.dense.bias encoder.layer.#.intermediate.dense.bias \
            encoder.layer.#.output.dense.bias
        freeze embedding: embeddings.{word_embeddings,token_type_embeddings}.weight
        freeze position embedding: embeddings.position_embeddings.weight
        freeze normalisation: embeddings.LayerNorm.{weight,bias} \
            encoder.layer.#.attention.output.LayerNorm.{weight,bias} encoder.layer.#.output.LayerNorm.{weight,bias}
        """,
        blocks="encoder.layer.{0,1}",
    ),
    "T5": Family(
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
        ),
        t5_loss,
        """
        rank weight: encoder.block.#.layer.#.SelfAttention.{q,k,v,o}.weight \
            encoder.block.#.layer.#.DenseReluDense.{wi,wo}.weight \
            decoder.block.#.layer.#.SelfAttention.{q,k,v,o}.weight \
            decoder.block.#.layer.#.EncDecAttention.{q,k,v,o}.weight \
            decoder.block.#.layer.#.DenseReluDense.{wi,wo}.weight
        whole position table: encoder.block.#.layer.#.SelfAttention.relative_attention_bias.weight \
            decoder.block.#.layer.#.SelfAttention.relative_attention_bias.weight
        freeze embedding, tied: shared.weight
        freeze normalisation: encoder.block.#.layer.#.layer_norm.weight encoder.final_layer_norm.weight \
            decoder.block.#.layer.#.layer_norm.weight decoder.final_layer_norm.weight
        """,
        blocks="encoder.block.{0,1} decoder.block.{0,1}",
    ),
    "Mixtral": Family(
        lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**NARROW, num_local_experts=4)),
        logits,
        """
        rank weight: model.layers.#.self_attn.{q_proj,k_proj,v_proj,o_proj}.weight model.layers.#.mlp.gate.weight \
            model.layers.#.mlp.experts.{gate_up_proj,down_proj}
        freeze embedding: model.embed_tokens.weight
        freeze normalisation: model.layers.#.{input_layernorm,post_attention_layernorm}.weight model.norm.weight
        freeze output embedding: lm_head.weight
        """,
        blocks="model.layers.{0,1}",
    ),
    "GPT-OSS": Family(
        lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**NARROW, head_dim=4, num_local_experts=4, num_experts_per_tok=2)),
        logits,
        """
        rank weight: model.layers.#.self_attn.{q_proj,k_proj,v_proj,o_proj}.weight model.layers.#.mlp.router.weight \
            model.layers.#.mlp.experts.{gate_up_proj,down_proj}
        whole bias: model.layers.#.self_attn.{q_proj,k_proj,v_proj,o_proj}.bias model.layers.#.mlp.router.bias \
            model.layers.#.mlp.experts.{gate_up_proj_bias,down_proj_bias}
        freeze embedding: model.embed_tokens.weight
        freeze other: model.layers.#.self_attn.sinks
        freeze normalisation: model.layers.#.{input_layernorm,post_attention_layernorm}.weight model.norm.weight
        freeze output embedding: lm_head.weight
        """,
        blocks="model.layers.{0,1}",
    ),
    "Llama 4": Family(
        lambda: hf.Llama4ForCausalLM(
            hf.Llama4TextConfig(
                **NARROW, head_dim=4, intermediate_size_mlp=24, num_local_experts=2, num_experts_per_tok=1
            )
        ),
        logits,
        """
        rank weight: model.layers.#.self_attn.{q_proj,k_proj,v_proj,o_proj}.weight \
            model.layers.#.feed_forward.experts.{gate_up_proj,down_proj} model.layers.#.feed_forward.router.weight \
            model.layers.#.feed_forward.shared_expert.{gate_proj,up_proj,down_proj}.weight
        freeze embedding: model.embed_tokens.weight
        freeze normalisation: model.layers.#.{input_layernorm,post_attention_layernorm}.weight model.norm.weight
        freeze output embedding: lm_head.weight
        """,
        blocks="model.layers.{0,1}",
    ),
    "DBRX": Family(
        dbrx,
        logits,
        """
        rank weight: transformer.blocks.#.norm_attn_norm.attn.{Wqkv,out_proj}.weight \
            transformer.blocks.#.ffn.router.layer.weight transformer.blocks.#.ffn.experts.mlp.{w1,v1,w2}
        freeze embedding: transformer.wte.weight
        freeze normalisation: transformer.blocks.#.norm_attn_norm.{norm_1,norm_2}.weight transformer.norm_f.weight
        freeze output embedding: lm_head.weight
        """,
        blocks="transformer.blocks.{0,1}",
    ),
    "nn.TransformerEncoder": Family(
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True), 2),
        sequence(8),
        """
        rank weight: layers.#.self_attn.in_proj_weight layers.#.self_attn.out_proj.weight \
            layers.#.{linear1,linear2}.weight
        whole bias: layers.#.self_attn.in_proj_bias layers.#.self_attn.out_proj.bias layers.#.{linear1,linear2}.bias
        freeze normalisation: layers.#.{norm1,norm2}.{weight,bias}
        """,
        blocks="layers.{0,1}",
    ),
    "nn.MultiheadAttention": Family(
        CrossAttention,
        sequence(8),
        """
        rank weight: attention.{q_proj_weight,k_proj_weight,v_proj_weight} attention.out_proj.weight mix.weight
        whole bias: attention.{in_proj_bias,bias_k,bias_v} attention.out_proj.bias mix.bias
        """,
    ),
    "recurrent layers": Family(
        Recurrent,
        sequence(4),
        """
        rank weight: \
            lstm.weight_{ih,hh,hr}_{l0,l1,l0_reverse,l1_reverse} \
            {gru,rnn}.{weight_ih_l0,weight_hh_l0}
        whole bias: \
            lstm.bias_{ih,hh}_{l0,l1,l0_reverse,l1_reverse} \
            {gru,rnn}.{bias_ih_l0,bias_hh_l0}
        whole head: classifier.{weight,bias}
        """,
    ),
    "convolutions": Family(
        Convolutions,
        images(8),
        """
        rank weight: {stem,grouped,depthwise,up,up_grouped,line,up_line,volume,up_volume}.weight
        whole bias: {stem,grouped,depthwise,up,up_grouped,line,up_line,volume,up_volume}.bias
        whole head: head.{weight,bias}
        freeze normalisation: bn.{weight,bias}
        """,
    ),
}


@cache
def built(name: str) -> nn.Module:
    """The model in eval mode, all of its parameters noise of a size that lets gradients through; not to be changed.

    Some models start with zeros, with layer scales of 1e-6, or, SAM's encoder, with weights of 1e-10.
    """
    torch.manual_seed(0)
    model = ZOO[name].make().eval()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            spread = noise(number, *parameter.shape)
            parameter.copy_(1 + 0.1 * spread if parameter.ndim == 1 and bool((parameter == 1).all()) else 0.3 * spread)
    return model


# --- Rules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_rules(name):
    model = built(name)
    rules = parameter_rules(model)
    expected = expected_rules(ZOO[name])
    for full, rule in rules.items():
        fitting = [pattern for pattern in expected if fits(full, pattern)]
        assert [expected[pattern] for pattern in fitting] == [(rule.action, rule.reason)], full
    assert {pattern for pattern in expected if any(fits(full, pattern) for full in rules)} == set(expected)
    assert list(rules) == [full for full, _ in model.named_parameters()]


@pytest.mark.parametrize("name", ZOO)
def test_blocks(name):
    assert block_names(built(name)) == names_in(ZOO[name].blocks)


# --- Neurons -----------------------------------------------------------------------------------------------------


def identity(parameter: Tensor) -> None:
    """Makes the last step of a layer show what went into it."""
    parameter.data.copy_(torch.eye(*parameter.shape[-2:]).expand(parameter.shape))


def linear(module, short, rows):
    call = nn.Linear.forward if isinstance(module, nn.Linear) else type(module).forward  # a router returns more
    width = module.in_features if isinstance(module, nn.Linear) else module.weight.shape[0]
    return lambda: call(module, noise(1, 3, width)), range(rows)


def bilinear(module, short, rows):
    return lambda: module(noise(1, 3, module.in1_features), noise(2, 3, module.in2_features)), range(rows)


def convolution(module, short, rows):
    side = [size + 2 for size in module.kernel_size]
    x = noise(1, 2, module.in_channels, *side)
    return lambda: module(x).movedim(1, -1).flatten(0, -2), range(rows)


def router(module, short, rows):
    return lambda: module(noise(1, 3, module.hidden_dim))[0], range(rows)


def grouped_linear(module, short, rows):
    return lambda: module(noise(1, 3, 1, module.input_size)).flatten(0, 1), range(rows)


def attention(module, short, rows):
    """With as many heads as there are features, and nothing behind them, no two features ever meet."""
    module.num_heads, module.head_dim = module.embed_dim, 1
    identity(module.out_proj.weight)
    x = [noise(seed, 1, 4, width) for seed, width in enumerate((module.embed_dim, module.kdim, module.vdim))]
    x = x if module.in_proj_weight is None else [x[0]] * 3
    return lambda: module(*x)[0][0], [row % module.embed_dim for row in range(rows)]


def recurrent(module, short, rows):
    """One step of the layer that the weight belongs to: gate after gate, the rows are the units of the state."""
    number, _, reverse = short.partition("_l")[2].partition("_")
    suffix = f"_l{number}" + (f"_{reverse}" if reverse else "")
    width = module._parameters[f"weight_ih{suffix}"].shape[1]
    extra = {"proj_size": module.proj_size} if module.proj_size else {}
    layer = type(module)(width, module.hidden_size, **extra)
    hidden = module.proj_size or module.hidden_size
    state = noise(2, 1, 3, hidden)
    if isinstance(module, nn.LSTM):
        state = (state, noise(3, 1, 3, module.hidden_size))

    def step():
        for own in list(layer._parameters):
            layer._parameters[own].data.copy_(module._parameters[own.removesuffix("_l0") + suffix])
        if not module.proj_size or short.startswith("weight_hr"):
            return layer(noise(1, 1, 3, width), state)[0][0]
        shown = []  # the projection shows part of the units at a time
        for part in torch.eye(module.hidden_size).split(module.proj_size):
            layer.weight_hr_l0.data.copy_(part)
            shown.append(layer(noise(1, 1, 3, width), state)[0][0])
        return torch.cat(shown, 1)

    return step, [row % (hidden if short.startswith("weight_hr") else module.hidden_size) for row in range(rows)]


def experts(module, short, rows):
    """Every expert gets a token of its own; what gates and up-projections do is shown by an identity behind them."""
    kind = type(module).__name__
    dbrx = kind == "DbrxExpertGLU"
    count = module.moe_num_experts if dbrx else module.num_experts
    last = "w2" if dbrx else "down_proj"
    out, wide = (module.hidden_size, module.ffn_hidden_size) if dbrx else (16, 12)
    if short != last:
        stacked = module._parameters[last].data.view(count, -1, module._parameters[last].shape[-1])
        identity(stacked)
    x = noise(1, count, 16)

    def each():
        if kind == "Llama4TextExperts":
            return module(x)
        if not dbrx:
            return module(x, torch.arange(count)[:, None], torch.ones(count, 1))
        parts = (module._parameters[own].view(count, wide, out) for own in ("w1", "v1", "w2"))
        return torch.cat([module(x[i : i + 1], *each) for i, each in enumerate(zip(*parts, strict=True))])

    a_unit = rows // count
    units = []
    for row in range(rows):
        expert, inner = divmod(row, a_unit)
        if short != last:
            inner = inner // 2 if kind == "GptOssExperts" else inner % wide  # gates and ups take turns, or follow
        units.append(expert * out + inner)
    return lambda: each().reshape(1, -1), units


PROBES = {
    nn.MultiheadAttention: attention, nn.RNNBase: recurrent, nn.Linear: linear, nn.Bilinear: bilinear,
    nn.modules.conv._ConvNd: convolution, "Conv1D": linear, "GroupedLinearLayer": grouped_linear,
    "MixtralTopKRouter": router, "GptOssTopKRouter": router, "MixtralExperts": experts, "GptOssExperts": experts,
    "Llama4TextExperts": experts, "DbrxExpertGLU": experts,
}  # fmt: skip


def probe_of(module: nn.Module) -> Callable:
    """How to look at the output units of a layer; a layer that is not in the table is an error."""
    for kind, probe in PROBES.items():
        if type(module).__name__ == kind if isinstance(kind, str) else isinstance(module, kind):
            return probe
    raise KeyError(type(module))


def check_neurons(module: nn.Module, short: str, view: NeuronView) -> None:
    """Changing a row of the neuron view changes one output unit, the one that the probe says."""
    module = copy.deepcopy(module)
    for number, parameter in enumerate(module.parameters()):
        parameter.copy_(0.3 * noise(number + 10, *parameter.shape))  # of a size that every change shows
    weight = module._parameters[short]
    matrix = view.of(weight.detach()).clone()
    look, units = probe_of(module)(module, short, len(matrix))
    before = look()
    assert len(units) == len(matrix)
    for row, unit in enumerate(units):
        changed = matrix.clone()
        changed[row] += 0.3 * noise(row, matrix.shape[1])
        weight.data = view.undo(changed, weight.shape).contiguous()
        moved = (look() - before).abs().amax(0) > 1e-5
        assert moved.nonzero().view(-1).tolist() == [unit], f"row {row}"


@pytest.mark.parametrize("name", ZOO)
@torch.no_grad()
def test_one_neuron_is_one_output_unit(name):
    model = built(name)
    ranked = {full: rule for full, rule in parameter_rules(model).items() if rule.action == "rank"}
    for full, rule in ranked.items():
        path, _, short = full.rpartition(".")
        try:
            check_neurons(model.get_submodule(path), short, rule.view)
        except AssertionError as error:
            raise AssertionError(full) from error


@torch.no_grad()
def test_fused_queries_keys_and_values_are_three_rows_of_neurons():
    """timm's layout: queries, then keys, then values, head by head."""
    dim = 6
    layer = Attention(dim, dim)  # heads of one feature do not meet
    identity(layer.proj.weight)
    x = noise(1, 1, 4, dim)
    before = layer(x)[0]
    weight = layer.qkv.weight.detach().clone()
    for row in range(3 * dim):
        layer.qkv.weight.copy_(weight)
        layer.qkv.weight[row] += 1 + noise(row, dim)
        moved = (layer(x)[0] - before).abs().amax(0) > 1e-6
        assert moved.nonzero().view(-1).tolist() == [row % dim]


# --- Masks -------------------------------------------------------------------------------------------------------


def by_hand(module: nn.Module, short: str, tensor: Tensor) -> Tensor:
    """One row for each neuron, written out for every layout, without the library's views."""
    kind = type(module).__name__
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return tensor.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1)
    if kind == "Conv1D":
        return tensor.t()
    if kind == "DbrxExpertGLU" and short == "w2":
        return tensor.unflatten(0, (module.moe_num_experts, -1)).mT.flatten(0, 1)
    if kind in ("GptOssExperts", "Llama4TextExperts", "GroupedLinearLayer"):
        return tensor.mT.flatten(0, 1)
    if kind == "MixtralExperts":
        return tensor.flatten(0, 1)
    return tensor.flatten(1)


FRACTION = 0.01


class Naive:
    """Masks from dense gradients, by stable sorts of the matrices above."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, int], Tensor], batches: list[int]) -> None:
        model = copy.deepcopy(model)
        for batch in batches:
            loss(model, batch).backward()
        self.scores: dict[str, Tensor] = {}
        self.cells: dict[str, Tensor] = {}  # for each cell of the matrix, the place of its entry in the parameter
        self.shapes: dict[str, torch.Size] = {}
        self.total = 0
        for full, rule in parameter_rules(model).items():
            if rule.action != "rank":
                continue
            path, _, short = full.rpartition(".")
            module, parameter = model.get_submodule(path), model.get_parameter(full)
            self.total += parameter.numel()
            if parameter.grad is not None:
                self.shapes[full] = parameter.shape
                self.cells[full] = by_hand(module, short, torch.arange(parameter.numel()).view(parameter.shape))
                self.scores[full] = by_hand(module, short, parameter.grad).abs()

    def _dense(self, full: str, chosen: Tensor) -> Tensor:
        dense = torch.zeros(self.shapes[full], dtype=torch.bool)
        dense.view(-1)[self.cells[full][chosen]] = True
        return dense

    def per_neuron(self, k: int) -> dict[str, Tensor]:
        masks = {}
        for full, score in self.scores.items():
            order = score.argsort(dim=1, descending=True, stable=True)[:, :k]
            masks[full] = self._dense(full, torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True))
        return masks

    def lines(self, dim: int, k: int) -> dict[str, Tensor]:
        """Whole rows (``dim`` 0) or columns (1) with the largest sums of squares."""
        masks = {}
        for full, score in self.scores.items():
            best = score.square().sum(1 - dim).argsort(descending=True, stable=True)[:k]
            chosen = torch.zeros_like(score, dtype=torch.bool)
            chosen.index_fill_(dim, best, True)
            masks[full] = self._dense(full, chosen)
        return masks

    def together(self, fraction: float) -> dict[str, Tensor]:
        everything = torch.cat([score.reshape(-1) for score in self.scores.values()])
        chosen = torch.zeros_like(everything, dtype=torch.bool)
        chosen[everything.argsort(descending=True, stable=True)[: round(fraction * self.total)]] = True
        parts = chosen.split([score.numel() for score in self.scores.values()])
        return {
            full: self._dense(full, part.view(score.shape))
            for (full, score), part in zip(self.scores.items(), parts, strict=True)
        }

    @property
    def silent(self) -> int:
        return sum(int((score.amax(1) == 0).sum()) for score in self.scores.values())


POLICIES = {
    "PerNeuron": (gradsel.PerNeuron(2), lambda naive: naive.per_neuron(2)),
    "Rows": (gradsel.Rows(2), lambda naive: naive.lines(0, 2)),
    "Columns": (gradsel.Columns(2), lambda naive: naive.lines(1, 2)),
    "Global": (gradsel.Global(fraction=FRACTION), lambda naive: naive.together(FRACTION)),
}


def select(model: nn.Module, batches: list[int], family: Family, policy: gradsel.Policy, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*neurons score zero")  # counted below
        return gradsel.select(model, batches, family.loss, policy, **options)


@pytest.mark.parametrize("name", ZOO)
def test_masks_equal_a_naive_selection_in_every_memory_mode(name):
    model, family = built(name), ZOO[name]
    without = set(names_in(family.no_gradient))
    limits = [8 * parameter.numel() for parameter in model.parameters()]  # a float32 gradient, and its sum
    some = max(*limits, sum(limits) // 4)
    runs = {
        "full": ([1, 2], {"memory": "full"}),
        "grouped": ([1, 2], {"max_gradient_bytes": some}),
        "streaming": ([1], {"memory": "streaming"}),
    }
    expected = {count: Naive(model, family.loss, [1, 2][:count]) for count in (1, 2)}
    for title, (policy, masks_of) in POLICIES.items():
        wanted = {count: masks_of(naive) for count, naive in expected.items()}
        for mode, (batches, options) in runs.items():
            selection = select(model, batches, family, policy, **options)
            assert selection.notes["memory"].startswith(mode)
            assert selection.notes.get("neurons that score zero", 0) == expected[len(batches)].silent
            for full, rule in parameter_rules(model).items():
                mask = selection[full]
                if rule.action == "whole":
                    assert isinstance(mask, Whole), full
                elif rule.action == "freeze" or full in without:
                    assert isinstance(mask, Frozen), full
                    assert mask.reason == ("no gradient" if full in without else rule.reason), full
                else:
                    assert torch.equal(mask.to_dense(), wanted[len(batches)][full]), (title, mode, full)
            assert set(wanted[len(batches)]) | without == {
                full for full, rule in parameter_rules(model).items() if rule.action == "rank"
            }


# --- Training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("title", ["PerNeuron", "Columns"])
@pytest.mark.parametrize("name", ZOO)
def test_a_step_of_training_changes_what_is_selected_and_nothing_else(name, title):
    model, family = copy.deepcopy(built(name)), ZOO[name]
    selection = select(model, [1], family, POLICIES[title][0])
    before = {full: parameter.detach().clone() for full, parameter in model.named_parameters()}
    report = gradsel.attach(model, selection)
    assert set(report) == set(before)
    optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=1e-2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*selected weights got no gradient")
        family.loss(model, 1).backward()
        optimizer.step()
    gradsel.detach(model)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    naive = Naive(model, family.loss, [1])
    for full, mask in selection.items():
        changed = after[full] != before[full]
        assert not bool((changed & ~mask.to_dense()).any()), full
        if mask.nnz and not mask.is_whole:
            assert bool(changed.any()) or not bool(naive.scores[full].any()), full
