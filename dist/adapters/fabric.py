"""Lightning Fabric: a method for the model that fabric.setup() has wrapped, and its state in fabric.save()."""

from __future__ import annotations

from typing import Any

from thinwire.dist.adapters.attached import Attached, MethodChoice, attach, ddp_module, settings_of
from thinwire.dist.world import World


def for_fabric(
    fabric: Any,
    model: Any,
    method: MethodChoice,
    *,
    optimizer: Any = None,
    clip_norm: float = 0.0,
    world: World | None = None,
    timeout_s: float = 60.0,
) -> Attached:
    """Let a method carry the gradients of a model that Fabric has set up.

    Call it after fabric.setup(), on every rank; Fabric itself has no argument for a communication hook. For the state:
    fabric.save(path, {"model": model, "optimizer": optimizer, "thinwire": handle}), and fabric.load() with the same.

    Args:
        fabric: of lightning.fabric.Fabric, with strategy ddp.
        model: as setup() returned it.
        method: settings, a mapping as under `method:` of a configuration, or a kind: allreduce, compress, local_sgd.
        optimizer: as setup() returned it; local_sgd needs it, and compress reads its learning rate and momentum.
        clip_norm: largest norm of the true gradient, for method compress; do not call fabric.clip_gradients() too.
        world: of thinwire.init(), called before fabric.launch(), for the machine's levels and one deadline for all.
        timeout_s: deadline of one operation without a world, in seconds.
    Returns: the method: state_dict(), predicted_bytes(), metrics(), describe(), agreed().
    Raises:
        ValueError: Fabric or the model is set up so that the method would not run, or would run wrongly.
        PeerLostError, PeerLateError, PeerFailedError: from fabric.backward(), when a rank is gone or overdue.

    Example:
        model, optimizer = fabric.setup(model, optimizer)
        thinwire.for_fabric(fabric, model, "allreduce")
    """
    settings = settings_of(method, "for_fabric")
    wrapped = getattr(getattr(model, "_orig_mod", model), "_forward_module", None)
    if wrapped is None:
        raise ValueError(
            f"model: expected what fabric.setup() returned, got {type(model).__name__}; call this after "
            "model, optimizer = fabric.setup(model, optimizer)"
        )
    return attach(
        settings,
        ddp_module(wrapped, f"model: set up by strategy {type(fabric.strategy).__name__}"),
        optimizer,
        scaler=getattr(fabric.strategy.precision, "scaler", None),
        clip_norm=clip_norm,
        world=world,
        timeout_s=timeout_s,
    )
