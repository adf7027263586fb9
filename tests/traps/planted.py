"""Where each way to merge wrongly without a word is planted: the trap, and the tests that fall into it if we do.

A number stays when its trap is planted elsewhere.
"""

from __future__ import annotations

_READER = "unit/adapters/test_peft_reader.py"
_KEYS = "unit/adapters/test_peft_keys.py"
_SCALE = "unit/adapters/test_peft_scale.py"
_CONFIG = "unit/adapters/test_peft_config.py"
_OPEN = "unit/adapters/test_open.py"
_STATE_DICT = "unit/adapters/test_state_dict_reader.py"
_BIND = "unit/validate/test_bind.py"
_EXPERTS = "unit/validate/test_experts.py"
_REPLACEMENTS = "unit/validate/test_replacements.py"
_SHARING = "unit/validate/test_sharing.py"
_OPTIONS = (
    "peer/test_options_peer.py::test_an_option_merges_to_what_peft_0_21_2_merges_and_computes_what_it_was_trained_to"
)
_LAYERS = "peer/test_layers_peer.py"
_TURNS = "peer/test_tuners_of_turns_peer.py"
_MLX = "unit/adapters/test_mlx_reader.py"
_GGUF = "unit/adapters/test_gguf_reader.py"
_ONNX = "unit/adapters/test_onnx_reader.py"
_TORCHTUNE = "unit/adapters/test_torchtune_reader.py"
_KOHYA = "unit/adapters/test_kohya_reader.py"
_DIFFUSION = "peer/test_diffusion_formats_peer.py"
_LYCORIS = "peer/test_lycoris_peer.py::test_a_merged_layer_computes_what_lycoris_does"
_TUNER = f"{_TURNS}::test_a_tuner_merges_to_what_peft_0_21_2_merges_and_computes_what_it_was_trained_to"

