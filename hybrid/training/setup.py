"""From the settings to what is trained: model chunks under Megatron's DDP, its optimizer and its schedule."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from hybrid.config import Settings
from hybrid.model import kernels
from hybrid.model.build import build_model, transformer_config
from hybrid.pattern import Pattern
from hybrid.training import z_loss

# Rates and gains of the state space models: pulling them to zero means nothing. Mamba-1's A_log has two dimensions, so
# that Megatron's own rule (no decay of vectors and biases) does not find it.
NO_WEIGHT_DECAY = ("*.A_log", "*.D", "*.dt_bias")


@dataclass
class Training:
    """What changes in the course of a run, besides its position in the data."""

    config: TransformerConfig
    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler

    def release(self) -> None:
        """Let the model be freed when nobody has it any more.

        Autograd's nodes hold DDP's hooks, and are held by DDP and, through the config, by the optimizer's shards: rings
        that Python's collector does not see through. With the model would stay its process groups, of which each of
        gloo's has threads that wake a hundred times a second.
        """
        for chunk in self.chunks:
            chunk.grad_accs.clear()
        hooks: Any = self.config
        hooks.grad_scale_func = hooks.finalize_model_grads_func = None
        hooks.no_sync_func = hooks.grad_sync_func = hooks.param_sync_func = None


def set_up(settings: Settings, pattern: Pattern, device: torch.device) -> Training:
    """Build this rank's part of the model with new weights, and the optimizer for it."""
    config = transformer_config(settings, pattern)
    stages: list[int | None] = list(range(config.virtual_pipeline_model_parallel_size or 1))
    if len(stages) == 1:
        stages = [None]
    chunks = [_chunk(settings, config, pattern, stage, device) for stage in stages]
    for chunk in chunks:
        chunk.broadcast_params()
    optimizer = _optimizer(settings, chunks)

    hooks: Any = config
    hooks.finalize_model_grads_func = finalize_model_grads
    hooks.grad_scale_func = optimizer.scale_loss
    if settings.parallel.overlap_grad_reduce:
        hooks.no_sync_func = _one_or_all([chunk.no_sync for chunk in chunks])
        if len(chunks) > 1:
            hooks.grad_sync_func = [chunk.start_grad_sync for chunk in chunks]
    if settings.parallel.overlap_param_gather:
        hooks.param_sync_func = _one_or_all([chunk.start_param_sync for chunk in chunks])
    return Training(config, chunks, optimizer, _scheduler(settings, optimizer))


def _chunk(
    settings: Settings, config: TransformerConfig, pattern: Pattern, stage: int | None, device: torch.device
) -> DistributedDataParallel:
    model: Any = build_model(
        settings,
        config,
        pattern,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        vp_stage=stage,
    ).to(device)
    if settings.trainer.z_loss_coeff and model.post_process:
        z_loss.add(model, settings.trainer.z_loss_coeff)
    if config.bf16:
        model = Float16Module(config, model)
    chunk = DistributedDataParallel(
        config=config,
        ddp_config=DistributedDataParallelConfig(
            grad_reduce_in_fp32=not settings.optimizer.precision_aware,
            overlap_grad_reduce=settings.parallel.overlap_grad_reduce,
            overlap_param_gather=settings.parallel.overlap_param_gather,
            use_distributed_optimizer=settings.parallel.distributed_optimizer,
        ),
        module=model,
        disable_bucketing=bool(stage),
    )
    for module in chunk.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            # Transformer-engine adds a weight's gradient to DDP's buffer in the matrix product that makes it.
            module.fuse_wgrad_accumulation = True  # type: ignore[assignment]
    if kernels.of(settings).transformer_engine:
        chunk.scale_gradients = partial(_scale_gradients, chunk)  # type: ignore[method-assign]
    return chunk


def _scale_gradients(chunk: DistributedDataParallel, factor: torch.Tensor) -> None:
    """As DDP's own, for a factor on the GPU.

    There torch rounds the factor to bf16 if the gradients are that, and takes four times as long for a large buffer.
    """
    from transformer_engine.pytorch import optimizers  # pyright: ignore[reportMissingImports]

    parallel: Any = chunk
    for buffer in parallel.buffers + parallel.expert_parallel_buffers:
        # The kernel counts the elements of a tensor in 32 bits.
        parts = [*buffer.grad_data.split(2**30), *buffer.extra_main_grads]
        not_finite = torch.zeros(1, dtype=torch.int32, device=factor.device)
        optimizers.multi_tensor_applier(
            optimizers.multi_tensor_scale_tensor, not_finite, [parts, list(parts)], factor.float().reshape(1)
        )


def _optimizer(settings: Settings, chunks: list[DistributedDataParallel]) -> MegatronOptimizer:
    optimizer, fp32 = settings.optimizer, settings.trainer.precision == "fp32"
    low = torch.bfloat16 if optimizer.precision_aware else torch.float32
    config = OptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.eps,
        clip_grad=optimizer.clip_grad,
        bf16=not fp32,
        params_dtype=torch.float32 if fp32 else torch.bfloat16,
        use_distributed_optimizer=settings.parallel.distributed_optimizer,
        overlap_param_gather=settings.parallel.overlap_param_gather,
        use_precision_aware_optimizer=optimizer.precision_aware,
        main_grads_dtype=low,
        exp_avg_dtype=low,
        exp_avg_sq_dtype=low,
    )
    overrides = {**get_standard_config_overrides(config), ParamKey(name=NO_WEIGHT_DECAY): {"wd_mult": 0.0}}  # type: ignore[dict-item]
    return get_megatron_optimizer(
        config,
        chunks,  # type: ignore[arg-type]
        config_overrides=overrides,  # type: ignore[arg-type]
        use_gloo_process_groups=False,
    )


def _scheduler(settings: Settings, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """The schedule counts in samples, as Megatron's does, so that a change of batch size keeps its shape."""
    values = settings.optimizer
    decay = values.decay_samples or settings.trainer.samples
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=values.lr,
        min_lr=values.min_lr,
        lr_warmup_steps=settings.warmup_samples,
        lr_decay_steps=decay,
        lr_decay_style="WSD" if values.schedule == "wsd" else values.schedule,
        wsd_decay_steps=values.wsd_decay_samples or max(1, decay // 10),
        lr_wsd_decay_style="cosine",
        start_wd=values.weight_decay,
        end_wd=values.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        # What the recipe says now holds; the checkpoint only says how far the run has come.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def _one_or_all(functions: list[Any]) -> Any:
    return functions[0] if len(functions) == 1 else functions
