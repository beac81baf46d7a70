"""Has the processes of tests start without what diffusers takes seconds to import where it is, and no job uses."""

import sys

for name in ("transformers", "scipy"):
    sys.modules[name] = None  # type: ignore[assignment] # as where it is not installed
