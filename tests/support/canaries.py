"""Which test fails once a workaround can go, or when an internal of another package moves.

A place is a function, class or constant of the package, or a module. `test_canaries.py` fails for what is missing here.
"""

from __future__ import annotations

# Workarounds that name the version they work around: place and library, and the tests that fail once they can go.
STAMPED: dict[tuple[str, str], tuple[str, ...]] = {
    ("length_grouped_sampler", "accelerate"): ("test_a_sampler_does_not_hear_of_the_epoch_once_batches_are_skipped",),
    ("with_own_batches", "accelerate"): ("test_batches_of_several_lengths_cannot_be_joined",),
    ("wrap_for_training", "accelerate"): ("test_a_model_that_was_prepared_for_an_evaluation_is_not_wrapped",),
    ("keep_adapter_whole", "accelerate"): ("test_weights_that_are_to_be_left_are_sharded_where_one_process_loads",),
    ("shard_tied_weights", "accelerate"): ("test_modules_that_share_a_weight_are_sharded_one_by_one",),
    ("evaluation_loop", "transformers"): ("test_a_model_is_sharded_together_with_an_optimizer",),
    ("prepare_to_evaluate", "accelerate"): ("test_a_model_is_sharded_together_with_an_optimizer",),
    ("save_model", "transformers"): ("test_no_model_is_saved_where_checkpoints_are_sharded",),
    ("WholeBatches", "accelerate"): ("test_a_stream_of_several_files_is_shared_by_files",),
    ("rows_in_last_batch", "accelerate"): ("test_the_rows_of_the_last_batch_are_not_known_once_batches_are_skipped",),
    ("keep_unpacked", "bitsandbytes"): ("test_an_evaluation_takes_the_gradients_of_a_4_bit_layer_away",),
    ("UPSTREAM_WARNINGS", "peft"): ("test_a_hidden_warning_is_still_given", "test_every_hidden_warning_has_a_canary"),
    ("UPSTREAM_WARNINGS", "transformers"): ("test_a_hidden_warning_is_still_given",),
    ("adapter_disabled", "peft"): ("test_disable_adapter_leaves_generate_as_it_is",),
    ("lora_kind", "peft"): ("test_a_dora_is_converted_without_its_magnitudes",),
    ("_set_head_size", "ctranslate2"): ("test_the_converter_of_ctranslate2_leaves_out_the_size_of_heads",),
    ("to_ctranslate2", "ctranslate2"): ("test_the_converter_of_ctranslate2_reads_fields_that_bart_no_longer_has",),
    ("call_inner_model", "peft"): (
        "test_adalora_adds_its_penalty_in_evaluation_too",
        "test_adaption_prompts_keep_the_forward_of_the_model_that_was_wrapped",
    ),
    ("_generate_padded", "peft"): ("test_virtual_tokens_stand_before_the_padding",),
    ("initialize_eva", "peft"): ("test_eva_masks_a_decoder_by_the_source", "test_eva_waits_for_ever_for_tokens"),
    ("initialize_loftq", "peft"): ("test_loftq_needs_an_accelerator_or_leaves_the_scaling_out",),
    ("numbered_experts", "peft"): ("test_names_of_experts_are_not_found",),
    ("peft_type", "peft"): ("test_new_names_of_methods_are_refused",),
    ("repeat_task_ids", "peft"): ("test_poly_keeps_one_task_for_each_row_of_the_input",),
    ("residual_base", "peft"): (
        "test_corda_cannot_be_loaded_again",
        "test_lora_ga_is_loaded_onto_the_unchanged_base",
    ),
    ("save_with_classifier", "peft"): ("test_the_classifier_of_x_lora_is_not_saved",),
    ("before_model", "peft"): ("test_multitask_prompts_drop_the_inputs_of_the_decoder",),
    ("before_model", "transformers"): ("test_the_decoder_of_fsmt_sees_what_follows_where_there_are_no_ids",),
    ("derive_input_prompt", "peft"): ("test_generate_leaves_out_the_prompts_of_the_decoder",),
    ("with_named_targets", "peft"): ("test_the_default_targets_of_mixtral_are_not_found",),
    ("wrap", "peft"): ("test_prompts_stand_beside_embeddings_of_another_table",),
    ("FusedNewGELU", "transformers"): ("test_the_tanh_form_of_gelu_keeps_more_than_its_input",),
    ("rms_norm", "transformers"): ("test_rms_norms_keep_more_than_their_input",),
    ("compact_dropout", "torch"): ("test_dropout_on_a_cpu_keeps_a_number_per_element",),
    ("NeftuneCallback", "transformers"): ("test_noise_is_put_where_t5_and_bart_do_not_compute",),
    ("_finalize_training", "transformers"): ("test_folders_named_like_a_checkpoint_are_removed",),
    ("REDRAWN", "torch"): ("test_the_eager_backend_draws_other_masks_in_the_backward_pass",),
    ("_checkpoint_as_a_whole", "transformers"): ("test_the_attention_of_t5_has_zeros_require_a_gradient",),
    ("_end_of_sum", "torch"): ("test_the_engine_adds_no_gradients_in_place_under_a_dispatch_mode",),
    ("_run_epoch", "transformers"): ("test_a_finished_run_that_is_resumed_trains_one_more_step",),
    ("why_not_resumable", "transformers"): ("test_a_checkpoint_without_optimizer_is_continued",),
    ("_evaluating_parent", "transformers"): (
        "test_generated_rows_are_padded_to_the_limit",
        "test_rows_that_fill_the_last_batch_are_counted",
    ),
    ("accumulated_token_loss", "transformers"): ("test_the_loss_ignores_the_size_of_the_accumulated_batch",),
    ("corrected_collator", "transformers"): (
        "test_fsmt_writes_into_the_labels_that_it_shifts",
        "test_labels_are_padded_on_the_side_of_the_sources",
    ),
    ("counts_prefixes_as_routed", "transformers"): ("test_a_prefix_is_counted_among_the_tokens_of_routers",),
    ("decoder_input_ids", "transformers"): ("test_fsmt_writes_into_the_labels_that_it_shifts",),
    ("results_on_host", "transformers"): ("test_results_are_joined_on_the_device_with_every_batch",),
    ("generated_length", "transformers"): ("test_beam_search_fills_rows_with_the_end_where_the_padding_is_0",),
    ("with_decoder_inputs", "transformers"): ("test_the_decoder_of_fsmt_reads_the_source",),
    ("config_at", "transformers"): ("test_the_cache_of_t5_is_as_deep_as_its_encoder",),
    ("without_filling", "transformers"): ("test_beam_search_fills_rows_with_the_end_where_the_padding_is_0",),
    ("columns_of_other_forms", "trl"): ("test_the_end_of_a_completion_goes_onto_another_column",),
    ("has_own_output_head", "transformers"): ("test_the_head_of_mt5_is_tied_until_weights_are_loaded",),
    ("_as_sft_trainer", "trl"): (
        "test_the_loss_of_trl_reads_what_we_set",
        "test_the_output_head_of_a_model_is_replaced_for_a_loss",
    ),
    ("fresh_models", "trl"): ("test_the_output_head_of_a_model_is_replaced_for_a_loss",),
    ("unrounded_adapter", "trl"): ("test_the_adapter_of_a_quantized_model_is_rounded",),
}

