"""Keys of config.json that do not affect the numbers a model computes. Data, with its origin.

`INERT` keys may have any value. `FIXED` keys could change the numbers, so only the listed values, which do not, are
accepted. Any other key that we do not use is an error, because it may change the model.

Origin: the attributes of `PretrainedConfig()` and `LlamaConfig()` in transformers 4.36.2 (the last to write all of
them) and 5.24.0, plus what trainers add; tests/parity/test_config_keys.py compares with the installed transformers.
"""

from __future__ import annotations

from typing import Any

_TRANSFORMERS = (
    "_attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash "
    "_experts_implementation_internal _name_or_path _output_attentions _post_init_done attn_implementation "
    "chunk_size_feed_forward finetuning_task id2label initializer_range is_decoder label2id name_or_path num_labels "
    "output_attentions output_hidden_states pad_token_id prefix pretraining_tp problem_type return_dict sep_token_id "
    "task_specific_params tf_legacy_loss tie_encoder_decoder tokenizer_class torchscript transformers_version "
    "use_bfloat16 use_cache xla_device"
)
_GENERATION = (  # defaults of generation, which the caller chooses here
    "bad_words_ids begin_suppress_tokens decoder_start_token_id diversity_penalty do_sample early_stopping "
    "encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id "
    "length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences "
    "output_scores remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens temperature top_k "
    "top_p typical_p"
)
_TRAINERS = (  # dropout and noise are for training only; lengths belong to the tokenizer or the data
    "_flash_attn_2_enabled _attn_implementation_autoset attention_dropout attn_pdrop auto_map custom_pipelines "
    "embd_pdrop embedding_dropout flash_attention gradient_checkpointing hidden_dropout max_seq_len max_seq_length "
    "max_sequence_length model_max_length neftune_noise_alpha resid_pdrop resid_dropout tokenizer_model_max_length "
    "tokenizer_padding_side unsloth_fixed unsloth_version use_flash_attention use_flash_attention_2 use_flash_attn"
)
INERT = frozenset(f"{_TRANSFORMERS} {_GENERATION} {_TRAINERS}".split())

FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "architectures": (["LlamaForCausalLM"], None),
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "bias": (False, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "is_encoder_decoder": (False, None),
    "pruned_heads": ({}, None),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False, None),
    "rope_traditional": (False, None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
}
