"""Scripts that measure the job; what they found is in the README next to them."""