# The same for workarounds that name no version, by place.
UNSTAMPED: dict[str, tuple[str, ...]] = {
    "OF_TORCH_SAVE": ("test_torch_save_does_not_tell_why_it_could_not_write",),
    "AdaLoraCallback": ("test_a_trainer_does_not_run_the_schedule_of_adalora",),
    "BottleneckModel": ("test_putting_a_module_back_needs_a_weight",),
    "LeftSFTTrainer": ("test_rows_for_predict_are_not_prepared",),
    "LeftTrainingArguments": (
        "test_bf16_on_a_cpu_has_to_be_asked_for",
        "test_pinned_memory_without_an_accelerator_is_warned_of",
    ),
    "LoggingCallback": ("test_trackers_are_called_before_the_callbacks_of_the_user",),
    "DivergenceCheck": ("test_a_loss_that_is_not_a_number_is_logged_as_0",),
    "PTuningV2Model": ("test_putting_a_module_back_needs_a_weight",),
    "UpstreamFilter": (
        "test_a_text_that_is_too_long_is_warned_of_by_the_tokenizer",
        "test_lines_of_trl_carry_the_number_of_the_process",
    ),
    "_with_adapter": ("test_a_soft_prompt_is_not_loaded_for_training",),
    "_single_rows": ("test_corda_takes_one_row_at_a_time",),
    "check_devices": ("test_several_gpus_in_one_process_are_wrapped_in_data_parallel",),
    "check_patterns": ("test_a_target_that_matches_nothing_is_passed_over",),
    "context_loss": ("test_the_loss_of_cpt_is_the_mean_of_a_micro_batch",),
    "decoder_key_value_shape": ("test_prefixes_are_shaped_by_the_encoder",),
    "disguised": ("test_a_backward_pass_leaves_function_modes", "test_autocast_for_a_gpu_is_turned_off_without_one"),
    "from_arguments": ("test_the_name_of_a_deprecated_field_is_warned_of",),
    "initialize_lora_ga": ("test_lora_ga_lets_its_hooks_warn",),
    "why_not_resumable": ("test_a_checkpoint_that_was_cut_off_is_taken_for_the_last",),
    "one_row_for_each_prompt": ("test_rows_of_a_batch_are_joined_by_a_collator_that_can_be_replaced",),
    "register_with_peft": ("test_a_missing_kernel_is_logged_at_import",),
    "reparameterization": ("test_fourierft_starts_at_random",),
    "sequential_sampler": ("test_evaluation_rows_are_permuted_with_those_of_training",),
    "decode": ("test_the_id_that_pads_labels_cannot_be_decoded",),
    "collect_prompt_encoder": ("test_an_encoder_of_prompts_is_not_saved",),
    "collect_ranks": ("test_adalora_saves_only_the_ranks_that_are_left",),
    "without_saving_warnings": ("test_empty_factors_of_adalora_are_warned_of",),
}

