"""What there is: checkpoints, GPUs, libraries, the shapes of architectures. Imports no torch."""
