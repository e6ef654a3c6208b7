"""Language models of the zoo, those with experts included."""

from __future__ import annotations

import transformers as hf

from tests.support.families import (
    BERT,
    NARROW,
    TEXT,
    VOCABULARY,
    Family,
    convbert,
    dbrx,
    logits,
    states,
    t5_loss,
)

LANGUAGE_MODELS: dict[str, Family] = {
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
        rank weight: model.layers.#.self_attn.{q_proj,k_proj,v_proj,o_proj}.weight \
            model.layers.#.mlp.experts.{gate_up_proj,down_proj}
        freeze router: model.layers.#.mlp.gate.weight
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
        rank weight: model.layers.#.self_attn.{q_proj,k_proj,v_proj,o_proj}.weight \
            model.layers.#.mlp.experts.{gate_up_proj,down_proj}
        whole bias: model.layers.#.self_attn.{q_proj,k_proj,v_proj,o_proj}.bias \
            model.layers.#.mlp.experts.{gate_up_proj_bias,down_proj_bias}
        freeze router: model.layers.#.mlp.router.{weight,bias}
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
            model.layers.#.feed_forward.experts.{gate_up_proj,down_proj} \
            model.layers.#.feed_forward.shared_expert.{gate_proj,up_proj,down_proj}.weight
        freeze router: model.layers.#.feed_forward.router.weight
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
            transformer.blocks.#.ffn.experts.mlp.{w1,v1,w2}
        freeze router: transformer.blocks.#.ffn.router.layer.weight
        freeze embedding: transformer.wte.weight
        freeze normalisation: transformer.blocks.#.norm_attn_norm.{norm_1,norm_2}.weight transformer.norm_f.weight
        freeze output embedding: lm_head.weight
        """,
        blocks="transformer.blocks.{0,1}",
    ),
}