TRAINER = "test_trainer_calls_what_we_override"
TUNER = "test_peft_calls_what_our_tuners_override"
IMPORT = "test_what_we_import_is_there_and_takes_what_we_pass"
HOOKS = "test_modules_keep_their_hooks_in_dicts"
MEMORY = "test_the_memory_of_a_gpu_can_be_recorded"
MODEL_NAMES = "test_classes_of_models_are_found_by_type"
NORMS = "test_models_copy_the_rms_norms_of_four"
GATED_MLPS = "test_models_copy_the_gated_mlps_of_three"
PARSER = "test_a_parser_keeps_its_defaults_where_we_clear_them"
ENUM = "test_an_enum_finds_a_member_that_is_added_as_its_own_are"
SHARDING = "test_sharding_can_be_asked_for"
FOUR_BIT = "test_a_4_bit_layer_has_what_we_read"
EIGHT_BIT = "test_an_8_bit_layer_has_what_we_read"
OPERATOR = "test_an_operator_that_a_plan_answers_for_is_there"
KERNEL = "test_a_kernel_of_attention_takes_what_we_pass"
DISPATCH = "test_operators_on_meta_are_dispatched_with_their_schema"
SPARSE = "test_sparse_tensors_have_positions_and_values_on_meta"
STORAGE = "test_a_storage_has_one_address_and_a_view_its_base"
TREES = "test_trees_of_arguments_are_walked"
BACKWARD = "test_a_backward_pass_leaves_function_modes"
UNQUANTIZED = "test_a_model_names_what_is_not_quantized"
ATTENTION = "test_attention_goes_through_an_interface_that_is_found_by_name"

