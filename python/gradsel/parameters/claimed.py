"""Models whose parameters somebody else has claimed: DistributedDataParallel, or DeepSpeed, which is never imported."""

from __future__ import annotations

from torch import Tensor, nn

from gradsel.parameters.names import named_parameters

ADVICE = (
    "Use ZeRO stage 0, 1 or 2 (select() and attach() before deepspeed.initialize()), or shard the model by "
    "torch.distributed.fsdp.fully_shard()"
)


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 has taken it over: it is empty except while DeepSpeed has gathered it."""
    return hasattr(parameter, "ds_id")


def require_unpartitioned(model: nn.Module, what: str) -> None:
    """Refuses models whose parameters ZeRO-3 has partitioned.

    Raises:
        ValueError: it names the first one, and ``what`` was to be done.
    """
    for name, parameter in named_parameters(model).items():
        if is_partitioned(parameter):
            raise ValueError(
                f"{name} is partitioned by DeepSpeed's ZeRO-3, which empties it between uses, and {what} needs whole "
                f"parameters. {ADVICE}"
            )


def require_unclaimed(model: nn.Module) -> None:
    """Refuses models that cannot be attached any more.

    Raises:
        ValueError: a wrapper or a DeepSpeed engine has chosen the parameters that it trains, or ZeRO-3 has partitioned
            them.
    """
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ValueError(
            f"the model is wrapped in {type(model).__name__}, which has registered its parameters already; attach() "
            "the model first, then wrap it"
        )
    require_unpartitioned(model, "attach()")
    engine = any(kind.__name__ == "DeepSpeedEngine" for kind in type(model).__mro__)
    if engine or any(getattr(parameter, "_hp_mapping", None) is not None for parameter in model.parameters()):
        raise ValueError(
            "the model belongs to a DeepSpeed engine, which has chosen the parameters that it trains already; attach() "
            "the model first, then call deepspeed.initialize() with gradsel.trainable_parameters(model)"
        )


def require_own_linear() -> None:
    """Refuses the function that ZeRO-3 leaves in the place of torch's: it forms no gradients for attached weights.

    Raises:
        RuntimeError: it is there.
    """
    if str(getattr(nn.functional.linear, "__module__", None)).startswith("deepspeed."):
        raise RuntimeError(
            "ZeRO-3 was used in this process, and DeepSpeed has replaced torch.nn.functional.linear since, by a "
            "function that forms no gradients for attached weights: start a new process, or put torch's own back"
        )
