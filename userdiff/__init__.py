"""Bulk image synthesis from user-conditioned latent diffusion models.

What a training loop or a script needs is here; each name is loaded when it is first asked for, so that
`import userdiff` takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from userdiff.config import JobConfig, UsageError, parse_args
    from userdiff.diffusion.conditioning import UserConditionEncoder
    from userdiff.diffusion.model import load_model
    from userdiff.diffusion.training_loop import generate_samples
    from userdiff.seeds import item_seed
    from userdiff.tools.reproduce import make_image

__version__ = "0.1.0"

_HOMES = {
    "JobConfig": "config",
    "UsageError": "config",
    "UserConditionEncoder": "diffusion.conditioning",
    "generate_samples": "diffusion.training_loop",
    "item_seed": "seeds",
    "load_model": "diffusion.model",
    "make_image": "tools.reproduce",
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
