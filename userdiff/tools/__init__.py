"""What people do with a dataset once it is there: status, verify, merge, preview, inspect, reproduce."""
