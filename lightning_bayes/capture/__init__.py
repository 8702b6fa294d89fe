"""What a training_step computes: its loss, the calls of its modules, and where its examples stand."""
