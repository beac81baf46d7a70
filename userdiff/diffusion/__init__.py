"""Models and pixels: checkpoints, the sampling sequence, what makes it fast. Knows no dataset files, no processes.

An image passes `generate` (the sequence of steps), which calls `conditioning` (user -> token) and `sampler` (noise,
DDIM, decoding). `model` puts a job's models together from `checkpoint`, `schedule` and `conditioning`, whose tensors `weights`
reads, and has `acceleration` make them fast. `gpu_errors` is about GPUs that fail or are full.
"""
