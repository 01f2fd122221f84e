"""The public Python interface: the names that other programs may rely on.

The reference has a page for each group, and a test holds their docstrings to a rule of their own
(`tests/unit/test_docstrings.py`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Page:
    """A page of the reference.

    Attributes:
        title: heading of the page.
        text: what its names are for.
        names: public names by the module that they are imported from.
    """

    title: str
    text: str
    names: dict[str, tuple[str, ...]]


PUBLIC: dict[str, Page] = {
    "inference": Page(
        "Inference",
        "Load a checkpoint, submit prompts, read tokens and results.",
        {
            "megatron.early_exit.inference": (
                *("EarlyExitEngine", "SamplingParams", "GenerationResult", "GeneratedToken"),
                "GenerationStatistics",
            ),
            "megatron.early_exit.inference.results": ("PromptToken", "HeadReport"),
        },
    ),
    "config": Page(
        "Exits of a model",
        "The one description of a model's exits, from which the flags of training are made, and "
        "the error for a value that is not allowed.",
        {
            "megatron.early_exit.config": ("EarlyExitConfig", "Exit", "HeadPart"),
            "megatron.early_exit.errors": ("FieldError",),
            "megatron.early_exit.ranges": ("Range",),
        },
    ),
    "checkpoint": Page(
        "Checkpoints",
        "Convert checkpoints, add and remove exits, and describe what a checkpoint contains. "
        "`tools/checkpoint.py` is the command line of these functions.",
        {
            "megatron.early_exit.checkpoint.conversion": ("Conversion",),
            "megatron.early_exit.checkpoint.huggingface": (
                *("import_hf", "export_hf", "open_export", "Export"),
            ),
            "megatron.early_exit.checkpoint.ee_llm": ("import_ee_llm",),
            "megatron.early_exit.checkpoint.exits": ("add_exits", "strip_exits", "RandomInit"),
            "megatron.early_exit.checkpoint.multi_token_prediction": ("add_mtp", "strip_mtp"),
            "megatron.early_exit.checkpoint.quantized_model": ("quantize_model",),
            "megatron.early_exit.checkpoint.source": ("open_checkpoint", "open_parts"),
            "megatron.early_exit.checkpoint.inspection": ("inspect", "Inspection"),
            "megatron.early_exit.checkpoint.description": ("describe", "ModelDescription"),
            "megatron.early_exit.checkpoint.location": ("locate", "CheckpointLocation"),
        },
    ),
    "evaluation": Page(
        "Evaluation",
        "Measure what exits cost in quality and gain in speed, and choose a rule that keeps a "
        "wished quality. `tools/evaluate.py` and `tools/choose_threshold.py` are the command lines "
        "of these classes.",
        {
            "megatron.early_exit.evaluation.evaluation": ("Evaluation",),
            "megatron.early_exit.evaluation.settings": ("Settings",),
            "megatron.early_exit.evaluation.items": ("Item", "read_tasks"),
            "megatron.early_exit.evaluation.summary": ("summarize", "Summary"),
            "megatron.early_exit.evaluation.report": ("write_report",),
            "megatron.early_exit.evaluation.choosing.wish": ("Wish",),
            "megatron.early_exit.evaluation.choosing.calibration": ("Calibration",),
            "megatron.early_exit.evaluation.choosing.choice": ("Choice",),
        },
    ),
    "planner": Page(
        "Planner",
        "Find the fastest parallel layout of a training run that fits into memory. "
        "`tools/plan_pipeline.py` is its command line.",
        {
            "megatron.early_exit.planner.search.plans": ("find_plans", "Plans", "Plan"),
            "megatron.early_exit.planner.search.request": ("PlanRequest",),
            "megatron.early_exit.planner.costs.model_shape": ("ModelShape",),
            "megatron.early_exit.planner.costs.hardware": ("Accelerator",),
            "megatron.early_exit.planner.drawing": ("write_timeline",),
        },
    ),
    "client": Page(
        "Client",
        "Ask a server. It needs neither torch nor a checkpoint; `tools/request_client.py` is its "
        "command line.",
        {
            "megatron.early_exit.client.completions": (
                *("CompletionClient", "Completion", "RequestFailed", "Unreachable"),
            ),
            "megatron.early_exit.client.prompts": ("read_prompts",),
        },
    ),
}
