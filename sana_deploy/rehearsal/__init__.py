"""The same on virtual GPUs: nothing is loaded, every byte is counted."""