PLANTED: dict[int, tuple[str, tuple[str, ...]]] = {
    1: (
        "rsLoRA ignored",
        (
            f"{_SCALE}::test_a_rank_stabilised_scale_is_alpha_by_the_root_of_the_rank",
            f"{_SCALE}::test_rank_stabilisation_takes_the_rank_of_the_module",
            f"{_OPTIONS}[rsLoRA]",
        ),
    ),
    2: (
        "patterns of ranks and alphas ignored, or matched by another version's rules",
        (
            f"{_SCALE}::test_patterns_match_as_in_peft_0_21",
            f"{_SCALE}::test_before_0_15_a_key_needed_a_path_in_front",
            f"{_SCALE}::test_up_to_0_13_the_first_key_of_either_pattern_decided_both",
            f"{_SCALE}::test_tensors_of_another_rank_are_an_error",
            f"{_SCALE}::test_a_pattern_that_matches_no_module_is_listed",
        ),
    ),
    3: (
        "alpha that is missing",
        (
            f"{_SCALE}::test_a_default_says_that_it_is_one",
            f"{_READER}::test_a_lone_file_without_alpha_shows_the_choices",
            f"{_STATE_DICT}::test_alpha_is_never_guessed",
        ),
    ),
    4: (
        "a DoRA magnitude dropped, or taken for another tensor",
        (
            f"{_READER}::test_a_magnitude_makes_dora",
            f"{_READER}::test_what_breaks_the_rules_is_named[a magnitude in the file, but use_dora is false]",
            f"{_READER}::test_dora_of_a_lone_file_is_seen_by_its_magnitudes",
        ),
    ),
    5: (
        "the axis of a DoRA norm",
        (
            f"{_BIND}::test_a_magnitude_follows_the_layout_and_must_fit_it",
            f"{_OPTIONS}[Conv1D, DoRA]",
            f"{_LAYERS}::test_a_layer_merges_to_what_peft_0_21_2_merges_and_computes_what_it_was_trained_to",
        ),
    ),
    6: (
        "fan_in_fan_out believed",
        (
            f"{_BIND}::test_the_flag_is_not_believed_where_the_base_says_otherwise",
            f"{_LAYERS}::test_a_square_conv1d_of_an_unknown_model_is_decided_by_the_flag_that_peft_0_21_2_wrote",
            f"{_OPTIONS}[linear layers, flag set]",
        ),
    ),
    7: (
        "MLX's scale taken for alpha / r",
        (
            f"{_MLX}::test_a_linear_layer_is_read_transposed_with_its_absolute_scale",
            f"{_MLX}::test_alpha_is_ignored_with_a_warning_and_obeyed_with_the_option",
            "peer/test_mlx_peer.py::test_merged_weights_answer_as_mlx_with_its_adapter_beside_them",
        ),
    ),
    8: (
        "factors the other way round, in a square",
        (
            f"{_STATE_DICT}::test_square_factors_are_ambiguous_with_or_without_a_weight",
            f"{_BIND}::test_what_a_format_fixes_is_never_turned",
        ),
    ),
    9: (
        "PiSSA and OLoRA added to the original base",
        (
            f"{_READER}::test_residual_initialisations_are_undone_unless_the_base_is_the_residual",
            f"{_OPTIONS}[PiSSA]",
            f"{_OPTIONS}[OLoRA]",
        ),
    ),
    10: (
        "CorDA, LoRA-GA, LoftQ or a randomised PiSSA on another base than training's",
        (
            f"{_CONFIG}::test_what_needs_the_base_that_training_wrote_is_refused_without_it",
            (
                "peer/test_refused_peer.py::"
                "test_the_residual_base_that_peft_0_21_2_trained_on_takes_such_an_adapter_plainly"
            ),
        ),
    ),
    11: ("a converted PiSSA adapter mended", (f"{_READER}::test_a_converted_pissa_adapter_is_plain",)),
    12: (
        "a bias taken for a delta",
        (
            f"{_KEYS}::test_whole_tensors_replace_unless_they_are_copies_below_a_change[base_layer.bias]",
            f"{_READER}::test_copies_of_the_base_are_no_updates[q.base_layer.bias]",
            f"{_OPTIONS}[all biases]",
        ),
    ),
    13: (
        "modules_to_save left out, or their original taken",
        (
            f"{_READER}::test_heads_replace_and_come_before_the_changes",
            f"{_KEYS}::test_a_resized_and_saved_embedding_is_read_once_though_peft_saves_it_twice[original_module]",
            f"{_OPTIONS}[whole block saved]",
        ),
    ),
    14: (
        "trainable_tokens_delta added in place of replacing",
        (
            "unit/updates/test_plain_kinds.py::test_token_rows_replace_the_rows_of_their_ids_across_blocks",
            f"{_BIND}::test_token_rows_outside_the_embedding_are_an_error",
        ),
    ),
    15: (
        "a copy of the base taken for a result",
        (
            f"{_READER}::test_copies_of_the_base_are_no_updates",
            f"{_REPLACEMENTS}::test_a_copy_of_the_base_is_compared_and_not_merged",
        ),
    ),
    16: (
        "a resized vocabulary",
        (
            f"{_REPLACEMENTS}::test_a_resized_vocabulary_is_written_whole_and_configured",
            f"{_REPLACEMENTS}::test_a_change_must_fit_the_resized_tensor",
        ),
    ),
    17: (
        "a change of one tied matrix merged into both",
        (
            f"{_SHARING}::test_a_change_of_one_side_unties_both",
            "traps/test_traps.py::test_a_tied_copy_in_another_shard_is_untied_with_the_head_that_was_changed",
        ),
    ),
    18: (
        "the delta of weights that stay tied added twice",
        (
            f"{_SHARING}::test_equal_changes_of_both_sides_apply_once_and_stay_tied",
            "unit/adapters/test_reader_against_peft.py::test_an_adapter_that_keeps_embeddings_tied_is_applied_once",
        ),
    ),
    19: (
        "the output projection of attention once where training applied it twice",
        (
            f"{_READER}::test_output_projections_of_attention_count_twice_until_peft_0_21_2",
            f"{_LAYERS}::test_attention_of_torch_gets_its_output_projection_twice_as_peft_0_21_2_trains_it",
            "peer/test_families_peer.py::test_siglips_pooling_attention_merges_to_what_peft_0_21_2_merges",
        ),
    ),
    20: (
        "fused experts: which parameter, which way round, which expert",
        (
            f"{_EXPERTS}::test_square_experts_are_laid_out_by_version_and_model",
            f"{_EXPERTS}::test_square_experts_of_which_nothing_more_is_known_are_ambiguous",
            "peer/test_experts_peer.py::test_fused_experts_merge_to_what_peft_0_21_2_merges_and_computes",
        ),
    ),
    21: (
        "the ranks of all experts taken for one rank",
        (f"{_READER}::test_experts_keep_their_nesting_and_every_parameter_they_may_mean",),
    ),
    22: ("AdaLoRA's rank", (f"{_TUNER}[AdaLora]",)),
    23: (
        "layer replication",
        (
            "unit/validate/test_replication.py::test_the_stack_is_written_out_and_each_copy_has_its_own_update",
            (
                "peer/test_several_peer.py::test_replicated_layers_compute_what_peft_0_21_2_was_trained_to_"
                "though_its_merge_adds_all_copies_to_one"
            ),
        ),
    ),
    24: (
        "variants whose factors look like LoRA's",
        (
            f"{_CONFIG}::test_what_no_weights_can_express_is_refused",
            f"{_OPEN}::test_every_other_peft_type_is_refused_with_its_reason",
        ),
    ),
    25: (
        "KaSA and BD-LoRA read as LoRA",
        (
            f"{_OPTIONS}[KaSA]",
            f"{_OPTIONS}[BD-LoRA]",
            f"{_READER}::test_block_diagonal_factors_are_expanded",
            f"{_READER}::test_what_breaks_the_rules_is_named[no lora_diag in the file, but kasa_config is set]",
        ),
    ),
    26: (
        "generations of OFT, and the last term of its series",
        (f"{_TUNER}[num_cayley_neumann_terms]", f"{_TURNS}::test_tensors_that_no_peft_writes_are_refused[oft_R]"),
    ),
    27: (
        "permutations of BOFT",
        (f"{_TURNS}::test_a_butterfly_of_several_stages_is_that_of_the_papers_matrices", f"{_TUNER}[BOFT]"),
    ),
    28: (
        "LoKr's whole factors scaled, LoHa's scale squared",
        (
            f"{_LYCORIS}[LoKr, whole]",
            f"{_LYCORIS}[LoHa]",
            f"{_DIFFUSION}::test_a_file_of_one_algorithm_for_each_module_is_read_module_by_module",
        ),
    ),
    29: (
        "differences of LyCORIS that replace, or whole tensors of PEFT that are added",
        (
            f"{_LYCORIS}[differences]",
            "peer/test_lycoris_peer.py::test_norms_are_differences",
            f"{_REPLACEMENTS}::test_a_head_of_another_size_replaces_the_bases",
        ),
    ),
    30: (
        "the side of IA3 on a square matrix",
        ("traps/test_traps.py::test_ia3_scales_the_side_that_peft_0_21_2_scales_though_the_matrix_is_square",),
    ),
    31: (
        "fused slices of Flux, and its swapped rows",
        (
            f"{_DIFFUSION}::test_flux_in_black_forest_labs_names_merges_into_diffusers_split_layers",
            f"{_DIFFUSION}::test_xlabs_adapts_the_attention_rows_alone",
            f"{_DIFFUSION}::test_a_single_file_takes_adapters_in_both_dialects_as_the_pipeline_does",
        ),
    ),
    32: (
        "two dialects of UNet names, and underscores that may be dots",
        (
            "peer/test_diffusion_names_peer.py::test_both_dialects_name_the_same_tensors_as_diffusers_converters",
            f"{_DIFFUSION}::test_a_kohya_file_of_sdxl_names_blocks_as_ldm_and_both_text_encoders",
            f"{_BIND}::test_underscores_that_fit_two_modules_are_ambiguous",
        ),
    ),
    33: (
        "a configuration key of a newer PEFT",
        (
            f"{_CONFIG}::test_an_unknown_key_that_is_switched_on_is_refused_by_its_name",
            f"{_CONFIG}::test_every_field_of_peft_0_21_is_known",
        ),
    ),
    34: (
        "text encoders in the wrong order",
        (
            f"{_DIFFUSION}::test_a_kohya_file_of_sdxl_names_blocks_as_ldm_and_both_text_encoders",
            f"{_DIFFUSION}::test_a_component_that_the_pipeline_lacks_is_named",
        ),
    ),
    35: (
        "fused input projections of OpenCLIP",
        (
            f"{_DIFFUSION}::test_open_clips_fused_projections_take_their_rows",
            "peer/test_diffusion_names_peer.py::test_open_clip_is_named_as_diffusers_converts_it",
        ),
    ),
    36: (
        "rows permuted for rotary embeddings",
        (
            f"{_GGUF}::test_rows_of_q_and_k_are_brought_back_by_the_heads_of_the_base",
            f"{_TORCHTUNE}::test_pairs_become_halves_where_the_family_was_trained_in_pairs",
            f"{_TORCHTUNE}::test_magnitudes_move_with_their_rows",
            f"{_TORCHTUNE}::test_an_export_with_magnitudes_is_put_right",
        ),
    ),
    37: (
        "what GGUF adapters do not say",
        (
            f"{_GGUF}::test_an_alpha_of_zero_is_a_scale_of_one",
            f"{_GGUF}::test_what_the_converter_lost_is_said",
        ),
    ),
    38: (
        "a scale that Olive has multiplied in",
        (
            f"{_ONNX}::test_factors_are_transposed_and_their_scale_is_one",
            f"{_ONNX}::test_an_alpha_would_be_counted_twice",
        ),
    ),
    39: (
        "a loralib file that is merged already, or does not say which parts are adapted",
        (
            f"{_REPLACEMENTS}::test_a_copy_of_the_base_is_compared_and_not_merged",
            f"{_STATE_DICT}::test_a_merged_linear_layer_asks_which_parts",
            "peer/test_loralib_peer.py::test_a_merged_linear_of_loralib_0_1_2_is_not_guessed_at",
        ),
    ),
    40: (
        "single experts against fused ones, and PEFT's √2",
        (
            f"{_EXPERTS}::test_updates_of_single_experts_reach_rows_of_fused_ones",
            f"{_EXPERTS}::test_fused_updates_reach_experts_that_are_stored_one_by_one",
            (
                "peer/test_experts_peer.py::"
                "test_single_experts_merge_by_their_own_formula_whatever_peft_0_21_2_makes_of_them"
            ),
        ),
    ),
    41: (
        "a name of one tower matched to another's",
        (
            "peer/test_families_peer.py::test_a_name_of_one_tower_never_fits_the_other",
            "unit/test_names.py::test_a_common_suffix_is_no_match",
            f"{_BIND}::test_names_of_two_versions_in_one_tower_are_an_error",
            "unit/validate/test_language_model.py::test_without_the_option_it_is_refused_and_the_hint_is_the_option",
        ),
    ),
    42: (
        "a tensor of the adapter that finds no place and is dropped",
        (
            f"{_BIND}::test_every_misfit_is_told_at_once",
            f"{_READER}::test_every_tensor_is_in_one_update_or_counted_by_a_finding",
            f"{_KEYS}::test_a_tensor_that_peft_does_not_write_is_an_error",
        ),
    ),
    43: (
        "half an adapter",
        (
            f"{_READER}::test_what_breaks_the_rules_is_named[k: has lora_A but no lora_B]",
            f"{_READER}::test_what_breaks_the_rules_is_named[is empty.*ZeRO-3]",
            f"{_READER}::test_a_surprise_is_a_finding[untrained]",
            f"{_STATE_DICT}::test_one_factor_alone_is_an_error",
        ),
    ),
    44: (
        "a grouped convolution",
        (
            f"{_BIND}::test_a_grouped_convolution_is_refused_with_its_groups",
            f"{_LAYERS}::test_a_grouped_convolution_is_refused_as_peft_0_21_2_refuses_to_merge_it",
        ),
    ),
    45: (
        "another base of the same shapes",
        (
            f"{_BIND}::test_another_base_than_the_named_one_is_a_finding",
            f"{_BIND}::test_another_revision_is_a_finding",
        ),
    ),
    46: (
        "a quantised base",
        (
            "unit/bases/test_quantised.py::test_packed_weights_are_refused_by_method",
            f"{_BIND}::test_packed_weights_take_no_update",
            (
                "peer/test_bitsandbytes_peer.py::"
                "test_a_merge_into_an_unpacked_base_computes_what_peft_0_21_2_trained_on_the_packed_one"
            ),
        ),
    ),
    47: (
        "an update lost or rounded twice in 16 bits",
        (
            "property/test_exact.py::test_every_element_is_the_exact_value_rounded_once",
            (
                "peer/test_files_peer.py::"
                "test_the_bytes_are_float64_rounded_once_to_the_base_dtype_where_peft_0_21_2_rounds_twice"
            ),
        ),
    ),
    48: (
        "values that are no numbers, or become none",
        (
            f"{_READER}::test_a_value_that_is_no_number_is_named",
            "property/test_exact.py::test_a_value_too_large_for_float16_is_refused_with_its_size_and_place",
        ),
    ),
    49: (
        "projections that are drawn anew",
        (
            (
                "peer/test_tuners_of_weights_models_peer.py::"
                "test_what_all_layers_share_is_drawn_again_as_peft_0_21_2_draws_it[Vera]"
            ),
            "peer/test_tuners_of_weights_models_peer.py::test_a_drawing_names_the_library_that_draws",
        ),
    ),
    50: (
        "RandLoRA's buffers",
        (
            "peer/test_tuners_of_weights_peer.py::test_layers_merge_to_what_peft_0_21_2_merges",
            "peer/test_tuners_of_weights_files_peer.py::test_what_cannot_be_merged_is_refused_with_its_reason",
        ),
    ),
    51: (
        "several adapters in one file",
        (
            f"{_KEYS}::test_several_adapters_in_one_file_need_a_choice",
            f"{_KEYS}::test_the_chosen_adapter_is_read_and_the_others_are_put_aside",
        ),
    ),
    52: (
        "two adapters of which the second changes what the first made",
        (
            "peer/test_several_peer.py::test_a_second_adapter_with_magnitudes_is_refused",
            "unit/validate/test_combine.py::test_what_has_no_sum_is_refused",
        ),
    ),
    53: (
        "the shape of convolutions",
        (
            f"{_BIND}::test_a_one_by_one_kernel_fits_a_linear_layer_and_the_reverse",
            f"{_STATE_DICT}::test_loralib_convolution",
            f"{_STATE_DICT}::test_a_convolution_that_the_factors_do_not_unroll_to_is_an_error",
        ),
    ),
    54: (
        "a pickle that runs code",
        (
            f"{_OPEN}::test_a_pickle_that_would_run_code_is_unsafe_and_does_not_run",
            "hostile/test_hostile_checkpoints.py::test_a_pickle_that_would_run_code_is_unsafe_and_does_not_run",
        ),
    ),
    55: (
        "a trained head that the base does not have",
        (
            f"{_REPLACEMENTS}::test_a_head_that_the_base_lacks_is_added_with_its_labels_and_class",
            (
                "peer/test_models_peer.py::"
                "test_a_head_that_the_base_lacks_is_added_so_that_transformers_5_23_loads_what_peft_0_21_2_trained"
            ),
        ),
    ),
    56: (
        "shards: a tied copy in another one, a stale index",
        (
            "traps/test_traps.py::test_a_tied_copy_in_another_shard_is_untied_with_the_head_that_was_changed",
            "hostile/test_hostile_checkpoints.py::test_a_stale_index_is_malformed",
            "unit/test_checkpoint.py::test_the_index_decides_which_copy_counts",
        ),
    ),
    57: (
        "parameters without the suffix .weight",
        (
            f"{_BIND}::test_attention_with_a_fused_input_projection_has_no_weight_suffix",
            f"{_BIND}::test_a_bare_parameter_is_found",
        ),
    ),
    58: (
        "an input wider than the base's",
        (f"{_DIFFUSION}::test_a_control_adapter_does_not_fit_a_base_of_half_its_channels",),
    ),
    59: (
        "a configuration in the header that is not read",
        (f"{_READER}::test_a_whole_configuration_in_the_header_is_the_configuration",),
    ),
    60: (
        "a trained bias on a base without one",
        (f"{_BIND}::test_a_trained_bias_of_a_base_without_one_is_an_error",),
    ),
}

N_TRAPS = 60