# Private names of other packages in use, or overridden, and imports that are no public API.
INTERNALS: dict[str, str] = {
    # transformers
    "INTEGRATION_TO_CALLBACK": IMPORT,
    "_finalize_training": TRAINER,
    "_run_epoch": TRAINER,
    "_current_graph_task_id": "test_a_backward_pass_has_a_number",
    "_save_checkpoint": TRAINER,
    "_save_optimizer_and_scheduler": TRAINER,
    "_load_optimizer_and_scheduler": TRAINER,
    "_get_output_dir": TRAINER,
    "_push_from_checkpoint": TRAINER,
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": MODEL_NAMES,
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": MODEL_NAMES,
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": MODEL_NAMES,
    "_attn_implementation": ATTENTION,
    "_gradient_checkpointing_func": "test_blocks_keep_the_function_that_checkpoints_them",
    "_gen_kwargs": "test_seq2seq_trainer_reads_the_arguments_of_generation",
    "_get_dataloader": TRAINER,
    "_get_eval_sampler": TRAINER,
    "_get_num_items_in_batch": "test_trainer_counts_the_targets_of_batches",
    "_get_grad_norm": TRAINER,
    "_get_train_sampler": TRAINER,
    "_keep_in_fp32_modules": UNQUANTIZED,
    "get_keys_to_not_convert": UNQUANTIZED,
    "_load_best_model": TRAINER,
    "_load_from_checkpoint": TRAINER,
    "_name_or_path": "test_a_config_knows_where_it_is_from",
    "_prepare_inputs": TRAINER,
    "_remove_unused_columns": TRAINER,
    "_save": TRAINER,
    "_set_signature_columns_if_needed": "test_columns_are_kept_by_the_list_that_we_extend",
    "_signature_columns": "test_the_columns_that_are_kept_are_a_list_that_may_grow",
    "_train_batch_size": "test_trainer_knows_the_rows_of_a_batch",
    "is_deepspeed_zero3_enabled": SHARDING,
    "_reorder_cache": "test_a_model_may_order_its_cache_itself",
    # trl
    "_VALID_DICT_FIELDS": "test_a_field_may_be_a_dict_in_json",
    "_formatting_func": "test_rows_are_prepared_as_we_ask",
    "_metrics": "test_the_metrics_of_tokens_are_kept_where_we_write_them",
    "_prepare_dataset": "test_rows_are_prepared_as_we_ask",
    "add_fused_lm_head": "test_the_output_head_of_a_model_is_replaced_for_a_loss",
    "_tp_size": "test_the_loss_of_trl_reads_what_we_set",
    "_total_train_tokens": "test_the_metrics_of_tokens_are_kept_where_we_write_them",
    # peft
    "convert_peft_adapter_state_dict_for_transformers": "test_names_of_an_adapter_are_converted_for_transformers",
    "AdaptedAttention": IMPORT,
    "AdaptedAttentionGPT": IMPORT,
    "AuxiliaryTrainingWrapper": IMPORT,
    "BaseTuner": IMPORT,
    "BaseTunerLayer": IMPORT,
    "CordaConfig": IMPORT,
    "Linear": IMPORT,
    "Linear4bit": IMPORT,
    "Linear8bitLt": IMPORT,
    "DoraLinearVariant": IMPORT,
    "LoraLayer": IMPORT,
    "SVDLinear": IMPORT,
    "PolyRouter": "test_a_router_of_poly_is_called_with_tasks_and_rows",
    "TrainableTokensWrapper": IMPORT,
    "TRANSFORMERS_MODEL_CONFIG": "test_the_types_of_adaption_prompts_are_a_mapping",
    "_SafetensorLoader": "test_weights_on_disk_are_found_by_their_names_in_the_model",
    "_active_adapter": "test_a_layer_keeps_its_active_adapters_where_we_set_them",
    "_check_merge_allowed": TUNER,
    "_check_target_module_exists": TUNER,
    "_create_and_replace": TUNER,
    "_get_base_layer_device_and_dtype": "test_an_adapter_follows_what_a_layer_says_of_its_base",
    "_move_adapter_to_device_of_base_layer": "test_an_adapter_follows_what_a_layer_says_of_its_base",
    "_prepare_adapter_config": TUNER,
    "_prepare_model": TUNER,
    "_remove_adapter_name_from_key": TUNER,
    "_replace_module": TUNER,
    "_unload_and_optionally_merge": TUNER,
    "check_adapters_to_merge": IMPORT,
    "check_target_module_exists": IMPORT,
    "preprocess_corda": IMPORT,
    "transpose": IMPORT,
    # sacrebleu
    "_compute_score_from_stats": "test_a_corpus_score_is_that_of_counts_summed_over_rows",
    "_extract_corpus_statistics": "test_a_corpus_score_is_that_of_counts_summed_over_rows",
    # bitsandbytes
    "Params4bit": "test_a_4_bit_weight_is_made_of_packed_elements",
    # torch
    "TorchDispatchMode": DISPATCH,
    "_C": BACKWARD,
    "_base": STORAGE,
    "_cdata": STORAGE,
    "_coalesced_": SPARSE,
    "_index_put_impl_": OPERATOR,
    "_len_torch_function_stack": BACKWARD,
    "_local_scalar_dense": OPERATOR,
    "_overloadpacket": DISPATCH,
    "_scaled_dot_product_attention_math": KERNEL,
    "_scaled_dot_product_efficient_attention": KERNEL,
    "_scaled_dot_product_flash_attention": KERNEL,
    "_scaled_dot_product_flash_attention_for_cpu": KERNEL,
    "_schema": DISPATCH,
    "_sparse_addmm": OPERATOR,
    "_sparse_mm": OPERATOR,
    "_to_copy": OPERATOR,
    "_unique2": OPERATOR,
    "_unsafe_view": OPERATOR,
    "_values": SPARSE,
    "tree_leaves": TREES,
    "tree_map_only": TREES,
    "_backward_hooks": HOOKS,
    "_backward_pre_hooks": HOOKS,
    "_compiled_call_impl": "test_a_compiled_module_is_known_by_its_call",
    "_dump_snapshot": MEMORY,
    "_dynamo": "test_the_compiler_has_its_names",
    "_forward_hooks": HOOKS,
    "_forward_pre_hooks": HOOKS,
    "_parameters": "test_modules_keep_their_parameters_in_a_dict",
    "_record_memory_history": MEMORY,
    "_version": "test_a_change_in_place_raises_the_version_of_a_tensor",
    # Transformers
    "GemmaRMSNorm": NORMS,
    "LlamaMLP": GATED_MLPS,
    "LlamaRMSNorm": NORMS,
    "Olmo2RMSNorm": NORMS,
    "Phi3MLP": GATED_MLPS,
    "T5DenseGatedActDense": GATED_MLPS,
    "T5LayerNorm": NORMS,
    # Python
    "_actions": PARSER,
    "_defaults": PARSER,
    "_member_map_": ENUM,
    "_member_names_": ENUM,
    "_value2member_map_": ENUM,
}

# Undocumented names without an underscore or in a text, which no walk tells from the package's own.
UNMARKED: dict[str, str] = {
    "ALL_ATTENTION_FUNCTIONS": ATTENTION,
    "BackwardCFunction": "test_the_engine_calls_the_apply_that_is_replaced",
    "modeling_utils": "test_models_recompute_by_the_checkpoint_that_is_replaced",
    "compute_type_is_set": FOUR_BIT,
    "get_batch_samples": TRAINER,
    "eager_attention_forward": ATTENTION,
    "packing_format_for_cpu": FOUR_BIT,
    "support_avx512bf16_for_cpu": FOUR_BIT,
    "SCB": EIGHT_BIT,
}

# What looks like an internal and is none.
DOCUMENTED = {
    "_exit": "os documents it",
    "_lora_linear_cast": "ours, put on a tensor",
    "_name_": "enum documents it",
    "_replace": "collections documents it for named tuples",
    "_value_": "enum documents it",
    "disable_progress_bar": "transformers documents its logging module",
    "tqdm": "of the same module",
}
