"""Parts of `ScalingAdvisor`."""
