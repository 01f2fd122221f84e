"""A profile of layers as the source of times, and whether it is one of the model."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from megatron.early_exit.errors import as_flag
from megatron.early_exit.planner.command_line.model_flags import Model
from megatron.early_exit.planner.costs.layer_profile import MEASURED_SIZES, LayerProfile

_DTYPE = "bf16"
_REPLACED = ("achieved_share", "tflops")


def add_profile_flags(parser: ArgumentParser) -> None:
    """Add the flag of a profile to a command line."""
    measured = "output of tools/profile_layers.py, whose times replace derived ones"
    parser.add_argument_group("measured times").add_argument("--profile", type=Path, help=measured)


def read_profile(args: Namespace, model: Model) -> LayerProfile | None:
    """The profile that is given, if any.

    Raises:
        ValueError: it cannot be read, is of another model or dtype, or a flag has no effect with
            it.
    """
    path: Path | None = args.profile
    if path is None:
        return None
    for name in _REPLACED:
        value = getattr(args, name)
        if value is not None:
            raise ValueError(f"{as_flag(name)} {value:g} has no effect with --profile {path}")
    if args.fp8_format is not None:
        raise ValueError(
            f"--fp8-format {args.fp8_format}: profiles are in {_DTYPE}, allowed: no FP8"
        )
    refuse_unprofiled(model)
    try:
        profile = LayerProfile.read(path)
    except ValueError as error:
        raise ValueError(f"--profile {error}") from None
    _check(profile, path, model)
    return profile


def refuse_unprofiled(model: Model) -> None:
    """Refuse a model whose layers are not measured.

    Raises:
        ValueError: its MLP has no gate, or it has experts.
    """
    if model.shape.experts is not None:
        number = model.shape.experts.num_experts
        raise ValueError(f"--num-experts {number}: profiles have dense models, allowed: without it")
    if not model.shape.gated_linear_unit:
        raise ValueError("--no-swiglu: profiles have gated MLPs, allowed: without it")


def _check(profile: LayerProfile, path: Path, model: Model) -> None:
    def refuse(measured: str, allowed: str) -> ValueError:
        return ValueError(f"--profile {path} was measured with {measured}, allowed: {allowed}")

    if profile.dtype != _DTYPE:
        raise refuse(f"--{profile.dtype}", f"--{_DTYPE}, which plans are made for")
    wanted = {name: getattr(model.shape, name) for name in MEASURED_SIZES}
    differing = [name for name in MEASURED_SIZES if profile.shape[name] != wanted[name]]
    if differing:
        measured, allowed = (
            " ".join(f"{as_flag(name)} {sizes[name]}" for name in differing)
            for sizes in (profile.shape, wanted)
        )
        raise refuse(measured, f"those of the model, {allowed}")
    exits = model.placements[0]
    if exits.positions and profile.exit_heads != exits.head_flags:
        measured = "no exits" if profile.exit_heads is None else f"exits with {profile.exit_heads}"
        raise refuse(measured, f"the model's exits, with {exits.head_flags}")
