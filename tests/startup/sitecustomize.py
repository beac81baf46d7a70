"""Has the processes of tests start without transformers, which diffusers takes seconds to import and no job uses."""

import sys

sys.modules["transformers"] = None  # type: ignore[assignment] # as where it is not installed
