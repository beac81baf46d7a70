"""Bulk image synthesis from user-conditioned latent diffusion models.

What a training loop or a script needs is here; each name is loaded when it is first asked for, so that
`import userdiff` takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from userdiff.conditioning import UserConditionEncoder
    from userdiff.config import JobConfig, UsageError, parse_args
    from userdiff.loading import load_model
    from userdiff.planning import item_seed
    from userdiff.reproducing import make_image
    from userdiff.training import generate_samples

__version__ = "0.1.0"

_HOMES = {
    "JobConfig": "config",
    "UsageError": "config",
    "UserConditionEncoder": "conditioning",
    "generate_samples": "training",
    "item_seed": "planning",
    "load_model": "loading",
    "make_image": "reproducing",
    "parse_args": "config",
}
__all__ = [
    "JobConfig",
    "UsageError",
    "UserConditionEncoder",
    "__version__",
    "generate_samples",
    "item_seed",
    "load_model",
    "make_image",
    "parse_args",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its module."""
    if name not in _HOMES:
        raise AttributeError(f"module 'userdiff' has no attribute {name!r}")
    return getattr(import_module(f"userdiff.{_HOMES[name]}"), name)
