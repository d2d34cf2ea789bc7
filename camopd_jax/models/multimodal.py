"""Checkpoints with other modalities than text, of which only the text model is read."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Multimodal:
    """A checkpoint with other modalities. Only its text model is read; its other tensors stay as they are."""

    text: str  # model_type of the text model, if its config has none
    fields: frozenset[str]  # the fields of config.json beside `text_config`
    prefix: str = "language_model."  # of the names of the text model's tensors
    replaces: str = ""  # the start of the text model's own names, in place of which they have the prefix


MULTIMODAL: dict[str, Multimodal] = {  # by the model_type of config.json
    "gemma3": Multimodal(
        "gemma3_text",
        frozenset(
            "vision_config mm_tokens_per_image boi_token_index eoi_token_index image_token_index initializer_range "
            "tie_word_embeddings".split()
        ),
    ),
    "gemma4": Multimodal(
        "gemma4_text",
        frozenset(
            "vision_config audio_config boi_token_id eoi_token_id image_token_id video_token_id boa_token_id "
            "eoa_token_id eoa_token_index audio_token_id vision_soft_tokens_per_image initializer_range "
            "tie_word_embeddings".split()
        ),
        prefix="model.language_model.",
        replaces="model.",
    ),
    "mistral3": Multimodal(
        "mistral",
        frozenset(
            "vision_config image_token_index projector_hidden_act vision_feature_layer multimodal_projector_bias "
            "spatial_merge_size tie_word_embeddings".split()
        ),
    ),
}
