"""Models and pixels: checkpoints, the sampling sequence, what makes it fast. Knows no dataset files, no processes.

An image passes `generate` (the sequence of steps), which calls `conditioning` (user -> token) and `sampler` (noise,
DDIM, decoding). `model` puts a job's models together from `checkpoint` and `conditioning`, and has `acceleration`,
`compilation` and `cuda_graph` make them fast. `gpu_errors` is about GPUs that fail or are full.
"""
