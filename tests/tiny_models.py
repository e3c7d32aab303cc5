"""Tiny models of the model library with random weights, and processors to go with them."""

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

try:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
except ModuleNotFoundError:  # a version of the library in which this is the only kind
    from transformers import ViTImageProcessor as ViTImageProcessorPil

LABELS = {0: "good", 1: "bad", 2: "ugly"}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "slept"]


def word_tokenizer(*, framed=True, **options):
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if framed:
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"} | options
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, **{name: value for name, value in names.items() if value is not None}
    )


def module_of(name, **settings):
    """Return a tiny model with random weights."""
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    return cls(cls.config_class(**{"id2label": LABELS} | settings)).eval()


def bert(name="BertForSequenceClassification", **settings):
    return module_of(name, vocab_size=20, **SMALL, **settings)


def gpt2(**settings):
    sizes = {"vocab_size": 20, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return module_of("GPT2ForSequenceClassification", bos_token_id=2, eos_token_id=3, **sizes, **settings)


def t5():
    sizes = {"vocab_size": 20, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return module_of("T5ForSequenceClassification", eos_token_id=3, pad_token_id=0, decoder_start_token_id=0, **sizes)


def bart():
    sizes = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    sizes |= {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "d_model": 16, "vocab_size": 20}
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 3}
    return module_of("BartForSequenceClassification", forced_eos_token_id=None, **sizes, **special)


def vit():
    return module_of("ViTForImageClassification", image_size=8, patch_size=4, **SMALL)


def wav2vec2():
    convolutions = {"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 4), "num_feat_extract_layers": 2}
    convolutions |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer"}
    sizes = {"classifier_proj_size": 8, "vocab_size": 20}
    return module_of("Wav2Vec2ForSequenceClassification", do_stable_layer_norm=True, **convolutions, **sizes, **SMALL)


def ast():
    spectrum = {"max_length": 32, "num_mel_bins": 16, "patch_size": 8, "time_stride": 8, "frequency_stride": 8}
    return module_of("ASTForAudioClassification", **spectrum, **SMALL)


def whisper():
    parts = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    parts |= {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "d_model": 16, "vocab_size": 20}
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 3}
    spectrum = {"max_source_positions": 50, "num_mel_bins": 16, "classifier_proj_size": 8}
    return module_of("WhisperForAudioClassification", **parts, **special, **spectrum)


def small_images():
    return ViTImageProcessorPil(size={"height": 8, "width": 8})


def masked_sounds():
    return transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)


def spectra():
    return transformers.ASTFeatureExtractor(num_mel_bins=16, max_length=32)
