"""What callbacks read from a Trainer and its module, and put back."""
