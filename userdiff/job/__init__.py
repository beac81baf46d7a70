"""One distributed run: the plan, the store between processes, the worker's loop, the output folder, what is printed."""
