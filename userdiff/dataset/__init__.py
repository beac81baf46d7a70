"""A dataset's folder on disk: names, PNG files, rows, the manifest, `run.json`, locks. No torch, no processes."""
