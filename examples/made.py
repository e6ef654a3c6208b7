"""What the examples run on when they are given nothing: small data, and small models with random weights."""

import random
from pathlib import Path

WORDS = {"good": ("fine", "great", "warm", "funny"), "bad": ("cold", "awful", "broken", "dull")}
OTHERS = ("a", "the", "and", "film", "story", "is", "was")


def images(folder):
    """A folder of images in three colours, for training, validation and testing."""
    import numpy
    from PIL import Image

    draw = numpy.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4), ("test", 8)):
        for channel, colour in enumerate(("red", "green", "blue")):
            place = Path(folder, split, colour)
            place.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = draw.integers(0, 180, (32, 32, 3), dtype=numpy.uint8)
                pixels[..., channel] |= 64
                Image.fromarray(pixels).save(place / f"{number}.png")
    return folder


def small_vit():
    """The settings of timm's smallest vision transformer, made smaller, with random weights."""
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
    return {"name": "timm/vit_tiny_patch16_224", "weights": "none", "options": options}


def reviews(path):
    """A table of made-up reviews."""
    draw = random.Random(0)
    lines = ["text,label"]
    for number in range(96):
        label = ("good", "bad")[number % 2]
        words = draw.choices(WORDS[label], k=2) + draw.choices(OTHERS, k=4)
        draw.shuffle(words)
        lines.append(f"{' '.join(words)},{label}")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("\n".join(lines) + "\n")
    return path


def topics(path):
    """A table of made-up texts about a film, a story, or neither."""
    draw = random.Random(0)
    lines = ["text,label"]
    for number in range(96):
        topic = ("film", "story", "neither")[number % 3]
        words = draw.choices(("a", "the", "and", "is", "was", *WORDS["good"], *WORDS["bad"]), k=5)
        lines.append(f"{' '.join([*words, topic] if topic != 'neither' else words)},{topic}")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("\n".join(lines) + "\n")
    return path


def text(path, *about):
    """A text of made-up sentences."""
    draw = random.Random(0)
    words = [word for of in WORDS.values() for word in of]
    about = about or ("film", "story")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(" ".join(f"the {draw.choice(about)} is {draw.choice(words)}" for _ in range(400)))
    return path


def small_bert(folder):
    """A folder with a small BERT and its tokenizer."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    tokenizer = _tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96
    )
    tokenizer.save_pretrained(folder)
    BertModel(config).save_pretrained(folder)
    return folder


def small_llama(folder):
    """A folder with a small Llama, whose output is tied to its embedding, and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = _tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96,
        tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _tokenizer():
    """A tokenizer with one token for each word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *OTHERS, *(word for of in WORDS.values() for word in of)]
    plain = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]")


def masked_images(folder):
    """Bright ellipses on noise, with their masks, in the layout of Kvasir-SEG."""
    import numpy
    from PIL import Image

    draw = numpy.random.default_rng(0)
    for number in range(24):
        y, x = numpy.mgrid[:64, :64] / 64
        centre, radii = draw.uniform(0.35, 0.65, 2), draw.uniform(0.2, 0.3, 2)
        inside = ((y - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2 < 1
        pixels = draw.integers(0, 90, (64, 64, 3)) + 150 * inside[..., None]
        for kind, shown in (("images", pixels), ("masks", 255 * inside)):
            Path(folder, kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(shown.astype(numpy.uint8)).save(Path(folder, kind, f"{number}.png"))
    return folder


def small_sam(folder):
    """A folder with a small SAM for images of 64 x 64 pixels."""
    import torch
    from transformers import SamConfig, SamModel

    torch.manual_seed(0)
    vision = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 16,
        "output_channels": 16, "window_size": 2, "global_attn_indexes": [1], "num_pos_feats": 8, "mlp_ratio": 2.0,
        "initializer_range": 0.1,
    }  # fmt: skip
    prompts = {"hidden_size": 16, "image_size": 64, "patch_size": 16, "mask_input_channels": 4}
    decoder = {"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    config = SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)
    SamModel(config).save_pretrained(folder)
    return folder
