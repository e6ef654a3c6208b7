"""Vision models of the zoo."""

from __future__ import annotations

import transformers as hf

from gradsel.papers.vit import VisionTransformer
from tests.support.families import (
    VISION,
    Family,
    images,
    sam,
    sam_loss,
    vit_loss,
)

VISION_MODELS: dict[str, Family] = {
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
}
