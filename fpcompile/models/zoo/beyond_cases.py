"""Data of :mod:`fpcompile.models.zoo.beyond`: class -> recipe of its inputs and config changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

__all__ = ["CASES", "Case"]

_Fields = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """``recipe`` names the inputs; ``changes`` are config fields, as in the overrides of causal LMs.

    ``repeatable`` is False when two forwards with the same inputs differ, although the model is in eval mode.
    ``note`` is the oddity that a test or a compiler must know.
    """

    recipe: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    repeatable: bool = True
    note: str = ""


_LABELS: _Fields = {"num_labels": 5}
_T5: _Fields = {
    "d_kv": 16,
    "d_ff": 96,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
}
_DEBERTA: _Fields = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 8,
    "max_relative_positions": 16,
    "position_biased_input": False,
    "pooler_hidden_size": 64,
}
_MODERN: _Fields = {"local_attention": 16}
_WHISPER: _Fields = {"num_mel_bins": 16, "max_source_positions": 24, "classifier_proj_size": 32}
_SPEECH: _Fields = {
    "conv_dim": [32, 32, 32],
    "conv_stride": [5, 2, 2],
    "conv_kernel": [10, 3, 2],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 32,
    "vocab_size": 32,
}
_CONV: _Fields = {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 2, 1]}
_CLIP_TEXT: _Fields = {"eos_token_id": 2, "bos_token_id": 1, "projection_dim": 32}
_SIGLIP_TOWER: _Fields = {"model_type": "siglip_vision_model"}

_TEXT: dict[str, Case] = {
    "BertModel": Case("text"),
    "BertForMaskedLM": Case("text"),
    "BertForSequenceClassification": Case("text", _LABELS),
    "BertForTokenClassification": Case("text", _LABELS),
    "BertForQuestionAnswering": Case("text"),
    "RobertaModel": Case("text"),
    "RobertaForSequenceClassification": Case("text", _LABELS),
    "XLMRobertaForSequenceClassification": Case("text", _LABELS),
    "DistilBertForSequenceClassification": Case("text", {"dim": 64, "hidden_dim": 96, **_LABELS}),
    "AlbertModel": Case("text", {"embedding_size": 32}),
    "ElectraForTokenClassification": Case("text", {"embedding_size": 32, **_LABELS}),
    "MPNetModel": Case("text"),
    "FNetModel": Case("text", note="its Fourier transform has no bf16"),
    "DebertaV2Model": Case("text", _DEBERTA),
    "DebertaV2ForTokenClassification": Case("text", _DEBERTA | _LABELS),
    "ModernBertModel": Case("text", _MODERN),
    "ModernBertForSequenceClassification": Case("text", _MODERN | _LABELS),
    "ModernBertForTokenClassification": Case("text", _MODERN | _LABELS),
    "LongformerModel": Case("text", {"attention_window": 8}, note="pads to a multiple of its window"),
    "BigBirdModel": Case(
        "long_text",
        {"block_size": 4, "num_random_blocks": 1},
        note="an input of 28 tokens or less turns its sparse attention off for good; pads to whole blocks",
    ),
    "Gemma3TextModel": Case("text", {"use_bidirectional_attention": True, "query_pre_attn_scalar": 16}),
    "Qwen3ForSequenceClassification": Case("text", {"pad_token_id": 0, **_LABELS}),
    "LlamaForTokenClassification": Case("text", {"pad_token_id": 0, **_LABELS}),
}

_SEQ2SEQ: dict[str, Case] = {
    "T5ForConditionalGeneration": Case("seq2seq", _T5),
    "T5EncoderModel": Case("text", _T5),
    "T5GemmaForConditionalGeneration": Case("seq2seq", {"vocab_size": 128, "encoder": {}, "decoder": {}}),
    "BartForConditionalGeneration": Case("seq2seq"),
    "BartForSequenceClassification": Case("text_and_end", _LABELS, note="pools where the last eos token is"),
    "MarianMTModel": Case("seq2seq", {"decoder_vocab_size": 128}),
    "PegasusForConditionalGeneration": Case("seq2seq"),
    "M2M100ForConditionalGeneration": Case("seq2seq"),
    "WhisperForConditionalGeneration": Case("log_mel_and_text", _WHISPER),
    "WhisperForAudioClassification": Case("log_mel", _WHISPER | _LABELS),
    "Speech2TextForConditionalGeneration": Case(
        "frames_and_text", {"input_feat_per_channel": 16, "conv_channels": 32, "max_source_positions": 256}
    ),
}

_VISION: dict[str, Case] = {
    "ViTModel": Case("image"),
    "ViTForImageClassification": Case("image", _LABELS),
    "DeiTForImageClassification": Case("image", _LABELS),
    "BeitForImageClassification": Case("image", _LABELS),
    "Dinov2Model": Case("image_any_side", {"mlp_ratio": 2}),
    "Dinov2ForImageClassification": Case("image_any_side", {"mlp_ratio": 2, **_LABELS}),
    "SiglipVisionModel": Case("image"),
    "CLIPVisionModel": Case("image"),
    "SwinForImageClassification": Case(
        "image",
        {
            "embed_dim": 16,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
            "patch_size": 4,
            **_LABELS,
        },
    ),
    "ConvNextForImageClassification": Case("image_any_side", {**_CONV, "patch_size": 4, **_LABELS}),
    "ConvNextV2Model": Case("image_any_side", {**_CONV, "patch_size": 4}),
    "ResNetForImageClassification": Case("image_any_side", {**_CONV, "embedding_size": 16, **_LABELS}),
    "SegformerForSemanticSegmentation": Case(
        "image_any_side",
        {
            "hidden_sizes": [16, 32, 48, 64],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 3, 4],
            "decoder_hidden_size": 32,
            **_LABELS,
        },
    ),
    "YolosForObjectDetection": Case(
        "image",
        {"image_size": [32, 32], "num_detection_tokens": 6, "use_mid_position_embeddings": False, **_LABELS},
    ),
    "GLPNForDepthEstimation": Case(
        "image_any_side",
        {
            "hidden_sizes": [16, 32, 48, 64],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 3, 4],
            "decoder_hidden_size": 32,
        },
    ),
    "VideoMAEModel": Case("video", {"num_frames": 4}),
}

_MIXED: dict[str, Case] = {
    "CLIPModel": Case("image_and_text", {"projection_dim": 32, "text_config": _CLIP_TEXT}),
    "SiglipModel": Case(
        "image_and_text", {"text_config": {"projection_size": 64, "max_position_embeddings": 64}}
    ),
    "LlavaForConditionalGeneration": Case("image_16_in_text", {"image_seq_length": 16}),
    "Qwen2_5_VLForConditionalGeneration": Case(
        "patches_in_text",
        {
            "text_config": {
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
            },
            "vision_config": {"fullatt_block_indexes": [1], "window_size": 32, "num_heads": 4},
        },
    ),
    "Gemma3ForConditionalGeneration": Case("typed_image_4_in_text", {"mm_tokens_per_image": 4}),
    "SmolVLMForConditionalGeneration": Case("tiled_image_4_in_text"),
    "Idefics3ForConditionalGeneration": Case("tiled_image_4_in_text", {"scale_factor": 2}),
    "PaliGemmaForConditionalGeneration": Case(
        "typed_image_16_in_text",
        {"projection_dim": 64, "vocab_size": 128, "vision_config": _SIGLIP_TOWER | {"projection_dim": 64}},
    ),
    "BlipForConditionalGeneration": Case(
        "image_and_text",
        {"projection_dim": 32, "image_text_hidden_size": 32, "text_config": {"encoder_hidden_size": 64}},
    ),
    "ViltForQuestionAnswering": Case(
        "image_and_text", _LABELS, repeatable=False, note="draws the order of image patches at random"
    ),
    "VisionEncoderDecoderModel": Case(
        "image_to_text",
        {
            "encoder": {"model_type": "vit"},
            "decoder": {"model_type": "trocr", "is_decoder": True, "add_cross_attention": True}
            | {"cross_attention_hidden_size": 64},
        },
    ),
    "Wav2Vec2Model": Case("waveform", _SPEECH),
    "Wav2Vec2ForCTC": Case("waveform", _SPEECH),
    "HubertForCTC": Case("waveform", _SPEECH),
    "ASTForAudioClassification": Case(
        "spectrogram",
        {"max_length": 40, "num_mel_bins": 16, "frequency_stride": 4, "time_stride": 4, **_LABELS},
    ),
    "PatchTSTForPrediction": Case(
        "series",
        {
            "context_length": 32,
            "patch_length": 8,
            "patch_stride": 8,
            "num_input_channels": 3,
            "prediction_length": 8,
        },
    ),
}

CASES: Mapping[str, Case] = MappingProxyType(_TEXT | _SEQ2SEQ | _VISION | _MIXED)
"""Class name -> case."""
