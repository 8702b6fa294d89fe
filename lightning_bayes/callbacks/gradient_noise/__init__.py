"""Parts of `GradientNoiseScale`: gradients of a copy or of training itself, in two batch sizes, and their average."""
