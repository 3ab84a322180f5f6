"""Keys of a DeepSpeed configuration that name nothing in thinwire's, and why."""

from __future__ import annotations

_TUNING = "has no counterpart: it tunes how DeepSpeed itself works"
_METRICS = "has no counterpart: every run writes compute, communication and bytes by level to metrics.jsonl"
_OFFLOAD = (
    "has no counterpart: thinwire keeps every state on the device; shard more widely instead (optim: world, "
    "params: node or world)"
)
_ONE_FORMAT = "has no counterpart: a checkpoint always loads on any number of ranks, levels and states"
_SUMS = "is not needed: gradients are added in fp32 and divided once, at the end"
_ELSEWHERE = "is outside of thinwire"

# Where the value says that nothing is wanted, nothing is lost and nothing is said.
NO_COUNTERPART: dict[str, str] = {
    **dict.fromkeys(
        (
            "zero_optimization.allgather_bucket_size",
            "zero_optimization.allgather_partitions",
            "zero_optimization.compute_grad_norm",
            "zero_optimization.contiguous_gradients",
            "zero_optimization.enable_sanity_checks",
            "zero_optimization.leaf_module",
            "zero_optimization.legacy_stage1",
            "zero_optimization.log_trace_cache_warnings",
            "zero_optimization.memory_efficient_linear",
            "zero_optimization.module_granularity_threshold",
            "zero_optimization.override_module_apply",
            "zero_optimization.parameter_alignment",
            "zero_optimization.pipeline_loading_checkpoint",
            "zero_optimization.reduce_bucket_size",
            "zero_optimization.reduce_scatter",
            "zero_optimization.round_robin_gradients",
            "zero_optimization.save_muon_momentum_buffer_in_memory",
            "zero_optimization.stage3_allgather_sequential",
            "zero_optimization.stage3_max_live_parameters",
            "zero_optimization.stage3_max_reuse_distance",
            "zero_optimization.stage3_model_persistence_threshold",
            "zero_optimization.stage3_module_granularity_threshold",
            "zero_optimization.stage3_param_persistence_threshold",
            "zero_optimization.stage3_use_all_reduce_for_fetch_params",
            "zero_optimization.sub_group_size",
            "zero_optimization.use_multi_rank_bucket_allreduce",
            "dataloader_drop_last",
            "disable_allgather",
            "disable_python_gc",
            "graph_harvesting",
            "log_level",
            "managed_gradient_accumulation",
            "use_data_before_expert_parallelism",
            "zero_allow_untested_optimizer",
            "zero_force_ds_cpu_optimizer",
        ),
        _TUNING,
    ),
    **dict.fromkeys(
        (
            "comms_logger",
            "csv_monitor",
            "comet",
            "dump_state",
            "flops_profiler",
            "memory_breakdown",
            "steps_per_print",
            "timers",
            "wall_clock_breakdown",
        ),
        _METRICS,
    ),
    **dict.fromkeys(
        (
            "zero_optimization.cpu_offload",
            "zero_optimization.cpu_offload_params",
            "zero_optimization.cpu_offload_use_pin_memory",
            "zero_optimization.offload_optimizer",
            "zero_optimization.offload_param",
            "zero_optimization.zenflow",
            "aio",
        ),
        _OFFLOAD,
    ),
    **dict.fromkeys(
        (
            "checkpoint",
            "nebula",
            "datastates",
            "zero_optimization.elastic_checkpoint",
            "zero_optimization.load_from_fp32_weights",
        ),
        _ONE_FORMAT,
    ),
    **dict.fromkeys(
        ("gradient_allreduce_op", "gradient_predivide_factor", "prescale_gradients", "data_types.grad_accum_dtype"),
        _SUMS,
    ),
    **dict.fromkeys(
        (
            "autotuning",
            "compression_training",
            "curriculum_learning",
            "data_efficiency",
            "eigenvalue",
            "elasticity",
            "hybrid_engine",
            "pipeline",
            "progressive_layer_drop",
            "quantize_training",
            "sequence_parallel_size",
            "seq_parallel_communication_data_type",
            "sparse_attention",
            "tensor_parallel",
        ),
        _ELSEWHERE,
    ),
    "amp": "has no counterpart: use train.precision: bf16",
    "sparse_gradients": "has no counterpart: gradients must be dense",
    "zero_optimization.ignore_unused_parameters": "is not needed: a parameter without a gradient counts as zero",
    "zero_optimization.mics_hierarchical_params_gather": "is not needed: every gather goes level by level",
    "zero_optimization.overlap_comm": "is not needed: communication always overlaps with computation",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": (
        "is not needed: whole weights are exported as safetensors from any placement"
    ),
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": (
        "is not needed: whole weights are exported as safetensors from any placement"
    ),
    "zero_optimization.zero_quantized_nontrainable_weights": (
        "has no counterpart: frozen weights are kept in the dtype of the others; gather: int8 sends them in 8 bits too"
    ),
    "zero_optimization.zeropp_loco_param": (
        "cannot be kept with ZeRO-3: what a format leaves out can be remembered only where gradients go once per step. "
        "Give params: node, grads: node, optim: world and gradients: {world: {kind: int4, feedback: true}}"
    ),
}
