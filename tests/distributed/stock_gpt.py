"""A plain GPT trained by Megatron itself: its model class, builder, schedules and data sets.

Run by the tests with Megatron's flags, under torchrun's environment."""

from __future__ import annotations

import functools

from megatron.early_exit import platform

MACHINE = platform.prepare()

import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.datasets.blended_megatron_dataset_builder import (  # noqa: E402
    BlendedMegatronDatasetBuilder,
)
from megatron.core.datasets.gpt_dataset import (  # noqa: E402
    GPTDataset,
    GPTDatasetConfig,
    MockGPTDataset,
)
from megatron.core.datasets.utils import get_blend_from_list  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.utils import get_batch_on_this_tp_rank  # noqa: E402
from megatron.training import get_args, get_tokenizer, pretrain, print_rank_0  # noqa: E402
from megatron.training.argument_utils import (  # noqa: E402
    gpt_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args  # noqa: E402

from megatron.early_exit.model.layer_specs import gpt_layer_spec  # noqa: E402


def get_batch(data_iterator, vp_stage):
    args = get_args()
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    if not (first or last):
        return None, None, None, None
    rank = parallel_state.get_tensor_model_parallel_rank()
    batch = next(data_iterator) if rank == 0 else {}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=False,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        cp_size=1,
        tp_rank=rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=first,
        is_pipeline_last_stage=last,
    )
    return batch["tokens"], batch["labels"], batch["loss_mask"], batch["position_ids"]


def loss_func(loss_mask, output):
    mask = loss_mask.view(-1).float()
    loss = (output.view(-1).float() * mask).sum()
    tokens = mask.sum().to(torch.int)
    report = torch.cat([loss.detach().view(1), tokens.view(1).float()])
    return loss, tokens, {"lm loss": report}


def forward_step(data_iterator, model):
    vp_stage = getattr(model, "vp_stage", None)
    if vp_stage is None:
        vp_stage = getattr(getattr(model, "module", None), "vp_stage", None)
    tokens, labels, loss_mask, position_ids = get_batch(data_iterator, vp_stage)
    output = model(tokens, position_ids, None, labels=labels, loss_mask=loss_mask)
    return output, functools.partial(loss_func, loss_mask)


def reads_data(vp_stage):
    stage = {"ignore_virtual": False, "vp_stage": vp_stage}
    at_an_end = parallel_state.is_pipeline_first_stage(
        **stage
    ) or parallel_state.is_pipeline_last_stage(**stage)
    return at_an_end and parallel_state.get_tensor_model_parallel_rank() == 0


def datasets(num_samples, vp_stage=None):
    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=get_blend_from_list(args.data_path),
        split=args.split,
        tokenizer=get_tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        path_to_cache=args.data_cache_path,
    )
    kind = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(
        kind, num_samples, functools.partial(reads_data, vp_stage), config
    ).build()


datasets.is_distributed = True


def extra_args(parser):
    platform.set_argument_defaults(parser, MACHINE)
    return parser


def main():
    args = parse_and_validate_args(extra_args_provider=extra_args)
    platform.check_arguments(args, MACHINE)
    print_rank_0(MACHINE.describe())
    model_config = gpt_config_from_args(args)
    model_config.transformer_layer_spec = gpt_layer_spec
    pretrain(
        pretrain_cfg_container_from_args(args, model_config),
        datasets,
        ModelType.encoder_or_decoder,
        forward_step,
    )


if __name__ == "__main__":
    main()
