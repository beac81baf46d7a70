"""accelerate launch, but for the five minutes that torch waits at the end for the launcher of a machine that is lost.

It waits for a second, or for EXIT_BARRIER_SECONDS.
"""

import os
import runpy

from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

if __name__ == "__main__":
    defaults = LocalElasticAgent.__init__.__defaults__
    seconds = float(os.environ.get("EXIT_BARRIER_SECONDS", "1"))
    LocalElasticAgent.__init__.__defaults__ = tuple(seconds if value == 300 else value for value in defaults)
    runpy.run_module("accelerate.commands.launch", run_name="__main__")
