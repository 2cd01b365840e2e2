"""Fine-tuning towards the dense network's outputs, with NumPy alone."""
