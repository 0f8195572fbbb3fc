"""What the operator allows over HTTP."""

from __future__ import annotations

from expert_registry.errors import PolicyError
from vllm_steermoe_plugin.settings import Settings
from vllm_steermoe_plugin.steering.request import SteeringRequest


def check_policy(request: SteeringRequest, settings: Settings, *, served: bool) -> None:
    """Refuse what the operator does not allow.

    Args:
        request: what is asked for, defaults not applied.
        settings: the operator's.
        served: whether it came to a server; in-process use is the user's own machine.

    Raises:
        PolicyError: names the setting that would allow it.
    """
    if not settings.enabled:
        if not request:
            return
        raise PolicyError("steering is switched off on this engine (setting 'enabled'), but the request asks for it")
    if not settings.allow_override and (request or settings.default is not None):
        raise PolicyError("requests may not change the default steering of this engine (setting 'allow_override')")
    if not served:
        return
    if request.explicit is not None and not settings.allow_experts:
        raise PolicyError("expert sets are not accepted by this server (setting 'allow_experts'); name a behaviour")
    for part in request.named:
        if part.away and not settings.allow_reverse:
            raise PolicyError(f"{part.text()} is not accepted by this server (setting 'allow_reverse')")
        if part.strength is not None and abs(part.strength) > settings.max_strength:
            raise PolicyError(
                f"{part.text()}: this server accepts strengths up to {settings.max_strength:g} (setting 'max_strength')"
            )
        counted = (part.activate, part.deactivate, part.top, part.by)
        if any(number is not None for number in counted) and not settings.allow_experts:
            raise PolicyError(
                f"{part.text()}: this server does not accept numbers or other choices of experts "
                "(setting 'allow_experts')"
            )
