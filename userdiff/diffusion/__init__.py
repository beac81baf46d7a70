"""Models and pixels: checkpoints, the sampling sequence, what makes it fast. Knows no dataset files, no processes."""
