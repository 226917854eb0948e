"""What volumes are worth: fidelity, diversity, conditioning, copies, use for training."""
