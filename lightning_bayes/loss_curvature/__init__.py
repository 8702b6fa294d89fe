"""The Hessian of the training loss: its products with vectors, largest eigenvalue and sharpness."""
