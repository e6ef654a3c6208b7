"""Layers of torch in the zoo: attention, recurrent layers, convolutions."""

from __future__ import annotations

from torch import nn

from tests.support.families import (
    Convolutions,
    CrossAttention,
    Family,
    Recurrent,
    images,
    sequence,
)

LAYERS: dict[str, Family] = {
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
